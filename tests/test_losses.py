"""Losses, estimators and labels, each against a slow reference: the head's losses in chunks, the losses of
gates.LOSSES, the labels, and what a training step trains, shares and pays for."""
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from gates import ESTIMATORS, GATES, LOSSES, Context, Label, Route, Step, make_label, pairwise
from test_routing import (LEARNED, batch_of, best_of, config_for, context_of, gate_names, make, reached, same,
                          slow, tokens)
from train import dense_stream, forward_batch, labelled_layers, labelled_rows

EVERY_LOSS = {f"lambda_{name}": 1.0 for name in ("lm", "distill", "jepa", "util", "rank", "anchor")}


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# the losses of the head, in chunks of tokens

def plain_loss(x, weight, reference):
    """The formula, with all the logits at once, in the dtype of its arguments."""
    logits = (x @ weight.T).flatten(0, 1)
    if not reference.is_floating_point():
        return F.cross_entropy(logits, reference.flatten())
    log_q = (reference @ weight.detach().T).flatten(0, 1).log_softmax(-1)
    return (log_q.exp() * (log_q - logits.log_softmax(-1))).sum(-1).mean()


def head_case(target, scale=1.0):
    """x (2, 70, 8), weight (17, 8), and a reference: tokens or hidden states."""
    x, weight = rows(0, 2, 70, 8) * scale, rows(1, 17, 8)
    reference = rows(2, 2, 70, 8) * scale
    if target == "tokens":
        reference = torch.randint(17, (2, 70), generator=torch.Generator().manual_seed(2))
    return x, weight, reference


def in_small_chunks(monkeypatch, size):
    monkeypatch.setattr(kernels, "chunks", lambda n, weight, trained=False: [
        slice(i, i + size) for i in range(0, n, size)])


