"""The model: the edges of the routed layer, causality, generation, thresholds, noise, parameter counts,
GPT-2's weights, and --compile."""
import json
import os
import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from configurator import HERE, ConfigError, read_file
from gates import ESTIMATORS, GATES, LOSSES, threshold_for
from kernels import uniform
from metrics import StepRecord
from model import GPT, GPTConfig
from runs.gpt2 import load_gpt2
from runs.machine import Machine, compile_layers
from sample import generate, new_cache
from test_routing import LEARNED, PAIRS, batch_of, config_for, context_of, make, same, tokens
from train import DEFAULTS, forward_batch


# -----------------------------------------------------------------------------
# the routed layer

@pytest.mark.parametrize("gate,estimator", [(g, e) for g, e in PAIRS if not ESTIMATORS[e].mixes])
def test_budget_1_is_dense_and_budget_0_is_cheap(gate, estimator):
    for budget, mode in ((1.0, "full"), (0.0, "cheap")):
        model, idx = make(gate=gate, estimator=estimator, budget=budget), tokens(make())
        model.calibrate(context_of(idx))
        for routed in ("topk", "threshold"):
            same(model(idx, routed)[0], model(idx, mode)[0])
    assert (model(idx, "full")[0] - model(idx, "cheap")[0]).abs().max() > 0.1


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("estimator", ["ste", "ste_norm"])
def test_budget_1_is_dense_and_budget_0_is_cheap_in_bfloat16_too(estimator, execution, device):
    for budget, mode in ((1.0, "full"), (0.0, "cheap")):
        model, idx = make(estimator=estimator, execution=execution, budget=budget), tokens(make())
        model.calibrate(context_of(idx))
        with torch.autocast(device, torch.bfloat16):
            for routed in ("topk", "threshold"):
                same(model(idx, routed)[0], model(idx, mode)[0], 3e-2)


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


def test_adapter_adds_full_and_cheap():
    model = make(n_layer=1, controlled=(0,))
    context, block = context_of(tokens(model)), model.h[0]
    x = model.embed(context)
    after = x + block.attn(block.ln_1(x))
    h = block.ln_2(after)
    same(model.run(x, "adapter", context)[0], after + block.mlp(h) + block.cheap(h))


def test_cheap_starts_at_zero():
    model = GPT(GPTConfig(n_embd=16, n_head=2, n_layer=2, controlled=(1,), latent=8))
    assert model.h[1].cheap(torch.randn(3, 16)).abs().max() == 0


# -----------------------------------------------------------------------------
# threshold is causal, topk is not; a cache changes nothing. For every gate: test_routing.py

def calibrated(gate, **fields):
    model = make(gate=gate, **fields)
    model.calibrate(context_of(tokens(model, 4, seed=5)))
    return model


@pytest.mark.parametrize("gate", LEARNED)
def test_topk_looks_ahead(gate):
    model = make(gate=gate)
    a, b = tokens(model, 8), tokens(model, 8)
    b[:, -1] = (b[:, -1] + 7) % 40
    assert (model(a, "topk")[0][:, :-1] - model(b, "topk")[0][:, :-1]).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["full", "cheap", "adapter"])
def test_a_cache_changes_nothing_without_routing(mode, device):
    model = make()
    idx = tokens(model)
    with torch.no_grad():
        want, _ = model(idx, mode)
        for sizes in ([24], [1] * 24, [9, 1, 1, 5, 1, 7]):
            cache = new_cache(model, batch=2)
            chunks = [model(chunk, mode, cache=cache)[0] for chunk in idx.split(sizes, 1)]
            same(torch.cat(chunks, 1), want, 1e-4)


@pytest.mark.parametrize("gate,mode,prompt", [
    *((gate, "threshold", 5) for gate in GATES), ("g1", "full", 5), ("g1", "cheap", 5),
    ("g3", "threshold", 1), ("g3", "threshold", 24), ("g3", "threshold", 30)])
def test_generate_equals_a_loop_without_a_cache(gate, mode, prompt, device):
    """Within block_size, and past it, where it goes on from the last half of the context."""
    model = calibrated(gate)
    idx, zero = tokens(model, 1, prompt), torch.zeros(1, dtype=torch.int64).to(device)
    got = list(generate(model, idx, 26, mode, temperature=0))
    window, new = idx[:, -12:] if prompt > 24 else idx, []
    for n in range(27):
        logits, routes = model(window, mode, zero)
        masks = [list(m) for m in zip(*(r.mask[0].tolist() for r in routes))] or [[]] * window.size(1)
        new += list(zip(window[0].tolist(), masks)) if n == 0 else [(window[0, -1].item(), masks[-1])]
        window = torch.cat([window, logits[:, -1].argmax(-1, True)], 1)
        window = window[:, -12:] if window.size(1) > 24 else window
    assert got == new


