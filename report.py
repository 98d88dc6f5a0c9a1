"""What finished runs say: verdicts on the paper's claims and on ours, tables in which every seed shows, pictures.

study.py calls `write_report`. The rule comes before the numbers, in `RULE` and `CLAIMS`; nothing here looks at a result first.
"""
import glob
import json
import math
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from audit import FACTORS, TRUTH
from configurator import ConfigError
from runs import read_json, write_json, write_whole
from train import causal

REFERENCES = ["cheap_only", "full_adapter"]
FIRST = (*REFERENCES, "random", "static", "g1_no_utilrank", "g3_no_utilrank", "g1_full_aux", "g3_full_aux", "g1_ste_norm", "best")  # in pictures
HIT_LEVELS = (0.25, 0.5, 0.75, 0.9)

RULE = """**Stated before the numbers.** Primary metric: test LM loss at the end of training, under causal `threshold` routing (what generation
uses); losses under `topk` see the future and are labelled not causal. Everything is chosen on val; test is read once, at the end of each run.
*Gap closed* = (L_cheap - L) / (L_cheap - L_dense), with `cheap_only` and `full_adapter` of the same seed. *Early* is the first half of the
steps. A contrast *agrees* or *disagrees* with its claim when all seeds have the sign and the paired 95% t-interval excludes 0 after Holm's
correction over all signed contrasts of C1-C3 and H1-H3; else it is *undecided*. The other claims are judged alike without the correction. Where
no difference of a loss is claimed, *agree* needs the whole interval inside +-0.005; *disagree* one sign in all seeds and an interval beside 0. The paper's own standard, the count of
seeds with the sign, stands beside it. The column *under scaled* repeats the contrast with the `scaled` estimator, without a correction:
the paper's estimator is not stated, `ste` is our reading. With 2 or 3 seeds (exploratory arms) hardly anything can be decided. A disagreement at tiny
scale is not a refutation."""

# Every claim: what is claimed, and the contrasts that decide it: (metric, arm A, arm B, the sign of A - B that the claim expects).
# An arm may be a pair (X, Y): then its value is X - Y, so that two differences are compared. Lower is better for losses and hits.
CLAIMS = [
    ("C1", "Under full aux G3 beats G1 early to mid training in 3/3 seeds: lower average LM, faster threshold hits, about 10.3x "
           "lower gradient norms; endpoint LM within 0.005.",
     [("early_average_loss", "g3_full_aux", "g1_full_aux", -1), ("average_loss", "g3_full_aux", "g1_full_aux", -1),
      ("hit_50", "g3_full_aux", "g1_full_aux", -1), ("score_grad_norm", "g3_full_aux", "g1_full_aux", -1),
      ("test_loss", "g3_full_aux", "g1_full_aux", 0)]),
    ("C2", "Removing util/rank together improves best LM, average LM and threshold-hit speed in 3/3 seeds, for both gates.",
     [(m, f"{g}_no_utilrank", f"{g}_full_aux", -1) for g in ("g1", "g3") for m in ("best_loss", "average_loss", "hit_50", "test_loss")]),
    ("C3", "Without util/rank, G3's early-to-mid advantage over G1 disappears.",
     [("early_average_loss", "g3_no_utilrank", "g1_no_utilrank", 0), ("hit_50", "g3_no_utilrank", "g1_no_utilrank", 0)]),
    ("C4", "Removing util/rank cuts the training-FLOPs proxy from about 1.53x to about 1.07x of full-only, and the time by about 39%.",
     [(m, f"{g}_no_utilrank", f"{g}_full_aux", -1) for g in ("g1", "g3") for m in ("forward_proxy", "train_ratio", "seconds")]),
    ("C5", "(A1) Without the JEPA alignment loss the predictor collapses.",
     [(m, "g3_no_jepa", "g3_full_aux", s) for m, s in (("r2_action_blind", -1), ("effective_rank", -1), ("collapsed", 1))]),
    ("C6", "(A4) Results are insensitive to lambda_jepa in {0.25, 1, 2}.",
     [("test_loss", "g3_jepa_025", "g3_full_aux", 0), ("test_loss", "g3_jepa_2", "g3_full_aux", 0)]),
    ("C7", "The off-policy label mismatches what gated execution rewards (our test: on-policy labels do better; see H2 and the audit).",
     [("test_loss", "g1_on_policy", "g1_full_aux", -1), ("test_loss", "g3_on_policy", "g3_full_aux", -1)]),
    ("C8", "At a 25% budget the G3-over-G1 sign reverses in two of three seeds.",
     [("test_loss", "g3_budget25", "g1_budget25", 1), ("early_average_loss", "g3_budget25", "g1_budget25", 1)]),
    ("H0", "(ours) Learned routing beats a static choice of layers at the same total budget.",
     [("test_loss", arm, "static", -1) for arm in ("g1_full_aux", "g3_full_aux", "g1_no_utilrank", "g3_no_utilrank", "best")]
     + [("test_loss", f"{arm}_budget25", "static_budget25", -1) for arm in ("g1", "g3", "best")]),
    ("H1", "(ours) Whether util/rank help depends on the estimator: they help more under `ste` than under `ste_norm`, which has the same forward.",
     [("test_loss", ("g1_full_aux", "g1_no_utilrank"), ("g1_ste_norm_full_aux", "g1_ste_norm"), -1)]),
    ("H2", "(ours) On-policy labels beat off-policy ones at equal lambda.",
     [(m, f"{g}_on_policy", f"{g}_full_aux", -1) for g in ("g1", "g3") for m in ("test_loss", "average_loss")]),
    ("H3", "(ours) A lambda of 0.1 keeps the labels' benefit without their late cost.",
     [("test_loss", "g1_lambda_01", "g1_no_utilrank", -1), ("test_loss", "g1_lambda_01", "g1_full_aux", -1)]),
]
CORRECTED = ("C1", "C2", "C3", "H1", "H2", "H3")
# The same recipe under another estimator, for the second verdict.
UNDER_SCALED = {f"{g}_{a}": f"{g}_{b}" for g in ("g1", "g3") for a, b in
                (("no_utilrank", "scaled"), ("full_aux", "scaled_off_policy"), ("on_policy", "scaled_on_policy"))}
