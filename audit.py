"""Questions to finished runs.

labels    do the labels, and the scores that learn from them, say what flipping one token does?
ceiling   what would a perfect gate reach with these cheap FFNs?
budgets   what does one checkpoint lose at other budgets?
serving   the same, with the speed of decoding beside it; asked only by name, and alone on the machine

    python audit.py out/tiny/study/best/seed0                     the first three, of one run or of several
    python audit.py RUN RUN --report=results/tiny                 and put the answers into that folder's audit.md
    python audit.py RUN --ask=labels --layers=[1,14,28] --rows=2 --positions=4     a small sample of a large model
    python audit.py --report=results/tiny                         write audit.md again from its audit.json

Labels take two forward passes for each layer, position and way to go on, the ceiling four label passes a layer.
"""
import os
import statistics
import sys
import time

import numpy as np
import torch

import plots
from configurator import ConfigError, configure, exit_on_error, show_help_if_asked
from gates import LABELS, Context, Trace, forced_branches, full_tokens, topk_mask
from metrics import evaluate, ledger, progress, slices_of, spearman
from prepare import eval_batch
from run import data_of_run, load_run, read_json, recalibrate, write_json
from sample import generate
from study import group_key, group_title, table, write_pieces

DEFAULTS = dict(
    ask="labels,ceiling,budgets",
    checkpoint="ckpt.pt",  # another, such as ckpt-30.pt, if train.py had --keep_checkpoints
    layers=[],  # of labels: all controlled ones
    rows=16, positions=24,  # of labels: rows of validation text, and positions that are flipped in each
    ceiling_rows=64,
    budgets=[0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0],
    prompt=64, decoded=64, repeat=5,  # of serving: tokens read and tokens written; medians of so many
    report="",  # the folder of audit.json and audit.md; what stands there is not asked again
    threads=0,
)
TARGETS = ("next", "dense")
SUFFIXES = {"routed": "topk", "full": "full"}  # how the layers after a flip run -> the mode
TOKENS_AT_ONCE = 2 ** 13  # of the ceiling's rows: a label pass holds both branches
# Pairs of quantities that differ in one thing; {} is the target. What gated execution rewards is flip_routed_later:
# one token flipped, the later layers re-routed, its own and all later losses counted.
TRUTH = "flip_routed_later_{}"
FACTORS = {"later layers full": ("flip_full_own_{}", "flip_routed_own_{}"),
           "all flipped": ("on_policy_{}", "flip_routed_own_{}"),
           "own loss alone": ("flip_routed_own_{}", TRUTH)}


def load(folder, options, **machine):
    """-> (model, config, the data's splits, checkpoint, machine) of a run."""
    model, checkpoint, machine = load_run(folder, {"threads": options["threads"], **machine}, options["checkpoint"])
    config = checkpoint["record"]["config"]
    return model, config, data_of_run(folder, checkpoint["record"]), checkpoint, machine


def val_rows(data, config, rows, machine):
    """Evenly spaced rows of validation text."""
    return eval_batch(data["val"], {**config, "batch_size": rows}, 1).to(machine.device)


@torch.no_grad()
def traces_of(model, config, batch):
    """{target: the Trace whose labels are against it}, of one batch."""
    context = Context(batch.tokens, batch.row_seeds)
    dense_x, _ = model.run(model.embed(context), "full", context)
    return {target: Trace(model, {**config, "label_target": target}, context, batch.targets, dense_x=dense_x)
            for target in TARGETS}


def label_of(oracle, trace, route):
    return LABELS[oracle]()(trace, route)  # (B, T)


# -----------------------------------------------------------------------------
# labels

@torch.no_grad()
def exact_labels(model, context, layer, positions, mode, references):
    """What flipping one token at a layer does, the other tokens of the layer as routed and the layers after it
    under `mode`: loss(cheap) - loss(full). Two forward passes a position, so for small samples only.

    references {name: tokens (B, T) or a stream (B, T, D)}: what the losses are against.
    -> {name: (B, P, 2)}: the loss of the flipped token itself, and the sum of this and all later ones."""
    x, routes = model.run(model.embed(context), "topk", context, end=layer + 1, keep={layer})
    forced = forced_branches(model, routes[-1])  # full and cheap, (B, T, D) each
    flips = {name: [] for name in references}
    for t in positions:
        branches = []
        for branch in forced:
            flipped = x.clone()
            flipped[:, t] = branch[:, t]
            branches.append(flipped)
        streams, _ = model.run(torch.cat(branches), mode, context.twice(), first=layer + 1)  # (2B, T, D)
        for name, reference in references.items():
            loss_full, loss_cheap = model.token_losses(streams.chunk(2), reference)
            difference = loss_cheap - loss_full  # (B, T)
            flips[name].append(torch.stack([difference[:, t], difference[:, t:].sum(1)], dim=1))
    return {name: torch.stack(values, dim=1) for name, values in flips.items()}


