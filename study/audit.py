"""Questions to finished runs.

labels    do the labels, and the scores that learn from them, say what flipping a token does?
ceiling   what would a perfect gate reach with these cheap FFNs?
curves    what does one checkpoint lose at other budgets?

    python -m study.audit out/tiny/study/best/seed0                           all three, of one run or several
    python -m study.audit --checkpoint=ckpt-30.pt out/tiny/study/best/seed0   if train.py --keep_checkpoints
"""
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch

from configurator import ConfigError, configure, exit_on_error, load_plugin
from gates import (GATES, LABELS, TARGETS, Context, Step, forced_branches, full_tokens, on_policy_label,
                   topk_mask)
from metrics import evaluate, set_budget, spearman
from prepare import eval_batch
from runs.files import read_json, write_json
from runs.folder import CONFIG_FIELDS, read_summary
from runs.run import calibration_rows, load_run
from study.measures import group_title

OPTIONS = dict(checkpoint="ckpt.pt", rows=16, positions=24, ceiling_rows=64)
BUDGETS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
SUFFIXES = {"routed": "topk", "full": "full"}  # how the layers after a flip run -> the mode
TOKENS_AT_ONCE = 8192  # of the ceiling's rows, because a label pass holds both branches
SEEDS = {"labels": 2, "ceiling": 3, "curves": 1}  # of how many seeds a study asks each question
# Pairs of quantities that differ in one thing; {} is the target. What gated execution rewards is
# `flip_routed_later`: one token flipped, the later layers re-routed, its own and all later losses counted.
FACTORS = {
    "policy": ("flip_full_own_{}", "flip_routed_own_{}"),
    "single flip": ("on_policy_{}", "flip_routed_own_{}"),
    "later losses": ("flip_routed_own_{}", "flip_routed_later_{}"),
}


def load_gated(folder, checkpoint, **overrides):
    """load_run of a run that routes; others are refused."""
    loaded = load_run(folder, overrides, checkpoint)
    mode = loaded[1]["mode"]
    if mode != "topk":
        raise ConfigError(f"{folder} has no gates (its mode is {mode!r}); name a run that routes")
    return loaded


def val_rows(data, config, rows, machine):
    """`rows` evenly spaced rows of validation text, fewer where there are fewer."""
    return eval_batch(data["val"], {**config, "batch_size": rows}, 1).to(machine.device)


@torch.no_grad()
def steps_by_target(model, config, batch):
    """{label target: the Step whose labels are against it}, of one batch."""
    context = Context(batch.tokens, batch.row_seeds)
    dense, _ = model.run(model.embed(context), "full", context)
    steps = {}
    for target in TARGETS:
        steps[target] = Step(model, {**config, "label_target": target}, context, batch.targets, dense=dense)
    return steps


# -----------------------------------------------------------------------------
# labels

@torch.no_grad()
def exact_labels(model, context, layer, positions, mode, references):
    """What flipping one token at a layer does, the other tokens of the layer as routed and the layers after
    it under `mode`: loss(cheap) - loss(full). Two forward passes a position, so for small samples only.

    references {name: tokens (B, T) or a stream (B, T, D)}: what the losses are against.
    -> {name: (B, P, 2)}: the loss of the flipped token itself, and the sum of this and all later ones."""
    x, routes = model.run(model.embed(context), "topk", context, end=layer + 1, keep={layer})
    cheap, full = forced_branches(model, routes[-1])  # (B, T, D) each
    flips = {name: [] for name in references}
    for t in positions:
        branches = []
        for forced in (cheap, full):
            branch = x.clone()
            branch[:, t] = forced[:, t]
            branches.append(branch)
        streams, _ = model.run(torch.cat(branches), mode, context.twice(), first=layer + 1)  # (2B, T, D)
        for name, reference in references.items():
            loss_cheap, loss_full = model.token_losses(streams.chunk(2), reference)
            difference = loss_cheap - loss_full  # (B, T)
            flips[name].append(torch.stack([difference[:, t], difference[:, t:].sum(1)], dim=1))
    return {name: torch.stack(values, dim=1) for name, values in flips.items()}


def label_audit(folder, checkpoint="ckpt.pt", rows=16, positions=24):
    """{layer: {name: Spearman's rho}}, over sampled positions of a row, the mean of the rows. A name is
    `scores ~ flip_routed_later_dense` or `on_policy_next ~ flip_full_own_next`, say: the scores or a label
    against an exact flip; or one of FACTORS with its target.

    The rows are of validation text, the positions the same in every row and layer. In float32: a flip moves
    little."""
    model, config, data, _, machine = load_gated(folder, checkpoint, dtype="float32")
    batch = val_rows(data, config, rows, machine)
    steps = steps_by_target(model, config, batch)
    shuffled = np.random.default_rng(0).permutation(batch.tokens.size(1))
    sampled = sorted(shuffled[:positions].tolist())
    return {layer: correlations(*quantities(model, steps, layer, sampled)) for layer in config["controlled"]}


