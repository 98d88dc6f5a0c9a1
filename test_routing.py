"""The contract of a gate, an estimator, a label and a loss, as tests. They run over everything that is
registered, what plugins register included:

    python -m pytest test_routing.py --plugin=my_gate.py
    python -m pytest test_routing.py --device=cuda

In their order: the gates, the selection, the estimators, the routed layer in its two executions, the labels,
the losses. tests/ holds what concerns one of them alone.
"""
import math

import numpy as np
import pytest
import torch

from gates import (ESTIMATORS, GATES, LABELS, LOSSES, Context, active_losses, full_tokens, make_labels,
                   threshold_for, topk_mask)
from machine import Machine
from model import GPT, GPTConfig
from optim import make_optimizers
from prepare import Batch
from run import Run
from sample import new_cache
from train import DEFAULTS, forward_pass

pytestmark = pytest.mark.usefixtures("device")
DEVICE = "cpu"  # of models and tokens; the fixture `device` sets it
LEARNED = [name for name in GATES if GATES[name].learned]
PREDICTING = [name for name in GATES if GATES[name].predicts]
# Every gate with every estimator; a gate that learns nothing has the mask for a weight, whatever is asked.
PAIRS = [(gate, estimator) for gate in GATES for estimator in ESTIMATORS
         if gate in LEARNED or estimator == "hard"]
SIZES = dict(block_size=24, vocab_size=40, n_layer=4, n_head=2, n_embd=16, controlled=(1, 3), cheap_rank=8,
             g1_hidden=8, latent=8)
FAMILIES = {"gpt2": {}, "llama": dict(norm="rmsnorm", positions="rotary", activation="swiglu", n_kv_head=1,
                                      n_inner=40, bias=False, tied_head=False)}
both_families = pytest.mark.parametrize("family", FAMILIES)


# -----------------------------------------------------------------------------
# a small model, and the same computed slowly

def make(seed=0, family="gpt2", **fields):
    """A small model whose cheap FFNs, gates and norms have left their initial values."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES | FAMILIES[family] | fields))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if ".gate." in name else 0.15))
    return model.to(DEVICE)


def tokens(model, B=2, T=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = B, T or model.config.block_size
    return torch.randint(model.config.vocab_size, shape, generator=generator).to(DEVICE)


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def context_of(idx, row_seeds=None):
    return Context(idx, seeds(*range(len(idx))) if row_seeds is None else row_seeds)


def seeds(*values):
    """One a row."""
    return torch.tensor(values).to(DEVICE)


def batch_of(model, B=4, T=None):
    return Batch(tokens(model, B, T), tokens(model, B, T, seed=1), seeds(4, 2, 9, 7)[:B])


def config_for(model, **changes):
    """The config of a run of this model in which no loss has a weight but those that `changes` names."""
    weights = {f"lambda_{name}": 0.0 for name in LOSSES}
    of_model = {key: getattr(model.config, key) for key in ("gate", "estimator", "execution", "budget")}
    return DEFAULTS | weights | of_model | {"controlled": list(model.config.controlled)} | changes


def trace_of(model, config, labelled=(), batch=None):
    """What a forward pass of training leaves."""
    return forward_pass(model, config, active_losses(config), batch or batch_of(model), set(labelled))


def run_of(model, config, machine=None):
    """A Run with random text and a frozen backbone, or a backbone's: train.train_step takes a step of it."""
    for p in model.backbone().values():
        p.requires_grad_(config["mode"] == "full")
    text = np.random.default_rng(0).integers(0, model.config.vocab_size, 500)
    trained = [p for p in model.parameters() if p.requires_grad]
    machine, optimizers = machine or Machine(config), make_optimizers(model, config, torch.float32)
    return Run(config, machine, "", {}, {"train": text}, model, active_losses(config), trained, optimizers)


