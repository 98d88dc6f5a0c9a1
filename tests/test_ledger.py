"""metrics.py: the FLOPs ledger against PyTorch's own counter, the health of scores and predictors, ranks,
budgets, and the gap."""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gates import ESTIMATORS, LOSSES, TARGETS, active_losses
from metrics import (DEAD, StepRecord, allocate, dead_layers, first_hits, gap_closed, ledger,
                     predictor_health, score_health, set_budget, spearman)
from runs.machine import Machine
from test_routing import PAIRS, PREDICTING, batch_of, config_for, make, same
from train import forward_batch, labelled_layers


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# the ledger, per token. Every item is 2% or more of the whole, so a wrong factor of any item shows.

SHARES = (0.25, 1.0, 0.5)  # of the controlled layers; each is a whole number of the 16 tokens


def counted_model(gate="g1", shares=SHARES, **fields):
    sizes = dict(n_layer=5, n_embd=32, block_size=16, vocab_size=32, controlled=(1, 2, 4), cheap_rank=16,
                 g1_hidden=32, latent=16)
    model = make(gate=gate, **sizes | fields)
    for i, share in zip(model.config.controlled, shares):
        model.h[i].budget = share
    return model


def flops(call, batch):
    """-> the FLOPs of a call per token, and what it returned."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops() / batch.tokens.numel(), result


def counted_step(model, config):
    """PyTorch's count of a training step in which every controlled layer has a label, if any has: (forward,
    backward) per token."""
    batch = batch_of(model)
    for p in model.backbone().values():
        p.requires_grad_(config["mode"] == "full")
    labelled = set(model.config.controlled) if labelled_layers(config, 0) else set()

    def total():
        step = forward_batch(model, config, batch, labelled)
        losses = [loss(step) for loss in active_losses(config).values()]
        # In a real step every gate gets a gradient sooner or later: the ledger counts it in each.
        return sum(losses) + sum(r.scores.mean() for r in step.routes if r.scores.requires_grad)
    forward_flops, loss = flops(total, batch)
    return forward_flops, flops(loss.backward, batch)[0]


def check_step(model, config):
    book = ledger(model, config)
    moved = book["train"]["lm_head"][1]  # the head's gradient is taken in the forward pass
    want = book["forward"] + moved, book["backward"] - moved
    assert counted_step(model, config) == pytest.approx(want, rel=1e-3)
    return book


@pytest.mark.parametrize("mode", ["full", "cheap", "adapter"])
def test_ledger_equals_pytorchs_count_of_a_step_that_does_not_route(mode):
    model = counted_model(**dict(controlled=()) if mode == "full" else {})
    check_step(model, config_for(model, mode=mode, lambda_lm=1.0))
    if mode != "full":
        check_step(model, config_for(model, mode=mode, lambda_lm=1.0, lambda_distill=1.0))
        check_step(model, config_for(model, mode=mode, lambda_distill=1.0))


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("gate,estimator", PAIRS)
def test_ledger_equals_pytorchs_count_of_a_routed_step(gate, estimator, execution):
    model = counted_model(gate, estimator=estimator, execution=execution)
    check_step(model, config_for(model, lambda_lm=1.0))
    check_step(model, config_for(model, lambda_distill=1.0, lambda_anchor=1.0))
    if gate in PREDICTING:
        check_step(model, config_for(model, lambda_lm=1.0, lambda_jepa=1.0))


@pytest.mark.parametrize("gate,estimator", [("g1", "ste_norm"), ("g1", "scaled"), ("g3", "ste")])
@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("oracle", ["off_policy", "on_policy"])
@pytest.mark.parametrize("target", TARGETS)
def test_ledger_equals_pytorchs_count_of_labels_and_dense_passes(gate, estimator, execution, oracle, target):
    model = counted_model(gate, estimator=estimator, execution=execution)
    supervised = config_for(model, lambda_lm=1.0, label_layers=3, oracle=oracle, label_target=target)
    without = ledger(model, supervised)
    for share, distill in ((1.0, 0.0), (0.5, 0.0), (0.5, 1.0)):
        changes = dict(lambda_util=1.0, lambda_rank=1.0, lambda_distill=distill, label_share=share)
        book = check_step(model, supervised | changes)
        assert book["inference_flops"] == without["inference_flops"]
        assert ("dense" in book["train"]) == (distill > 0 or target == "dense")
        one = ledger(model, supervised | changes | dict(label_layers=1))  # of the three, evenly
        assert one["train"]["labels"][0] == pytest.approx(book["train"]["labels"][0] / 3)


@pytest.mark.parametrize("mode,gate,estimator", [
    ("full", "g1", "ste"), ("cheap", "g1", "ste"), ("adapter", "g1", "ste"),
    *(("topk", *pair) for pair in PAIRS)])
def test_ledger_equals_pytorchs_count_of_inference(mode, gate, estimator):
    model = counted_model(gate, estimator=estimator, **dict(controlled=()) if mode == "full" else {})
    batch = batch_of(model)
    with torch.no_grad():
        got, _ = flops(lambda: model(batch.tokens, mode), batch)
    book = ledger(model, config_for(model, mode=mode, lambda_lm=1.0))
    assert got == pytest.approx(book["inference_flops"], rel=1e-3)
    assert sum(book["inference"].values()) == book["inference_flops"]


def test_ledger_ratios_are_against_a_full_only_forward_and_the_dense_step():
    dense_model, model = counted_model(controlled=()), counted_model("g3")
    dense = ledger(dense_model, config_for(dense_model, mode="full", lambda_lm=1.0))
    weights = dict(lambda_lm=1.0, lambda_jepa=1.0, lambda_util=1.0, lambda_distill=1.0)
    book = ledger(model, config_for(model, **weights))
    assert dense["forward_proxy"] == dense["train_ratio"] == dense["inference_ratio"] == 1
    assert book["dense_forward"] == dense["forward"]
    assert book["forward_proxy"] == sum(f for f, _ in book["train"].values()) / dense["forward"] > 1
    total = sum(f + b for f, b in book["train"].values())
    assert book["train_ratio"] == pytest.approx(total / (dense["forward"] + dense["backward"]))
    assert set(book["train"]) == {"attention", "full", "cheap", "gate", "target_head", "lm_head", "dense",
                                  "labels"}
    half_of_the_products = 5 * 2 * 16 * 32
    assert book["causal_attention"] == book["inference"]["attention"] - half_of_the_products


def test_distillation_costs_a_dense_forward_from_the_first_controlled_layer_on_and_two_heads():
    model = counted_model()
    lm, both = (ledger(model, config_for(model, lambda_lm=1.0, lambda_distill=d)) for d in (0.0, 1.0))
    layer = 8 * 32 ** 2 + 4 * 16 * 32 + 16 * 32 ** 2
    head = 2 * 32 * 32
    assert both["forward"] - lm["forward"] == 4 * layer + 2 * head
    assert both["backward"] - lm["backward"] == head


# -----------------------------------------------------------------------------
# the health of scores

def test_score_health_is_the_mean_std_and_slope_of_each_row():
    scores = rows(0, 3, 20) * 2 + 1
    for name in ("ste", "ste_norm"):
        mean, std, slope = score_health(scores, ESTIMATORS[name])
        z = scores
        if name == "ste_norm":
            z = (scores - scores.mean(1, True)) / scores.std(1, unbiased=False, keepdim=True)
        p = 1 / (1 + (-z).exp())
        same(mean, scores.mean())
        same(std, torch.stack([row.std(unbiased=False) for row in scores]).mean())
        same(slope, (p * (1 - p)).mean(), 1e-4)


def test_a_gate_whose_scores_have_drifted_is_dead_under_ste_and_alive_under_ste_norm():
    drifted = rows(0, 3, 20) + 12.9  # what the scores of `ste` do without labels
    slopes = [score_health(drifted, ESTIMATORS[name])[2].item() for name in ("ste", "ste_norm")]
    assert slopes[0] < DEAD < 0.15 < slopes[1]
    assert dead_layers({"scores": {"slope": [0.2, slopes[0], DEAD]}}, [1, 3, 5]) == [3]
    assert dead_layers({}, [1]) == []


@pytest.mark.parametrize("slices", [1, 2])
def test_a_logged_step_reports_what_autograd_says(slices):
    """The norm of d(loss)/d(scores), of the gate's gradient with and without JEPA, and each loss."""
    model = make(gate="g3")
    weights = dict(lambda_lm=1.0, lambda_jepa=2.0, lambda_util=1.0, lambda_distill=0.5)
    config = config_for(model, device="cpu", dtype="float32", batch_size=4 // slices,
                        gradient_accumulation_steps=slices, **weights)
    trained = list(model.controllers().values())
    record = StepRecord(model, config, Machine(config), logged=True)
    for part in range(slices):
        rows_of_part = slice(part * 4 // slices, (part + 1) * 4 // slices)
        step = forward_batch(model, config, batch_of(model).rows(rows_of_part), {3})
        losses = {name: LOSSES[name](step) for name in ("lm", "jepa", "util", "distill")}
        record.before_backward(step, losses)
        (sum(config[f"lambda_{name}"] * loss for name, loss in losses.items()) / slices).backward()
        record.after_backward(step)
    values = record.values(trained, [torch.optim.SGD(trained, lr=0.1)])

    step = forward_batch(model, config, batch_of(model), {3})
    losses = {name: LOSSES[name](step) for name in losses}
    without_jepa = losses["lm"] + losses["util"] + 0.5 * losses["distill"]
    gate = [p for name, p in model.named_parameters() if ".gate." in name]

    def norm_of(loss, tensors):
        grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None]).norm()
    norms = values["grad_norm"]
    same(norms["scores"], norm_of(without_jepa, [route.scores for route in step.routes]), 1e-4)
    same(norms["gate_without_jepa"], norm_of(without_jepa, gate), 1e-4)
    same(norms["gate"], norm_of(without_jepa + 2 * losses["jepa"], gate), 1e-4)
    same(norms["all"], norm_of(without_jepa + 2 * losses["jepa"], trained), 1e-4)
    for name, loss in losses.items():
        same(values["losses"][name], loss.detach(), 1e-4)
    same(values["budget"], torch.tensor([0.5, 0.5]))
    assert values["scores"].keys() == {"mean", "std", "slope"} and len(values["scores"]["slope"]) == 2
    same(values["label_correlation"], spearman(step.labels[0].scores.detach(), step.labels[0].raw), 1e-3)


