"""The audits measure what they say: each against a slow computation from the specification alone."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import audit
import machine
from configurator import ConfigError
from conftest import go, recipe, summary_of, tiny
from gates import LABELS, Context
from model import GPT, GPTConfig

RUN = "out/tiny/g3_full_aux/seed0"
CONTROLLED, T, K = (0, 1, 3), 10, 5
OPTIONS = audit.DEFAULTS | {"rows": 3, "positions": 9, "ceiling_rows": 5}


def make(estimator="ste_norm", gate="g1", controlled=CONTROLLED, seed=0):
    """A small model whose weights have all left their initial values, and a batch for it."""
    torch.manual_seed(seed)
    config = GPTConfig(block_size=T, vocab_size=40, n_layer=4, n_head=2, n_embd=16, controlled=controlled,
                       cheap_rank=8, g1_hidden=8, latent=8, gate=gate, estimator=estimator)
    model = GPT(config).requires_grad_(False)
    for name, p in model.named_parameters():
        p.add_(torch.randn_like(p) * (0.3 if ".gate." in name else 0.15))
    return model, Context(torch.randint(40, (3, T)), torch.tensor([4, 2, 9])), torch.randint(40, (3, T))


def traces_of(model, context, targets):
    class Batch:
        tokens, row_seeds = context.tokens, context.row_seeds
    Batch.targets = targets
    return audit.traces_of(model, {}, Batch)


def largest(scores):
    """Exactly k of each row, ties to the earlier, in plain Python."""
    mask = torch.zeros_like(scores)
    for b, row in enumerate(scores.tolist()):
        for t in sorted(range(len(row)), key=lambda t: (-row[t], t))[:K]:
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


def token_losses(model, x, targets, p_dense=None):
    """(B, T), against the token that came, or against the dense model's distribution (B, T, V)."""
    log_p = F.log_softmax(logits_of(model, x), dim=-1)
    if p_dense is None:
        return -log_p.gather(2, targets[..., None]).squeeze(2)
    return -(p_dense * log_p).sum(2)


def dense_of(model, context):
    dense_x = slow(model, context, lambda layer, scores: None)
    return dense_x, F.softmax(logits_of(model, dense_x), dim=-1)


# -----------------------------------------------------------------------------
# exact flips

@pytest.mark.parametrize("gate", ["g1", "random"])
@pytest.mark.parametrize("estimator", ["ste_norm", "scaled"])
@pytest.mark.parametrize("suffix", ["topk", "full"])
def test_exact_labels_equal_brute_force(gate, estimator, suffix):
    model, context, targets = make(estimator, gate)
    dense_x, p_dense = dense_of(model, context)
    positions = [0, 4, 9]
    for layer in CONTROLLED:
        exact = audit.exact_labels(model, context, layer, positions, suffix, {"next": targets, "dense": dense_x})
        for p, t in enumerate(positions):
            streams = []
            for forced in (0, 1):
                def decide(i, scores):
                    if i > layer and suffix == "full":
                        return None
                    mask = largest(scores)
                    if i == layer:
                        mask[:, t] = forced
                    return mask
                streams.append(slow(model, context, decide))
            for target, against in (("next", None), ("dense", p_dense)):
                cheap, full = (token_losses(model, x, targets, against) for x in streams)
                expected = torch.stack([(cheap - full)[:, t], (cheap - full)[:, t:].sum(1)], dim=1)
                torch.testing.assert_close(exact[target][:, p], expected, rtol=1e-4, atol=2e-5)


# -----------------------------------------------------------------------------
# the ceiling

def slow_ceiling(model, context, targets, against):
    """The loss of routing by labels: masks are decided layer by layer and each forward pass starts anew."""
    decided = {}
    for layer in model.config.controlled:
        losses = []
        for forced in (0.0, 1.0):
            def decide(i, scores):
                if i == layer:
                    return torch.full_like(scores, forced)
                return decided.get(i, largest(scores))
            losses.append(token_losses(model, slow(model, context, decide), targets, against))
        decided[layer] = largest(losses[0] - losses[1])
    return token_losses(model, slow(model, context, lambda i, scores: decided[i]), targets).mean().item()


