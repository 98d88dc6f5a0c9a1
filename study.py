"""The study: arms x seeds, trained side by side, compared, and written up.

    python study.py                                        the default arms, seeds 0,1,2, at tiny scale
    python study.py --arms=best,static --seeds=0,1,2,3,4   recipes of config/ and lines of config/arms.ini
    python study.py --arms=map                             a set: default, paper, map, teacher
    python study.py --plugin=my_gate.py --arms=my_gate,static,best    your own gate is an arm by its name
    python study.py config/web.py --max_iters=1200 --study=long       scale files and keys are for every arm
    python study.py --report=results/tiny                  put the finished runs into that folder's report
    python study.py --report_only                          write results/<scale>/ again from its runs.jsonl

An *arm* is a recipe of config/, or a line of config/arms.ini: a recipe and what it changes. A plugin's gate is
trained as g1_no_utilrank is. The references of an arm, all cheap and all dense, come by themselves.

Runs lie in out/<scale>/<study>/<arm>/seed<k>, their report in out/<scale>/<study>/report. What is finished is
skipped, and the same command goes on after an interruption.
"""
import glob
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from scipy.special import stdtrit

import plots
import train
from configurator import (HERE, PLUGINS, ConfigError, arm_words, configure, did_you_mean, exit_on_error,
                          load_plugins, read_arms, recipes, show_help_if_asked)
from gates import ESTIMATORS, GATES, LABELS, LOSSES
from machine import catch_signals, choose_device, cores
from metrics import DEAD, causal, first_hits, gap_closed
from prepare import load_data
from run import differences, read_json, write_text

DEFAULTS = dict(
    arms="default",  # names of arms or of sets, comma-separated
    seeds="0,1,2",
    study="study",  # the folder of the runs; another length or backbone goes into another
    jobs=0,  # runs side by side; 0: one a core, and one on a GPU
    report="",  # the folder of the report
    report_only=False,
)


# -----------------------------------------------------------------------------
# arms

def both(*endings):
    return [f"{gate}_{ending}" for ending in endings for gate in ("g1", "g3")]


REFERENCES = ["cheap_only", "full_adapter"]
DEFAULT = ["random", "static", *both("no_utilrank", "full_aux"), "best"]
SETS = {  # names for --arms=
    "default": DEFAULT,
    # the paper's claims
    "paper": [*DEFAULT, *both("shuffled", "scaled", "scaled_full_aux", "on_policy"),
              *both("no_utilrank_budget25", "full_aux_budget25"), "static_budget25", "random_budget25",
              "g3_no_jepa", "g3_jepa_025", "g3_jepa_2"],
    # estimator x labels
    "map": [*DEFAULT, "static_distill",
            *both("shuffled", "on_policy", "on_policy_dense", "lambda_01", "distill"),
            *both("scaled", "scaled_full_aux", "scaled_on_policy", "scaled_on_policy_dense"),
            *both("ste", "ste_anchor", "ste_full_aux", "ste_on_policy", "ste_on_policy_dense")],
    # the dense model as the teacher, at half and at a quarter of the tokens
    "teacher": ["random", "static", *both("distill", "distill_dense"), "best", "g3_best", "static_best",
                "distill_labels", "static_distill", "static_distill_muon", "random_distill_muon", "best_budget25",
                "static_best_budget25"]}
# Keys that a study sets itself, and what to use instead.
SET_HERE = {"seed": "--seeds=0,1,2", "out_dir": "--study=NAME", "recipe": "--arms=NAME", "mode": "--arms=NAME",
            "eval_only": "train.py"}


def all_arms():
    """Every arm there is: gates of plugins, recipes that train controllers, and the table."""
    trained = [name for name, config in recipes(train.DEFAULTS).items() if config["mode"] != "full"]
    return [*added_by_plugins(GATES), *trained, *read_arms()]


def added_by_plugins(*registries):
    return [name for registry in registries for name, entry in registry.items()
            if entry.__module__.startswith("plugin_")]


def arm_command(arm, words):
    """The words of train.py that make an arm. words: scale files and keys for every arm, which win over its
    own. A plugin goes only to arms that name something of it: the others are the same runs without."""
    if arm in added_by_plugins(GATES):
        recipe, *changes = [*arm_words("g1_no_utilrank"), f"--gate={arm}", f"--recipe={arm}"]
    else:
        recipe, *changes = arm_words(arm)
    keys = {word.partition("=")[0]: word for word in [*changes, *words] if word.startswith("--")}
    command = [*(word for word in words if not word.startswith("--")), recipe, *keys.values()]
    added = added_by_plugins(GATES, ESTIMATORS, LABELS, LOSSES)
    if any(part.removeprefix("lambda_") in added for word in keys.values() for part in word[2:].split("=")):
        command += [f"--plugin={path}" for path in PLUGINS]
    return command