# -----------------------------------------------------------------------------
# ranks and predictors

def test_spearman_is_the_correlation_of_ranks():
    a = rows(0, 3, 20)
    assert spearman(a, a.exp()) == pytest.approx(1, abs=1e-4)
    assert spearman(a, -a) == pytest.approx(-1, abs=1e-4)
    x, y = torch.tensor([[1.0, 2, 3, 4, 5]]), torch.tensor([[2.0, 1, 4, 3, 5]])  # 1 - 6 * 4 / (5 * 24)
    assert spearman(x, y) == pytest.approx(0.8, abs=1e-4)


def test_ties_share_their_rank_wherever_they_stand():
    scipy = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = torch.randint(4, (2, 30), generator=generator).float()
        assert spearman(a[None], b[None]).item() == pytest.approx(scipy.spearmanr(a, b)[0], abs=1e-4)


def test_a_perfect_predictor_is_healthy_whatever_its_scale():
    target = rows(0, 200, 2, 6)
    health = predictor_health(target * 7, target)
    assert health["r2_mean"] == pytest.approx(1, abs=1e-4)
    assert health["r2_action_blind"] == pytest.approx(1, abs=1e-4)
    assert health["effective_rank"] > 5 and not health["collapsed"]
    assert predictor_health(target + 100, target)["effective_rank"] > 5  # of the latents around their mean