COLUMNS = [("test_loss", "test LM, threshold"), ("test_topk", "test LM, topk (not causal)"), ("causal_gap", "threshold minus topk (not causal)"), ("gap_closed", "gap closed"),
           ("best_loss", "best val LM"), ("average_loss", "average val LM"), ("early_average_loss", "early average val LM"), ("hit_25", "hit 25%"),
           ("hit_50", "hit 50%"), ("hit_75", "hit 75%"), ("hit_90", "hit 90%"), ("realised", "realised budget, val"), ("score_grad_norm", "median gradient norm of the scores"),
           ("forward_proxy", "forward proxy"), ("train_ratio", "step / dense step"), ("inference_ratio", "inference / dense"), ("seconds", "seconds")]


# -----------------------------------------------------------------------------
# reading runs

def read_run(folder):
    summary = read_json(os.path.join(folder, "summary.json"))
    if summary is None:
        return None
    with open(os.path.join(folder, "log.jsonl")) as f:
        log = [json.loads(line) for line in f]
    return {"summary": summary, "steps": [r for r in log if "lm_loss" in r], "evals": [r for r in log if "val_loss" in r],
            "config": read_json(os.path.join(folder, "config.json"))}


def measure(run, references):
    """One run -> {metric: number}; a hit that never came is None. references: this seed's cheap_only and full_adapter runs."""
    s, evals = run["summary"], run["evals"][1:]
    if not s["test_loss"]:
        raise ConfigError(f"data/{run['config']['dataset']} has no test split, which a study reads once, at the end; make one with prepare.py")
    curve = [causal(e["val_loss"]) for e in evals]
    half = [v for e, v in zip(evals, curve) if e["step"] <= s["steps"] / 2]
    m = {"test_loss": causal(s["test_loss"]), "val_loss": causal(s["val_loss"]), "best_loss": min(curve),
         "test_topk": s["test_loss"].get("topk"), "average_loss": float(np.mean(curve)), "early_average_loss": float(np.mean(half or curve)),
         "forward_proxy": s["flops"]["forward_proxy"], "train_ratio": s["flops"]["train_ratio"],
         "inference_ratio": s["flops"]["inference_ratio"], "seconds": s["seconds"], "dense_test_loss": s["dense_test_loss"]}
    if m["test_topk"] is not None:
        m["causal_gap"] = m["test_loss"] - m["test_topk"]
    if "threshold" in s["realised_budget"]:
        m["realised"] = float(np.mean(s["realised_budget"]["threshold"]))
    norms = [r["grad_norm"]["scores"] for r in run["steps"]]
    if any(norms):
        m["score_grad_norm"] = float(np.median(norms))
    if all(references):
        cheap, dense = (causal(r["summary"]["test_loss"]) for r in references)
        m["gap_closed"] = (cheap - m["test_loss"]) / (cheap - dense)
        floor, top = (causal(r["evals"][-1]["val_loss"]) for r in references)  # on the rows that the curves use
        for level in HIT_LEVELS:
            m[f"hit_{level:.0%}"[:-1]] = next((e["step"] for e, v in zip(evals, curve) if (floor - v) / (floor - top) >= level), None)
    if run["evals"][-1].get("health"):
        layers = list(run["evals"][-1]["health"].values())
        m |= {k: float(np.mean([h[k] for h in layers])) for k in ("effective_rank", "r2_action_blind", "r2_mean", "std", "collapsed")}
    return m


