"""Train a backbone, or the controllers of a frozen one: one training, top to bottom.

    python train.py                                          G3 at tiny scale; makes text and backbone first
    python train.py config/g3_full_aux.py --seed=2           a recipe
    python train.py config/paper.py config/g3_full_aux.py    the same at another scale (name the scale first)
    python train.py config/best.py --eval_only --budget=0.25    a finished run, calibrated at another budget
    python train.py config/g1_no_utilrank.py --plugin=my_gate.py --gate=my_gate --recipe=my_gate
    torchrun --standalone --nproc_per_node=2 train.py ...    several processes, the same global batch

A run writes out/<scale>/<recipe>/seed<k>/. The same command resumes it, and leaves a finished one alone.
"""
import json
import math
import os
import sys
import time

from configurator import PLUGINS, configure, exit_on_error, load_plugins, show_help_if_asked

import numpy as np
import torch

import metrics
from gates import LOSSES, Context, Trace, make_labels
from machine import Machine, catch_signals, compile_layers
from metrics import StepLog
from prepare import eval_batch, get_batch, load_data
from run import (backbone_config, backbone_folder, check_config, check_finite, check_finite_evaluation,
                 check_finite_weights, check_first_step, data_of_run, fill_in_shape, load_run, open_data, open_run,
                 recalibrate, refuse_differences, refuse_other_tokenizer, refuse_taken_folder, run_folder, save,
                 write_json)

DEFAULTS = dict(
    # the run; by default the scale `tiny` and the recipe `g3_full_aux`
    scale="tiny", recipe="g3_full_aux", seed=0,
    out_dir="",  # by default out/<scale>/<recipe>/seed<seed>
    dataset="stdlib",  # a folder under data/, see prepare.py
    mode="topk",  # how training routes: topk (gates learn), cheap or adapter (references), full (a backbone)
    backbone="backbone",  # the frozen model: the recipe that makes it, a run's folder, hf:NAME_OR_FOLDER, or
                          # nanoGPT's ckpt.pt
    backbone_seed=0,
    # the model; with a backbone from elsewhere its config says all but block_size
    n_layer=6, n_head=4, n_embd=128, block_size=128,
    vocab_size=0,  # 0: that of the data
    n_kv_head=0, n_inner=0,  # heads of keys and values, width of the full FFN; 0: n_head, 4 n_embd
    activation="gelu",  # gelu, gelu_new (GPT-2's), swiglu (Llama's)
    norm="layernorm", norm_eps=1e-5,  # or rmsnorm
    positions="learned", rope_theta=10_000.0,  # or rotary
    bias=True, tied_head=True,
    # the routed layers
    controlled=[1, 2, 3, 4, 5],  # which layers route, from 0; []: all but the first and the last (mode=full: none)
    cheap_rank=16, gate="g3", g1_hidden=47, latent=16,
    cheap_start="zero",  # how the cheap FFNs start: zero, or fitted to the full ones in closed form
    estimator="ste_norm",  # how the loss at the top reaches the scores: see gates.ESTIMATORS
    execution="gathered",  # the fast way; masked is the plain one, with both FFNs on every token
    budget=0.5,  # the share of tokens that goes full
    layer_spread=0.0,  # how unevenly the layers share it, by what each is worth; 0: evenly
    budget_fall=0.0,  # the share of the steps over which the budget falls from 1 to its value
    # the losses' weights; see gates.LOSSES
    lambda_lm=1.0,  # cross entropy with the next token
    lambda_distill=0.0,  # KL from the dense model
    lambda_jepa=1.0,  # a predicting gate's prediction
    lambda_util=1.0, lambda_rank=1.0,  # what labels teach: regression, and order of pairs
    lambda_anchor=0.0,  # a row's mean score, squared
    # the labels
    oracle="off_policy",  # which label: off_policy (the later layers full), on_policy (routed), or one of your own
    label_target="next",  # a label's loss is against: next (the token that came) or dense (the dense model)
    label_layers=1,  # how many controlled layers, chosen afresh, get labels in a step; at most all
    label_share=1.0,  # the share of a batch's rows that gets them
    # optimisation: AdamW; a cosine to min_lr_ratio, times a linear warmup
    max_iters=150, warmup_iters=20,
    batch_size=16, gradient_accumulation_steps=1,  # rows over all processes
    learning_rate=3e-2,  # of the cheap FFNs, or of the backbone
    gate_lr=3e-3,
    muon_lr=0.0,  # by Muon, of those matrices of attention and FFNs that train; 0 leaves them to AdamW
    min_lr_ratio=0.1, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    backbone_iters=300, backbone_long_iters=2_400, backbone_lr=1e-2, backbone_muon_lr=1e-2,
    backbone_batch_size=16,  # what config/backbone.py and backbone_long.py read
    # evaluation and calibration: eval_iters batches on the way, final_eval_iters at the end
    eval_interval=50, eval_iters=8, final_eval_iters=64, log_interval=10,
    # the machine
    device="auto", dtype="auto",  # float32 or bfloat16; auto takes bfloat16 where the hardware is fast at it
    threads=0,  # of the CPU; 0: one a core. Another number may change the last bits
    compile=False, overwrite=False, eval_only=False,
    keep_checkpoints=False,  # also keep each evaluation's checkpoint, as ckpt-<step>.pt
    plugin=[],  # --plugin=FILE, several times if need be: gates, losses, labels or estimators of your own
)