def test_a_constant_predictor_has_collapsed():
    target = rows(0, 200, 2, 6)
    for prediction in (torch.ones(200, 2, 6), rows(1, 1, 2, 6).expand(200, 2, 6), torch.zeros(200, 2, 6)):
        health = predictor_health(prediction, target)
        assert health["effective_rank"] < 2 and health["collapsed"] and health["r2_mean"] < 0.05


def test_an_action_blind_predictor_has_collapsed_however_rich():
    target = rows(0, 200, 2, 6)
    health = predictor_health(target.mean(1, keepdim=True).expand(-1, 2, -1), target)
    assert health["effective_rank"] > 5 and health["r2_action_blind"] <= 0 and health["collapsed"]
    assert health["r2_mean"] > 0.2 and health["cosine_full_cheap"] == pytest.approx(1, abs=1e-5)


def test_health_leaves_out_outcomes_of_zero_norm():
    target = rows(0, 200, 2, 6)
    target[:, 1] = 0
    prediction = target.clone()
    prediction[:, 1] = rows(1, 200, 6)
    assert predictor_health(prediction, target)["r2_mean"] == pytest.approx(1, abs=1e-4)


# -----------------------------------------------------------------------------
# budgets and the gap

@pytest.mark.parametrize("gate", ["static", "g1"])
@pytest.mark.parametrize("budget,step", [(0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (1.0, 1.0), (0.5, 0.25),
                                         (0.3, 0.1)])
def test_allocate_hands_out_the_budget_and_finds_the_layer_that_matters(gate, budget, step):
    """Cheap is full everywhere but in one layer, where it shouts: full is worth something there alone."""
    for best in (0, 1, 2):
        model = make(gate=gate, n_layer=3, controlled=(0, 1, 2), cheap_rank=64, block_size=12)
        for i, block in enumerate(model.h):
            block.cheap.load_state_dict(block.mlp.state_dict())
            if i == best:
                block.cheap.c_proj.weight.data.mul_(-8)
        batch = batch_of(model)
        batch = batch._replace(targets=model(batch.tokens, "full")[0].argmax(-1))  # text that dense knows
        config = config_for(model, device="cpu", dtype="float32", budget=budget, share_step=step)
        allocate(model, config, Machine(config), batch)
        shares = [block.budget for block in model.h]
        assert sum(shares) == pytest.approx(3 * budget, abs=1e-6) and all(0 <= s <= 1 for s in shares)
        assert shares[best] == pytest.approx(min(1, 3 * budget), abs=1e-6)
        assert step < 1 or sum(0 < s < 1 for s in shares) <= 1


@pytest.mark.parametrize("shares", [(0.5, 0.5), (1.0, 0.2), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_set_budget_keeps_the_order_and_meets_the_mean(shares):
    for budget in (0.0, 0.25, 0.5, 0.9, 1.0):
        model = make()
        for i, share in zip((1, 3), shares):
            model.h[i].budget = share
        set_budget(model, budget)
        a, b = (model.h[i].budget for i in (1, 3))
        assert a + b == pytest.approx(2 * budget, abs=1e-9) and 0 <= min(a, b) and max(a, b) <= 1 + 1e-9
        assert (a - b) * (shares[0] - shares[1]) >= 0
        assert budget in (0, 1) or (a == b) == (shares[0] == shares[1])


def test_the_gap_is_0_at_cheap_and_1_at_dense_and_a_hit_is_its_first_evaluation():
    assert gap_closed(1.7, 1.7, 1.2) == 0 and gap_closed(1.2, 1.7, 1.2) == 1
    assert gap_closed(1.325, 1.7, 1.2) == pytest.approx(0.75)
    curve = [(0, 1.7), (50, 1.56), (100, 1.3), (150, 1.5)]
    assert first_hits(curve, 1.7, 1.2) == {0.25: 50, 0.5: 100, 0.75: 100, 0.9: None}
