"""kernels.py, losses, estimators and labels, each against a slow reference, and what a training step trains, shares
and pays for."""
import itertools

import pytest
import torch
import torch.nn.functional as F

import kernels
from gates import (ESTIMATORS, GATES, LABELS, LOSSES, Context, LayerLabels, Route, Trace, active_losses,
                   make_labels, pairwise)
from kernels import ffn_at, permute, short_attention
from model import ACTIVATIONS
from test_routing import (LEARNED, batch_of, best_of, both_families, config_for, context_of, gate_names, make,
                          numbers, reached, same, slow, tokens, trace_of)
from train import labelled_layers

EVERY_LOSS = {f"lambda_{name}": 1.0 for name in ("lm", "distill", "jepa", "util", "rank", "anchor")}


# -----------------------------------------------------------------------------
# what is written for speed

def test_a_permutation_and_its_gradient():
    x, order = numbers(0, 7, 3).requires_grad_(), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    [plain] = torch.autograd.grad((x[order] * numbers(2, 7, 3)).sum(), x)
    permuted = permute(x, order, order.argsort())
    assert torch.equal(permuted, x[order])
    assert torch.equal(torch.autograd.grad((permuted * numbers(2, 7, 3)).sum(), x)[0], plain)
    assert torch.equal(permute(permuted, order.argsort(), order), x)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("heads", [6, 3, 1])  # of keys and values, for 6 of queries