def references_of(config):
    """The names of the all-cheap and the dense reference that are trained as a config says: to predict what
    the dense model predicts, by Muon, from fitted cheap FFNs. The dense one has no use for the last: it adds
    the cheap FFNs to the full ones."""
    ending = "_distill" * (config["lambda_distill"] > 0) + "_muon" * (config["muon_lr"] > 0)
    fitted = "_fitted" * (config.get("cheap_start") == "fitted")  # a record may be older than the key
    return [f"{REFERENCES[0]}{ending}{fitted}", f"{REFERENCES[1]}{ending}"]


def resolve(text, words):
    """--arms=... -> the names of the arms, each once, behind the references that they need."""
    known, arms = all_arms(), []
    for name in text.split(","):
        if name not in (*known, *SETS):
            raise ConfigError(f"--arms names {name!r}, which is no recipe of config/, no line of config/arms.ini "
                              f"and no gate of a plugin; {did_you_mean(name, [*known, *SETS])}")
        arms += SETS.get(name, [name])
    configs = [train.configure_run(arm_command(arm, words))[0] for arm in arms]
    references = [name for config in configs for name in references_of(config)]
    return list(dict.fromkeys([*REFERENCES, *references, *arms]))


# -----------------------------------------------------------------------------
# runs side by side

def unfinished(commands):
    """Those of {folder: words of train.py} that are still to do. A folder with another run in it is refused."""
    todo = {}
    for folder, words in commands.items():
        config, defaults, _ = train.configure_run(words)
        held = read_json(os.path.join(folder, "config.json"))
        if held and not config["overwrite"]:
            plugins = PLUGINS if any(word.startswith("--plugin=") for word in words) else {}
            asked = {"config": config, "plugins": plugins}
            changed = differences(held, asked, defaults, but={"device", "dtype"})
            if changed:
                raise ConfigError(f"{folder} holds a run with another config: {', '.join(changed[:4])}; give this "
                                  "study another --study=NAME, or run all of it again with --overwrite")
        if config["overwrite"] or not os.path.exists(os.path.join(folder, "summary.json")):
            todo[folder] = words
    return todo


def run_all(commands, jobs):
    """Run train.py for each of {folder: words} that is not finished, so many at a time -> {folder: the last
    line of its output} of those that failed. SIGTERM and Ctrl-C are passed on, so that the runs save."""
    todo = unfinished(commands)
    print(f"{len(commands)} runs, {len(todo)} to do, {jobs} at a time", flush=True)
    waiting, running, done, failed = list(todo), {}, 0, {}
    began, caught = time.time(), catch_signals()
    while (waiting or running) and not caught:
        # The first makes text and backbone for all. It has both when its log is there.
        ready = any(os.path.exists(os.path.join(folder, "log.jsonl")) for folder in commands)
        if failed and not ready:
            break  # what the first could not make, no other can
        while waiting and len(running) < (jobs if ready else 1):
            folder = waiting.pop(0)
            running[folder] = start(folder, todo[folder])
        time.sleep(0.1)
        for folder in [folder for folder, process in running.items() if process.poll() is not None]:
            if running.pop(folder).returncode:
                failed[folder] = last_line(folder)
                print(f"failed: {folder}: {failed[folder]}", flush=True)
            else:
                done += 1
                left = (time.time() - began) / done * (len(todo) - len(failed) - done)
                print(f"{done} of {len(todo)}: {folder} finished, {left / 60:.0f} minutes left", flush=True)
    if caught:
        print(f"stopping: {len(running)} runs finish their step and save", flush=True)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        sys.exit(128 + caught[0])
    return failed


