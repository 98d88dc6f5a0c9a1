"""Selection, estimators, gates, losses and labels. Whatever is said of a gate is said of every registered one."""
import math
import textwrap

import pytest
import torch
import torch.nn.functional as F

import gates
from gates import (ESTIMATORS, GATES, allocate, exact_labels, full_tokens, jepa_loss, label, oracle_labels, predictor_health,
                   rank_correlation, rank_loss, route_weight, split_topk, threshold_for, uniform, util_loss)
from model import GPT, GPTConfig

torch.set_num_threads(1)
INF = math.inf


def example():
    """NormGate, the worked example in the docstring of gates.py, taken out and run as it stands."""
    code = gates.__doc__[gates.__doc__.index("    @register"):gates.__doc__.index("The contract:")]
    exec(textwrap.dedent(code), vars(gates) | {})
    return GATES.pop("norm")


NormGate = example()
ALL_GATES = [*GATES, "norm"]
LEARNED = [g for g in GATES if GATES[g].learned] + ["norm"]


@pytest.fixture(autouse=True)
def norm_gate(monkeypatch):
    monkeypatch.setitem(GATES, "norm", NormGate)


def make(seed=0, **fields):
    """A small model whose cheap FFNs, gates and norms have left their initial values."""
    fields = dict(block_size=24, vocab_size=40, n_layer=4, n_head=2, n_embd=16, controlled=(1, 3), cheap_rank=8, g1_hidden=8, latent=8) | fields
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**fields))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if ".gate." in name else 0.15))
    return model


def tokens(model, B=2, T=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (B, T or model.config.block_size), generator=g)


