"""The study: arms become runs that train.py accepts, runs side by side end with their study and go on, verdicts
follow the rule, and a report is made from runs.jsonl alone."""
import json
import os
import signal
import time
from pathlib import Path

import pytest
from scipy import stats

import plots
import study
import train
from configurator import ConfigError, load_plugins
from conftest import HERE, finish, go, log_of, start, summary_of, tiny

FOLDER = "out/tiny/study"
STEPS = 300


# -----------------------------------------------------------------------------
# arms

def command(arm, *words):
    """The words of train.py for an arm, as a study of these words gives them."""
    return study.arm_command(arm, study.parse_words(list(words))[1])


@pytest.mark.parametrize("arm", study.all_arms())
def test_every_arm_is_a_run_of_its_own_name(arm):
    config, _, _ = train.configure_run(command(arm, "--batch_size=4"))
    assert (config["recipe"], config["batch_size"]) == (arm, 4)
    assert (config["backbone"], config["max_iters"], config["eval_interval"]) == ("backbone_long", 300, 30)


def test_the_references_come_by_themselves_trained_as_their_arms_are():
    for name, cheap, dense in (("random", "", ""), ("g1_distill", "_distill", "_distill"), ("map", "_distill", "_distill"),
                               ("distill_labels", "_distill_muon", "_distill_muon"),
                               ("best", "_distill_muon_fitted", "_distill_muon")):
        arms = study.resolve(name, study.parse_words([])[1])
        own = [f"cheap_only{cheap}", f"full_adapter{dense}"]
        assert set(study.SETS.get(name, [name])) | {*study.REFERENCES, *own} <= set(arms)
        assert len(set(arms)) == len(arms) and arms.index(own[1]) < arms.index(study.SETS.get(name, [name])[-1])


@pytest.mark.parametrize("given,length", [
    (["--max_iters=1200"], ("backbone_long", 1200, 120)),
    (["--max_iters=1200", "--eval_interval=7", "--backbone=backbone"], ("backbone", 1200, 7)),
    (["config/web.py"], ("backbone_long", 600, 60)), (["config/smollm2.py"], ("hf:", 200, 50))])
def test_a_studys_length_is_its_own_unless_a_scale_or_a_word_says_another(given, length):
    config = study.configure(train.DEFAULTS, command("cheap_only", *given))[0]
    assert config["backbone"].startswith(length[0]) and (config["max_iters"], config["eval_interval"]) == length[1:]


def test_a_word_for_all_arms_replaces_an_arms_own():
    config, _, _ = train.configure_run(command("g1_lambda_01", "--lambda_util=0.5"))
    assert (config["lambda_util"], config["lambda_rank"]) == (0.5, 0.1)


@pytest.mark.parametrize("given,said", [
    (["--arms=g1_ful_aux"], "did you mean 'g1_full_aux'"), (["--seeds=0,x"], "--seeds='0,x'"),
    (["--seeds=1,1"], "--seeds='1,1'"), (["--jobs=-1"], "--jobs=-1"), (["--seed=3"], "--seeds=0,1,2"),
    (["--out_dir=away"], "--study=NAME"), (["--arm=best"], "did you mean 'arms'"),
    (["config/best.py"], "--arms=NAME"), (["--report_only", "--report=nowhere"], "nowhere/runs.jsonl")])
def test_what_cannot_be_run_is_refused_in_a_line_that_says_why(place, given, said):
    with pytest.raises(ConfigError) as error:
        go("study", *tiny(*given))
    assert said in str(error.value) and not Path(FOLDER).exists()


def test_text_without_a_test_split_is_refused_before_anything_trains(place):
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    del meta["splits"]["test"]
    Path("data/tiny/meta.json").write_text(json.dumps(meta))
    with pytest.raises(ConfigError, match="no test split"):
        go("study", *tiny("--arms=random"))
    assert not Path(FOLDER).exists()


# -----------------------------------------------------------------------------
# runs side by side

GATE = '''
import torch.nn as nn
from gates import GATES, Gate

@GATES.register("by_token")
class TokenGate(Gate):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.score = nn.Embedding(config.vocab_size, 1)

    def forward(self, h, context):
        return self.score(context.tokens).squeeze(-1), None
'''