def start(folder, words):
    """train.py in a process of its own; what it prints goes to stdout.txt in its folder."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "stdout.txt"), "w", encoding="utf-8") as f:
        return subprocess.Popen([sys.executable, os.path.join(HERE, "train.py"), *words],
                                stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT)


def last_line(folder):
    with open(os.path.join(folder, "stdout.txt"), encoding="utf-8", errors="replace") as f:
        return (f.read().strip().splitlines() or ["it printed nothing"])[-1]


# -----------------------------------------------------------------------------
# records: what a report needs of a run, one line of runs.jsonl each

# Runs that differ in one of these meet in no table. The text and the backbone count by their hashes.
GROUP_KEYS = ("scale", "max_iters", "batch_size", "gradient_accumulation_steps", "block_size", "cheap_rank",
              "controlled", "backbone_seed")
# What tells the arms of a group apart, and every lambda.
ARM_KEYS = ("gate", "mode", "estimator", "budget", "budget_fall", "layer_spread", "cheap_start", "oracle",
            "label_target", "label_layers", "label_share", "gate_lr", "learning_rate", "muon_lr", "g1_hidden", "latent")
LOGGED_POINTS = 30  # of a run's logged steps


def group_key(held):
    """What a run must share with those that it is compared with, by its config.json."""
    config = held["config"]
    return {key: config[key] for key in GROUP_KEYS} | {
        "data": held["data"]["train"][:12], "backbone": held["backbone"]["weights"][:12],
        "backbone_name": os.path.basename(config["backbone"])}


def make_record(folder):
    """The record of a finished run."""
    held, summary = (read_json(os.path.join(folder, name)) for name in ("config.json", "summary.json"))
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
        log = [json.loads(line) for line in f]
    config = held["config"]
    steps = [r for r in log if "losses" in r]
    record = {"arm": config["recipe"], "seed": config["seed"], "group": group_key(held),
              "config": {key: config[key] for key in config if key in ARM_KEYS or key.startswith("lambda_")},
              "machine": summary["machine"], "commit": held["git_commit"][:7], "seconds": summary["seconds"],
              "flops": summary["flops"], "val": causal(summary["val"])["loss"], "test": {}, "evaluations": [],
              "predictor": [predictor(r) for r in log if r.get("health")], "logged": logged(steps)}
    for mode, result in summary["test"].items():
        record["test"][mode] = {key: result[key] for key in ("loss", "kl", "agreement")}
    for evaluation in summary["evaluations"]:
        step = evaluation.pop("step")
        record["evaluations"].append([step, causal(evaluation)["loss"]])
    if config["mode"] == "topk":
        record["realised"] = statistics.fmean(summary["test"]["threshold"]["budget"])
    gradients = [s["grad_norm"]["scores"] for s in steps if "scores" in s["grad_norm"]]
    if gradients:
        record["score_gradient"] = statistics.median(gradients)
    return rounded(record, 6)


def predictor(entry):
    """[step, mean R^2 over action-blind, mean effective rank, share of collapsed layers]."""
    layers = entry["health"].values()
    return [entry["step"], *(statistics.fmean(layer[key] for layer in layers)
                             for key in ("r2_action_blind", "effective_rank", "collapsed"))]


def logged(steps):
    """Some of the logged steps, the last among them: a list for each thing."""
    steps = steps[::-1][::math.ceil(len(steps) / LOGGED_POINTS) or 1][::-1]
    columns = {"step": [s["step"] for s in steps]}
    if "scores" in steps[-1]:
        columns["score_mean"] = [statistics.fmean(s["scores"]["mean"]) for s in steps]
        columns["slope"] = [min(s["scores"]["slope"]) for s in steps]  # of the layer that is nearest to death
        columns["score_gradient"] = [s["grad_norm"]["scores"] for s in steps]
    if "label_correlation" in steps[-1]:
        columns["label_correlation"] = [s["label_correlation"] for s in steps]
    return rounded(columns, 3)


def rounded(value, digits):
    """Every float to so many significant digits, through dicts and lists."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(v, digits) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return value