def test_sampling_repeats_with_its_generator_and_top_1_is_greedy():
    model, idx = calibrated("g1"), torch.tensor([[1, 2, 3]])

    def text(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return [token for token, _ in generate(model, idx, 15, generator=generator, **options)]
    assert text(0, temperature=3.0) == text(0, temperature=3.0) != text(1, temperature=3.0)
    assert text(0, top_k=1) == text(1, temperature=0)


# -----------------------------------------------------------------------------
# thresholds, budgets, noise

@pytest.mark.parametrize("rows", [1, 3, 64])
def test_calibration_in_chunks_gives_the_same_thresholds(rows):
    model, context = make(gate="g3"), context_of(tokens(make(), 7))
    thresholds = []
    for n in (7, rows):
        model.calibrate(context, rows=n)
        thresholds.append(torch.stack([model.h[i].threshold for i in model.config.controlled]))
    same(*thresholds)


def test_threshold_lies_between_two_scores():
    """On a score, rounding would decide: the first token of a text has the same score each time it is met."""
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    assert 2 < threshold_for(scores, 0.5) < 3 and 3 < threshold_for(scores, 0.25) < 4


def test_noise_is_uniform_and_its_streams_are_unrelated():
    u = uniform(torch.arange(64), 0, 512)
    assert u.shape == (64, 512) and u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003 and len(u.unique()) > 0.99 * u.numel()
    assert abs(torch.histc(u, 10, 0, 1) / u.numel() - 0.1).max() < 0.01
    others = [uniform(torch.arange(64), layer, 512) for layer in (-1, 1, 5, 6, 11, 12, 63, 1000)]
    others += [uniform(torch.arange(64) + 1, 0, 512), u.roll(1, 1), uniform(torch.arange(64) * 7919, 0, 512)]
    for other in others:
        assert other.min() >= 0 and other.max() < 1 and abs(other.mean() - 0.5) < 0.01
        pair = torch.stack([u.flatten()[512:], other.flatten()[512:]])  # row 0's seed is 0 in two of them
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02


def test_noise_depends_on_row_seed_layer_and_position_alone():
    row_seeds = torch.tensor([3, 2 ** 62, -5])
    u = uniform(row_seeds, 2, 20)
    assert torch.equal(u[:, 7:12], uniform(row_seeds, 2, 5, start=7))
    assert torch.equal(u[[1]], uniform(row_seeds[[1]], 2, 20)) and (u >= 0).all() and (u < 1).all()



def test_a_forward_repeats_with_its_row_seeds_wherever_the_row_stands():
    model, idx, row_seeds = make(gate="random"), tokens(make(), 3), torch.tensor([5, 9, 11])

    def masks(idx, row_seeds):
        return torch.stack([route.mask for route in model(idx, "topk", row_seeds)[1]])
    assert torch.equal(masks(idx, row_seeds), masks(idx, row_seeds))
    assert torch.equal(masks(idx, row_seeds)[:, [2]], masks(idx[[2]], row_seeds[[2]]))
    assert not torch.equal(masks(idx, row_seeds), masks(idx, row_seeds + 1))
    assert not torch.equal(*masks(idx, row_seeds))  # each layer has its own


# -----------------------------------------------------------------------------
# parameters

def scaled_model(scale, **fields):
    """A scale's model without its memory, from the config file itself."""
    config = read_file(os.path.join(HERE, "config", f"{scale}.py"), DEFAULTS, DEFAULTS) if scale else DEFAULTS
    fields = {"controlled": tuple(config["controlled"])} | fields
    fields = {key: config[key] for key in GPTConfig.__dataclass_fields__ if key in config} | fields
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=50257 if scale else 257, **fields))


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("gate,total", [("g3", 157_498_446), ("g1", 157_494_078)])
def test_paper_has_the_papers_number_of_parameters(gate, total):
    model = scaled_model("paper", gate=gate)
    assert count(model.parameters()) == total and count(model.backbone().values()) == 152_791_296
    c = model.config
    assert (c.n_layer, c.n_embd, c.cheap_rank, c.controlled) == (16, 768, 192, tuple(range(1, 15)))


def test_gpt2_and_small_have_their_sizes():
    assert count(scaled_model("gpt2").backbone().values()) == 124_439_808
    assert 28e6 < count(scaled_model("small").parameters()) < 33e6


