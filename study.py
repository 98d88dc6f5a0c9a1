"""Arms x seeds -> a report, claim by claim, with tables and pictures.

    python study.py                                   the default arms, 3 seeds, at tiny scale: about half an hour on 2 cores
    python study.py --arms=tier1 --seeds=0,1,2,3,4    the arms that decide the claims; tier2: the other estimator; tier3: exploratory; all
    python study.py config/small.py --arms=g1_full_aux,g3_full_aux,cheap_only,full_adapter --max_iters=1000
    python study.py --tune                            the sweep of learning rates, on validation text with a seed of its own
    python study.py --audit                           besides: the labels against exact flips, one checkpoint at other budgets
    python study.py --report_only                     the report of what is finished, without running anything

Any key of train.py but seed and out_dir goes to every arm. Runs lie in out/<scale>/study/<arm>/seed<k> (with
--backbone_seed=1, another dense model, in study-backbone1), the report beside them. What is finished
is skipped, and an interrupted study goes on with the same command.
"""
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import train as trainer
from audit import budget_curve, label_audit
from configurator import ConfigError, configure, did_you_mean, exit_on_error
from model import GPT
from report import REFERENCES, write_report
from runs import Machine, build, freeze, model_config, read_json, write_json

HERE = os.path.dirname(os.path.abspath(__file__))
# Arms that are a recipe of config/ with something else (those with a rate of their own are files).
VARIANTS = {
    "g3_scaled": "g3_full_aux --estimator=scaled --lambda_util=0 --lambda_rank=0", "g1_scaled_off_policy": "g1_full_aux --estimator=scaled",
    "g1_scaled_on_policy": "g1_on_policy --estimator=scaled", "g3_scaled_on_policy": "g3_scaled_off_policy --oracle=on_policy",
    "g1_ste_norm": "g1_no_utilrank --estimator=ste_norm", "g1_ste_norm_full_aux": "g1_full_aux --estimator=ste_norm",
    "g1_lambda_003": "g1_full_aux --lambda_util=0.03 --lambda_rank=0.03", "g1_lambda_01": "g1_full_aux --lambda_util=0.1 --lambda_rank=0.1",
    "g1_lambda_03": "g1_full_aux --lambda_util=0.3 --lambda_rank=0.3", "g1_lambda_3": "g1_full_aux --lambda_util=3 --lambda_rank=3",
    "static_budget25": "static --budget=0.25", "best_budget25": "best --budget=0.25",
}
DEFAULT_ARMS = REFERENCES + ["random", "static", "g1_no_utilrank", "g3_no_utilrank", "g1_full_aux", "g3_full_aux", "best"]
TIER1 = DEFAULT_ARMS + ["g1_on_policy", "g3_on_policy", "g1_scaled", "g1_ste_norm", "g1_ste_norm_full_aux", "g1_lambda_01", "static_budget25", "best_budget25"]
TIER2 = ["g3_scaled", "g1_scaled_off_policy", "g3_scaled_off_policy", "g1_scaled_on_policy", "g3_scaled_on_policy", "linear"]
TIER3 = ["g3_no_jepa", "g3_jepa_025", "g3_jepa_2", "g1_budget25", "g3_budget25", "random_budget25", "g1_lambda_003", "g1_lambda_03", "g1_lambda_3"]
OPTIONS = dict(arms="", seeds="0,1,2", jobs=0, report_only=False, tune=False, audit=False)  # jobs: runs side by side; 0 is one per core, on a GPU one
RUN_DEFAULTS = dict(backbone="backbone_long", max_iters=300, eval_interval=30)  # at tiny; a scale file or --key changes them
# What --tune tries, the same number for everything; what it chose at tiny is in the recipes.
TRIALS = {"gate_lr": (1e-3, 3e-3, 1e-2), "learning_rate": {"cheap_only": (1e-2, 3e-2, 1e-1), "full_adapter": (3e-4, 1e-3, 3e-3)}}
TUNED_ARMS = ["g1_no_utilrank", "g1_full_aux", "g1_scaled", "g1_scaled_off_policy", "g3_no_utilrank", "g3_full_aux", "g3_scaled", "g3_scaled_off_policy"]
TUNE = dict(seed=10, max_iters=200, eval_interval=200, final_eval_iters=16)
AUDITED = ["g1_full_aux", "g3_full_aux", "g1_on_policy"]
CURVES = ["g1_full_aux", "g1_ste_norm", "best", "static", "random"]


def all_arms():
    """The recipes of config/ that train controllers, by reading their files, and their variants."""
    arms = []
    for name in sorted(f[:-3] for f in os.listdir(os.path.join(HERE, "config")) if f.endswith(".py")):
        config = configure(trainer.DEFAULTS, [os.path.join(HERE, "config", f"{name}.py")])
        if config["recipe"] == name and config["mode"] != "dense":
            arms.append(name)
    return REFERENCES + [a for a in [*arms, *VARIANTS] if a not in REFERENCES]