def finished_records(folder):
    """The records of the finished runs <folder>/<arm>/seed<k>."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*", "seed*", "summary.json")))
    return [make_record(os.path.dirname(path)) for path in paths]


def read_records(folder):
    path = os.path.join(folder, "runs.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write_records(folder, records):
    """Put records into <folder>/runs.jsonl; one of the same group, arm and seed is replaced."""
    os.makedirs(folder, exist_ok=True)
    by_run = {(json.dumps(r["group"], sort_keys=True), r["arm"], r["seed"]): r
              for r in [*read_records(folder), *records]}
    lines = [json.dumps(by_run[run], separators=(",", ":")) + "\n" for run in sorted(by_run)]
    write_text(os.path.join(folder, "runs.jsonl"), "".join(lines))


# -----------------------------------------------------------------------------
# measures

class Group:
    """Runs that may be compared, and what is measured of each."""

    def __init__(self, records):
        self.key = records[0]["group"]
        self.title = group_title(self.key)
        self.runs = {(r["arm"], r["seed"]): r for r in sorted(records, key=lambda r: (r["arm"], r["seed"]))}
        self.arms = {}  # arm -> its seeds
        for arm, seed in self.runs:
            self.arms.setdefault(arm, []).append(seed)
        self.measures = {run: measure(record, self.runs) for run, record in self.runs.items()}

    def values(self, arm, metric):
        """{seed: value} of an arm that has the metric; of a pair of arms the difference."""
        if isinstance(arm, tuple):
            first, second = (self.values(one, metric) for one in arm)
            return {seed: first[seed] - second[seed] for seed in first if seed in second}
        measures = {seed: self.measures[arm, seed] for seed in self.arms.get(arm, [])}
        return {seed: measures[seed][metric] for seed in measures if metric in measures[seed]}

    def records(self, arm):
        return [self.runs[arm, seed] for seed in self.arms[arm]]


def group_title(key):
    """What tells the groups of a scale apart, in words."""
    words = [f"{key['max_iters']:,} steps"]
    words += ["quick backbone"] * (key["backbone_name"] == "backbone")
    words += [f"backbone seed {key['backbone_seed']}"] * (key["backbone_seed"] > 0)
    return ", ".join(words)


def read_groups(folder):
    """The groups of runs.jsonl; those on a backbone that was trained to the end come first."""
    by_key = {}
    for record in read_records(folder):
        by_key.setdefault(json.dumps(record["group"], sort_keys=True), []).append(record)
    groups = [Group(records) for _, records in sorted(by_key.items())]
    groups.sort(key=lambda group: (group.key["backbone_name"] == "backbone", group.key["backbone_seed"],
                                   group.key["max_iters"]))
    for i, group in enumerate(groups):
        for other in groups[:i]:
            if group.title == other.title:  # then what tells them apart is another key, such as a hash
                group.title += ", " + next(f"{k} {v}" for k, v in group.key.items() if v != other.key[k])
    return groups


def measure(record, runs):
    """{metric: number} of a record. runs {(arm, seed): record}: its group, where its references are. A metric
    that does not apply is absent. A hit that never came, and its cost, are None: later than any step."""
    flops, steps = record["flops"], record["group"]["max_iters"]
    curve = [(step, loss) for step, loss in record["evaluations"] if step > 0]
    losses = [loss for _, loss in curve]
    early = [loss for step, loss in curve if step <= steps / 2]
    test = causal(record["test"])
    values = {"test_loss": test["loss"], "val_loss": record["val"], "best_loss": min(losses),
              "average_loss": statistics.fmean(losses), "early_average_loss": statistics.fmean(early or losses),
              **flops}
    values |= {key: test[key] for key in ("kl", "agreement") if key in test}
    values |= {key: record[key] for key in ("realised", "score_gradient") if key in record}
    if record["predictor"]:
        values |= dict(zip(("r2_action_blind", "effective_rank", "collapsed"), record["predictor"][-1][1:]))
    # gap and hits are against the plain references, own_gap and own_hits against those that are trained alike.
    for prefix, names in (("", REFERENCES), ("own_", references_of(record["config"]))):
        pair = [runs.get((name, record["seed"])) for name in names]
        if not all(pair):
            continue
        values[f"{prefix}gap"] = gap_closed(test["loss"], *(causal(r["test"])["loss"] for r in pair))
        hits = first_hits(curve, *(r["evaluations"][-1][1] for r in pair))
        values |= {f"{prefix}hit_{round(100 * level)}": step for level, step in hits.items()}
    if "hit_75" in values:
        hit = values["hit_75"]
        values["cost_to_75"] = None if hit is None else hit * flops["train_ratio"]
    return values


# -----------------------------------------------------------------------------
# claims, each as contrasts: (metric, A, B, the sign that A - B should have; 0: no difference). A name is that
# under ste_norm, * stands for g1 and for g3, and a pair of arms for the difference of its two values.

class Claim(NamedTuple):
    text: str
    readings: tuple  # the estimators under which it is judged
    contrasts: list


ALL, ONE, AS_NAMED = ("ste_norm", "scaled", "ste"), ("ste_norm",), ("-",)
GAIN, STE_GAIN = ("*_no_utilrank", "*_full_aux"), ("*_ste", "*_ste_full_aux")  # without labels, with labels
EARLY = [("early_average_loss", "g3_full_aux", "g1_full_aux", -1),
         ("own_hit_50", "g3_full_aux", "g1_full_aux", -1)]
CLAIMS = {
    "C1": Claim("Under full aux G3 is ahead of G1 early to mid training: lower average LM, faster hits, about "
                "10.3x lower gradient norms. At the end both are within 0.005.", ALL, [
        *EARLY, ("average_loss", "g3_full_aux", "g1_full_aux", -1),
        ("score_gradient", "g3_full_aux", "g1_full_aux", -1), ("test_loss", "g3_full_aux", "g1_full_aux", 0)]),
    "C2": Claim("Removing util and rank improves best LM, average LM and the speed of hits, for both gates.",
                ALL, [
        (metric, *GAIN, -1) for metric in ("best_loss", "average_loss", "own_hit_50", "test_loss")]),
    "C3": Claim("G3's early lead over G1 is there with util and rank, and disappears without.", ALL, [
        *EARLY, ("early_average_loss", "g3_no_utilrank", "g1_no_utilrank", 0),
        ("own_hit_50", "g3_no_utilrank", "g1_no_utilrank", 0)]),
    "C4": Claim("Removing util and rank cuts the training FLOPs (the paper's forward proxy: from 1.53x to "
                "1.07x).", ALL, [("forward_proxy", *GAIN, -1), ("train_ratio", *GAIN, -1)]),
    "C5": Claim("Without the JEPA loss the predictor collapses.", ONE, [
        ("r2_action_blind", "g3_no_jepa", "g3_full_aux", -1),
        ("effective_rank", "g3_no_jepa", "g3_full_aux", -1), ("collapsed", "g3_no_jepa", "g3_full_aux", 1)]),
    "C6": Claim("Results are insensitive to lambda_jepa in {0.25, 1, 2}.", ONE, [
        ("test_loss", "g3_jepa_025", "g3_full_aux", 0), ("test_loss", "g3_jepa_2", "g3_full_aux", 0)]),
    "C7": Claim("The off-policy label mismatches what gated execution rewards. Our test: on-policy labels do "
                "better.", ALL, [
        ("test_loss", "*_on_policy", "*_full_aux", -1), ("average_loss", "*_on_policy", "*_full_aux", -1)]),
    "C8": Claim("At a 25% budget the sign of G3 over G1 turns: ahead early at 50%, behind at 25%.", ONE, [
        EARLY[0], ("early_average_loss", "g3_full_aux_budget25", "g1_full_aux_budget25", 1),
        ("test_loss", "g3_full_aux_budget25", "g1_full_aux_budget25", 1)]),
    "H0": Claim("A learned gate beats a static choice of whole layers at the same budget, trained alike.", ALL, [
        ("test_loss", arm, "static", -1) for arm in GAIN]),
    "H0, distilled": Claim("The same where both are trained by distillation.", ONE, [
        ("test_loss", arm, "static_distill", -1) for arm in ("*_distill", "*_distill_dense")]),
    "H0, labels": Claim("The same of `distill_labels`.", ONE,
                        [("test_loss", "distill_labels", "static_distill_muon", -1)]),
    "H0, best": Claim("The same of `best`.", ONE, [("test_loss", "best", "static_best", -1)]),
    "H0, 25%": Claim("The same at a quarter of the tokens.", ONE, [
        ("test_loss", "*_no_utilrank_budget25", "static_budget25", -1),
        ("test_loss", "*_full_aux_budget25", "static_budget25", -1),
        ("test_loss", "distill_labels_budget25", "static_distill_muon_budget25", -1)]),
    "H1": Claim("Labels gain most where the gate is dead without them: more under `ste` than under `ste_norm`, "
                "under `scaled`, and under `ste` with the anchor.", AS_NAMED, [
        ("test_loss", STE_GAIN, GAIN, 1), ("test_loss", STE_GAIN, ("*_scaled", "*_scaled_full_aux"), 1),
        ("test_loss", ("g1_ste", "g1_ste_full_aux"), ("g1_ste_anchor", "g1_ste_anchor_full_aux"), 1)]),
    "H2": Claim("On-policy labels against the dense model's distribution beat those against the next token.",
                ALL, [
        ("test_loss", "*_on_policy_dense", "*_on_policy", -1)]),
    "H3": Claim("Labels at lambda 0.1 are better than at 1, and better than none.", ONE, [
        ("test_loss", "*_lambda_01", "*_full_aux", -1), ("test_loss", "*_lambda_01", "*_no_utilrank", -1)]),
    "H4": Claim("Under `ste` the anchor, without labels, gives more than half of what labels gain.", AS_NAMED, [
        ("test_loss", "*_ste", "*_ste_anchor", 1),
        ("test_loss", ("*_ste", "*_ste_anchor"), ("*_ste_anchor", "*_ste_full_aux"), 1)]),
    "H5": Claim("It is what labels say that helps: shuffled within a row they are worse, and no better than "
                "none.", ONE, [
        ("test_loss", "*_full_aux", "*_shuffled", -1), ("test_loss", "*_shuffled", "*_no_utilrank", 0)]),
    "H6": Claim("Distillation helps learned gates more than it helps `static`.", AS_NAMED, [
        ("test_loss", ("*_no_utilrank", "*_distill"), ("static", "static_distill"), 1)]),
}
MARGIN = 0.005  # of a loss, where no difference is claimed: the paper's
FACTS = ("forward_proxy", "train_ratio")  # counted, not measured: there is no verdict on them
RULE = f"""A contrast is A - B, paired by seed, with its mean and 95% t-interval. Where a sign is claimed it *agrees*
or *disagrees* if all seeds have one sign and the interval excludes 0; else it is *undecided*. Where no difference
is claimed it *agrees* if the interval lies within +-{MARGIN} for a loss, or within one evaluation for a hit. One
seed decides nothing. Losses are under causal `threshold` routing; test is read once, at the end of a run. *Early*
is the first half of the steps. A *hit* is the first evaluation with so much of the own gap closed. One that never
came counts as one at twice the steps. A hit is known to one evaluation only, so the standard deviation of its
differences is taken as no less than what this rounding makes, the steps between evaluations / sqrt 6. FLOPs are
counted and have no verdict. A claim *agrees* if all its contrasts do, *disagrees* if some do and none agrees, is
*mixed* if some agree and some disagree, else it is *undecided*. The paper does not name its estimator: its claims
are judged under `ste_norm` and under `scaled`, with `ste` beside them."""


class Row(NamedTuple):
    """A contrast that was run."""
    metric: str
    a: str | tuple
    b: str | tuple
    sign: int
    values: tuple  # ([A of each seed], [B of each seed]); None: never
    differences: list
    interval: tuple | None
    verdict: str


def named(arm, gate, reading):
    """("*_full_aux", "g1", "scaled") -> "g1_scaled_full_aux", as in config/arms.ini."""
    if isinstance(arm, tuple):
        return tuple(named(one, gate, reading) for one in arm)
    arm = arm.replace("*", gate)
    if reading in ("scaled", "ste") and arm.startswith(("g1_", "g3_")):
        return f"{arm[:2]}_{reading}{arm[2:]}".removesuffix("_no_utilrank")
    return arm


def compare(group, metric, a, b, sign):
    """A contrast over the seeds that have both sides -> Row, or None."""
    held = group.values(a, metric), group.values(b, metric)
    values = tuple([side[seed] for seed in held[0] if seed in held[1]] for side in held)
    if not values[0]:
        return None
    never = 2 * group.key["max_iters"]
    differences = [(never if x is None else x) - (never if y is None else y) for x, y in zip(*values)]
    margin, deviation = MARGIN, 0.0
    if "hit" in metric:
        steps = [step for step, _ in next(iter(group.runs.values()))["evaluations"]]
        margin = max(after - before for before, after in zip(steps, steps[1:]))
        deviation = margin / math.sqrt(6)  # of a difference of two numbers that are rounded so
    interval, verdict = judge(differences, sign, margin, deviation)
    return Row(metric, a, b, sign, values, differences, interval, "fact" if metric in FACTS else verdict)


def judge(differences, sign, margin=MARGIN, least_deviation=0.0):
    """Paired differences -> (their 95% t-interval, the verdict by RULE)."""
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return None, "undecided"
    deviation = max(statistics.stdev(differences), least_deviation)
    half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)  # Student's t
    low, high = mean - half, mean + half
    if sign == 0 and -margin <= low and high <= margin:
        return (low, high), "agree"
    if (min(differences) > 0 and low > 0) or (max(differences) < 0 and high < 0):
        return (low, high), "agree" if sign * mean > 0 else "disagree"
    return (low, high), "undecided"


def rows_of(group, claim, reading):
    """The contrasts of a claim that the group has run -> [Row]; none where one of them was run for no gate."""
    rows = []
    for metric, a, b, sign in claim.contrasts:
        gates = ("g1", "g3") if "*" in str((a, b)) else ("",)
        of_gates = [compare(group, metric, named(a, g, reading), named(b, g, reading), sign) for g in gates]
        if not any(of_gates):
            return []
        rows += [row for row in of_gates if row]
    return rows


def verdict_of(rows):
    """The verdict of a claim by those of its contrasts."""
    verdicts = {row.verdict for row in rows}
    if len(verdicts) == 1:
        return verdicts.pop()
    if "disagree" in verdicts:
        return "mixed" if "agree" in verdicts else "disagree"
    return "undecided"


# -----------------------------------------------------------------------------
# a page: results/<scale>/README.md

LEADERBOARD = ["arm", "budget", "test LM: mean (each seed)", "val LM", "gap closed", "own gap", "KL", "agreement",
               "realised budget", "cost to 75%", "a step / a dense step", "inference FLOPs / dense", "seeds"]
CONTRASTS = ["claim", "reading", "metric", "claimed: A, B", "A, each seed", "B, each seed", "A - B, each seed",
             "mean, 95% interval", "verdict"]
HOW_TO_READ = """*LM* is the loss under causal `threshold` routing. *Gap closed*, and the cost to 75% of it in steps
of the dense model, are against `cheap_only` (0%) and `full_adapter` (100%). The *own gap* is against references that
are trained as the arm is. *KL* and *agreement* are with the dense model."""


def table(head, rows):
    """Markdown; a column with nothing but "-" is left out."""
    columns = [i for i in range(len(head)) if any(row[i] != "-" for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in columns) + " |" for line in lines)


def numbers(values, form=".4f"):
    return " ".join("never" if value is None else format(value, form) for value in values)


def mean_text(values, form):
    """The mean over seeds; what never came is counted, not averaged."""
    reached = [value for value in values if value is not None]
    if not reached:
        return "never" if values else "-"
    missed = len(values) - len(reached)
    return format(statistics.fmean(reached), form) + f" (never in {missed} of {len(values)})" * (missed > 0)


def leaderboard_line(group, arm):
    def mean(metric, form):
        return mean_text(group.values(arm, metric).values(), form)
    config = group.records(arm)[0]["config"]
    losses = numbers(group.values(arm, "test_loss").values())
    return [f"`{arm}`", f"{config['budget']:.0%}" if config["mode"] == "topk" else "-",
            f"{mean('test_loss', '.4f')} ({losses})", mean("val_loss", ".4f"), mean("gap", ".1%"),
            mean("own_gap", ".1%"), mean("kl", ".3f"), mean("agreement", ".1%"), mean("realised", ".3f"),
            mean("cost_to_75", ".1f"), mean("train_ratio", ".3f"), mean("inference_ratio", ".3f"),
            " ".join(map(str, group.arms[arm]))]


def leaderboard(group):
    """One line an arm, the best first; other budgets than half come after."""
    def order(arm):
        other_budget = group.records(arm)[0]["config"]["budget"] != 0.5
        return other_budget, statistics.fmean(group.values(arm, "test_loss").values())
    text = table(LEADERBOARD, [leaderboard_line(group, arm) for arm in sorted(group.arms, key=order)])
    dead = [f"`{arm}` seed {seed}" for (arm, seed), record in group.runs.items()
            if record["logged"].get("slope", [1])[-1] < DEAD]
    return text + f"\n\nDead gates (p (1 - p) under {DEAD} in a layer at the end): {', '.join(dead) or 'none'}."


def contrast_line(name, reading, row):
    form = ".0f" if "hit" in row.metric else ".4f"
    a, b = (" - ".join(side) if isinstance(side, tuple) else side for side in (row.a, row.b))
    cells = [name, reading, row.metric, f"`{a}` {'=><'[row.sign]} `{b}`"]
    if row.verdict == "fact":
        (first, *_), (second, *_) = row.values
        return [*cells, f"{first:.4f}", f"{second:.4f}", "-", "-", f"B / A = {second / first:.2f}"]
    interval = "-"
    if row.interval:
        low, high = row.interval
        interval = f"{statistics.fmean(row.differences):+{form}} [{low:+{form}}, {high:+{form}}]"
    return [*cells, *(numbers(side, form) for side in row.values), numbers(row.differences, "+" + form), interval,
            f"**{row.verdict}**"]


def contrasts(group):
    lines, looked_at = [], set()
    for name, claim in CLAIMS.items():
        for reading in claim.readings:
            rows = rows_of(group, claim, reading)
            lines += [contrast_line(name, reading, row) for row in rows]
            looked_at |= {(row.metric, row.a, row.b) for row in rows if row.verdict != "fact"}
    if not lines:
        return ""
    return (f"### Contrasts\n\n{len(looked_at)} contrasts were looked at. Where nothing differs, one interval in "
            f"twenty excludes 0 all the same.\n\n{table(CONTRASTS, lines)}")


def pictures(group, folder, main):
    """Write a group's pictures -> lines of the page. main: it is the first; the others get their curves alone."""
    usual = [*DEFAULT, "distill_labels", *added_by_plugins(GATES)]
    curved = [arm for arm in group.arms if not arm.startswith(("cheap_only", "random"))]  # far above the others
    if len(curved) > 10:
        curved = [arm for arm in curved if arm in (*usual, "full_adapter")]
    wanted = [("curves", "Validation loss, one line a seed", {arm: group.records(arm) for arm in curved})]
    if main:
        gaps = {arm: list(group.values(arm, "gap").values()) for arm in group.arms if group.values(arm, "gap")}
        gated = [arm for arm in group.arms if arm in (*usual[2:], *both("scaled", "ste"))]
        wanted += [("gap_closed", "Gap closed on test, one dot a seed", gaps),
                   ("gates", "Inside the gates, one line a seed", {arm: group.records(arm) for arm in gated})]
    lines = []
    for kind, caption, arms in wanted:
        if arms:
            name = f"{kind}_{re.sub(r'[^0-9A-Za-z]+', '_', group.title.replace(',', ''))}.png"
            getattr(plots, kind)(os.path.join(folder, name), arms)
            lines.append(f"![{caption}]({name})")
    return lines


