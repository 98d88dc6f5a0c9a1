"""metrics.py: the FLOPs ledger against PyTorch's own counter, what a logged step says, the health of scores and
predictors, evaluation, and the gap."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import metrics
from gates import ESTIMATORS, active_losses
from machine import Machine
from metrics import (DEAD, dead_layers, evaluate, evaluate_modes, first_hits, gap_closed, ledger, ledger_of,
                     predictor_health, predictors_health, score_health, spearman, warnings_of)
from prepare import get_batch
from test_routing import (PAIRS, PREDICTING, batch_of, both_families, config_for, context_of, make, numbers, run_of,
                          same, tokens, trace_of)
from train import labelled_layers, schedule, train_step


# -----------------------------------------------------------------------------
# the ledger, per token. Every item is 2% or more of the whole, so a wrong factor of any item shows.

SHARES = (0.25, 1.0, 0.5)  # of the controlled layers; each is a whole number of the 16 tokens


def counted_model(gate="g1", family="gpt2", **fields):
    sizes = dict(n_layer=5, n_embd=32, block_size=16, vocab_size=32, controlled=(1, 2, 4), cheap_rank=16,
                 g1_hidden=32, latent=16)
    model = make(family=family, gate=gate, **sizes | fields)
    for i, share in zip(model.config.controlled, SHARES):
        model.h[i].budget = share
    return model


def flops(call, batch):
    """-> the FLOPs of a call per token, and what it returned."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops() / batch.tokens.numel(), result


def check_step(model, config):
    """Compare the ledger with PyTorch's count of a training step, in which every controlled layer has a label if
    any has -> the ledger."""
    batch, losses = batch_of(model), active_losses(config)
    for p in model.backbone().values():
        p.requires_grad_(config["mode"] == "full")
    labelled = model.config.controlled if labelled_layers(config, losses, 0) else ()

    def total():
        trace = trace_of(model, config, labelled, batch)
        values = [loss(trace) for loss in losses.values()]
        # In a real step every gate gets a gradient sooner or later: the ledger counts it in each.
        return sum(values) + sum(r.scores.mean() for r in trace.routes if r.scores.requires_grad)
    forward, loss = flops(total, batch)
    backward, _ = flops(loss.backward, batch)
    book = ledger(model, config)
    moved = book["train"]["lm_head"][1]  # the head's gradient is taken in the forward pass
    assert (forward, backward) == pytest.approx((book["forward"] + moved, book["backward"] - moved), rel=1e-3)
    return book


@both_families
@pytest.mark.parametrize("mode", ["full", "cheap", "adapter"])
def test_ledger_equals_pytorchs_count_of_a_step_that_does_not_route(mode, family):
    model = counted_model(family=family, **dict(controlled=()) if mode == "full" else {})
    check_step(model, config_for(model, mode=mode, lambda_lm=1.0))
    if mode != "full":
        check_step(model, config_for(model, mode=mode, lambda_lm=1.0, lambda_distill=1.0))
        check_step(model, config_for(model, mode=mode, lambda_distill=1.0))


@both_families
@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("gate,estimator", PAIRS)
def test_ledger_equals_pytorchs_count_of_a_routed_step(gate, estimator, execution, family):
    model = counted_model(gate, family, estimator=estimator, execution=execution)
    check_step(model, config_for(model, lambda_lm=1.0))
    check_step(model, config_for(model, lambda_distill=1.0, lambda_anchor=1.0))
    if gate in PREDICTING:
        check_step(model, config_for(model, lambda_lm=1.0, lambda_jepa=1.0))


@pytest.mark.parametrize("gate,estimator,family", [
    ("g1", "ste_norm", "gpt2"), ("g1", "scaled", "llama"), ("g3", "ste", "gpt2")])
