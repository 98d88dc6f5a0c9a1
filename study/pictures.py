"""The pictures of a report: written here, every seed visible. Lines over steps are in lines.py."""
import statistics

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from study import lines
from study.claims import LENGTH_GAINS
from study.leaderboard import values_of
from study.style import COLOURS, WIDTH, family, family_colour, save

LEVELS = (25, 50, 75, 90)
CAPTIONS = {
    "curves": "Validation loss over steps and over training FLOPs, from the first eighth on; one line a seed",
    "gap_closed": "Gap closed on test, one dot a seed",
    "hits": "The first evaluation with so much of the gap closed, one dot a seed; a cross: never",
    "cost_quality": "Training FLOPs of a whole run against test loss, one dot a seed",
    "score_health": "Score health without labels: the mean score, and the slope of the sigmoid",
    "scores": "Score health of every learned gate",
    "gate_gradients": "Gradient norms of the gates",
    "predictors": "Health of G3's predictors",
    "realised_budget": "Realised budget of each layer under threshold routing"}


def write_group(group, folder, slug):
    """Every picture of a group -> {picture: (file name, caption)}."""
    figures = {"curves": lines.plot_curves(group), "gap_closed": plot_gap(group), "hits": plot_hits(group),
               "cost_quality": plot_cost(group), "score_health": lines.plot_score_health(group),
               "scores": lines.plot_every_score(group), "gate_gradients": lines.plot_gradients(group),
               "predictors": lines.plot_predictors(group), "realised_budget": lines.plot_realised(group)}
    return {name: save(figure, folder, f"{name}_{slug}", CAPTIONS[name])
            for name, figure in figures.items() if figure}


# -----------------------------------------------------------------------------
# one row an arm, one dot a seed

def arms_by(group, metric):
    """The arms that have a metric, the largest mean last; never is the least."""
    means = {}
    for arm in group.arms:
        values = values_of(group, arm, metric)
        if values:
            means[arm] = statistics.fmean(-1 if value is None else value for value in values)
    return sorted(sorted(means), key=means.get)