def group_section(group, folder, main):
    key = group.key
    rows = key["batch_size"] * key["gradient_accumulation_steps"]
    about = (f"{len(group.runs)} runs. A step is {rows} rows of {key['block_size']} tokens, "
             f"{key['max_iters'] * rows * key['block_size']:,} tokens a run. Backbone `{key['backbone_name']}` seed "
             f"{key['backbone_seed']} ({key['backbone']}), training text {key['data']}, cheap rank "
             f"{key['cheap_rank']}, controlled layers {key['controlled']}.")
    return [f"## {group.title}", about, leaderboard(group), *pictures(group, folder, main), contrasts(group)]


def write_page(folder):
    """Make <folder>/README.md and its pictures from runs.jsonl, and from the tried.md and audit.md beside it."""
    groups = read_groups(folder)
    if not groups:
        raise ConfigError(f"{folder}/runs.jsonl does not exist; name a report's folder with --report=FOLDER")
    records = [record for group in groups for record in group.runs.values()]
    scale, hours = groups[0].key["scale"], sum(record["seconds"] for record in records) / 3600
    machines, file = sorted({record["machine"] for record in records}), f"config/{scale}.py " * (scale != "tiny")
    page = [f"# Results at scale `{scale}`",
            f"{len(records)} runs, {hours:.1f} hours of training, on {'; '.join(machines)}. Every number comes from "
            f"`runs.jsonl`, one line a run; `python study.py {file}--report_only` writes this page again. A line of "
            "your own takes `python study.py --plugin=my_gate.py --arms=my_gate`.", HOW_TO_READ]
    if os.path.exists(os.path.join(folder, "audit.md")):
        page.append("[audit.md](audit.md): what labels say of single flips, what a perfect gate would reach, "
                    "other budgets.")
    for group in groups:
        page += group_section(group, folder, main=group is groups[0])
    page += [text_beside(folder, "tried.md"), "## The claims and the rule", claims_text(), RULE]
    write_pieces(os.path.join(folder, "README.md"), page)