def best_of(scores, k):
    """topk as the specification words it, in plain Python."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for b, row in enumerate(scores.tolist()):
        for t in sorted(range(len(row)), key=lambda t: (-row[t], t))[:k]:
            mask[b, t] = True
    return mask


def slow(model, idx, plan, keys=None):
    """The residual stream after the last layer, from the blocks' submodules and the specification alone.
    plan(layer, scores) -> the mask of the full tokens, or None for the dense layer."""
    keys = torch.arange(len(idx)) if keys is None else keys
    x = model.wte(idx) + model.wpe(torch.arange(idx.size(1)))
    for i, block in enumerate(model.h):
        x = x + block.attn(block.ln_1(x))
        h = block.ln_2(x)
        mask = None
        if block.controlled:
            s = block.gate(h.detach(), lambda: uniform(keys, i, idx.size(1)))[0].float()
            mask = plan(i, s)
        if mask is None:
            x = x + block.mlp(h)
            continue
        w = mask.float()
        if model.config.estimator == "scaled" and block.gate.learned:
            w = w * 2 * torch.sigmoid(s)
        x = x + w.unsqueeze(-1) * block.mlp(h) + (1 - w.unsqueeze(-1)) * block.cheap(h)
    return x


def losses_of(model, x, targets):
    return F.cross_entropy(F.linear(model.ln_f(x), model.wte.weight).transpose(1, 2), targets, reduction="none")


def same(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# -----------------------------------------------------------------------------
# selection

@pytest.mark.parametrize("T", [1, 2, 7, 8])
@pytest.mark.parametrize("budget", [0, 0.1, 0.25, 0.5, 0.9, 1])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "zeros", "infinite"])
def test_topk_takes_exactly_k_with_ties_to_the_earlier(kind, budget, T):
    g = torch.Generator().manual_seed(T)
    scores = {"random": torch.randn(3, T, generator=g), "ties": torch.randint(3, (3, T), generator=g).float(), "equal": torch.full((3, T), 0.7),
              "zeros": torch.tensor([0.0, -0.0])[torch.randint(2, (3, T), generator=g)],
              "infinite": torch.tensor([-INF, 0.0, INF])[torch.randint(3, (3, T), generator=g)]}[kind]
    k = full_tokens(budget, T)
    chosen, rest = split_topk(scores, k)
    assert chosen.dtype == rest.dtype == torch.int64 and chosen.shape == (3, k) and rest.shape == (3, T - k)
    assert torch.equal(chosen, chosen.sort(1).values) and torch.equal(rest, rest.sort(1).values)
    mask = torch.zeros(3, T, dtype=torch.bool).scatter_(1, chosen, True)
    assert torch.equal(mask, best_of(scores, k))
    assert torch.equal(~mask, torch.zeros(3, T, dtype=torch.bool).scatter_(1, rest, True))


@pytest.mark.parametrize("budget,T,k", [(0, 5, 0), (1, 5, 5), (0.5, 1, 1), (0.49, 1, 0), (0.5, 5, 3), (0.5, 7, 4), (0.25, 6, 2), (0.1, 4, 0), (0.3, 5, 2)])
def test_k_rounds_half_up(budget, T, k):
    assert full_tokens(budget, T) == k  # Python's round() would send 2.5 to 2


@pytest.mark.parametrize("budget", [0, 0.1, 0.25, 0.5, 0.75, 1])
def test_threshold_has_the_exact_share_strictly_above(budget):
    scores = torch.randn(4, 25, generator=torch.Generator().manual_seed(0))
    threshold = threshold_for(scores, budget)
    assert (scores > threshold).sum() == full_tokens(budget, 100)
    assert threshold == {0: INF, 1: -INF}.get(budget, threshold) and threshold.dtype == torch.float32


def test_threshold_lies_between_two_scores():
    """On a score, rounding would decide: the first token of a text has the same score each time it is met."""
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    assert 2 < threshold_for(scores, 0.5) < 3 and 3 < threshold_for(scores, 0.25) < 4


def test_threshold_with_ties_stays_within_the_budget():
    assert (torch.ones(2, 8) > threshold_for(torch.ones(2, 8), 0.5)).sum() == 0
    assert (torch.full((1, 3), INF) > threshold_for(torch.full((1, 3), INF), 0)).sum() == 0


# -----------------------------------------------------------------------------
# estimators

@pytest.mark.parametrize("estimator", ["ste", "ste_norm"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_ste_is_hard_forward_and_sigmoid_backward(estimator, scale):
    s = (torch.randn(2, 9, generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()
    mask, up = best_of(s.detach(), 4), torch.randn(2, 9)
    w = route_weight(s, mask, estimator)
    assert torch.equal(w, mask.float()) and w.dtype == torch.float32
    z = (s - s.mean(1, True)) / (s.var(1, keepdim=True, unbiased=False).sqrt() + 1e-6) if estimator == "ste_norm" else s
    want, = torch.autograd.grad((torch.sigmoid(z) * up).sum(), s)
    got, = torch.autograd.grad((w * up).sum(), s)
    same(got, want)
    if estimator == "ste":
        p = torch.sigmoid(s.detach())
        same(got, up * p * (1 - p))
        assert scale > 1 or (got != 0).all()  # every token, selected or not


@pytest.mark.parametrize("scores", [torch.zeros(2, 1), torch.full((2, 5), 3.0)])
def test_ste_norm_of_equal_scores_has_finite_gradients(scores):
    s = scores.clone().requires_grad_()
    w = route_weight(s, torch.ones_like(s, dtype=torch.bool), "ste_norm")
    assert (w == 1).all() and torch.autograd.grad(w.sum(), s)[0].isfinite().all()


def test_scaled_weighs_and_teaches_the_selected_only():
    s = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = best_of(s.detach(), 4)
    w = route_weight(s, mask, "scaled")
    p = torch.sigmoid(s.detach())
    same(w.detach(), torch.where(mask, 2 * p, torch.zeros(())))
    same(torch.autograd.grad(w.sum(), s)[0], torch.where(mask, 2 * p * (1 - p), torch.zeros(())))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_unlearned_gate_has_the_mask_for_a_weight(estimator):
    s = torch.randn(2, 5, requires_grad=True)
    w = route_weight(s, best_of(s.detach(), 2), estimator, learned=False)
    assert torch.equal(w, best_of(s.detach(), 2).float()) and not w.requires_grad


# -----------------------------------------------------------------------------
# the contract of a gate

def gate_of(name, layer=1, **fields):
    model = make(gate=name, n_layer=2, controlled=(layer,), **fields)
    return model.h[layer].gate


@pytest.mark.parametrize("name", ALL_GATES)
@pytest.mark.parametrize("B,T", [(1, 1), (2, 8), (3, 5)])
def test_scores_are_finite_float32_token_local_and_repeat(name, B, T):
    gate, h, keys = gate_of(name), torch.randn(B, T, 16), torch.arange(B) + 5
    noise = lambda: uniform(keys, 1, T)
    s, prediction = gate(h, noise)
    assert s.shape == (B, T) and s.dtype == torch.float32 and s.isfinite().all()
    assert (prediction is not None) == gate.predicts and (not gate.predicts or prediction.shape[:3] == (B, T, 2))
    assert torch.equal(s, gate(h, noise)[0])
    for t in range(T):
        other = torch.randn(B, T, 16)
        other[:, t] = h[:, t]
        same(gate(other, noise)[0][:, t], s[:, t])
        same(gate(h[:, t:t + 1], lambda: uniform(keys, 1, 1, t))[0][:, 0], s[:, t])  # decoding sees one token
    same(gate(h[-1:], lambda: uniform(keys[-1:], 1, T))[0][0], s[-1])  # rows are independent


@pytest.mark.parametrize("name", ALL_GATES)
@pytest.mark.parametrize("gathered", [False, True])
def test_scores_and_weights_are_float32_under_autocast(name, gathered):
    model = make(gate=name)
    with torch.autocast("cpu", torch.bfloat16):
        x, routes = model.blocks(model.embed(tokens(model)), "topk", gathered=gathered, align=True)
        loss = model.lm_loss(x, tokens(model))
    assert x.dtype == loss.dtype == torch.float32
    for r in routes:
        assert r.scores.dtype == torch.float32
        assert all(t is None or t.dtype == torch.float32 for t in (r.prediction, r.target))


@pytest.mark.parametrize("name", ALL_GATES)
def test_no_gate_sends_a_gradient_into_the_backbone(name):
    model = make(gate=name)
    x0 = model.embed(tokens(model)).detach().requires_grad_()
    _, routes = model.blocks(x0, "topk", gathered=False, align=True)
    for r in routes:
        for out in (r.scores, r.prediction):
            if out is not None and out.requires_grad:
                assert torch.autograd.grad(out.sum(), x0, allow_unused=True, retain_graph=True) == (None,)
                assert all(n.startswith(f"h.{r.layer}.gate.") for n in gradients(model, out.sum())[0])


def test_a_forward_repeats_with_its_keys_wherever_the_row_stands():
    model = make(gate="random")
    idx, keys = tokens(model, 3), torch.tensor([5, 9, 11])
    masks = lambda idx, keys: torch.stack([r.mask for r in model(idx, "topk", keys)[1]])
    assert torch.equal(masks(idx, keys), masks(idx, keys))
    assert torch.equal(masks(idx, keys)[:, [2]], masks(idx[[2]], keys[[2]]))
    assert not torch.equal(masks(idx, keys), masks(idx, keys + 1)) and not torch.equal(*masks(idx, keys))


def test_the_target_head_is_orthonormal_fixed_and_seeded_apart():
    heads = [gate_of("g3", seed=seed).head for seed in (0, 1)]
    same(heads[0].T @ heads[0], torch.eye(8))
    assert torch.equal(*heads) and not torch.equal(heads[0], gate_of("g3", layer=0).head)
    assert "head" not in dict(gate_of("g3").named_parameters()) and not heads[0].requires_grad


def test_targets_are_the_head_on_rms_normalised_outputs():
    gate = gate_of("g3")
    full, cheap = torch.randn(2, 3, 16), torch.randn(2, 3, 16) * 50
    cheap[0, 1] = 0
    target = gate.target(full, cheap)
    for b in range(2):
        for t in range(3):
            for a, out in enumerate((full[b, t], cheap[b, t])):
                rms = math.sqrt(sum(v * v for v in out.tolist()) / 16)
                same(target[b, t, a], gate.head.T @ out / rms if rms else torch.zeros(8))
    assert not gate.target(full.requires_grad_(), cheap).requires_grad


# -----------------------------------------------------------------------------
# noise

def test_uniform_is_uniform_and_its_streams_are_unrelated():
    u = uniform(torch.arange(64), 0, 512)
    assert u.shape == (64, 512) and u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert abs(torch.histc(u, 10, 0, 1) / u.numel() - 0.1).max() < 0.01
    for other in (uniform(torch.arange(64), 1, 512), uniform(torch.arange(64) + 1, 0, 512), u.roll(1, 1), uniform(torch.arange(64) * 7919, 0, 512)[:, 1:]):
        pair = torch.stack([u[:, :other.size(1)].flatten()[512:], other.flatten()[512:]])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02
    assert len(u.unique()) > 0.99 * u.numel()


def test_uniform_depends_on_key_stream_and_position_alone():
    keys = torch.tensor([3, 2 ** 62, -5])
    u = uniform(keys, 2, 20)
    assert torch.equal(u[:, 7:12], uniform(keys, 2, 5, start=7)) and torch.equal(u[[1]], uniform(keys[[1]], 2, 20))
    assert (u >= 0).all() and (u < 1).all()


# -----------------------------------------------------------------------------
# losses, each against a loop written from its formula

def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_jepa_loss_is_one_minus_cosine_without_zero_outcomes():
    prediction, target = rows(0, 2, 5, 2, 4), rows(1, 2, 5, 2, 4)
    target[0, :, 1], target[1, 2, 0] = 0, 0
    for b in range(2):
        terms = []
        for t in range(5):
            for a in range(2):
                p, q = prediction[b, t, a].tolist(), target[b, t, a].tolist()
                norm = math.hypot(*p) * math.hypot(*q)
                terms += [1 - sum(x * y for x, y in zip(p, q)) / norm] if norm else []
        assert jepa_loss(prediction, target)[b].item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)
    assert jepa_loss(prediction, torch.zeros_like(target)).tolist() == [0, 0]


def test_util_loss_is_smooth_l1_of_raw_scores():
    s, d = rows(0, 2, 9) * 2, rows(1, 2, 9)
    for b in range(2):
        terms = [0.5 * e * e if abs(e) < 1 else abs(e) - 0.5 for e in (s[b] - d[b]).tolist()]
        assert util_loss(s, d)[b].item() == pytest.approx(sum(terms) / 9, abs=1e-5)


def test_rank_loss_is_weighted_softplus_over_the_permuted_pairs():
    s, d = rows(0, 2, 9), rows(1, 2, 9)
    perm = torch.stack([torch.randperm(9), torch.arange(9).roll(1)])
    for b in range(2):
        total = 0
        for t, u in enumerate(perm[b].tolist()):
            dd, ds = (d[b, t] - d[b, u]).item(), (s[b, t] - s[b, u]).item()
            total += abs(dd) * math.log1p(math.exp(-math.copysign(1, dd) * ds))
        assert rank_loss(s, d, perm)[b].item() == pytest.approx(total / 9, abs=1e-5)


def test_labels_are_standardised_per_row_and_clamped():
    raw = rows(0, 3, 50) * torch.tensor([[1e-3], [1.0], [1e3]]) + 7
    raw[1, 0] = 100
    for b, d in enumerate(label(raw)):
        mean = sum(raw[b].tolist()) / 50
        std = math.sqrt(sum((v - mean) ** 2 for v in raw[b].tolist()) / 50) + 1e-6
        same(d, torch.tensor([max(-3, min(3, (v - mean) / std)) for v in raw[b].tolist()]), 2e-3)
    assert label(raw)[1, 0] == 3 and (label(torch.full((2, 4), 5.0)) == 0).all()
    same(label(raw[:1]), label(raw)[:1])


def gradients(model, loss):
    """-> the names of the parameters that the loss depends on, and of those that it moves."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {n for n, g in zip(named, grads) if g is not None}, {n for n, g in zip(named, grads) if g is not None and g.any()}


