"""Arms x seeds -> a report, claim by claim, with tables and pictures.

    python study.py                                   the default arms, 3 seeds, at tiny scale: about an hour on 2 cores
    python study.py --arms=all --seeds=0,1,2,3,4      every arm
    python study.py config/small.py --arms=g1_full_aux,g3_full_aux,cheap_only,full_adapter --max_iters=1000
    python study.py --report_only                     the report of what is finished, without running anything

Any key of train.py goes to every arm. Runs lie in out/<scale>/study/<arm>/seed<k>, the report beside them. What is finished
is skipped, and an interrupted study goes on with the same command.
"""
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

import train as trainer
from configurator import ConfigError, configure, did_you_mean, exit_on_error
from runs import Machine, build, read_json, write_json, write_whole

HERE = os.path.dirname(os.path.abspath(__file__))
REFERENCES = ["cheap_only", "full_adapter"]
DEFAULT_ARMS = REFERENCES + ["random", "static", "g1_no_utilrank", "g3_no_utilrank", "g1_full_aux", "g3_full_aux", "best"]
OPTIONS = dict(arms="", seeds="0,1,2", jobs=0, report_only=False)  # jobs: runs side by side; 0 is one per core, on a GPU one
RUN_DEFAULTS = dict(backbone="backbone_long", max_iters=600, eval_interval=50)  # at tiny; a scale file or --key changes them
HIT_LEVELS = (0.25, 0.5, 0.75, 0.9)

# Every claim: what the paper states, and the contrasts that decide it here: (metric, arm A, arm B, the sign of A - B that the
# claim expects). A contrast agrees or disagrees when every seed has the sign and the paired 95% t-interval, Holm-corrected
# over all contrasts with a sign, excludes 0; else it is undecided. Lower is better for losses and for hits (steps).
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
    ("C7", "The off-policy label mismatches what gated execution rewards (our test: on-policy labels do better; see also H2).",
     [("test_loss", "g1_on_policy", "g1_full_aux", -1), ("test_loss", "g3_on_policy", "g3_full_aux", -1)]),
    ("C8", "At a 25% budget the G3-over-G1 sign reverses in two of three seeds.",
     [("test_loss", "g3_budget25", "g1_budget25", 1), ("average_loss", "g3_budget25", "g1_budget25", 1)]),
    ("H0", "(ours) Learned routing beats a static choice of layers at the same total budget.",
     [("test_loss", arm, "static", -1) for arm in ("g1_full_aux", "g3_full_aux", "g1_no_utilrank", "g3_no_utilrank", "best")]),
]
COLUMNS = [("test_loss", "test LM, threshold"), ("test_topk", "test LM, topk (not causal)"), ("gap_closed", "gap closed"),
           ("best_loss", "best val LM"), ("average_loss", "average val LM"), ("hit_25", "hit 25%"), ("hit_50", "hit 50%"),
           ("hit_75", "hit 75%"), ("hit_90", "hit 90%"), ("realised", "realised budget"), ("forward_proxy", "forward proxy"),
           ("train_ratio", "step / dense step"), ("seconds", "seconds")]


def all_arms():
    """The recipes of config/ that train controllers, by reading their files."""
    arms = []
    for name in sorted(f[:-3] for f in os.listdir(os.path.join(HERE, "config")) if f.endswith(".py")):
        config = configure(trainer.DEFAULTS, [os.path.join(HERE, "config", f"{name}.py")])
        if config["recipe"] == name and config["mode"] != "dense":
            arms.append(name)
    return REFERENCES + [a for a in arms if a not in REFERENCES]


# -----------------------------------------------------------------------------
# running

def arm_words(arm, seed, words, folder):
    """The command line of train.py for one run."""
    scales = [w for w in words if not w.startswith("--")]
    overrides = [w for w in words if w.startswith("--")]
    given = {w[2:].partition("=")[0] for w in overrides}
    if not scales:
        overrides += [f"--{k}={v}" for k, v in RUN_DEFAULTS.items() if k not in given]
    out = os.path.join(folder, arm, f"seed{seed}")
    return [*scales, os.path.join(HERE, "config", f"{arm}.py"), *overrides, f"--seed={seed}", f"--out_dir={out}"]