def best_of(scores, k):
    """topk as the specification words it, in plain Python."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for b, row in enumerate(scores.tolist()):
        for t in sorted(range(len(row)), key=lambda t: (-row[t], t))[:k]:
            mask[b, t] = True
    return mask


def slow(model, idx, plan, row_seeds=None):
    """The residual stream after the last layer, from the blocks' submodules and the specification alone.
    plan(layer, scores) -> the mask of the full tokens, or None for the dense layer."""
    context = context_of(idx, row_seeds)
    x, rotation = model.wte(idx), model.rotation_of(context)
    if model.config.positions == "learned":
        x = x + model.wpe(torch.arange(idx.size(1), device=idx.device))
    for i, block in enumerate(model.h):
        x = x + block.attn(block.ln_1(x), rotation)
        h, mask = block.ln_2(x), None
        if block.controlled:
            s = block.gate(h.detach(), context)[0].float()
            mask = plan(i, s)
        if mask is None:
            x = x + block.mlp(h)
            continue
        w = mask.float()
        if block.estimator.mixes:
            w = block.estimator(s, mask)  # that its formula is right has a test of its own
        x = x + w.unsqueeze(-1) * block.mlp(h) + (1 - w.unsqueeze(-1)) * block.cheap(h)
    return x


def same(a, b, tol=1e-5):
    if DEVICE != "cpu":  # there another shape is another kernel, which adds up in another order
        tol *= 10
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def reached(model, value):
    """The names of the parameters that a value depends on."""
    if not value.requires_grad:
        return set()
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {name for name, grad in zip(named, grads) if grad is not None}


def gate_names(model, layer):
    return {name for name, _ in model.named_parameters() if name.startswith(f"h.{layer}.gate.")}


# -----------------------------------------------------------------------------
# gates: (h, context) -> scores (B, T) and a prediction

@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("B,T", [(1, 1), (3, 5)])
def test_scores_are_finite_float32_token_local_and_repeat(name, B, T):
    model = make(gate=name)
    gate, idx, row_seeds = model.h[1].gate, tokens(model, B, T), seeds(*range(5, 5 + B))
    h = torch.randn(B, T, 16).to(DEVICE)
    context, before = Context(idx, row_seeds), h.clone()
    s, prediction = gate(h, context)
    assert torch.equal(h, before), "the gate changes h in place: the FFNs would read what it wrote"
    assert s.shape == (B, T) and s.dtype == torch.float32 and s.isfinite().all()
    assert s.requires_grad == gate.learned and (prediction is not None) == gate.predicts
    assert not gate.predicts or prediction.shape[:3] == (B, T, 2)
    assert torch.equal(s, gate(h, context)[0])
    for t in range(T):
        other, other_idx = torch.randn(B, T, 16).to(DEVICE), tokens(model, B, T, seed=1)
        other[:, t], other_idx[:, t] = h[:, t], idx[:, t]
        same(gate(other, Context(other_idx, row_seeds))[0][:, t], s[:, t])
        alone = Context(idx[:, t:t + 1], row_seeds, start=t)  # decoding sees one token
        same(gate(h[:, t:t + 1], alone)[0][:, 0], s[:, t])
    same(gate(h[-1:], Context(idx[-1:], row_seeds[-1:]))[0][0], s[-1])  # rows are independent


@both_families
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_scores_and_stream_are_float32_under_autocast(name, execution, family):
    model = make(family=family, gate=name, execution=execution)
    idx = tokens(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        x, routes = model.run(model.embed(context_of(idx)), "topk", context_of(idx), want_outcomes=True)
        loss = model.lm_loss(x, idx)
    assert x.dtype == loss.dtype == torch.float32 and len(routes) == 2
    for route in routes:
        assert route.scores.dtype == torch.float32
        assert all(t is None or t.dtype == torch.float32 for t in (route.prediction, route.outcomes))


@pytest.mark.parametrize("name", GATES)
def test_scores_and_predictions_teach_their_own_gate_and_nothing_else(name):
    model, idx = make(gate=name), tokens(make())
    _, routes = model.run(model.embed(context_of(idx)), "topk", context_of(idx), want_outcomes=True)
    for route in routes:
        own = gate_names(model, route.layer)
        assert reached(model, route.scores.sum()) == (own if GATES[name].learned else set())
        if route.prediction is not None:
            assert reached(model, route.prediction.sum()) <= own and not route.outcomes.requires_grad


@both_families
@pytest.mark.parametrize("gate,estimator", PAIRS)
def test_threshold_never_looks_ahead_and_a_cache_changes_nothing(gate, estimator, family):
    model, row_seeds = make(family=family, gate=gate, estimator=estimator), seeds(3, 4, 5)
    model.calibrate(context_of(tokens(model, 4, seed=5)))
    a, b = tokens(model, 3), tokens(model, 3, seed=1)
    b[:, :10] = a[:, :10]
    with torch.no_grad():
        (x, rx), (y, ry), (z, rz) = (model(idx, "threshold", row_seeds) for idx in (a, b, a[:, :10]))
        same(x[:, :10], y[:, :10])
        same(x[:, :10], z)
        for p, q, r in zip(rx, ry, rz):
            assert torch.equal(p.mask[:, :10], q.mask[:, :10]) and torch.equal(p.mask[:, :10], r.mask)
        for sizes in ([24], [1] * 24, [9, 1, 1, 5, 1, 7]):  # prefill, single steps, chunks behind a cache
            cache = new_cache(model, batch=3)
            chunks = [model(chunk, "threshold", row_seeds, cache) for chunk in a.split(sizes, 1)]
            same(torch.cat([logits for logits, _ in chunks], 1), x, 1e-4)
            for i, route in enumerate(rx):
                assert torch.equal(torch.cat([routes[i].mask for _, routes in chunks], 1), route.mask)
    count = sum(r.mask.sum() for r in rx)
    assert 0 < count < sum(r.mask.numel() for r in rx)  # some tokens full, some cheap


@both_families
@pytest.mark.parametrize("gate", GATES)
def test_calibration_meets_the_budget_on_its_text(gate, family):
    """Layer by layer: the later threshold is right only for the routing of the earlier layers."""
    model = make(family=family, gate=gate, budget=0.3)
    idx = tokens(model, 4)
    model.calibrate(context_of(idx), rows=3)
    routes, k = model(idx, "threshold")[1], full_tokens(0.3, idx.numel())
    assert len(routes) == 2
    for route in routes:
        count, equal = route.mask.sum(), (route.scores == route.scores[~route.mask].max()).sum()
        assert count <= k < count + equal  # exactly k, unless there are ties: then fewer, for want of more


# -----------------------------------------------------------------------------
# selection

@pytest.mark.parametrize("values", [None, (0.0, 1.0, 2.0), (0.7,), (0.0, -0.0), (-math.inf, 0.0, math.inf)])
def test_topk_takes_exactly_k_with_ties_to_the_earlier(values):
    for T in (1, 2, 7, 8):
        generator = torch.Generator().manual_seed(T)
        scores = torch.randn(3, T, generator=generator)
        if values:
            scores = torch.tensor(values)[torch.randint(len(values), (3, T), generator=generator)]
        for budget in (0, 0.1, 0.25, 0.5, 0.9, 1):
            k = full_tokens(budget, T)
            mask = topk_mask(scores.to(DEVICE), k)
            assert torch.equal(mask.cpu(), best_of(scores, k)) and (mask.sum(1) == k).all()


def test_k_rounds_half_up():
    """Python's round() would send 2.5 to 2."""
    cases = {(0, 5): 0, (1, 5): 5, (0.5, 1): 1, (0.49, 1): 0, (0.5, 5): 3, (0.5, 7): 4, (0.25, 6): 2,
             (0.1, 4): 0, (0.3, 5): 2}
    assert {case: full_tokens(*case) for case in cases} == cases