def test_a_study_stops_goes_on_names_what_failed_and_prints_its_lines(place, forget):
    """Two references x two seeds; then a gate of a plugin beside them."""
    words = tiny("--arms=cheap_only", "--seeds=0,1", "--backbone=backbone", "--max_iters=400",
                 "--eval_interval=200", "--log_interval=16")
    process = start(HERE / "study.py", *words, "--jobs=1")
    log, until = Path(FOLDER, "cheap_only/seed0/log.jsonl"), time.time() + 60
    while not (log.exists() and log.read_text().count("\n") > 3) and time.time() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, out, error = finish(process)
    assert (code, error) == (143, "") and "stopping" in out
    assert Path(FOLDER, "cheap_only/seed0/ckpt.pt").exists()  # the run has saved its step
    assert not Path(FOLDER, "cheap_only/seed0/summary.json").exists()

    os.makedirs(f"{FOLDER}/full_adapter/seed1", exist_ok=True)
    Path(f"{FOLDER}/full_adapter/seed1/ckpt.pt").write_text("no checkpoint")
    code, out, error = finish(start(HERE / "study.py", *words, "--jobs=2"))
    assert code == 2 and error.startswith("error: 1 of 4 runs failed: out/tiny/study/full_adapter/seed1: error: ")
    assert "not a checkpoint" in error and "4 runs, 4 to do, 2 at a time" in out and "3 of 4: " in out
    go("train", *tiny("config/cheap_only.py", *words[2:6]), "--out_dir=alone")
    assert log_of(f"{FOLDER}/cheap_only/seed0") == log_of("alone")
    [line] = [line for line in out.splitlines() if line.startswith("arm `cheap_only`")]
    for seed in (0, 1):
        assert f"{summary_of(f'{FOLDER}/cheap_only/seed{seed}')['test']['cheap']['loss']:.4f}" in line
    with pytest.raises(ConfigError, match="learning_rate .there 0.03, here 0.01.; .*--study=NAME"):
        go("study", *words, "--learning_rate=0.01")

    Path("by_token.py").write_text(GATE)
    out = go("study", "--seeds=0", "--arms=by_token", "--plugin=by_token.py", *words[2:])
    assert "3 runs, 1 to do" in out and "arm `by_token`; budget 50%; test LM: mean (each seed) " in out
    records = {(r["arm"], r["seed"]): r for r in study.read_records(f"{FOLDER}/report")}
    assert set(records) == {("cheap_only", 0), ("cheap_only", 1), ("full_adapter", 0), ("by_token", 0)}
    record, run = records["by_token", 0], f"{FOLDER}/by_token/seed0"
    assert (record["config"]["gate"], record["config"]["lambda_util"]) == ("by_token", 0)
    held, steps = json.loads(Path(run, "config.json").read_text()), [r for r in log_of(run) if "losses" in r]
    assert list(held["plugins"].values()) == [GATE]
    assert json.loads(Path(FOLDER, "cheap_only/seed1/config.json").read_text())["plugins"] == {}
    assert record["group"]["backbone"] == held["backbone"]["weights"][:12]
    assert record["test"]["threshold"]["kl"] == pytest.approx(summary_of(run)["test"]["threshold"]["kl"], rel=1e-5)
    assert [step for step, _ in record["evaluations"]] == [0, 200, 400]
    assert (record["logged"]["step"], len(steps)) == ([r["step"] for r in steps], 25)
    assert record["logged"]["slope"][-1] == pytest.approx(min(steps[-1]["scores"]["slope"]), rel=1e-2)


def test_where_the_first_run_cannot_start_no_other_is_tried(place):
    with pytest.raises(ConfigError, match="1 of 3 runs failed: .*cheap_only/seed0: error: data/gone does not exist"):
        go("study", *tiny("--arms=random", "--seeds=0", "--dataset=gone"))


def test_a_plugin_goes_to_the_arms_that_name_something_of_it(tmp_path, forget):
    (tmp_path / "spread.py").write_text("from gates import LOSSES, Loss\n\n@LOSSES.register('spread')\n"
                                        "class Spread(Loss):\n    def __call__(self, trace):\n        return 0\n")
    path = f"--plugin={tmp_path / 'spread.py'}"
    load_plugins([path])
    assert path not in command("g1_full_aux")
    assert {path, "--lambda_spread=0.1"} <= set(command("g1_full_aux", path, "--lambda_spread=0.1"))


