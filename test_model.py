"""The model: the routed layer, causality, the KV cache, the loss, parameter counts, GPT-2's weights, the FLOPs ledger."""
import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configurator import read_file
from gates import ESTIMATORS, GATES, full_tokens, jepa_loss, oracle_labels
from model import GPT, Cache, GPTConfig, LinearCrossEntropy, ledger, load_gpt2
from test_routing import ALL_GATES, LEARNED, best_of, make, norm_gate, same, slow, tokens  # noqa: F401, norm_gate is a fixture
from train import DEFAULTS

HERE = os.path.dirname(os.path.abspath(__file__))
UNLEARNED = [g for g in GATES if not GATES[g].learned]


# -----------------------------------------------------------------------------
# the routed layer

def run(model, idx, mode, gathered, dtype):
    """-> x after the last layer, routes, and {module: the gradients of a fixed projection of x, in one vector}"""
    x0 = model.embed(idx).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        x, routes = model.blocks(x0, mode, gathered=gathered)
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    named = {"x": x0} | {n: p for n, p in model.named_parameters() if n.startswith("h.")}
    grads, modules = torch.autograd.grad((x * probe).sum(), list(named.values()), allow_unused=True), {}
    for (n, p), g in zip(named.items(), grads):
        modules.setdefault(".".join(n.split(".")[:3]), []).append((torch.zeros_like(p) if g is None else g).flatten())
    return x.detach(), routes, {n: torch.cat(g) for n, g in modules.items()}


