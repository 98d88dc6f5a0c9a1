"""The audits measure what they say: each against a slow computation from the specification alone."""
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configurator import ConfigError
from conftest import go, recipe, summary_of, tiny
from gates import Context, Step, on_policy_label
from model import GPT, GPTConfig
from runs import machine, run
from study import audit

RUN = "out/tiny/g1_full_aux/seed0"
CONTROLLED, T, BUDGET_K = (0, 1, 3), 10, 5


def make(estimator="ste_norm", gate="g1", controlled=CONTROLLED, seed=0):
    """A small model whose weights have all left their initial values, and a batch for it."""
    torch.manual_seed(seed)
    config = GPTConfig(block_size=T, vocab_size=40, n_layer=4, n_head=2, n_embd=16, controlled=controlled,
                       cheap_rank=8, g1_hidden=8, latent=8, gate=gate, estimator=estimator)
    model = GPT(config).requires_grad_(False)
    for name, p in model.named_parameters():
        p.add_(torch.randn_like(p) * (0.3 if ".gate." in name else 0.15))
    context = Context(torch.randint(40, (3, T)), torch.tensor([4, 2, 9]))
    return model, context, torch.randint(40, (3, T))


def largest(scores):
    """Exactly k of each row, ties to the earlier, in plain Python."""
    mask = torch.zeros_like(scores)
    for b, row in enumerate(scores.tolist()):
        for t in sorted(range(len(row)), key=lambda t: (-row[t], t))[:BUDGET_K]:
            mask[b, t] = 1
    return mask


def slow(model, context, decide):
    """The stream after the last layer. decide(layer, scores) -> a mask, or None where the layer runs full."""
    x = model.wte(context.tokens) + model.wpe(torch.arange(T))
    for layer, block in enumerate(model.h):
        x = x + block.attn(block.ln_1(x))
        h = block.ln_2(x)
        mask = None
        if layer in model.config.controlled:
            scores, _ = block.gate(h, context)
            mask = decide(layer, scores)
        if mask is None:
            x = x + block.mlp(h)
            continue
        w = mask
        if model.config.estimator == "scaled" and block.gate.learned:
            w = mask * 2 / (1 + torch.exp(-scores))
        x = x + w[..., None] * block.mlp(h) + (1 - w[..., None]) * block.cheap(h)
    return x


def logits_of(model, x):
    return model.ln_f(x) @ model.wte.weight.T


def token_losses(model, x, targets, target):
    """(B, T), against the token that came or against the dense model's distribution `targets` (B, T, V)."""
    log_p = F.log_softmax(logits_of(model, x), dim=-1)
    if target == "next":
        return -log_p.gather(2, targets[..., None]).squeeze(2)
    return -(targets * log_p).sum(2)


def references_of(model, context, targets):
    """What token_losses compares with under either target, and the stream of the dense model."""
    dense = slow(model, context, lambda layer, scores: None)
    return {"next": targets, "dense": F.softmax(logits_of(model, dense), dim=-1)}, dense


# -----------------------------------------------------------------------------
# exact flips

@pytest.mark.parametrize("gate", ["g1", "g3", "random"])
@pytest.mark.parametrize("estimator", ["ste_norm", "ste", "scaled", "hard"])
@pytest.mark.parametrize("suffix", ["topk", "full"])
@pytest.mark.parametrize("target", ["next", "dense"])
def test_exact_labels_equal_brute_force(gate, estimator, suffix, target):
    model, context, targets = make(estimator, gate)
    references, dense = references_of(model, context, targets)
    positions = [0, 4, 9]
    for layer in CONTROLLED:
        given = {"next": targets, "dense": dense}
        exact = audit.exact_labels(model, context, layer, positions, suffix, given)[target]
        assert exact.shape == (3, len(positions), 2)
        for p, t in enumerate(positions):
            losses = []
            for forced in (0, 1):
                def decide(i, scores):
                    if i > layer and suffix == "full":
                        return None
                    mask = largest(scores)
                    if i == layer:
                        mask[:, t] = forced
                    return mask
                losses.append(token_losses(model, slow(model, context, decide), references[target], target))
            difference = losses[0] - losses[1]
            expected = torch.stack([difference[:, t], difference[:, t:].sum(1)], dim=1)
            torch.testing.assert_close(exact[:, p], expected, rtol=1e-4, atol=2e-5)


# -----------------------------------------------------------------------------
# the ceiling

