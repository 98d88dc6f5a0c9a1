"""The model: the edges of the routed layer, rotary positions, causality, generation, thresholds, budgets, noise,
parameter counts, any shape at all, and --compile."""
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from configurator import HERE, read_file
from gates import ESTIMATORS, GATES, full_tokens, threshold_for, topk_mask
from kernels import uniform
from machine import compile_layers
from model import FFN, GPT, GPTConfig, best_directions, rotate, rotation_table
from sample import generate, new_cache
from test_routing import (FAMILIES, LEARNED, PAIRS, best_of, both_families, config_for, context_of, make,
                          numbers, run_of, same, slow, tokens)
from train import DEFAULTS, train_step


# -----------------------------------------------------------------------------
# the routed layer

@both_families
@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("gate,estimator", [(g, e) for g, e in PAIRS if not ESTIMATORS[e].mixes])
def test_budget_1_is_dense_and_budget_0_is_cheap(gate, estimator, dtype, tol, family, device):
    for budget, mode in ((1.0, "full"), (0.0, "cheap")):
        model = make(family=family, gate=gate, estimator=estimator, budget=budget)
        idx = tokens(model)
        model.calibrate(context_of(idx))
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            for routed in ("topk", "threshold"):
                for model.config.execution in ("masked", "gathered"):
                    same(model(idx, routed)[0], model(idx, mode)[0], tol)
    assert (model(idx, "full")[0] - model(idx, "cheap")[0]).abs().max() > 0.1


def test_budget_1_under_scaled_is_not_dense():
    model = make(estimator="scaled", budget=1.0)
    assert (model(tokens(model), "topk")[0] - model(tokens(model), "full")[0]).abs().max() > 0.01