@pytest.mark.parametrize("gate", LEARNED)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_auxiliary_loss_trains_the_gate_of_its_layer_and_nothing_else(gate, estimator):
    model = make(gate=gate, estimator=estimator)
    idx, d = tokens(model), label(rows(0, 2, 24))
    _, routes = model.blocks(model.embed(idx), "topk", gathered=False, align=True)
    for r in routes:
        own = {n for n, _ in model.named_parameters() if n.startswith(f"h.{r.layer}.gate.")}
        assert gradients(model, util_loss(r.scores, d).sum()) == (own, own)
        reached, moved = gradients(model, rank_loss(r.scores, d, uniform(torch.arange(2), -1, 24).argsort(1)).sum())
        assert reached == own and moved <= own
        if r.prediction is not None:
            reached, moved = gradients(model, jepa_loss(r.prediction, r.target).sum())
            assert moved and reached <= {n for n in own if "scorer" not in n}


@pytest.mark.parametrize("layer", [-1, 0, 5, 6, 11, 12, 63, 1000])
def test_noise_is_uniform_and_its_own_at_every_layer(layer):
    noise = uniform(torch.arange(50), layer, 400)
    assert 0 <= noise.min() and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.01 and abs(noise.var() - 1 / 12) < 0.002
    assert not torch.equal(noise, uniform(torch.arange(50), layer + 1, 400))