@pytest.mark.parametrize("target", ["tokens", "hidden"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("size", [1, 33, 140, 1000])
def test_head_loss_equals_the_formula_in_value_and_gradient(monkeypatch, target, trained, size):
    in_small_chunks(monkeypatch, size)
    for scale in (1.0, 30.0):  # logits of some hundreds: softmax must not overflow
        x, weight, reference = head_case(target, scale)
        x, weight = x.requires_grad_(), weight.requires_grad_(trained)
        wanted = [x, weight] if trained else [x]
        got, want = kernels.head_loss(x, weight, reference), plain_loss(x, weight, reference)
        same(got, want)
        for a, b in zip(torch.autograd.grad(3 * got, wanted), torch.autograd.grad(3 * want, wanted)):
            same(a, b)


@pytest.mark.parametrize("target", ["tokens", "hidden"])
@pytest.mark.parametrize("head,trained", [(torch.float32, True), (torch.float32, False),
                                          (torch.bfloat16, False)])
def test_head_loss_under_autocast_is_close_to_float32(monkeypatch, target, head, trained):
    """A controller-only run holds its frozen head in bfloat16, a backbone's run trains one in float32."""
    in_small_chunks(monkeypatch, 33)
    x, weight, reference = head_case(target)
    x, weight = x.requires_grad_(), weight.requires_grad_(trained)
    wanted = [x, weight] if trained else [x]
    want = plain_loss(x, weight, reference)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernels.head_loss(x, weight if trained else weight.to(head), reference)
    assert got.dtype == torch.float32
    same(got, want, 2e-2)
    for a, b in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(want, wanted)):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("target", ["tokens", "hidden"])
def test_token_losses_are_the_cross_entropy_of_every_token(monkeypatch, target):
    in_small_chunks(monkeypatch, 33)
    x, weight, reference = head_case(target)
    other = rows(3, 2, 70, 8)
    wanted = reference.flatten()
    if target == "hidden":
        wanted = (reference @ weight.T).softmax(-1).flatten(0, 1)
    got = kernels.head_token_losses([x, other], weight, reference)
    for stream, losses in zip((x, other), got):
        want = F.cross_entropy((stream @ weight.T).flatten(0, 1), wanted, reduction="none")
        assert losses.shape == (2, 70) and losses.dtype == torch.float32
        same(losses.flatten(), want)


def test_the_divergence_of_a_model_from_itself_is_zero_and_has_no_gradient():
    x, weight, _ = head_case("tokens")
    loss = kernels.head_loss(x.requires_grad_(), weight, x.detach().clone())
    assert abs(loss) < 1e-6 and torch.autograd.grad(loss, x)[0].abs().max() < 1e-7


def test_chunks_cover_every_token_once_and_bound_the_logits():
    weight = torch.empty(50257, 2, device="meta")
    for trained, size in ((False, 2 ** 23), (True, 2 ** 26)):
        slices = kernels.chunks(5000, weight, trained)
        assert [i for s in slices for i in range(5000)[s]] == list(range(5000))
        assert len(range(5000)[slices[0]]) * 50257 <= size and len(slices) > 1


# -----------------------------------------------------------------------------
# the losses of a step, each against a loop written from its formula

def full_step(gate="g3", labelled=(1, 3), **changes):
    """A model and a Step that has everything: routes, labels, the dense stream."""
    model = make(gate=gate)
    config = config_for(model, **EVERY_LOSS | changes)
    return model, forward_batch(model, config, batch_of(model), set(labelled))


def head(model, x):
    return F.linear(model.ln_f(x), model.wte.weight)


def test_lm_and_distill_equal_their_formulas():
    model, step = full_step()
    log_p, log_q = head(model, step.x).log_softmax(-1), head(model, step.dense).log_softmax(-1)
    token = log_p.gather(2, step.targets.unsqueeze(2))
    same(LOSSES["lm"](step), -token.mean())
    same(LOSSES["distill"](step), (log_q.exp() * (log_q - log_p)).sum(-1).mean())
    same(step.dense, slow(model, step.context.tokens, lambda layer, s: None))  # the frozen model itself
    assert not step.dense.requires_grad and LOSSES["distill"](step) > 0.01


def test_anchor_is_the_square_of_a_rows_mean_score():
    model, step = full_step()
    terms = [(sum(row) / len(row)) ** 2 for route in step.routes for row in route.scores.tolist()]
    assert len(terms) == 2 * 4 and LOSSES["anchor"](step).item() == pytest.approx(sum(terms) / 8, rel=1e-4)


def loss_of(name, **fields):
    """A loss of a Step that holds nothing but the fields that it is about."""
    return LOSSES[name](Step(None, {}, None, None, **fields)).item()


def test_jepa_is_one_minus_cosine_without_zero_outcomes():
    prediction, target = rows(0, 2, 5, 2, 4), rows(1, 2, 5, 2, 4)
    target[0, :, 1], target[1, 2, 0] = 0, 0
    of_rows = []
    for b in range(2):
        terms = []
        for t in range(5):
            for a in range(2):
                p, q = prediction[b, t, a].tolist(), target[b, t, a].tolist()
                norm = math.hypot(*p) * math.hypot(*q)
                terms += [1 - sum(x * y for x, y in zip(p, q)) / norm] if norm else []
        of_rows.append(sum(terms) / len(terms))
    route = Route(1, None, None, prediction, target)
    assert loss_of("jepa", routes=[route]) == pytest.approx(sum(of_rows) / 2, abs=1e-5)
    none = Route(3, None, None, prediction, torch.zeros_like(target))
    assert loss_of("jepa", routes=[route, none]) == pytest.approx(sum(of_rows) / 4, abs=1e-5)


def test_util_is_smooth_l1_of_raw_scores():
    labels = [Label(rows(i, 2, 9) * 2, None, rows(i + 5, 2, 9), None) for i in (0, 1)]
    errors = [e for label in labels for e in (label.scores - label.target).flatten().tolist()]
    terms = [0.5 * e * e if abs(e) < 1 else abs(e) - 0.5 for e in errors]
    assert loss_of("util", labels=labels) == pytest.approx(sum(terms) / 36, abs=1e-5)


def test_rank_is_weighted_softplus_over_the_permuted_pairs():
    s, d = rows(0, 2, 9), rows(1, 2, 9)
    permutation = torch.stack([torch.randperm(9), torch.arange(9).roll(1)])
    of_rows = []
    for b in range(2):
        total = 0
        for t, u in enumerate(permutation[b].tolist()):
            dd, ds = (d[b, t] - d[b, u]).item(), (s[b, t] - s[b, u]).item()
            total += abs(dd) * math.log1p(math.exp(-math.copysign(1, dd) * ds))
        of_rows.append(total / 9)
    assert pairwise(s, d, permutation).tolist() == pytest.approx(of_rows, abs=1e-5)
    label = Label(s, None, d, permutation)
    assert loss_of("rank", labels=[label]) == pytest.approx(sum(of_rows) / 2, abs=1e-5)


def test_targets_are_the_fixed_head_on_rms_normalised_outputs():
    gate = make(gate="g3").h[1].gate
    full, cheap = torch.randn(2, 3, 16), torch.randn(2, 3, 16) * 50
    cheap[0, 1] = 0
    target = gate.outcomes(full, cheap)
    for b in range(2):
        for t in range(3):
            for a, out in enumerate((full[b, t], cheap[b, t])):
                rms = math.sqrt(sum(v * v for v in out.tolist()) / 16)
                same(target[b, t, a], gate.target_head.T @ out / rms if rms else torch.zeros(8))
    assert not gate.outcomes(full.requires_grad_(), cheap).requires_grad


def test_the_target_head_is_orthonormal_fixed_and_seeded_apart():
    first, second = (make(gate="g3", seed=seed).h[1].gate for seed in (0, 1))
    same(first.target_head.T @ first.target_head, torch.eye(8))
    assert torch.equal(first.target_head, second.target_head) and not first.target_head.requires_grad
    assert not torch.equal(first.target_head, make(gate="g3").h[3].gate.target_head)
    assert "target_head" not in dict(first.named_parameters())


# -----------------------------------------------------------------------------
# estimators

def sigmoid_of(name, s):
    """The p of each estimator, from its formula."""
    if name == "ste_norm":
        s = (s - s.mean(1, True)) / (s.var(1, keepdim=True, unbiased=False).sqrt() + 1e-6)
    return torch.sigmoid(s)


@pytest.mark.parametrize("name", ["ste", "ste_norm", "scaled"])
def test_the_gradient_of_an_estimator_is_that_of_its_formula(name):
    s = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask, up = best_of(s.detach(), 4), torch.randn(2, 9)
    soft = 2 * mask * sigmoid_of(name, s) if name == "scaled" else sigmoid_of(name, s)
    w = ESTIMATORS[name](s, mask)
    same(w, soft if name == "scaled" else mask.float())
    want, = torch.autograd.grad((soft * up).sum(), s)
    got, = torch.autograd.grad((w * up).sum(), s)
    same(got, want)
    assert name == "scaled" or (got != 0).all()  # every token learns, selected or not


def test_moving_all_scores_of_a_row_is_nothing_to_ste_norm_and_something_to_ste():
    s, up = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)), torch.randn(3, 12)
    shift = torch.tensor([[5.0], [-3.0], [0.5]])
    for name in ("ste_norm", "ste"):
        results = []
        for scores in (s.clone().requires_grad_(), (s + shift).requires_grad_()):
            w = ESTIMATORS[name](scores, best_of(scores.detach(), 6))
            results.append((w.detach(), torch.autograd.grad((w * up).sum(), scores)[0]))
        (w, gradient), (moved_w, moved_gradient) = results
        assert torch.equal(w, moved_w)
        assert torch.allclose(gradient, moved_gradient, rtol=1e-4, atol=1e-5) == (name == "ste_norm")
        # So nothing pushes a row's mean under ste_norm.
        assert (gradient.sum(1).abs().max() < 1e-5) == (name == "ste_norm")