def label_audit(folder, options):
    """{pair: [Spearman's rho in each layer]} over sampled positions of a row, the mean of the rows. A pair is
    `scores ~ TRUTH` or a label ~ TRUTH, against either target; or one of FACTORS. The positions are the same
    in every row and layer. In float32, because a flip moves little."""
    model, config, data, _, machine = load(folder, options, dtype="float32")
    batch = val_rows(data, config, options["rows"], machine)
    traces = traces_of(model, config, batch)
    shuffled = np.random.default_rng(0).permutation(batch.tokens.size(1))
    positions = sorted(shuffled[:options["positions"]].tolist())
    layers = options["layers"] or config["controlled"]
    if not set(layers) <= set(config["controlled"]):
        raise ConfigError(f"--layers={layers}: name controlled layers, some of {config['controlled']}")
    found = {}
    for layer in progress(layers, f"{folder}: flips, layer"):
        for pair, (a, b) in pairs_of(*quantities(model, traces, layer, positions)).items():
            found.setdefault(pair, []).append(round(spearman(a, b).item(), 3))
    return found


@torch.no_grad()
def quantities(model, traces, layer, positions):
    """-> {name: (B, P)} of the scores and the labels of a layer, and the same of its exact flips."""
    context, config = traces["next"].context, traces["next"].config
    _, routes = model.run(model.embed(context), "topk", context, end=layer + 1, keep={layer})
    taught = {"scores": routes[-1].scores[:, positions]}
    for oracle in sorted({"off_policy", "on_policy", config["oracle"]}):
        for target, trace in traces.items():
            taught[f"{oracle}_{target}"] = label_of(oracle, trace, routes[-1])[:, positions]
    references = {"next": traces["next"].targets, "dense": traces["next"].dense_x}
    flips = {}
    for suffix, mode in SUFFIXES.items():
        for target, values in exact_labels(model, context, layer, positions, mode, references).items():
            flips[f"flip_{suffix}_own_{target}"], flips[f"flip_{suffix}_later_{target}"] = values.unbind(2)
    return taught, flips


def pairs_of(taught, flips):
    """{pair: two of the quantities}, see label_audit. A label is compared with flips against its own target."""
    pairs, values = {}, taught | flips
    for target in TARGETS:
        truth = flips[TRUTH.format(target)]
        pairs |= {f"{name} ~ flip {target}": (taught[name], truth) for name in taught
                  if name == "scores" or name.endswith(target)}
        pairs |= {f"{factor} ({target})": (values[a.format(target)], values[b.format(target)])
                  for factor, (a, b) in FACTORS.items()}
    pairs["next or dense"] = flips[TRUTH.format("next")], flips[TRUTH.format("dense")]
    return pairs


# -----------------------------------------------------------------------------
# the ceiling

def ceiling(folder, options):
    """The loss on validation rows, not causal, when each controlled layer routes by its on-policy label instead
    of its gate: `dense_label` is what a perfect gate would reach, `next_label` what one would that has seen the
    answer. Beside it the loss under the gate (topk) and that of the dense model, and Spearman's rho of the scores
    with either label under the gate's own routing, the mean over layers."""
    model, config, data, _, machine = load(folder, options, dtype="float32")
    batch = val_rows(data, config, options["ceiling_rows"], machine)
    n, result = len(batch.tokens), {}
    for part in progress(slices_of(batch, TOKENS_AT_ONCE), f"{folder}: rows for the ceiling"):
        for name, value in ceiling_of_rows(model, traces_of(model, config, part)).items():
            result[name] = result.get(name, 0.0) + value * len(part.tokens) / n
    return {"rows": n} | {name: float(f"{value:.5g}") for name, value in result.items()}


@torch.no_grad()
def ceiling_of_rows(model, traces):
    context, targets = traces["next"].context, traces["next"].targets
    gate, routes = model.run(model.embed(context), "topk", context, keep=model.config.controlled)
    streams, rho = {"gate": gate, "dense_model": traces["next"].dense_x}, {}
    for target, trace in traces.items():
        streams[f"{target}_label"] = route_by_label(model, trace)
        rho[f"rho_{target}"] = statistics.fmean(
            spearman(route.scores, label_of("on_policy", trace, route)).item() for route in routes)
    losses = model.token_losses(list(streams.values()), targets)
    return {name: loss.mean().item() for name, loss in zip(streams, losses)} | rho