@pytest.mark.parametrize("gate", LEARNED)
def test_under_hard_the_lm_loss_reaches_no_gate(gate):
    model = make(gate=gate, estimator="hard", controlled=(0, 2))
    x, _ = model.blocks(model.embed(tokens(model)), "topk")
    reached = gradients(model, losses_of(model, x, tokens(model, seed=1)).mean())[0]
    assert reached and not any(".gate." in n for n in reached)


@pytest.mark.parametrize("gate", LEARNED)
@pytest.mark.parametrize("estimator", ("ste", "ste_norm", "scaled"))
def test_the_lm_loss_reaches_the_scores_through_the_weight_alone(gate, estimator):
    """dL/ds = g . (full - cheap) * dw/ds, with g the gradient at the routed layer's output."""
    model = make(gate=gate, estimator=estimator, controlled=(0, 2))
    idx, y = tokens(model), tokens(model, seed=1)
    x, routes = model.blocks(model.embed(idx), "topk", gathered=False, keep={2})
    loss = losses_of(model, x, y).mean()
    assert {n for n, _ in model.named_parameters() if ".gate." in n} <= gradients(model, loss)[0]
    r, block = routes[1], model.h[2]
    full, cheap = block.mlp(r.h).detach(), block.cheap(r.h).detach()
    s = r.scores.detach().requires_grad_()
    p = torch.sigmoid((s - s.mean(1, True)) / (s.std(1, unbiased=False, keepdim=True) + 1e-6) if estimator == "ste_norm" else s)
    p = 2 * p * r.mask if estimator == "scaled" else p
    w = (p.detach() if estimator == "scaled" else r.mask.float()).unsqueeze(-1)
    after = (r.x + w * full + (1 - w) * cheap).detach().requires_grad_()
    g, = torch.autograd.grad(losses_of(model, model.h[3](after, "full")[0], y).mean(), after)
    want, = torch.autograd.grad((p * (g * (full - cheap)).sum(-1)).sum(), s)
    got, = torch.autograd.grad(loss, r.scores)
    assert (got - want).norm() < 1e-4 * want.norm() and want.norm() > 1e-4