@torch.no_grad()
def quantities(model, steps, layer, positions):
    """-> {name: (B, P)} of the scores and the labels of a layer, and the same of its exact flips."""
    context = next(iter(steps.values())).context
    _, routes = model.run(model.embed(context), "topk", context, end=layer + 1, keep={layer})
    taught = {"scores": routes[-1].scores[:, positions]}
    for oracle, label in LABELS.items():
        for target, step in steps.items():
            taught[f"{oracle}_{target}"] = label(step, routes[-1])[:, positions]
    references = {target: TARGETS[target](step) for target, step in steps.items()}
    flips = {}
    for suffix, mode in SUFFIXES.items():
        exact = exact_labels(model, context, layer, positions, mode, references)
        for target, values in exact.items():
            flips[f"flip_{suffix}_own_{target}"] = values[:, :, 0]
            flips[f"flip_{suffix}_later_{target}"] = values[:, :, 1]
    return taught, flips


def correlations(taught, flips):
    """{name: Spearman's rho} of each of `taught` with each of `flips`, and of the pairs in FACTORS."""
    pairs = {f"{a} ~ {b}": (taught[a], flips[b]) for a in taught for b in flips}
    values = taught | flips
    for factor, (a, b) in FACTORS.items():
        for target in TARGETS:
            pairs[f"{factor} ({target})"] = values[a.format(target)], values[b.format(target)]
    pairs["target"] = flips["flip_routed_later_next"], flips["flip_routed_later_dense"]
    return {name: round(spearman(a, b).item(), 4) for name, (a, b) in pairs.items()}


# -----------------------------------------------------------------------------
# the ceiling

