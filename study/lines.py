"""Pictures of lines: what every seed does over the steps of training, a row of panels for each family.
"""
import math
import statistics

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from metrics import DEAD
from study.style import BASELINES, WIDTH, families, styles

HEALTH_ARMS = ("g1_ste", "g1_ste_anchor", "g1_no_utilrank", "g1_scaled",
               "g3_ste", "g3_ste_anchor", "g3_no_utilrank", "g3_scaled")
LENGTH_ARMS = ("static", "g1_no_utilrank", "g3_no_utilrank", "g1_full_aux", "g3_full_aux", "g1_distill_dense",
               "g3_distill_dense", "best")


class Panel:
    """One column of a figure of lines: what is drawn of a record, and how the axis is labelled."""

    def __init__(self, points, title, xlabel="step", **axis):
        self.points, self.title, self.xlabel, self.axis = points, title, xlabel, axis
        self.level = None  # (y, what it is): a line across


def lines_figure(group, rows, panels, baselines=()):
    """rows {family: arms}, each with its legend at the right -> a figure, or None without lines."""
    rows = {name: [arm for arm in arms if has_points(group, arm, panels)] for name, arms in rows.items()}
    rows = {name: arms for name, arms in rows.items() if arms}
    if not rows:
        return None
    longest = [max(2.6, 0.17 * (len(arms) + len(baselines)) + 0.7) for arms in rows.values()]
    figure, axes = plt.subplots(len(rows), len(panels), figsize=(WIDTH, sum(longest)), squeeze=False, dpi=80,
                                layout="constrained", gridspec_kw={"height_ratios": longest})
    for line_of_axes, (name, arms) in zip(axes, rows.items()):
        drawn = {**{arm: BASELINES[arm] for arm in baselines}, **styles(arms)}
        for axis, panel in zip(line_of_axes, panels):
            draw_panel(axis, group, drawn, panel)
            axis.set_title(f"{name}: {panel.title}", fontsize=9)
        handles = [Line2D([], [], color=colour, ls=dashes, label=arm)
                   for arm, (colour, dashes) in drawn.items()]
        line_of_axes[-1].legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5),
                                handlelength=3, frameon=False)
    return figure


def has_points(group, arm, panels):
    return any(panel.points(record) for record in group.arms[arm].values() for panel in panels)


def draw_panel(axis, group, drawn, panel):
    for arm, (colour, dashes) in drawn.items():
        for record in group.arms[arm].values():
            points = panel.points(record)
            if points:
                axis.plot(*zip(*points), color=colour, ls=dashes, lw=0.9)
    if panel.level:
        height, text = panel.level
        axis.axhline(height, color="black", lw=0.8, ls=(0, (1, 2)))
        axis.annotate(text, (0.01, height), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    axis.set(**panel.axis)
    axis.set_xlabel(panel.xlabel, fontsize=8)
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.3)


def over_steps(record):
    return [(step, loss) for step, loss, _ in record["evaluations"] if step > 0]


def over_flops(record):
    return [(step * record["flops"]["train_ratio"], loss) for step, loss in over_steps(record)]


def logged(name):
    """Points of a logged list over steps; of a list of layers the lowest."""
    def points(record):
        columns = record["logged"]
        if name not in columns:
            return []
        values = [min(value) if isinstance(value, list) else value for value in columns[name]]
        return list(zip(columns["step"], values))
    return points


def positive(name, least=1e-4):
    """The same for a logarithmic axis."""
    def points(record):
        return [(step, max(value, least)) for step, value in logged(name)(record)]
    return points


