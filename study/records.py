"""What a report needs of each finished run, in one line of runs.jsonl.

A record is made from a run's config.json, summary.json and log.jsonl, and needs none of them afterwards.
Records whose `group` differs (steps, batch, data, backbone, cheap rank) are never compared.
"""
import glob
import json
import math
import os
import re
import statistics
import sys

from configurator import ConfigError
from metrics import causal
from runs.files import read_json, write_text
from study.measures import group_of, measure

CONFIG_FIELDS = {"recipe": str, "scale": str, "mode": str, "seed": int, "max_iters": int, "batch_size": int,
                 "gradient_accumulation_steps": int, "block_size": int, "cheap_rank": int, "controlled": list,
                 "data": dict, "identity": str, "backbone": str, "backbone_seed": int, "gate": str}
SUMMARY_FIELDS = {"val_loss": dict, "test_loss": dict, "realised_budget": dict, "evaluations": list,
                  "flops": dict, "seconds": float, "identity": str, "dense_test_loss": float,
                  "dense_val_loss": float, "layer_budgets": list, "dead_layers": list, "parameters": int,
                  "trained_parameters": int}
RECORD_FIELDS = {"arm": str, "seed": int, "group": dict, "config": dict, "test_loss": dict, "val_loss": dict,
                 "realised_budget": dict, "flops": dict, "seconds": (int, float), "evaluations": list,
                 "health": list, "logged": dict}
GROUP_KEYS = ("scale", "max_iters", "batch_size", "gradient_accumulation_steps", "block_size", "cheap_rank",
              "controlled", "identity", "backbone", "backbone_seed")
# Of a run's config, what tells arms of one group apart.
ARM_KEYS = ("gate", "mode", "estimator", "budget", "share_step", "oracle", "label_target", "label_layers",
            "label_share", "gate_lr", "learning_rate", "muon_lr", "g1_hidden", "latent")
SUMMARY_KEYS = ("parameters", "trained_parameters", "test_loss", "val_loss", "dense_test_loss",
                "dense_val_loss", "realised_budget", "layer_budgets", "flops", "seconds", "dead_layers")
LOGGED_POINTS = 100  # of a run's logged steps, at most: a long run's record stays small
WRONG = (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration)  # of a file's content