def configure_run(words):
    """The words of a command line -> (config, defaults, the keys that were given)."""
    words = load_plugins(words)
    weights = {f"lambda_{name}": float(loss.weight) for name, loss in LOSSES.items()}
    defaults = weights | DEFAULTS  # a plugin's loss brings its key
    config, given = configure(defaults, words)
    config = fill_in_shape({**config, "plugin": list(PLUGINS)}, given)
    return check_config(config), defaults, given


# -----------------------------------------------------------------------------
# one forward pass

def forward_pass(model, config, losses, batch, labelled):
    """One batch through the routed model -> Trace. labelled: the layers that get labels in this step."""
    context = Context(batch.tokens, batch.row_seeds)
    trace = Trace(model, config, context, batch.targets)
    first = min(model.config.controlled, default=0)
    # The layers before the first controlled one, where nothing routes yet.
    x, _ = model.run(model.embed(context), config["mode"], context, end=first)
    # What the dense model makes of the batch.
    needs = {loss.needs for loss in losses.values()}
    if "dense_x" in needs or (labelled and config["label_target"] == "dense"):
        with torch.no_grad():
            trace.dense_x, _ = model.run(x, "full", context, first)
    # The routed layers.
    trace.x, trace.routes = model.run(x, config["mode"], context, first, keep=labelled,
                                      want_outcomes="outcomes" in needs)
    for route in trace.routes:
        if route.scores.requires_grad:
            route.scores.retain_grad()  # its norm is logged
    # The labels of some layers, on the first rows: those are as random as any.
    if labelled:
        n = max(1, round(config["label_share"] * len(x)))
        trace.labels = [make_labels(trace.first_rows(n), route.first_rows(n)) for route in trace.routes
                        if route.layer in labelled]
    return trace


def labelled_layers(config, losses, step):
    """The controlled layers that get labels in this step: a function of (seed, step)."""
    if not any(loss.needs == "labels" for loss in losses.values()):
        return set()
    generator = np.random.default_rng((config["seed"], step, 1))  # 1: apart from the batch's
    order = generator.permutation(config["controlled"])
    return set(order[:config["label_layers"]].tolist())


# -----------------------------------------------------------------------------
# one step

def train_step(run, logged):
    """Gradients over all slices of the batch, then the optimizers -> what the step says of itself, see
    metrics.StepLog."""
    model, config, machine = run.model, run.config, run.machine
    labelled = labelled_layers(config, run.losses, run.step)
    slices = config["gradient_accumulation_steps"] * machine.processes
    log = StepLog(model, config, machine, slices, logged)
    for i in range(config["gradient_accumulation_steps"]):
        batch = get_batch(run.data["train"], config, run.step, i, machine)
        with machine.autocast():
            trace = forward_pass(model, config, run.losses, batch, labelled)
            losses = {name: loss(trace) for name, loss in run.losses.items()}
        if run.step == 0:
            check_first_step(trace, run.losses, losses)
        if logged or machine.device == "cpu":  # looking at a number waits for a GPU
            check_finite(trace, losses, run.step)
        loss = sum(config[f"lambda_{name}"] * value for name, value in losses.items())
        # A mean over all slices of all processes. The logger takes the gradient of jepa alone from the same graph.
        (loss / slices).backward(retain_graph=logged and "jepa" in losses)
        with machine.autocast():
            log.add(trace, losses)
    machine.sum([p.grad for p in run.trained if p.grad is not None])

    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(config, run.step)
    values = log.values(run.trained, run.optimizers)
    if config["grad_clip"]:
        torch.nn.utils.clip_grad_norm_(run.trained, config["grad_clip"])
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return values


def schedule(config, step):
    """The learning rate's share of its peak: a cosine from step 0 down to min_lr_ratio, times a linear warmup."""
    warm = min(1.0, (step + 1) / max(1, config["warmup_iters"]))
    least, cosine = config["min_lr_ratio"], 0.5 * (1 + math.cos(math.pi * step / config["max_iters"]))
    return warm * (least + (1 - least) * cosine)


def budget_at(config, step):
    """The budget of a step: it falls from 1 to its value over the first share `budget_fall` of the steps."""
    falling = config["budget_fall"] * config["max_iters"]
    left = max(0.0, 1 - step / falling) if falling else 0.0
    return config["budget"] + left * (1 - config["budget"])