def recipe_words(arm):
    """The words of train.py's command line that make an arm."""
    recipe, *changes = VARIANTS.get(arm, arm).split()
    return [os.path.join(HERE, "config", f"{recipe}.py"), *changes, *([f"--recipe={arm}"] if changes else [])]


# -----------------------------------------------------------------------------
# running

def arm_words(arm, seed, words, folder):
    """The command line of train.py for one run. At tiny of the study's length, unless `words` say otherwise."""
    scales = [w for w in words if not w.startswith("--")]
    given = {w[2:].partition("=")[0] for w in words}
    over = {w[2:].partition("=")[0]: w for w in recipe_words(arm)[1:]} | {w[2:].partition("=")[0]: w for w in words if w.startswith("--")}
    line = [*scales, recipe_words(arm)[0], *over.values()]
    if not scales:
        line += [f"--{k}={v}" for k, v in RUN_DEFAULTS.items() if k not in given]
    if arm in AUDITED and "keep_checkpoints" not in given:
        line.append("--keep_checkpoints=True")
    return [*line, f"--seed={seed}", f"--out_dir={os.path.join(folder, arm, f'seed{seed}')}"]


def project(jobs):
    """Seconds that each of `jobs`, {out_dir: words of train.py}, should take: one step and evaluation timed here, the others by the ledger."""
    config = trainer.validate(configure(trainer.DEFAULTS, next(iter(jobs.values()))))
    config |= dict(mode="topk", gate="g1", estimator="ste", lambda_util=0.0, lambda_rank=0.0)
    machine = Machine(config)
    trainer.backbone_source(config)
    data, meta = trainer.open_data(config, machine)
    model = build(config, meta, machine)
    freeze(model, machine)
    optimizers, batches = trainer.make_optimizers(model, config), trainer.eval_batches(data, config)
    times = []
    for step in range(6):
        began = time.time()
        trainer.train_step(model, optimizers, config, data["train"], step, machine)
        times.append(time.time() - began)
    began = time.time()
    trainer.evaluate_all(model, config, batches, machine)
    evaluation, one = time.time() - began, sorted(times)[2]
    base, seconds = trainer.flops_of(model, config)["train_ratio"], {}
    for out, words in jobs.items():
        c = trainer.validate(configure(trainer.DEFAULTS, words))
        ratio = trainer.flops_of(build(c, meta, machine), c)["train_ratio"]
        seconds[out] = c["max_iters"] * one * ratio / base + (c["max_iters"] / c["eval_interval"] + 20) * evaluation + 8
    return seconds