def value(measured, arm, seed, name):
    """The metric of an arm and seed, of a pair of arms their difference; None where it never happened; raises KeyError where there is no run."""
    if isinstance(arm, tuple):
        return value(measured, arm[0], seed, name) - value(measured, arm[1], seed, name)
    return measured[arm][seed].get(name)


def contrast(name, a, b, sign, measured, seeds):
    """A - B, paired over the seeds that both have."""
    arms = [x for arm in (a, b) for x in (arm if isinstance(arm, tuple) else (arm,))]
    pairs = [(s, value(measured, a, s, name), value(measured, b, s, name)) for s in seeds if all(s in measured.get(x, {}) for x in arms)]
    if not pairs:
        return None
    kept = [(s, x, y) for s, x, y in pairs if x is not None and y is not None]
    diff = np.array([x - y for _, x, y in kept], dtype=float)
    row = {"metric": name, "a": show(a), "b": show(b), "expected": sign, "seeds": [s for s, *_ in pairs], "values_a": [x for _, x, _ in pairs],
           "values_b": [y for _, _, y in pairs], "differences": diff.tolist(), "interval": None, "p": 1.0}
    if len(diff) > 1:
        half = stats.t.ppf(0.975, len(diff) - 1) * diff.std(ddof=1) / math.sqrt(len(diff))
        row["interval"] = [diff.mean() - half, diff.mean() + half]
        row["p"] = float(stats.ttest_1samp(diff, 0).pvalue) if diff.std() > 0 else float(diff[0] == 0)
    row["same_sign"] = bool(len(kept) == len(pairs) and len(diff) > 0 and (np.all(diff > 0) or np.all(diff < 0)))
    return row


def judge(rows, corrected=True):
    """Holm over the contrasts with an expected sign (or no correction), then a verdict for each."""
    signed, worst = sorted((r for r in rows if r["expected"]), key=lambda r: r["p"]), 0.0
    for i, r in enumerate(signed):
        worst = r["p_holm"] = max(worst, min(1.0, r["p"] * (len(signed) - i))) if corrected else r["p"]
    for r in rows:
        mean = np.mean(r["differences"]) if r["differences"] else 0.0
        if r["expected"] == 0:  # no difference claimed
            inside = r["interval"] and max(map(abs, r["interval"])) <= 0.005 and r["metric"].endswith("loss")
            apart = r["same_sign"] and r["interval"] and r["interval"][0] * r["interval"][1] > 0
            r["verdict"] = "agree" if inside else "disagree" if apart else "undecided"
            r["signs"] = "-"
            continue
        r["signs"] = f"{sum(np.sign(d) == r['expected'] for d in r['differences'])} of {len(r['seeds'])}"
        decided = r["same_sign"] and r["p_holm"] < 0.05 and len(r["seeds"]) > 1
        r["verdict"] = "undecided" if not decided else "agree" if np.sign(mean) == r["expected"] else "disagree"