def ceiling(folder, checkpoint="ckpt.pt", rows=64):
    """The loss on validation rows, not causal, when each controlled layer routes by its on-policy label
    instead of its gate: `dense_label` is what a perfect gate would reach, `next_label` what one would that
    has seen the answer. Beside it the loss under the gate (topk) and that of the frozen dense model, and
    Spearman's rho of the scores with either label, under the gate's own routing, the mean over layers."""
    model, config, data, _, machine = load_gated(folder, checkpoint, dtype="float32")
    batch = val_rows(data, config, rows, machine)
    n, size = len(batch.tokens), max(1, TOKENS_AT_ONCE // batch.tokens.size(1))
    result = {"rows": n, "gate": 0.0, "dense_label": 0.0, "next_label": 0.0, "dense_model": 0.0,
              "rho_dense": 0.0, "rho_next": 0.0}
    for i in range(0, n, size):
        some = batch.rows(slice(i, i + size))
        for name, value in ceiling_of_rows(model, steps_by_target(model, config, some)).items():
            result[name] += value * len(some.tokens) / n
    return result


@torch.no_grad()
def ceiling_of_rows(model, steps):
    context, targets, dense = steps["next"].context, steps["next"].targets, steps["next"].dense
    gate, routes = model.run(model.embed(context), "topk", context, keep=model.config.controlled)
    streams = {"gate": gate, "dense_model": dense}
    result = {}
    for target in ("dense", "next"):
        step = steps[target]
        streams[f"{target}_label"] = route_by_label(model, step)
        correlation = [spearman(route.scores, on_policy_label(step, route)) for route in routes]
        result[f"rho_{target}"] = (sum(correlation) / len(correlation)).item()
    losses = model.token_losses(list(streams.values()), targets)
    return result | {name: loss.mean().item() for name, loss in zip(streams, losses)}


@torch.no_grad()
def route_by_label(model, step):
    """The stream (B, T, D) after the last layer when every controlled layer, from below, takes the tokens
    whose on-policy label is largest. A layer's label sees the layers before it as labels have routed them,
    and the layers after it as the gates route. The weight is the estimator's, of the gate's scores."""
    x = model.embed(step.context)
    for block in model.h:
        x, route = block(x, "topk", step.context, keep=True)
        if route is None:
            continue
        label = on_policy_label(step, route)  # (B, T)
        mask = topk_mask(label, full_tokens(block.budget, label.size(1)))
        y, _ = block.masked(route.h, route.scores, mask, want_outcomes=False)
        x = route.x + y
    return x


# -----------------------------------------------------------------------------
# other budgets

@torch.no_grad()
def budget_curve(folder, checkpoint="ckpt.pt"):
    """[[budget, validation loss under threshold, realised budget]] of one checkpoint, calibrated at each."""
    model, config, data, _, machine = load_gated(folder, checkpoint)
    calibration = calibration_rows(data, config, final=True).to(machine.device)
    context = Context(calibration.tokens, calibration.row_seeds)
    val = eval_batch(data["val"], config, config["final_eval_iters"])
    blocks = [model.h[i] for i in config["controlled"]]
    trained = [block.budget for block in blocks]
    curve = []
    for budget in BUDGETS:
        for block, share in zip(blocks, trained):  # set_budget scales what is there
            block.budget = share
        set_budget(model, budget)
        with machine.autocast():
            model.calibrate(context)
        loss, realised = evaluate(model, val, "threshold", machine)
        curve.append([budget, loss, sum(realised) / len(realised)])
    return curve


# -----------------------------------------------------------------------------
# the runs of a study

QUESTIONS = {"labels": label_audit, "ceiling": ceiling, "curves": budget_curve}


class Entry(NamedTuple):
    """One entry of audit.json: which question, the name of the entry, and what is asked."""
    question: str
    name: str
    folder: str
    checkpoint: str = "ckpt.pt"


def audit_runs(folder, arms, seeds, report_folder):
    """Ask the QUESTIONS of the finished runs <folder>/<arm>/seed<k> and add the answers to audit.json in
    report_folder, which is written whole after each. What is there already is not asked again."""
    os.makedirs(report_folder, exist_ok=True)
    path = os.path.join(report_folder, "audit.json")
    answers = read_json(path, dict.fromkeys(QUESTIONS, dict)) or {question: {} for question in QUESTIONS}
    wanted = [entry for arm in arms for entry in entries_of_arm(folder, arm, seeds)]
    missing = [entry for entry in wanted if entry.name not in answers[entry.question]]
    print(f"{len(missing)} of {len(wanted)} audits to do: {path}", flush=True)
    began = time.time()
    for done, entry in enumerate(missing, start=1):
        try:
            answer = QUESTIONS[entry.question](entry.folder, entry.checkpoint)
        except ConfigError as error:
            print(f"{entry.question} of {entry.name} left out: {error}", flush=True)
            continue
        answers[entry.question][entry.name] = answer
        write_json(path, answers)
        left = (time.time() - began) / done * (len(missing) - done)
        print(f"audit {done}/{len(missing)}: {entry.question} of {entry.name}, about {left // 60:.0f}:"
              f"{left % 60:02.0f} left", flush=True)
    return answers


def entries_of_arm(folder, arm, seeds):
    entries = []
    for place, seed in enumerate(seeds):
        asked = [question for question in QUESTIONS if place < SEEDS[question]]
        run = os.path.join(folder, arm, f"seed{seed}")
        try:
            entries += entries_of_run(run, f"{arm} seed {seed}", asked)
        except ConfigError as error:
            print(f"{run} left out of the audit: {error}", flush=True)
    return entries


def entries_of_run(run, name, asked):
    """The entries of one run: none of a run without gates or one that is not finished; of a gate that does
    not learn only the curve. Labels are asked at the first evaluation, where it left a checkpoint, and at the
    end."""
    fields = {**CONFIG_FIELDS, "gate": str, "eval_interval": int, "backbone": str, "backbone_seed": int}
    config = read_json(os.path.join(run, "config.json"), fields)
    if config is None or config["mode"] != "topk" or read_summary(run) is None:
        return []
    for plugin in config["plugin"]:
        load_plugin(plugin)
    name = f"{name}, {group_title(config)}"
    first, last = config["eval_interval"], config["max_iters"]
    entries = []
    if GATES.get_or_refuse(config["gate"]).learned:
        if "labels" in asked:
            if first < last and os.path.exists(os.path.join(run, f"ckpt-{first}.pt")):
                entries.append(Entry("labels", f"{name}, at step {first}", run, f"ckpt-{first}.pt"))
            entries.append(Entry("labels", name, run))
        if "ceiling" in asked:
            entries.append(Entry("ceiling", name, run))
    if "curves" in asked:
        entries.append(Entry("curves", name, run))
    return entries


# -----------------------------------------------------------------------------
# alone

def check_options(options):
    least = {"rows": 1, "positions": 2, "ceiling_rows": 1}  # a rank correlation takes two positions
    for key, smallest in least.items():
        if options[key] < smallest:
            raise ConfigError(f"--{key}={options[key]} is too few; give {smallest} or more")


def print_audit(folder, checkpoint, rows, positions, ceiling_rows):
    labels = label_audit(folder, checkpoint, rows, positions)
    print(f"{folder}, {checkpoint}: Spearman's rho in layers {', '.join(map(str, labels))}")
    for name in next(iter(labels.values())):
        print(f"  {name:43s}" + " ".join(f"{layer[name]:+.3f}" for layer in labels.values()))
    print(f"the ceiling, losses on {ceiling_rows} validation rows, not causal:")
    for name, value in ceiling(folder, checkpoint, ceiling_rows).items():
        print(f"  {name:12s} {value:.5g}")
    print("budget, val loss under threshold, realised budget:")
    for budget, loss, realised in budget_curve(folder, checkpoint):
        print(f"  {budget:.2f} {loss:.4f} {realised:.3f}", flush=True)


def main():
    words = [word for word in sys.argv[1:] if word.startswith("--")]
    folders = [word for word in sys.argv[1:] if not word.startswith("--")]
    options = configure(OPTIONS, words)
    check_options(options)
    if not folders:
        raise ConfigError("name the folder of a run, such as out/tiny/study/best/seed0")
    for folder in folders:
        print_audit(folder, **options)


if __name__ == "__main__":
    exit_on_error(main)