@pytest.mark.parametrize("gate", ALL_GATES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("budget", [0.0, 0.25, 0.5, 1.0])
def test_gathered_equals_masked_in_outputs_and_gradients(gate, estimator, dtype, mode, budget):
    """bfloat16 with one routed layer: behind another one, rounding alone may route a token differently."""
    wide = dtype == torch.float32
    model = make(gate=gate, estimator=estimator, budget=budget, controlled=(0, 2) if wide else (1,), n_layer=3 if wide else 2)
    model.calibrate(tokens(model, 3, seed=5))
    for B, T in ((1, 1), (2, 8), (3, 13)):
        idx = tokens(model, B, T)
        (a, ra, ga), (b, rb, gb) = (run(model, idx, mode, gathered, dtype) for gathered in (False, True))
        assert all(torch.equal(p.mask, q.mask) for p, q in zip(ra, rb)) and len(ra) == len(rb) == len(model.config.controlled)
        same(a, b, 1e-5 if wide else 3e-2)
        soft = estimator != "scaled" and model.h[-1].gate.learned  # then only masked has a path to the scores
        for n in (n for n in ga if not (soft and n.endswith("gate"))):
            assert (ga[n] - gb[n]).norm() <= (1e-5 if wide else 3e-2) * ga[n].norm() + 1e-5, n


@pytest.mark.parametrize("gate", ALL_GATES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gathered", [False, True])
def test_topk_equals_the_layer_as_specified(gate, estimator, gathered):
    """k tokens a row, each token in its place, the right weight: against a forward written from the specification."""
    model = make(gate=gate, estimator=estimator, budget=0.3)
    idx, keys = tokens(model, 3, 15), torch.tensor([7, 1, 100])
    x, routes = model.blocks(model.embed(idx), "topk", keys, gathered)
    same(x, slow(model, idx, lambda i, s: best_of(s, 5), keys))
    assert [r.layer for r in routes] == [1, 3] and all((r.mask.sum(1) == 5).all() for r in routes)


@pytest.mark.parametrize("estimator", ["ste", "ste_norm"])
@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_full_budget_is_dense_and_none_is_cheap(estimator, mode, gathered, bfloat16):
    model, cheap = make(estimator=estimator, budget=1.0), make(estimator=estimator, budget=0.0)
    idx = tokens(model)
    for m in (model, cheap):
        m.calibrate(idx)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        same(model(idx, mode, gathered=gathered)[0], model(idx, "full")[0], 3e-2 if bfloat16 else 1e-5)
        same(cheap(idx, mode, gathered=gathered)[0], cheap(idx, "cheap")[0], 3e-2 if bfloat16 else 1e-5)
    assert (model(idx, "full")[0] - model(idx, "cheap")[0]).abs().max() > 0.1


def test_full_budget_under_scaled_is_not_dense():
    model = make(estimator="scaled", budget=1.0)
    assert (model(tokens(model), "topk")[0] - model(tokens(model), "full")[0]).abs().max() > 0.01


@pytest.mark.parametrize("budget", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("gathered", [False, True])
def test_cheap_with_the_weights_of_full_is_dense(budget, gathered):
    model = make(cheap_rank=64, budget=budget)
    for i in model.config.controlled:
        model.h[i].cheap.load_state_dict(model.h[i].mlp.state_dict())
    same(model(tokens(model), "topk", gathered=gathered)[0], model(tokens(model), "full")[0])


def test_adapter_adds_full_and_cheap():
    model = make(n_layer=1, controlled=(0,))
    idx, block = tokens(model), model.h[0]
    x = model.embed(idx) + block.attn(block.ln_1(model.embed(idx)))
    same(model.blocks(model.embed(idx), "adapter")[0], x + block.mlp(block.ln_2(x)) + block.cheap(block.ln_2(x)))


def test_cheap_starts_at_zero():
    model = GPT(GPTConfig(n_embd=16, n_head=2, n_layer=2, controlled=(1,), latent=8))
    assert model.h[1].cheap(torch.randn(3, 16)).abs().max() == 0


# -----------------------------------------------------------------------------
# threshold is causal, topk is not; a cache changes nothing

def routed(gate, estimator="ste", **fields):
    model = make(gate=gate, estimator=estimator, **fields)
    model.calibrate(tokens(model, 4, seed=5))
    return model


@pytest.mark.parametrize("gate", ALL_GATES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_threshold_never_looks_ahead(gate, estimator):
    model = routed(gate, estimator)
    a, b = tokens(model, 3), tokens(model, 3, seed=1)
    for t in (1, 10, 23):
        b[:, :t] = a[:, :t]
        (x, rx), (y, ry), (z, rz) = (model(i, "threshold") for i in (a, b, a[:, :t]))
        same(x[:, :t], y[:, :t])
        same(x[:, :t], z)
        for p, q, r in zip(rx, ry, rz):
            assert torch.equal(p.mask[:, :t], q.mask[:, :t]) and torch.equal(p.mask[:, :t], r.mask)
    assert 0 < sum(r.mask.sum() for r in rx) < sum(r.mask.numel() for r in rx)  # some tokens full, some cheap


@pytest.mark.parametrize("gate", ["g1", "g3", "linear", "norm"])
def test_topk_looks_ahead(gate):
    model = make(gate=gate)
    a, b = tokens(model, 8), tokens(model, 8)
    b[:, -1] = (b[:, -1] + 7) % 40
    assert (model(a, "topk")[0][:, :-1] - model(b, "topk")[0][:, :-1]).abs().max() > 0.01


@pytest.mark.parametrize("gate", ALL_GATES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_cache_changes_nothing(gate, estimator):
    model = routed(gate, estimator)
    check_cache(model, "threshold")


@pytest.mark.parametrize("mode", ["full", "cheap", "adapter"])
def test_a_cache_changes_nothing_without_routing(mode):
    check_cache(make(), mode)


def check_cache(model, mode):
    idx, keys = tokens(model), torch.tensor([3, 4])
    want, routes = model(idx, mode, keys)
    for chunks in ([24], [1] * 24, [9, 1, 1, 5, 1, 7], [1, 23]):  # prefill, single steps, chunks behind a cache
        cache, got, masks = Cache(model.config, 2, "cpu", torch.float32), [], []
        for part in idx.split(chunks, 1):
            logits, rs = model(part, mode, keys, cache=cache)
            got.append(logits), masks.append([r.mask for r in rs])
        same(torch.cat(got, 1), want, 1e-4)
        assert all(torch.equal(torch.cat(m, 1), r.mask) for m, r in zip(zip(*masks), routes))


@pytest.mark.parametrize("gate,mode,prompt", [*((g, "threshold", 5) for g in ALL_GATES), ("g1", "full", 5), ("g1", "cheap", 5),
                                              ("g3", "threshold", 1), ("g3", "threshold", 24), ("g3", "threshold", 30)])
def test_generate_equals_a_loop_without_a_cache(gate, mode, prompt):
    """Within block_size, and past it, where it goes on from the last half of the context."""
    model = routed(gate)
    idx, zero = tokens(model, 1, prompt), torch.zeros(1, dtype=torch.int64)
    got = list(model.generate(idx, 26, mode, temperature=0))
    window, new = idx[:, -12:] if prompt > 24 else idx, []
    for n in range(27):
        logits, routes = model(window, mode, zero)
        mask = [list(m) for m in zip(*(r.mask[0].tolist() for r in routes))] or [[]] * window.size(1)
        new += list(zip(window[0].tolist(), mask)) if n == 0 else [(window[0, -1].item(), mask[-1])]
        window = torch.cat([window, logits[:, -1].argmax(-1, True)], 1)
        window = window[:, -12:] if window.size(1) > 24 else window
    assert got == new


def test_sampling_repeats_with_its_generator_and_top_1_is_greedy():
    model, idx = routed("g1"), torch.tensor([[1, 2, 3]])
    draw = lambda seed, **k: [t for t, _ in model.generate(idx, 15, generator=torch.Generator().manual_seed(seed), **k)]
    assert draw(0, temperature=3.0) == draw(0, temperature=3.0) != draw(1, temperature=3.0)
    assert draw(0, top_k=1) == draw(1, temperature=0)


@pytest.mark.parametrize("gate", ALL_GATES)
def test_calibration_meets_the_budget_on_its_text(gate):
    """Layer by layer: the later threshold is right only for the routing of the earlier layers."""
    model, idx = make(gate=gate, budget=0.3), tokens(make(), 4)
    model.calibrate(idx)
    assert [r.mask.sum().item() for r in model(idx, "threshold")[1]] == [full_tokens(0.3, idx.numel())] * 2


@pytest.mark.parametrize("shares", [(0.5, 0.5), (1.0, 0.2), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("budget", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_set_budget_keeps_the_order_and_meets_the_mean(shares, budget):
    model = make()
    for i, share in zip((1, 3), shares):
        model.h[i].budget = share
    model.set_budget(budget)
    a, b = (model.h[i].budget for i in (1, 3))
    assert a + b == pytest.approx(2 * budget, abs=1e-9) and 0 <= min(a, b) and max(a, b) <= 1 + 1e-9
    assert (a - b) * (shares[0] - shares[1]) >= 0 and (budget in (0, 1) or (a == b) == (shares[0] == shares[1]))


# -----------------------------------------------------------------------------
# the loss

@pytest.mark.parametrize("rows", [1, 3, 10, 64])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_cross_entropy_equals_pytorchs(rows, frozen):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 8, generator=g, requires_grad=True), torch.randint(17, (10,), generator=g)
    weight = torch.randn(17, 8, generator=g).requires_grad_(not frozen)
    wanted = [x] if frozen else [x, weight]
    a, b = LinearCrossEntropy.apply(x, weight, y, rows), F.cross_entropy(x @ weight.T, y)
    same(a, b)
    for got, want in zip(torch.autograd.grad(3 * a, wanted), torch.autograd.grad(3 * b, wanted)):
        same(got, want)


@pytest.mark.parametrize("cast", [False, True])
def test_lm_loss_under_autocast_is_close_to_float32(cast):
    """cast: the frozen head in bfloat16, as a controller-only run holds it."""
    model, y = make(), tokens(make(), seed=1)
    x = torch.randn(2, 24, 16, requires_grad=True)
    want = model.lm_loss(x, y)
    same(want, model.token_losses(x, y).mean())
    if cast:
        model.wte.weight = torch.nn.Parameter(model.wte.weight.to(torch.bfloat16), requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.lm_loss(x, y)
    assert got.dtype == torch.float32
    same(got, want, 2e-2)
    a, b = torch.autograd.grad(want, x)[0], torch.autograd.grad(got, x)[0]
    assert b.dtype == torch.float32 and (a - b).norm() < 0.02 * a.norm()


# -----------------------------------------------------------------------------
# parameters

def scaled_model(scale, **fields):
    """A scale's model without its memory, from the config file itself."""
    config = read_file(os.path.join(HERE, "config", f"{scale}.py"), DEFAULTS, DEFAULTS) if scale else DEFAULTS
    fields = {k: config[k] for k in GPTConfig.__dataclass_fields__ if k in config} | {"controlled": tuple(config["controlled"])} | fields
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=50257 if scale else 257, **fields))


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("gate,total", [("g3", 157_498_446), ("g1", 157_494_078)])
def test_paper_has_the_papers_number_of_parameters(gate, total):
    model = scaled_model("paper", gate=gate)
    assert count(model.parameters()) == total and count(model.backbone().values()) == 152_791_296
    assert (model.config.n_layer, model.config.n_embd, model.config.controlled) == (16, 768, tuple(range(1, 15)))


def test_gpt2_and_small_have_their_sizes():
    assert count(scaled_model("gpt2").backbone().values()) == 124_439_808
    assert 28e6 < count(scaled_model("small").parameters()) < 33e6


@pytest.mark.parametrize("scale", ["", "small", "paper", "gpt2"])
def test_g1_and_g3_have_the_same_number_of_parameters_within_a_tenth(scale):
    a, b = (count(p for n, p in scaled_model(scale, gate=g).named_parameters() if ".gate." in n) for g in ("g1", "g3"))
    assert abs(a - b) <= 0.1 * min(a, b)


@pytest.mark.parametrize("gate", ALL_GATES)
def test_controllers_and_backbone_part_the_parameters(gate):
    model, dense = make(gate=gate), make(controlled=())
    assert set(model.controllers()) | set(model.backbone()) == {n for n, _ in model.named_parameters()}
    assert not set(model.controllers()) & set(model.backbone()) and set(model.backbone()) == {n for n, _ in dense.named_parameters()}


# -----------------------------------------------------------------------------
# GPT-2

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=30)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2 of `transformers`, and the folder that holds it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, n_positions=12)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(folder / "lm")
    theirs.transformer.save_pretrained(folder / "base")  # its names have no prefix
    return theirs, folder


@pytest.mark.parametrize("kind", ["lm", "base"])
@pytest.mark.parametrize("block_size", [12, 7])
def test_gpt2_logits_equal_those_of_transformers(gpt2, kind, block_size):
    theirs, folder = gpt2
    model = make(**SHAPE, block_size=block_size, controlled=(1,), activation="gelu_new")
    before = {n: p.clone() for n, p in model.controllers().items()}
    load_gpt2(model, str(folder / kind))
    idx = tokens(model, 2)
    with torch.no_grad():
        same(model(idx)[0], theirs(idx).logits, 1e-4)
    assert all(torch.equal(p, before[n]) for n, p in model.controllers().items())


@pytest.mark.parametrize("fields", [dict(n_layer=3), dict(n_head=4), dict(n_embd=32), dict(vocab_size=31), dict(block_size=13)])
def test_gpt2_of_another_shape_is_refused(gpt2, fields):
    with pytest.raises(ValueError, match="shape"):
        load_gpt2(make(**SHAPE | dict(block_size=12, controlled=(1,), activation="gelu_new") | fields), str(gpt2[1] / "lm"))


def broken(folder, tmp_path, how):
    from safetensors.torch import load_file, save_file
    config, weights = json.loads((folder / "lm" / "config.json").read_text()), load_file(folder / "lm" / "model.safetensors")
    if how == "no tensor":
        del weights["transformer.h.1.mlp.c_fc.weight"]
    if how == "tensor of another shape":
        weights["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(16, 8)
    if how == "another nonlinearity":
        config["activation_function"] = "relu"
    (tmp_path / "config.json").write_text("{" if how == "no json" else json.dumps(config))
    if how == "no safetensors":
        (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    elif how != "no file":
        save_file(weights, tmp_path / "model.safetensors")


@pytest.mark.parametrize("how", ["no tensor", "tensor of another shape", "another nonlinearity", "no json", "no safetensors", "no file"])
def test_a_broken_gpt2_is_refused_in_one_line_and_copies_nothing(gpt2, tmp_path, how):
    broken(gpt2[1], tmp_path, how)
    model = make(**SHAPE, block_size=12, controlled=(1,), activation="gelu_new")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError) as error:
        load_gpt2(model, str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_unknown_hub_name_is_refused(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match="no folder 'nobody/nothing'"):
        load_gpt2(make(**SHAPE), "nobody/nothing")


# -----------------------------------------------------------------------------
# the ledger against PyTorch's own counter, per token. Every item is 2% or more of the whole, and the counts are exact:
# a wrong factor of any item shows.

def flops(f):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = f()
    return counter.get_total_flops() / 32, out  # 32: the tokens of `tokens(model)`


def counted(gate="g1", shares=(), **fields):
    model = make(gate=gate, **dict(n_layer=5, n_embd=32, block_size=16, vocab_size=32, controlled=(1, 2, 4), cheap_rank=16, g1_hidden=32, latent=16) | fields)
    for i, share in zip((1, 2, 4), shares):
        model.h[i].budget = share
    return model


@pytest.mark.parametrize("mode,gathered,jepa,fields", [
    ("dense", False, False, dict(controlled=())),
    ("cheap", False, False, {}),
    ("adapter", False, False, {}),
    *(("topk", False, False, dict(gate=g, estimator=e)) for g in ALL_GATES for e in ("ste", "scaled")),
    ("topk", False, False, dict(gate="g3", estimator="ste_norm", budget=0.25)),
    *(("topk", False, True, dict(gate=g, estimator=e)) for g in GATES if GATES[g].predicts for e in ESTIMATORS),
    *(("topk", True, False, dict(gate=g, estimator="scaled", budget=b)) for g in LEARNED for b in (0.25, 0.5)),
    *(("topk", True, False, dict(gate=g, budget=b)) for g in UNLEARNED for b in (0.25, 0.5, 1.0)),
    *(("topk", True, False, dict(gate=g, estimator=e, budget=0.25)) for g in LEARNED for e in ("ste", "ste_norm", "hard")),
    *(("topk", True, True, dict(gate=g, estimator=e, budget=0.25)) for g in GATES if GATES[g].predicts for e in ESTIMATORS),
    ("topk", True, False, dict(gate="random", estimator="scaled")),
    ("topk", True, False, dict(gate="static", shares=(1.0, 0.5, 0.0))),
    ("topk", True, False, dict(gate="g1", estimator="scaled", shares=(0.25, 1.0, 0.5))),
])
def test_ledger_equals_pytorchs_count_of_a_training_step(mode, gathered, jepa, fields):
    model = counted(**fields)
    idx = tokens(model)
    for p in model.backbone().values():
        p.requires_grad_(mode == "dense")

    def step():
        x, routes = model.blocks(model.embed(idx), "full" if mode == "dense" else mode, gathered=gathered, align=jepa)
        aux = sum(jepa_loss(r.prediction, r.target).mean() for r in routes) if jepa else 0
        return model.lm_loss(x, idx) + aux + sum(r.scores.mean() for r in routes if r.scores.requires_grad)

    forward, loss = flops(step)
    backward, _ = flops(loss.backward)
    book = ledger(model, mode, gathered, jepa=jepa)
    moved = book["train"]["lm_head"][1]  # lm_loss takes the head's gradient in the forward pass
    assert (forward, backward) == pytest.approx((book["forward"] + moved, book["backward"] - moved), rel=1e-3)


@pytest.mark.parametrize("gate", LEARNED)
@pytest.mark.parametrize("estimator", ["ste", "scaled"])
@pytest.mark.parametrize("oracle", ["off_policy", "on_policy"])
def test_ledger_equals_pytorchs_count_of_the_label_passes(gate, estimator, oracle):
    model = counted(gate, (0.25, 0.5, 0.75), estimator=estimator)
    idx, keys = tokens(model), torch.arange(2)
    _, routes = model.blocks(model.embed(idx), "topk", keys, keep={1, 2, 4})
    mean = sum(flops(lambda: oracle_labels(model, r, idx, keys, oracle))[0] for r in routes) / 3
    for layers, share in ((1, 1.0), (2, 0.25)):
        book, without = ledger(model, "topk", label=(oracle, layers, share)), ledger(model, "topk")
        assert book["train"]["labels"][0] == pytest.approx(mean * layers * share, rel=1e-3)
        assert book["forward"] - without["forward"] == pytest.approx(mean * layers * share, rel=1e-3)
        assert book["backward"] == without["backward"] and book["inference_flops"] == without["inference_flops"]


@pytest.mark.parametrize("mode,fields", [("dense", dict(controlled=())), ("cheap", {}), ("adapter", {}), *(
    ("topk", dict(gate=g, estimator=e, shares=s)) for g in ALL_GATES for e in ("ste", "scaled") for s in ((0.5, 0.5, 0.5), (1.0, 0.25, 0.0)))])
def test_ledger_equals_pytorchs_count_of_inference(mode, fields):
    model = counted(**fields)
    with torch.no_grad():
        got, _ = flops(lambda: model(tokens(model), "full" if mode == "dense" else mode))
    assert got == pytest.approx(ledger(model, mode)["inference_flops"], rel=1e-3)


def test_ledger_ratios_are_against_a_full_only_forward_and_the_dense_step():
    dense = ledger(counted(controlled=()), "dense")
    book = ledger(counted("g3"), "topk", label=("off_policy", 1, 1.0), jepa=True)
    assert dense["forward_proxy"] == dense["train_ratio"] == dense["inference_ratio"] == 1
    assert book["dense_forward"] == dense["forward"]
    assert book["forward_proxy"] == sum(f for f, _ in book["train"].values()) / dense["forward"] > 1
    assert book["train_ratio"] == pytest.approx(sum(f + b for f, b in book["train"].values()) / (dense["forward"] + dense["backward"]))
    assert set(book["train"]) == {"attention", "full", "cheap", "gate", "predictor", "target_head", "lm_head", "labels"}
    assert book["causal_attention"] == book["inference"]["attention"] - 5 * 2 * 16 * 32  # half of the T^2 part