def text_beside(folder, name):
    """A text that is written by hand, or nothing."""
    if not os.path.exists(os.path.join(folder, name)):
        return ""
    with open(os.path.join(folder, name), encoding="utf-8") as f:
        return f.read().strip()


def claims_text():
    return "\n".join(f"- **{name}**: {claim.text}" for name, claim in CLAIMS.items())


def write_pieces(path, pieces):
    write_text(path, "\n\n".join(piece for piece in pieces if piece) + "\n")
    print(f"wrote {path}")


# -----------------------------------------------------------------------------
# the map: results/README.md

def write_map(results):
    """Make <results>/README.md: claims x groups, over every folder with runs; notes.md is written by hand."""
    folders = sorted(map(os.path.dirname, glob.glob(os.path.join(glob.escape(results), "*", "runs.jsonl"))))
    groups = [group for folder in folders for group in read_groups(folder)]
    lines = []
    for name, claim in CLAIMS.items():
        for reading in claim.readings:
            cells = [map_cell(rows_of(group, claim, reading)) for group in groups]
            if any(cell != "-" for cell in cells):
                lines.append([name, reading, *cells])
    links = ", ".join(f"[{name}]({name}/README.md)" for name in map(os.path.basename, folders))
    head = ["claim", "reading", *(f"`{group.key['scale']}`, {group.title}" for group in groups)]
    about = ("A column is a regime: runs that may be compared. A row is a claim under one estimator. A cell "
             "is the verdict on several contrasts, with the number of seeds in brackets, or how many times fewer "
             f"FLOPs. Each contrast with every seed: {links}.")
    write_pieces(os.path.join(results, "README.md"),
                 ["# The map: where the claims hold",
                  "C1 to C8 are the paper's claims, the others are ours. Each stands in full at the end.",
                  text_beside(results, "notes.md"), "## The cells", about, table(head, lines), claims_text(), RULE])