@torch.no_grad()
def route_by_label(model, trace):
    """The stream (B, T, D) after the last layer when every controlled layer, from below, takes the tokens whose
    on-policy label is largest. A layer's label sees the layers before it as labels have routed them, and those
    after it as the gates route. The weight is the estimator's, of the gate's scores."""
    x, rotation = model.embed(trace.context), model.rotation_of(trace.context)
    for block in model.h:
        x, route = block(x, "topk", trace.context, rotation, keep=True)
        if route is None:
            continue
        label = label_of("on_policy", trace, route)  # (B, T)
        mask = topk_mask(label, full_tokens(block.budget, label.size(1)))
        y, _ = block.masked(route.h, route.scores, mask)
        x = route.x + y
    return x


# -----------------------------------------------------------------------------
# other budgets

def budget_curve(folder, options):
    """[{"budget", "realised", "loss", "kl", "agreement", "inference_ratio"}] of one checkpoint on validation text
    under threshold, calibrated at each budget."""
    return list(budget_points(folder, options, *load(folder, options)))


def budget_points(folder, options, model, config, data, checkpoint, machine):
    """Yield the points of budget_curve, each while the model is calibrated at its budget."""
    val = eval_batch(data["val"], config, config["final_eval_iters"])
    for budget in progress(options["budgets"], f"{folder}: budgets"):
        recalibrate(model, folder, checkpoint, machine, budget)
        result = evaluate(model, val, ["threshold"], machine)["threshold"]
        point = {"realised": statistics.fmean(result["budget"]), "loss": result["loss"], "kl": result["kl"],
                 "agreement": result["agreement"], "inference_ratio": ledger(model, config)["inference_ratio"]}
        yield {"budget": budget} | {name: float(f"{value:.5g}") for name, value in point.items()}


def serving(folder, options):
    """The points of budget_curve with "tokens_per_s", the speed of decoding behind a KV cache, and a last point, of
    budget None, for the dense model. All are timed in turn, and medians are taken."""
    loaded = load(folder, options)
    model, config, data, _, machine = loaded
    curve, thresholds = [], []
    for point in budget_points(folder, options, *loaded):
        curve.append(point)
        thresholds.append({layer: model.h[layer].threshold.clone() for layer in config["controlled"]})
    val = eval_batch(data["val"], config, config["final_eval_iters"])
    dense = evaluate(model, val, ["full"], machine)["full"]
    curve.append({"budget": None, "realised": 1.0, "loss": dense["loss"], "kl": 0.0, "agreement": 1.0,
                  "inference_ratio": 1.0})
    prompt = val_rows(data, config, 1, machine).tokens[:, :options["prompt"]]  # (1, prompt)
    seconds = [[] for _ in curve]
    for _ in progress(range(options["repeat"]), f"{folder}: decoding, round"):
        for taken, setting in zip(seconds, [*thresholds, None]):
            for layer, threshold in (setting or {}).items():
                model.h[layer].threshold.copy_(threshold)
            taken.append(decoding_seconds(model, prompt, options["decoded"], "threshold" if setting else "full"))
    for point, taken in zip(curve, seconds):
        point["tokens_per_s"] = float(f"{options['decoded'] / statistics.median(taken):.4g}")
    return curve


def decoding_seconds(model, prompt, decoded, mode):
    """The seconds that `decoded` tokens take after a prompt (1, n)."""
    generator = torch.Generator(prompt.device).manual_seed(0)
    for i, _ in enumerate(generate(model, prompt, decoded, mode, generator=generator)):
        if i == prompt.size(1) - 1:  # the prompt has been read
            began = time.perf_counter()
    return time.perf_counter() - began


# -----------------------------------------------------------------------------
# audit.md

LABELS_ARE = """Spearman's rho, the mean over layers, of the scores and of each label with an exact flip: one token of
a layer flipped, the later layers routed anew, its own and all later losses counted, against the token that came
(`next`) or the dense model's prediction (`dense`). Then of two quantities that differ in one thing: do the later
layers run full, are all tokens flipped, is the token's own loss alone counted, and what is the loss against."""
CEILING_IS = """Validation loss, not causal, when each layer in turn routes by its on-policy label instead of its
gate: what a perfect gate would reach with these cheap FFNs. The `dense` label is a function of the context, so a
gate could know it; the `next` label has seen the answer. rho: the gate's scores with either label."""
BUDGETS_ARE = """Validation loss under `threshold`, calibrated at each budget. In brackets, where they were measured,
the KL from the dense model and how often both find the same token likeliest."""
SERVING = ["run", "budget", "tokens/s", "inference FLOPs / dense", "val LM", "KL", "agreement"]
SERVING_IS = """One checkpoint of each run under `threshold`, calibrated at each budget: validation loss, KL from the
dense model and agreement with it, against the speed of decoding behind a KV cache. Medians, timed in turn with the
dense model."""


