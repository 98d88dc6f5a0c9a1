"""What the tests share: a tiny text, the words of a tiny run, and ways to run the scripts in a folder of
their own.

    python -m pytest                                          everything, minutes
    python -m pytest --plugin=my_gate.py test_routing.py    the contract's tests over that file's entries too
    python -m pytest --hypothesis-profile=long                fuzz for longer
    python -m pytest tests/test_fuzz.py --mutations=1000      break more records and checkpoints
    python -m pytest tests/test_kills.py --kills=100          kill runs at random moments
    python -m pytest --device=cuda test_routing.py tests/test_devices.py    on a GPU what asks for `device`
"""
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from configurator import ConfigError, load_plugin
from prepare import split_of
from runs.machine import choose_device

HERE = Path(__file__).resolve().parent
os.environ["MPLBACKEND"] = "Agg"


def pytest_addoption(parser):
    parser.addoption("--plugin", action="append", default=[], help="a file that registers gates or losses")
    parser.addoption("--device", default="cpu", help="where the tests run that ask for `device`: cpu or cuda")
    parser.addoption("--kills", type=int, default=0, help="how often tests/test_kills.py kills a run")
    parser.addoption("--mutations", type=int, default=40, help="how often tests/test_fuzz.py breaks a file")


def pytest_configure(config):
    for path in config.getoption("plugin"):
        try:
            load_plugin(path)
        except ConfigError as error:
            raise pytest.UsageError(str(error)) from None
    try:
        config.option.device = choose_device(config.getoption("device"))
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture
def device(request, monkeypatch):
    """--device. In a test that asks for it the models and tokens of test_routing.py's helpers are there too.
    On a GPU a float32 product is float32: a Machine would allow TF32, and two ways to one number differ."""
    device = request.config.getoption("device")
    if device != "cpu":
        monkeypatch.setattr("test_routing.DEVICE", device)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    return device


@pytest.fixture
def gpu(device):
    """For what is there to be tested on a GPU alone."""


def pytest_collection_modifyitems(config, items):
    if config.getoption("device") == "cpu":
        for item in items:
            if "gpu" in getattr(item, "fixturenames", []):
                item.add_marker(pytest.mark.skip(reason="needs a GPU and --device=cuda"))


settings.register_profile("short", max_examples=60, deadline=None)
settings.register_profile("long", max_examples=5000, deadline=None)
settings.load_profile("short")


# -----------------------------------------------------------------------------
# running the scripts

# The smallest run that still does everything.
TINY = dict(dataset="tiny", n_layer=3, n_head=2, n_embd=16, block_size=16, controlled="[1,2]", cheap_rank=4,
            g1_hidden=8, latent=4, max_iters=6, warmup_iters=2, batch_size=4, backbone_iters=4,
            backbone_batch_size=4, eval_interval=2, eval_iters=2, final_eval_iters=8, log_interval=1,
            threads=1, device="cpu", dtype="float32")


def tiny(*words):
    """The command line of a tiny run; a key in `words` replaces TINY's."""
    given = {w[2:].partition("=")[0] for w in words if w.startswith("--")}
    return [*words, *(f"--{k}={v}" for k, v in TINY.items() if k not in given)]


def recipe(name):
    return str(HERE / "config" / f"{name}.py")


MODULES = {"study": "study.__main__", "audit": "study.audit"}  # the others are files


def main_of(script):
    """The main() of a script: train, sample, ..."""
    return importlib.import_module(MODULES.get(script, script)).main