@pytest.mark.parametrize("budget", [0, 0.1, 0.25, 0.5, 0.75, 1])
def test_threshold_has_the_exact_share_strictly_above(budget):
    scores = numbers(0, 4, 25).to(DEVICE)
    threshold = threshold_for(scores, budget)
    assert (scores > threshold).sum() == full_tokens(budget, 100)
    assert threshold == {0: math.inf, 1: -math.inf}.get(budget, threshold)
    assert (torch.ones(2, 8) > threshold_for(torch.ones(2, 8), budget)).sum() == (16 if budget == 1 else 0)


# -----------------------------------------------------------------------------
# estimators: (scores, mask) -> w

@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_what_its_flags_say(name):
    estimator = ESTIMATORS[name]()
    for scale in (1.0, 1e4):
        s = (numbers(0, 2, 9) * scale).to(DEVICE).requires_grad_()
        mask = best_of(s.detach(), 4)
        w = estimator(s, mask)
        assert w.shape == s.shape and w.dtype == torch.float32 and w.isfinite().all()
        assert (w[~mask] == 0).all()
        if not estimator.mixes:
            assert torch.equal(w, mask.float())
        if w.requires_grad:
            slope, = torch.autograd.grad((w * torch.randn(2, 9).to(DEVICE)).sum(), s)
            assert slope.isfinite().all() and (estimator.reads_both or (slope[~mask] == 0).all())
    same(estimator(s, mask)[1:], estimator(s[1:], mask[1:]))  # rows are independent
    for equal in (torch.zeros(2, 1).to(DEVICE), torch.full((2, 5), 3.0).to(DEVICE)):
        w = estimator(equal.requires_grad_(), torch.ones_like(equal, dtype=torch.bool))
        assert not w.requires_grad or torch.autograd.grad(w.sum(), equal)[0].isfinite().all()


