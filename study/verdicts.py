"""From records to verdicts: contrasts are compared and judged by the RULE of claims.py, claims follow."""
import math

import numpy as np
from scipy import stats

from study.claims import (CONTRASTS, HITS, LENGTH_CLAIM, LENGTH_GAINS, MARGIN, PAPER_READINGS, READINGS,
                          Contrast)
from study.measures import PLAIN, measure, references_of


class Group:
    """Records that may be compared, measured: arm -> seed -> {metric: number or None}."""

    def __init__(self, records):
        self.records = sorted(records, key=arm_and_seed)
        self.key = self.records[0]["group"]
        self.max_iters = self.key["max_iters"]
        self.arms, self.measured = {}, {}  # arm -> seed -> record, measures
        self.other_references = set()  # arms that are measured against references that are trained otherwise
        self.spacing = 0  # steps between evaluations
        for record in self.records:
            arm, seed = arm_and_seed(record)
            references, alike = references_of(record, self.records)
            plain, _ = references_of(record, self.records, PLAIN)
            self.arms.setdefault(arm, {})[seed] = record
            self.measured.setdefault(arm, {})[seed] = measure(record, references, plain)
            if all(references) and not alike:
                self.other_references.add(arm)
            steps = [step for step, *_ in record["evaluations"]]
            self.spacing = max([self.spacing, *np.diff(steps).tolist()])
        self.seeds = sorted({record["seed"] for record in self.records})

    def value(self, arm, seed, metric):
        """A number, of a pair of arms their difference; None where there is none."""
        if isinstance(arm, tuple):
            first, second = (self.value(one, seed, metric) for one in arm)
            if first is None or second is None:
                return None
            return first - second
        measures = self.measured.get(arm, {}).get(seed, {})
        number = measures.get(metric)
        if number is None and metric in measures and metric in HITS:  # never: later than any step
            number = 2 * self.max_iters
            if metric == "cost_to_75":
                number *= measures["train_ratio"]
        return number


def arm_and_seed(record):
    return record["arm"], record["seed"]


class Judged:
    """A contrast with its numbers; `judge` gives it a verdict."""

    def __init__(self, contrast, values_a, values_b, deviation_floor=0.0):
        """values_a, values_b: {seed: number}, of the same seeds."""
        self.contrast = contrast
        self.values_a, self.values_b = values_a, values_b
        self.seeds = sorted(values_a)
        self.differences = [values_a[seed] - values_b[seed] for seed in self.seeds]
        self.interval, self.p, self.p_holm, self.verdict = None, 1.0, None, None
        signs = set(np.sign(self.differences))
        self.same_sign = len(signs) == 1 and 0 not in signs
        n = len(self.differences)
        if n > 1:
            mean = float(np.mean(self.differences))
            error = max(float(np.std(self.differences, ddof=1)), deviation_floor) / math.sqrt(n)
            half = float(stats.t.ppf(0.975, n - 1)) * error
            self.interval = (mean - half, mean + half)
            if error > 0:
                self.p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
            elif mean != 0:
                self.p = 0.0


def compare(group, contrast):
    """The contrast over the seeds that have both sides -> Judged, or None where there is none."""
    metric, a, b, _ = contrast
    values_a = {seed: group.value(a, seed, metric) for seed in group.seeds}
    values_b = {seed: group.value(b, seed, metric) for seed in group.seeds}
    shared = [seed for seed in group.seeds if values_a[seed] is not None and values_b[seed] is not None]
    if not shared:
        return None
    floor = 0.0
    if metric in HITS:
        floor = group.spacing / math.sqrt(6)  # of a difference of two numbers that are rounded to evaluations
    return Judged(contrast, only(values_a, shared), only(values_b, shared), floor)


def only(values, seeds):
    return {seed: values[seed] for seed in seeds}


