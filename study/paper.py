"""The paper's shape on one GPU, in one command: tests, speed, a backbone and arms on it, a report.

    python prepare.py --source=fineweb-edu --tokens=100M    first, once
    python -m study.paper                                   25 minutes, into results/paper
    python -m study.paper --minutes=60 --baseline=DIR       longer, and beside a checkout of nanoGPT
    python -m study.paper --dataset=my_text --seeds=0,1     another text, two seeds
    python -m study.paper config/small.py                   another scale, into results/small

The minutes are a plan: tests and benchmark end when their share of them is over, and training gets as many
steps, up to --steps, as should fit in what is left. What is there already is skipped, so the same command
goes on after an interruption, with the same steps. Scale files and keys are for everything that runs.
"""
import os
import shlex
import subprocess
import sys
import time

import train
from configurator import HERE, ConfigError, configure, exit_on_error
from runs.files import read_json, write_json, write_text
from runs.machine import choose_device
from study.__main__ import parse_seeds, refuse_without_packages, run_words, study_folder
from study.arms import PLAIN, REFERENCES, Arms, is_key, key_of, refuse_words, train_hash
from study.runner import end, project, sigterm_as_exit, tie_to_parent

OPTIONS = dict(
    minutes=25.0,
    steps=2_000,  # of an arm, at most; the backbone gets 1.8 times as many
    seeds="0",
    baseline="",  # the folder of a nanoGPT checkout
    study="one_gpu",  # the runs lie in out/<scale>/<study>
    report="",  # by default results/<scale>
)
SET_HERE = {"max_iters": "--steps=N", "backbone_iters": "--steps=N", "backbone": "python -m study",
            "plugin": "python -m study"}  # what this command sets, and what to use instead
ARMS = [*REFERENCES, "static", *PLAIN, "best"]
TESTS = ["test_routing.py", "tests/test_devices.py", "tests/test_losses.py", "tests/test_model.py"]
BENCH = []  # rows of bench.py, by default all
NOTES = {"bench.md": "speed", "tests.txt": "the tests on this device", "cpu.md": "speed on a CPU"}
PLANNED = 0.8  # of what is left then: not every compilation is timed beforehand
FEWEST = 10  # steps of an arm, and what their number is a multiple of


# -----------------------------------------------------------------------------
# the command line

def parse_words(words):
    """A command line -> (options, words of train.py for everything that runs, the config they make)."""
    for word in words:
        if is_key(word) and key_of(word) in SET_HERE:
            raise ConfigError(f"{word!r}: this command sets {key_of(word)}; use {SET_HERE[key_of(word)]}")
    given = configure(train.configure_run([])[1] | OPTIONS, words)
    options = {key: given[key] for key in OPTIONS}
    words = [w for w in words if not (is_key(w) and key_of(w) in OPTIONS)]
    refuse_words(words)
    if all(map(is_key, words)):
        words = ["config/paper.py", *words]
    if options["minutes"] <= 0:
        raise ConfigError(f"--minutes={options['minutes']} is no time; give more than 0")
    if options["steps"] < FEWEST:
        raise ConfigError(f"--steps={options['steps']} is too few; give {FEWEST} or more")
    parse_seeds(options["seeds"])
    config = train.configure_run(words)[0]
    if choose_device(config["device"]) == "cuda":
        fast = {"device": "--device=cuda", "dtype": "--dtype=bfloat16", "compile": "--compile"}
        words += [word for key, word in fast.items() if key not in map(key_of, words)]
    elif config["device"] != "cpu":
        raise ConfigError("this needs a GPU, and PyTorch finds none; --device=cpu runs it on the CPU, at the "
                          "paper's shape for weeks")
    return options, words, train.configure_run(words)[0]


def refuse_without_data(config):
    name = config["dataset"]
    if train_hash(config) is None and name != "stdlib":  # that one is made by itself
        command = f"python prepare.py --source='my/*.parquet' --name={name}"
        if name == "fineweb-edu":
            command = "python prepare.py --source=fineweb-edu --tokens=100M"
        raise ConfigError(f"{os.path.join('data', name)} does not exist; make it first: {command}")


# -----------------------------------------------------------------------------
# the stages