def contrasts(measured, seeds):
    """Every contrast of CLAIMS that has its runs, judged; under "scaled" the same contrast with that estimator."""
    rows = []
    for claim, _, specs in CLAIMS:
        for name, a, b, sign in specs:
            row = contrast(name, a, b, sign, measured, seeds)
            if row:
                other = [UNDER_SCALED.get(arm) if isinstance(arm, str) else None for arm in (a, b)]
                rows.append({"claim": claim, **row, "scaled": contrast(name, *other, sign, measured, seeds) if all(other) else None})
    judge([r for r in rows if r["claim"] in CORRECTED])
    judge([r for r in rows if r["claim"] not in CORRECTED], corrected=False)
    judge([r["scaled"] for r in rows if r["scaled"]], corrected=False)
    return rows


# -----------------------------------------------------------------------------
# the report

def show(arm):
    return f"({arm[0]} - {arm[1]})" if isinstance(arm, tuple) else arm


def fmt(value):
    if value is None:
        return "never"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"


def table(head, rows):
    return ["| " + " | ".join(map(str, head)) + " |", "|---" * len(head) + "|", *("| " + " | ".join(map(str, r)) + " |" for r in rows), ""]


def report(measured, runs, seeds, rows, extras):
    """The report in markdown. extras: {"tuning", "audit", "curves", "smaller_dense": ...} as study.py left them, each may be missing."""
    some = next(iter(next(iter(runs.values())).values()))
    c, s = some["config"], some["summary"]
    total = sum(run["summary"]["seconds"] for by_seed in runs.values() for run in by_seed.values())
    tokens = c["max_iters"] * c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"]
    lines = [f"# Study: scale {c['scale']}, {c['max_iters']} steps, seeds {', '.join(map(str, seeds))}", "",
             f"Backbone `{c['backbone']}` seed {c['backbone_seed']} (identity {s['identity']}), dataset `{c['dataset']}`, batch {c['batch_size']} x {c['block_size']}, "
             f"{tokens:,} tokens a run; {s['machine']}; {sum(map(len, runs.values()))} runs, {total / 3600:.1f} hours of training in all.", "",
             RULE.replace("\n", " "), "", "## Verdicts", ""]
    lines += table(["claim", "contrast (A - B)", "A", "B", "differences", "95% interval", "signs as claimed", "verdict", "under scaled"], [
        [r["claim"], f"{r['metric']}: {r['a']} - {r['b']}", ", ".join(map(fmt, r["values_a"])), ", ".join(map(fmt, r["values_b"])),
         ", ".join(f"{d:+.4f}" for d in r["differences"]), "[%+.4f, %+.4f]" % tuple(r["interval"]) if r["interval"] else "-", r["signs"], f"**{r['verdict']}**",
         f"{r['scaled']['verdict']}: {', '.join(f'{d:+.4f}' for d in r['scaled']['differences'])}" if r["scaled"] else "-"] for r in rows])
    lines += ["## Claim by claim", ""]
    for claim, text, specs in CLAIMS:
        mine = [r for r in rows if r["claim"] == claim]
        absent = sorted({show(x) for n, a, b, _ in specs for x in (a, b) if not any(r["a"] == show(a) and r["b"] == show(b) for r in mine)})
        lines.append(f"- **{claim}** {text} " + "; ".join(f"{r['metric']} {r['a']} vs {r['b']}: {r['verdict']}" for r in mine)
                     + (f". *Not run: {', '.join(absent)}.*" if absent else "."))
    lines += ["", *(f"![{name}]({name}.png)" for name in sorted(PLOTS)), ""]
    if "audit" in extras:
        lines += ["## Label audit", "", f"Spearman's rho with `{TRUTH}`: one token flipped, the later layers re-routed, its own and all later losses, which is "
                  "what gated execution rewards. Then the three factors apart, each the rho of two labels that differ in it alone: "
                  + "; ".join(f"*{name}*: `{a}` and `{b}`" for name, (a, b) in FACTORS.items()) + ". One column a layer, then their mean.", ""]
        for where, layers in extras["audit"].items():
            lines += [f"### {where}", "", *table(["label", *layers, "mean"], [
                [name, *(f"{layers[k][name]:+.2f}" for k in layers), f"{np.mean([layers[k][name] for k in layers]):+.2f}"] for name in next(iter(layers.values()))])]
    if "curves" in extras:
        lines += ["## One checkpoint at other budgets", "", "Validation loss under `threshold`, calibrated at each budget (realised in brackets).", "",
                  *table(["run", *(b for b, *_ in next(iter(extras["curves"].values())))], [
                      [where, *(f"{loss:.4f} ({real:.3f})" for _, loss, real in curve)] for where, curve in extras["curves"].items()])]
    if "smaller_dense" in extras:
        lines += ["## A smaller dense model", "", extras["smaller_dense"], ""]
    if "tuning" in extras:
        lines += ["## Learning rates", "", "Swept on validation text with a seed outside the study, as many trials for each. The recipes hold the best one; an arm that is not here takes "
                  "the rate of its gate, estimator and labels, and its cheap FFNs that of `cheap_only`.", "",
                  *table(["what", "rate: val LM"], [[name, ", ".join(f"{lr}: {loss:.4f}" for lr, loss in trials)] for name, trials in extras["tuning"].items()])]
    lines += ["## Every arm, every seed", ""]
    for key, title in COLUMNS:
        body = [[arm, *(fmt(measured[arm][s].get(key)) if key in measured[arm].get(s, {}) else "-" for s in seeds)]
                for arm in measured if any(key in m for m in measured[arm].values())]
        lines += [f"### {title}", "", *table(["arm", *(f"seed {s}" for s in seeds)], body)] if body else []
    return "\n".join(lines) + "\n"


