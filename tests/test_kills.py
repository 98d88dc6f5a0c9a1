"""Runs killed at random moments, by commands that change in between. Opt-in, minutes:

    python -m pytest tests/test_kills.py --kills=100

What is promised. A run that is killed at any moment, as often as may be, is finished by the same command, to
the same log, weights and optimizer state, to the last bit. The command may change what changes no number: the
log interval (the log then holds other steps, with the same numbers), whether checkpoints are kept, and the
number of threads (then the last bits may differ, and the run says so). The backbone belongs to no recipe:
while it trains, any recipe of the same scale, data and backbone keys goes on with it. A run that a
study left is finished by hand, and a run by hand is finished by a study.
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from configurator import exit_on_error
from conftest import checkpoint_of, log_of, main_of, recipe, same

SMALL = ["--n_layer=3", "--n_embd=32", "--n_head=2", "--block_size=32", "--controlled=[1,2]",
         "--batch_size=4", "--max_iters=60", "--backbone_iters=500", "--backbone_batch_size=4",
         "--eval_interval=5", "--eval_iters=2", "--final_eval_iters=4", "--dtype=float32", "--device=cpu"]
STUDY = ["--backbone=backbone", "--seeds=0", "--jobs=1", "--study=study",
         "--arms=cheap_only,full_adapter,g1_full_aux"]
ARM = "out/tiny/study/g1_full_aux/seed0"
BACKBONE = "out/tiny/backbone/seed0"


def attempt(folder, script, words, life=None):
    """A command in a process of its own -> its exit code, or None when it was killed after `life` seconds."""
    pid = os.fork()  # importing torch takes longer than the rest
    if pid == 0:
        os.chdir(folder)
        os.dup2(os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        sys.argv = [f"{script}.py", *words]
        try:
            exit_on_error(main_of(script))
            os._exit(0)
        except SystemExit as error:
            os._exit(error.code)
        except BaseException:
            os._exit(1)
    if life is not None:
        time.sleep(life)
        os.kill(pid, signal.SIGKILL)  # nothing can be written on the way out
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def kill_and_finish(folder, commands, rng, whole, kills):
    """Kill commands, each time one of them at random, until one finishes, and run the first to its end.
    -> how many were killed."""
    killed, out = 0, None
    while out is None:
        script, words = rng.choice(commands)
        life = rng.uniform(0, whole / 2) if killed < kills else None
        out = attempt(folder, script, words, life)
        killed += out is None
        assert out in (None, 0), Path(folder, "out.txt").read_text()[-2000:]
    assert attempt(folder, *commands[0]) == 0
    return killed


def losses_by_step(run):
    return {r["step"]: r["losses"] for r in log_of(run) if "losses" in r}


def evaluations(run):
    return [r for r in log_of(run) if "losses" not in r]


def check_same_numbers(run, calm, whole_log):
    a, b = checkpoint_of(run), checkpoint_of(calm)
    for field in ("model", "optimizers", "evaluations", "budgets", "step"):
        assert same(a[field], b[field]), field
    assert evaluations(run) == evaluations(calm)
    logged, expected = losses_by_step(run), losses_by_step(calm)
    assert all(expected[step] == losses for step, losses in logged.items())
    assert not whole_log or logged == expected


def by_hand(*words):
    return "train", [recipe("g1_full_aux"), *SMALL, f"--out_dir={ARM}", *words]


def other_recipe(name):
    return "train", [recipe(name), *SMALL, "--threads=1", "--seed=3", "--log_interval=1"]


PLANS = {  # the commands of which each attempt takes one, the first being the one that finishes
    "the same command": [by_hand("--threads=1", "--log_interval=1")],
    "another log interval": [by_hand("--threads=1", "--log_interval=1"),
                             by_hand("--threads=1", "--log_interval=7", "--keep_checkpoints")],
    "another recipe while the backbone trains": [by_hand("--threads=1", "--log_interval=1"),
                                                 other_recipe("g3_full_aux"), other_recipe("static")],
    "a study and by hand": [by_hand("--threads=1", "--log_interval=1"),
                            ("study", [*SMALL, *STUDY, "--threads=1", "--log_interval=1"])],
    "other threads": [by_hand("--threads=1", "--log_interval=1"), by_hand("--threads=2", "--log_interval=1")],
}


@pytest.fixture
def kills(request):
    kills = request.config.getoption("kills")
    if not kills:
        pytest.skip("takes minutes: python -m pytest tests/test_kills.py --kills=100")
    return kills


def test_killed_runs_finish_with_the_numbers_of_undisturbed_ones(kills, tmp_path):
    torch.set_num_threads(1)
    for script in ("train", "study"):
        main_of(script)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports a thousand modules at its first use
    calm = tmp_path / "calm"
    calm.mkdir()
    began = time.time()
    assert attempt(calm, *PLANS["the same command"][0]) == 0
    whole = time.time() - began
    rng, killed, finished = random.Random(0), 0, 0
    while killed < kills:
        for plan, commands in PLANS.items():
            folder = tmp_path / f"run{finished}"
            folder.mkdir()
            killed += kill_and_finish(folder, commands, rng, whole, min(8, kills - killed))
            finished += 1
            print(f"{killed} kills, {finished} runs finished; the last: {plan}", flush=True)
            if plan == "other threads":
                assert losses_by_step(folder / ARM).keys() == losses_by_step(calm / ARM).keys()
            else:
                backbones = [checkpoint_of(place / BACKBONE)["model"] for place in (folder, calm)]
                assert same(*backbones), plan
                check_same_numbers(folder / ARM, calm / ARM, whole_log=plan != "another log interval")