@pytest.mark.parametrize("budget", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_cheap_with_the_weights_of_full_is_dense(budget, execution):
    for estimator in ("ste_norm", "scaled"):
        model = make(cheap_rank=64, budget=budget, execution=execution, estimator=estimator)
        for i in model.config.controlled:
            model.h[i].cheap.load_state_dict(model.h[i].mlp.state_dict())
        same(model(tokens(model), "topk")[0], model(tokens(model), "full")[0])


@both_families
def test_adapter_adds_full_and_cheap(family):
    model = make(family=family, n_layer=1, controlled=(0,))
    context, block = context_of(tokens(model)), model.h[0]
    x = model.embed(context)
    after = x + block.attn(block.ln_1(x), model.rotation_of(context))
    h = block.ln_2(after)
    same(model.run(x, "adapter", context)[0], after + block.mlp(h) + block.cheap(h))


@both_families
def test_cheap_starts_at_zero(family):
    model = GPT(GPTConfig(n_embd=16, n_head=2, n_layer=2, controlled=(1,), latent=8, **FAMILIES[family]))
    assert model.h[1].cheap(torch.randn(3, 16)).abs().max() == 0


@pytest.mark.parametrize("hidden", [8, 7])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu"])
def test_fit_finds_a_linear_map_of_half_its_width(activation, hidden):
    h = numbers(0, 2000, 16) + 1
    y = h @ numbers(1, 16, hidden // 2) @ numbers(2, hidden // 2, 24) + 3  # (2000, 24), of rank hidden / 2
    ffn = FFN(GPTConfig(n_embd=16), hidden, activation, bias=True)
    ffn.c_proj = torch.nn.Linear(hidden, 24)
    with torch.no_grad():
        ffn.fit(h, y)
    assert (ffn(h) - y).square().mean() < 1e-4 * y.var()


def test_best_directions_predict_as_well_as_any_of_their_number():
    x, w = numbers(0, 1000, 12), numbers(1, 12, 8)
    y = x @ w + numbers(2, 1000, 8)
    z = x @ best_directions(x, y, 3)
    same(z.std(0), torch.ones(3))
    error = (z @ torch.linalg.lstsq(z, y).solution - y).square().sum()
    # Eckart and Young: what the best rank leaves is the residual of regression and the smaller singular values.
    fitted = x @ torch.linalg.lstsq(x, y).solution
    least = (fitted - y).square().sum() + torch.linalg.svdvals(fitted)[3:].square().sum()
    assert least * 0.9999 <= error <= least * 1.001


@both_families
@pytest.mark.parametrize("mode", ["topk", "cheap"])
def test_fit_cheap_fits_each_layer_to_what_the_layers_before_it_make_of_the_text(mode, family):
    model, other = make(family=family, cheap_rank=32), make(family=family, cheap_rank=32, seed=1)
    idx = tokens(model, B=64)
    before = {name: p.clone() for name, p in model.named_parameters() if ".cheap." not in name}
    model.fit_cheap(context_of(idx), mode, rows=10)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    x, context = model.embed(context_of(idx)), context_of(idx)
    for block in model.h:  # all rows at once, and no layer is fitted before the layers before it have run
        x = block.attention_part(x, model.rotation_of(context))
        if block.controlled:
            h, cheap = block.ln_2(x), other.h[block.layer].cheap
            with torch.no_grad():
                cheap.fit(h.flatten(0, 1), block.mlp(h).flatten(0, 1))
            same(block.cheap(h), cheap(h), 1e-3)
            y = block.mlp(h)
            assert (cheap(h) - y).square().mean() < 0.75 * y.flatten(0, 1).var(0).mean()
        x, _ = block.ffn_part(x, mode, context)


def test_rotate_turns_pairs_of_numbers_by_their_position_times_their_frequency():
    """As a product of complex numbers: number i of a head is a real part, number i + d/2 its imaginary one."""
    model = make(family="llama", rope_theta=100.0)  # block_size 24, d = 8
    x = torch.randn(2, 3, 24, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rotation_table(model.config))
    for position in (0, 1, 7, 23):
        for i in range(4):
            z = torch.complex(x[:, :, position, i], x[:, :, position, i + 4])
            z = z * torch.polar(torch.tensor(1.0), torch.tensor(position * 100.0 ** (-2 * i / 8)))
            same(turned[:, :, position, i], z.real)
            same(turned[:, :, position, i + 4], z.imag)


# -----------------------------------------------------------------------------
# threshold is causal, topk is not; a cache changes nothing. For every gate: test_routing.py

@pytest.mark.parametrize("gate", LEARNED)
def test_topk_looks_ahead(gate):
    model = make(gate=gate)
    a, b = tokens(model, 8), tokens(model, 8)
    b[:, -1] = (b[:, -1] + 7) % 40
    assert (model(a, "topk")[0][:, :-1] - model(b, "topk")[0][:, :-1]).abs().max() > 0.01


@pytest.mark.parametrize("gate,mode,prompt,family", [
    *((gate, "threshold", 5, "gpt2") for gate in GATES), ("g3", "threshold", 1, "gpt2"),
    ("g3", "threshold", 24, "gpt2"), ("g3", "threshold", 30, "gpt2"), ("g1", "threshold", 30, "llama"),
    *(("g1", mode, 5, family) for mode in ("full", "cheap", "adapter") for family in FAMILIES)])
def test_generate_equals_a_loop_without_a_cache(gate, mode, prompt, family, device):
    """Within block_size, and past it, where it goes on from the last half of the context."""
    model = make(family=family, gate=gate)
    model.calibrate(context_of(tokens(model, 4, seed=5)))
    idx, read, begin = tokens(model, 1, prompt), [], 0
    text = idx[0].tolist()
    while len(read) < prompt + 26:
        if len(read) - begin == 24:
            begin = len(read) + 1 - 12
        window = text[begin:begin + 24]
        logits, routes = model(idx.new_tensor([window]), mode)
        masks = [list(mask) for mask in zip(*(r.mask[0].tolist() for r in routes))] or [[]] * len(window)
        read += list(zip(window, masks))[len(read) - begin:]
        if len(read) == len(text):
            text.append(logits[0, -1].argmax().item())
    assert list(generate(model, idx, 26, mode, temperature=0)) == read


# -----------------------------------------------------------------------------
# any shape, budget and seed

budgets = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
any_seed = st.integers(0, 2 ** 31)
some = settings(max_examples=60, deadline=None)


@st.composite
def score_tables(draw):
    """(B, T) with many ties, or none, and now and then an infinity."""
    torch.manual_seed(draw(any_seed))
    values = torch.randn(draw(st.integers(1, 5)), draw(st.integers(1, 40)))
    if draw(st.booleans()):
        values = (values * draw(st.integers(0, 3))).round()
    if draw(st.booleans()):
        place = draw(st.integers(0, values.numel() - 1))
        values.flatten()[place] = draw(st.sampled_from([float("inf"), float("-inf"), 0.0, -0.0]))
    return values


@some
@given(score_tables(), budgets)
def test_exactly_k_tokens_are_chosen_and_never_more_than_the_budget_lie_above_a_threshold(s, budget):
    assert torch.equal(topk_mask(s, full_tokens(budget, s.size(1))), best_of(s, full_tokens(budget, s.size(1))))
    k, above = full_tokens(budget, s.numel()), int((s > threshold_for(s, budget)).sum())
    assert above <= k
    assert above == k or s.unique().numel() < s.numel() or not s.isfinite().all()


@st.composite
def models(draw):
    """A small model of any family, gate and estimator, and thresholds for its budget."""
    gate, estimator = draw(st.sampled_from(PAIRS))
    model = make(draw(any_seed), draw(st.sampled_from(sorted(FAMILIES))), gate=gate, estimator=estimator,
                 budget=draw(budgets), n_layer=3, controlled=(0, 2)).requires_grad_(False)
    model.calibrate(context_of(tokens(model, 4, seed=5)))
    return model


@some
@given(models(), any_seed, st.integers(1, 4), st.integers(1, 24), st.sampled_from(["topk", "threshold"]))
@torch.no_grad()
def test_gathered_is_masked(model, seed, B, T, mode):
    idx = tokens(model, B, T, seed)
    a, routes_a = model(idx, mode)
    model.config.execution = "masked"
    b, routes_b = model(idx, mode)
    if all(torch.equal(x.mask, y.mask) for x, y in zip(routes_a, routes_b)):  # rounding may flip a score
        same(a, b, 1e-4)
    else:
        assert any(0 < (x.scores - y.scores).abs().max() < 1e-5 for x, y in zip(routes_a, routes_b))


@some
@given(models(), any_seed, st.lists(st.integers(1, 9), min_size=1, max_size=8))
@torch.no_grad()
def test_any_chunks_through_a_cache_are_the_uncached_forward(model, seed, sizes):
    idx = tokens(model, 1, min(24, sum(sizes)), seed)
    whole, routes = model(idx, "threshold")
    cache, parts, start = new_cache(model), [], 0
    for n in sizes:
        if start < idx.size(1):
            parts.append(model(idx[:, start:start + n], "threshold", cache=cache))
            start += n
    masks = [torch.cat([part[1][i].mask for part in parts], 1) for i in range(2)]
    if all(torch.equal(mask, route.mask) for mask, route in zip(masks, routes)):
        same(torch.cat([logits for logits, _ in parts], 1), whole, 1e-4)
    else:  # only a score that lies on its threshold may go the other way
        assert any((r.scores - model.h[r.layer].threshold).abs().min() < 1e-5 for r in routes)


# -----------------------------------------------------------------------------
# thresholds, whole layers, noise

def test_threshold_lies_between_two_scores():
    """On a score, rounding would decide: the first token of a text has the same score each time it is met."""
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    assert 2 < threshold_for(scores, 0.5) < 3 and 3 < threshold_for(scores, 0.25) < 4


@both_families
def test_choose_layers_orders_them_by_the_loss_when_each_alone_is_cheap(family):
    layers, losses = (0, 2, 3), {}
    model = make(family=family, gate="static", n_layer=5, controlled=layers)
    context, targets = context_of(tokens(model)), tokens(model, seed=1)
    for layer in layers:
        x = slow(model, context.tokens, lambda i, s: torch.zeros_like(s) if i == layer else None)
        losses[layer] = model.lm_loss(x, targets).item()
    assert model.choose_layers(context, targets) == sorted(layers, key=lambda layer: -losses[layer])
    for loud in layers:  # its cheap FFN shouts; all other layers say nothing, full or cheap
        model = make(family=family, gate="static", n_layer=5, controlled=layers)
        model.h[loud].cheap.c_proj.weight.data.mul_(30)
        for layer in {*layers} - {loud}:
            for p in (*model.h[layer].mlp.c_proj.parameters(), *model.h[layer].cheap.c_proj.parameters()):
                torch.nn.init.zeros_(p)
        targets = model(context.tokens, "full")[0].argmax(-1)  # text that the dense model knows
        assert model.choose_layers(context, targets)[0] == loud


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.25, 0.5, 2 / 3, 1.0])
def test_set_budget_hands_out_the_total_in_the_order_of_the_layers(budget):
    for gate, spread in (("static", 0.0), ("g1", 0.0), ("g1", 0.6), ("random", 1.0)):
        model = make(n_layer=5, controlled=(0, 2, 3), gate=gate, layer_spread=spread)
        model.set_budget(budget)
        assert [model.h[i].budget for i in (0, 2, 3)] == [budget] * 3
        for order in ([0, 2, 3], [3, 0, 2]):
            model.set_budget(budget, order)
            shares = [model.h[i].budget for i in order]
            assert sum(shares) == pytest.approx(3 * budget) and all(0 <= share <= 1 for share in shares)
            if gate == "static":  # whole layers, and at most one in part
                assert shares == sorted(shares, reverse=True)
                assert sum(1e-9 < share < 1 - 1e-9 for share in shares) <= 1
            else:  # a line
                step = spread * min(budget, 1 - budget) * 2 / 3
                assert [a - b for a, b in zip(shares, shares[1:])] == pytest.approx([step] * 2)