def judge(rows, spacing=0):
    """Give each Judged its verdict; Holm over those that have an expected sign."""
    signed = sorted((row for row in rows if row.contrast.expected), key=lambda row: row.p)
    worst = 0.0
    for i, row in enumerate(signed):
        worst = max(worst, min(1.0, row.p * (len(signed) - i)))
        row.p_holm = worst
    for row in rows:
        if row.contrast.expected:
            row.verdict = signed_verdict(row)
        else:
            row.verdict = no_difference_verdict(row, spacing)


def signed_verdict(row):
    if not row.same_sign or row.interval is None or row.p_holm >= 0.05:
        return "undecided"
    if np.sign(row.differences[0]) == row.contrast.expected:
        return "agree"
    return "disagree"


def no_difference_verdict(row, spacing):
    if row.interval is None:
        return "undecided"
    low, high = row.interval
    margin = 0.0
    if row.contrast.metric.endswith("loss"):
        margin = MARGIN
    if row.contrast.metric in HITS:
        margin = spacing
    if max(abs(low), abs(high)) <= margin:
        return "agree"
    if row.same_sign and low * high > 0:
        return "disagree"
    return "undecided"


def judge_group(group):
    """Every listed contrast that the group has runs for -> {(topic, reading): list of Judged}."""
    judged = {}
    for place, contrasts in CONTRASTS.items():
        rows = [compare(group, contrast) for contrast in contrasts]
        judged[place] = [row for row in rows if row]
    judge([row for rows in judged.values() for row in rows], group.spacing)
    return judged


def judge_lengths(groups):
    """H5: what labels gain in a shorter and in a longer group that are alike in all else, over shared seeds,
    corrected together -> [(shorter, longer, Judged)]"""
    compared = []
    for shorter in groups:
        for longer in groups:
            alike = {**shorter.key, "max_iters": longer.max_iters} == longer.key
            if alike and shorter.max_iters < longer.max_iters:
                rows = [compare_lengths(shorter, longer, gain) for gain in LENGTH_GAINS]
                compared += [(shorter, longer, row) for row in rows if row]
    judge([row for *_, row in compared])
    return compared


def compare_lengths(shorter, longer, gain):
    short = {seed: shorter.value(gain, seed, "test_loss") for seed in shorter.seeds}
    long = {seed: longer.value(gain, seed, "test_loss") for seed in shorter.seeds}
    shared = [seed for seed in shorter.seeds if short[seed] is not None and long[seed] is not None]
    if not shared:
        return None
    return Judged(Contrast("test_loss", gain, gain, 1), only(short, shared), only(long, shared))


def anchor_shares(group, gate):
    """H4: of what labels gain under ste, the share that the anchor gives without them: {seed: share}."""
    shares = {}
    for seed in group.seeds:
        plain, anchored, labelled = (group.value(f"{gate}_{arm}", seed, "test_loss")
                                     for arm in ("ste", "ste_anchor", "ste_full_aux"))
        if None not in (plain, anchored, labelled) and plain != labelled:
            shares[seed] = (plain - anchored) / (plain - labelled)
    return shares


def gains_at_equal_cost(group, bare, labelled):
    """What labels take off the last val loss: {seed: (at equal steps, at equal training FLOPs)}. For the
    second the labelled run is read where it has cost what the whole run without labels did."""
    gains = {}
    for seed in group.seeds:
        pair = [group.arms.get(arm, {}).get(seed) for arm in (bare, labelled)]
        if None in pair:
            continue
        ratios = [record["flops"]["train_ratio"] for record in pair]
        plain, curve = ([(step, loss) for step, loss, _ in record["evaluations"]] for record in pair)
        step = min(1.0, ratios[0] / ratios[1]) * group.max_iters
        at_equal_flops = float(np.interp(step, *zip(*curve)))
        gains[seed] = plain[-1][1] - curve[-1][1], plain[-1][1] - at_equal_flops
    return gains


# -----------------------------------------------------------------------------
# from the verdicts of contrasts to a claim's, and to its sentence