def write_audit(folder):
    """Make <folder>/audit.md and its pictures from audit.json."""
    answers, page = read_json(os.path.join(folder, "audit.json")) or {}, ["# Questions to finished runs"]
    if answers.get("labels"):
        pairs = list(next(iter(answers["labels"].values())))
        rows = [[pair, *(f"{statistics.fmean(found[pair]):+.2f}" if pair in found else "-"
                         for found in answers["labels"].values())] for pair in pairs]
        page += ["## Label audit", LABELS_ARE, table(["", *answers["labels"]], rows)]
    if answers.get("ceiling"):
        names = list(next(iter(answers["ceiling"].values())))
        rows = [[run, str(found["rows"]), *(f"{found[name]:.4f}" for name in names[1:])]
                for run, found in answers["ceiling"].items()]
        page += ["## The ceiling", CEILING_IS, table(["run", *names], rows)]
    if answers.get("budgets"):
        budgets = sorted({point["budget"] for curve in answers["budgets"].values() for point in curve})
        rows = []
        for run, curve in answers["budgets"].items():
            points = {point["budget"]: point for point in curve}
            rows.append([run, *(budget_cell(points.get(budget)) for budget in budgets)])
        plots.budget_curves(os.path.join(folder, "budget_curves.png"), answers["budgets"])
        head = ["run", *(f"{budget:.0%}" for budget in budgets)]
        page += ["## One checkpoint at other budgets", BUDGETS_ARE, table(head, rows),
                 "![other budgets](budget_curves.png)"]
    if answers.get("serving"):
        plots.serving(os.path.join(folder, "serving.png"), answers["serving"])
        rows = [serving_line(run, point) for run, points in answers["serving"].items() for point in points]
        page += ["## Quality against speed", SERVING_IS, table(SERVING, rows),
                 "![quality against speed](serving.png)"]
    write_pieces(os.path.join(folder, "audit.md"), page)


def serving_line(run, point):
    dense = point["budget"] is None
    name, budget = ("the dense model beside it", "-") if dense else (run, f"{point['budget']:.0%}")
    return [name, budget, f"{point['tokens_per_s']:.1f}", f"{point['inference_ratio']:.3f}", f"{point['loss']:.3f}",
            f"{point['kl']:.3f}", f"{point['agreement']:.0%}"]


def budget_cell(point):
    if point is None:
        return "-"
    return f"{point['loss']:.4f}" + (f" ({point['kl']:.3f}, {point['agreement']:.0%})" if "kl" in point else "")


# -----------------------------------------------------------------------------
# the script

QUESTIONS = {"labels": label_audit, "ceiling": ceiling, "budgets": budget_curve, "serving": serving}


def run_title(folder, checkpoint):
    """What a run is called in audit.json."""
    held = read_json(os.path.join(folder, "config.json"))
    if held is None or held["config"]["mode"] != "topk":
        raise ConfigError(f"{folder} holds no run with gates; name the folder of one, such as "
                          "out/tiny/study/best/seed0")
    title = f"{held['config']['recipe']} seed {held['config']['seed']}, {group_title(group_key(held))}"
    return title + f", {checkpoint}" * (checkpoint != "ckpt.pt")


def show(question, answer):
    if question == "labels":
        for pair, found in answer.items():
            print(f"  {pair:34s}" + " ".join(f"{rho:+.2f}" for rho in found))
    else:
        for row in answer if isinstance(answer, list) else [answer]:
            print("  " + ", ".join(f"{name} {value}" for name, value in row.items()))


def main():
    show_help_if_asked(sys.argv[1:], __file__)
    options, _ = configure(DEFAULTS, [word for word in sys.argv[1:] if word.startswith("--")])
    folders = [word for word in sys.argv[1:] if not word.startswith("--")]
    asked, report = options["ask"].split(","), options["report"]
    unknown = [question for question in asked if question not in QUESTIONS]
    if unknown or not (folders or report):
        raise ConfigError("name the folder of a run, such as out/tiny/study/best/seed0, and with --ask some of "
                          + ",".join(QUESTIONS))
    if min(options["rows"], options["positions"] - 1, options["ceiling_rows"]) < 1:
        raise ConfigError("--rows and --ceiling_rows are at least 1, and --positions, whose ranks are compared, 2")
    path = os.path.join(report, "audit.json")
    answers = (read_json(path) if report else None) or {}
    for folder in folders:
        title = run_title(folder, options["checkpoint"])
        for question in asked:
            held = answers.setdefault(question, {})
            if title not in held:
                held[title] = QUESTIONS[question](folder, options)
                if report:
                    os.makedirs(report, exist_ok=True)
                    write_json(path, answers)
            print(f"{title}: {question}")
            show(question, held[title])
    if report:
        write_audit(report)


if __name__ == "__main__":
    exit_on_error(main)
