"""Train a backbone, or the controllers of a frozen one: one training, top to bottom.

    python train.py                                          G3 at tiny scale; makes text and backbone first
    python train.py config/g3_full_aux.py --seed=2           a recipe
    python train.py config/paper.py config/g3_full_aux.py    the same at another scale (name the scale first)
    python train.py config/best.py --eval_only --budget=0.25    a finished run, calibrated at another budget
    python train.py config/g1_no_utilrank.py --plugin=my_gate.py --gate=my_gate --recipe=my_gate
    torchrun --standalone --nproc_per_node=2 train.py ...    several processes, the same global batch

A run writes out/<scale>/<recipe>/seed<k>/. The same command resumes it, and leaves a finished one alone.
"""
import os
import sys
import time

from configurator import configure, exit_on_error, load_plugins

import numpy as np
import torch

from gates import LOSSES, TARGETS, Context, Step, active_losses, make_label
from metrics import StepRecord
from prepare import get_batch
from runs.backbone import backbone_config, backbone_folder, run_folder
from runs.folder import refuse_if_taken
from runs.machine import Machine, compile_layers
from runs.optim import set_learning_rate
from runs.options import check_machine, validate
from runs.run import evaluate_only, open_data, open_run

DEFAULTS = dict(  # the scale `tiny`, the recipe `g3_full_aux`
    # the run
    scale="tiny", recipe="g3_full_aux", seed=0,
    out_dir="",  # by default out/<scale>/<recipe>/seed<seed>
    dataset="stdlib",  # a folder under data/
    mode="topk",  # how training routes: topk (gates learn), cheap or adapter (references), full (a backbone)
    backbone="backbone",  # the frozen model: the recipe that makes it, the folder of a run, or hf:GPT2_FOLDER
    backbone_seed=0,
    # the model
    n_layer=6, n_head=4, n_embd=128, block_size=128,
    controlled=[1, 2, 3, 4, 5],  # the layers that route, from 0
    cheap_rank=16, activation="gelu", gate="g3", g1_hidden=47, latent=16,
    estimator="ste_norm",  # how the LM loss reaches the scores: see gates.ESTIMATORS
    execution="gathered",  # the fast way; masked is the plain one, with both paths on every token
    budget=0.5,  # the share of tokens that goes full, over all controlled layers
    share_step=0.0,  # 0: the same budget in each layer; else metrics.allocate hands it out: 1 in whole layers
    # labels; the weights lambda_<loss> of the losses stand in gates.LOSSES
    oracle="off_policy",  # how the layers after the labelled one run: off_policy (full) or on_policy (routed)
    label_target="next",  # a label's loss is against: next (the token that came) or dense (the frozen model)
    label_layers=1,  # how many controlled layers, chosen afresh, get labels in a step; at most all
    label_share=1.0,  # the share of the batch's rows that gets them
    # optimisation: AdamW, linear warmup, cosine to min_lr_ratio
    max_iters=400, warmup_iters=20,
    batch_size=16, gradient_accumulation_steps=1,  # rows over all processes
    learning_rate=3e-2,  # of the cheap FFNs, or of the backbone
    gate_lr=3e-3,
    muon_lr=0.0,  # of the matrices of attention and FFNs, by Muon; 0 leaves them to AdamW
    min_lr_ratio=0.1, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    backbone_iters=600, backbone_lr=1e-2, backbone_muon_lr=1e-2, backbone_batch_size=16,  # config/backbone.py
    # evaluation: eval_iters batches on the way, final_eval_iters at the end (at most the whole split)
    eval_interval=50, eval_iters=8, final_eval_iters=64, log_interval=10,
    # the machine
    device="auto", dtype="auto",  # float32 or bfloat16; auto takes bfloat16 where the hardware is fast at it
    threads=0,  # of the CPU; 0 takes PyTorch's default. Another number may change the last bits
    compile=False, overwrite=False, eval_only=False,
    keep_checkpoints=False,  # also keep each evaluation's checkpoint, as ckpt-<step>.pt
)


def configure_run(words):
    """The words of a command line -> (config, defaults). Plugins come first: their losses bring keys."""
    words, plugins = load_plugins(words)
    defaults = DEFAULTS | {f"lambda_{name}": loss.weight for name, loss in LOSSES.items()} | {"plugin": []}
    return validate({**configure(defaults, words), "plugin": plugins}), defaults


# -----------------------------------------------------------------------------
# one forward pass