@pytest.mark.parametrize("gate", LEARNED)
@pytest.mark.parametrize("estimator", ["ste", "ste_norm", "scaled"])
@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_the_lm_loss_reaches_the_scores_through_the_weight_alone(gate, estimator, execution):
    """dL/ds = g . (full - cheap) * dw/ds, with g the gradient at the routed layer's output."""
    model = make(gate=gate, estimator=estimator, execution=execution, controlled=(0, 2))
    context, y = context_of(tokens(model)), tokens(model, seed=1)
    x, routes = model.run(model.embed(context), "topk", context, keep={2})
    loss = model.lm_loss(x, y)
    assert gate_names(model, 0) | gate_names(model, 2) <= reached(model, loss)
    route, block = routes[1], model.h[2]
    full, cheap = block.mlp(route.h).detach(), block.cheap(route.h).detach()
    s = route.scores.detach().requires_grad_()
    soft = 2 * route.mask * sigmoid_of(estimator, s) if estimator == "scaled" else sigmoid_of(estimator, s)
    w = (soft.detach() if estimator == "scaled" else route.mask.float()).unsqueeze(-1)
    after = (route.x + w * full + (1 - w) * cheap).detach().requires_grad_()
    g, = torch.autograd.grad(model.lm_loss(model.h[3](after, "full", context)[0], y), after)
    want, = torch.autograd.grad((soft * (g * (full - cheap)).sum(-1)).sum(), s)
    got, = torch.autograd.grad(loss, route.scores)
    assert (got - want).norm() < 1e-4 * want.norm() and want.norm() > 1e-4