def project(arms, seeds, words, folder, jobs):
    """Seconds that each arm's run should take: one arm's step and evaluation timed here, the others by the ledger."""
    config = trainer.validate(configure(trainer.DEFAULTS, arm_words("g1_no_utilrank", 0, words, folder)))
    machine = Machine(config)
    trainer.backbone_source(config)
    data, meta = trainer.open_data(config, machine)
    model = build(config, meta, machine)
    for p in model.backbone().values():
        p.requires_grad_(False)
    optimizers, batches = trainer.make_optimizers(model, config), trainer.eval_batches(data, config)
    times = []
    for step in range(6):
        began = time.time()
        trainer.train_step(model, optimizers, config, data["train"], step, machine)
        times.append(time.time() - began)
    began = time.time()
    trainer.evaluate_all(model, config, batches, machine)
    evaluation, one = time.time() - began, sorted(times)[2]
    base, seconds = None, {}
    for arm in ["g1_no_utilrank", *arms]:
        c = trainer.validate(configure(trainer.DEFAULTS, arm_words(arm, 0, words, folder)))
        ratio = trainer.flops_of(build(c, meta, machine), c)["train_ratio"]
        base = base or ratio
        seconds[arm] = c["max_iters"] * one * ratio / base + (c["max_iters"] / c["eval_interval"] + 9) * evaluation + 8
    return seconds


def run_all(arms, seeds, words, folder, jobs):
    todo = [(a, s) for s in seeds for a in arms if not os.path.exists(os.path.join(folder, a, f"seed{s}", "summary.json"))]
    print(f"{len(arms)} arms x {len(seeds)} seeds, {len(todo)} runs to do, {jobs} at a time", flush=True)
    if not todo:
        return
    seconds = project(arms, seeds, words, folder, jobs)
    print(f"projected: {sum(seconds[a] for a, _ in todo) / jobs / 60:.0f} minutes, and the backbone where it is not there yet", flush=True)
    first = [a for a in todo if a[0] == todo[0][0]][:1]  # the first run makes data and backbone; the others wait for it
    began, done = time.time(), []

    def run(job):
        arm, seed = job
        out = os.path.join(folder, arm, f"seed{seed}")
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, "stdout.txt"), "a") as log:
            code = subprocess.run([sys.executable, os.path.join(HERE, "train.py"), *arm_words(arm, seed, words, folder)],
                                  stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            with open(os.path.join(out, "stdout.txt")) as log:
                raise ConfigError(f"{arm} seed {seed} stopped with exit code {code}: {log.read().strip().splitlines()[-1]} "
                                  f"(see {out}/stdout.txt)")
        done.append(seconds[arm])
        left = sum(seconds[a] for a, _ in todo) - sum(done)
        pace = (time.time() - began) / sum(done)
        print(f"{len(done)}/{len(todo)}: {arm} seed {seed} finished, about {left * pace / 60:.0f} minutes left", flush=True)

    run(first[0])
    began = time.time() - seconds[first[0][0]] / jobs
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, job) for job in todo if job != first[0]]:
            future.result()


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
    curve = [trainer.causal(e["val_loss"]) for e in evals]
    half = [v for e, v in zip(evals, curve) if e["step"] <= s["steps"] / 2]
    m = {"test_loss": trainer.causal(s["test_loss"]), "val_loss": trainer.causal(s["val_loss"]), "best_loss": min(curve),
         "test_topk": s["test_loss"].get("topk"), "average_loss": float(np.mean(curve)), "early_average_loss": float(np.mean(half or curve)),
         "forward_proxy": s["flops"]["forward_proxy"], "train_ratio": s["flops"]["train_ratio"],
         "inference_ratio": s["flops"]["inference_ratio"], "seconds": s["seconds"], "dense_test_loss": s["dense_test_loss"]}
    if "threshold" in s["realised_budget"]:
        m["realised"] = float(np.mean(s["realised_budget"]["threshold"]))
    norms = [r["grad_norm"]["scores"] for r in run["steps"]]
    if any(norms):
        m["score_grad_norm"] = float(np.median(norms))
    if all(references):
        cheap, dense = ({k: trainer.causal(r["summary"][f"{k}_loss"]) for k in ("val", "test")} for r in references)
        m["gap_closed"] = (cheap["test"] - m["test_loss"]) / (cheap["test"] - dense["test"])
        floor, top = (trainer.causal(r["evals"][-1]["val_loss"]) for r in references)  # on the rows that the curves use
        for level in HIT_LEVELS:
            m[f"hit_{level:.0%}"[:-1]] = next((e["step"] for e, v in zip(evals, curve) if (floor - v) / (floor - top) >= level), None)
    if run["evals"][-1].get("health"):
        layers = list(run["evals"][-1]["health"].values())
        m |= {k: float(np.mean([h[k] for h in layers])) for k in ("effective_rank", "r2_action_blind", "r2_mean", "std", "collapsed")}
    return m