def run_all(jobs, parallel):
    """Run train.py for each of `jobs`, {out_dir: words}, that is not finished; `parallel` at a time, with an ETA."""
    todo = {out: words for out, words in jobs.items() if not os.path.exists(os.path.join(out, "summary.json"))}
    print(f"{len(jobs)} runs, {len(todo)} to do, {parallel} at a time", flush=True)
    if not todo:
        return
    seconds = project(todo)
    print(f"projected: {sum(seconds.values()) / parallel / 60:.0f} minutes, and the backbone where it is not there yet", flush=True)
    began, done = time.time(), []

    def run(out):
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, "stdout.txt"), "a") as log:
            code = subprocess.run([sys.executable, os.path.join(HERE, "train.py"), *todo[out]], stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            with open(os.path.join(out, "stdout.txt")) as log:
                raise ConfigError(f"{out} stopped with exit code {code}: {(log.read().strip().splitlines() or ['no output'])[-1]} (see {out}/stdout.txt)")
        done.append(seconds[out])
        left = (sum(seconds.values()) - sum(done)) * (time.time() - began) / sum(done)
        print(f"{len(done)}/{len(todo)}: {out} finished, about {left / 60:.0f} minutes left", flush=True)

    first, *rest = todo  # the first run makes data and backbone; the others wait for it
    run(first)
    began = time.time() - seconds[first] / parallel
    pool = ThreadPoolExecutor(parallel)
    try:
        for future in [pool.submit(run, out) for out in rest]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C nothing new starts


def tune(words, folder, parallel):
    """The sweep -> {what: [(rate, val loss)]}, as many trials for each gate x estimator, with labels and without, and each reference."""
    sweep = {arm: ("gate_lr", TRIALS["gate_lr"]) for arm in TUNED_ARMS} | {arm: ("learning_rate", rates) for arm, rates in TRIALS["learning_rate"].items()}
    own = [w for w in words if w[2:].partition("=")[0] not in TUNE] + [f"--{k}={v}" for k, v in TUNE.items() if k != "seed"]
    jobs = {}
    for arm, (key, rates) in sweep.items():
        for rate in rates:
            line = arm_words(arm, TUNE["seed"], [*own, f"--{key}={rate}"], os.path.join(folder, "tune", str(rate)))
            jobs[line[-1].partition("=")[2]] = line
    run_all(jobs, parallel)
    found = {f"{arm}, {key}": [(rate, trainer.causal(read_json(os.path.join(folder, "tune", str(rate), arm, f"seed{TUNE['seed']}", "summary.json"))["val_loss"]))
                               for rate in rates] for arm, (key, rates) in sweep.items()}
    write_json(os.path.join(folder, "tuning.json"), found)
    for name, trials in found.items():
        print(f"{name}: " + ", ".join(f"{rate} {loss:.4f}" for rate, loss in trials))


def audit(arms, seeds, folder):
    """Labels against exact flips, at the first checkpoint after the start and the last, of 3 seeds at most; budget curves of the first seed."""
    labels = read_json(os.path.join(folder, "audit.json")) or {}
    curves = read_json(os.path.join(folder, "curves.json")) or {}
    for arm in arms:
        for seed in seeds[:3]:
            run = os.path.join(folder, arm, f"seed{seed}")
            if not os.path.exists(os.path.join(run, "summary.json")):
                continue
            config = read_json(os.path.join(run, "config.json"))
            for step in (config["eval_interval"], config["max_iters"]) if arm in AUDITED else ():
                name = f"{arm} seed {seed}, step {step}"
                if name not in labels and os.path.exists(os.path.join(run, f"ckpt-{step}.pt")):
                    labels[name] = {str(layer): v for layer, v in label_audit(run, f"ckpt-{step}.pt").items()}
                    write_json(os.path.join(folder, "audit.json"), labels)
                    print(f"audited {name}", flush=True)
            name = f"{arm} seed {seed}"
            if arm in CURVES and seed == seeds[0] and name not in curves:
                curves[name] = budget_curve(run)
                write_json(os.path.join(folder, "curves.json"), curves)
                print(f"budget curve of {name}", flush=True)


def smaller_dense(config):
    """The honest competitor: a dense model with the inference FLOPs of a routed one, trained as long as the backbone, by
    python train.py config/backbone_long.py --n_embd=112 --recipe=smaller_dense."""
    folder = os.path.join("out", config["scale"], "smaller_dense", "seed0")
    summary, there = (read_json(os.path.join(folder, f)) for f in ("summary.json", "config.json"))
    if not summary:
        return None
    vocab = read_json(os.path.join("data", there["dataset"], "meta.json"))["vocab_size"]
    c = {k: there[k] for k in trainer.DEFAULTS}
    small, large = (trainer.flops_of(GPT(model_config({**c, "mode": "dense", "n_embd": n}, vocab)), {**c, "mode": "dense"})["inference_flops"]
                    for n in (c["n_embd"], config["n_embd"]))
    return (f"Width {c['n_embd']}, {c['max_iters']} steps on the same text from scratch: test LM {trainer.causal(summary['test_loss']):.4f} at {small / large:.3f} "
            "of the dense model's inference FLOPs (for the routed arms see *inference / dense* below).")


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
    tiers = {"": DEFAULT_ARMS, "tier1": TIER1, "tier2": TIER2, "tier3": TIER3, "all": known}
    arms = tiers[options["arms"]] if options["arms"] in tiers else options["arms"].split(",")
    for arm in arms:
        if arm not in known:
            raise ConfigError(f"--arms names {arm!r}, which is no recipe in config/ and no variant; {did_you_mean(arm, [*known, 'tier1', 'tier2', 'tier3', 'all'])}")
    if len(set(arms)) != len(arms):
        raise ConfigError(f"--arms={options['arms']} names an arm twice; name each once")
    seeds = parse_seeds(options["seeds"])
    if options["jobs"] < 0:
        raise ConfigError(f"--jobs={options['jobs']} is negative; give 0 (one per core) or more")
    parallel = options["jobs"] or (1 if Machine(dict(config)).device == "cuda" else os.cpu_count())
    if parallel > 1 and not config["threads"]:
        words.append(f"--threads={max(1, os.cpu_count() // parallel)}")
    folder = os.path.join("out", config["scale"], "study" + (f"-backbone{config['backbone_seed']}" if config["backbone_seed"] else ""))
    if options["tune"]:
        return tune(words, folder, parallel)
    if not options["report_only"]:
        jobs = [arm_words(arm, seed, words, folder) for seed in seeds for arm in arms]
        run_all({line[-1].partition("=")[2]: line for line in jobs}, parallel)
    if options["audit"]:
        audit(arms, seeds, folder)
    found = {k: read_json(os.path.join(folder, f"{k}.json")) for k in ("tuning", "audit", "curves")} | {"smaller_dense": smaller_dense(config)}
    write_report(known, folder, {k: v for k, v in found.items() if v})


if __name__ == "__main__":
    exit_on_error(main)