# -----------------------------------------------------------------------------
# labels

def test_labels_are_standardised_per_row_and_clamped(monkeypatch):
    raw = rows(0, 3, 50) * torch.tensor([[1e-3], [1.0], [1e3]]) + 7
    raw[1, 0] = 100
    monkeypatch.setitem(make_label.__globals__["LABELS"], "given", lambda step, route: raw)
    step = Step(None, {"oracle": "given"}, Context(None, torch.arange(3)), None)
    label = make_label(step, Route(1, rows(1, 3, 50), None))
    for b in range(3):
        mean = sum(raw[b].tolist()) / 50
        std = math.sqrt(sum((v - mean) ** 2 for v in raw[b].tolist()) / 50) + 1e-6
        clamped = [max(-3, min(3, (v - mean) / std)) for v in raw[b].tolist()]
        same(label.target[b], torch.tensor(clamped), 2e-3)
    assert label.target[1, 0] == 3 and torch.equal(label.raw, raw)
    assert torch.equal(label.permutation.sort(1).values, torch.arange(50).expand(3, 50))
    assert not torch.equal(label.permutation[0], label.permutation[1])
    raw = torch.full((3, 50), 5.0)
    assert (make_label(step, Route(1, rows(1, 3, 50), None)).target == 0).all()


LABEL_CASES = [("g1", "ste_norm"), ("g1", "scaled"), ("g3", "ste"), ("g3", "scaled"), ("random", "scaled")]


@pytest.mark.parametrize("gate,estimator", LABEL_CASES)
@pytest.mark.parametrize("oracle", ["off_policy", "on_policy"])
@pytest.mark.parametrize("target", ["next", "dense"])
@pytest.mark.usefixtures("device")
def test_labels_equal_a_recomputation_from_the_start(gate, estimator, oracle, target):
    model = make(gate=gate, estimator=estimator, controlled=(0, 1, 3), block_size=10)
    batch = batch_of(model, 3)
    config = config_for(model, oracle=oracle, label_target=target, lambda_util=1.0)
    q = head(model, slow(model, batch.tokens, lambda layer, s: None)).softmax(-1)
    if target == "next":
        q = F.one_hot(batch.targets, model.config.vocab_size).float()
    for model.config.execution in ("masked", "gathered"):
        step = forward_batch(model, config, batch, {0, 1, 3})
        for route, label in zip(step.routes, step.labels, strict=True):
            def branch(value):
                def plan(layer, s):
                    if layer == route.layer:
                        return torch.full_like(s, value, dtype=torch.bool)
                    return None if layer > route.layer and oracle == "off_policy" else best_of(s, 5)
                x = slow(model, batch.tokens, plan, batch.row_seeds)
                return -(q * head(model, x).log_softmax(-1)).sum(-1)
            same(label.raw, (branch(False) - branch(True)).detach(), 2e-5)
            assert torch.equal(label.scores, route.scores)


