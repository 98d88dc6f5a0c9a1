"""The study: arms become runs that train.py accepts, runs side by side end with their study, and what is
measured of them is what they did."""
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import study.__main__ as command
import study.tuning as tuning
import train
from configurator import ConfigError
from conftest import (checkpoint_of, copy_of, finish, go, log_of, same_run, script_words, start, summary_of,
                      tiny, write_jsonl)
from metrics import causal
from study.arms import SETS, Arms
from study.measures import measure, references_of
from study.records import finished_records, read_records, read_run, run_folders, write_records
from study.runner import Child

FOLDER = "out/tiny/study"
REFERENCES = ["cheap_only", "full_adapter"]
PLUGIN = '''
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


def words(*more):
    """A study of tiny runs, one at a time."""
    given = {word.partition("=")[0] for word in more}
    defaults = ("--backbone=backbone", "--jobs=1", "--seeds=0")
    defaults = [word for word in defaults if word.partition("=")[0] not in given]
    return tiny(*more, *defaults)


def config_of(run):
    return json.loads(Path(run, "config.json").read_text())


@pytest.fixture
def no_report(monkeypatch):
    """Without tables and pictures: what counts here is what lies under them."""
    monkeypatch.setattr(command, "make_report", lambda folder: None)


@pytest.fixture(scope="session")
def finished_references(templates, tmp_path_factory):
    """A folder to copy, with the finished references of seed 0 in a study."""
    folder = tmp_path_factory.mktemp("study") / "place"
    shutil.copytree(templates / "place", folder)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "make_report", lambda folder: None)
        go("study", *words("--arms=cheap_only", "--jobs=2"))
    return folder


@pytest.fixture
def references(finished_references, tmp_path, monkeypatch, no_report):
    return copy_of(finished_references, tmp_path, monkeypatch)


# -----------------------------------------------------------------------------
# arms

ALL = Arms([])


@pytest.mark.parametrize("arm", ALL.names)
def test_every_arm_is_a_run_of_its_own_name(arm):
    config, _ = train.configure_run(Arms(["--batch_size=4"]).words(arm, "--seed=3"))
    assert (config["recipe"], config["seed"], config["batch_size"]) == (arm, 3, 4)
    assert (config["backbone"], config["max_iters"], config["eval_interval"]) == ("backbone_long", 300, 30)


def test_sets_hold_arms_and_the_references_come_by_themselves():
    for name, arms in SETS.items():
        assert set(arms) <= set(ALL.resolve(name)) <= set(ALL.names)
    assert ALL.resolve("random") == [*REFERENCES, "random"]
    distilled = [*REFERENCES, "cheap_only_distill", "full_adapter_distill"]
    assert ALL.resolve("g1_distill") == [*distilled, "g1_distill"]
    by_muon = [*REFERENCES, "cheap_only_distill_muon", "full_adapter_distill_muon"]
    assert ALL.resolve("best") == [*by_muon, "best"]
    assert ALL.resolve("static,best")[2:4] == ["cheap_only_distill_muon", "full_adapter_distill_muon"]
    assert len(set(ALL.resolve("default,map,best"))) == len(ALL.resolve("default,map,best"))


@pytest.mark.parametrize("given,length", [
    ([], ("backbone_long", 300, 30)),
    (["--max_iters=1200"], ("backbone_long", 1200, 120)),
    (["--max_iters=1200", "--eval_interval=7", "--backbone=backbone"], ("backbone", 1200, 7)),
    (["config/web.py"], ("backbone_long", 600, 50)),
    (["config/web.py", "--max_iters=80"], ("backbone_long", 80, 8)),
    (["config/gpt2.py"], ("hf:gpt2", 2000, 100)),
])
def test_a_studys_length_is_its_own_unless_a_scale_or_a_word_says_another(given, length):
    config, _ = train.configure_run(Arms(given).words("g1_full_aux"))
    assert (config["backbone"], config["max_iters"], config["eval_interval"]) == length


def test_a_word_for_all_arms_replaces_an_arms_own():
    config, _ = train.configure_run(Arms(["--lambda_util=0.5"]).words("g1_lambda_01"))
    assert (config["lambda_util"], config["lambda_rank"]) == (0.5, 0.1)


@pytest.mark.parametrize("given,said", [
    (["--arms=g1_ful_aux"], "did you mean 'g1_full_aux'?"),
    (["--arms=mapp"], "did you mean 'map'?"),
    (["--arms=best,best"], "twice"),
    (["--arms="], "no recipe"),
    (["--seeds=0,x"], "--seeds='0,x'"),
    (["--seeds=1,1"], "twice"),
    (["--seeds=-1"], "negative"),
    (["--seeds="], "--seeds=''"),
    (["--jobs=two"], "jobs takes int"),
    (["--jobs=-1"], "negative"),
    (["--study=../away"], "plain name"),
    (["--seed=3"], "--seeds=0,1,2"),
    (["--out_dir=away"], "--study=NAME"),
    (["--arm=best"], "did you mean 'arms'?"),
    (["config/best.py"], "--arms=NAME"),
    (["--plugin=gone.py"], "gone.py"),
    (["--batch_size=0"], "batch_size"),
    (["--report_only", "--report=nowhere"], "nowhere/runs.jsonl"),
])
def test_what_cannot_be_run_is_refused_in_a_line_that_says_why(place, given, said):
    with pytest.raises(ConfigError) as error:
        go("study", *words(*given))
    assert said in str(error.value) and not Path(FOLDER).exists()


# -----------------------------------------------------------------------------
# running

def test_a_study_runs_arms_and_seeds_and_goes_on_where_it_was_left(references):
    held = (Path(FOLDER) / "cheap_only/seed0/summary.json").stat().st_mtime_ns
    said = go("study", *words("--arms=random", "--seeds=0,1", "--jobs=2"))
    assert "6 runs, 4 to do" in said and "projected:" in said and "4/4" in said
    records = {(r["arm"], r["seed"]): r for r in read_records(f"{FOLDER}/report")}
    assert sorted(records) == [(arm, seed) for arm in (*REFERENCES, "random") for seed in (0, 1)]
    assert held == (Path(FOLDER) / "cheap_only/seed0/summary.json").stat().st_mtime_ns
    [line] = [line for line in said.splitlines() if line.startswith("random:")]
    for seed in (0, 1):
        loss = causal(summary_of(f"{FOLDER}/random/seed{seed}")["test_loss"])
        assert f"{loss:.4f}" in line
    assert "inference FLOPs" in line
    assert "6 runs, 0 to do" in go("study", *words("--arms=random", "--seeds=0,1"))


def test_a_run_of_a_study_is_the_run_of_train_alone(references):
    go("study", *words("--arms=g1_on_policy"))
    changes = ["config/g1_full_aux.py", "--oracle=on_policy", "--recipe=g1_on_policy"]
    go("train", *tiny(*changes, "--out_dir=alone"))
    assert same_run(f"{FOLDER}/g1_on_policy/seed0", "alone")


@pytest.mark.parametrize("change", ["--max_iters=4", "--batch_size=2", "--cheap_rank=2", "--backbone_seed=1",
                                    "--block_size=8"])
def test_runs_that_may_not_be_compared_are_refused_before_anything_trains(references, change):
    before = sorted(map(str, Path("out").rglob("*")))
    with pytest.raises(ConfigError) as error:
        go("study", *words("--arms=random", change))
    key = change[2:].partition("=")[0]
    assert f"has {key}" in str(error.value) and "--study=NAME" in str(error.value)
    assert f"{FOLDER}/cheap_only/seed0" in str(error.value)
    assert before == sorted(map(str, Path("out").rglob("*")))


def test_another_study_takes_the_runs_that_one_refuses(references):
    go("study", *words("--arms=random", "--max_iters=4", "--study=short"))
    assert summary_of("out/tiny/short/random/seed0")["steps"] == 4
    assert summary_of(f"{FOLDER}/cheap_only/seed0")["steps"] == 6


def test_a_finished_run_of_another_config_is_not_taken_for_the_one_asked_for(references):
    with pytest.raises(ConfigError, match="learning_rate 0.03, not 0.01"):
        go("study", *words("--arms=cheap_only", "--learning_rate=0.01"))


def test_other_text_is_refused_though_it_has_the_same_name(references, documents):
    write_jsonl("other.jsonl", documents[:-1] + ["another document at the end of the text, of its own"])
    go("prepare", "--source=other.jsonl", "--name=tiny", "--tokenizer=bytes", "--overwrite")
    with pytest.raises(ConfigError, match="has data"):
        go("study", *words("--arms=random"))


def test_a_failed_run_is_named_with_its_reason_and_the_others_go_on(references, capsys):
    os.makedirs(f"{FOLDER}/random/seed0")
    Path(f"{FOLDER}/random/seed0/ckpt.pt").write_text("no checkpoint")
    with pytest.raises(ConfigError, match="1 runs failed: .*random/seed0: .*ckpt.pt is not a checkpoint"):
        go("study", *words("--arms=random,static"))
    assert "dense_test_loss" in summary_of(f"{FOLDER}/static/seed0")
    assert [r["arm"] for r in read_records(f"{FOLDER}/report")] == [*REFERENCES, "static"]


def test_the_output_of_an_older_attempt_is_no_reason_of_a_newer_one(place):
    os.makedirs("run")
    with open("run/stdout.txt", "w") as orphan:
        child = Child("run", ["--max_iters=zero"])
        orphan.write("step 3/6: lm 4.2\n")
        orphan.flush()
        child.process.wait()
        orphan.write("step 4/6: lm 4.1\n")
    assert child.process.returncode == 2 and "max_iters takes int" in child.reason()


# -----------------------------------------------------------------------------
# interruptions

def children_of(process):
    """Process ids of the children of a process, from /proc."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            children.append(int(stat.parent.name))
    return children


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while time.time() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number,code,said", [
    (signal.SIGTERM, 143, ""), (signal.SIGKILL, -9, ""), (signal.SIGINT, 130, "interrupted\n")])
def test_runs_end_with_their_study(references, number, code, said):
    long = words("--arms=g1_full_aux", "--max_iters=4000", "--eval_interval=50", "--study=long")
    process = start(*script_words("study"), *long)
    log = Path("out/tiny/long/cheap_only/seed0/log.jsonl")
    try:
        assert wait_for(lambda: log.exists() and log.read_text().count("\n") > 70)
        children = children_of(process.pid)
        process.send_signal(number)
        began = time.time()
        ended, _, error = finish(process, timeout=20)
    finally:
        process.kill()
    assert (ended, error) == (code, said) and time.time() - began < 10
    assert len(children) == 1 and wait_for(lambda: not is_alive(children[0]), 10)
    assert not Path("out/tiny/long/g1_full_aux").exists()


def test_an_interrupted_study_goes_on_to_the_same_numbers(references):
    long = ["--arms=cheap_only", "--max_iters=300", "--eval_interval=50"]
    process = start(*script_words("study"), *words(*long, "--study=long"))
    checkpoint = Path("out/tiny/long/cheap_only/seed0/ckpt.pt")
    try:
        assert wait_for(checkpoint.exists)
    finally:
        process.kill()
        finish(process)
    said = go("study", *words(*long, "--study=long"))
    assert "2 runs, 2 to do" in said or "2 runs, 1 to do" in said
    go("train", "config/cheap_only.py", *tiny(*long[1:]), "--out_dir=alone")
    assert same_run("out/tiny/long/cheap_only/seed0", "alone")


# -----------------------------------------------------------------------------
# plugins

@pytest.fixture
def plugin(references):
    from configurator import PLUGINS
    from gates import GATES
    Path("by_token.py").write_text(PLUGIN)
    yield "by_token.py"
    GATES.pop("by_token", None)
    PLUGINS.pop(os.path.realpath("by_token.py"), None)


def test_a_plugins_gate_is_an_arm_beside_references_that_stay_what_they_are(plugin):
    said = go("study", *words("--plugin=by_token.py", "--arms=by_token,random"))
    assert "4 runs, 2 to do" in said and any(line.startswith("by_token:") for line in said.splitlines())
    config = config_of(f"{FOLDER}/by_token/seed0")
    assert (config["gate"], config["lambda_util"], config["plugin"]) == ("by_token", 0, ["by_token.py"])
    assert config_of(f"{FOLDER}/random/seed0")["plugin"] == []
    records = {r["arm"]: r for r in read_records(f"{FOLDER}/report")}
    assert records["by_token"]["config"]["plugin"] == ["by_token.py"]
    assert "gap_closed" in measure(records["by_token"], [records[name] for name in REFERENCES])


def test_a_plugin_that_has_changed_since_is_not_reported_as_if_it_had_not(plugin):
    go("study", *words("--plugin=by_token.py", "--arms=by_token"))
    Path("by_token.py").write_text(PLUGIN + "# another idea\n")
    code, _, error = finish(start(*script_words("study"), *words("--plugin=by_token.py", "--arms=by_token")))
    assert code == 2 and "another version of the plugin" in error and f"{FOLDER}/by_token/seed0" in error


def test_a_key_of_a_plugin_goes_to_arms_with_a_learned_gate_only(place):
    from configurator import PLUGINS
    from gates import LOSSES
    Path("spread.py").write_text("from gates import LOSSES\n\n@LOSSES.register('spread')\n"
                                 "def spread_loss(step):\n"
                                 "    return sum(-r.scores.std(1).mean() for r in step.routes)\n")
    try:
        arms = Arms(["--lambda_spread=0.1", "--batch_size=4"], ["spread.py"])
        wanted = {"--plugin=spread.py", "--lambda_spread=0.1", "--batch_size=4"}
        assert wanted <= set(arms.words("g1_full_aux"))
        for arm in ("cheap_only", "random", "static"):
            assert not any("spread" in word for word in arms.words(arm))
    finally:
        LOSSES.pop("spread", None)
        PLUGINS.pop(os.path.realpath("spread.py"), None)


# -----------------------------------------------------------------------------
# tuning

def test_a_sweep_keeps_the_loss_of_every_trial(place, no_report, monkeypatch):
    rows = [("g1_no_utilrank", "gate_lr", (1e-3, 1e-2)), ("cheap_only", "learning_rate", (1e-2, 1e-1))]
    monkeypatch.setattr(tuning, "sweep", lambda: rows)
    go("study", "--tune", *words())
    losses = json.loads(Path(f"{FOLDER}/report/tuning.json").read_text())
    assert {name: [rate for rate, _ in trials] for name, trials in losses.items()} == {
        f"{arm}, {key}": list(rates) for arm, key, rates in rows}
    for arm, key, rates in rows:
        for (rate, loss), wanted in zip(losses[f"{arm}, {key}"], rates):
            run = tuning.trial_folder(f"{FOLDER}/tune", arm, wanted)
            assert rate == wanted and loss == causal(summary_of(run)["val_loss"])
            config = config_of(run)
            assert (config[key], config["seed"], config["max_iters"]) == (rate, tuning.SEED, 6)


def test_every_gate_and_estimator_gets_as_many_trials():
    assert {len(rates) for _, _, rates in tuning.sweep()} == {3}
    assert {arm for arm, _, _ in tuning.sweep()} <= set(ALL.names)


# -----------------------------------------------------------------------------
# records

def test_a_record_holds_what_the_run_logged(references):
    go("study", *words("--arms=g3_full_aux"))
    run = f"{FOLDER}/g3_full_aux/seed0"
    record, summary, log = read_run(run), summary_of(run), log_of(run)
    steps = [r for r in log if "grad_norm" in r]
    evaluations = [r for r in log if "val_loss" in r]
    assert record["logged"]["step"] == [r["step"] for r in steps]
    assert record["logged"]["losses"]["util"] == pytest.approx([r["losses"]["util"] for r in steps], rel=1e-5)
    assert record["logged"]["slope"][-1] == pytest.approx(steps[-1]["scores"]["slope"], rel=1e-5)
    assert [e[0] for e in record["evaluations"]] == [r["step"] for r in evaluations] == [0, 2, 4, 6]
    causal_losses = [r["val_loss"]["threshold"] for r in evaluations]
    assert [e[1] for e in record["evaluations"]] == pytest.approx(causal_losses, rel=1e-5)
    assert record["evaluations"][-1][2] == pytest.approx(evaluations[-1]["val_loss"]["topk"], rel=1e-5)
    ranks = [layer["effective_rank"] for layer in evaluations[-1]["health"].values()]
    assert record["health"][-1][2] == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
    assert record["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    assert record["group"]["identity"] == checkpoint_of(run)["identity"]
    assert len(json.dumps(record)) < 8000


def test_records_survive_writing_and_reading_and_replace_their_own(references, tmp_path):
    [cheap, dense] = finished_records(FOLDER)
    write_records(tmp_path, [dense])
    write_records(tmp_path, [cheap])
    assert read_records(tmp_path) == [cheap, dense]
    newer, longer = {**cheap, "seconds": 5.0}, {**cheap, "group": {**cheap["group"], "max_iters": 12}}
    write_records(tmp_path, [newer, longer])
    assert sorted(map(json.dumps, read_records(tmp_path))) == sorted(map(json.dumps, [newer, longer, dense]))


def test_a_broken_line_is_left_out_of_a_report_and_never_lost_by_writing(references, tmp_path, capsys):
    [cheap, dense] = finished_records(FOLDER)
    write_records(tmp_path, [cheap])
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text() + '{"arm": "best"}\n' + json.dumps(dense)[:-20] + "\n")
    assert read_records(tmp_path) == [cheap]
    said = capsys.readouterr().err
    assert f"{path}:2" in said and f"{path}:3" in said
    with pytest.raises(ConfigError, match="runs.jsonl:2"):
        write_records(tmp_path, [dense])
    assert path.read_text().count("\n") == 3


def spoil(name, text):
    path = Path(FOLDER, "cheap_only/seed0", name)
    path.write_text(text(path.read_text()))


@pytest.mark.parametrize("name,text", [
    ("summary.json", lambda text: text[:40]), ("summary.json", lambda text: "[]"),
    ("summary.json", lambda text: text.replace('"evaluations"', '"elsewhere"')),
    ("summary.json", lambda text: text.replace('"flops": {', '"flops": 1, "more": {')),
    ("config.json", lambda text: text.replace('"max_iters": 6', '"max_iters": "six"')),
    ("config.json", lambda text: text.replace('"recipe": "cheap_only"', '"recipe": "best"')),
    ("log.jsonl", lambda text: text[:-30]), ("log.jsonl", lambda text: "7\n" + text),
    ("log.jsonl", lambda text: text.replace('"grad_norm": {', '"grad_norm": 3, "x": {')),
])
def test_a_broken_run_is_named_and_left_out(references, capsys, name, text):
    spoil(name, text)
    assert [r["arm"] for r in finished_records(FOLDER)] == ["full_adapter"]
    assert f"{FOLDER}/cheap_only/seed0" in capsys.readouterr().err


def test_a_copy_beside_a_run_is_no_run(references):
    shutil.copytree(f"{FOLDER}/cheap_only/seed0", f"{FOLDER}/cheap_only/seed0.bak")
    shutil.copytree(f"{FOLDER}/cheap_only/seed0", f"{FOLDER}/cheap_only/seed_old")
    Path(f"{FOLDER}/cheap_only/seed7").write_text("a file")
    assert [(arm, seed) for arm, seed, _ in run_folders(FOLDER)] == [(name, 0) for name in REFERENCES]


def test_text_without_a_test_split_is_refused_before_anything_trains(place, no_report):
    os.remove("data/tiny/test.bin")
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    del meta["splits"]["test"]
    Path("data/tiny/meta.json").write_text(json.dumps(meta))
    with pytest.raises(ConfigError, match="no test split"):
        go("study", *words("--arms=random"))
    assert not Path(FOLDER).exists()


# -----------------------------------------------------------------------------
# measures, of records made by hand

def make_record(arm, mode, curve, test, distill=0.0, seed=0, **more):
    """curve: {step: val loss}."""
    evaluations = [[step, loss, loss - 0.1 if mode == "topk" else None] for step, loss in curve.items()]
    tests = {"topk": test - 0.1, "threshold": test} if mode == "topk" else {mode: test}
    lm = 0.0 if distill else 1.0
    return {"arm": arm, "seed": seed, "group": {"max_iters": 40, "scale": "tiny"},
            "config": {"mode": mode, "lambda_lm": lm, "lambda_distill": distill},
            "test_loss": tests, "val_loss": tests,
            "realised_budget": {"threshold": [0.4, 0.6]} if mode == "topk" else {},
            "flops": {"forward_proxy": 0.8, "train_ratio": 0.7, "inference_ratio": 0.75}, "seconds": 3.0,
            "evaluations": evaluations, "health": [], "logged": {}, **more}


CHEAP = make_record("cheap_only", "cheap", {0: 3.0, 20: 2.5, 40: 2.0}, 2.1)
DENSE = make_record("full_adapter", "adapter", {0: 1.5, 20: 1.2, 40: 1.0}, 1.1)


def test_hits_and_costs_are_measured_against_the_references_last_evaluation():
    record = make_record("g1", "topk", {0: 1.0, 10: 1.8, 20: 1.49, 30: 1.26, 40: 1.24}, 1.35)
    m = measure(record, (CHEAP, DENSE))
    assert (m["hit_25"], m["hit_50"], m["hit_75"], m["hit_90"]) == (20, 20, 40, None)
    assert m["cost_to_75"] == pytest.approx(40 * 0.7) and m["train_flops"] == pytest.approx(28)
    assert m["gap_closed"] == pytest.approx((2.1 - 1.35) / 1.0)
    assert m["best_loss"] == 1.24 and m["average_loss"] == pytest.approx((1.8 + 1.49 + 1.26 + 1.24) / 4)
    assert m["early_average_loss"] == pytest.approx((1.8 + 1.49) / 2)
    assert (m["causal_gap"], m["realised"]) == (pytest.approx(0.1), 0.5)


def test_a_target_never_reached_is_none_and_one_that_cannot_be_measured_is_absent():
    record = make_record("g1", "topk", {0: 3.0, 20: 1.9, 40: 1.7}, 1.9)
    m = measure(record, (CHEAP, DENSE))
    assert m["hit_75"] is None and m["cost_to_75"] is None and m["hit_25"] == 40
    alone = measure(record, (None, None))
    absent = {"hit_75", "cost_to_75", "gap_closed", "score_gradient", "slope", "effective_rank"}
    assert not absent & alone.keys()


def test_the_log_of_a_gate_gives_its_health():
    columns = {"step": [0, 10, 20], "score_gradient": [1.0, 9.0, 2.0],
               "slope": [[0.2, 0.2], [0.2, 0.1], [0.2, 0.004]], "label_correlation": [0.1, 0.2, 0.3]}
    health = [[0, 0.5, 4.0, 0.0], [40, -0.1, 3.0, 0.5]]
    record = make_record("g3", "topk", {0: 3.0, 40: 1.7}, 1.9, logged=columns, health=health)
    m = measure(record, (None, None))
    assert (m["score_gradient"], m["slope"], m["dead"], m["label_correlation"]) == (2.0, 0.004, True, 0.3)
    assert (m["r2_action_blind"], m["effective_rank"], m["collapsed"]) == (-0.1, 3.0, 0.5)


def test_an_arm_is_measured_against_references_with_its_losses_of_its_seed_and_group():
    curve = {0: 3.0, 40: 1.7}
    plain = make_record("g1", "topk", curve, 1.9)
    taught = make_record("best", "topk", curve, 1.9, distill=1.0)
    pair = [make_record(f"{name}_distill", mode, curve, 1.5, distill=1.0)
            for name, mode in (("cheap_only", "cheap"), ("full_adapter", "adapter"))]
    assert references_of(plain, [*pair, CHEAP, DENSE]) == ((CHEAP, DENSE), True)
    assert references_of(taught, [CHEAP, DENSE, *pair]) == (tuple(pair), True)
    assert references_of(taught, [CHEAP, DENSE, pair[0]]) == ((CHEAP, DENSE), False)
    other = {**CHEAP, "arm": "a_cheap_only", "config": {**CHEAP["config"], "muon_lr": 0.05}}
    assert references_of(plain, [other, CHEAP, DENSE]) == ((CHEAP, DENSE), True)
    assert references_of({**plain, "seed": 1}, [CHEAP, DENSE]) == ((None, None), False)
    longer = {**plain, "group": {"max_iters": 80, "scale": "tiny"}}
    assert references_of(longer, [CHEAP, DENSE]) == ((None, None), False)


# -----------------------------------------------------------------------------
# reports

def test_a_report_is_made_again_from_its_records_alone(references, tmp_path):
    write_records(tmp_path / "results/tiny", finished_records(FOLDER))
    shutil.rmtree("out")
    shutil.rmtree("data")
    code, _, error = finish(start(*script_words("study"), "--report_only", cwd=tmp_path))
    assert code == 0, error
    assert "full_adapter" in (tmp_path / "results/tiny/README.md").read_text()
