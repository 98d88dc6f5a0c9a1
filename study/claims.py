"""The rule, the contrasts and the claims, written before the numbers: nothing here sees a result.

A contrast is a metric of arm A minus the same metric of arm B, paired by seed. Each is listed once in
CONTRASTS, under a topic and a reading (the estimator), and gets one verdict (verdicts.py). Claims refer to
topics, so that two claims that ask the same question get the same answer.
"""
from typing import NamedTuple

MARGIN = 0.005  # the paper's "within 0.005", of a loss
HITS = ("hit_25", "hit_50", "hit_75", "hit_90", "cost_to_75")  # None: never

RULE = f"""Stated before the numbers. The primary metric is the test LM loss at the end of training under
causal `threshold` routing, which is what generation uses; losses under `topk` see the future and are
labelled not causal. Everything is chosen on val; test is read once, at the end of each run. *Gap closed*
is (L_cheap - L) / (L_cheap - L_dense), with `cheap_only` and `full_adapter` of the same seed, data and
steps. A verdict's gap is the *own* one: its references have the arm's losses and optimizer too. *Early* is
the first half of the steps. A *hit* is the first evaluation with that much of the gap closed.

A contrast is A - B, paired by seed. With an expected sign it *agrees* or *disagrees* when all seeds have
one sign and the paired 95% t-interval excludes 0, after Holm's correction (corrected p < 0.05) over all
signed contrasts of `study/claims.py` that the group of runs has; else it is *undecided*. Where no
difference is claimed, it *agrees* when the whole 95% interval lies within +-{MARGIN} for a loss and
within one evaluation for a hit; it *disagrees* when all seeds have one sign and the interval excludes 0.
One seed decides nothing, and two or three hardly anything.

A hit that never came counts as a hit at twice the run's steps, so it is later than any step. A hit is
known to one evaluation only, so the standard deviation of a difference of hits is taken as no less than
what this rounding makes: the steps between evaluations / sqrt 6. Where every seed has the same difference
of anything else, p is 0.

A claim is one topic or several, each with its contrasts. It *agrees* when all of them agree, *disagrees*
when some disagree and none agrees, is *mixed* when some agree and some disagree, else *undecided*; where
a whole topic was not run, neither was the claim. The paper does not name its estimator: a claim of the
paper (C1 to C8) is judged under `ste_norm` and under `scaled`, with `ste` beside them, and a verdict
under one reading only is called so. Runs that differ in steps, batch, data, backbone or rank are never
compared; H5 is the one place where lengths meet, over shared seeds. A disagreement at a small scale does
not refute the paper."""

GATES = ("g1", "g3")
# The readings of the estimator, and how an arm without labels is called under each.
NO_LABELS = {"ste_norm": "no_utilrank", "scaled": "scaled", "ste": "ste"}
READINGS = tuple(NO_LABELS)
PAPER_READINGS = ("ste_norm", "scaled")
MUON = "ste_norm with Muon"  # the default estimator, the cheap FFNs trained by Muon instead of AdamW
ANY = "across recipes"  # the contrast is between estimators, or has nothing to do with them
DISTILLED, QUARTER = "with distillation", "at 25%"  # further readings, of H0


class Contrast(NamedTuple):
    metric: str
    a: str | tuple  # an arm, or a pair (X, Y) whose value is X - Y
    b: str | tuple
    expected: int   # the sign of A - B that is claimed; 0: no difference


def arm_name(gate, labels, reading):
    """("g1", "full_aux", "scaled") -> "g1_scaled_full_aux", as in config/arms.ini; labels None: without."""
    if reading == MUON:
        return f"{gate}_{labels or 'no_utilrank'}_muon"
    if labels is None:
        return f"{gate}_{NO_LABELS[reading]}"
    if reading == "ste_norm":
        return f"{gate}_{labels}"
    return f"{gate}_{reading}_{labels}"


def label_gain(gate, reading):
    """What labels take off the loss: the pair (without, with)."""
    return arm_name(gate, None, reading), arm_name(gate, "full_aux", reading)