def test_noise_is_uniform_and_its_streams_are_unrelated():
    u = uniform(torch.arange(64), 0, 512)
    assert u.shape == (64, 512) and u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003 and len(u.unique()) > 0.99 * u.numel()
    assert abs(torch.histc(u, 10, 0, 1) / u.numel() - 0.1).max() < 0.01
    others = [uniform(torch.arange(64), layer, 512) for layer in (-2, -1, 1, 5, 6, 11, 12, 63, 1000)]
    others += [uniform(torch.arange(64) + 1, 0, 512), u.roll(1, 1), uniform(torch.arange(64) * 7919, 0, 512),
               uniform(2 ** 62 - torch.arange(64), 0, 512), uniform(-1 - torch.arange(64), 0, 512)]
    for other in others:
        assert other.min() >= 0 and other.max() < 1 and abs(other.mean() - 0.5) < 0.01
        pair = torch.stack([u.flatten()[512:], other.flatten()[512:]])  # row 0's seed is 0 in two of them
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02


def test_a_forward_repeats_with_its_row_seeds_wherever_the_row_stands():
    model, idx, row_seeds = make(gate="random"), tokens(make(), 3), torch.tensor([5, 9, 11])

    def masks(idx, row_seeds):
        return torch.stack([route.mask for route in model(idx, "topk", row_seeds)[1]])
    assert torch.equal(masks(idx, row_seeds)[:, [2]], masks(idx[[2]], row_seeds[[2]]))
    assert not torch.equal(masks(idx, row_seeds), masks(idx, row_seeds + 1))
    assert not torch.equal(*masks(idx, row_seeds))  # each layer has its own