def slow_ceiling(model, context, targets, target):
    """The loss of routing by labels: masks are decided layer by layer and each forward pass starts anew."""
    references, _ = references_of(model, context, targets)
    decided = {}
    for layer in model.config.controlled:
        losses = []
        for forced in (0.0, 1.0):
            def decide(i, scores):
                if i == layer:
                    return torch.full_like(scores, forced)
                return decided.get(i, largest(scores))
            losses.append(token_losses(model, slow(model, context, decide), references[target], target))
        decided[layer] = largest(losses[0] - losses[1])
    x = slow(model, context, lambda i, scores: decided[i])
    return token_losses(model, x, targets, "next").mean().item()


def steps_of(model, context, targets):
    _, dense = references_of(model, context, targets)
    return {target: Step(model, {"label_target": target}, context, targets, dense=dense)
            for target in ("next", "dense")}


@pytest.mark.parametrize("gate", ["g1", "g3", "random"])
@pytest.mark.parametrize("estimator", ["ste_norm", "ste", "scaled", "hard"])
def test_the_ceiling_equals_a_slow_reference(gate, estimator):
    model, context, targets = make(estimator, gate)
    reached = audit.ceiling_of_rows(model, steps_of(model, context, targets))
    plans = {"gate": lambda layer, scores: largest(scores), "dense_model": lambda layer, scores: None}
    expected = {}
    for target in ("dense", "next"):
        expected[f"{target}_label"] = slow_ceiling(model, context, targets, target)
    for name, plan in plans.items():
        losses = token_losses(model, slow(model, context, plan), targets, "next")
        expected[name] = losses.mean().item()
    assert {name: reached[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("estimator", ["ste_norm", "scaled"])
@pytest.mark.parametrize("seed", range(5))
def test_in_the_last_layer_no_gate_beats_the_label_that_has_seen_the_answer(estimator, seed):
    """There the loss is a sum over tokens, so that the largest differences are the best choice."""
    model, context, targets = make(estimator, controlled=(3,), seed=seed)
    reached = audit.ceiling_of_rows(model, steps_of(model, context, targets))
    assert reached["next_label"] < reached["gate"] - 1e-4


def test_the_rho_of_scores_that_are_the_label_is_one():
    """A gate that knows the label of the last layer scores tokens by it."""
    model, context, targets = make(controlled=(3,))
    steps = steps_of(model, context, targets)
    _, (route,) = model.run(model.embed(context), "topk", context, keep={3})
    label = on_policy_label(steps["dense"], route)
    model.h[3].gate.forward = lambda h, context: (label[:len(h)], None)
    reached = audit.ceiling_of_rows(model, steps)
    assert reached["rho_dense"] == pytest.approx(1, abs=1e-4) and reached["rho_next"] < 0.99
    assert reached["gate"] == pytest.approx(reached["dense_label"], abs=1e-6)


# -----------------------------------------------------------------------------
# of runs

def test_in_the_last_layer_all_labels_are_the_flip_itself(done):
    """No layer and no attention comes after it: policy, single flip and later losses make no difference."""
    result = audit.label_audit(RUN, rows=3, positions=9)
    last = result[2]
    for target in ("next", "dense"):
        for name in ("off_policy", "on_policy"):
            for flip in ("routed_own", "routed_later", "full_own", "full_later"):
                assert last[f"{name}_{target} ~ flip_{flip}_{target}"] == pytest.approx(1, abs=0.02)
        assert all(last[f"{factor} ({target})"] == pytest.approx(1, abs=0.02) for factor in audit.FACTORS)
    assert last["on_policy_next ~ flip_routed_own_dense"] < 0.98
    assert any(value < 0.98 for name, value in result[1].items() if not name.startswith("scores"))
    assert all(-1.0001 <= value <= 1.0001 for layer in result.values() for value in layer.values())


def test_the_ceiling_of_a_run_does_not_depend_on_how_its_rows_are_cut(done, monkeypatch):
    whole = audit.ceiling(RUN, rows=5)
    assert set(whole) == {"rows", "gate", "dense_label", "next_label", "dense_model", "rho_dense", "rho_next"}
    assert whole["rows"] == 5
    monkeypatch.setattr(audit, "TOKENS_AT_ONCE", 2 * 16)
    assert audit.ceiling(RUN, rows=5) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("arm", ["g1_full_aux", "static"])
def test_the_budget_curve_goes_through_the_loss_of_the_run(done, monkeypatch, arm):
    """Also where the layers' budgets differ, as those of `static` do, and a budget of 0 comes in between."""
    monkeypatch.setattr(machine, "fast_bfloat16", lambda device: False)  # the run's own dtype is float32
    monkeypatch.setitem(run.CALIBRATION_TOKENS, "on the way", 64)  # the end of a run calibrates on more
    go("train", *tiny(recipe(arm), "--recipe=again", "--max_iters=20"))
    curve, summary = audit.budget_curve("out/tiny/again/seed0"), summary_of("out/tiny/again/seed0")
    assert [budget for budget, _, _ in curve] == list(audit.BUDGETS)
    losses = {budget: loss for budget, loss, _ in curve}
    assert losses[0.5] == pytest.approx(summary["val_loss"]["threshold"], abs=1e-6)
    assert losses[1] == pytest.approx(summary["dense_val_loss"], abs=1e-5)
    assert curve[0][2] == 0 and curve[-1][2] == 1
    assert all(abs(realised - budget) < 0.1 for budget, _, realised in curve)


def test_audit_runs_adds_what_is_missing_and_repeats_nothing(done, monkeypatch, capsys):
    go("train", *tiny(recipe("g1_full_aux"), "--keep_checkpoints", "--seed=1"))
    go("train", *tiny(recipe("random"), "--seed=0"))
    go("train", *tiny(recipe("cheap_only"), "--seed=0"))
    arms, seeds = ["g1_full_aux", "random", "cheap_only"], [0, 1, 2]
    audit.audit_runs("out/tiny", arms, seeds, "report")
    written = json.loads(Path("report/audit.json").read_text())
    first, second, noise = (f"{run}, 6 steps, quick backbone"
                            for run in ("g1_full_aux seed 0", "g1_full_aux seed 1", "random seed 0"))
    assert set(written["labels"]) == {first, f"{second}, at step 2", second}
    assert set(written["ceiling"]) == {first, second}
    assert set(written["curves"]) == {first, noise}
    assert list(written["labels"][f"{second}, at step 2"]) == ["1", "2"]
    assert "left" in capsys.readouterr().out

    del written["ceiling"][second]
    written["curves"][noise] = "untouched"
    Path("report/audit.json").write_text(json.dumps(written))
    asked = []
    monkeypatch.setitem(audit.QUESTIONS, "ceiling", lambda *what: asked.append(what) or {"rows": 1})
    audit.audit_runs("out/tiny", arms, seeds, "report")
    again = json.loads(Path("report/audit.json").read_text())
    assert asked == [(os.path.join("out/tiny", "g1_full_aux", "seed1"), "ckpt.pt")]
    assert again["ceiling"][second] == {"rows": 1}
    assert again["curves"][noise] == "untouched"


def test_a_broken_run_is_named_and_left_out(done, capsys):
    Path(RUN, "ckpt.pt").write_bytes(b"broken")
    Path("out/tiny/g3_full_aux/seed0/config.json").write_text("[1]")
    answers = audit.audit_runs("out/tiny", ["g1_full_aux", "g3_full_aux"], [0], "report")
    said = capsys.readouterr().out
    assert answers == {"labels": {}, "ceiling": {}, "curves": {}}
    assert "g1_full_aux/seed0/ckpt.pt is not a checkpoint" in said and "g3_full_aux/seed0 left out" in said


@pytest.mark.parametrize("words,fault", [
    ([RUN, "--rows=0"], "--rows=0 is too few"),
    ([RUN, "--positions=-3"], "--positions=-3 is too few"),
    ([RUN, "--ceiling_rows=0"], "--ceiling_rows=0 is too few"),
    (["--rows=2"], "name the folder"),
    ([RUN, "--checkpoint=ckpt-3.pt"], "ckpt-3.pt does not exist"),
])
def test_bad_options_are_refused(done, words, fault):
    with pytest.raises(ConfigError, match=fault):
        go("study.audit", *words)


def test_a_run_without_gates_is_refused(done):
    go("train", *tiny(recipe("cheap_only")))
    with pytest.raises(ConfigError, match="has no gates .its mode is 'cheap'"):
        go("study.audit", "out/tiny/cheap_only/seed0")


def test_alone_it_prints_all_three(done):
    said = go("study.audit", RUN, "--rows=2", "--positions=4", "--ceiling_rows=2")
    assert "scores ~ flip_routed_later_dense" in said and "dense_label" in said and "1.00 " in said