# -----------------------------------------------------------------------------
# the loop

def train(config, defaults, machine, backbone=None):
    """Run or resume one training -> its summary. backbone: the frozen model, None for a run that makes one."""
    # Data; the model, of which only the controllers are not frozen (run.trained); AdamW and Muon over those; the
    # losses that apply; and whatever an earlier start of the same command has left.
    run = open_run(config, defaults, machine, backbone)
    if run.summary:
        machine.print(f"{run.folder} is finished already; --overwrite runs it again")
        return run.summary
    if config["compile"]:
        compile_layers(run.model)
    caught = catch_signals()
    if run.step == 0 and config["cheap_start"] == "fitted":
        fit_cheap(run)
    val = eval_batch(run.data["val"], config, config["eval_iters"])
    routed, logged_at = config["mode"] == "topk", (run.step, run.seconds)

    while True:
        last = run.step == config["max_iters"]

        # once in a while: evaluate on val, under thresholds set on training text, and save
        if (last or run.step % config["eval_interval"] == 0) and not evaluated(run):
            if routed:
                run.model.set_budget(config["budget"], run.layer_order)
                iters = config["final_eval_iters"] if last else config["eval_iters"]
                metrics.calibrate(run.model, eval_batch(run.data["train"], config, iters), machine)
            results = metrics.evaluate_modes(run.model, config, machine, val)
            check_finite_evaluation(run.model, results, run.step)
            health = metrics.predictors_health(run.model, config, machine, val)
            run.evaluations.append({"step": run.step, **results})
            run.write({"step": run.step, "val": results, "health": health})
            machine.print(f"step {run.step}: val loss {metrics.describe(results)}")
            for line in metrics.warnings_of(results, health if run.step else {}, budgets(run.model)):
                machine.print(f"step {run.step}: {line}")
            if run.step:
                save(run)
        if last:
            break

        # once: see which layers are worth most, as soon as the cheap FFNs know something
        if routed and (config["gate"] == "static" or config["layer_spread"]) and run.step == choosing_step(config):
            choose_layers(run)

        # one step. Random numbers, a plugin's included, are a function of (seed, step): a resume needs no saved
        # state, and evaluating more often changes nothing.
        began = time.time()
        torch.manual_seed((config["seed"] * 1_000_003 + run.step) % 2 ** 63)
        if routed and config["budget_fall"]:
            run.model.set_budget(budget_at(config, run.step), run.layer_order)
        logged = run.step % config["log_interval"] == 0
        values = train_step(run, logged)
        if logged:
            values = as_numbers(values)  # this waits for a GPU
        run.step += 1
        run.seconds += time.time() - began

        # log
        if logged:
            steps, seconds = run.step - logged_at[0], run.seconds - logged_at[1]
            logged_at = run.step, run.seconds
            tokens = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
            speed, left = tokens * steps / seconds, (config["max_iters"] - run.step) * run.seconds / run.step
            run.write({"step": run.step - 1, **values, "tokens_per_s": speed, "seconds": run.seconds})
            losses = ", ".join(f"{name} {value:.4f}" for name, value in values["losses"].items())
            machine.print(f"step {run.step - 1}/{config['max_iters']}: {losses}, {speed:,.0f} tokens/s, "
                          f"{left // 60:.0f}:{left % 60:02.0f} left")
            dead = metrics.dead_layers(values, config["controlled"])
            if dead:
                machine.print(f"step {run.step - 1}: the gates of layers {dead} are dead (mean p (1 - p) below "
                              f"{metrics.DEAD}): the model's loss teaches them nothing any more")

        # asked to stop: this step is saved, and the same command goes on from it
        if caught:
            save(run)
            machine.print(f"stopped at step {run.step}; the same command goes on from there")
            sys.exit(128 + caught[0])
    return finish(run)


def evaluated(run):
    """Has the step where the run stands been evaluated already? After a resume it may have been."""
    return bool(run.evaluations) and run.evaluations[-1]["step"] == run.step


def budgets(model):
    return [model.h[i].budget for i in model.config.controlled]