def map_cell(rows):
    if not rows:
        return "-"
    if verdict_of(rows) == "fact":
        return " ".join(f"{row.a[:2].upper()} {row.values[1][0] / row.values[0][0]:.2f}x" for row in rows
                        if row.metric == "train_ratio")
    counts = sorted({len(row.differences) for row in rows})
    return f"{verdict_of(rows)} ({counts[0]}" + f" to {counts[-1]}" * (len(counts) > 1) + ")"


# -----------------------------------------------------------------------------
# the script

def parse_words(words):
    """The words of a command line -> (options, words of train.py for every arm, the config that they make)."""
    words = load_plugins(words)
    config, given = configure(train.configure_run([])[1] | DEFAULTS, words)
    for key in sorted(given & SET_HERE.keys()):
        raise ConfigError(f"a study sets {key} itself; use {SET_HERE[key]}")
    if config["jobs"] < 0:
        raise ConfigError(f"--jobs={config['jobs']} is negative; give 0, for one a core, or more")
    words = [word for word in words if word[2:].partition("=")[0] not in DEFAULTS]
    # Unless a scale or a word says otherwise, a study is on a backbone that was trained to the end, its runs are
    # twice as long as a single one's, and they are evaluated ten times.
    steps = config["max_iters"] if "max_iters" in given else 300
    own = {"backbone": "backbone_long", "max_iters": steps, "eval_interval": max(1, steps // 10)}
    words += [f"--{key}={value}" for key, value in own.items() if key not in given]
    return {key: config[key] for key in DEFAULTS}, words, config


def parse_seeds(text):
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds={text!r} is no list of different numbers; write --seeds=0,1,2")
    return [int(seed) for seed in seeds]


def print_lines(folder, arms):
    """The leaderboard's lines of the arms that were asked for."""
    for group in read_groups(folder):
        for arm in [arm for arm in arms if arm in group.arms]:
            cells = zip(LEADERBOARD, leaderboard_line(group, arm))
            print("; ".join(f"{name} {cell}" for name, cell in cells if cell != "-"))


def make_report(folder):
    write_page(folder)
    above = os.path.dirname(os.path.normpath(folder))
    if os.path.basename(above) == "results":
        write_map(above)


def main():
    show_help_if_asked(sys.argv[1:], __file__)
    options, words, config = parse_words(sys.argv[1:])
    if options["report_only"]:
        return make_report(options["report"] or os.path.join("results", config["scale"]))
    if os.path.isdir(os.path.join("data", config["dataset"])):
        if "test" not in load_data(config["dataset"], config["block_size"])[0]:
            raise ConfigError(f"data/{config['dataset']} has no test split, by which a study judges; make it again "
                              "with prepare.py")
    jobs = options["jobs"] or (1 if choose_device(config["device"]) == "cuda" else cores())
    if not config["threads"]:
        words.append(f"--threads={max(1, cores() // jobs)}")
    folder = os.path.join("out", config["scale"], options["study"])
    report = options["report"] or os.path.join(folder, "report")
    arms, commands = resolve(options["arms"], words), {}
    for seed in parse_seeds(options["seeds"]):
        for arm in arms:
            path = os.path.join(folder, arm, f"seed{seed}")
            commands[path] = arm_command(arm, [*words, f"--seed={seed}", f"--out_dir={path}"])
    failed = run_all(commands, jobs)
    records = finished_records(folder)
    if records:
        write_records(report, records)
        make_report(report)
        print_lines(report, arms)
    if failed:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in failed.items())
        raise ConfigError(f"{len(failed)} of {len(commands)} runs failed: {reasons}")


if __name__ == "__main__":
    exit_on_error(main)