def contrasts_of_reading(reading):
    """{topic: contrasts} that are repeated under every estimator."""
    static = "static_muon" if reading == MUON else "static"
    g1, g3 = (arm_name(gate, "full_aux", reading) for gate in GATES)
    bare_g1, bare_g3 = (arm_name(gate, None, reading) for gate in GATES)
    topics = {
        "early": [Contrast("early_average_loss", g3, g1, -1), Contrast("hit_50", g3, g1, -1)],
        "average": [Contrast("average_loss", g3, g1, -1)],
        "gradient": [Contrast("score_gradient", g3, g1, -1)],
        "endpoint": [Contrast("test_loss", g3, g1, 0)],
        "without labels": [Contrast("early_average_loss", bare_g3, bare_g1, 0),
                           Contrast("hit_50", bare_g3, bare_g1, 0)],
        "removing labels": [], "cost of labels": [], "on-policy": [], "dense target": [], "static": []}
    for gate in GATES:
        bare, labelled = label_gain(gate, reading)
        on_policy, dense = arm_name(gate, "on_policy", reading), arm_name(gate, "on_policy_dense", reading)
        for metric in ("best_loss", "average_loss", "hit_50", "test_loss"):
            topics["removing labels"].append(Contrast(metric, bare, labelled, -1))
        for metric in ("forward_proxy", "train_ratio", "seconds"):
            topics["cost of labels"].append(Contrast(metric, bare, labelled, -1))
        if reading != MUON:
            for metric in ("test_loss", "average_loss"):
                topics["on-policy"].append(Contrast(metric, on_policy, labelled, -1))
            topics["dense target"].append(Contrast("test_loss", dense, on_policy, -1))
        for arm in (bare, labelled):
            topics["static"].append(Contrast("test_loss", arm, static, -1))
    return topics


def contrasts_of_gate(gate):
    """{(topic, reading): contrasts} of one gate, between recipes and estimators."""
    bare, plain, anchored = f"{gate}_no_utilrank", f"{gate}_ste", f"{gate}_ste_anchor"
    gain, scaled_gain = label_gain(gate, "ste_norm"), label_gain(gate, "scaled")
    plain_gain = label_gain(gate, "ste")
    return {
        ("alive", ANY): [Contrast("test_loss", plain_gain, gain, 1),
                         Contrast("test_loss", plain_gain, scaled_gain, 1)],
        ("anchor", "ste"): [Contrast("test_loss", plain, anchored, 1),
                            # what the anchor takes off, and what labels take off beyond it
                            Contrast("test_loss", (plain, anchored), (anchored, f"{gate}_ste_full_aux"), 1)],
        ("lambda 0.1", "ste_norm"): [Contrast("test_loss", f"{gate}_lambda_01", f"{gate}_full_aux", -1),
                                     Contrast("test_loss", f"{gate}_lambda_01", bare, -1)],
        ("distillation", ANY): [Contrast("test_loss", (bare, f"{gate}_distill"),
                                         ("static", "static_distill"), 1)]}


def list_contrasts():
    """{(topic, reading): contrasts}: everything that is ever judged inside a group, each once."""
    listed = {}
    for reading in (*READINGS, MUON):
        for topic, contrasts in contrasts_of_reading(reading).items():
            if contrasts:
                listed[topic, reading] = contrasts
    for gate in GATES:
        for place, contrasts in contrasts_of_gate(gate).items():
            listed.setdefault(place, []).extend(contrasts)
    listed["alive", ANY].append(Contrast("test_loss", label_gain("g1", "ste"),
                                         ("g1_ste_anchor", "g1_ste_anchor_full_aux"), 1))
    listed["predictor", "ste_norm"] = [
        Contrast("r2_action_blind", "g3_no_jepa", "g3_full_aux", -1),
        Contrast("effective_rank", "g3_no_jepa", "g3_full_aux", -1),
        Contrast("collapsed", "g3_no_jepa", "g3_full_aux", 1)]
    listed["lambda_jepa", "ste_norm"] = [Contrast("test_loss", "g3_jepa_025", "g3_full_aux", 0),
                                         Contrast("test_loss", "g3_jepa_2", "g3_full_aux", 0)]
    listed["quarter", "ste_norm"] = [
        Contrast("test_loss", "g3_full_aux_budget25", "g1_full_aux_budget25", 1),
        Contrast("early_average_loss", "g3_full_aux_budget25", "g1_full_aux_budget25", 1)]
    distilled = ("g1_distill", "g3_distill", "g1_distill_dense", "g3_distill_dense",
                 "g1_scaled_distill_dense")
    quarter = ("g1_no_utilrank", "g3_no_utilrank", "g1_full_aux", "g3_full_aux", "old_best")
    listed["static", DISTILLED] = [Contrast("test_loss", arm, "static_distill", -1) for arm in distilled]
    listed["static", DISTILLED] += [Contrast("test_loss", arm, "static_distill_muon", -1)
                                    for arm in ("best", "g3_best")]
    listed["static", QUARTER] = [Contrast("test_loss", f"{arm}_budget25", "static_budget25", -1)
                                 for arm in quarter]
    listed["static", QUARTER] += [Contrast("test_loss", "best_budget25", "static_distill_muon_budget25", -1)]
    return listed