def test_short_attention_is_causal_attention(dtype, tolerance, heads):
    q, k, v, up = (numbers(i, 2, 6 if i in (0, 3) else heads, 17, 8).to(dtype) for i in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    short = short_attention(q, k, v)
    same(short.float(), plain.float(), tolerance)
    for a, b in zip(*(torch.autograd.grad((y * up).sum(), (q, k, v)) for y in (plain, short))):
        same(a.float(), b.float(), tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chosen", [[], [1, 5], list(range(6))])
def test_a_frozen_ffn_gives_every_value_and_the_gradient_of_the_chosen_tokens_alone(activation, bias, chosen):
    ffn = make(activation=activation, bias=bias).h[1].mlp
    h, up, others = numbers(0, 6, 16).requires_grad_(), numbers(1, 6, 16), [i for i in range(6) if i not in chosen]
    same(ffn_at(ffn, h, torch.tensor([1])), ffn(h))  # with trained weights it is the FFN, gradients and all
    assert torch.autograd.grad(ffn_at(ffn, h, torch.tensor([1])).sum(), h)[0][0].any()
    ffn.requires_grad_(False)
    plain, at = ffn(h), ffn_at(ffn, h, torch.tensor(chosen, dtype=torch.int64))
    same(at, plain)
    (want,), (got,) = (torch.autograd.grad((y * up).sum(), h) for y in (plain, at))
    same(got[chosen], want[chosen])
    assert not got[others].any() and want.all(dim=1).all()


# -----------------------------------------------------------------------------
# the losses of the head, in chunks of tokens

def plain_loss(x, weight, reference):
    """The formula, with all the logits at once, in the dtype of its arguments."""
    logits = (x @ weight.T).flatten(0, 1)
    if not reference.is_floating_point():
        return F.cross_entropy(logits, reference.flatten())
    log_q = (reference @ weight.detach().T).flatten(0, 1).log_softmax(-1)
    return (log_q.exp() * (log_q - logits.log_softmax(-1))).sum(-1).mean()


def head_case(loss, scale=1.0):
    """x (2, 70, 8), weight (17, 8), and a reference: tokens or hidden states."""
    reference = numbers(2, 2, 70, 8) * scale
    if loss == "lm_loss":
        reference = torch.randint(17, (2, 70), generator=torch.Generator().manual_seed(2))
    return numbers(0, 2, 70, 8) * scale, numbers(1, 17, 8), reference


def in_small_chunks(monkeypatch, size=33):
    monkeypatch.setattr(kernels, "chunks", lambda n, weight, trained=False: [
        slice(i, i + size) for i in range(0, n, size)])


both_losses = pytest.mark.parametrize("loss", ["lm_loss", "kl_loss"])


@both_losses
@pytest.mark.parametrize("trained,autocast,dtype", [
    (True, False, torch.float32), (False, False, torch.float32), (True, True, torch.float32),
    (False, True, torch.float32), (False, True, torch.bfloat16)])  # dtype: a frozen head is held in bfloat16
def test_a_loss_of_the_head_equals_its_formula_in_value_and_gradient(monkeypatch, loss, trained, autocast, dtype):
    # At a scale of 30 logits are some hundreds: softmax must not overflow.
    for size, scale in itertools.product((1, 33, 140, 1000), (1.0,) if autocast else (1.0, 30.0)):
        in_small_chunks(monkeypatch, size)
        x, weight, reference = head_case(loss, scale)
        x, weight = x.requires_grad_(), weight.requires_grad_(trained)
        want, wanted = plain_loss(x, weight, reference), [x, weight] if trained else [x]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = getattr(kernels, loss)(x, weight if trained else weight.to(dtype), reference)
        same(got, want, 2e-2 if autocast else 1e-5)
        for a, b in zip(torch.autograd.grad(3 * got, wanted), torch.autograd.grad(3 * want, wanted)):
            assert a.dtype == torch.float32 and (a - b).norm() < (2e-2 if autocast else 1e-5) * b.norm()


@both_losses
def test_token_losses_are_the_cross_entropy_of_every_token(monkeypatch, loss):
    in_small_chunks(monkeypatch)
    x, weight, reference = head_case(loss)
    other, wanted = numbers(3, 2, 70, 8), reference.flatten()
    if loss == "kl_loss":
        wanted = (reference @ weight.T).softmax(-1).flatten(0, 1)
    for stream, losses in zip((x, other), kernels.token_losses([x, other], weight, reference)):
        want = F.cross_entropy((stream @ weight.T).flatten(0, 1), wanted, reduction="none")
        assert losses.shape == (2, 70) and losses.dtype == torch.float32
        same(losses.flatten(), want)


def test_compare_heads_sums_loss_divergence_and_agreement(monkeypatch):
    in_small_chunks(monkeypatch)
    (x, weight, targets), teacher = head_case("lm_loss"), numbers(2, 2, 70, 8)
    loss, kl, agreement = kernels.compare_heads(x, teacher, weight, targets).tolist()
    assert loss == pytest.approx(140 * plain_loss(x, weight, targets).item(), rel=1e-5)
    assert kl == pytest.approx(140 * plain_loss(x, weight, teacher).item(), rel=1e-5)
    assert agreement == ((x @ weight.T).argmax(-1) == (teacher @ weight.T).argmax(-1)).sum() > 0


def test_chunks_cover_every_token_once_and_bound_the_logits():
    weight = torch.empty(50257, 2, device="meta")
    for trained, size in ((False, 2 ** 23), (True, 2 ** 26)):
        slices = kernels.chunks(5000, weight, trained)
        assert [i for s in slices for i in range(5000)[s]] == list(range(5000))
        assert len(range(5000)[slices[0]]) * 50257 <= size and len(slices) > 1


# -----------------------------------------------------------------------------
# the losses of a step, each against a loop written from its formula

def full_trace(family="gpt2"):
    """A model and a Trace that has everything: routes, labels, the dense stream."""
    model = make(family=family, gate="g3")
    return model, trace_of(model, config_for(model, label_target="dense", **EVERY_LOSS), {1, 3})


def head(model, x):
    return F.linear(model.ln_f(x), model.wte.weight if model.config.tied_head else model.lm_head.weight)


@both_families
def test_lm_and_distill_equal_their_formulas(family):
    model, trace = full_trace(family)
    log_p, log_q = head(model, trace.x).log_softmax(-1), head(model, trace.dense_x).log_softmax(-1)
    token = log_p.gather(2, trace.targets.unsqueeze(2))
    same(LOSSES["lm"]()(trace), -token.mean())
    same(LOSSES["distill"]()(trace), (log_q.exp() * (log_q - log_p)).sum(-1).mean())
    same(trace.dense_x, slow(model, trace.context.tokens, lambda layer, s: None))  # the frozen model itself
    assert not trace.dense_x.requires_grad and LOSSES["distill"]()(trace) > 0.01


def loss_of(name, **fields):
    """A loss of a Trace that holds nothing but the fields that it is about."""
    return LOSSES[name]()(Trace(None, {}, None, None, **fields))


def test_anchor_is_the_square_of_a_rows_mean_score():
    routes = [Route(i, numbers(i, 3, 9), None) for i in (0, 1)]
    same(loss_of("anchor", routes=routes), sum((r.scores.sum(1) / 9) ** 2 for r in routes).mean() / 2)


def test_jepa_is_one_minus_cosine_without_zero_outcomes():
    prediction, outcomes = numbers(0, 2, 5, 2, 4), numbers(1, 2, 5, 2, 4)
    outcomes[0, :, 1], outcomes[1, 2, 0] = 0, 0
    cosine = (prediction * outcomes).sum(-1) / (prediction.norm(dim=-1) * outcomes.norm(dim=-1))  # nan: left out
    want, route = (1 - cosine).flatten(1).nanmean(1).mean(), Route(1, None, None, prediction, outcomes)
    same(loss_of("jepa", routes=[route]), want)
    nothing = Route(3, None, None, prediction, torch.zeros_like(outcomes))
    same(loss_of("jepa", routes=[route, nothing]), want / 2)


def test_util_is_smooth_l1_of_raw_scores():
    labels = [LayerLabels(i, numbers(i, 2, 9) * 2, None, numbers(i + 5, 2, 9), None) for i in (0, 1)]
    errors = torch.stack([(label.scores - label.d).abs() for label in labels])
    same(loss_of("util", labels=labels), torch.where(errors < 1, errors ** 2 / 2, errors - 0.5).mean())


def test_rank_is_weighted_softplus_over_the_pairs():
    s, d, row = numbers(0, 2, 9), numbers(1, 2, 9), torch.arange(2)[:, None]
    partner = torch.stack([torch.randperm(9), torch.arange(9).roll(1)])
    dd, ds = d - d[row, partner], s - s[row, partner]
    want = (dd.abs() * (1 + torch.exp(-dd.sign() * ds)).log()).mean(1)
    same(pairwise(s, d, partner), want)
    same(loss_of("rank", labels=[LayerLabels(1, s, None, d, partner)]), want.mean())


def test_outcomes_are_the_fixed_head_on_rms_normalised_outputs():
    gate = make(gate="g3").h[1].gate
    full, cheap = numbers(0, 2, 3, 16).requires_grad_(), numbers(1, 2, 3, 16) * 50
    cheap[0, 1] = 0
    outcomes = gate.outcomes(full, cheap)
    for a, out in enumerate((full.detach(), cheap)):
        unit = out / ((out ** 2).sum(-1, keepdim=True) / 16).sqrt()  # nan where an output is zero
        same(outcomes[:, :, a], unit.nan_to_num(0) @ gate.target_head)
    assert not outcomes.requires_grad and not outcomes[0, 1, 1].any()


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
    s, up = numbers(0, 2, 9).requires_grad_(), torch.randn(2, 9)
    mask = best_of(s.detach(), 4)
    soft = 2 * mask * sigmoid_of(name, s) if name == "scaled" else sigmoid_of(name, s)
    w = ESTIMATORS[name]()(s, mask)
    same(w, soft if name == "scaled" else mask.float())
    want, = torch.autograd.grad((soft * up).sum(), s)
    got, = torch.autograd.grad((w * up).sum(), s)
    same(got, want)
    assert name == "scaled" or (got != 0).all()  # every token learns, selected or not


def test_moving_all_scores_of_a_row_is_nothing_to_ste_norm_and_something_to_ste():
    s, up, shift = numbers(0, 3, 12), torch.randn(3, 12), torch.tensor([[5.0], [-3.0], [0.5]])
    for name in ("ste_norm", "ste"):
        gradients = []
        for scores in (s.clone().requires_grad_(), (s + shift).requires_grad_()):
            w = ESTIMATORS[name]()(scores, best_of(scores.detach(), 6))
            gradients += torch.autograd.grad((w * up).sum(), scores)
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5) == (name == "ste_norm")
        # So nothing pushes a row's mean under ste_norm.
        assert (gradients[0].sum(1).abs().max() < 1e-5) == (name == "ste_norm")


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
    raw = numbers(0, 3, 50) * torch.tensor([[1e-3], [1.0], [1e3]]) + 7
    raw[1, 0] = 100
    monkeypatch.setitem(LABELS, "given", lambda: lambda trace, route: raw)
    trace, route = Trace(None, {"oracle": "given"}, Context(None, torch.arange(3)), None), Route(1, raw, None)
    label = make_labels(trace, route)
    for row, d in zip(raw, label.d):
        std = ((row - row.mean()) ** 2).mean().sqrt() + 1e-6
        same(d, ((row - row.mean()) / std).clamp(-3, 3), 2e-3)
    assert label.d[1, 0] == 3 and torch.equal(label.raw, raw)
    assert torch.equal(label.partner.sort(1).values, torch.arange(50).expand(3, 50))
    assert not torch.equal(label.partner[0], label.partner[1])
    raw = torch.full((3, 50), 5.0)
    assert not make_labels(trace, route).d.any()


@pytest.mark.parametrize("gate,estimator,family", [
    ("g1", "ste_norm", "gpt2"), ("g1", "scaled", "gpt2"), ("g3", "ste", "gpt2"), ("g3", "scaled", "llama"),
    ("random", "scaled", "gpt2"), ("g1", "ste_norm", "llama")])
@pytest.mark.parametrize("oracle", ["off_policy", "on_policy"])
@pytest.mark.parametrize("target", ["next", "dense"])
@pytest.mark.usefixtures("device")
def test_labels_equal_a_recomputation_from_the_start(gate, estimator, family, oracle, target):
    model = make(family=family, gate=gate, estimator=estimator, controlled=(0, 1, 3), block_size=10)
    batch = batch_of(model, 3)
    config = config_for(model, oracle=oracle, label_target=target, lambda_util=1.0)
    q = head(model, slow(model, batch.tokens, lambda layer, s: None)).softmax(-1)
    if target == "next":
        q = F.one_hot(batch.targets, model.config.vocab_size).float()
    for model.config.execution in ("masked", "gathered"):
        trace = trace_of(model, config, {0, 1, 3}, batch)
        for route, label in zip(trace.routes, trace.labels, strict=True):
            def branch(value):
                def plan(layer, s):
                    if layer == route.layer:
                        return torch.full_like(s, value, dtype=torch.bool)
                    return None if layer > route.layer and oracle == "off_policy" else best_of(s, 5)
                x = slow(model, batch.tokens, plan, batch.row_seeds)
                return -(q * head(model, x).log_softmax(-1)).sum(-1)
            same(label.raw, (branch(False) - branch(True)).detach(), 2e-5)
            assert torch.equal(label.scores, route.scores)


def test_shuffled_labels_are_the_papers_in_another_order_within_each_row():
    model = make()
    configs = [config_for(model, lambda_util=1.0, oracle=oracle) for oracle in ("off_policy", "shuffled")]
    for given, shuffled in zip(*(trace_of(model, config, {1, 3}).labels for config in configs), strict=True):
        same(shuffled.raw.sort(1).values, given.raw.sort(1).values)
        assert ((shuffled.raw - given.raw).abs() > 1e-4).float().mean(1).min() > 0.5


# -----------------------------------------------------------------------------
# what a step trains, shares, and pays for

@pytest.mark.parametrize("gate", LEARNED)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_auxiliary_loss_trains_the_gate_of_its_layer_and_nothing_else(gate, estimator):
    model = make(gate=gate, estimator=estimator)
    config = config_for(model, lambda_util=1.0, label_target="dense", oracle="on_policy")
    for layer in (1, 3):
        trace = trace_of(model, config, {layer})
        for name in ("util", "rank"):
            assert reached(model, LOSSES[name]()(trace)) == gate_names(model, layer)
    gates = gate_names(model, 1) | gate_names(model, 3)
    assert reached(model, LOSSES["anchor"]()(trace)) == gates
    assert reached(model, LOSSES["lm"]()(trace)) & gates == (set() if estimator == "hard" else gates)
    if GATES[gate].predicts:
        for route in trace_of(model, config_for(model, lambda_jepa=1.0)).routes:
            own = reached(model, loss_of("jepa", routes=[route]))
            assert own and own <= {n for n in gate_names(model, route.layer) if "scorer" not in n}


@both_families
def test_no_loss_leaves_a_gradient_in_the_frozen_model(family):
    model = make(family=family, gate="g3")
    for p in model.backbone().values():
        p.requires_grad_(False)
    trace = trace_of(model, config_for(model, **EVERY_LOSS, label_target="dense", oracle="on_policy"), {1, 3})
    sum(LOSSES[name[7:]]()(trace) for name in EVERY_LOSS).backward()
    assert all(p.grad is None for p in model.backbone().values())
    assert all(p.grad.any() for p in model.controllers().values())


@pytest.mark.parametrize("changes", [
    dict(label_target="next", oracle="off_policy"), dict(label_target="dense", oracle="on_policy"),
    dict(label_target="dense", oracle="shuffled", lambda_distill=0.0)])
@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_slices_of_a_batch_make_the_losses_and_gradients_of_the_batch(changes, execution):
    model = make(gate="g3", execution=execution)
    config, batch = config_for(model, **EVERY_LOSS | changes), batch_of(model)

    def losses_and_gradients(parts):
        traces = [trace_of(model, config, {1}, part) for part in parts]
        names = [name for name in LOSSES if config[f"lambda_{name}"] > 0]
        losses = torch.stack([sum(LOSSES[name]()(trace) for trace in traces) / len(parts) for name in names])
        return losses, torch.autograd.grad(losses.sum(), list(model.controllers().values()))

    (losses, gradient), (whole, whole_gradient) = map(losses_and_gradients, (
        [batch.rows(slice(0, 2)), batch.rows(slice(2, 4))], [batch]))
    same(losses, whole)
    for a, b in zip(gradient, whole_gradient):
        same(a, b)


@pytest.mark.parametrize("share,rows", [(0.1, 1), (0.25, 1), (0.5, 2), (0.75, 3)])
def test_labels_go_to_the_first_rows(share, rows):
    model, every = full_trace()
    some = trace_of(model, every.config | {"label_share": share}, {1, 3}).labels
    for part, whole in zip(some, every.labels, strict=True):
        assert part.raw.shape == (rows, 24)
        for a, b in zip(part[1:], whole[1:]):
            same(a, b[:rows])


def test_labelled_layers_are_a_function_of_seed_and_step_and_come_evenly():
    config, losses = config_for(make(controlled=(0, 1, 3)), label_layers=2), {"rank": LOSSES["rank"]()}
    drawn = [labelled_layers(config, losses, step) for step in range(300)]
    assert drawn == [labelled_layers(config, losses, step) for step in range(300)]
    assert all(len(layers) == 2 for layers in drawn)
    assert drawn != [labelled_layers(config | {"seed": 1}, losses, step) for step in range(300)]
    assert all(160 < sum(layer in layers for layers in drawn) < 240 for layer in (0, 1, 3))
    assert labelled_layers(config, {"lm": LOSSES["lm"]()}, 0) == set()


def test_a_run_without_what_a_loss_needs_goes_without_the_loss():
    def names(gate="g3", **changes):
        return {*active_losses(config_for(make(gate=gate), **EVERY_LOSS | changes))}
    assert names() == {"lm", "distill", "jepa", "util", "rank", "anchor"}
    assert names(gate="g1") == names() - {"jepa"} and names(lambda_rank=0.0) == names() - {"rank"}
    assert names(label_share=0.0) == names() - {"util", "rank"}
    assert names(gate="random") == names(mode="cheap") == names(mode="adapter") == {"lm", "distill"}
    assert names(mode="full") == {"lm"}


@pytest.mark.parametrize("changes,dense_rows", [
    (dict(lambda_lm=1.0), []),
    (dict(lambda_lm=1.0, lambda_util=1.0, label_target="next"), []),
    (dict(lambda_distill=1.0), [4]),
    (dict(lambda_distill=1.0, lambda_util=1.0, label_target="dense", label_share=0.5), [4]),
    (dict(lambda_lm=1.0, lambda_rank=1.0, label_target="dense", label_share=0.5), [4])])
@pytest.mark.parametrize("oracle", ["off_policy", "on_policy"])
def test_the_dense_forward_runs_once_from_the_first_controlled_layer_for_who_needs_it(changes, dense_rows, oracle):
    """Layers 0 and 1 are dense anyway, so the routed forward and the dense one share them. It runs on all rows,
    whatever the share that gets labels."""
    model = make(n_layer=5, controlled=(2, 3))
    config, calls = config_for(model, oracle=oracle, **changes), [[] for _ in model.h]  # the rows of every call
    for block in model.h:
        block.register_forward_hook(lambda module, args, out: calls[module.layer].append(len(args[0])))
    labelled = {2} if "lambda_util" in changes or "lambda_rank" in changes else set()
    trace_of(model, config, labelled)
    branches = [2 * 4 * config["label_share"]] if labelled else []
    assert calls[0] == calls[1] == [4]
    assert sorted(calls[2]) == sorted([4, *dense_rows])
    assert sorted(calls[3]) == sorted(calls[4]) == sorted([4, *dense_rows, *branches])