# -----------------------------------------------------------------------------
# pictures: every seed is visible

def colors(runs):
    palette = plt.get_cmap("tab20")
    return {arm: palette(i % 20) for i, arm in enumerate(runs)}


def each(runs):
    for arm, by_seed in runs.items():
        for seed, run in by_seed.items():
            yield arm, seed, run, (arm if seed == min(by_seed) else None)


def plot_curves(axis, runs, measured):
    for arm, seed, run, tag in each(runs):
        points = [(e["step"], causal(e["val_loss"])) for e in run["evals"][1:]]
        axis.plot(*zip(*points), color=colors(runs)[arm], label=tag, lw=1.1)
    axis.set(title="Learning curves, causal routing, one line a seed", xlabel="step", ylabel="val LM loss")


def strip(axis, runs, measured, key, **labels):
    arms = [a for a in runs if any(m.get(key) is not None for m in measured[a].values())]
    for i, arm in enumerate(arms):
        values = [m[key] for m in measured[arm].values() if m.get(key) is not None]
        axis.plot([i] * len(values), values, "o", color=colors(runs)[arm], alpha=0.8)
        if len(values) < len(measured[arm]):
            axis.annotate("never in\n%d" % (len(measured[arm]) - len(values)), (i, min(values)), fontsize=7, ha="center", va="top")
    axis.set_xticks(range(len(arms)), arms, rotation=40, ha="right", fontsize=8)
    axis.set(**labels)


def plot_gap(axis, runs, measured):
    strip(axis, runs, measured, "gap_closed", title="Gap closed on test, one dot a seed", ylabel="0 = all cheap, 1 = dense")


def plot_hits(axis, runs, measured):
    for i, level in enumerate(("25", "50", "75", "90")):
        for j, arm in enumerate(runs):
            steps = [m.get(f"hit_{level}") for m in measured[arm].values()]
            axis.plot([i + (j - len(runs) / 2) * 0.05] * len(steps), [x if x is not None else math.nan for x in steps], "o", ms=4,
                      color=colors(runs)[arm], label=arm if i == 0 else None)
    axis.set_xticks(range(4), [f"{v}% of the gap" for v in (25, 50, 75, 90)])
    axis.set(title="First evaluation with that gap closed (no dot: never)", ylabel="step")


def plot_gradients(axis, runs, measured):
    for arm, seed, run, tag in each(runs):
        points = [(r["step"], r["grad_norm"]["scores"]) for r in run["steps"] if r["grad_norm"]["scores"] > 0]
        if points:
            axis.plot(*zip(*points), color=colors(runs)[arm], label=tag, lw=0.8)
    axis.set(title="Gate gradient: norm of d(LM + util + rank)/d(scores)", xlabel="step", yscale="log")


