"""What the tests share: a tiny text, the words of a tiny run, and ways to run the scripts in a folder of
their own.

    python -m pytest -q -n 2                                everything
    python -m pytest --plugin=my_gate.py test_routing.py    the contract's tests over that file's entries too
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
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configurator import PLUGINS, ConfigError, load_plugin
from gates import ESTIMATORS, GATES, LABELS, LOSSES
from machine import choose_device

HERE = Path(__file__).resolve().parent
os.environ["MPLBACKEND"] = "Agg"
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--plugin", action="append", default=[], help="a file that registers gates or losses")
    parser.addoption("--device", default="cpu", help="where the tests run that ask for `device`: cpu or cuda")


def pytest_configure(config):
    try:
        for path in config.getoption("plugin"):
            load_plugin(path)
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
    if device == "cpu":
        pytest.skip("needs a GPU and --device=cuda")


@pytest.fixture
def forget():
    """A call that forgets the plugins of this test, as another process would; they are forgotten after it
    too."""
    registries = (GATES, ESTIMATORS, LABELS, LOSSES, PLUGINS)
    before = [dict(registry) for registry in registries]

    def restore():
        for registry, entries in zip(registries, before):
            registry.clear()
            registry.update(entries)
    yield restore
    restore()


# -----------------------------------------------------------------------------
# running the scripts

# The smallest run that still does everything.
TINY = dict(dataset="tiny", n_layer=3, n_head=2, n_embd=16, block_size=16, controlled="[1,2]", cheap_rank=4,
            g1_hidden=8, latent=4, max_iters=6, warmup_iters=2, batch_size=4, backbone_iters=4,
            backbone_long_iters=4, backbone_batch_size=4, eval_interval=2, eval_iters=2, final_eval_iters=8,
            log_interval=1, threads=1, device="cpu", dtype="float32")


def tiny(*words):
    """The command line of a tiny run; a key in `words` replaces TINY's."""
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    return [*words, *(f"--{key}={value}" for key, value in TINY.items() if key not in given)]


def recipe(name):
    return str(HERE / "config" / f"{name}.py")


def go(script, *words):
    """Run a script's main() in this process -> what it printed."""
    main, argv = importlib.import_module(script).main, sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [f"{script}.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return out.getvalue()


def start(*command, env=None, **options):
    """Start `python command...` -> a Popen whose stdout and stderr are text pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, text=True, env=environment, **(pipes | options))


def finish(process, timeout=120):
    """Wait for a process -> (exit code, stdout, stderr); one that takes too long is ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its children, as it could not when it is killed
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        process.kill()
        raise
    return process.returncode, out, err


def write_plugin(text, name="mine.py"):
    """Write a plugin into the working folder -> the word that loads it."""
    Path(name).write_text(text)
    return f"--plugin={name}"


# -----------------------------------------------------------------------------
# reading what a run left

def snapshot(folder="."):
    """{path: (hash, time of the last change)} of every file but locks, which are no output."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock"]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def log_of(run):
    """The records of a run without what depends on the clock."""
    records = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("tokens_per_s", "seconds")} for r in records]


def steps_of(run):
    """The records of training steps; the others are of evaluations."""
    return [record for record in log_of(run) if "losses" in record]


def losses_of(run, name="lm"):
    """{step: that loss}."""
    return {r["step"]: r["losses"][name] for r in steps_of(run) if name in r["losses"]}


def summary_of(run):
    return json.loads((Path(run) / "summary.json").read_text())


# -----------------------------------------------------------------------------
# a tiny text, and folders to work in

def write_documents(path, seed=0, count=200):
    """Short texts, one a line of a .jsonl file."""
    rng = random.Random(seed)
    words = "the iterator returns a value and raises naïve 木 Ωmega when it is empty or closed 🙂 …".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(8, 20))) for _ in range(count)]
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """Two folders to copy: `done` with data/tiny, a backbone and a run of a gate, `place` without the run."""
    root = tmp_path_factory.mktemp("templates")
    write_documents(root / "texts.jsonl")
    (root / "made").mkdir()
    with contextlib.chdir(root / "made"):
        go("prepare", "--source=../texts.jsonl", "--name=tiny", "--tokenizer=bytes")
        go("train", *tiny())
    shutil.copytree(root / "made", root / "place", ignore=shutil.ignore_patterns("g3_full_aux"))
    (root / "made").rename(root / "done")  # so that a copy finds the backbone beside it, not in here
    return root


def copy_of(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def place(templates, tmp_path, monkeypatch):
    """A working directory with data/tiny and out/tiny/backbone/seed0, the backbone of a tiny run."""
    return copy_of(templates / "place", tmp_path, monkeypatch)


@pytest.fixture
def done(templates, tmp_path, monkeypatch):
    """The same with the finished run out/tiny/g3_full_aux/seed0."""
    return copy_of(templates / "done", tmp_path, monkeypatch)
