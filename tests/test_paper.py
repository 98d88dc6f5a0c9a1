"""study/paper.py at a toy size on the CPU: every stage, an interruption, the same steps after it, refusals.
"""
import json
from pathlib import Path

import pytest

import study.paper as paper
import study.runner as runner
from configurator import ConfigError
from conftest import config_of, go, snapshot, tiny

FOLDER, REPORT = Path("out/toy/one_gpu"), Path("report")
ARMS = ["cheap_only", "full_adapter", "cheap_only_distill_muon", "full_adapter_distill_muon", "static",
        "g1_no_utilrank", "g3_no_utilrank", "g1_full_aux", "g3_full_aux", "best"]


def words(*more):
    set_here = ("--max_iters", "--backbone_iters", "--eval_interval")
    common = [word for word in tiny("--scale=toy", f"--report={REPORT}", "--steps=10", *more)
              if not word.startswith(set_here)]
    return [*common, *(word for word in more if word.startswith(set_here))]


class InThisProcess:
    """A run of train.py that is over when it has started. The `stopped`-th is interrupted instead."""
    started, stopped = [], None

    def __init__(self, out, words):
        self.started.append(out)
        if len(self.started) == self.stopped:
            raise KeyboardInterrupt
        go("train", *words)
        self.out, self.process, self.returncode = out, self, 0

    def poll(self):
        return 0

    def stop(self):
        pass


@pytest.fixture
def short(place, monkeypatch):
    """One test, one row of the benchmark, and no processes for runs -> the class of the runs."""
    monkeypatch.setattr(paper, "TESTS", ["test_routing.py::test_k_rounds_half_up"])
    monkeypatch.setattr(paper, "BENCH", ["--rows=ledger"])
    monkeypatch.setattr(InThisProcess, "started", [])
    monkeypatch.setattr(runner, "Child", InThisProcess)
    return InThisProcess


def test_one_command_does_all_of_it_and_goes_on_where_it_was_interrupted(short, monkeypatch):
    monkeypatch.setattr(short, "stopped", 4)
    with pytest.raises(KeyboardInterrupt):
        go("study.paper", *words())
    assert len(short.started) == 4 and not (REPORT / "README.md").exists()
    before = snapshot(REPORT, times=True)
    plan = json.loads((FOLDER / "plan.json").read_text())
    assert plan["steps"] == 10 and plan["seconds"].keys() == {"tests.txt", "bench.md"}

    monkeypatch.setattr(short, "stopped", None)
    out = go("study.paper", *words("--minutes=0.01"))  # nothing is left, and it was chosen before
    assert "10 steps an arm, as was chosen before" in out
    after = snapshot(REPORT, times=True)
    for name in ("tests.txt", "bench.md"):
        assert after[f"{REPORT}/{name}"] == before[f"{REPORT}/{name}"]
    folders = [f"{FOLDER}/{arm}/seed0" for arm in ARMS]
    assert short.started == [*folders[:4], *folders[3:]]
    for folder in folders:
        config = config_of(folder)
        assert (config["max_iters"], config["backbone"], config["backbone_iters"]) == (10, "backbone", 18)

    report = (REPORT / "README.md").read_text()
    assert "10 runs" in report and "## How it was made" in report and "[bench.md](bench.md): speed" in report
    assert "python -m study config/paper.py --scale=toy" in report and "--max_iters=10" in report
    tests, bench = (REPORT / "tests.txt").read_text(), (REPORT / "bench.md").read_text()
    assert tests.startswith("`python -m pytest -q --tb=line --device=cpu test_routing.py::")
    assert "1 passed" in tests
    assert bench.startswith("`python bench.py config/paper.py --scale=toy") and "| best |" in bench
    assert '"rows"' not in bench


def test_as_many_steps_as_fit(short, monkeypatch):
    """A run takes 10 s and 0.1 s a step, the backbone 0.2 s for each step of an arm."""
    def project(jobs):
        return {run: 10 + 0.1 * run[0] for run in jobs}, 0.2 * 1_000
    monkeypatch.setattr(paper, "project", project)
    options = {**paper.OPTIONS, "steps": 1_000, "minutes": 20.0, "report": str(REPORT)}
    _, given, config = paper.parse_words(words())
    plan = paper.Paper(options, given, config)
    plan.plan["seconds"] = {"tests.txt": 300}
    plan.choose_steps()
    steps = json.loads((FOLDER / "plan.json").read_text())["steps"]
    taken = len(ARMS) * (10 + 0.1 * steps) + 0.2 * steps
    assert 0 <= paper.PLANNED * (20 * 60 - 300) - taken < 1.2 * paper.FEWEST
    plan.plan, plan.options = {"seconds": {}}, {**options, "minutes": 60.0}
    plan.choose_steps()
    assert plan.plan["steps"] == 1_000
    plan.plan, plan.options = {"seconds": {}}, {**options, "minutes": 2.0}
    with pytest.raises(ConfigError, match="2.0 of 2 minutes are left.*--minutes"):
        plan.choose_steps()


def test_a_stage_that_takes_too_long_is_ended_and_one_that_fails_is_tried_again(short, capfd):
    _, given, config = paper.parse_words(words())
    plan = paper.Paper({**paper.OPTIONS, "minutes": 0.03, "report": str(REPORT)}, given, config)
    slow = ["-c", "import time; print('so far', flush=True); time.sleep(60)"]
    assert plan.stage("slow.md", slow, 1, (0,))
    assert (REPORT / "slow.md").read_text().endswith("so far\n\nStopped after 0.0 minutes.\n")
    assert not plan.stage("broken.md", ["-c", "raise SystemExit('no such row')"], 1000, (0,))
    assert not (REPORT / "broken.md").exists() and "no such row" in capfd.readouterr().err
    assert plan.stage("broken.md", ["-c", "print('mended')"], 1000, (0,))
    assert "mended" in (REPORT / "broken.md").read_text()


@pytest.mark.parametrize("given, said", [
    (["--device=auto"], "needs a GPU"),
    (["--dataset=gone"], "--name=gone"),
    (["--dataset=fineweb-edu"], "prepare.py --source=fineweb-edu"),
    (["--minutes=0"], "--minutes=0"),
    (["--minuts=3"], "did you mean 'minutes'?"),
    (["--steps=9"], "--steps=9"),
    (["--plugin=mine.py"], "python -m study"),
    (["--max_iters=40"], "--steps=N"),
    (["--seeds=x"], "--seeds='x'"),
    (["config/best.py"], "--arms=NAME"),
    (["--study=../away"], "plain name"),
])
def test_what_cannot_be_done_is_refused_in_a_line_before_anything_is_made(given, said, place, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = snapshot()
    with pytest.raises(ConfigError) as error:
        go("study.paper", *words(*given))
    assert said in str(error.value) and "\n" not in str(error.value) and snapshot() == before