def rows_of(claim, reading, judged):
    """The claim's contrasts under a reading; none where one of its topics was not run at all."""
    topics = [judged.get((topic, reading), []) for topic in claim.topics]
    if not all(topics):
        return []
    return [row for rows in topics for row in rows]


def verdict_of(rows):
    verdicts = {row.verdict for row in rows}
    if not verdicts:
        return "not run"
    if verdicts == {"agree"}:
        return "agree"
    if {"agree", "disagree"} <= verdicts:
        return "mixed"
    if "disagree" in verdicts:
        return "disagree"
    return "undecided"


def seeds_of(rows):
    """"5", or "3 to 5" where contrasts differ."""
    counts = sorted({len(row.seeds) for row in rows})
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]}"
    return str(counts[0])


def claim_verdicts(claim, judged):
    """{reading: verdict}"""
    return {reading: verdict_of(rows_of(claim, reading, judged)) for reading in claim.readings}


def overall(claim, verdicts):
    """The verdicts of a claim's readings in one; a claim of the paper needs both of the paper's."""
    if claim.name.startswith("C"):
        verdicts = {reading: verdicts.get(reading, "not run") for reading in PAPER_READINGS}
    decided = {reading: verdict for reading, verdict in verdicts.items()
               if verdict in ("agree", "disagree", "mixed")}
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    if len(decided) == 1:
        [(reading, verdict)] = decided.items()
        return f"{verdict} {under(reading)} only"
    ran = [f"{verdict} {under(reading)}" for reading, verdict in verdicts.items() if verdict != "not run"]
    return ", ".join(ran)


def under(reading):
    if reading in READINGS:
        return f"under {reading}"
    return reading


def sentence(claim, judged):
    """What the verdicts say of a claim, in words; nobody writes it by hand."""
    verdicts = claim_verdicts(claim, judged)
    readings = []
    for reading, verdict in verdicts.items():
        rows = rows_of(claim, reading, judged)
        if rows:
            counts = count_verdicts(rows, listed_of(claim, reading))
            readings.append(f"{under(reading)}: {verdict} ({counts}; seeds: {seeds_of(rows)})")
        else:
            readings.append(f"{under(reading)}: not run")
    return f"**{claim.name}: {overall(claim, verdicts)}.** {claim.text} By reading, {'; '.join(readings)}."


def length_sentence(compared):
    """The same of H5, from judge_lengths."""
    rows = [row for *_, row in compared]
    verdict = verdict_of(rows)
    counts = "no two lengths have the same arms and seeds"
    if rows:
        counts = f"{count_verdicts(rows, len(rows))}; seeds: {seeds_of(rows)}"
    return f"**{LENGTH_CLAIM.name}: {verdict}.** {LENGTH_CLAIM.text} ({counts}.)"


def count_leaning(rows):
    """How many undecided contrasts have the expected sign in all of several seeds, and how many the other.
    With few seeds hardly anything is decided, and this is what there is to see."""
    counts = {"for": 0, "against": 0}
    for row in rows:
        if row.verdict == "undecided" and row.contrast.expected and row.same_sign and len(row.seeds) > 1:
            counts["for" if np.sign(row.differences[0]) == row.contrast.expected else "against"] += 1
    return counts


def listed_of(claim, reading):
    """How many contrasts the claim has under a reading, run or not."""
    return sum(len(CONTRASTS[topic, reading]) for topic in claim.topics)


def count_verdicts(rows, listed):
    """"3 of 4 contrasts run: 2 agree, 1 undecided" """
    counts = []
    for verdict in ("agree", "disagree", "undecided"):
        number = sum(row.verdict == verdict for row in rows)
        if number:
            counts.append(f"{number} {verdict}")
    leaning = [f"{number} {side} it in all seeds" for side, number in count_leaning(rows).items() if number]
    if leaning:
        counts[-1] += f" ({', '.join(leaning)})"
    total = f"{len(rows)} of {listed} contrasts run"
    if len(rows) == listed:
        total = f"{listed} contrast{'s' * (listed > 1)}"
    return f"{total}: {', '.join(counts)}"