def strip(axis, group, arms, metric, never_at=None):
    """Dots of each arm's seeds, a little apart in height; a hit that never came is a cross at never_at."""
    for place, arm in enumerate(arms):
        values = values_of(group, arm, metric)
        for i, value in enumerate(values):
            height = place + 0.5 * ((i + 0.5) / len(values) - 0.5)
            if value is None:
                axis.plot(never_at, height, "x", ms=4, color=family_colour(group, arm))
            else:
                axis.plot(value, height, "o", ms=3.5, color=family_colour(group, arm), alpha=0.8)
    axis.set_ylim(-0.7, len(arms) - 0.3)
    axis.set_yticks(range(len(arms)), arms, fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(alpha=0.3)


def family_legend(figure, group, arms):
    names = {family(group, arm): family_colour(group, arm) for arm in arms}
    handles = [Line2D([], [], color=colour, marker="o", ls="", ms=4, label=name)
               for name, colour in sorted(names.items())]
    figure.legend(handles=handles, fontsize=7, loc="outside lower center", ncols=len(handles), frameon=False)


def strip_height(arms):
    return 1.3 + 0.2 * len(arms)


def plot_gap(group):
    arms = arms_by(group, "common_gap_closed")
    if not arms:
        return None
    figure, axis = plt.subplots(figsize=(WIDTH * 0.75, strip_height(arms)), dpi=80, layout="constrained")
    strip(axis, group, arms, "common_gap_closed")
    axis.set_xlabel("gap closed on test: 0 is all cheap, 1 is dense", fontsize=8)
    family_legend(figure, group, arms)
    return figure


def plot_hits(group):
    arms = arms_by(group, "common_gap_closed")
    if not arms:
        return None
    figure, axes = plt.subplots(1, len(LEVELS), sharey=True, figsize=(WIDTH, strip_height(arms)), dpi=80,
                                layout="constrained")
    last = group.max_iters
    for axis, level in zip(axes, LEVELS):
        axis.axvspan(1.08 * last, 1.4 * last, color="0.9")
        strip(axis, group, arms, f"hit_{level}", never_at=1.24 * last)
        axis.set_xticks([0, last / 2, last, 1.24 * last], ["0", f"{last // 2:,}", f"{last:,}", "never"])
        axis.set_xlim(0, 1.4 * last)
        axis.set_title(f"{level}% of the gap", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    family_legend(figure, group, arms)
    return figure


# -----------------------------------------------------------------------------
# cost

def plot_cost(group):
    """Names stand in a column at the right, apart from each other, each tied to the mean of its dots."""
    points, means = {}, {}
    for arm in group.arms:
        points[arm] = values_of(group, arm, "train_flops"), values_of(group, arm, "test_loss")
        means[arm] = [statistics.fmean(values) for values in points[arm]]
    height = max(4.0, 0.17 * len(points) + 1)
    figure, axis = plt.subplots(figsize=(WIDTH, height), dpi=80, layout="constrained")
    low, high = (limit(loss for _, losses in points.values() for loss in losses) for limit in (min, max))
    spread = max(high - low, 1e-3)
    heights = apart({arm: loss for arm, (_, loss) in means.items()}, spread * 0.16 / height, low, high)
    right = 1.04 * max(cost for cost, _ in means.values())
    for arm, (costs, losses) in points.items():
        colour = family_colour(group, arm)
        axis.plot(costs, losses, "o", ms=3.5, color=colour, alpha=0.8)
        axis.plot([means[arm][0], right], [means[arm][1], heights[arm]], color=colour, lw=0.5, alpha=0.5)
        axis.annotate(arm, (right, heights[arm]), (4, 0), textcoords="offset points", fontsize=7, va="center",
                      color=colour, annotation_clip=False)
    axis.set_xlim(0, right)
    axis.set_ylim(low - 0.04 * spread, high + 0.04 * spread)
    axis.set_xlabel("training FLOPs, in dense steps", fontsize=8)
    axis.set_ylabel("test LM, threshold", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    family_legend(figure, group, points)
    return figure


def apart(wanted, gap, low, high):
    """{name: height} near `wanted`, in its order, at least `gap` from each other, and within low and high
    where there is room."""
    order = sorted(wanted, key=lambda name: (wanted[name], name))
    heights = {}
    last = low - gap
    for name in order:
        last = heights[name] = max(wanted[name], last + gap)
    ceiling = high + gap
    for name in reversed(order):
        ceiling = heights[name] = min(heights[name], ceiling - gap)
    return heights


# -----------------------------------------------------------------------------
# beside the groups

def write_budget_curves(curves, folder):
    """One checkpoint at other budgets -> (file name, caption)."""
    height = max(4.0, 0.17 * len(curves) + 1)
    figure, axis = plt.subplots(figsize=(WIDTH, height), dpi=80, layout="constrained")
    arms = sorted({run.split()[0] for run in curves})
    dashes = ("-", "--", ":", "-.")
    for run, curve in sorted(curves.items()):
        place = arms.index(run.split()[0])
        points = [(realised, loss) for _, loss, realised in curve]
        axis.plot(*zip(*points), marker="o", ms=3, lw=1, label=run, color=COLOURS[place % len(COLOURS)],
                  ls=dashes[place // len(COLOURS) % len(dashes)])
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axis.set_xlabel("realised share of full tokens, threshold", fontsize=8)
    axis.set_ylabel("val LM", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    return save(figure, folder, "budget_curves", "The loss of one checkpoint at other budgets")


def write_lengths(groups, folder):
    """For groups of which some are alike in all but their steps -> [(file name, caption)]."""
    alike = [some for some in alike_but_length(groups) if len(some) > 1]
    return [save(plot_length_gains(alike), folder, "gain_over_length",
                 "What labels gain against the length of training, one dot a seed"),
            save(lines.plot_lengths(alike[0]), folder, "curves_over_length",
                 "Runs of every length, the mean of their seeds: over steps, and over training FLOPs")]


def plot_length_gains(alike):
    """What labels gain against the steps of the run: one dot a seed, a line through the seeds' mean. Groups
    that differ in more than steps stand in different lines."""
    figure, axes = plt.subplots(1, len(LENGTH_GAINS), sharey=True, figsize=(WIDTH, 3), dpi=80,
                                layout="constrained")
    lengths = sorted({group.max_iters for some in alike for group in some})
    for axis, gain in zip(axes, LENGTH_GAINS):
        for place, some in enumerate(alike):
            draw_gains(axis, some, gain, COLOURS[place % len(COLOURS)])
        axis.set_title(f"{gain[0]}\n- {gain[1]}", fontsize=8)
        axis.set_xlabel("steps", fontsize=8)
        axis.set_xscale("log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.axhline(0, color="black", lw=0.8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gain in test LM", fontsize=8)
    return figure


def alike_but_length(groups):
    """Lists of groups that differ in max_iters only."""
    held = {}
    for group in groups:
        rest = str(sorted((key, value) for key, value in group.key.items() if key != "max_iters"))
        held.setdefault(rest, []).append(group)
    return list(held.values())


def draw_gains(axis, alike, gain, colour):
    means = []
    for group in alike:
        values = [group.value(gain, seed, "test_loss") for seed in group.seeds]
        values = [value for value in values if value is not None]
        if values:
            axis.plot([group.max_iters] * len(values), values, "o", ms=3.5, color=colour, alpha=0.8)
            means.append((group.max_iters, statistics.fmean(values)))
    if means:
        axis.plot(*zip(*means), color=colour, lw=1)