def contrast(name, a, b, sign, measured, seeds):
    """A - B, paired over the seeds that both have."""
    pairs = [(s, measured[a][s].get(name), measured[b][s].get(name)) for s in seeds if s in measured.get(a, {}) and s in measured.get(b, {})]
    if not pairs:
        return None
    kept = [(s, x, y) for s, x, y in pairs if x is not None and y is not None]
    diff = np.array([x - y for _, x, y in kept], dtype=float)
    row = {"metric": name, "a": a, "b": b, "expected": sign, "seeds": [s for s, *_ in pairs], "values_a": [x for _, x, _ in pairs],
           "values_b": [y for _, _, y in pairs], "differences": diff.tolist(), "interval": None, "p": 1.0}
    if len(diff) > 1:
        half = stats.t.ppf(0.975, len(diff) - 1) * diff.std(ddof=1) / math.sqrt(len(diff))
        row["interval"] = [diff.mean() - half, diff.mean() + half]
        row["p"] = float(stats.ttest_1samp(diff, 0).pvalue) if diff.std() > 0 else float(diff[0] == 0)
    row["same_sign"] = bool(len(kept) == len(pairs) and len(diff) > 0 and (np.all(diff > 0) or np.all(diff < 0)))
    return row


def judge(rows):
    """Holm over the contrasts with an expected sign, then a verdict for each."""
    signed = sorted((r for r in rows if r["expected"]), key=lambda r: r["p"])
    worst = 0.0
    for i, r in enumerate(signed):
        worst = r["p_holm"] = max(worst, min(1.0, r["p"] * (len(signed) - i)))
    for r in rows:
        mean = np.mean(r["differences"]) if r["differences"] else 0.0
        if r["expected"] == 0:  # no difference claimed: an interval inside +-0.005 agrees, one outside 0 with one sign disagrees
            inside = r["interval"] and max(map(abs, r["interval"])) <= 0.005 and r["metric"].endswith("loss")
            apart = r["same_sign"] and r["interval"] and r["interval"][0] * r["interval"][1] > 0
            r["verdict"] = "agree" if inside else "disagree" if apart else "undecided"
            r["signs"] = "-"
            continue
        r["signs"] = f"{sum(np.sign(d) == r['expected'] for d in r['differences'])} of {len(r['seeds'])}"
        decided = r["same_sign"] and r["p_holm"] < 0.05 and len(r["seeds"]) > 1
        r["verdict"] = "undecided" if not decided else "agree" if np.sign(mean) == r["expected"] else "disagree"
    return rows


# -----------------------------------------------------------------------------
# the report

def fmt(value):
    if value is None:
        return "never"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"


def report(measured, runs, seeds, folder):
    """The markdown report and the contrasts as data."""
    any_run = next(iter(next(iter(runs.values())).values()))
    c, s = any_run["config"], any_run["summary"]
    rows = [(claim, contrast(*spec, measured, seeds)) for claim, _, specs in CLAIMS for spec in specs]
    judge([r for _, r in rows if r])
    lines = [
        f"# Study: scale {c['scale']}, {c['max_iters']} steps, seeds {', '.join(map(str, seeds))}", "",
        f"Backbone `{c['backbone']}` (identity {s['identity']}), dataset `{c['dataset']}`, batch {c['batch_size']} x {c['block_size']}, "
        f"{s['machine']}.", "",
        "**Stated before the numbers.** Primary metric: test LM loss at the end, under causal `threshold` routing (what generation uses); "
        "val losses are means over the same rows for every arm. `topk` losses see the future and are labelled not causal. *Gap closed* = (L_cheap - L) / "
        "(L_cheap - L_dense), with `cheap_only` and `full_adapter` of the same seed. *Early* is the first half of the steps. A contrast "
        "*agrees* or *disagrees* when all seeds have the sign and the paired 95% t-interval, Holm-corrected over all signed contrasts here, excludes "
        "0; else it is *undecided*. Where no difference is claimed, *agree* needs the whole interval inside +-0.005. With 3 seeds this "
        "rule is strict; the paper's own standard, 3 of 3 signs, stands beside it. A tiny-scale disagreement is not a refutation.", "",
        "## Verdicts", "", "| claim | contrast (A - B) | A | B | differences | 95% interval | signs as claimed | verdict |", "|---|---|---|---|---|---|---|---|"]
    for claim, r in rows:
        if r:
            lines.append(f"| {claim} | {r['metric']}: {r['a']} - {r['b']} | {', '.join(map(fmt, r['values_a']))} | {', '.join(map(fmt, r['values_b']))} | "
                         f"{', '.join(f'{d:+.4f}' for d in r['differences'])} | {'[%+.4f, %+.4f]' % tuple(r['interval']) if r['interval'] else '-'} | "
                         f"{r['signs']} | **{r['verdict']}** |")
    lines += ["", "## Claim by claim", ""]
    for claim, text, specs in CLAIMS:
        mine = [r for name, r in rows if name == claim and r]
        lines.append(f"- **{claim}** {text} " + ("; ".join(f"{r['metric']} {r['a']} vs {r['b']}: {r['verdict']}" for r in mine) + "."
                                                 if mine else "*Its arms were not run: " + ", ".join(sorted({a for x in specs for a in x[1:3]})) + ".*"))
    lines += ["", "## Every arm, every seed", ""]
    for key, title in COLUMNS:
        table = [f"| {arm} | " + " | ".join(fmt(measured[arm][s].get(key)) if key in measured[arm].get(s, {}) else "-" for s in seeds) + " |"
                 for arm in measured if any(key in m for m in measured[arm].values())]
        if table:
            lines += [f"### {title}", "", "| arm | " + " | ".join(f"seed {s}" for s in seeds) + " |", "|---" * (len(seeds) + 1) + "|", *table, ""]
    lines += ["## Pictures", "", *(f"![{name}]({name}.png)" for name in sorted(PLOTS))]
    return "\n".join(lines) + "\n", [{"claim": name, **r} for name, r in rows if r]


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
        points = [(e["step"], trainer.causal(e["val_loss"])) for e in run["evals"][1:]]
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


