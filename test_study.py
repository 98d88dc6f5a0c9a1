"""The study: verdicts follow the stated rule, audits measure what they say, every arm is a run that train.py accepts."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import audit
import report
import study
import train
from configurator import configure
from conftest import go, recipe, summary_of, tiny

RUN = "out/tiny/g1_full_aux/seed0"


def arms(**losses):
    """measured, from {arm: [test loss of each seed]}."""
    return {arm: {seed: {"test_loss": v} for seed, v in enumerate(values)} for arm, values in losses.items()}


def judged(a, b, sign, corrected=True):
    row = report.contrast("test_loss", "a", "b", sign, arms(a=a, b=b), range(len(a)))
    report.judge([row], corrected)
    return row


# -----------------------------------------------------------------------------
# verdicts

@pytest.mark.parametrize("a,b,sign,verdict", [
    ([1.0, 1.1, 1.2, 1.0, 1.1], [1.2, 1.31, 1.4, 1.21, 1.3], -1, "agree"),
    ([1.0, 1.1, 1.2, 1.0, 1.1], [1.2, 1.31, 1.4, 1.21, 1.3], 1, "disagree"),
    ([1.0, 1.1, 1.2, 1.0, 1.4], [1.2, 1.31, 1.4, 1.21, 1.3], -1, "undecided"),  # one sign differs
    ([1.0, 1.0, 1.0], [1.001, 1.2, 1.5], -1, "undecided"),  # the interval holds 0
    ([1.0], [2.0], -1, "undecided"),  # one seed decides nothing
    ([1.0, 1.0, 1.0], [1.001, 1.002, 1.001], 0, "agree"),  # inside +-0.005
    ([1.0, 1.0, 1.0], [1.1, 1.11, 1.1], 0, "disagree"),
    ([1.0, 1.0, 1.0], [1.02, 0.98, 1.0], 0, "undecided"),
])
def test_verdicts_follow_the_rule(a, b, sign, verdict):
    assert judged(a, b, sign)["verdict"] == verdict


def test_intervals_and_p_are_those_of_a_paired_t_test():
    a, b = [1.0, 1.3, 1.2, 1.0], [1.1, 1.35, 1.5, 1.2]
    row, theirs = judged(a, b, -1), stats.ttest_rel(a, b)
    assert row["p"] == pytest.approx(theirs.pvalue)
    assert row["interval"] == pytest.approx(list(theirs.confidence_interval(0.95)))


def test_holm_multiplies_the_smallest_p_by_the_number_of_contrasts():
    rng = np.random.default_rng(0)
    rows = [report.contrast("test_loss", "a", "b", -1, arms(a=rng.normal(0, 1, 5), b=rng.normal(shift, 1, 5)), range(5)) for shift in (3, 2, 0.5)]
    report.judge(rows)
    p = sorted(r["p"] for r in rows)
    expected = [min(1, 3 * p[0]), min(1, max(3 * p[0], 2 * p[1])), min(1, max(3 * p[0], 2 * p[1], p[2]))]
    assert sorted(r["p_holm"] for r in rows) == pytest.approx(expected)


def test_a_contrast_of_differences_subtracts_twice():
    measured = arms(a=[5.0, 6.0], b=[1.0, 1.5], c=[4.0, 4.0], d=[3.0, 2.0])
    row = report.contrast("test_loss", ("a", "b"), ("c", "d"), -1, measured, [0, 1])
    assert row["differences"] == [4.0 - 1.0, 4.5 - 2.0] and (row["a"], row["b"]) == ("(a - b)", "(c - d)")
    assert report.contrast("test_loss", ("a", "gone"), ("c", "d"), -1, measured, [0, 1]) is None


def test_the_second_verdict_compares_the_same_recipes_under_scaled():
    losses = {"g1_full_aux": [1.0, 1.0], "g3_full_aux": [1.1, 1.2], "g1_scaled_off_policy": [2.0, 2.0], "g3_scaled_off_policy": [2.3, 2.4]}
    [row] = [r for r in report.contrasts(arms(**losses), [0, 1]) if (r["claim"], r["metric"]) == ("C1", "test_loss")]
    assert row["differences"] == pytest.approx([0.1, 0.2]) and row["scaled"]["differences"] == pytest.approx([0.3, 0.4])


def test_every_arm_of_a_claim_exists():
    named = {x for _, _, specs in report.CLAIMS for _, a, b, _ in specs for arm in (a, b) for x in (arm if isinstance(arm, tuple) else (arm,))}
    assert named | set(report.UNDER_SCALED.values()) | set(study.TIER1 + study.TIER2 + study.TIER3) <= set(study.all_arms())


def test_a_report_holds_every_finished_run_whichever_arms_were_asked_for(done):
    for arm, seed in (("cheap_only", 0), ("full_adapter", 0), ("random", 0), ("random", 1)):
        go("train", *tiny(recipe(arm), f"--seed={seed}", f"--out_dir=out/tiny/study/{arm}/seed{seed}"))
    go("study", *tiny("--arms=random", "--seeds=0", "--jobs=1", "--backbone=backbone"))
    found = json.loads(Path("out/tiny/study/results.json").read_text())["arms"]
    assert {a: sorted(s) for a, s in found.items()} == {"cheap_only": ["0"], "full_adapter": ["0"], "random": ["0", "1"]}
    assert "gap_closed" in found["random"]["0"] and "gap_closed" not in found["random"]["1"]


# -----------------------------------------------------------------------------
# arms

@pytest.mark.parametrize("arm", study.all_arms())
def test_every_arm_is_a_run_of_its_own_name(arm):
    words = study.arm_words(arm, 3, ["--batch_size=4"], "there")
    config = train.validate(configure(train.DEFAULTS, words))
    assert (config["recipe"], config["seed"], config["out_dir"], config["batch_size"]) == (arm, 3, os.path.join("there", arm, "seed3"), 4)
    assert config["max_iters"] == study.RUN_DEFAULTS["max_iters"]


def test_a_word_of_the_user_replaces_that_of_a_variant():
    config = configure(train.DEFAULTS, study.arm_words("g1_lambda_3", 0, ["--lambda_util=0.5"], "there"))
    assert (config["lambda_util"], config["lambda_rank"]) == (0.5, 3.0)


def test_a_sweep_gives_every_arm_as_many_trials_and_keeps_the_losses(place, monkeypatch):
    monkeypatch.setattr(study, "TUNED_ARMS", ["g1_no_utilrank"])
    monkeypatch.setattr(study, "TRIALS", {"gate_lr": (1e-3, 1e-2), "learning_rate": {"cheap_only": (1e-3, 1e-1)}})
    monkeypatch.setattr(study, "TUNE", dict(seed=10, max_iters=3, eval_interval=3))
    go("study", "--tune", "--jobs=1", *(w for w in tiny("--backbone=backbone") if "max_iters" not in w and "eval_interval" not in w))
    found = json.loads(Path("out/tiny/study/tuning.json").read_text())
    assert {k: [lr for lr, _ in v] for k, v in found.items()} == {"g1_no_utilrank, gate_lr": [1e-3, 1e-2], "cheap_only, learning_rate": [1e-3, 1e-1]}
    for arm, rate in (("g1_no_utilrank", 0.01), ("cheap_only", 0.1)):
        summary = summary_of(f"out/tiny/study/tune/{rate}/{arm}/seed10")
        assert summary["steps"] == 3 and [rate, train.causal(summary["val_loss"])] in [v for trials in found.values() for v in trials]


# -----------------------------------------------------------------------------
# audits

def test_kept_checkpoints_are_the_runs_own_at_that_step_and_go_with_overwrite(place):
    go("train", *tiny(recipe("g1_full_aux"), "--keep_checkpoints"))
    assert sorted(p.name for p in Path(RUN).glob("ckpt-*.pt")) == [f"ckpt-{s}.pt" for s in (0, 2, 4, 6)]
    early, late = (audit.label_audit(RUN, name, rows=2, positions=5) for name in ("ckpt-0.pt", "ckpt.pt"))
    assert late == audit.label_audit(RUN, "ckpt-6.pt", rows=2, positions=5) and early != late
    go("train", *tiny(recipe("g1_full_aux"), "--overwrite"))
    assert not list(Path(RUN).glob("ckpt-*.pt"))


def test_at_the_last_layer_all_labels_are_the_truth_and_before_it_they_are_not(done):
    result = audit.label_audit(RUN, rows=3, positions=9)
    assert list(result) == [1, 2]
    assert all(result[2][name] == pytest.approx(1) for name in (*audit.FACTORS, "off_policy", "on_policy", "flip_full_own", "flip_full_later"))
    assert all(-1 <= v <= 1 for v in result[1].values()) and result[1]["off_policy"] < 1


def test_a_budget_curve_ends_at_all_cheap_and_at_the_dense_model(done):
    curve = audit.budget_curve(RUN)
    assert [b for b, *_ in curve] == list(audit.BUDGETS)
    assert curve[0][2] == 0 and curve[-1][2] == 1
    assert curve[-1][1] == pytest.approx(summary_of(RUN)["dense_val_loss"], abs=1e-3)
    half = dict((b, (loss, real)) for b, loss, real in curve)[0.5]
    assert half[0] == pytest.approx(summary_of(RUN)["val_loss"]["threshold"], abs=1e-3)  # the run's own evaluation, again


def test_audits_are_in_the_report(done):
    os.makedirs("out/tiny/study/g1_full_aux")
    go("train", *tiny(recipe("g1_full_aux"), "--keep_checkpoints", "--out_dir=out/tiny/study/g1_full_aux/seed0"))
    go("study", *tiny("--arms=g1_full_aux", "--seeds=0", "--jobs=1", "--audit", "--backbone=backbone"))
    text = Path("out/tiny/study/report.md").read_text()
    results = json.loads(Path("out/tiny/study/results.json").read_text())
    assert set(results["audit"]) == {"g1_full_aux seed 0, step 2", "g1_full_aux seed 0, step 6"}
    assert all(name in text for name in (*results["audit"], "policy", "single flip", "later losses"))
    assert all(f"{loss:.4f} ({real:.3f})" in text for _, loss, real in results["curves"]["g1_full_aux seed 0"])


def test_a_smaller_dense_model_stands_in_the_report_with_its_flops(done):
    go("train", *tiny(recipe("backbone_long"), "--n_embd=8", "--recipe=smaller_dense"))
    go("train", *tiny(recipe("g1_full_aux"), "--out_dir=out/tiny/study/g1_full_aux/seed0"))
    go("study", *tiny("--arms=g1_full_aux", "--seeds=0", "--report_only"))
    text = Path("out/tiny/study/report.md").read_text()
    assert f"test LM {summary_of('out/tiny/smaller_dense/seed0')['test_loss']['full']:.4f}" in text and "A smaller dense model" in text


def test_thresholds_are_set_by_more_text_at_the_end(done):
    config = configure(train.DEFAULTS, tiny())
    data, _ = train.load_data("tiny", 16)
    on_the_way, final = (train.eval_batches(data, config, final=f)["calibrate"][0].numel() for f in (False, True))
    assert on_the_way <= final and train.CALIBRATION_TOKENS[0] < train.CALIBRATION_TOKENS[1]