def warn(text):
    print(f"left out: {text}", file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# a run's folder -> a record

def read_run(folder):
    """The record of a finished run; None where it is not finished. Raises ConfigError that names the file."""
    summary = read_json(os.path.join(folder, "summary.json"), SUMMARY_FIELDS)
    if summary is None:
        return None
    config = read_json(os.path.join(folder, "config.json"), CONFIG_FIELDS)
    if config is None:
        raise ConfigError(f"{folder} has a summary.json and no config.json; run it again with --overwrite")
    if not summary["test_loss"]:
        raise ConfigError(f"{folder}: data/{config.get('dataset')} has no test split, which a study reads "
                          "once, at the end; make one with prepare.py")
    try:
        record = rounded(make_record(config, summary, read_log(folder)))
        measure(record, (None, None))
        return record
    except WRONG as error:
        raise ConfigError(f"{folder} holds a broken run ({type(error).__name__}: {error}); run it again with "
                          "--overwrite") from None


def read_log(folder):
    path = os.path.join(folder, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); run that run again with --overwrite") from None
    log = []
    for number, line in enumerate(lines, 1):
        try:
            log.append(json.loads(line))
        except (ValueError, RecursionError):
            raise ConfigError(f"{path}:{number} is no JSON; run that run again with --overwrite") from None
        if not isinstance(log[-1], dict):
            raise ConfigError(f"{path}:{number} is no JSON object; run that run again with --overwrite")
    return log


def make_record(config, summary, log):
    group = {key: config[key] for key in GROUP_KEYS} | {"data": config["data"]["train"][:12]}
    lambdas = [key for key in config if key.startswith("lambda_")]
    settings = {key: config[key] for key in (*ARM_KEYS, *sorted(lambdas))}
    settings["plugin"] = [os.path.basename(path) for path in config.get("plugin", [])]
    record = {"arm": config["recipe"], "seed": config["seed"], "group": group, "config": settings,
              "machine": summary.get("machine", ""), "commit": config.get("git_commit", "")}
    record |= {key: summary[key] for key in SUMMARY_KEYS}
    record["evaluations"] = [evaluation(e) for e in summary["evaluations"]]
    record["health"] = [health(r) for r in log if r.get("health")]
    record["logged"] = logged([r for r in log if "grad_norm" in r])
    return record


def evaluation(entry):
    losses = {mode: loss for mode, loss in entry.items() if mode != "step"}
    return [entry["step"], causal(losses), losses.get("topk")]


def health(entry):
    """[step, mean R^2 over action-blind, mean effective rank, share of collapsed layers] of predictors."""
    layers = list(entry["health"].values())
    means = [sum(layer[key] for layer in layers) / len(layers)
             for key in ("r2_action_blind", "effective_rank", "collapsed")]
    return [entry["step"], *means]


def logged(steps):
    """The logged steps as one list for each thing that was logged."""
    stride = math.ceil(len(steps) / LOGGED_POINTS) or 1
    steps = steps[::-1][::stride][::-1]  # the last one stays
    if not steps:
        return {}
    columns = {"step": [s["step"] for s in steps],
               "losses": {name: [s["losses"][name] for s in steps] for name in steps[0]["losses"]}}
    norms = {"score_gradient": "scores", "gate_gradient": "gate",
             "gate_gradient_without_jepa": "gate_without_jepa"}
    for name, key in norms.items():
        values = [s["grad_norm"].get(key, 0) for s in steps]
        if any(values):
            columns[name] = values
    if all("scores" in s for s in steps):
        columns["score_mean"] = [statistics.fmean(s["scores"]["mean"]) for s in steps]
        columns["score_std"] = [statistics.fmean(s["scores"]["std"]) for s in steps]
        columns["slope"] = [s["scores"]["slope"] for s in steps]
    if all("label_correlation" in s for s in steps):
        columns["label_correlation"] = [s["label_correlation"] for s in steps]
    return columns


def rounded(value):
    """Every float to 6 significant digits, through dicts and lists."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"it holds the number {value}")
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return value


def run_folders(folder):
    """[(arm, seed, path)] of what lies in <folder>/<arm>/seed<k>; a copy such as seed0.bak is no run."""
    runs = []
    for path in glob.glob(os.path.join(glob.escape(folder), "*", "seed*")):
        seed = re.fullmatch(r"seed(\d+)", os.path.basename(path))
        if seed and os.path.isdir(path):
            runs.append((os.path.basename(os.path.dirname(path)), int(seed[1]), path))
    return sorted(runs)


def finished_records(folder):
    """The records of all finished runs in <folder>/<arm>/seed<k>. A broken one is named and left out."""
    records = []
    for arm, seed, path in run_folders(folder):
        try:
            record = read_run(path)
            if record and (record["arm"], record["seed"]) != (arm, seed):
                raise ConfigError(f"{path} holds the run {record['arm']} seed {record['seed']}; move it to a "
                                  "folder of that name")
        except ConfigError as error:
            warn(error)
            continue
        if record:
            records.append(record)
    return records


# -----------------------------------------------------------------------------
# runs.jsonl

def parse_record(line, where):
    """A line of runs.jsonl -> its record, which can be measured. Raises ConfigError that names `where`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON ({error}); mend or delete that line") from None
    for name, kind in RECORD_FIELDS.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise ConfigError(f"{where} is no record of a run ({name} is missing or of another type); mend "
                              "or delete that line")
    try:
        measure(record, (None, None))
    except WRONG as error:
        raise ConfigError(f"{where} is no record of a run ({type(error).__name__}: {error}); mend or delete "
                          "that line") from None
    return record


def read_records(folder, strict=False):
    """The records in <folder>/runs.jsonl, none where there is no such file. A broken line is named and left
    out; strict raises ConfigError instead."""
    path = os.path.join(folder, "runs.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.readlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); put back its last version") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parse_record(line, f"{path}:{number}"))
        except ConfigError as error:
            if strict:
                raise
            warn(error)
    return records


def record_id(record):
    return group_of(record), record["arm"], record["seed"]


def write_records(folder, records):
    """Add records to <folder>/runs.jsonl; one of the same group, arm and seed is replaced."""
    os.makedirs(folder, exist_ok=True)
    held = {record_id(r): r for r in read_records(folder, strict=True)}
    held |= {record_id(r): r for r in records}
    lines = [json.dumps(held[key], separators=(",", ":")) + "\n" for key in sorted(held)]
    write_text(os.path.join(folder, "runs.jsonl"), "".join(lines))
