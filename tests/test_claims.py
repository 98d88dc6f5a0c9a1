"""Verdicts follow the stated rule, sentences the verdicts, and a report is made from runs.jsonl alone."""
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from configurator import ConfigError, read_arms
from study import pictures
from study.claims import CLAIMS, CONTRASTS, PAPER_READINGS, Claim, Contrast
from study.details import COLUMNS
from study.map import write_map
from study.pictures import apart
from study.report import write_report
from study.verdicts import (Group, Judged, compare, count_verdicts, gains_at_equal_cost, judge, judge_group,
                            judge_lengths, overall, sentence, verdict_of)

HERE = Path(__file__).resolve().parents[1]
STEPS = 300


def record(arm, seed, loss, curve=None, **changes):
    """A record as records.py writes it. loss: test LM; curve: [(step, val loss)], else a straight line."""
    config = dict(gate="g1", mode="topk", estimator="ste_norm", budget=0.5, share_step=0.0,
                  oracle="off_policy", label_target="next", label_layers=1, label_share=1.0, lambda_lm=1.0,
                  lambda_distill=0.0, lambda_util=0.0, lambda_rank=0.0, lambda_jepa=0.0, lambda_anchor=0.0,
                  gate_lr=3e-3, learning_rate=3e-2, g1_hidden=8, latent=4, plugin=[])
    steps = changes.pop("max_iters", STEPS)
    group = dict(scale="tiny", max_iters=steps, batch_size=4, gradient_accumulation_steps=1, block_size=16,
                 cheap_rank=4, controlled=[1, 2], data="0" * 12, identity="a" * 16, backbone="backbone_long",
                 backbone_seed=0)
    for key, value in changes.items():
        (group if key in group else config)[key] = value
    mode = {"topk": "threshold"}.get(config["mode"], config["mode"])
    curve = curve or [(step, 2 + (loss - 2) * step / steps) for step in range(0, steps + 1, steps // 10)]
    logged = {"step": [0, 150], "losses": {"lm": [2.0, 1.5]}}
    if mode == "threshold":
        slope = {"ste": 0.001}.get(config["estimator"], 0.2)
        logged |= {"score_gradient": [0.2, 0.1], "gate_gradient": [1.0, 1.0],
                   "gate_gradient_without_jepa": [1.0, 1.0], "score_mean": [0.0, 1.0],
                   "score_std": [1.0, 1.0], "slope": [[0.2, 0.2], [0.2, slope]]}
    dead = [2] if mode == "threshold" and config["estimator"] == "ste" else []
    return {"arm": arm, "seed": seed, "group": group, "config": config, "machine": "a machine",
            "commit": "abcdef0", "parameters": 10, "trained_parameters": 5,
            "test_loss": {mode: loss}, "val_loss": {mode: loss},
            "dense_test_loss": 1.2, "dense_val_loss": 1.2, "layer_budgets": [0.5, 0.5], "dead_layers": dead,
            "realised_budget": {mode: [0.5, 0.4]} if mode == "threshold" else {}, "seconds": 10.0 + seed,
            "flops": {"forward_proxy": 1.1, "train_ratio": 0.5, "inference_ratio": 0.8}, "health": [],
            "evaluations": [[step, value, None] for step, value in curve], "logged": logged}


def references(seeds, **changes):
    return [*(record("cheap_only", seed, 1.8, mode="cheap", **changes) for seed in seeds),
            *(record("full_adapter", seed, 1.2, mode="adapter", **changes) for seed in seeds)]


def group_of(losses, **changes):
    """Arms with references. losses: {arm: [test loss of each seed]}."""
    seeds = range(max(map(len, losses.values())))
    arms = [record(arm, seed, loss, **changes) for arm, values in losses.items()
            for seed, loss in enumerate(values)]
    return Group([*references(seeds, **changes), *arms])


def judged(a, b, expected, **other):
    """The verdict of one contrast of test losses."""
    row = compare(group_of({"a": a, "b": b}), Contrast("test_loss", "a", "b", expected))
    judge([row], **other)
    return row


# -----------------------------------------------------------------------------
# one contrast

@pytest.mark.parametrize("a,b,expected,verdict", [
    ([1.3, 1.31, 1.32, 1.3, 1.31], [1.4, 1.42, 1.42, 1.41, 1.42], -1, "agree"),
    ([1.3, 1.31, 1.32, 1.3, 1.31], [1.4, 1.42, 1.42, 1.41, 1.42], 1, "disagree"),
    ([1.3, 1.31, 1.32, 1.3, 1.45], [1.4, 1.42, 1.42, 1.41, 1.42], -1, "undecided"),  # one sign differs
    ([1.3, 1.3, 1.3], [1.301, 1.4, 1.6], -1, "undecided"),  # all signs, and an interval that holds 0
    ([1.3], [1.5], -1, "undecided"),  # one seed decides nothing
    ([1.3, 1.3, 1.3], [1.301, 1.302, 1.301], 0, "agree"),  # inside +-0.005
    ([1.3, 1.3, 1.3], [1.4, 1.41, 1.4], 0, "disagree"),
    ([1.3, 1.3, 1.3], [1.32, 1.28, 1.3], 0, "undecided"),
    ([1.3, 1.3, 1.3], [1.304, 1.309, 1.307], 0, "disagree"),  # small, but apart
])
def test_verdicts_follow_the_rule(a, b, expected, verdict):
    assert judged(a, b, expected).verdict == verdict


def test_a_contrast_is_a_paired_t_test_over_shared_seeds():
    a, b = [1.3, 1.36, 1.33, 1.31, 1.5], [1.35, 1.45, 1.47, 1.42]  # seed 4 has no b
    row, theirs = judged(a, b, -1), stats.ttest_rel(a[:4], b)
    assert row.seeds == [0, 1, 2, 3]
    assert row.differences == pytest.approx([x - y for x, y in zip(a, b)])
    assert row.p == pytest.approx(theirs.pvalue)
    assert row.interval == pytest.approx(list(theirs.confidence_interval(0.95)))


def test_a_contrast_of_pairs_subtracts_twice():
    group = group_of({"a": [1.5, 1.6], "b": [1.3, 1.35], "c": [1.4, 1.45], "d": [1.38, 1.4]})
    row = compare(group, Contrast("test_loss", ("a", "b"), ("c", "d"), 1))
    assert row.differences == pytest.approx([0.2 - 0.02, 0.25 - 0.05])
    assert compare(group, Contrast("test_loss", ("a", "gone"), ("c", "d"), 1)) is None


def hits(steps):
    """A val curve that reaches half of the gap of `references`, 1.5, at a step; None: never."""
    return [(step, 1.4 if steps is not None and step >= steps else 1.7) for step in range(0, STEPS + 1, 30)]


def judged_hits(a, b, expected=-1):
    arms = [record(arm, seed, 1.4, hits(step)) for arm, steps in (("a", a), ("b", b))
            for seed, step in enumerate(steps)]
    group = Group([*references(range(len(a))), *arms])
    row = compare(group, Contrast("hit_50", "a", "b", expected))
    judge([row], group.spacing)
    return row


@pytest.mark.parametrize("a,b,expected,verdict", [
    ([60, 60, 90, 60, 60], [None] * 5, -1, "agree"),  # five hits against five times never
    ([None] * 5, [60, 60, 90, 60, 60], -1, "disagree"),
    ([60, 60, 90, 60, 60], [None, None, None, 300, None], -1, "agree"),  # never is later than the last step
    ([None] * 5, [None] * 5, -1, "undecided"),
    ([None] * 5, [None] * 5, 0, "agree"),
    ([60, 60], [90, 90], -1, "undecided"),  # one evaluation apart, twice: rounding could have made that
    ([60] * 5, [90] * 5, -1, "agree"),
    ([60, None, 60, 60, 60], [90, 90, 90, 90, 90], -1, "undecided"),
])
def test_a_hit_that_never_came_decides(a, b, expected, verdict):
    assert judged_hits(a, b, expected).verdict == verdict


def test_never_counts_as_twice_the_steps_and_hits_are_known_to_one_evaluation():
    row = judged_hits([60] * 4, [None] * 4)
    assert row.differences == [60 - 2 * STEPS] * 4
    error = 30 / math.sqrt(6) / math.sqrt(4)
    assert row.p == pytest.approx(2 * stats.t.sf(540 / error, 3))
    half = stats.t.ppf(0.975, 3) * error
    assert row.interval == pytest.approx((-540 - half, -540 + half))


def test_without_references_a_hit_is_unknown_and_not_never():
    group = Group([record(arm, seed, 1.4) for arm in "ab" for seed in range(3)])
    assert compare(group, Contrast("hit_50", "a", "b", -1)) is None
    assert compare(group, Contrast("cost_to_75", "a", "b", -1)) is None


def test_holm_over_the_signed_contrasts_alone():
    """Recomputed the slow way: each corrected p is the largest product up to its place."""
    rng = np.random.default_rng(0)
    rows = []
    for shift, expected in ((0.3, -1), (0.02, 1), (0.05, -1), (5.0, 0)):
        values = [dict(enumerate(rng.normal(mean, 0.03, 5))) for mean in (0, shift)]
        rows.append(Judged(Contrast("test_loss", "a", "b", expected), *values))
    judge(rows)
    p = sorted(row.p for row in rows[:3])
    slow = [min(1, max(p[j] * (3 - j) for j in range(i + 1))) for i in range(3)]
    assert sorted(row.p_holm for row in rows[:3]) == pytest.approx(slow)
    assert rows[3].p_holm is None and rows[3].verdict == "disagree"


def test_the_correction_can_take_a_verdict_away():
    a, b = [1.30, 1.30, 1.30, 1.30, 1.30], [1.302, 1.309, 1.304, 1.308, 1.303]
    alone = judged(a, b, -1)
    assert alone.verdict == "agree" and 0.005 < alone.p < 0.05
    crowd = [compare(group_of({"a": a, "b": b}), Contrast("test_loss", "a", "b", -1)) for _ in range(20)]
    judge(crowd)
    assert {row.verdict for row in crowd} == {"undecided"}


# -----------------------------------------------------------------------------
# the list

def listed():
    return [contrast for contrasts in CONTRASTS.values() for contrast in contrasts]


def arms_of(contrast):
    for side in (contrast.a, contrast.b):
        yield from (side if isinstance(side, tuple) else (side,))


def test_one_contrast_one_verdict():
    """No metric of the same two arms is listed twice, whichever stands first."""
    counted = Counter((metric, frozenset([a, b])) for metric, a, b, _ in listed())
    assert [key for key, count in counted.items() if count > 1] == []


def test_c7_and_h2_are_the_same_contrasts():
    by_name = {claim.name: claim for claim in CLAIMS}
    assert by_name["C7"].topics == by_name["H2"].topics == ("on-policy",)
    assert by_name["C7"].readings == by_name["H2"].readings


def test_every_arm_of_a_claim_exists_and_every_metric_is_reported():
    recipes = {path.stem for path in (HERE / "config").glob("*.py")} | set(read_arms())
    assert {arm for contrast in listed() for arm in arms_of(contrast)} - recipes == set()
    assert {contrast.metric for contrast in listed()} - set(COLUMNS) == set()


def test_claims_use_every_contrast_and_nothing_else():
    used = {(topic, reading) for claim in CLAIMS for topic in claim.topics for reading in claim.readings}
    assert used == set(CONTRASTS)


# -----------------------------------------------------------------------------
# claims and sentences

@pytest.mark.parametrize("verdicts,together", [
    (["agree", "agree"], "agree"), (["agree", "undecided"], "undecided"),
    (["disagree", "undecided"], "disagree"), (["agree", "disagree", "undecided"], "mixed"), ([], "not run")])
def test_a_claim_is_what_its_contrasts_are(verdicts, together):
    rows = [Judged(Contrast("test_loss", "a", "b", -1), {0: 1.0}, {0: 2.0}) for _ in verdicts]
    for row, verdict in zip(rows, verdicts):
        row.verdict = verdict
    assert verdict_of(rows) == together


@pytest.mark.parametrize("ste_norm,scaled,verdict", [
    ("agree", "agree", "agree"), ("agree", "undecided", "agree under ste_norm only"),
    ("not run", "disagree", "disagree under scaled only"),
    ("agree", "disagree", "agree under ste_norm, disagree under scaled"), ("not run", "not run", "not run")])
def test_a_verdict_under_one_reading_only_is_called_so(ste_norm, scaled, verdict):
    claim = Claim("C9", "", "", (), PAPER_READINGS)
    assert overall(claim, {"ste_norm": ste_norm, "scaled": scaled, "ste": "agree"}) == verdict


LOSSES = {"g1_no_utilrank": [1.40, 1.41, 1.42, 1.41, 1.40], "g3_no_utilrank": [1.43, 1.44, 1.45, 1.44, 1.43],
          "g1_full_aux": [1.30, 1.312, 1.319, 1.311, 1.301],
          "g3_full_aux": [1.33, 1.342, 1.349, 1.341, 1.331]}


def claim_sentence(losses, name="C2"):
    [claim] = [claim for claim in CLAIMS if claim.name == name]
    return sentence(claim, judge_group(group_of(losses)))


def test_a_sentence_follows_its_verdict():
    """The same runs, those with labels and those without exchanged, say the opposite in the same words."""
    swapped = {}
    for gate in ("g1", "g3"):
        swapped[f"{gate}_no_utilrank"] = LOSSES[f"{gate}_full_aux"]
        swapped[f"{gate}_full_aux"] = LOSSES[f"{gate}_no_utilrank"]
    against, in_favour = claim_sentence(LOSSES), claim_sentence(swapped)
    assert against.startswith("**C2: disagree under ste_norm only.**") and "under scaled: not run" in against
    assert in_favour == against.replace("disagree", "agree") != against
    assert "(8 contrasts: 8 disagree; seeds: 5)" in against


def test_a_claim_without_a_whole_topic_is_not_run():
    """C8 needs a quarter of the tokens too: G3 behind G1 at 50% alone is no verdict on it."""
    assert claim_sentence(LOSSES, "C8").startswith("**C8: not run.**")
    assert claim_sentence(LOSSES, "C1").startswith("**C1: disagree under ste_norm only.**")


def test_part_of_the_contrasts_is_counted_as_part():
    some = {arm: values for arm, values in LOSSES.items() if arm.startswith("g1")}
    assert "4 of 8 contrasts run" in claim_sentence(some)


def test_undecided_contrasts_tell_on_which_side_all_their_seeds_are():
    rows = [judged([1.30, 1.45], [1.5, 1.5], -1), judged([1.5, 1.5], [1.30, 1.45], -1),
            judged([1.3, 1.5], [1.4, 1.4], -1), judged([1.3], [1.5], -1)]
    assert {row.verdict for row in rows} == {"undecided"}
    both = "1 for it in all seeds, 1 against it in all seeds"
    assert count_verdicts(rows, 4) == f"4 contrasts: 4 undecided ({both})"
    assert count_verdicts(rows[2:], 4) == "2 of 4 contrasts run: 2 undecided"


def test_labels_are_weighed_against_their_cost():
    """At half the price a run without labels is compared with the middle of the run with them."""
    line = [(0, 2.0), (STEPS, 1.2)]
    dear = dict(forward_proxy=1.5, train_ratio=1.0, inference_ratio=0.8)
    group = Group([record("g1_no_utilrank", 0, 1.5, [(0, 2.0), (STEPS, 1.5)]),
                   {**record("g1_full_aux", 0, 1.2, line), "flops": dear}])
    gains = gains_at_equal_cost(group, "g1_no_utilrank", "g1_full_aux")
    assert gains == {0: (pytest.approx(0.3), pytest.approx(-0.1))}
    assert gains_at_equal_cost(group, "g3_no_utilrank", "g3_full_aux") == {}


# -----------------------------------------------------------------------------
# groups and the report

def study_records(max_iters=STEPS, better=0.0, seeds=range(3)):
    """Two arms with labels and without; `better`: what labels gain more than 0.1."""
    arms = []
    for seed in seeds:
        arms += [record("g1_no_utilrank", seed, 1.40 + 0.01 * seed, max_iters=max_iters),
                 record("g1_full_aux", seed, 1.30 - better + 0.012 * seed, max_iters=max_iters),
                 record("g1_ste", seed, 1.5, estimator="ste", max_iters=max_iters),
                 record("g1_full_aux_budget25", seed, 1.6, budget=0.25, max_iters=max_iters)]
    return [*references(seeds, max_iters=max_iters), *arms]


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of a report's time; the tests that need none of them leave them out."""
    monkeypatch.setattr(pictures, "write_group", lambda group, folder, slug: {})
    monkeypatch.setattr(pictures, "write_lengths", lambda groups, folder: [])


def write_runs(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def report(folder, records):
    """-> {page: its text}"""
    write_runs(folder, records)
    write_report(str(folder))
    return pages(folder)


def pages(folder):
    return {path.name: path.read_text() for path in folder.glob("*.md")}


def section(text, title):
    """From a heading to the next of its level."""
    level = title.split()[0]
    return text.split(f"{title}\n", 1)[1].split(f"\n{level} ", 1)[0]


def test_a_report_shows_every_seed_the_leaderboard_and_dead_gates(tmp_path):
    pages = report(tmp_path, study_records())
    board = section(pages["README.md"], "## 300 steps").splitlines()
    names = [line.split("`")[1] for line in board if line.startswith("| `")]
    assert names == ["full_adapter", "g1_full_aux", "g1_no_utilrank", "g1_ste", "cheap_only"]  # by gap closed
    [line] = [line for line in board if "`g1_full_aux`" in line]
    for cell in ("1.3120 (1.3000, 1.3120, 1.3240)", "81.3%", "33.3%", "0, 1, 2", "abcdef0"):
        assert f"| {cell} |" in line
    assert "python -m study --plugin=my_gate.py --arms=my_gate" in pages["README.md"]
    details = pages["every_seed.md"]
    assert "`g1_ste` seed 1: dead in layers 2." in details and "`g1_full_aux` seed 1: dead" not in details
    for page, names in (("README.md", ("curves", "gap_closed", "cost_quality")),
                        ("every_seed.md", ("hits", "score_health", "gate_gradients", "realised_budget"))):
        for name in names:
            assert f"({name}_300_steps.png)" in pages[page]
            assert (tmp_path / f"{name}_300_steps.png").stat().st_size < 100_000
    assert not (tmp_path / "predictors_300_steps.png").exists()  # there is no g3
    assert sorted(pages) == ["README.md", "every_seed.md", "verdicts.md"]


def test_two_groups_stand_apart_and_only_h5_compares_them(tmp_path, no_pictures):
    """The longer runs alone say what they say beside the shorter ones; H5 pairs the gains by seed."""
    long = study_records(1200, better=0.05)
    alone = report(tmp_path / "alone", long)
    both = report(tmp_path / "both", [*study_records(), *long])
    for page in ("README.md", "every_seed.md"):
        assert section(both[page], "## 1,200 steps") == section(alone[page], "## 1,200 steps")
    assert "## H5" in both["verdicts.md"] and "## H5" not in alone["verdicts.md"]
    groups = [Group(study_records()), Group(long)]
    [(shorter, longer, row)] = judge_lengths(groups)
    assert (shorter.max_iters, longer.max_iters) == (300, 1200)
    assert row.differences == pytest.approx([-0.05] * 3) and row.verdict == "disagree"
    other = [json.loads(json.dumps(r)) for r in long]
    for r in other:
        r["group"]["identity"] = "another backbone"
    assert judge_lengths([Group(study_records()), Group(other)]) == []


def test_distilled_arms_say_which_references_they_have(tmp_path, no_pictures):
    """Against references with the same losses where they are there, else against the others, marked."""
    distilled = [record("best", seed, 1.35, lambda_lm=0.0, lambda_distill=1.0) for seed in range(3)]
    own = [record(f"{arm}_distill", seed, loss, mode=mode, lambda_lm=0.0, lambda_distill=1.0)
           for seed in range(3)
           for arm, mode, loss in (("cheap_only", "cheap", 1.75), ("full_adapter", "adapter", 1.25))]
    without = report(tmp_path / "without", [*study_records(), *distilled])
    beside = report(tmp_path / "with", [*study_records(), *distilled, *own])
    [marked], [plain] = ([line for line in pages["README.md"].splitlines() if line.startswith("| `best`")]
                         for pages in (without, beside))
    assert "`best` †" in marked and "75.0%" in marked
    assert "trained as it is were not run" in without["README.md"]
    assert "†" not in plain and "80.0%" in plain


def test_a_broken_line_is_named_and_left_out(tmp_path, no_pictures, capsys):
    whole = report(tmp_path, study_records())
    with open(tmp_path / "runs.jsonl", "a") as f:
        f.write('{"arm": "g1_full_aux", "seed"\n')
    write_report(str(tmp_path))
    assert pages(tmp_path) == whole
    assert f"{tmp_path}/runs.jsonl:19" in capsys.readouterr().err


@pytest.mark.parametrize("name,content", [
    ("audit.json", "{"), ("audit.json", "[1]"), ("audit.json", '{"labels": 3}'),
    ("audit.json", '{"ceiling": {"a": 1}}'), ("audit.json", '{"curves": {"a": [[1]]}}'),
    ("tuning.json", '{"a": [["x"]]}')])
def test_a_broken_file_beside_is_named_and_left_out(tmp_path, no_pictures, capsys, name, content):
    whole = report(tmp_path, study_records(seeds=range(1)))
    (tmp_path / name).write_text(content)
    write_report(str(tmp_path))
    assert pages(tmp_path) == whole
    assert f"left out: {tmp_path}/{name}" in capsys.readouterr().err


def test_what_lies_beside_is_included(tmp_path, no_pictures):
    write_runs(tmp_path, study_records(seeds=range(1)))
    run = "g1_full_aux seed 0"
    labels = {"1": {"off_policy_next ~ flip_routed_later_next": 0.4, "scores ~ flip_full_own_next": 0.123},
              "2": {"off_policy_next ~ flip_routed_later_next": 0.6, "scores ~ flip_full_own_next": 0.123}}
    audit = {"labels": {f"{run}, step 300": labels},
             "ceiling": {run: {"rows": 64, "gate": 1.312, "dense_label": 1.284}},
             "curves": {run: [[0.0, 1.7, 0.0], [0.5, 1.4, 0.49]]}}
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    (tmp_path / "tuning.json").write_text(json.dumps({"g1, gate_lr": [[0.001, 1.4], [0.003, 1.3]]}))
    (tmp_path / "tried.md").write_text("Nothing helped.\n")
    write_report(str(tmp_path))
    audit, readme = (tmp_path / "audit.md").read_text(), (tmp_path / "README.md").read_text()
    assert "| off_policy_next ~ flip_routed_later_next | +0.40 | +0.60 | +0.50 |" in audit
    assert "+0.12" not in audit  # of what a reader doesn't ask
    assert f"| {run} | 64 | 1.3120 | 1.2840 |" in audit
    assert f"| {run} | 1.7000 (0.000) | 1.4000 (0.490) |" in audit
    assert (tmp_path / "budget_curves.png").exists() and "(audit.md)" in readme
    assert "| g1, gate_lr | 0.001: 1.4000, 0.003: 1.3000 | 0.003 |" in readme
    assert "## Tried\n\nNothing helped." in readme


def test_a_report_is_made_again_byte_for_byte_from_its_records(tmp_path):
    records = [*study_records(), *study_records(1200)]
    report(tmp_path / "a", records)
    report(tmp_path / "b", records[::-1])  # the order of the lines says nothing
    names = sorted(os.listdir(tmp_path / "a"))
    assert sorted(os.listdir(tmp_path / "b")) == names
    assert {"gain_over_length.png", "curves_over_length.png"} < set(names)
    names.remove("runs.jsonl")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="runs.jsonl"):
        write_report(str(tmp_path))
    with pytest.raises(ConfigError, match="python -m study"):
        write_map(str(tmp_path))


def test_the_map_has_a_column_for_each_regime(tmp_path):
    write_runs(tmp_path / "tiny", [*study_records(), *study_records(1200)])
    write_runs(tmp_path / "web", [{**r, "group": {**r["group"], "scale": "web"}} for r in study_records()])
    (tmp_path / "notes.md").write_text("What was not run.\n")
    write_map(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "| claim | reading | `tiny`, 300 steps | `tiny`, 1,200 steps | `web`, 300 steps |" in text
    [line] = [line for line in text.splitlines() if line.startswith("| C2")]
    assert line.count("(3) |") == 3 and "disagree (3)" in line
    [length] = [line for line in text.splitlines() if line.startswith("| H5")]
    assert length.count(" - |") == 2 and length.count("(3) |") == 1  # the longer runs, against the shorter
    assert "What was not run." in text and (tmp_path / "map.png").exists()
    assert all(f"- **{claim.name}**: {claim.text}" in text for claim in CLAIMS)


def test_names_in_a_picture_stand_apart():
    heights = apart({f"arm{i}": 0.5 for i in range(9)} | {"low": 0.0, "high": 1.0}, 0.05, 0.0, 1.0)
    ordered = sorted(heights.values())
    assert min(b - a for a, b in zip(ordered, ordered[1:])) > 0.0499
    assert heights["low"] == ordered[0] and heights["high"] == ordered[-1] <= 1.0
