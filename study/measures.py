"""Which records may be compared, what each is measured against, and what is measured of it."""
import json
import statistics

from metrics import DEAD, causal, first_hits, gap_closed

# -----------------------------------------------------------------------------
# groups and references

def group_of(record):
    """A text that is equal for runs that may be compared."""
    return json.dumps(record["group"], sort_keys=True)


def group_difference(one, other):
    """(key, value, other value) of the first difference of two groups; None where they are equal."""
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            return key, one.get(key), other.get(key)
    return None


def group_title(key):
    """What tells a scale's groups apart, in words, from a record's group or a run's config."""
    title = f"{key['max_iters']:,} steps"
    if key["backbone"] == "backbone":
        title += ", quick backbone"
    if key["backbone_seed"]:
        title += f", backbone seed {key['backbone_seed']}"
    return title


def by_group(records):
    """{group: its records}, in the order in which they came."""
    groups = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    return groups


def trained_like(config):
    """How the references of an arm are trained: (lambda_lm, lambda_distill, does Muon take the matrices)."""
    muon = config.get("muon_lr", 0.0) > 0
    if config["lambda_distill"] == 0:
        return 1.0, 0.0, muon
    return config["lambda_lm"], config["lambda_distill"], muon


PLAIN = (1.0, 0.0, False)  # cheap_only and full_adapter themselves


def references_of(record, records, like=None):
    """The all-cheap and the dense reference of a record's seed that were trained `like` this, by default like
    the record -> ((cheap, dense), trained alike?). Where these are not there, the plain ones stand in;
    (None, None) without either."""
    candidates = [r for r in records if r["seed"] == record["seed"] and group_of(r) == group_of(record)]
    own = like or trained_like(record["config"])
    for wanted in (own, PLAIN):
        pair = [find_reference(candidates, mode, wanted) for mode in ("cheap", "adapter")]
        if all(pair):
            return tuple(pair), wanted == own
    return (None, None), False


def find_reference(candidates, mode, wanted):
    for record in sorted(candidates, key=arm_of):
        if record["config"]["mode"] == mode and trained_like(record["config"]) == wanted:
            return record
    return None


def arm_of(record):
    return record["arm"]


# -----------------------------------------------------------------------------
# measures

def measure(record, references, plain=(None, None)):
    """{metric: number} of a record; references: its (cheap, dense) records, or (None, None); plain: those
    that every arm has in common. A metric that does not apply is absent. A hit that never came, and its cost,
    are None: later than any step."""
    flops, group = record["flops"], record["group"]
    curve = [(step, loss) for step, loss, _ in record["evaluations"] if step > 0]
    losses = [loss for _, loss in curve]
    early = [loss for step, loss in curve if step <= group["max_iters"] / 2]
    values = {"test_loss": causal(record["test_loss"]), "val_loss": causal(record["val_loss"]),
              "best_loss": min(losses), "average_loss": statistics.fmean(losses),
              "early_average_loss": statistics.fmean(early or losses),
              "train_flops": group["max_iters"] * flops["train_ratio"], "seconds": record["seconds"],
              "forward_proxy": flops["forward_proxy"], "train_ratio": flops["train_ratio"],
              "inference_ratio": flops["inference_ratio"]}
    if "topk" in record["test_loss"]:
        values["test_topk"] = record["test_loss"]["topk"]
        values["causal_gap"] = values["test_loss"] - values["test_topk"]
    if "threshold" in record["realised_budget"]:
        values["realised"] = statistics.fmean(record["realised_budget"]["threshold"])
    values |= measure_logged(record)
    if all(references):
        values |= measure_gap(values, curve, references)
    if all(plain):
        common = measure_gap(values, curve, plain)
        values |= {f"common_{name}": common[name] for name in ("gap_closed", "cost_to_75") if name in common}
    return values


def measure_logged(record):
    """What the gate's own log says."""
    columns, values = record["logged"], {}
    if "score_gradient" in columns:
        values["score_gradient"] = statistics.median(columns["score_gradient"])
    if "slope" in columns:
        values["slope"] = min(columns["slope"][-1])
        values["dead"] = values["slope"] < DEAD
    if "label_correlation" in columns:
        values["label_correlation"] = columns["label_correlation"][-1]
    if record["health"]:
        names = ("r2_action_blind", "effective_rank", "collapsed")
        values |= dict(zip(names, record["health"][-1][1:]))
    return values


def measure_gap(values, curve, references):
    """Against the references: on test at the end, and on the way on the rows that the curves use."""
    cheap, dense = (causal(r["test_loss"]) for r in references)
    floor, top = (r["evaluations"][-1][1] for r in references)
    if cheap == dense or floor == top:  # no gap
        return {}
    gap = {"gap_closed": gap_closed(values["test_loss"], cheap, dense)}
    for level, step in first_hits(curve, floor, top).items():
        gap[f"hit_{round(100 * level)}"] = step
    hit = gap["hit_75"]
    gap["cost_to_75"] = None if hit is None else hit * values["train_ratio"]
    return gap