CONTRASTS = list_contrasts()


class Claim(NamedTuple):
    name: str
    title: str  # on the map
    text: str
    topics: tuple
    readings: tuple


CLAIMS = [
    Claim("C1", "G3 ahead of G1 with labels",
          "Under full aux G3 beats G1 early to mid training: lower average LM, faster hits, about "
          "10.3x lower gradient norms; the endpoint LM is within 0.005.",
          ("early", "average", "gradient", "endpoint"), (*READINGS, MUON)),
    Claim("C2", "removing labels helps",
          "Removing util and rank together improves best LM, average LM and the speed of hits, for "
          "both gates.", ("removing labels",), (*READINGS, MUON)),
    Claim("C3", "no G3 lead without labels",
          "Without util and rank the early advantage of G3 over G1 disappears: it is there with them, "
          "and without them there is no difference.", ("early", "without labels"), (*READINGS, MUON)),
    Claim("C4", "removing labels saves cost",
          "Removing util and rank cuts the training FLOPs (the paper's proxy: from 1.53x to 1.07x) and "
          "the time (by 39%).", ("cost of labels",), (*READINGS, MUON)),
    Claim("C5", "no JEPA loss, no predictor",
          "Without the JEPA loss the predictor collapses.", ("predictor",), ("ste_norm",)),
    Claim("C6", "JEPA's weight is no matter",
          "Results are insensitive to lambda_jepa in {0.25, 1, 2}.", ("lambda_jepa",), ("ste_norm",)),
    Claim("C7", "off-policy labels misfit",
          "The off-policy label mismatches what gated execution rewards. Our test: on-policy labels do "
          "better, which is H2; the label audit stands beside it.", ("on-policy",), READINGS),
    Claim("C8", "at 25% the sign turns",
          "At a 25% budget the sign of G3 over G1 reverses: G3 is ahead early at 50% and behind at "
          "25%.",
          ("early", "quarter"), ("ste_norm",)),
    Claim("H0", "learned beats whole layers",
          "Learned gates beat a static choice of layers at the same budget, with the same losses.",
          ("static",), (*READINGS, MUON, DISTILLED, QUARTER)),
    Claim("H1", "labels gain most at dead gates",
          "What labels add depends on the estimator being alive: they gain more under `ste` than under "
          "`ste_norm`, under `scaled`, and under `ste` with the anchor.", ("alive",), (ANY,)),
    Claim("H2", "on-policy labels are better",
          "On-policy labels beat off-policy labels.", ("on-policy",), READINGS),
    Claim("H2b", "the dense target is better",
          "On-policy labels against the frozen model's distribution beat those against the next "
          "token.",
          ("dense target",), READINGS),
    Claim("H3", "weight 0.1 beats 1",
          "Labels at lambda 0.1 are better than at 1, and better than none.", ("lambda 0.1",),
          ("ste_norm",)),
    Claim("H4", "the anchor gives over half",
          "Under `ste` the anchor, without labels, gives more than half of what labels gain.",
          ("anchor",), ("ste",)),
    Claim("H6", "G3 early, small gradients",
          "G3 is ahead of G1 early and has smaller score gradients, under each estimator.",
          ("early", "gradient"), (*READINGS, MUON)),
    Claim("H7", "distillation favours gates",
          "Distillation helps learned gates more than it helps `static`.", ("distillation",), (ANY,))]
# H5 compares groups with each other (verdicts.judge_lengths): what a pair's second arm gains over its first.
LENGTH_CLAIM = Claim("H5", "labels gain less with length",
                     "What labels gain shrinks, or turns, with the length of training.", (), (ANY,))
LENGTH_GAINS = [label_gain("g1", "ste_norm"), label_gain("g3", "ste_norm"),
                ("g1_no_utilrank", "g1_distill_dense"), ("g3_no_utilrank", "g3_distill_dense")]
