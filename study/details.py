"""Two pages of a results folder: verdicts.md (what was claimed, and what came out) and every_seed.md."""
from metrics import DEAD
from study.claims import CLAIMS, GATES, MUON, READINGS, RULE, label_gain
from study.leaderboard import STEPS, fmt, table
from study.verdicts import anchor_shares, gains_at_equal_cost, length_sentence, sentence

COLUMNS = {
    "test_loss": "Test LM, `threshold`", "val_loss": "Val LM, `threshold`",
    "gap_closed": "Own gap closed, test: against references with the same losses and optimizer",
    "common_gap_closed": "Gap closed, test, against `cheap_only` and `full_adapter` for every arm",
    "test_topk": "Test LM, `topk` (not causal)", "causal_gap": "`threshold` minus `topk` (not causal)",
    "best_loss": "Best val LM", "average_loss": "Average val LM",
    "early_average_loss": "Average val LM, first half", "hit_25": "Step of the 25% hit",
    "hit_50": "Step of the 50% hit", "hit_75": "Step of the 75% hit", "hit_90": "Step of the 90% hit",
    "cost_to_75": "Cost to target: training FLOPs to 75% of the own gap, in dense steps",
    "common_cost_to_75": "Cost to 75% of the gap of `cheap_only` and `full_adapter`, in dense steps",
    "train_flops": "Training FLOPs in all, in dense steps", "forward_proxy": "Forward proxy",
    "train_ratio": "A training step / a dense step", "inference_ratio": "Inference FLOPs / dense",
    "seconds": "Seconds of training", "realised": "Realised budget, val, `threshold`",
    "score_gradient": "Median gradient norm of the scores", "slope": "Last mean p (1 - p), lowest layer",
    "dead": "Gate dead", "label_correlation": "Last rank correlation of scores and labels",
    "r2_action_blind": "Predictor: R^2 over the action-blind prediction",
    "effective_rank": "Predictor: effective rank", "collapsed": "Predictor: share of collapsed layers"}
RATIOS = ("score_gradient", "forward_proxy", "train_ratio", "seconds")  # a claim gives a factor for these
CONTRAST_HEAD = ["metric", "A", "B", "claimed", "A, each seed", "B, each seed", "A - B", "95% interval",
                 "mean B / A", "p, Holm", "verdict"]


def paragraphs(text):
    """Wrapped text, one line a paragraph."""
    return "\n\n".join(" ".join(piece.split()) for piece in text.split("\n\n"))


# -----------------------------------------------------------------------------
# verdicts.md

def verdicts_page(groups, titles, judged, compared):
    """judged: of each group; compared: H5, the one place where groups meet."""
    text = ["# Verdicts", "", "## The rule", "", paragraphs(RULE), ""]
    for group, title, of_group in zip(groups, titles, judged):
        sentences = [f"- {sentence(claim, of_group)}" for claim in CLAIMS]
        text += [f"## {title}", "", *sentences, *anchor_lines(group), "",
                 verdict_table(group, of_group), equal_cost(group)]
    if compared:
        text.append(length_verdicts(compared))
    return "\n".join(text)


def anchor_lines(group):
    lines = []
    for gate in GATES:
        shares = anchor_shares(group, gate)
        if shares:
            values = ", ".join(f"{share:.0%}" for share in shares.values())
            seeds = ", ".join(map(str, shares))
            lines.append(f"- H4, the number: of what labels gain under `ste`, the anchor alone gives "
                         f"{values} for {gate} (seeds {seeds}).")
    return lines


def verdict_table(group, judged):
    rows = []
    for (topic, reading), contrasts in judged.items():
        for row in contrasts:
            rows.append([topic, reading, *contrast_cells(row, group.max_iters)])
    return table(["topic", "reading", *CONTRAST_HEAD], rows)


def contrast_cells(row, max_iters):
    metric, a, b, expected = row.contrast
    claimed = {-1: "A < B", 0: "A = B", 1: "A > B"}[expected]
    interval, ratio, p = "-", "-", "-"
    digits = 4
    if metric in STEPS:
        digits = 0
    if row.interval:
        low, high = row.interval
        interval = f"[{low:+.{digits}f}, {high:+.{digits}f}]"
    if metric in RATIOS and sum(row.values_a.values()):
        ratio = f"{sum(row.values_b.values()) / sum(row.values_a.values()):.2f}"
    if row.p_holm is not None:
        p = f"{row.p_holm:.2g}"
    return [metric, arm_text(a), arm_text(b), claimed, side_text(row.values_a, metric, max_iters),
            side_text(row.values_b, metric, max_iters), signed(row.differences, digits), interval, ratio, p,
            f"**{row.verdict}**"]


