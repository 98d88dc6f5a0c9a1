"""Random shapes, budgets, dtypes, ties and seeds. `pytest test_fuzz.py --hypothesis-profile=long` goes on for longer."""
import torch
from hypothesis import given
from hypothesis import strategies as st

from gates import ESTIMATORS, GATES, full_tokens, split_topk, threshold_for
from model import GPT, Cache, GPTConfig

budgets = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
seeds = st.integers(0, 2 ** 31)


@st.composite
def scores(draw):
    """(B, T) with many ties, or none, and now and then an infinity."""
    torch.manual_seed(draw(seeds))
    values = torch.randn(draw(st.integers(1, 5)), draw(st.integers(1, 40)))
    if draw(st.booleans()):
        values = (values * draw(st.integers(0, 3))).round()
    if draw(st.booleans()):
        values.flatten()[draw(st.integers(0, values.numel() - 1))] = draw(st.sampled_from([float("inf"), float("-inf"), 0.0, -0.0]))
    return values


def small_model(gate, estimator, budget, seed, block_size=24):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=31, n_layer=3, n_head=2, n_embd=16, controlled=(0, 2), cheap_rank=3,
                          gate=gate, estimator=estimator, budget=budget, g1_hidden=5, latent=4)).requires_grad_(False)
    for i in model.config.controlled:
        torch.nn.init.normal_(model.h[i].cheap.c_proj.weight, std=0.3)
    return model


@given(scores(), budgets)
def test_exactly_k_are_chosen_none_worse_than_the_rest_ties_to_the_earlier(s, budget):
    k = full_tokens(budget, s.size(1))
    chosen, rest = split_topk(s, k)
    for row, c, r in zip(s, chosen.tolist(), rest.tolist()):
        assert len(c) == k and sorted(c + r) == list(range(len(row))) and c == sorted(c) and r == sorted(r)
        slow = sorted(range(len(row)), key=lambda t: (-row[t].item(), t))
        assert c == sorted(slow[:k])


@given(scores(), budgets)
def test_a_threshold_never_lets_more_through_than_the_budget(s, budget):
    k, above = full_tokens(budget, s.numel()), int((s > threshold_for(s, budget)).sum())
    assert above <= k
    if s.unique().numel() == s.numel() and s.isfinite().all():
        assert above == k


@given(st.sampled_from(sorted(GATES)), st.sampled_from(ESTIMATORS), budgets, seeds, st.integers(1, 4), st.integers(1, 24),
       st.sampled_from(["topk", "threshold"]))
def test_gathered_is_masked(gate, estimator, budget, seed, B, T, mode):
    model = small_model(gate, estimator, budget, seed)
    idx, keys = torch.randint(0, 31, (B, T)), torch.randint(0, 2 ** 60, (B,))
    model.calibrate(idx, keys)
    a, routes_a = model(idx, mode, keys, gathered=True)
    b, routes_b = model(idx, mode, keys, gathered=False)
    if all(torch.equal(x.mask, y.mask) for x, y in zip(routes_a, routes_b)):  # rounding may flip a score on the edge
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    else:
        assert any((x.scores - y.scores).abs().max() < 1e-5 for x, y in zip(routes_a, routes_b))


@given(st.sampled_from(sorted(GATES)), st.sampled_from(ESTIMATORS), budgets, seeds, st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_any_chunks_through_a_cache_are_the_uncached_forward(gate, estimator, budget, seed, chunks):
    T = min(24, sum(chunks))
    model = small_model(gate, estimator, budget, seed)
    idx, keys = torch.randint(0, 31, (1, T)), torch.tensor([7])
    model.calibrate(torch.randint(0, 31, (4, 24)))
    whole, routes = model(idx, "threshold", keys)
    cache, start, parts, masks = Cache(model.config, 1, "cpu", torch.float32), 0, [], []
    for n in chunks:
        if start < T:
            logits, some = model(idx[:, start:start + n], "threshold", keys, cache=cache)
            parts.append(logits)
            masks.append(torch.stack([r.mask for r in some]))
            start += n
    if torch.equal(torch.cat(masks, 2), torch.stack([r.mask for r in routes])):
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    else:  # only a score that lies on its threshold may go the other way
        assert any((r.scores - model.h[r.layer].threshold).abs().min() < 1e-5 for r in routes)