@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("oracle", ["off_policy", "on_policy"])
@pytest.mark.parametrize("target", ["next", "dense"])
def test_ledger_equals_pytorchs_count_of_labels_and_dense_passes(gate, estimator, family, execution, oracle, target):
    model = counted_model(gate, family, estimator=estimator, execution=execution)
    supervised = config_for(model, lambda_lm=1.0, label_layers=3, oracle=oracle, label_target=target)
    without = ledger(model, supervised)
    for share, distill in ((1.0, 0.0), (0.5, 0.0), (0.5, 1.0)):
        changes = dict(lambda_util=1.0, lambda_rank=1.0, lambda_distill=distill, label_share=share)
        book = check_step(model, supervised | changes)
        assert book["inference_flops"] == without["inference_flops"]
        assert ("dense" in book["train"]) == (distill > 0 or target == "dense")
        one = ledger(model, supervised | changes | dict(label_layers=1))  # of the three, evenly
        assert one["train"]["labels"][0] == pytest.approx(book["train"]["labels"][0] / 3)


@both_families
@pytest.mark.parametrize("mode,gate,estimator", [
    ("full", "g1", "ste"), ("cheap", "g1", "ste"), ("adapter", "g1", "ste"), *(("topk", *pair) for pair in PAIRS)])
def test_ledger_equals_pytorchs_count_of_inference(mode, gate, estimator, family):
    model = counted_model(gate, family, estimator=estimator, **dict(controlled=()) if mode == "full" else {})
    batch = batch_of(model)
    with torch.no_grad():
        got, _ = flops(lambda: model(batch.tokens, mode), batch)
    book = ledger(model, config_for(model, mode=mode, lambda_lm=1.0))
    assert got == pytest.approx(book["inference_flops"], rel=1e-3)
    assert sum(book["inference"].values()) == book["inference_flops"]


def test_ledger_ratios_are_against_a_full_only_forward_and_the_dense_step():
    dense_model, model = counted_model(controlled=()), counted_model("g3")
    dense = ledger(dense_model, config_for(dense_model, mode="full", lambda_lm=1.0))
    config = config_for(model, lambda_lm=1.0, lambda_jepa=1.0, lambda_util=1.0, lambda_distill=1.0)
    book = ledger(model, config)
    assert dense["forward_proxy"] == dense["train_ratio"] == dense["inference_ratio"] == 1
    assert book["dense_forward"] == dense["forward"]
    assert book["forward_proxy"] == sum(f for f, _ in book["train"].values()) / dense["forward"] > 1
    total = sum(f + b for f, b in book["train"].values())
    assert book["train_ratio"] == pytest.approx(total / (dense["forward"] + dense["backward"]))
    assert set(book["train"]) == {"attention", "full", "cheap", "gate", "target_head", "lm_head", "dense", "labels"}
    for i in (1, 2, 4):
        model.h[i].budget = 0.5
    assert ledger(model, config) == ledger_of(config, model.config)  # by shapes alone


# -----------------------------------------------------------------------------
# the health of scores, and what a logged step says

def test_score_health_is_the_mean_std_and_slope_of_each_row():
    scores = numbers(0, 3, 20) * 2 + 1
    for name in ("ste", "ste_norm"):
        mean, std, slope = score_health(scores, ESTIMATORS[name]())
        z = scores
        if name == "ste_norm":
            z = (scores - scores.mean(1, True)) / scores.std(1, unbiased=False, keepdim=True)
        p = 1 / (1 + (-z).exp())
        same(mean, scores.mean())
        same(std, torch.stack([row.std(unbiased=False) for row in scores]).mean())
        same(slope, (p * (1 - p)).mean(), 1e-4)


def test_a_gate_whose_scores_have_drifted_is_dead_under_ste_and_alive_under_ste_norm():
    drifted = numbers(0, 3, 20) + 12.9  # what the scores of `ste` do without labels
    slopes = [score_health(drifted, ESTIMATORS[name]())[2].item() for name in ("ste", "ste_norm")]
    assert slopes[0] < DEAD < 0.15 < slopes[1]
    assert dead_layers({"scores": {"slope": [0.2, slopes[0], DEAD]}}, [1, 3, 5]) == [3]
    assert dead_layers({}, [1]) == []


