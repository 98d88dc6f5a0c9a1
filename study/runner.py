"""Runs train.py for many arms and seeds, side by side: projected minutes first, then what is left."""
import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import torch

import metrics
import train
from configurator import HERE
from prepare import eval_batch
from runs.backbone import backbone_config, backbone_folder, freeze
from runs.machine import Machine, compile_layers
from runs.optim import make_optimizers
from runs.run import build, ledger_of, open_data

# -----------------------------------------------------------------------------
# how long it will take


def project(jobs):
    """Seconds that each of jobs, {out_dir: words of train.py}, should take -> ({out_dir: seconds}, seconds of
    the backbone if it is not there yet). A step and an evaluation are timed; the ledger gives the others."""
    configs = {out: train.configure_run(words)[0] for out, words in jobs.items()}
    config, defaults = train.configure_run(next(iter(jobs.values())))
    machine = Machine(config)
    opened = open_data(config, machine)
    meta = opened[1]
    plain = {**config, "mode": "cheap", "lambda_lm": 1.0, "lambda_distill": 0.0}
    step, evaluation, start = time_model(plain, machine, opened)
    speed = step_flops(plain, meta, machine) / step
    seconds = {}
    for out, c in configs.items():
        evaluations = c["max_iters"] / c["eval_interval"] + c["final_eval_iters"] / c["eval_iters"]
        modes = 2 if c["mode"] == "topk" else 1
        training = c["max_iters"] * step_flops(c, meta, machine) / speed
        seconds[out] = training + evaluations * modes * evaluation + start + 8
    dense, backbone = backbone_config(config, defaults), 0.0
    if dense and not os.path.exists(os.path.join(backbone_folder(dense, meta), "summary.json")):
        backbone = dense["max_iters"] * step_flops(dense, meta, machine) / speed
    if machine.device == "cuda":
        torch.cuda.empty_cache()  # the runs need that memory
    return seconds, backbone


def step_flops(config, meta, machine):
    if config["plugin"]:  # a gate of a fork need not work without memory
        flops = metrics.ledger(build(config, meta, machine), config)
    else:
        flops = ledger_of(config, meta["vocab_size"])
    tokens = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
    return (flops["forward"] + flops["backward"]) * tokens


def time_model(config, machine, opened):
    """(seconds of a training step, of an evaluation, and of what comes before them: compiling) of a model of
    this config with fresh weights."""
    data, meta = opened
    model = build(config, meta, machine)
    freeze(model, machine)
    if config["compile"]:
        compile_layers(model)
    run = SimpleNamespace(model=model, config=config, machine=machine, data=data, step=0,
                          trained=[p for p in model.parameters() if p.requires_grad],
                          optimizers=make_optimizers(model, config, machine.dtype))
    times = []
    for run.step in range(4):
        began = now(machine)
        train.train_step(run, logged=False)
        times.append(now(machine) - began)
    rows, evaluations = eval_batch(data["val"], config, config["eval_iters"]), []
    for _ in range(1 + config["compile"]):
        began = now(machine)
        metrics.evaluate_modes(model, config, machine, rows)
        evaluations.append(now(machine) - began)
    return min(times), min(evaluations), times[0] - min(times) + evaluations[0] - min(evaluations)


def now(machine):
    """The time, when everything that was asked of the GPU is done."""
    if machine.device == "cuda":
        torch.cuda.synchronize()
    return time.time()


# -----------------------------------------------------------------------------
# children

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def tie_to_parent():
    """-> what a child calls before its program starts, so that it ends with this process, even if that is
    killed. The signal comes when the thread ends that started the child: start it from the main thread."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def tie():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended in between
            os._exit(1)
    return tie


class Child:
    """A train.py at work; what it prints goes to stdout.txt in its folder."""

    def __init__(self, out, words):
        self.out, self.output = out, os.path.join(out, "stdout.txt")
        os.makedirs(out, exist_ok=True)
        with suppress(FileNotFoundError):
            os.remove(self.output)  # not emptied: an older attempt that still runs keeps its own file
        command = [sys.executable, os.path.join(HERE, "train.py"), *words]
        with open(self.output, "xb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, preexec_fn=tie_to_parent())

    def reason(self):
        """Why it failed: the signal, or the last line of its output."""
        code = self.process.returncode
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        with open(self.output, encoding="utf-8", errors="replace") as log:
            lines = log.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {code}, no output"

    def stop(self):
        end(self.process)


def end(process):
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def sigterm_as_exit():
    """SIGTERM raises SystemExit, so that children are ended first, on every system."""
    def leave(number, frame):
        sys.exit(128 + number)
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -----------------------------------------------------------------------------
# all of them

def run_all(jobs, side_by_side):
    """Run train.py for each of jobs, {out_dir: words}, that is not finished, so many side by side
    -> {out_dir: reason} of those that failed."""
    todo = {out: words for out, words in jobs.items() if not is_finished(out, words)}
    print(f"{len(jobs)} runs, {len(todo)} to do, {side_by_side} at a time", flush=True)
    if not todo:
        return {}
    seconds, backbone = project(todo)
    minutes = (sum(seconds.values()) / side_by_side + backbone) / 60
    print(f"projected: {minutes:.0f} minutes" + (", the backbone included" if backbone else ""), flush=True)
    progress = Progress(seconds, side_by_side)
    running, waiting = [], list(todo)
    with sigterm_as_exit():
        try:
            while waiting or running:
                room = side_by_side if progress.finished else 1  # the first makes data and backbone for all
                while waiting and len(running) < room:
                    out = waiting.pop(0)
                    running.append(Child(out, todo[out]))
                time.sleep(0.05)
                ended = [child for child in running if child.process.poll() is not None]
                for child in ended:
                    running.remove(child)
                    progress.ended(child)
        finally:
            for child in running:
                child.stop()
    return progress.failed


def is_finished(out, words):
    overwrite = train.configure_run(words)[0]["overwrite"]
    return not overwrite and os.path.exists(os.path.join(out, "summary.json"))


class Progress:
    """Which runs have ended, and how long the others will take at the pace so far."""

    def __init__(self, seconds, side_by_side):
        """seconds: {out_dir: what was projected}."""
        self.seconds, self.side_by_side, self.began = seconds, side_by_side, time.time()
        self.finished, self.failed = [], {}

    def ended(self, child):
        if child.process.returncode:
            self.failed[child.out] = child.reason()
            print(f"failed: {child.out}: {self.failed[child.out]} (see {child.output})", flush=True)
            return
        if not self.finished:  # it ran alone, after the backbone: that says nothing about the pace
            self.began = time.time() - self.seconds[child.out] / self.side_by_side
        self.finished.append(child.out)
        done = sum(self.seconds[out] for out in self.finished)
        left = sum(self.seconds.values()) - done - sum(self.seconds[out] for out in self.failed)
        pace = (time.time() - self.began) / done
        print(f"{len(self.finished)}/{len(self.seconds)}: {child.out} finished, about "
              f"{left * pace / 60:.0f} minutes left", flush=True)