def plot_health(axis, runs, measured):
    for arm, seed, run, tag in each(runs):
        points = [(e["step"], np.mean([h["r2_action_blind"] for h in e["health"].values()])) for e in run["evals"] if e.get("health")]
        if points:
            axis.plot(*zip(*points), color=colors(runs)[arm], label=tag)
    axis.axhline(0, color="grey", lw=0.8)
    axis.set(title="Predictor health: R^2 over the action-blind prediction (0 or less: collapsed)", xlabel="step", ylim=(-1.5, 1))


def plot_budget(axis, runs, measured):
    for arm, seed, run, tag in each(runs):
        realised = run["summary"]["realised_budget"].get("threshold")
        if realised:
            axis.plot(run["config"]["controlled"], realised, "o-", color=colors(runs)[arm], label=tag, lw=0.8, ms=3)
    axis.set(title="Realised budget under threshold", xlabel="layer", ylabel="share of tokens full", ylim=(-0.03, 1.03))


def cloud(axis, runs, measured, key, **labels):
    for arm in runs:
        x, y = zip(*((m[key], m["test_loss"]) for m in measured[arm].values()))
        axis.plot(x, y, "o", ms=4, color=colors(runs)[arm])
        axis.annotate(arm, (max(x), y[x.index(max(x))]), fontsize=6, xytext=(4, -2), textcoords="offset points")
    axis.set(ylabel="test LM loss, causal", **labels)


def plot_cost(axis, runs, measured):
    cloud(axis, runs, measured, "train_ratio", title="Cost against quality", xlabel="training FLOPs of a step / a dense step")


def plot_time(axis, runs, measured):
    cloud(axis, runs, measured, "seconds", title="Time against quality (runs side by side on one machine)", xlabel="seconds of training")


PLOTS = {"time_quality": plot_time, "curves": plot_curves, "gap_closed": plot_gap, "hits": plot_hits, "gate_gradients": plot_gradients,
         "predictor_health": plot_health, "realised_budget": plot_budget, "cost_quality": plot_cost}


def write_report(arms, folder, extras):
    """Read every finished run of `arms` in `folder`; write report.md, results.json and the pictures there."""
    there = {a: sorted(int(os.path.basename(p)[4:]) for p in glob.glob(os.path.join(glob.escape(folder), a, "seed*"))) for a in arms}
    runs = {a: {s: r for s in seeds if (r := read_run(os.path.join(folder, a, f"seed{s}")))} for a, seeds in there.items()}
    runs = {a: r for a, r in runs.items() if r}
    seeds = sorted({s for r in runs.values() for s in r})
    if not runs:
        raise ConfigError(f"no finished run in {folder}; run python study.py first")
    measured = {a: {s: measure(run, [runs.get(n, {}).get(s) for n in REFERENCES]) for s, run in by_seed.items()} for a, by_seed in runs.items()}
    rows = contrasts(measured, seeds)
    text = report(measured, runs, seeds, rows, extras)
    write_whole(os.path.join(folder, "report.md"), lambda part: open(part, "w").write(text))
    write_json(os.path.join(folder, "results.json"), {"arms": measured, "contrasts": rows, **extras})
    few = {a: runs[a] for a in sorted(runs, key=lambda a: a not in FIRST)[:12]}  # more lines than that nobody can tell apart
    for name, plot in PLOTS.items():
        figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
        plot(axis, runs if plot in (plot_gap, plot_cost, plot_time) else few, measured)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6, ncols=3)
        axis.grid(alpha=0.3)
        write_whole(os.path.join(folder, f"{name}.png"), lambda part: figure.savefig(part, dpi=100, format="png"))
        plt.close(figure)
    print(f"wrote {folder}/report.md, results.json and {len(PLOTS)} pictures")
    for r in rows:
        print(f"{r['claim']} {r['metric']}: {r['a']} - {r['b']} = {', '.join(f'{d:+.4f}' for d in r['differences'])}: {r['verdict']}")