def plot_cost(axis, runs, measured):
    for arm in runs:
        points = [(m["train_ratio"], m["test_loss"]) for m in measured[arm].values()]
        axis.plot(*zip(*points), "o", color=colors(runs)[arm], label=arm)
    axis.set(title="Cost against quality", xlabel="training FLOPs of a step / a dense step", ylabel="test LM loss, causal")


PLOTS = {"curves": plot_curves, "gap_closed": plot_gap, "hits": plot_hits, "gate_gradients": plot_gradients,
         "predictor_health": plot_health, "realised_budget": plot_budget, "cost_quality": plot_cost}


def write_report(arms, seeds, folder):
    runs = {a: {s: r for s in seeds if (r := read_run(os.path.join(folder, a, f"seed{s}")))} for a in arms}
    runs = {a: r for a, r in runs.items() if r}
    if not runs:
        raise ConfigError(f"no finished run in {folder}; run python study.py first")
    measured = {a: {s: measure(run, [runs.get(n, {}).get(s) for n in REFERENCES]) for s, run in by_seed.items()} for a, by_seed in runs.items()}
    text, contrasts = report(measured, runs, seeds, folder)
    write_whole(os.path.join(folder, "report.md"), lambda part: open(part, "w").write(text))
    write_json(os.path.join(folder, "results.json"), {"arms": measured, "contrasts": contrasts})
    for name, plot in PLOTS.items():
        figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
        plot(axis, runs, measured)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, ncols=2)
        axis.grid(alpha=0.3)
        write_whole(os.path.join(folder, f"{name}.png"), lambda part: figure.savefig(part, dpi=100, format="png"))
        plt.close(figure)
    print(f"wrote {folder}/report.md, results.json and {len(PLOTS)} pictures")
    for r in contrasts:
        print(f"{r['claim']} {r['metric']}: {r['a']} - {r['b']} = {', '.join(f'{d:+.4f}' for d in r['differences'])}: {r['verdict']}")


def parse_seeds(text):
    try:
        seeds = [int(s) for s in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds={text!r} is no list of whole numbers; write --seeds=0,1,2") from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds={text!r} names a seed twice, or a negative one; write each once, such as --seeds=0,1,2")
    return seeds


def main():
    mine = [w for w in sys.argv[1:] if w[2:].partition("=")[0] in OPTIONS and w.startswith("--")]
    words = [w for w in sys.argv[1:] if w not in mine]
    options, known = configure(OPTIONS, mine), all_arms()
    config = {k: v for k, v in configure({**trainer.DEFAULTS, **OPTIONS}, sys.argv[1:]).items() if k in trainer.DEFAULTS}
    arms = known if options["arms"] == "all" else options["arms"].split(",") if options["arms"] else DEFAULT_ARMS
    for arm in arms:
        if arm not in known:
            raise ConfigError(f"--arms names {arm!r}, which is no recipe in config/; {did_you_mean(arm, known)}")
    if len(set(arms)) != len(arms):
        raise ConfigError(f"--arms={options['arms']} names an arm twice; name each once")
    seeds = parse_seeds(options["seeds"])
    if options["jobs"] < 0:
        raise ConfigError(f"--jobs={options['jobs']} is negative; give 0 (one per core) or more")
    jobs = options["jobs"] or (1 if Machine(dict(config)).device == "cuda" else os.cpu_count())
    if jobs > 1 and not config["threads"]:
        words.append(f"--threads={max(1, os.cpu_count() // jobs)}")
    folder = os.path.join("out", config["scale"], "study")
    if not options["report_only"]:
        run_all(arms, seeds, words, folder, jobs)
    write_report(arms, seeds, folder)


if __name__ == "__main__":
    exit_on_error(main)