def arm_text(arm):
    if isinstance(arm, tuple):
        return f"({arm[0]} - {arm[1]})"
    return arm


def side_text(values, metric, max_iters):
    """Each seed's value; in a difference a hit that never came is one at twice the steps."""
    texts = []
    for _, number in sorted(values.items()):
        if metric.startswith("hit_") and number > max_iters:
            number = None
        texts.append(fmt(number, metric))
    return ", ".join(texts)


def signed(numbers, digits=4):
    return ", ".join(f"{number:+.{digits}f}" for number in numbers)


def equal_cost(group):
    """The paper's own argument against labels is their cost."""
    rows = []
    for reading in (*READINGS, MUON):
        for gate in GATES:
            gains = gains_at_equal_cost(group, *label_gain(gate, reading)).values()
            if gains:
                rows.append([gate, reading, *map(signed, zip(*gains))])
    if not rows:
        return ""
    return "\n".join(["### What labels gain for their cost", "",
                      "Val loss without labels minus with off-policy labels, each seed; above 0 labels help. "
                      "At equal training FLOPs the run with labels is read where it has cost what the whole "
                      "run without them did. Its learning rate has not come down there yet, which is to its "
                      "disadvantage. No verdict hangs on this table.", "",
                      table(["gate", "reading", "at equal steps", "at equal training FLOPs"], rows)])


def length_verdicts(compared):
    rows = [[f"{shorter.max_iters:,}", f"{longer.max_iters:,}", *contrast_cells(row, longer.max_iters)]
            for shorter, longer, row in compared]
    return "\n".join(["## H5: what labels gain, against length", "",
                      "Groups that are alike in all but their steps, paired by seed. A is the gain in the "
                      "shorter runs, B in the longer.", "", f"- {length_sentence(compared)}", "",
                      table(["shorter", "longer", *CONTRAST_HEAD], rows)])


# -----------------------------------------------------------------------------
# every_seed.md

def every_seed_page(groups, titles, images):
    """images: of each group, a list of (file name, caption)."""
    text = ["# Every arm, every seed", ""]
    for group, title, of_group in zip(groups, titles, images):
        links = [f"![{caption}]({name})\n" for name, caption in of_group]
        text += [f"## {title}", "", *links, score_health(group), *metric_tables(group)]
    return "\n".join(text)


def score_health(group):
    """Which gates died, said plainly; then the numbers."""
    lines, rows = [], []
    for arm, by_seed in group.arms.items():
        for seed, record in sorted(by_seed.items()):
            if record["dead_layers"]:
                layers = ", ".join(map(str, record["dead_layers"]))
                lines.append(f"- `{arm}` seed {seed}: dead in layers {layers}.")
            logged = record["logged"]
            if "slope" in logged:
                rows.append([arm, seed, *(f"{logged[name][-1]:+.2f}" for name in ("score_mean", "score_std")),
                             *(f"{slope:.3f}" for slope in logged["slope"][-1])])
    if not rows:
        return ""
    if not lines:
        lines = ["No gate died."]
    layers = [f"p (1 - p), layer {layer}" for layer in group.key["controlled"]]
    return "\n".join(["### Score health", "",
                      f"A gate is dead where the mean of p (1 - p) is under {DEAD}: its sigmoid is flat, and "
                      "the LM loss teaches it nothing any more.", "", *lines, "",
                      "At the last logged step:", "",
                      table(["arm", "seed", "mean score", "std of scores", *layers], rows)])


def metric_tables(group):
    """A table for each metric, one line an arm, one column a seed."""
    lines = []
    for metric, title in COLUMNS.items():
        rows = []
        for arm, by_seed in group.measured.items():
            if any(metric in measures for measures in by_seed.values()):
                rows.append([arm, *(cell(by_seed.get(seed, {}), metric) for seed in group.seeds)])
        if rows:
            lines += [f"### {title}", "", table(["arm", *(f"seed {seed}" for seed in group.seeds)], rows)]
    return lines


def cell(measures, metric):
    if metric not in measures:
        return "-"
    return fmt(measures[metric], metric)