def go(script, *words):
    """Run a script's main() in this process -> what it printed."""
    main, argv = main_of(script), sys.argv
    sys.argv = [f"{script}.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main()
    finally:
        sys.argv = argv
    return out.getvalue()


def script_words(script):
    """What follows `python` on the command line of a script."""
    return ["-m", "study"] if script == "study" else [HERE / f"{script}.py"]


def start(*command, env=None, **options):
    """Start `python command...` -> a Popen whose stdout and stderr are text pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, text=True, env=environment, **(pipes | options))


def finish(process, timeout=120):
    """Wait for a process -> (exit code, stdout, stderr); one that takes too long is ended, with its children
    if it is torchrun."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()
        raise
    return process.returncode, out, err


# -----------------------------------------------------------------------------
# reading what a run left

def snapshot(folder=".", times=False):
    """{path: what is there} of every file and folder, but for locks, which are no output."""
    def what(path):
        if path.is_symlink():
            return os.readlink(path)
        if path.is_dir():
            return "folder"
        return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns if times else 0
    return {str(p): what(p) for p in sorted(Path(folder).rglob("*")) if p.name != "lock"}


def log_of(run):
    """The records of a run without what depends on the clock."""
    records = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("tokens_per_s", "seconds")} for r in records]


def steps_of(run):
    """The records of training steps; the others are of evaluations."""
    return [r for r in log_of(run) if "losses" in r]


def losses_of(run, name="lm"):
    """{step: that loss}."""
    return {r["step"]: r["losses"][name] for r in steps_of(run) if name in r["losses"]}


def summary_of(run):
    return json.loads((Path(run) / "summary.json").read_text())


def config_of(run):
    return json.loads((Path(run) / "config.json").read_text())


def checkpoint_of(run):
    return torch.load(Path(run) / "ckpt.pt", weights_only=True)


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b):
    """Two runs logged the same numbers and ended with the same weights, optimizer state and thresholds."""
    fields = ("model", "optimizers", "evaluations", "budgets", "step")
    a_end, b_end = checkpoint_of(a), checkpoint_of(b)
    return log_of(a) == log_of(b) and all(same(a_end[field], b_end[field]) for field in fields)


# -----------------------------------------------------------------------------
# a tiny text

def make_documents(seed, train=80, held_out=6):
    """Short distinct texts, so chosen by their hash that each split of local files gets its number."""
    rng, wanted, texts = random.Random(seed), {"train": train, "val": held_out, "test": held_out}, []
    words = "the iterator returns a value and raises naïve 木 Ωmega when it is empty or closed 🙂 …".split()
    while any(wanted.values()):
        text = " ".join(rng.choices(words, k=rng.randint(8, 20)))
        split = split_of(hashlib.sha256(text.encode()).digest(), 0.01)
        if wanted[split] and text not in texts:
            wanted[split] -= 1
            texts.append(text)
    return rng.sample(texts, len(texts))


def write_jsonl(path, texts):
    Path(path).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


@pytest.fixture(scope="session")
def documents():
    return make_documents(0)


# -----------------------------------------------------------------------------
# folders to work in

@pytest.fixture(scope="session")
def templates(tmp_path_factory, documents):
    """Two folders to copy: `place` with data/tiny and its backbone, `done` with finished runs of both gates
    too."""
    root = tmp_path_factory.mktemp("templates")
    with contextlib.chdir(root):
        write_jsonl("texts.jsonl", documents)
        os.mkdir("place")
        with contextlib.chdir("place"):
            go("prepare", "--source=../texts.jsonl", "--name=tiny", "--tokenizer=bytes")
            go("train", *tiny("--max_iters=1", "--out_dir=out/maker"))  # makes the backbone on the way
            shutil.rmtree("out/maker")
        shutil.copytree("place", "done")
        with contextlib.chdir("done"):
            go("train", *tiny())
            go("train", *tiny(recipe("g1_full_aux")))
    return root


def copy_of(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def place(templates, tmp_path, monkeypatch):
    """A working directory with data/tiny and the backbone of a tiny run."""
    return copy_of(templates / "place", tmp_path, monkeypatch)


@pytest.fixture
def done(templates, tmp_path, monkeypatch):
    """The same with the finished runs out/tiny/g3_full_aux/seed0 and out/tiny/g1_full_aux/seed0."""
    return copy_of(templates / "done", tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """`python train.py` in an empty folder, at a few steps -> (the folder, exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("quickstart")
    words = ["--max_iters=4", "--backbone_iters=4", "--eval_interval=2", "--log_interval=2", "--eval_iters=1",
             "--final_eval_iters=1"]
    return folder, *finish(start(HERE / "train.py", *words, cwd=folder, env={"PYTHONHASHSEED": "1"}))