@pytest.mark.parametrize("scale", ["", "web", "small", "paper", "gpt2"])
def test_g1_and_g3_have_the_same_number_of_parameters_within_a_tenth(scale):
    sizes = []
    for gate in ("g1", "g3"):
        named = scaled_model(scale, gate=gate).named_parameters()
        sizes.append(count(p for name, p in named if ".gate." in name))
    assert max(sizes) <= 1.1 * min(sizes)


@pytest.mark.parametrize("gate", GATES)
def test_controllers_and_backbone_part_the_parameters(gate):
    model, dense = make(gate=gate), make(controlled=())
    controllers, backbone = set(model.controllers()), set(model.backbone())
    assert controllers | backbone == {name for name, _ in model.named_parameters()}
    assert not controllers & backbone and backbone == {name for name, _ in dense.named_parameters()}


# -----------------------------------------------------------------------------
# GPT-2

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=30)
FITTING = SHAPE | dict(block_size=12, controlled=(1,), activation="gelu_new")


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
    model = make(**FITTING | dict(block_size=block_size))
    before = {n: p.clone() for n, p in model.controllers().items()}
    load_gpt2(model, str(folder / kind))
    idx = tokens(model, 2)
    with torch.no_grad():
        same(model(idx)[0], theirs(idx).logits, 1e-4)
    assert all(torch.equal(p, before[n]) for n, p in model.controllers().items())


@pytest.mark.parametrize("fields", [dict(n_layer=3), dict(n_head=4), dict(n_embd=32), dict(vocab_size=31),
                                    dict(block_size=13)])
def test_gpt2_of_another_shape_is_refused(gpt2, fields):
    with pytest.raises(ConfigError, match="shape"):
        load_gpt2(make(**FITTING | fields), str(gpt2[1] / "lm"))


def broken(folder, tmp_path, how):
    from safetensors.torch import load_file, save_file
    config = json.loads((folder / "lm" / "config.json").read_text())
    weights = load_file(folder / "lm" / "model.safetensors")
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


@pytest.mark.parametrize("how", ["no tensor", "tensor of another shape", "another nonlinearity", "no json",
                                 "no safetensors", "no file"])
def test_a_broken_gpt2_is_refused_in_one_line_and_copies_nothing(gpt2, tmp_path, how):
    broken(gpt2[1], tmp_path, how)
    model = make(**FITTING)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ConfigError) as error:
        load_gpt2(model, str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_unknown_hub_name_is_refused(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(ConfigError, match="no folder 'nobody/nothing'"):
        load_gpt2(make(**SHAPE), "nobody/nothing")


# -----------------------------------------------------------------------------
# --compile

def compiled_or_not(compiled, n_layer, steps, device):
    """Some training steps -> each step's losses and the norm of the scores' gradient, and how many graphs had
    been compiled after it."""
    model = make(n_layer=n_layer, controlled=tuple(range(1, n_layer)), n_embd=32, gate="g1")
    for p in model.backbone().values():
        p.requires_grad_(False)
    if compiled:
        compile_layers(model)
    weights = dict(lambda_lm=1.0, lambda_util=1.0, oracle="on_policy")
    config = config_for(model, device=device, dtype="float32", batch_size=4, threads=0, **weights)
    trained, machine = list(model.controllers().values()), Machine(config)
    optimizer, results, graphs = torch.optim.SGD(trained, lr=0.1), [], []
    for i in range(steps):
        record = StepRecord(model, config, machine, logged=True)
        step = forward_batch(model, config, batch_of(model), {1 + i % 2})
        losses = {name: LOSSES[name](step) for name in ("lm", "util")}
        record.before_backward(step, losses)
        sum(losses.values()).backward()
        record.after_backward(step)
        values = record.values(trained, [optimizer])
        results.append(torch.stack([*losses.values(), values["grad_norm"]["scores"]]).detach())
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    return torch.stack(results), graphs


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler is at hand")
def test_compiled_layers_give_the_same_step_and_compile_once_for_all_layers_and_steps(device):
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        got, graphs = compiled_or_not(True, n_layer=3, steps=5, device=device)
        assert graphs[0] > 0 and graphs[1:] == [graphs[1]] * 4  # layer 2 has its first label in step 1
        deeper, more = compiled_or_not(True, n_layer=5, steps=2, device=device)
        assert more == [graphs[1]] * 2
    torch._dynamo.reset()
    same(got, compiled_or_not(False, n_layer=3, steps=5, device=device)[0], 1e-4)
    same(deeper, compiled_or_not(False, n_layer=5, steps=2, device=device)[0], 1e-4)
    assert (got[:, 2] > 1e-4).all()  # the gradient of the scores is there, what flows through w included