# -----------------------------------------------------------------------------
# labels

def setting(estimator, gate="g1", **fields):
    model = make(gate=gate, estimator=estimator, n_layer=4, controlled=(0, 1, 3), block_size=10, **fields)
    return model, tokens(model, 3), tokens(model, 3, seed=1), torch.tensor([4, 2, 9])


@pytest.mark.parametrize("gate,estimator", [("g1", "ste"), ("g1", "scaled"), ("g3", "ste_norm"), ("g3", "scaled"), ("random", "scaled")])
@pytest.mark.parametrize("oracle", ["off_policy", "on_policy"])
@pytest.mark.parametrize("gathered", [False, True])
def test_labels_equal_a_recomputation_from_the_start(gate, estimator, oracle, gathered):
    model, idx, y, keys = setting(estimator, gate)
    _, routes = model.blocks(model.embed(idx), "topk", keys, gathered, keep={0, 1, 3})
    for r in routes:
        def branch(value):
            def plan(i, s):
                if i == r.layer:
                    return torch.full_like(s, value, dtype=torch.bool)
                return None if i > r.layer and oracle == "off_policy" else best_of(s, 5)
            return losses_of(model, slow(model, idx, plan, keys), y)
        got = oracle_labels(model, r, y, keys, oracle)
        same(got, (branch(0) - branch(1)).detach(), 1e-5)
        assert got.dtype == torch.float32 and not got.requires_grad