def forward_batch(model, config, batch, labelled):
    """What one batch leaves for the losses -> Step. labelled: the layers that get labels in this step."""
    losses = active_losses(config)
    context = Context(batch.tokens, batch.row_seeds)
    step = Step(model, config, context, batch.targets)
    first = min(model.config.controlled, default=0)
    # The layers before the first controlled one, where nothing routes yet.
    x, _ = model.run(model.embed(context), config["mode"], context, end=first)
    # What the frozen model itself makes of the batch.
    if "distill" in losses:
        step.dense = dense_stream(model, x, context, first)
    # The routed layers.
    jepa = "jepa" in losses
    step.x, step.routes = model.run(x, config["mode"], context, first, keep=labelled, want_outcomes=jepa)
    # The labels of some layers, on some rows.
    if labelled:
        rows = torch.tensor(labelled_rows(len(x), config["label_share"])).to(x.device, non_blocking=True)
        labelled_step = step.rows(rows)
        if labelled_step.dense is None and TARGETS[config["label_target"]].needs_dense:
            labelled_step.dense = dense_stream(model, x[rows], labelled_step.context, first)
        step.labels = [make_label(labelled_step, route.rows(rows)) for route in step.routes
                       if route.layer in labelled]
    return step


@torch.no_grad()
def dense_stream(model, x, context, first):
    """The frozen model itself, from the layer `first` on, all full -> its stream (B, T, D) after the last."""
    return model.run(x, "full", context, first)[0]


def labelled_layers(config, iteration):
    """The controlled layers that get labels in this iteration: a function of (seed, iteration)."""
    if not any(loss.needs == "labels" for loss in active_losses(config).values()):
        return set()
    generator = np.random.default_rng((config["seed"], iteration, 1))  # 1: apart from the batch's
    order = generator.permutation(config["controlled"])
    return set(order[:config["label_layers"]].tolist())


def labelled_rows(n, share):
    """The rows of n that get labels, spread evenly, so that splitting the batch keeps the set."""
    labelled_before = [int(i * share + 1e-9) for i in range(n + 1)]  # 1e-9: the product may round down
    rows = [i for i in range(n) if labelled_before[i + 1] > labelled_before[i]]
    return rows or [0]


# -----------------------------------------------------------------------------
# the loop

def train(config, machine, backbone=None):
    """Run or resume one training -> its summary. backbone: the folder of the frozen model, if any."""
    run = open_run(config, machine, backbone)  # data, model, optimizers, and what was resumed
    if run.summary:
        machine.print(f"{run.folder} is finished already; --overwrite runs it again")
        return run.summary
    if config["compile"]:
        compile_layers(run.model)

    while True:
        if run.wants_evaluation():
            run.evaluate()
            run.save()
        if run.step == config["max_iters"]:
            break
        if run.wants_allocation():
            run.allocate()

        # Random numbers, a plugin's included, are a function of (seed, step): a resume needs no saved state,
        # and evaluating more often changes nothing.
        began = time.time()
        torch.manual_seed((config["seed"] * 1_000_003 + run.step) % 2 ** 63)
        logged = run.step % config["log_interval"] == 0
        values = train_step(run, logged)
        run.stepped(values, logged, began)
    return run.finish()


def train_step(run, logged):
    """One step of a run: gradients over all slices of the batch, then the optimizers -> what the step says of
    itself, see metrics.StepRecord."""
    model, config, machine = run.model, run.config, run.machine
    losses_of, labelled = active_losses(config), labelled_layers(config, run.step)
    record = StepRecord(model, config, machine, logged)
    for micro in range(config["gradient_accumulation_steps"]):
        batch = get_batch(run.data["train"], config, run.step, micro, machine)
        with machine.autocast():
            step = forward_batch(model, config, batch, labelled)
            losses = {name: loss(step) for name, loss in losses_of.items()}
            record.before_backward(step, losses)
        loss = sum(config[f"lambda_{name}"] * value for name, value in losses.items())
        (loss / record.slices).backward()  # the gradient is a mean over all slices of all processes
        record.after_backward(step)
    machine.sum([p.grad for p in run.trained if p.grad is not None])
    set_learning_rate(run.optimizers, config, run.step)
    values = record.values(run.trained, run.optimizers)
    if config["grad_clip"]:
        torch.nn.utils.clip_grad_norm_(run.trained, config["grad_clip"])
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return values


def find_backbone(config, defaults, machine):
    """The folder of the frozen model, or hf:...; a backbone that is not there yet is trained first."""
    recipe = backbone_config(config, defaults)
    if recipe is None:
        return config["backbone"]
    _, meta = open_data(config, machine)
    folder = backbone_folder(recipe, meta)
    if not os.path.exists(os.path.join(folder, "summary.json")):
        machine.print("no backbone for this config and data yet: training it once, for all gates and seeds")
        train({**recipe, "out_dir": folder}, machine)
    return folder


def main():
    config, defaults = configure_run(sys.argv[1:])
    if config["eval_only"]:
        return evaluate_only(config)
    machine = Machine(config)
    config = machine.resolved(config)
    check_machine(config, machine)
    backbone = None
    if config["mode"] != "full":
        if not config["overwrite"]:  # before a backbone is trained for it
            refuse_if_taken(run_folder(config), config)
        backbone = find_backbone(config, defaults, machine)
    train(config, machine, backbone)
    machine.close()


if __name__ == "__main__":
    exit_on_error(main)
