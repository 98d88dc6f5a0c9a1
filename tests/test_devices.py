"""The CUDA paths, without a GPU. PyTorch's fake tensors know shapes, dtypes and devices and hold no numbers.
What asks for a number, as .item() and nonzero() do, raises here, and would wait for a GPU there; what mixes
devices raises in both places. `meta` stands for the GPU, since fake CUDA tensors need a build with CUDA.

With --device=cuda also what only numbers can show; test_routing.py, test_losses.py and test_model.py
hold what is the same test on both devices."""
import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import bench
import train
from configurator import arm_words
from conftest import go, losses_of, recipe, summary_of, tiny
from gates import GATES, Context, active_losses
from metrics import StepRecord
from model import GPT
from prepare import Batch
from runs.optim import make_optimizers
from runs.run import model_config
from train import configure_run, forward_batch, labelled_layers

ARMS = ("backbone", "cheap_only", "full_adapter", "linear", "random", "static", "g1_no_utilrank",
        "g1_full_aux", "g3_full_aux", "g1_scaled_on_policy", "g1_ste_anchor", "g1_distill", "best")


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors, on `meta` where a device is asked for. No autocast: it does not exist there."""
    monkeypatch.setattr(torch, "autocast", lambda *words, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *words: False)
    with FakeTensorMode():
        yield SimpleNamespace(device="meta", processes=1, sum=lambda tensors: None)


def on_device(arm, *words, rows=4):
    """-> the arm's config, its model and a batch, both on the device."""
    config, _ = configure_run([*arm_words(arm), *words])
    with torch.device("meta"):
        model = GPT(model_config(config, 257))
        tokens = torch.zeros(rows, config["block_size"], dtype=torch.int64)
        batch = Batch(tokens, tokens.clone(), torch.zeros(rows, dtype=torch.int64))
        for i in model.config.controlled:
            model.h[i].threshold = torch.zeros(())  # torch.tensor(0.0) makes no fake tensor
    for name, p in model.named_parameters():
        trained = ".cheap." in name or (".gate." in name and config["mode"] == "topk")
        p.requires_grad_(trained or config["mode"] == "full")
    return config, model, batch


@pytest.mark.parametrize("arm, execution", [*((arm, "gathered") for arm in ARMS), ("g3_full_aux", "masked"),
                                            ("g1_scaled_on_policy", "masked")])
def test_a_training_step_waits_for_nothing_and_leaves_the_device_nowhere(arm, execution, fake):
    """Forward, losses, backward and, where scores learn, the numbers of a logged step. The optimizers are
    PyTorch's."""
    config, model, batch = on_device(arm, f"--execution={execution}")
    trained = [p for p in model.parameters() if p.requires_grad]
    learned = config["mode"] == "topk" and GATES[config["gate"]].learned
    record = StepRecord(model, config, fake, logged=learned)
    step = forward_batch(model, config, batch, labelled_layers(config, 0))
    losses = {name: loss(step) for name, loss in active_losses(config).items()}
    record.before_backward(step, losses)
    sum(config[f"lambda_{name}"] * loss for name, loss in losses.items()).backward()
    record.after_backward(step)
    values = record.values(trained, make_optimizers(model, config, torch.float32))
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    assert values["losses"].keys() >= losses.keys()
    assert all(p.grad.device.type == "meta" for p in trained)


@pytest.mark.parametrize("arm", ["g1_no_utilrank", "g3_full_aux", "g1_scaled", "random"])
def test_evaluation_under_topk_waits_for_nothing(arm, fake):
    _, model, batch = on_device(arm)
    with torch.no_grad():
        x, routes = model.run(model.embed(context_of(batch)), "topk", context_of(batch))
        [loss] = model.token_losses([x], batch.targets)
    assert loss.device.type == "meta" and len(routes) == len(model.config.controlled)


def context_of(batch):
    return Context(batch.tokens, batch.row_seeds)


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_calibration_and_the_masked_forward_stay_on_the_device(budget, fake):
    _, model, batch = on_device("g3_full_aux", f"--budget={budget}", "--execution=masked")
    with torch.no_grad():
        model.calibrate(context_of(batch), rows=2)
    assert all(model.h[i].threshold.device.type == "meta" for i in model.config.controlled)


def test_gathered_under_threshold_waits_once_a_layer(fake, monkeypatch):
    """The one wait that is allowed: how many tokens go full. It also shows that a wait is seen here."""
    _, model, batch = on_device("g1_no_utilrank")
    with torch.no_grad(), pytest.raises(DataDependentOutputException):
        model.run(model.embed(context_of(batch)), "threshold", context_of(batch))
    waits = []

    def counted(tensor):
        waits.append(tensor)
        return batch.tokens.numel() // 2
    monkeypatch.setattr(torch.Tensor, "__int__", counted)
    with torch.no_grad():
        model.run(model.embed(context_of(batch)), "threshold", context_of(batch))
    assert len(waits) == len(model.config.controlled)


def test_a_tensor_on_the_wrong_device_is_seen_here(fake):
    _, model, batch = on_device("g1_no_utilrank")
    with pytest.raises(RuntimeError, match="same device"):
        model.embed(Context(batch.tokens, batch.row_seeds)) + torch.zeros(128)


# -----------------------------------------------------------------------------
# on a GPU

@pytest.mark.parametrize("arm", ARMS)
def test_on_a_gpu_a_training_step_waits_for_nothing(arm, gpu):
    config, _ = configure_run([*arm_words(arm), "--device=cuda"])
    case = bench.Case(config, 257)
    bench.one_step(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bench.one_step(case)
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
    for name in ("val_loss", "test_loss"):
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=tol)


def test_a_run_stopped_and_resumed_on_a_gpu_is_the_undisturbed_one_to_tolerance(gpu, place, monkeypatch):
    words = tiny(recipe("g3_full_aux"), "--max_iters=10", "--eval_interval=3", "--device=cuda")
    go("train", *words, "--out_dir=out/calm")
    real = train.get_batch

    def get_batch(data, config, step, micro, machine):
        if step == 8:
            raise KeyboardInterrupt
        return real(data, config, step, micro, machine)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "get_batch", get_batch)
        go("train", *words, "--out_dir=out/stopped")
    assert "resuming out/stopped at step 6" in go("train", *words, "--out_dir=out/stopped")
    assert losses_of("out/stopped") == pytest.approx(losses_of("out/calm"), rel=1e-4)
    wanted = summary_of("out/calm")["val_loss"]
    assert summary_of("out/stopped")["val_loss"] == pytest.approx(wanted, rel=1e-4)


def test_a_text_from_a_gpu_is_the_text_from_a_cpu(gpu, done):
    words = "out/tiny/g1_full_aux/seed0", "--max_new_tokens=20", "--temperature=0"
    assert go("sample", *words, "--device=cuda") == go("sample", *words, "--device=cpu")