def medians(name):
    """Medians of neighbours, about 15 of them: the norms of single steps jump."""
    def points(record):
        single = positive(name, 1e-6)(record)
        size = math.ceil(len(single) / 15)
        slices = [single[i:i + size] for i in range(0, len(single), max(1, size))]
        return [(piece[len(piece) // 2][0], statistics.median(norm for _, norm in piece)) for piece in slices]
    return points


def predictor(column):
    def points(record):
        return [(entry[0], entry[column]) for entry in record["health"]]
    return points


def realised(record):
    budgets = record["realised_budget"].get("threshold", [])
    return list(zip(record["group"]["controlled"], budgets))


def plot_curves(group):
    """Without the first evaluations, which would make the rest flat."""
    baselines = [arm for arm in BASELINES if arm in group.arms]
    losses = [loss for by_seed in group.arms.values() for record in by_seed.values()
              for step, loss in over_steps(record) if step > 0.15 * group.max_iters]
    axis = {"ylabel": "val LM"}
    if losses:
        axis["ylim"] = min(losses) - 0.01, max(losses) + 0.01
    panels = [Panel(over_steps, "over steps", **axis),
              Panel(over_flops, "over training FLOPs", "training FLOPs, in dense steps", **axis)]
    rows = families(group, group.arms) or {"baselines": baselines}
    return lines_figure(group, rows, panels, baselines)


def health_panels():
    slope = Panel(positive("slope"), "p (1 - p), lowest layer", yscale="log")
    slope.level = DEAD, "dead below"
    return [Panel(logged("score_mean"), "mean score"), slope]


def plot_score_health(group):
    arms = [arm for arm in HEALTH_ARMS if arm in group.arms]
    return lines_figure(group, {"no labels": arms}, health_panels())


def plot_every_score(group):
    return lines_figure(group, families(group, group.arms), health_panels())


def plot_gradients(group):
    panels = [Panel(medians("score_gradient"), "gradient norm of the scores", yscale="log"),
              Panel(medians("gate_gradient_without_jepa"), "of the gate's weights, JEPA left out",
                    yscale="log")]
    return lines_figure(group, families(group, group.arms), panels)


def plot_predictors(group):
    error = Panel(predictor(1), "R^2 over action-blind", ylim=(-1, 1))
    error.level = 0, "collapsed below"
    rank = Panel(predictor(2), "effective rank")
    rank.level = 2, "collapsed below"
    return lines_figure(group, families(group, group.arms), [error, rank])


def plot_realised(group):
    panel = Panel(realised, "realised share of full tokens, threshold", "layer", ylim=(-0.03, 1.03),
                  xticks=group.key["controlled"])
    rows = families(group, group.arms)
    if "static" in group.arms:
        rows["static"] = [arm for arm in ("static", "random") if arm in group.arms]
    return lines_figure(group, rows, [panel])


# -----------------------------------------------------------------------------
# runs of several lengths on one picture

def plot_lengths(groups):
    """Groups that differ in their steps: a line for each arm and length, the mean of its seeds."""
    arms = [arm for arm in LENGTH_ARMS if any(arm in group.arms for group in groups)]
    drawn = styles(arms)
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(WIDTH, 4), dpi=80, layout="constrained")
    panels = (over_steps, "steps"), (over_flops, "training FLOPs, in dense steps")
    for axis, (points, label) in zip(axes, panels):
        for group in groups:
            for arm in filter(group.arms.get, arms):
                colour, dashes = drawn[arm]
                line = mean_line([points(record) for record in group.arms[arm].values()])
                axis.plot(*zip(*line), color=colour, ls=dashes, lw=1)
                axis.plot(*line[-1], "o", ms=3.5, color=colour)
        axis.set_xscale("log")
        axis.set_xlabel(f"{label}; a dot ends a run", fontsize=8)
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("val LM", fontsize=8)
    handles = [Line2D([], [], color=colour, ls=dashes, label=arm) for arm, (colour, dashes) in drawn.items()]
    axes[1].legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3,
                   frameon=False)
    return figure


def mean_line(lines):
    """Lines over the same x -> their mean."""
    return [tuple(map(statistics.fmean, zip(*points))) for points in zip(*lines)]