# -----------------------------------------------------------------------------
# parameters

# What a scale does not say itself: the vocabulary of its text, or the shape of its backbone.
SHAPES = {"web": dict(vocab_size=257), "paper": dict(vocab_size=50_257),
          "gpt2": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50_257, activation="gelu_new"),
          "smollm2": dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, vocab_size=49_152,
                          activation="swiglu", norm="rmsnorm", positions="rotary", bias=False)}
CONFIGS = sorted(Path(HERE, "config").glob("*.py"))
SCALES = ["", *(path.stem for path in CONFIGS if "\nscale = " in path.read_text(encoding="utf-8"))]


def scaled_model(scale, **fields):
    """A scale's model without its memory, from the config file itself; "" is tiny."""
    config = DEFAULTS | {"vocab_size": 257}
    if scale:
        config = read_file(f"config/{scale}.py", config, DEFAULTS)[0] | SHAPES[scale]
    config["controlled"] = tuple(config["controlled"] or range(1, config["n_layer"] - 1))
    config = {key: config[key] for key in GPTConfig.__dataclass_fields__ if key in config}
    with torch.device("meta"):
        return GPT(GPTConfig(**config | fields))


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("gate,total", [("g3", 157_498_446), ("g1", 157_494_078)])
def test_paper_has_the_papers_number_of_parameters(gate, total):
    model = scaled_model("paper", gate=gate)
    assert count(model.parameters()) == total and count(model.backbone().values()) == 152_791_296
    c = model.config
    assert (c.n_layer, c.n_embd, c.cheap_rank, c.controlled) == (16, 768, 192, tuple(range(1, 15)))