@pytest.mark.parametrize("gate", ["g1", "g3", "random"])
@pytest.mark.parametrize("estimator", ["ste_norm", "scaled"])
def test_the_ceiling_equals_a_slow_reference(gate, estimator):
    model, context, targets = make(estimator, gate)
    reached = audit.ceiling_of_rows(model, traces_of(model, context, targets))
    dense_x, p_dense = dense_of(model, context)
    gated = slow(model, context, lambda layer, scores: largest(scores))
    expected = {"dense_label": slow_ceiling(model, context, targets, p_dense),
                "next_label": slow_ceiling(model, context, targets, None),
                "gate": token_losses(model, gated, targets).mean().item(),
                "dense_model": token_losses(model, dense_x, targets).mean().item()}
    assert {name: reached[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_in_the_last_layer_no_gate_beats_the_label_that_has_seen_the_answer(seed):
    """There the loss is a sum over tokens, so that the largest differences are the best choice."""
    model, context, targets = make(controlled=(3,), seed=seed)
    reached = audit.ceiling_of_rows(model, traces_of(model, context, targets))
    assert reached["next_label"] < reached["gate"] - 1e-4


def test_the_rho_of_scores_that_are_the_label_is_one():
    model, context, targets = make(controlled=(3,))
    traces = traces_of(model, context, targets)
    _, (route,) = model.run(model.embed(context), "topk", context, keep={3})
    label = LABELS["on_policy"]()(traces["dense"], route)
    model.h[3].gate.forward = lambda h, context: (label[:len(h)], None)
    reached = audit.ceiling_of_rows(model, traces)
    assert reached["rho_dense"] == pytest.approx(1, abs=1e-4) and reached["rho_next"] < 0.99
    assert reached["gate"] == pytest.approx(reached["dense_label"], abs=1e-6)


# -----------------------------------------------------------------------------
# of runs

def test_in_the_last_layer_all_labels_are_the_flip_itself(done):
    """No layer and no attention comes after it: what later layers do makes no difference."""
    found = audit.label_audit(RUN, OPTIONS)
    for pair, (before, last) in found.items():
        assert -1.0001 <= before <= 1.0001
        if not pair.startswith("scores") and pair != "next or dense":
            assert last == pytest.approx(1, abs=0.02), pair
    assert found["next or dense"][1] < 0.98
    assert any(before < 0.98 for pair, (before, _) in found.items() if "policy" in pair)


def test_the_ceiling_of_a_run_does_not_depend_on_how_its_rows_are_cut(done, monkeypatch):
    whole = audit.ceiling(RUN, OPTIONS)
    assert whole["rows"] == 5
    monkeypatch.setattr(audit, "TOKENS_AT_ONCE", 2 * 16)
    assert audit.ceiling(RUN, OPTIONS) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("arm", ["g1_full_aux", "static"])
def test_the_budget_curve_goes_through_the_loss_of_the_run(place, monkeypatch, arm):
    """Also where the layers' budgets differ, as those of `static` do, and a budget of 0 comes in between."""
    monkeypatch.setattr(machine, "fast_bfloat16", lambda device: False)  # the run's own dtype is float32
    go("train", *tiny(recipe(arm), "--max_iters=20"))
    run = f"out/tiny/{arm}/seed0"
    curve, summary = audit.budget_curve(run, OPTIONS), summary_of(run)
    points = {point["budget"]: point for point in curve}
    assert list(points) == OPTIONS["budgets"]
    for key in ("loss", "kl"):
        assert points[0.5][key] == pytest.approx(summary["val"]["threshold"][key], rel=1e-4)
    assert points[0.5]["inference_ratio"] == pytest.approx(summary["flops"]["inference_ratio"], rel=1e-4)
    assert points[1]["loss"] == pytest.approx(summary["val"]["full"]["loss"], rel=1e-4)
    assert (points[0]["realised"], points[1]["realised"], points[1]["agreement"]) == (0, 1, 1)


def test_serving_is_the_budget_curve_with_speeds_and_the_dense_model(done):
    options = OPTIONS | {"budgets": [0.5, 1.0], "prompt": 4, "decoded": 3, "repeat": 2}
    *points, dense = audit.serving(RUN, options)
    curve = audit.budget_curve(RUN, options)
    assert [{key: value for key, value in p.items() if key != "tokens_per_s"} for p in points] == curve
    assert dense["budget"] is None and dense["loss"] == pytest.approx(points[1]["loss"], rel=1e-4)
    assert all(p["tokens_per_s"] > 0 for p in [*points, dense])


def test_answers_are_printed_and_kept_and_not_asked_again(done):
    few = ["--rows=2", "--positions=4", "--ceiling_rows=2", "--budgets=[0.5,1]", "--report=report",
           "--ask=labels,ceiling,budgets,serving", "--prompt=4", "--decoded=20", "--repeat=1"]
    said = go("audit", RUN, *few)
    assert all(words in said for words in ("scores ~ flip dense", "dense_label", "budget 0.5", "agreement"))
    path, title = Path("report/audit.json"), "g3_full_aux seed 0, 6 steps, quick backbone"
    answers = json.loads(path.read_text())
    assert {question: list(held) for question, held in answers.items()} == dict.fromkeys(audit.QUESTIONS, [title])
    page, picture = Path("report/audit.md").read_text(), Path("report/budget_curves.png").read_bytes()
    answers["ceiling"][title]["gate"] = 9.0
    path.write_text(json.dumps(answers))
    assert "gate 9" in go("audit", RUN, *few)
    assert "9.0000" in Path("report/audit.md").read_text() and "9.0000" not in page
    assert Path("report/budget_curves.png").read_bytes() == picture


@pytest.mark.parametrize("words,fault", [
    ([RUN, "--positions=1"], "--positions"), ([RUN, "--layers=[0]"], "--layers"),
    ([RUN, "--ask=label"], "--ask"), ([], "name the folder"),
    ([RUN, "--checkpoint=ckpt-3.pt"], "ckpt-3.pt does not exist"),
    (["out/tiny/backbone/seed0"], "no run with gates")])
def test_bad_options_are_refused(done, words, fault):
    with pytest.raises(ConfigError, match=fault):
        go("audit", *words)