class Paper:
    """The stages, and in plan.json what is known of them: their seconds, the steps that were chosen."""

    def __init__(self, options, words, config):
        self.options, self.words, self.device = options, words, choose_device(config["device"])
        self.folder = study_folder(options, config)
        self.report = options["report"] or os.path.join("results", config["scale"])
        for folder in (self.folder, self.report):
            os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(self.folder, "plan.json")
        self.plan = read_json(self.path, {"seconds": dict}, f"delete {self.path}") or {"seconds": {}}

    def stage(self, name, command, share, results, folder=None):
        """Run `python command...` for its share of the minutes at most; what it prints becomes the report's
        file `name`, unless that is there already -> did it work? results: the exit codes that say so."""
        path, log = os.path.join(self.report, name), os.path.join(self.folder, f"{name}.log")
        if os.path.exists(path):
            return True
        began, limit, over = time.time(), share * 60 * self.options["minutes"], []
        print(f"{shown(command)}, {limit / 60:.1f} minutes at most (see {log})", flush=True)
        with open(log, "wb") as f:
            process = subprocess.Popen([sys.executable, *command], cwd=folder, stdin=subprocess.DEVNULL,
                                       stdout=f, stderr=subprocess.STDOUT, preexec_fn=tie_to_parent())
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            over = ["", f"Stopped after {limit / 60:.1f} minutes."]
        finally:
            end(process)
        with open(log, encoding="utf-8", errors="replace") as f:
            lines = [line for line in f.read().splitlines() if not line.startswith("{")]  # bench.py's JSON
        if not over and process.returncode not in results:
            print(f"failed: {shown(command)}: {lines[-1:]} (see {log})", file=sys.stderr, flush=True)
            return False
        write_text(path, "\n".join([f"`{shown(command)}`", "", *lines, *over, ""]))
        self.plan["seconds"][name] = time.time() - began
        write_json(self.path, self.plan)
        print(f"wrote {path}", flush=True)
        return True

    def length(self, steps):
        return [f"--max_iters={steps}", "--backbone=backbone", f"--backbone_iters={9 * steps // 5}"]

    def runs(self, steps):
        """{(steps, arm, seed): words of train.py}"""
        arms = Arms([*self.words, *self.length(steps)])
        return {(steps, arm, seed): arms.words(arm, f"--seed={seed}")
                for arm in arms.resolve(",".join(ARMS)) for seed in parse_seeds(self.options["seeds"])}

    def choose_steps(self):
        """The most steps that should fit in the minutes left, and into plan.json with them."""
        if "steps" in self.plan:
            print(f"{self.plan['steps']:,} steps an arm, as was chosen before ({self.path})", flush=True)
            return
        most, minutes = self.options["steps"], self.options["minutes"]
        left = minutes - sum(self.plan["seconds"].values()) / 60
        long, short = self.runs(most), self.runs(most // 2)
        seconds, backbone = project(long | short)
        all_steps = (sum(seconds[run] for run in long) + backbone) / 60
        half = (sum(seconds[run] for run in short) + backbone / 2) / 60
        steps = most
        if all_steps > PLANNED * left:
            steps = int(most - (all_steps - PLANNED * left) / (all_steps - half) * (most - most // 2))
            steps -= steps % FEWEST
        if steps < FEWEST:
            raise ConfigError(f"{left:.1f} of {minutes:g} minutes are left, and {len(long)} runs of "
                              f"{most // 2:,} steps would take {half:.1f}; give more --minutes")
        print(f"{left:.1f} of {minutes:g} minutes are left, {len(long)} runs of {most:,} steps would take "
              f"{all_steps:.1f}, their backbone included: {steps:,} steps each", flush=True)
        self.plan["steps"] = steps
        write_json(self.path, self.plan)

    def study(self):
        """Train the backbone and the arms, and write the report."""
        options = {**self.options, "arms": ",".join(ARMS), "jobs": 1, "report": self.report}
        words = [*self.words, *self.length(self.plan["steps"]),
                 *(f"--{key}={options[key]}" for key in ("arms", "seeds", "study", "jobs", "report"))]
        lines = [f"`{shown(['-m', 'study.paper', *sys.argv[1:]])}`, which trained by", "",
                 f"    {shown(['-m', 'study', *words])}", ""]
        for name, what in NOTES.items():
            if os.path.exists(os.path.join(self.report, name)):
                lines.append(f"- [{name}]({name}): {what}")
        write_text(os.path.join(self.report, "paper.md"), "\n".join([*lines, ""]))
        run_words(words)


def shown(command):
    """The words behind `python`, as they are typed."""
    return shlex.join(["python", *(word.removeprefix(HERE + os.sep) for word in command)])


def main():
    refuse_without_packages()
    options, words, config = parse_words(sys.argv[1:])
    refuse_without_data(config)
    paper = Paper(options, words, config)
    tests = ["-m", "pytest", "-q", "--tb=line", f"--device={paper.device}", *TESTS]
    bench = [os.path.join(HERE, "bench.py"), *words, *BENCH]
    if options["baseline"]:
        bench.append(f"--baseline={options['baseline']}")
    with sigterm_as_exit():
        worked = [paper.stage("tests.txt", tests, 0.2, (0, 1), HERE),  # 1: some tests failed
                  paper.stage("bench.md", bench, 0.4, (0,))]
        paper.choose_steps()
        paper.study()
    if not all(worked):
        raise ConfigError(f"tests or benchmark failed; see {paper.folder}/*.log, and repeat the command")


if __name__ == "__main__":
    exit_on_error(main)
