"""The leaderboard of a group of runs, and how tables and numbers are written in markdown."""
import statistics

from scipy import stats

STEPS = ("hit_25", "hit_50", "hit_75", "hit_90", "seconds")
QUARTER = "_budget25"
OWN_LINE = """A line of your own in the leaderboard takes one command. References that are there already
are not trained again:

    python -m study --plugin=my_gate.py --arms=my_gate
"""


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def fmt(number, metric="test_loss"):
    if number is None:
        return "never"
    if isinstance(number, bool):
        return ["no", "yes"][number]
    if metric in STEPS or isinstance(number, int):
        return f"{number:,.0f}"
    if metric in ("gap_closed", "common_gap_closed"):
        return f"{number:.1%}"
    if metric in ("cost_to_75", "common_cost_to_75", "train_flops"):
        return f"{number:,.1f}"
    return f"{number:.4f}"


# -----------------------------------------------------------------------------
# the leaderboard

def leaderboard(group):
    """One line a recipe, the most of the gap closed first; its arm at a quarter of the tokens beside it."""
    lines = {}  # recipe -> [its arm at 50%, its arm at 25%]
    for arm in group.arms:
        arms = lines.setdefault(arm.removesuffix(QUARTER), [None, None])
        at_quarter = setting(group, arm, "budget") == 0.25
        arms[at_quarter] = arm
    ordered = sorted(sorted(lines), key=lambda name: sort_key(group, lines[name]))
    head = ["recipe", "test LM: mean (each seed)", "gap closed at 50%", "at 25%", "own gap at 50%",
            "at 25%", "cost to 75%, dense steps", "a step / a dense step", "inference FLOPs / dense", "seeds",
            "commit"]
    return table(head, [leaderboard_line(group, name, *lines[name]) for name in ordered])


def sort_key(group, arms):
    """The gap closed at 50%, or where only a quarter was run, below all of those, at 25%."""
    half, quarter = arms
    gaps = values_of(group, half or quarter, "common_gap_closed")
    return half is None, not gaps, -sum(gaps) / max(1, len(gaps))


def setting(group, arm, key):
    """A key of an arm's config."""
    return next(iter(group.arms[arm].values()))["config"][key]


def values_of(group, arm, metric):
    """[value of each seed], the seeds that have the metric; None is never."""
    return [measures[metric] for _, measures in sorted(group.measured[arm].items()) if metric in measures]


def mean_text(group, arm, metric):
    """A mean over seeds; what never came is counted, not averaged."""
    if arm is None or not values_of(group, arm, metric):
        return "-"
    values = values_of(group, arm, metric)
    reached = [value for value in values if value is not None]
    if not reached:
        return "never"
    text = fmt(statistics.fmean(reached), metric)
    if len(reached) < len(values):
        text += f" (never in {len(values) - len(reached)} of {len(values)})"
    return text


def leaderboard_line(group, name, half, quarter):
    main = half or quarter
    records, budget = group.arms[main], setting(group, main, "budget")
    title = f"`{name}`"
    if main in group.other_references:
        title += " †"
    if budget != 0.5:
        title += f" (at {budget:.0%})"
    if setting(group, main, "mode") in ("cheap", "adapter"):
        title += " (reference)"
    losses = ", ".join(fmt(value) for value in values_of(group, main, "test_loss"))
    commits = sorted({record["commit"][:7] for record in records.values() if record["commit"]})
    return [title, f"{mean_text(group, main, 'test_loss')} ({losses})",
            mean_text(group, half, "common_gap_closed"), mean_text(group, quarter, "common_gap_closed"),
            mean_text(group, half, "gap_closed"), mean_text(group, quarter, "gap_closed"),
            *(mean_text(group, main, key) for key in ("common_cost_to_75", "train_ratio", "inference_ratio")),
            ", ".join(map(str, sorted(records))), ", ".join(commits) or "-"]


def difference_rule(group):
    """When do two lines differ? With a yardstick from the runs themselves."""
    text = ("Two lines differ where every seed that both have has the same sign, and the paired 95% "
            "t-interval of their difference excludes 0. A choice among many lines needs more than that: try "
            "it on new seeds.")
    deviations = []
    routed = [arm for arm in group.arms if setting(group, arm, "mode") == "topk"]
    for i, a in enumerate(routed):
        for b in routed[:i]:
            shared = sorted(group.arms[a].keys() & group.arms[b].keys())
            if len(shared) > 2:
                differences = [group.value(a, seed, "test_loss") - group.value(b, seed, "test_loss")
                               for seed in shared]
                deviations.append(statistics.stdev(differences))
    if deviations:
        deviation = statistics.median(deviations)
        three, five = (stats.t.ppf(0.975, n - 1) * deviation / n ** 0.5 for n in (3, 5))
        text += (f" Between two routed arms here the difference varies over seeds by {deviation:.4f} "
                 f"(standard deviation, the median of all pairs), so it counts from about {three:.4f} with "
                 f"three seeds and {five:.4f} with five.")
    if group.other_references:
        text += ("\n\n† its own gap is against `cheap_only` and `full_adapter`, too: references that are "
                 "trained as it is were not run.")
    text += ("\n\n*Gap closed*, and the cost to 75% of it, are against `cheap_only` and `full_adapter` for "
             "every line. The *own gap* is against references with the line's own losses and optimizer "
             "(`_distill`, `_muon`): stricter where these are better trained.")
    return text + "\n"