# -----------------------------------------------------------------------------
# measures and verdicts, of records made by hand

def record(arm, seed, loss, curve=None, steps=STEPS, **changes):
    """loss: test LM; curve: {step: val loss}, else a straight line from 2."""
    config = dict(gate="g1", mode="topk", estimator="ste_norm", budget=0.5, lambda_lm=1.0, lambda_distill=0.0,
                  muon_lr=0.0) | changes
    mode = {"topk": "threshold"}.get(config["mode"], config["mode"])
    curve = curve or {step: 2 + (loss - 2) * step / steps for step in range(0, steps + 1, steps // 10)}
    group = dict(scale="tiny", max_iters=steps, batch_size=4, gradient_accumulation_steps=1, block_size=16,
                 cheap_rank=4, controlled=[1, 2], backbone_seed=0, data="0", backbone="a",
                 backbone_name="backbone_long")
    logged = {"step": [0, 150]}
    if mode == "threshold":
        slope = 0.001 if config["estimator"] == "ste" else 0.2
        logged |= {"score_mean": [0.0, 1.0], "slope": [0.2, slope], "score_gradient": [0.2, 0.1]}
    return {"arm": arm, "seed": seed, "group": group, "config": config, "machine": "a machine", "commit": "abc",
            "seconds": 10.0, "flops": {"forward_proxy": 1.1, "train_ratio": 0.5, "inference_ratio": 0.8},
            "val": loss, "test": {mode: {"loss": loss}}, "evaluations": [list(pair) for pair in curve.items()],
            "predictor": [], "logged": logged, "score_gradient": 0.1}


def references(seeds, ending="", cheap=1.8, dense=1.2, **changes):
    modes = (("cheap_only", "cheap", cheap), ("full_adapter", "adapter", dense))
    return [record(f"{arm}{ending}", seed, loss, mode=mode, **changes) for seed in seeds
            for arm, mode, loss in modes]


def group_of(losses, **changes):
    """Arms with references. losses: {arm: [test loss of each seed]}."""
    arms = [record(arm, seed, loss, **changes) for arm, values in losses.items() for seed, loss in enumerate(values)]
    return study.Group([*references(range(5)), *arms])


def test_gap_hits_and_cost_are_measured_against_the_references():
    curve = {0: 1.0, 60: 1.7, 120: 1.49, 180: 1.36, 300: 1.33}
    m = study.Group([*references([0]), record("a", 0, 1.35, curve)]).measures["a", 0]
    assert [m[f"own_hit_{level}"] for level in (25, 50, 75, 90)] == [120, 120, 300, None]
    assert m["cost_to_75"] == pytest.approx(300 * 0.5) and m["gap"] == m["own_gap"] == pytest.approx(0.75)
    assert m["best_loss"] == 1.33 and m["average_loss"] == pytest.approx((1.7 + 1.49 + 1.36 + 1.33) / 4)
    assert m["early_average_loss"] == pytest.approx((1.7 + 1.49) / 2)
    assert not {"gap", "hit_50", "cost_to_75"} & study.Group([record("a", 0, 1.35)]).measures["a", 0].keys()


def test_references_are_found_by_how_they_were_trained():
    taught = {"lambda_lm": 0.0, "lambda_distill": 1.0}
    own = references([0], "_distill_muon", cheap=1.6, dense=1.3, muon_lr=0.03, **taught)
    best = record("best", 0, 1.36, muon_lr=0.03, **taught)
    m = study.Group([*references([0, 1]), *own, best]).measures["best", 0]
    fitted = record("cheap_only_distill_muon_fitted", 0, 1.5), record("fitted", 0, 1.36, muon_lr=0.03, **taught)
    fitted[1]["config"]["cheap_start"] = "fitted"
    assert study.Group([*own, *fitted]).measures["fitted", 0]["own_gap"] == pytest.approx(0.14 / 0.2)
    assert m["gap"] == pytest.approx(0.44 / 0.6) and m["own_gap"] == pytest.approx(0.24 / 0.3)
    other_seed = study.Group([*references([1]), *own, best]).measures["best", 0]
    assert "gap" not in other_seed and other_seed["own_gap"] == m["own_gap"]


@pytest.mark.parametrize("a,b,sign,verdict", [
    ([1.3, 1.31, 1.32, 1.3, 1.31], [1.4, 1.42, 1.42, 1.41, 1.42], -1, "agree"),
    ([1.3, 1.31, 1.32, 1.3, 1.31], [1.4, 1.42, 1.42, 1.41, 1.42], 1, "disagree"),
    ([1.3, 1.31, 1.32, 1.3, 1.4201], [1.4, 1.42, 1.42, 1.41, 1.42], -1, "undecided"),  # one sign differs
    ([1.3, 1.3, 1.3], [1.301, 1.4, 1.6], -1, "undecided"),  # one sign, and an interval that holds 0
    ([1.3], [1.5], -1, "undecided"),  # one seed decides nothing
    ([1.3, 1.3, 1.3], [1.301, 1.302, 1.301], 0, "agree"),  # inside +-0.005
    ([1.3, 1.3, 1.3], [1.4, 1.41, 1.4], 0, "disagree"), ([1.3, 1.3, 1.3], [1.32, 1.28, 1.3], 0, "undecided")])
def test_verdicts_follow_the_rule(a, b, sign, verdict):
    row = study.compare(group_of({"a": a, "b": b}), "test_loss", "a", "b", sign)
    assert row.verdict == verdict
    assert row.differences == pytest.approx([x - y for x, y in zip(a, b)])


def test_the_interval_is_that_of_a_paired_t_test_over_shared_seeds():
    a, b = [1.3, 1.36, 1.33, 1.31, 1.5], [1.35, 1.45, 1.47, 1.42]  # seed 4 has no b
    row = study.compare(group_of({"a": a, "b": b}), "test_loss", "a", "b", -1)
    theirs = stats.ttest_rel(a[:4], b)
    assert row.interval == pytest.approx(list(theirs.confidence_interval(0.95)))
    pair = study.compare(group_of({"a": a, "b": b, "c": a[:3]}), "test_loss", ("a", "b"), ("c", "a"), 1)
    assert pair.differences == pytest.approx([x - y for x, y in zip(a[:3], b)])


def hits(step):
    """A val curve that reaches half of the gap of `references`, 1.5, at a step; None: never."""
    return {s: 1.4 if step is not None and s >= step else 1.7 for s in range(0, STEPS + 1, 30)}


@pytest.mark.parametrize("a,b,sign,verdict", [
    ([60, 60, 90, 60, 60], [None] * 5, -1, "agree"), ([None] * 5, [60, 60, 90, 60, 60], -1, "disagree"),
    ([60, 60, 90, 60, 60], [None, None, None, 300, None], -1, "agree"),  # never is later than the last step
    ([None] * 5, [None] * 5, -1, "undecided"), ([None] * 5, [None] * 5, 0, "agree"),
    ([60, 60], [90, 90], -1, "undecided"),  # one evaluation apart, twice: rounding could have made that
    ([60] * 5, [90] * 5, -1, "agree")])
def test_a_hit_that_never_came_is_later_than_any(a, b, sign, verdict):
    arms = [record(arm, seed, 1.4, hits(step)) for arm, steps in (("a", a), ("b", b))
            for seed, step in enumerate(steps)]
    row = study.compare(study.Group([*references(range(5)), *arms]), "own_hit_50", "a", "b", sign)
    assert row.verdict == verdict and row.values == (a, b)


def test_every_arm_and_metric_of_a_claim_exists():
    arms = set(study.all_arms())
    for name, claim in study.CLAIMS.items():
        for reading in claim.readings:
            for _, *sides, _ in claim.contrasts:
                for side in sides:
                    for one in side if isinstance(side, tuple) else (side,):
                        assert {study.named(one, gate, reading) for gate in ("g1", "g3")} <= arms, (name, one)


LOSSES = {"g1_no_utilrank": [1.40, 1.41, 1.42], "g3_no_utilrank": [1.43, 1.44, 1.45],
          "g1_full_aux": [1.30, 1.312, 1.319], "g3_full_aux": [1.33, 1.342, 1.349], "static": [1.50, 1.52, 1.51]}


def test_a_claim_is_what_its_contrasts_are_and_not_run_without_a_part_of_them():
    group = group_of(LOSSES)
    verdicts = {name: study.map_cell(study.rows_of(group, claim, "ste_norm")) for name, claim in study.CLAIMS.items()}
    assert verdicts["C2"] == verdicts["C1"] == "disagree (3)" and verdicts["C4"] == "G1 1.00x G3 1.00x"
    assert verdicts["H0"] == "agree (3)" and verdicts["C8"] == verdicts["C7"] == "-"
    rows = [study.Row("", "", "", 1, (), [], None, verdict) for verdict in ("agree", "undecided", "disagree")]
    assert [study.verdict_of(some) for some in (rows, rows[:2], rows[1:])] == ["mixed", "undecided", "disagree"]


# -----------------------------------------------------------------------------
# reports

def records_of(steps=STEPS, **group):
    runs = [record("g1_ste", 1, 1.6, estimator="ste", steps=steps), *references(range(3), steps=steps)]
    for arm, values in LOSSES.items():
        runs += [record(arm, seed, loss, steps=steps) for seed, loss in enumerate(values)]
    return [run | {"group": run["group"] | group} for run in runs]


def report(folder, records):
    folder.mkdir(parents=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    study.make_report(str(folder))
    return (folder / "README.md").read_text()


def test_groups_meet_in_the_map_alone(tmp_path):
    short, long = records_of(), records_of(1200)
    both = report(tmp_path / "results/tiny", [*short, *long])
    only = report(tmp_path / "results/web", records_of(scale="web"))
    for page in (both, only):
        section = page.split("## 300 steps\n")[1]
        [line] = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| `g1_full_aux`")]
        assert line == ("| `g1_full_aux` | 50% | 1.3103 (1.3000 1.3120 1.3190) | 1.3103 | 81.6% | 81.6% | 150.0 "
                        "| 0.500 | 0.800 | 0 1 2 |")
    for part in ("`g1_ste` seed 1", "19 contrasts were looked at", "(curves_300_steps.png)", "| C2 | ste_norm |"):
        assert part in both
    (tmp_path / "results/notes.md").write_text("What was not run.\n")
    study.write_map(str(tmp_path / "results"))
    text = (tmp_path / "results/README.md").read_text()
    assert "| claim | reading | `tiny`, 300 steps | `tiny`, 1,200 steps | `web`, 300 steps |" in text
    assert "| C2 | ste_norm | disagree (3) | disagree (3) | disagree (3) |" in text and "What was not run." in text


def test_groups_that_differ_in_a_hash_alone_have_names_and_pictures_of_their_own(tmp_path):
    page = report(tmp_path / "tiny", [*records_of(), *records_of(backbone="b")])
    assert [group.title for group in study.read_groups(tmp_path / "tiny")] == ["300 steps", "300 steps, backbone b"]
    assert page.count("](curves_300_steps.png)") == page.count("](curves_300_steps_backbone_b.png)") == 1


def test_a_report_is_made_again_byte_for_byte_from_its_records(tmp_path):
    records = [*records_of(), *records_of(1200)]
    report(tmp_path / "a", records)
    report(tmp_path / "b", records[::-1])  # the order of the lines says nothing
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"README.md", "gates_300_steps.png", "curves_1200_steps.png"} < set(names)
    for name in [name for name in names if name != "runs.jsonl"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_record_replaces_its_own_and_no_other(tmp_path):
    first, other = record("a", 0, 1.3), record("a", 0, 1.3, steps=600)
    study.write_records(tmp_path, [first, other])
    study.write_records(tmp_path, [first | {"val": 9.0}])
    assert sorted(r["val"] for r in study.read_records(tmp_path)) == [1.3, 9.0]


def test_the_picture_of_speed_takes_a_small_table(tmp_path):
    row = {"loss": 3.1, "kl": 0.3, "agreement": 0.8, "tokens_per_s": 11.0, "inference_ratio": 0.8}
    plots.serving(tmp_path / "a.png", {"best": [{"budget": b, **row} for b in (0.5, 0.25, None)]})
    assert (tmp_path / "a.png").stat().st_size > 10_000
