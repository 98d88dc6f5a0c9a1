"""Arms x seeds, judged: tables, verdicts and pictures.

    python -m study                                        the default arms, seeds 0,1,2, at tiny scale
    python -m study --arms=best,static --seeds=0,1,2,3,4   recipes of config/, lines of config/arms.ini
    python -m study --arms=map                             a set of arms: default, map, paper, all
    python -m study --plugin=my_gate.py --arms=my_gate,static,best    your own gate is an arm by its name
    python -m study config/web.py --max_iters=1200 --study=long       scale files and keys are for every arm
    python -m study --tune                                 instead: the sweep of learning rates, on val
    python -m study --audit                                besides: labels against flips, ceiling, budgets
    python -m study --report=results/tiny                  put the finished runs into that folder's report
    python -m study --report_only                          results/<scale>/ again from its runs.jsonl alone

Runs lie in out/<scale>/<study>/<arm>/seed<k>, the report in out/<scale>/<study>/report. What is finished is
skipped, and the same command goes on after an interruption. The references of an arm come by themselves.
"""
import importlib.util
import os
import sys

import train
from configurator import ConfigError, configure, exit_on_error, load_plugins
from runs.files import write_json
from runs.machine import choose_device
from study.arms import Arms, is_key, key_of, refuse_mixed, refuse_words
from study.measures import PLAIN, measure, references_of
from study.records import finished_records, write_records
from study.runner import run_all
from study.tuning import losses_of_trials, trials

OPTIONS = dict(
    arms="default",  # names of arms or of sets, comma-separated
    seeds="0,1,2",
    study="study",  # the folder: runs of one study are compared, so other lengths or backbones go elsewhere
    jobs=0,  # runs side by side; 0 is one for each core, and one on a GPU
    report="",  # the folder of the report
    report_only=False, tune=False, audit=False)


# -----------------------------------------------------------------------------
# the command line

def parse_words(words):
    """A command line -> (options, the words for train.py, plugins, the config they make)."""
    words, plugins = load_plugins(words)
    defaults = train.configure_run([])[1] | OPTIONS
    refuse_words([w for w in words if not is_key(w) or key_of(w) not in OPTIONS])
    config = configure(defaults, words)
    of_train = [w for w in words if not is_key(w) or key_of(w) not in OPTIONS]
    return {key: config[key] for key in OPTIONS}, of_train, plugins, config


def parse_seeds(text):
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds={text!r} is no list of whole numbers; write --seeds=0,1,2") from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds={text!r} names a seed twice, or a negative one; write --seeds=0,1,2")
    return seeds


def side_by_side(options, config):
    """How many runs at a time, and how many threads each."""
    if options["jobs"] < 0:
        raise ConfigError(f"--jobs={options['jobs']} is negative; give 0 (one for each core) or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = options["jobs"]
    if not jobs:
        jobs = 1 if choose_device(config["device"]) == "cuda" else cores
    return jobs, max(1, cores // jobs)


def study_folder(options, config):
    name = options["study"]
    if not name or name != os.path.basename(name) or name.startswith("."):
        raise ConfigError(f"--study={name!r} is not a plain name; use letters, digits and dashes")
    return os.path.join("out", config["scale"], name)


# -----------------------------------------------------------------------------
# what it does

def run_study(arms, options, folder, jobs):
    """Train what is not finished yet -> (names of the arms, seeds, {out_dir: why it failed})."""
    names, seeds = arms.resolve(options["arms"]), parse_seeds(options["seeds"])
    keep = ["--keep_checkpoints=True"] if options["audit"] else []
    lines = {}
    for seed in seeds:
        for name in names:
            out = os.path.join(folder, name, f"seed{seed}")
            lines[out] = arms.words(name, *keep, f"--seed={seed}", f"--out_dir={out}")
    refuse_mixed(lines)
    return names, seeds, run_all(lines, jobs)


def run_tuning(arms, folder, report, jobs):
    """Train the sweep and write tuning.json -> {out_dir: why it failed}."""
    lines = trials(arms, os.path.join(folder, "tune"))
    refuse_mixed(lines)
    failed = run_all(lines, jobs)
    os.makedirs(report, exist_ok=True)
    losses = losses_of_trials(os.path.join(folder, "tune"))
    write_json(os.path.join(report, "tuning.json"), losses)
    for name, rows in losses.items():
        print(f"{name}: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in rows))
    return failed


def make_report(folder):
    """The folder's README.md and pictures; the map above it where it is one of results/."""
    from study.map import write_map  # matplotlib and scipy are needed from here on only
    from study.report import write_report
    write_report(folder)
    above = os.path.dirname(os.path.normpath(folder))
    if os.path.basename(above) == "results":
        write_map(above)


def print_arms(records, names):
    """The leaderboard lines of the arms that were asked for, over all their seeds."""
    for name in names:
        of_arm = sorted((r for r in records if r["arm"] == name), key=lambda record: record["seed"])
        measures = []
        for record in of_arm:
            own, plain = references_of(record, records)[0], references_of(record, records, PLAIN)[0]
            measures.append(measure(record, own, plain))
        if not measures:
            continue
        seeds = ", ".join(str(r["seed"]) for r in of_arm)
        print(f"{name}: seeds {seeds}: test LM {each(measures, 'test_loss', '.4f')}; "
              f"gap closed {each(measures, 'common_gap_closed', '.0%')}; "
              f"own gap {each(measures, 'gap_closed', '.0%')}; "
              f"dense steps to 75% {each(measures, 'common_cost_to_75', '.0f')}; "
              f"inference FLOPs {measures[0]['inference_ratio']:.3f} of dense")


def each(measures, key, form):
    """A metric of every seed; '-' without references, 'never' for a target that was not reached."""
    texts = []
    for values in measures:
        if key not in values:
            texts.append("-")
        elif values[key] is None:
            texts.append("never")
        else:
            texts.append(format(values[key], form))
    return ", ".join(texts)


def report_alone(folder):
    if not os.path.exists(os.path.join(folder, "runs.jsonl")):
        raise ConfigError(f"{folder}/runs.jsonl does not exist; name a report's folder with --report=FOLDER")
    make_report(folder)


def refuse_without_packages():
    """What a report needs must be there before hours of training, not after them."""
    missing = [name for name in ("matplotlib", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"a study needs {' and '.join(missing)}; run pip install {' '.join(missing)}")


def run_words(words):
    """A study, from the words of its command line."""
    refuse_without_packages()
    options, words, plugins, config = parse_words(words)
    if options["report_only"]:
        return report_alone(options["report"] or os.path.join("results", config["scale"]))
    folder = study_folder(options, config)
    report = options["report"] or os.path.join(folder, "report")
    jobs, threads = side_by_side(options, config)
    if not config["threads"]:
        words.append(f"--threads={threads}")
    arms = Arms(words, plugins)
    if options["tune"]:
        failed = run_tuning(arms, folder, report, jobs)
    else:
        names, seeds, failed = run_study(arms, options, folder, jobs)
        records = finished_records(folder)
        if records:
            write_records(report, records)
            if options["audit"]:
                from study.audit import audit_runs
                audit_runs(folder, names, seeds, report)
            make_report(report)
            print_arms(records, names)
    if failed:
        reasons = "; ".join(f"{out}: {reason}" for out, reason in failed.items())
        raise ConfigError(f"{len(failed)} runs failed: {reasons}")


def main():
    run_words(sys.argv[1:])


if __name__ == "__main__":
    exit_on_error(main)
