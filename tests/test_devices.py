"""The CUDA paths, without a GPU. PyTorch's fake tensors know shapes, dtypes and devices and hold no numbers. What
asks for a number, as .item() and nonzero() do, raises here, and would wait for a GPU there; what mixes devices
raises in both places. `meta` stands for the GPU, since fake CUDA tensors need a build with CUDA.

With --device=cuda also what only numbers can show; test_routing.py, test_losses.py and test_model.py hold what is
the same test on both devices."""
import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train
from conftest import go, recipe, summary_of, tiny
from gates import Context
from machine import Machine
from model import GPT
from prepare import Batch
from run import build, model_config
from test_routing import run_of
from train import configure_run, train_step

ARMS = {name: [recipe(name)] for name in ("backbone", "cheap_only", "full_adapter", "linear", "random", "static",
                                          "g1_no_utilrank", "g1_full_aux", "g3_full_aux", "best")}
ARMS["masked"] = [*ARMS["g3_full_aux"], "--oracle=shuffled", "--execution=masked"]
ARMS["scaled"] = [recipe("g1_full_aux"), "--estimator=scaled", "--oracle=on_policy", "--lambda_anchor=1.0"]
ARMS["scaled, masked"] = [*ARMS["scaled"], "--execution=masked"]
ARMS["llama"] = [*ARMS["best"], "--norm=rmsnorm", "--positions=rotary", "--activation=swiglu", "--n_kv_head=2",
                 "--bias=False", "--tied_head=False"]


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors, on `meta` where a device is asked for. No autocast: it does not exist there."""
    monkeypatch.setattr(torch, "autocast", lambda *words, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *words: False)
    adamw = torch.optim.AdamW  # which is fused on a real device only
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, betas, fused: adamw(groups, betas=betas, foreach=True))
    with FakeTensorMode():
        yield SimpleNamespace(device="meta", processes=1, sum=lambda tensors: None, autocast=contextlib.nullcontext)


def on_device(*words):
    """-> a config, its model and a batch, both on the device."""
    config, _, _ = configure_run(list(words))
    with torch.device("meta"):
        model = GPT(model_config(config, 257))
        for i in model.config.controlled:
            model.h[i].threshold = torch.zeros(())  # torch.tensor(0.0) makes no fake tensor
        tokens = torch.zeros(4, config["block_size"], dtype=torch.int64)
        return config, model, Batch(tokens, tokens.clone(), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("arm", ARMS)
def test_a_training_step_waits_for_nothing_and_leaves_the_device_nowhere(arm, fake, monkeypatch):
    """Forward, losses, backward, optimizers, and in the second step the numbers that are logged. Only the look at
    whether the losses are finite waits then, and is left out."""
    config, model, batch = on_device(*ARMS[arm])
    run = run_of(model, config, fake)
    monkeypatch.setattr(train, "get_batch", lambda *words: batch)
    assert train_step(run, logged=False)["losses"].keys() == run.losses.keys()
    if arm not in ("random", "static"):  # whose scores have no gradient: a 0 goes to the device
        monkeypatch.setattr(train, "check_finite", lambda *words: None)
        values = train_step(run, logged=True)
        assert values["losses"].keys() >= run.losses.keys() and values["grad_norm"]["all"].device.type == "meta"


@pytest.mark.parametrize("arm", ["g1_no_utilrank", "g3_full_aux", "scaled", "random", "llama"])
def test_evaluation_under_topk_waits_for_nothing(arm, fake):
    _, model, batch = on_device(*ARMS[arm])
    context = Context(batch.tokens, batch.row_seeds)
    with torch.no_grad():
        dense_x, _ = model.run(model.embed(context), "full", context)
        x, routes = model.run(model.embed(context), "topk", context)
        sums = model.compare(x, dense_x, batch.targets)
    assert sums.device.type == "meta" and len(routes) == len(model.config.controlled)


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("arm", ["g3_full_aux", "llama"])
def test_calibration_stays_on_the_device(arm, budget, fake):
    _, model, batch = on_device(*ARMS[arm], f"--budget={budget}", "--execution=masked")
    model.calibrate(Context(batch.tokens, batch.row_seeds), rows=2)
    assert all(model.h[i].threshold.device.type == "meta" for i in model.config.controlled)


def test_gathered_under_threshold_waits_once_a_layer(fake, monkeypatch):
    """The one wait that is allowed: how many tokens go full. It also shows that a wait is seen here."""
    _, model, batch = on_device(*ARMS["g1_no_utilrank"])
    context, waits = Context(batch.tokens, batch.row_seeds), []
    with torch.no_grad(), pytest.raises(DataDependentOutputException):
        model.run(model.embed(context), "threshold", context)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda count: waits.append(count) or batch.tokens.numel() // 2)
    with torch.no_grad():
        model.run(model.embed(context), "threshold", context)
    assert len(waits) == len(model.config.controlled)


def test_a_tensor_on_the_wrong_device_is_seen_here(fake):
    _, model, batch = on_device(*ARMS["g1_no_utilrank"])
    with pytest.raises(RuntimeError, match="same device"):
        model.embed(Context(batch.tokens, batch.row_seeds)) + torch.zeros(128)


# -----------------------------------------------------------------------------
# on a GPU

@pytest.mark.parametrize("arm", ARMS)
def test_on_a_gpu_a_training_step_waits_for_nothing(arm, gpu):
    config, _, _ = configure_run([*ARMS[arm], "--device=cuda"])
    machine = Machine(config)
    run = run_of(build(config, 257, machine), machine.resolved(config), machine)
    train_step(run, logged=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(run, logged=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


FAST = ["--dtype=bfloat16", "--compile"]


@pytest.mark.parametrize("arm, words, tol", [
    ("backbone", [], 1e-3), ("static", [], 1e-3), ("g3_full_aux", [], 1e-3), ("best", [], 1e-3),
    ("backbone", FAST, 2e-2), ("best", FAST, 2e-2)])
def test_a_run_on_a_gpu_ends_where_a_run_on_a_cpu_ends(arm, words, tol, gpu, place):
    go("train", *tiny(recipe(arm), "--out_dir=out/cpu"))
    go("train", *tiny(recipe(arm), "--out_dir=out/gpu", "--device=cuda", *words))
    on_cpu, on_gpu = summary_of("out/cpu"), summary_of("out/gpu")
    for split in ("val", "test"):
        for mode, result in on_cpu[split].items():
            assert on_gpu[split][mode]["loss"] == pytest.approx(result["loss"], rel=tol)


def test_a_text_from_a_gpu_is_the_text_from_a_cpu(gpu, done):
    words = "out/tiny/g3_full_aux/seed0", "--max_new_tokens=20", "--temperature=0"
    assert go("sample", *words, "--device=cuda") == go("sample", *words, "--device=cpu")
