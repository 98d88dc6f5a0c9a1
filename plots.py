"""The pictures of a study. Each function takes plain numbers and writes one PNG.

gap_closed     how much of the gap each arm closes, one dot a seed
curves         validation loss over steps, and over training FLOPs
gates          inside the gates: their scores, their gradients, what predictors are worth
budget_curves  one checkpoint at other budgets
serving        loss, KL and agreement with the dense model, against tokens per second and against FLOPs
"""
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from metrics import DEAD
from run import write_whole

DPI = 80
GATE_COLOURS = {"g1": "C0", "g3": "C1"}  # of arms by what their name begins with; the others are grey


def save(figure, path):
    write_whole(path, lambda part: figure.savefig(part, dpi=DPI, format="png"))
    plt.close(figure)


def gate_colour(arm):
    return GATE_COLOURS.get(arm[:2], "0.35")


def describe(axis, xlabel, ylabel="", title="", **settings):
    """The labels of a panel; settings: what axis.set takes."""
    axis.set(**settings)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.3)


def legend_beside(axis):
    """The legend right of a panel, each name once."""
    handles = dict(zip(*axis.get_legend_handles_labels()[::-1]))
    axis.legend(handles.values(), handles.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5),
                frameon=False)


def draw_lines(axis, arms, points):
    """A thin line for every run. arms {arm: runs}; points(run) -> [(x, y)]."""
    for i, (arm, runs) in enumerate(arms.items()):
        for run in runs:
            if points(run):
                axis.plot(*zip(*points(run)), color=f"C{i % 10}", ls=("-", "--")[i // 10 % 2], lw=0.9,
                          label=arm)


# -----------------------------------------------------------------------------
# a study

def gap_closed(path, arms):
    """arms {arm: [gap closed of each seed]}."""
    order = sorted(arms, key=lambda arm: statistics.fmean(arms[arm]))
    figure, axis = plt.subplots(figsize=(8, 1 + 0.18 * len(order)), layout="constrained")
    for y, arm in enumerate(order):
        axis.plot(arms[arm], [y] * len(arms[arm]), "o", ms=4, alpha=0.7, color=gate_colour(arm))
    axis.set_yticks(range(len(order)), order)
    describe(axis, "gap closed on test: 0 is all cheap, 1 is dense; blue G1, orange G3",
             ylim=(-0.7, len(order) - 0.3))
    save(figure, path)


def curves(path, arms):
    """arms {arm: [the record of each seed]}, see study.make_record."""
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(11, 3.6), layout="constrained")
    losses = []
    for runs in arms.values():
        for run in runs:
            last = run["evaluations"][-1][0]
            losses += [loss for step, loss in run["evaluations"] if step > 0.15 * last]  # the first are far above
    room = {"ylim": (min(losses) - 0.01, max(losses) + 0.01)}
    draw_lines(axes[0], arms, lambda run: run["evaluations"][1:])
    draw_lines(axes[1], arms, lambda run: [(step * run["flops"]["train_ratio"], loss)
                                           for step, loss in run["evaluations"][1:]])
    describe(axes[0], "step", "val LM", **room)
    describe(axes[1], "training FLOPs, in steps of the dense model", **room)
    legend_beside(axes[1])
    save(figure, path)


def gates(path, arms):
    """arms {arm: [the record of each seed]}, see study.make_record."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), layout="constrained")

    def logged(name):
        return lambda run: list(zip(run["logged"]["step"], run["logged"].get(name, [])))
    panels = axes.flat
    draw_lines(panels[0], arms, logged("score_mean"))
    describe(panels[0], "step", title="mean score")
    draw_lines(panels[1], arms, logged("slope"))
    panels[1].axhline(DEAD, color="black", lw=0.8, ls=":")
    describe(panels[1], "step", title="p (1 - p), lowest layer; under the dotted line it is dead", yscale="log")
    draw_lines(panels[2], arms, logged("score_gradient"))
    describe(panels[2], "step", title="gradient norm of the scores", yscale="log")
    draw_lines(panels[3], arms, lambda run: [entry[:2] for entry in run["predictor"]])
    panels[3].axhline(0, color="black", lw=0.8, ls=":")
    describe(panels[3], "step", title="G3's predictor: R^2 over one that does not know the path")
    legend_beside(panels[1])
    save(figure, path)


# -----------------------------------------------------------------------------
# one checkpoint

def budget_curves(path, curves):
    """curves {run: [{"budget": realised, "loss"} of each budget]}."""
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    draw_lines(axis, {run: [curve] for run, curve in curves.items()},
               lambda curve: [(point["realised"], point["loss"]) for point in curve])
    describe(axis, "realised share of full tokens, threshold", "val LM")
    legend_beside(axis)
    save(figure, path)


def serving(path, curves):
    """curves {run: points as audit.serving gives them}. The budgets of a run are joined; a dot is a dense model."""
    figure, axes = plt.subplots(2, 3, sharey="col", sharex="row", figsize=(11, 6), layout="constrained")
    costs = {"tokens_per_s": "tokens/s, decoding", "inference_ratio": "inference FLOPs / dense"}
    values = {"loss": "LM loss", "kl": "KL(dense || routed)", "agreement": "agreement with the dense model"}
    for line_of_axes, (cost, cost_label) in zip(axes, costs.items()):
        for axis, (value, label) in zip(line_of_axes, values.items()):
            for i, (run, points) in enumerate(curves.items()):
                routed = sorted((p for p in points if p["budget"] is not None), key=lambda p: p["budget"])
                dense = [p for p in points if p["budget"] is None]
                axis.plot([p[cost] for p in routed], [p[value] for p in routed], "o-", ms=4, lw=1,
                          color=f"C{i % 10}", label=run)
                axis.plot([p[cost] for p in dense], [p[value] for p in dense], "k*",
                          label="dense" if i == 0 else None)
                for p in routed[:len(routed) * (i == 0)]:  # the budgets of the first run, which is the subject
                    axis.annotate(f"{p['budget']:.0%}", (p[cost], p[value]), (3, 3), fontsize=6,
                                  textcoords="offset points")
            describe(axis, cost_label, label)
    legend_beside(axes[0, -1])
    save(figure, path)