def test_off_policy_and_on_policy_labels_differ_except_at_the_last_layer():
    model = make(controlled=(0, 1, 3))
    configs = [config_for(model, oracle=oracle, lambda_util=1.0) for oracle in ("off_policy", "on_policy")]
    off, on = (forward_batch(model, config, batch_of(model), {0, 1, 3}).labels for config in configs)
    gaps = [(a.raw - b.raw).abs().max() for a, b in zip(off, on)]
    assert gaps[0] > 1e-3 and gaps[1] > 1e-3 and gaps[2] < 1e-5


@pytest.mark.parametrize("estimator", ["ste_norm", "scaled"])
@pytest.mark.parametrize("oracle", ["off_policy", "on_policy"])
def test_dense_labels_are_the_expectation_of_next_labels(estimator, oracle):
    """Over every next token that the dense model may expect, at every position."""
    model = make(estimator=estimator, vocab_size=5, block_size=6, controlled=(0, 1, 3))
    batch, words = batch_of(model), dict(oracle=oracle, lambda_util=1.0)
    dense = forward_batch(model, config_for(model, label_target="dense", **words), batch, {0, 1, 3}).labels
    q = model(batch.tokens, "full")[0].softmax(-1)  # (B, T, V)
    expected = [torch.zeros(4, 6) for _ in dense]
    for token in range(5):
        came = batch._replace(targets=torch.full_like(batch.targets, token))
        labels = forward_batch(model, config_for(model, label_target="next", **words), came, {0, 1, 3}).labels
        for total, label in zip(expected, labels, strict=True):
            total += q[:, :, token].detach() * label.raw
    for label, total in zip(dense, expected):
        same(label.raw, total)
        assert label.raw.abs().max() > 1e-3


# -----------------------------------------------------------------------------
# what a step trains, shares, and pays for

@pytest.mark.parametrize("gate", LEARNED)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_auxiliary_loss_trains_the_gate_of_its_layer_and_nothing_else(gate, estimator):
    model = make(gate=gate, estimator=estimator)
    for layer in (1, 3):
        for target in ("next", "dense"):
            config = config_for(model, lambda_util=1.0, label_target=target, oracle="on_policy")
            step = forward_batch(model, config, batch_of(model), {layer})
            for name in ("util", "rank"):
                assert reached(model, LOSSES[name](step)) == gate_names(model, layer)
    assert reached(model, LOSSES["anchor"](step)) == gate_names(model, 1) | gate_names(model, 3)
    if GATES[gate].predicts:
        for route in forward_batch(model, config_for(model, lambda_jepa=1.0), batch_of(model), set()).routes:
            own = reached(model, LOSSES["jepa"](Step(model, config, step.context, None, routes=[route])))
            assert own and own <= {n for n in gate_names(model, route.layer) if "scorer" not in n}


@pytest.mark.parametrize("gate", LEARNED)
def test_under_hard_the_lm_loss_reaches_no_gate(gate):
    model = make(gate=gate, estimator="hard", controlled=(0, 2))
    step = forward_batch(model, config_for(model, lambda_lm=1.0), batch_of(model), set())
    names = reached(model, LOSSES["lm"](step))
    assert names and not any(".gate." in name for name in names)


def test_no_loss_leaves_a_gradient_in_the_frozen_model():
    model, step = full_step(label_target="dense", oracle="on_policy")
    for p in model.backbone().values():
        p.requires_grad_(False)
    step = forward_batch(model, step.config, batch_of(model), {1, 3})
    sum(LOSSES[name[7:]](step) for name in EVERY_LOSS).backward()
    assert all(p.grad is None for p in model.backbone().values())
    assert all(p.grad.any() for p in model.controllers().values())


@pytest.mark.parametrize("changes", [
    dict(label_target="next", oracle="off_policy", label_share=1.0),
    dict(label_target="dense", oracle="on_policy", label_share=0.5),
    dict(label_target="dense", oracle="on_policy", label_share=0.5, lambda_distill=0.0)])
