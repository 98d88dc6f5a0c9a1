"""Kill a run 100 times at random moments; it must resume by itself to the same log and weights. Not in the test suite.

    python kill_runs.py [--kills=100] [--seed=0]

The run is a small full-aux G3 with its backbone, in a temporary folder. Each attempt is a forked process that gets SIGKILL after a
random time; attempts repeat until a run finishes, and finished runs repeat until all kills are spent.
"""
import json
import os
import random
import signal
import sys
import tempfile
import time

import torch

import train as trainer
from configurator import configure, exit_on_error
from runs import Machine, read_checkpoint

OPTIONS = dict(kills=100, seed=0)
SMALL = ["--n_layer=3", "--n_embd=32", "--n_head=2", "--block_size=32", "--batch_size=4", "--controlled=[1, 2]", "--max_iters=60",
         "--backbone_iters=60", "--eval_interval=5", "--log_interval=1", "--eval_iters=2", "--final_eval_iters=4", "--threads=1", "--dtype=float32"]
TIMES = ("seconds", "tokens_per_s")


def run():
    """One attempt, in this process: as `python train.py ...` in the current folder."""
    config = trainer.validate(configure(trainer.DEFAULTS, SMALL))
    trainer.train(config, Machine(config))


def forked(folder, life=None):
    """Run in a child process -> its exit code, or None when it was killed after `life` seconds."""
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            exit_on_error(run)
            os._exit(0)
        except BaseException as error:
            os._exit(getattr(error, "code", 1) or 1)
    if life is not None:
        time.sleep(life)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def result(folder):
    """Everything that must not depend on kills: both logs but for times, and all weights and optimizer states."""
    out = []
    for name in ("backbone", "g3_full_aux"):
        path = os.path.join(folder, "out", "tiny", name, "seed0")
        with open(os.path.join(path, "log.jsonl")) as f:
            log = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]
        ckpt = read_checkpoint(path)
        out.append((log, {k: v for k, v in ckpt["model"].items()}, ckpt["step"]))
    return out


def same(a, b):
    return all(x[0] == y[0] and x[2] == y[2] and x[1].keys() == y[1].keys() and all(torch.equal(x[1][k], y[1][k]) for k in x[1])
               for x, y in zip(a, b))


def main():
    options = configure(OPTIONS, sys.argv[1:])
    rng, kills, runs, identical, failed = random.Random(options["seed"]), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as base:
        os.mkdir(os.path.join(base, "calm"))
        began = time.time()
        assert forked(os.path.join(base, "calm")) == 0, "the undisturbed run failed"
        whole, expected = time.time() - began, result(os.path.join(base, "calm"))
        while kills < options["kills"]:
            folder = os.path.join(base, f"run{runs}")
            os.mkdir(folder)
            code, attempts = None, 0
            while code is None:
                attempts += 1
                # a few attempts a run are left alone, so that it gets somewhere
                code = forked(folder, None if kills >= options["kills"] or attempts > 8 else rng.uniform(0, whole / 2))
                kills += code is None
            runs += 1
            failed += code != 0
            identical += code == 0 and same(result(folder), expected)
            print(f"{kills} kills, {runs} runs finished after them, {identical} identical to the undisturbed one, {failed} failed", flush=True)
    if identical != runs:
        sys.exit(1)


if __name__ == "__main__":
    main()