# -----------------------------------------------------------------------------
# the routed layer: masked and gathered, one contract

@both_families
@pytest.mark.parametrize("gate,estimator", PAIRS)
def test_topk_equals_the_layer_as_specified(gate, estimator, family):
    """k tokens a row, each in its place, with the right weight. The slow way takes the masks of the fast one, since
    rounding may turn two scores that are nearly equal; its scores are compared."""
    model = make(family=family, gate=gate, estimator=estimator, budget=0.3)
    idx, row_seeds = tokens(model, 3, 15), seeds(7, 1, 100)
    for model.config.execution in ("masked", "gathered"):
        context = context_of(idx, row_seeds)
        x, routes = model.run(model.embed(context), "topk", context)
        masks, scores = {r.layer: r.mask for r in routes}, {}
        assert list(masks) == [1, 3]
        same(x, slow(model, idx, lambda layer, s: scores.update({layer: s}) or masks[layer], row_seeds))
        for route in routes:
            same(route.scores, scores[route.layer])
            assert torch.equal(route.mask, best_of(route.scores, 5))


def outcome(model, execution, idx, mode, dtype):
    """-> the stream after the last layer, its Routes, and {module: gradient} of a number made of all."""
    model.config.execution = execution
    context = context_of(idx)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x0 = model.embed(context).detach().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        x, routes = model.run(x0, mode, context, want_outcomes=True)
    total = (x * numbers(9, *x.shape).to(DEVICE)).sum()
    for route in routes:
        if route.prediction is not None:
            total = total + (route.prediction * route.outcomes).sum()
    grads = torch.autograd.grad(total, [x0, *named.values()], allow_unused=True)
    modules = {"x": [grads[0].flatten()]}
    for (name, p), grad in zip(named.items(), grads[1:]):
        grad = torch.zeros_like(p) if grad is None else grad
        modules.setdefault(".".join(name.split(".")[:3]), []).append(grad.flatten())
    return x.detach(), routes, {name: torch.cat(parts) for name, parts in modules.items()}