@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_slices_of_a_batch_make_the_losses_and_gradients_of_the_batch(changes, execution):
    """The rows that get labels are the same ones, however the batch is cut."""
    model = make(gate="g3", execution=execution)
    config, batch = config_for(model, **EVERY_LOSS | changes), batch_of(model)
    names = [name for name in LOSSES if config[f"lambda_{name}"] > 0]

    def losses_and_gradients(slices):
        values = torch.zeros(len(names))
        model.zero_grad()
        for index in slices:
            step = forward_batch(model, config, batch.rows(index), {1})
            losses = torch.stack([LOSSES[name](step) for name in names]) / len(slices)
            losses.sum().backward()
            values += losses.detach()
        return values, {name: p.grad.clone() for name, p in model.controllers().items()}

    whole, whole_gradient = losses_and_gradients([slice(4)])
    values, gradient = losses_and_gradients([slice(0, 2), slice(2, 4)])
    same(values, whole)
    for name in gradient:
        same(gradient[name], whole_gradient[name])


def test_labelled_rows_are_even_and_the_same_in_slices():
    assert labelled_rows(4, 1.0) == [0, 1, 2, 3] and labelled_rows(4, 0.5) == [1, 3]
    assert labelled_rows(3, 0.1) == [0]  # at least one
    for share in (0.25, 0.5, 0.75):
        halves = labelled_rows(4, share) + [4 + i for i in labelled_rows(4, share)]
        assert labelled_rows(8, share) == halves and len(halves) == 8 * share


def test_labelled_layers_are_a_function_of_seed_and_step_and_come_evenly():
    config = config_for(make(controlled=(0, 1, 3)), lambda_rank=1.0, label_layers=2)
    drawn = [labelled_layers(config, step) for step in range(300)]
    assert drawn == [labelled_layers(config, step) for step in range(300)]
    assert all(len(layers) == 2 for layers in drawn)
    assert drawn != [labelled_layers(config | {"seed": 1}, step) for step in range(300)]
    assert all(160 < sum(layer in layers for layers in drawn) < 240 for layer in (0, 1, 3))
    for nothing in (dict(lambda_rank=0.0), dict(label_share=0.0), dict(gate="random"), dict(mode="cheap")):
        assert labelled_layers(config | nothing, 0) == set()


def rows_through_layers(model, config, labelled):
    """A step -> for each layer, the number of rows of every call that it got, in their order."""
    calls = [[] for _ in model.h]
    hooks = [block.register_forward_hook(lambda module, args, out: calls[module.layer].append(len(args[0])))
             for block in model.h]
    forward_batch(model, config, batch_of(model), labelled)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("changes,dense_rows", [
    (dict(lambda_lm=1.0), []),
    (dict(lambda_lm=1.0, lambda_util=1.0, label_target="next"), []),
    (dict(lambda_distill=1.0), [4]),
    (dict(lambda_distill=1.0, lambda_util=1.0, label_target="next", label_share=0.5), [4]),
    (dict(lambda_distill=1.0, lambda_util=1.0, label_target="dense", label_share=0.5), [4]),
    (dict(lambda_lm=1.0, lambda_rank=1.0, label_target="dense", label_share=0.5), [2]),
    (dict(lambda_lm=1.0, lambda_rank=1.0, label_target="dense", label_share=1.0), [4])])
@pytest.mark.parametrize("oracle", ["off_policy", "on_policy"])
def test_the_dense_forward_runs_once_from_the_first_controlled_layer_for_who_needs_it(changes, dense_rows,
                                                                                      oracle):
    """Layers 0 and 1 are dense anyway, so the routed forward and the dense one share them."""
    model = make(n_layer=5, controlled=(2, 3))
    config = config_for(model, oracle=oracle, **changes)
    labelled = {2} if "lambda_util" in changes or "lambda_rank" in changes else set()
    branches = [2 * 4 * config["label_share"]] if labelled else []
    calls = rows_through_layers(model, config, labelled)
    assert calls[0] == calls[1] == [4]
    assert sorted(calls[2]) == sorted([4, *dense_rows])
    assert sorted(calls[3]) == sorted(calls[4]) == sorted([4, *dense_rows, *branches])


def test_the_dense_forward_of_some_rows_is_that_of_the_batch():
    model, step = full_step(label_target="dense")
    context = context_of(step.context.tokens[[1, 3]])
    x, _ = model.run(model.embed(context), "topk", context, end=1)
    same(dense_stream(model, x, context, 1), step.dense[[1, 3]])