def test_off_policy_and_on_policy_labels_differ_except_at_the_last_layer():
    model, idx, y, keys = setting("ste")
    _, routes = model.blocks(model.embed(idx), "topk", keys, keep={0, 1, 3})
    gaps = [(oracle_labels(model, r, y, keys, "off_policy") - oracle_labels(model, r, y, keys, "on_policy")).abs().max() for r in routes]
    assert gaps[0] > 1e-3 and gaps[1] > 1e-3 and gaps[2] < 1e-5


@pytest.mark.parametrize("gate,estimator", [("g1", "ste"), ("g1", "scaled"), ("g3", "scaled")])
@pytest.mark.parametrize("suffix", ["topk", "full"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_exact_labels_equal_brute_force(gate, estimator, suffix, layer):
    model, idx, y, keys = setting(estimator, gate)
    positions = [0, 4, 9]
    got = exact_labels(model, idx, y, keys, layer, positions, suffix)
    assert got.shape == (3, 3, 2)
    for p, t in enumerate(positions):
        def flipped(value):
            def plan(i, s):
                if i > layer and suffix == "full":
                    return None
                mask = best_of(s, 5)
                if i == layer:
                    mask[:, t] = value
                return mask
            return losses_of(model, slow(model, idx, plan, keys), y)
        delta = (flipped(False) - flipped(True)).detach()
        same(got[:, p], torch.stack([delta[:, t], delta[:, t:].sum(1)], -1), 2e-5)


# -----------------------------------------------------------------------------
# shares of the layers, measurements

@pytest.mark.parametrize("gate", ["static", "g1"])
@pytest.mark.parametrize("budget,step", [(0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (1.0, 1.0), (0.5, 0.25), (0.3, 0.1)])
@pytest.mark.parametrize("best", [0, 1, 2])
def test_allocate_hands_out_the_budget_and_finds_the_layer_that_matters(gate, budget, step, best):
    """Cheap is full everywhere but in the layer `best`, where it shouts: full is worth something there alone."""
    model = make(gate=gate, n_layer=3, controlled=(0, 1, 2), cheap_rank=64, block_size=12, n_embd=16)
    for i, block in enumerate(model.h):
        block.cheap.load_state_dict(block.mlp.state_dict())
        if i == best:
            block.cheap.c_proj.weight.data.mul_(-8)
    idx = tokens(model, 4)
    y = model(idx, "full")[0].argmax(-1)  # text that the dense model knows
    shares = allocate(model, idx, y, torch.arange(4), budget, step)
    assert shares == [b.budget for b in model.h] and sum(shares) == pytest.approx(3 * budget, abs=1e-6)
    assert all(0 <= s <= 1 for s in shares) and shares[best] == pytest.approx(min(1, 3 * budget), abs=1e-6)
    if step == 1:
        assert sum(0 < s < 1 for s in shares) <= 1


def test_rank_correlation_is_spearmans():
    a = rows(0, 3, 20)
    assert rank_correlation(a, a.exp()) == pytest.approx(1, abs=1e-4) and rank_correlation(a, -a) == pytest.approx(-1, abs=1e-4)
    x, y = [1.0, 2, 3, 4, 5], [2.0, 1, 4, 3, 5]  # 1 - 6 * 4 / (5 * 24)
    assert rank_correlation(torch.tensor([x]), torch.tensor([y])) == pytest.approx(0.8, abs=1e-4)


def test_a_perfect_predictor_is_healthy_whatever_its_scale():
    target = rows(0, 200, 2, 6)
    health = predictor_health(target * 7, target)
    assert health["r2_mean"] == pytest.approx(1, abs=1e-4) and health["r2_action_blind"] == pytest.approx(1, abs=1e-4)
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