@pytest.mark.parametrize("family,frozen", [("gpt2", True), ("gpt2", False), ("llama", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate,estimator", PAIRS)
def test_gathered_equals_masked_in_outputs_and_gradients(gate, estimator, dtype, frozen, family):
    """bfloat16 with one routed layer: behind another one, rounding alone may route a token differently."""
    tol, layers = (1e-5, (0, 2)) if dtype == torch.float32 else (3e-2, (1,))
    for budget in (0.0, 0.3, 1.0):
        model = make(family=family, gate=gate, estimator=estimator, budget=budget, controlled=layers,
                     n_layer=layers[-1] + 1)
        model.calibrate(context_of(tokens(model, 3, seed=5)))
        for p in model.backbone().values():
            p.requires_grad_(not frozen)
        for mode, B, T in (("topk", 3, 13), ("threshold", 3, 13), ("topk", 1, 1), ("threshold", 1, 1)):
            idx = tokens(model, B, T)
            (a, ra, ga), (b, rb, gb) = (outcome(model, e, idx, mode, dtype) for e in ("masked", "gathered"))
            with torch.no_grad():  # evaluation and decoding run only the path that was chosen
                c, rc = model.run(model.embed(context_of(idx)), mode, context_of(idx))
            assert len(ra) == len(layers)
            for p, q, r in zip(ra, rb, rc):
                assert torch.equal(p.mask, q.mask)
                if p.outcomes is not None:
                    same(p.outcomes, q.outcomes, tol)
                if dtype == torch.float32:
                    assert torch.equal(p.mask, r.mask)
            same(a, b, tol)
            if dtype == torch.float32:
                same(a, c, tol)
            for name in ga:
                assert (ga[name] - gb[name]).norm() <= tol * ga[name].norm() + 1e-5, name


# -----------------------------------------------------------------------------
# labels: (trace, route) -> what full saves over cheap, in nats

@pytest.mark.parametrize("oracle", LABELS)
@pytest.mark.parametrize("target", ["next", "dense"])
@pytest.mark.parametrize("gate", LEARNED + ["random"])
def test_a_label_is_finite_repeats_and_takes_each_row_alone(oracle, target, gate):
    model = make(gate=gate)
    config = config_for(model, oracle=oracle, label_target=target, lambda_util=1.0, lambda_distill=1.0)
    batch = batch_of(model)
    trace = trace_of(model, config, {1, 3}, batch)
    again = trace_of(model, config, {1, 3}, batch.rows([2, 3]))
    assert len(trace.labels) == 2
    for label, part, route in zip(trace.labels, again.labels, trace.routes):
        assert label.raw.shape == label.d.shape == batch.tokens.shape and label.raw.dtype == torch.float32
        assert label.raw.isfinite().all() and not label.raw.requires_grad and not label.d.requires_grad
        assert label.scores.requires_grad == GATES[gate].learned and label.raw.std() > 0
        same(part.raw, label.raw[2:], 1e-4)
        assert torch.equal(part.partner, label.partner[2:])
        assert torch.equal(make_labels(trace, route).raw, label.raw)


# -----------------------------------------------------------------------------
# losses: Trace -> a scalar

def trace_for(loss, batch=None, labelled=(3,)):
    """A model that has what the loss needs, and the Trace of a batch of it."""
    model = make(gate=PREDICTING[0] if LOSSES[loss].needs == "outcomes" else "g1")
    labelled = labelled if LOSSES[loss].needs == "labels" else ()
    return model, trace_of(model, config_for(model, **{f"lambda_{loss}": 1.0}), labelled, batch)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_finite_number_and_the_mean_over_slices(name):
    model, trace = trace_for(name)
    batch = batch_of(model)
    loss = LOSSES[name]()(trace)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() and loss.requires_grad
    halves = [LOSSES[name]()(trace_for(name, batch.rows(rows))[1]) for rows in ([0, 1], [2, 3])]
    same(sum(halves) / 2, loss)  # so accumulation and several processes give the loss of the whole batch


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_trains_what_it_is_about(name):
    """A loss of the stream reaches the cheap FFNs and the gates; any other loss nothing but gates, and a
    label nothing but its own layer's."""
    model, trace = trace_for(name)
    names = reached(model, LOSSES[name]()(trace))
    if LOSSES[name].needs in ("x", "dense_x"):
        assert set(model.controllers()) <= names
    else:
        gates = gate_names(model, 3) if LOSSES[name].needs == "labels" else set()
        assert names and names <= (gates or gate_names(model, 1) | gate_names(model, 3))