@both_families
@pytest.mark.parametrize("slices", [1, 2])
def test_a_logged_step_reports_what_autograd_says(slices, family):
    """The norm of d(loss)/d(scores), of the gate's gradient with and without JEPA, and each loss."""
    model = make(family=family, gate="g3")
    config = config_for(model, device="cpu", dtype="float32", block_size=24, batch_size=4 // slices,
                        gradient_accumulation_steps=slices, lambda_lm=1.0, lambda_jepa=2.0, lambda_util=1.0,
                        lambda_distill=0.5)
    run = run_of(model, config)
    whole = config | {"batch_size": 4, "gradient_accumulation_steps": 1}
    trace = trace_of(model, whole, labelled_layers(config, run.losses, 0),
                     get_batch(run.data["train"], whole, 0, 0, run.machine))
    losses = {name: loss(trace) for name, loss in run.losses.items()}
    without_jepa = losses["lm"] + losses["util"] + 0.5 * losses["distill"]
    gate = [p for name, p in model.named_parameters() if ".gate." in name]

    def norm_of(loss, tensors):
        grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None]).norm()
    want = {"scores": norm_of(without_jepa, [route.scores for route in trace.routes]),
            "gate_without_jepa": norm_of(without_jepa, gate),
            "gate": norm_of(without_jepa + 2 * losses["jepa"], gate),
            "all": norm_of(without_jepa + 2 * losses["jepa"], run.trained)}
    values = train_step(run, logged=True)
    assert values["grad_norm"].keys() == want.keys() and values["losses"].keys() == losses.keys()
    for name, norm in want.items():
        same(values["grad_norm"][name], norm, 1e-4)
    for name, loss in losses.items():
        same(values["losses"][name], loss.detach(), 1e-4)
    same(values["budget"], torch.tensor([0.5, 0.5]))
    assert values["lr"] == [config[rate] * schedule(config, 0) for rate in ("gate_lr", "learning_rate")]
    same(values["scores"]["mean"], torch.stack([r.scores.mean() for r in trace.routes]).detach(), 1e-4)
    same(values["label_correlation"], spearman(trace.labels[0].scores.detach(), trace.labels[0].raw), 1e-3)


# -----------------------------------------------------------------------------
# ranks and predictors

def test_spearman_is_the_correlation_of_ranks_and_ties_share_theirs():
    a = numbers(0, 3, 20)
    assert spearman(a, a.exp()) == pytest.approx(1, abs=1e-4)
    assert spearman(a, -a) == pytest.approx(-1, abs=1e-4)
    x, y = torch.tensor([[1.0, 2, 3, 4, 5]]), torch.tensor([[2.0, 1, 4, 3, 5]])  # 1 - 6 * 4 / (5 * 24)
    assert spearman(x, y) == pytest.approx(0.8, abs=1e-4)
    scipy, generator = pytest.importorskip("scipy.stats"), torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = torch.randint(4, (2, 30), generator=generator).float()
        assert spearman(a[None], b[None]).item() == pytest.approx(scipy.spearmanr(a, b)[0], abs=1e-4)


def test_a_perfect_predictor_is_healthy_whatever_its_scale():
    outcomes = numbers(0, 200, 2, 6)
    health = predictor_health(outcomes * 7, outcomes)
    assert health["r2_mean"] == pytest.approx(1, abs=1e-4) and health["r2_action_blind"] == pytest.approx(1, abs=1e-4)
    assert health["effective_rank"] > 5 and not health["collapsed"]
    assert predictor_health(outcomes + 100, outcomes)["effective_rank"] > 5  # of the latents around their mean
    only_full, prediction = outcomes * torch.tensor([[1.0], [0.0]]), torch.cat([outcomes[:, :1], outcomes[:, :1]], 1)
    assert predictor_health(prediction, only_full)["r2_mean"] == pytest.approx(1, abs=1e-4)  # zero outcomes: left out