def test_gpt2_and_smollm2_have_their_sizes():
    assert count(scaled_model("gpt2").backbone().values()) == 124_439_808
    assert count(scaled_model("smollm2").backbone().values()) == 134_515_008


@pytest.mark.parametrize("scale", SCALES)
def test_g1_and_g3_have_the_same_number_of_parameters_within_a_tenth(scale):
    sizes = []
    for gate in ("g1", "g3"):
        named = scaled_model(scale, gate=gate).named_parameters()
        sizes.append(count(p for name, p in named if ".gate." in name))
    assert max(sizes) <= 1.1 * min(sizes)


@both_families
@pytest.mark.parametrize("gate", GATES)
def test_controllers_and_backbone_part_the_parameters(gate, family):
    model, dense = make(family=family, gate=gate), make(family=family, controlled=())
    controllers, backbone = set(model.controllers()), set(model.backbone())
    assert controllers | backbone == {name for name, _ in model.named_parameters()}
    assert not controllers & backbone and backbone == {name for name, _ in dense.named_parameters()}


# -----------------------------------------------------------------------------
# --compile

def compiled_or_not(compiled, n_layer, steps, device):
    """Some training steps -> each step's losses and the norm of the scores' gradient, and how many graphs had
    been compiled after it."""
    model = make(n_layer=n_layer, controlled=tuple(range(1, n_layer)), n_embd=32, gate="g1")
    config = config_for(model, device=device, dtype="float32", batch_size=4, block_size=24, warmup_iters=0,
                        lambda_lm=1.0, lambda_util=1.0, oracle="on_policy", label_layers=n_layer)
    if compiled:
        compile_layers(model)
    run, results, graphs = run_of(model, config), [], []
    run.optimizers = [torch.optim.SGD([{"params": run.trained, "peak": 0.1}], lr=0.1)]
    for run.step in range(steps):
        values = train_step(run, logged=True)
        results.append(torch.stack([*values["losses"].values(), values["grad_norm"]["scores"]]))
        graphs.append(counters["stats"]["unique_graphs"])
    return torch.stack(results), graphs


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler is at hand")
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="PyTorch compiles for the real CPU, not the imitated")
def test_compiled_layers_give_the_same_step_and_compile_once_for_all_layers_and_steps(device):
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        got, graphs = compiled_or_not(True, n_layer=3, steps=4, device=device)
        assert graphs[0] > 0 and graphs == [graphs[0]] * 4
        deeper, more = compiled_or_not(True, n_layer=5, steps=2, device=device)
        assert more == [graphs[0]] * 2
    torch._dynamo.reset()
    same(got, compiled_or_not(False, n_layer=3, steps=4, device=device)[0], 1e-4)
    same(deeper, compiled_or_not(False, n_layer=5, steps=2, device=device)[0], 1e-4)
    assert (got[:, 2] > 1e-4).all()  # the gradient of the scores is there, what flows through w included