def as_numbers(value):
    """Tensors in a record become numbers and lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: as_numbers(v) for key, v in value.items()}
    return value


def training_rows(run, steps):
    """Training text of so many steps, evenly spaced, and the same however a step is cut into slices."""
    rows = run.config["batch_size"] * run.config["gradient_accumulation_steps"]
    return eval_batch(run.data["train"], run.config | {"batch_size": rows}, steps).to(run.machine.device)


def fit_cheap(run):
    """Start the cheap FFNs near the full ones, by training text."""
    check_finite_weights(run.model)
    batch = training_rows(run, run.config["final_eval_iters"])
    with run.machine.autocast():
        run.model.fit_cheap(Context(batch.tokens, batch.row_seeds), run.config["mode"],
                            watch=lambda layers: metrics.progress(layers, "fitting cheap FFNs, layer"))


def choosing_step(config):
    """The step before which the layers are weighed."""
    return 0 if config["cheap_start"] == "fitted" else config["max_iters"] // 10


def choose_layers(run):
    """Hand the budget out unevenly, by what each layer is worth on training text."""
    batch = training_rows(run, run.config["eval_iters"])
    with run.machine.autocast():
        run.layer_order = run.model.choose_layers(Context(batch.tokens, batch.row_seeds), batch.targets,
                                                  watch=lambda layers: metrics.progress(layers, "weighing, layer"))
    run.model.set_budget(run.config["budget"], run.layer_order)
    shares = {layer: round(run.model.h[layer].budget, 3) for layer in run.layer_order}
    run.machine.print(f"the layers, by what they are worth on training text, and their budgets: {shares}")


def finish(run):
    """Evaluate val and test and write summary.json -> the summary. The test split is read here, once, and
    nothing is chosen by it."""
    model, config, machine = run.model, run.config, run.machine
    summary = {"steps": config["max_iters"], "seconds": run.seconds, "machine": "; then ".join(run.machines),
               "backbone": run.record["backbone"], "frozen_hash": run.frozen_hash,
               "parameters": sum(p.numel() for p in model.parameters()),
               "trained_parameters": sum(p.numel() for p in run.trained),
               "layer_budgets": budgets(model), "layer_order": run.layer_order, "evaluations": run.evaluations}
    for split in ("val", "test"):
        if split in run.data:
            rows = eval_batch(run.data[split], config, config["final_eval_iters"])
            summary[split] = metrics.evaluate_modes(model, config, machine, rows)
    flops = metrics.ledger(model, config)
    summary["flops"] = {key: flops[key] for key in ("forward_proxy", "train_ratio", "inference_ratio")}
    if machine.main:
        write_json(run.path("summary.json"), summary)
    machine.print(f"val loss: {metrics.describe(summary['val'])}")
    machine.print(f"finished in {run.seconds:.0f} s of training: {run.path('summary.json')}")
    machine.barrier()
    return summary


# -----------------------------------------------------------------------------
# the script

def find_backbone(config, meta, defaults, machine):
    """The frozen model's folder or name; one that is not there yet is trained first."""
    dense = backbone_config(config, defaults)
    if dense is None:
        return config["backbone"]
    folder = backbone_folder(dense, meta, defaults)
    if not os.path.exists(os.path.join(folder, "summary.json")):
        machine.print("no backbone for this config and data yet: training it once, for all gates and seeds")
        train({**dense, "out_dir": folder}, defaults, machine)
    return folder


def evaluate_only(config, defaults, given):
    """Print the losses of a run, calibrated at config["budget"], on its own text or on that of --dataset."""
    folder = run_folder(config)
    of_machine = {key: config[key] for key in ("device", "dtype", "threads")}
    model, checkpoint, machine = load_run(folder, of_machine, plugins=config["plugin"])
    record = checkpoint["record"]
    held = record["config"]
    refuse_differences(folder, record, {"config": config, "plugins": record["plugins"]}, defaults,
                       but={"budget", "device", "dtype", "compile", "final_eval_iters"})
    if checkpoint["step"] < held["max_iters"]:
        machine.print(f"note: {folder} stands at step {checkpoint['step']} of {held['max_iters']}")
    if config["mode"] == "topk" and config["budget"] != held["budget"]:
        recalibrate(model, folder, checkpoint, machine, config["budget"])
    if "dataset" in given and config["dataset"] != held["dataset"]:
        data, meta = load_data(config["dataset"], held["block_size"])
        refuse_other_tokenizer(meta, record["tokenizer"], config["dataset"])
    else:
        data = data_of_run(folder, record)
    batch = eval_batch(data["val"], held, config["final_eval_iters"])
    results = metrics.evaluate_modes(model, held, machine, batch)
    for line in metrics.warnings_of(results, {}, budgets(model)):
        machine.print(line)
    print(json.dumps({"step": checkpoint["step"], "budget": config["budget"], "val": results}))


def main():
    show_help_if_asked(sys.argv[1:], __file__)
    config, defaults, given = configure_run(sys.argv[1:])
    if config["eval_only"]:
        return evaluate_only(config, defaults, given)
    machine = Machine(config)
    config = machine.resolved(config)
    backbone = None
    if config["mode"] != "full":
        _, meta = open_data(config, machine)
        refuse_taken_folder(config, meta, defaults)
        backbone = find_backbone(config, meta, defaults, machine)
    train(config, defaults, machine, backbone)
    machine.close()


if __name__ == "__main__":
    exit_on_error(main)