def test_a_constant_predictor_has_collapsed_and_so_has_one_that_is_blind_to_the_action():
    outcomes = numbers(0, 200, 2, 6)
    for prediction in (torch.ones(200, 2, 6), numbers(1, 1, 2, 6).expand(200, 2, 6), torch.zeros(200, 2, 6)):
        health = predictor_health(prediction, outcomes)
        assert health["effective_rank"] < 2 and health["collapsed"] and health["r2_mean"] < 0.05
    blind = predictor_health(outcomes.mean(1, keepdim=True).expand(-1, 2, -1), outcomes)  # however rich
    assert blind["effective_rank"] > 5 and blind["r2_action_blind"] <= 0 and blind["collapsed"]
    assert blind["r2_mean"] > 0.2 and blind["cosine_full_cheap"] == pytest.approx(1, abs=1e-5)


# -----------------------------------------------------------------------------
# evaluation and the gap

@both_families
@pytest.mark.parametrize("slice_tokens", [1, 50, 1000])
def test_evaluate_equals_a_slow_computation_however_it_is_sliced(slice_tokens, family, monkeypatch):
    monkeypatch.setattr(metrics, "slices_of", partial(metrics.slices_of, tokens=slice_tokens))
    model = make(family=family, gate="g1", budget=0.3)
    config, batch = config_for(model, device="cpu", dtype="float32"), batch_of(model)
    model.calibrate(context_of(tokens(model, 4, seed=5)))
    results = evaluate_modes(model, config, Machine(config), batch)
    assert list(results) == ["topk", "threshold", "full"]
    log_q = model(batch.tokens, "full")[0].log_softmax(-1)
    for mode, result in results.items():
        logits, routes = model(batch.tokens, mode, batch.row_seeds)
        log_p = logits.log_softmax(-1)
        want = {"loss": F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()),
                "kl": (log_q.exp() * (log_q - log_p)).sum(-1).mean(),
                "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float().mean()}
        for name, value in want.items():
            assert result[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
        assert result["budget"] == pytest.approx([r.mask.float().mean().item() for r in routes])
    assert results["full"]["kl"] == pytest.approx(0, abs=1e-6) and results["full"]["agreement"] == 1
    assert results["topk"]["kl"] > 0.01 and results["topk"]["budget"] == [7 / 24] * 2
    assert list(evaluate_modes(model, config | {"mode": "full"}, Machine(config), batch)) == ["full"]
    one = evaluate(model, batch.rows(slice(1)), ["cheap"], Machine(config))
    assert one["cheap"]["budget"] == [] and one["cheap"]["kl"] > 0.01


def test_a_reader_is_told_of_another_budget_than_asked_and_of_a_collapsed_predictor():
    model = make(gate="g3")
    for i in (1, 3):
        torch.nn.init.zeros_(model.h[i].gate.predictor[2].weight)  # it says the same of every token
    config = config_for(model, device="cpu", dtype="float32")
    health = predictors_health(model, config, Machine(config), batch_of(model))
    assert set(health) == {1, 3} and all(values["collapsed"] for values in health.values())
    [budget, collapse] = warnings_of({"threshold": {"budget": [0.2, 0.4]}}, health, [0.5, 0.5])
    assert "0.30 where 0.50" in budget and "[1, 3]" in collapse
    assert warnings_of({"threshold": {"budget": [0.45, 0.5]}}, {}, [0.5, 0.5]) == []


def test_the_gap_is_0_at_cheap_and_1_at_dense_and_a_hit_is_its_first_evaluation():
    assert gap_closed(1.7, 1.7, 1.2) == 0 and gap_closed(1.2, 1.7, 1.2) == 1
    assert gap_closed(1.325, 1.7, 1.2) == pytest.approx(0.75)
    curve = [(0, 1.7), (50, 1.56), (100, 1.3), (150, 1.5)]
    assert first_hits(curve, 1.7, 1.2) == {0.25: 50, 0.5: 100, 0.75: 100, 0.9: None}
