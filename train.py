"""Train a backbone, or the controllers of a frozen one. Everything a run does is in this file, top to bottom.

    python train.py                                            a g3 gate at tiny scale; data and backbone made on first use
    python train.py config/g3_full_aux.py --seed=2             a recipe
    python train.py config/paper.py config/g3_full_aux.py      the same recipe at another scale (name the scale first)
    python train.py config/g1_no_utilrank.py --eval_only --budget=0.25     calibrate a finished run at another budget
    torchrun --standalone --nproc_per_node=2 train.py ...      several processes, the same global batch

A run writes out/<scale>/<recipe>/seed<k>/: config.json, log.jsonl, ckpt.pt, summary.json. The same command resumes an
interrupted run, and leaves a finished one alone.
"""
import functools
import json
import math
import os
import sys
import time

import numpy as np
import torch

from configurator import ConfigError, configure, did_you_mean, exit_on_error, read_file
from gates import (ESTIMATORS, GATES, ORACLES, allocate, jepa_loss, label, oracle_labels, predictor_health,
                   rank_correlation, rank_loss, uniform, util_loss)
from model import ACTIVATIONS, GPTConfig, ledger
from prepare import eval_batch, get_batch, load_data, piece, prepare, tokenizer
from runs import (Machine, build, identity, load_backbone, load_controllers, load_run, open_run, paint, read_checkpoint, read_json,
                  refuse_another_config, run_folder, weights_hash, write_json, write_whole)

HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULTS = dict(  # the scale `tiny`, the recipe `g3_full_aux`
    # the run
    scale="tiny", recipe="g3_full_aux", seed=0,
    out_dir="",  # by default out/<scale>/<recipe>/seed<seed>
    dataset="stdlib",  # a folder under data/
    mode="topk",  # what is trained: dense (a backbone), topk (gates and cheap FFNs), cheap or adapter (the references)
    backbone="backbone",  # the frozen model: the recipe that makes it, the folder of a run, or hf:NAME_OR_FOLDER of a GPT-2
    backbone_seed=0,
    # the model
    n_layer=6, n_head=4, n_embd=128, block_size=128,
    controlled=[1, 2, 3, 4, 5],  # the layers that route, from 0
    cheap_rank=16, activation="gelu", gate="g3", g1_hidden=47, latent=16,
    estimator="ste",  # ste, ste_norm, scaled or hard; see gates.route_weight
    budget=0.5,  # the share of tokens that goes full, over all controlled layers
    share_step=0.0,  # 0: the same share in each layer; else gates.allocate hands the budget out in such portions
    # the losses besides the LM's
    lambda_util=1.0, lambda_rank=1.0, lambda_jepa=1.0,
    oracle="off_policy",  # off_policy or on_policy; see gates.oracle_labels
    label_layers=1,  # how many controlled layers, drawn afresh, get labels in a step
    label_share=1.0,  # the share of the batch's rows that gets them
    # optimisation: AdamW, linear warmup, cosine to min_lr_ratio
    max_iters=400, warmup_iters=20, batch_size=16, gradient_accumulation_steps=1,  # batch_size over all processes
    learning_rate=3e-2,  # of the cheap FFNs, or of the backbone
    gate_lr=3e-3,
    muon_lr=0.0,  # of the matrices in the layers, by Muon; 0 leaves them to AdamW
    min_lr_ratio=0.1, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    backbone_iters=600, backbone_lr=1e-2, backbone_muon_lr=1e-2, backbone_batch_size=16,  # what config/backbone.py takes
    # evaluation: eval_iters batches while training, final_eval_iters at the end (both at most the whole split)
    eval_interval=50, eval_iters=8, final_eval_iters=64, log_interval=10,
    # the machine
    device="auto", dtype="auto",  # float32 or bfloat16; auto takes bfloat16 where the hardware multiplies it fast
    threads=0,  # of the CPU; 0 takes PyTorch's default. Another number may change the last bits
    compile=False, overwrite=False, eval_only=False,
    keep_checkpoints=False,  # also keep each evaluation's checkpoint, as ckpt-<step>.pt
)
CALIBRATION_TOKENS = 2 ** 14, 2 ** 17  # of training text, which set the thresholds: on the way, and at the end of a run


def validate(config):
    """Refuse what cannot run, with a line that names the value and the remedy."""
    c = dict(config)
    for key, known in (("gate", GATES), ("activation", ACTIVATIONS), ("estimator", ESTIMATORS), ("oracle", ORACLES), ("device", ("auto", "cpu", "cuda")),
                       ("mode", ("dense", "topk", "cheap", "adapter")), ("dtype", ("auto", "float32", "bfloat16"))):
        if c[key] not in known:
            raise ConfigError(f"--{key}={c[key]!r} is unknown; {did_you_mean(c[key], known)}")
    for key in ("n_layer", "n_head", "n_embd", "block_size", "cheap_rank", "g1_hidden", "latent", "max_iters", "batch_size",
                "gradient_accumulation_steps", "eval_interval", "eval_iters", "final_eval_iters", "log_interval", "label_layers",
                "backbone_iters", "backbone_batch_size"):
        if c[key] < 1:
            raise ConfigError(f"--{key}={c[key]} is too small; give 1 or more")
    for key in ("seed", "backbone_seed", "threads", "warmup_iters", "lambda_util", "lambda_rank", "lambda_jepa", "learning_rate",
                "gate_lr", "muon_lr", "weight_decay", "grad_clip", "backbone_lr", "backbone_muon_lr"):
        if c[key] < 0:
            raise ConfigError(f"--{key}={c[key]} is negative; give 0 or more")
    for key in ("budget", "share_step", "label_share", "min_lr_ratio", "beta1", "beta2"):
        if not 0 <= c[key] <= 1:
            raise ConfigError(f"--{key}={c[key]} is outside [0, 1]; give a share such as {DEFAULTS[key]}")
    if 0 < c["share_step"] < 1 / 64:
        raise ConfigError(f"--share_step={c['share_step']} is too small; give 0, or 1/64 or more")
    if max(c["beta1"], c["beta2"]) == 1:
        raise ConfigError(f"--beta1={c['beta1']}, --beta2={c['beta2']}: AdamW takes less than 1")
    if c["n_embd"] % c["n_head"]:
        raise ConfigError(f"--n_embd={c['n_embd']} is not a multiple of --n_head={c['n_head']}")
    if c["latent"] > c["n_embd"]:
        raise ConfigError(f"--latent={c['latent']} is larger than --n_embd={c['n_embd']}; the target head needs latent <= n_embd")
    if c["mode"] != "dense":
        layers = c["controlled"]
        if not layers or not all(type(i) is int and 0 <= i < c["n_layer"] for i in layers) or sorted(set(layers)) != layers:
            raise ConfigError(f"--controlled={layers}: name at least one layer of 0..{c['n_layer'] - 1}, in ascending order")
        if c["label_layers"] > len(layers):
            raise ConfigError(f"--label_layers={c['label_layers']} is more than the {len(layers)} controlled layers")
    if c["mode"] == "topk" and c["estimator"] == "hard" and GATES[c["gate"]].learned and not wants_labels(c):
        raise ConfigError("--estimator='hard' without labels teaches the gate nothing; give --lambda_util or --lambda_rank, or another estimator")
    return c


# -----------------------------------------------------------------------------
# one training step

def step_losses(model, config, batch, draw, log=False):
    """Forward of one slice of the batch -> {name: loss}, routes. draw: the set of layers that get labels. With `log`
    also the rank correlation of scores and labels, which sorts twice and waits for the device."""
    x, y, keys = batch
    if config["mode"] != "topk":
        out, routes = model.blocks(model.embed(x), "full" if config["mode"] == "dense" else config["mode"], keys)
        return {"lm": model.lm_loss(out, y)}, routes

    out, routes = model.blocks(model.embed(x), "topk", keys, keep=draw, align=config["lambda_jepa"] > 0)
    losses = {"lm": model.lm_loss(out, y)}
    if routes[0].target is not None:
        losses["jepa"] = sum(jepa_loss(r.prediction, r.target).mean() for r in routes) / len(routes)
    for route in (r for r in routes if r.layer in draw):
        rows = labelled_rows(config, len(x))
        scores = route.scores[rows]  # (b, T)
        raw = oracle_labels(model, route._replace(x=route.x[rows], h=route.h[rows], scores=scores), y[rows], keys[rows], config["oracle"])
        d = label(raw)
        permutation = uniform(keys[rows], -1, x.size(1)).argsort(1)
        losses["util"] = losses.get("util", 0) + util_loss(scores, d).mean() / len(draw)
        losses["rank"] = losses.get("rank", 0) + rank_loss(scores, d, permutation).mean() / len(draw)
        if log:
            losses["label_correlation"] = losses.get("label_correlation", 0) + rank_correlation(scores.detach(), raw) / len(draw)
    return losses, routes


def train_step(model, optimizers, config, data, step, machine, log=False):
    """One optimizer step -> {name: value} to record, tensors not yet waited for. Its random numbers are a function
    of (seed, step) alone: a resume needs no saved state, and evaluating more often changes nothing."""
    torch.manual_seed((config["seed"] * 1_000_003 + step) % 2 ** 63)
    slices = config["gradient_accumulation_steps"] * machine.world
    draw = set()
    if wants_labels(config):
        draw = set(np.random.default_rng((config["seed"], step, 1)).permutation(config["controlled"])[:config["label_layers"]].tolist())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gate = [p for n, p in trained.items() if ".gate." in n]
    sums, of_scores, of_jepa = {}, torch.zeros((), device=machine.device), [torch.zeros_like(p) for p in gate]
    for micro in range(config["gradient_accumulation_steps"]):
        with machine.autocast():
            losses, routes = step_losses(model, config, get_batch(data, config, step, micro, machine), draw, log)
        weights = {"lm": 1.0, **{k: config[f"lambda_{k}"] for k in ("util", "rank", "jepa")}}
        loss = sum(weights[k] * v for k, v in losses.items() if k in weights) / slices
        if log:
            for r in routes:
                r.scores.retain_grad() if r.scores.requires_grad else None
            if "jepa" in losses:
                grads = torch.autograd.grad(config["lambda_jepa"] * losses["jepa"] / slices, gate, retain_graph=True, allow_unused=True)
                of_jepa = [a if g is None else a + g for a, g in zip(of_jepa, grads)]
        loss.backward()
        if log:
            of_scores += sum(r.scores.grad.square().sum() for r in routes if r.scores.grad is not None)
        for k, v in losses.items():
            sums[k] = sums.get(k, 0) + torch.as_tensor(v, device=machine.device).detach().float() / slices
    grads = [p.grad for p in trained.values() if p.grad is not None]
    machine.sum(grads + list(sums.values()) + ([of_scores] + of_jepa if log else []))
    values = {"lm_loss": sums.pop("lm"), **sums}
    if log:
        norm = lambda tensors: torch.stack([t.norm() for t in tensors]).norm() if tensors else torch.zeros(())
        with_jepa = [torch.zeros_like(p) if p.grad is None else p.grad for p in gate]
        values["grad_norm"] = {"all": norm(grads), "scores": of_scores.sqrt(), "gate": norm(with_jepa),
                               "gate_without_jepa": norm([a - b for a, b in zip(with_jepa, of_jepa)])}
        values["budget"] = [r.mask.float().mean() for r in routes]
        values["lr"] = sorted({g["lr"] for g in param_groups(optimizers)})
    if config["grad_clip"]:
        torch.nn.utils.clip_grad_norm_(trained.values(), config["grad_clip"])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return values


def make_optimizers(model, config):
    """AdamW over exactly what requires a gradient; with muon_lr, Muon takes the matrices inside the layers."""
    groups, muon = {}, []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if config["muon_lr"] and p.dim() == 2 and name.startswith("h."):
            muon.append(p)
            continue
        lr = config["gate_lr" if ".gate." in name else "learning_rate"]
        groups.setdefault((lr, config["weight_decay"] if p.dim() > 1 else 0.0), []).append(p)
    optimizers = [torch.optim.AdamW([{"params": p, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
                                    betas=(config["beta1"], config["beta2"]), fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon([{"params": muon, "peak": config["muon_lr"]}], lr=config["muon_lr"],
                                           weight_decay=config["weight_decay"], adjust_lr_fn="match_rms_adamw"))
    return optimizers


def param_groups(optimizers):
    return [g for o in optimizers for g in o.param_groups]


def set_learning_rate(optimizers, config, step):
    """Linear warmup, then a cosine to min_lr_ratio of the peak."""
    warm = min(1.0, (step + 1) / max(1, config["warmup_iters"]))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config["max_iters"]))
    for g in param_groups(optimizers):
        g["lr"] = g["peak"] * warm * (config["min_lr_ratio"] + (1 - config["min_lr_ratio"]) * cosine)


def labelled_rows(config, b):
    """The rows of a slice that get labels, spread evenly, so that equal slices make up the same global set."""
    share = config["label_share"]
    return [i for i in range(b) if int((i + 1) * share + 1e-9) > int(i * share + 1e-9)] or [0]


def wants_labels(config):
    return (config["mode"] == "topk" and GATES[config["gate"]].learned and config["label_share"] > 0
            and config["lambda_util"] + config["lambda_rank"] > 0)


# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def evaluate(model, batch, mode, machine):
    """Mean loss over batch (n, T), and the realised budget of each controlled layer. Thresholds must be calibrated."""
    x, y, keys = batch
    total, full, rows = 0.0, [], max(1, 8192 // x.size(1))
    with machine.autocast():
        for i in range(0, len(x), rows):
            xb, yb, kb = (t[i:i + rows].to(machine.device) for t in (x, y, keys))
            out, routes = model.blocks(model.embed(xb), mode, kb)
            total += model.token_losses(out, yb).sum().item()
            full.append([r.mask.float().sum().item() for r in routes])
    return total / y.numel(), [sum(f) / y.numel() for f in zip(*full)]


def eval_batches(data, config, final=False):
    """The fixed rows that are evaluated on, and the training rows that set the thresholds: more of both at the end of a run."""
    tokens = CALIBRATION_TOKENS[final] // (config["block_size"] * config["batch_size"])
    return {"val": eval_batch(data["val"], config, config["final_eval_iters" if final else "eval_iters"]),
            "calibrate": eval_batch(data["train"], config, max(1, tokens))}


def calibrate(model, batch, machine, budget=None):
    """Set the thresholds from a fixed batch of training text; a `budget` replaces the run's."""
    if budget is not None:
        model.set_budget(budget)
    with machine.autocast():
        model.calibrate(batch[0].to(machine.device), batch[2].to(machine.device))


@torch.no_grad()
def evaluate_all(model, config, batches, machine):
    """{mode: loss} and {mode: realised budgets} under each mode that the run's kind has, thresholds calibrated afresh where
    the batches have training rows for it. `topk` ranks inside the sequence: its loss is not causal."""
    modes = {"dense": ["full"], "topk": ["topk", "threshold"]}.get(config["mode"], [config["mode"]])
    if "threshold" in modes and "calibrate" in batches:
        calibrate(model, batches["calibrate"], machine)
    results = {m: evaluate(model, batches["val"], m, machine) for m in modes}
    return {m: r[0] for m, r in results.items()}, {m: r[1] for m, r in results.items() if r[1]}


@torch.no_grad()
def health(model, config, batch, machine, rows=16):
    """{layer: predictor_health} on a few rows, for a gate that predicts."""
    if config["mode"] != "topk" or not GATES[config["gate"]].predicts:
        return {}
    x, keys = (t[:rows].to(machine.device) for t in (batch[0], batch[2]))
    with machine.autocast():
        routes = model.blocks(model.embed(x), "topk", keys, align=True)[1]
    return {r.layer: predictor_health(r.prediction.flatten(0, 1), r.target.flatten(0, 1)) for r in routes if r.target is not None}


# -----------------------------------------------------------------------------
# the frozen backbone

def backbone_source(config):
    """--backbone as a folder, hf:..., or the path of the recipe that makes it."""
    name = config["backbone"]
    if os.path.isdir(name) or name.startswith("hf:"):
        return name
    path = os.path.join(HERE, "config", f"{name}.py")
    if not os.path.exists(path):
        raise ConfigError(f"--backbone={name!r} is no recipe, no folder of a run, and does not start with hf:; "
                          + did_you_mean(name, ["backbone", "backbone_long"]))
    return path


def find_backbone(config, meta, data, machine):
    """The folder of the frozen model, trained here on first use and reused while its config and data are the same."""
    path = backbone_source(config)
    if not path.endswith(".py"):
        return path
    dense = read_file(path, {**config, "recipe": DEFAULTS["recipe"], "out_dir": "", "overwrite": False}, DEFAULTS)
    dense["seed"] = config["backbone_seed"]
    mine = identity(dense, meta)
    for out in (run_folder(dense), f"{run_folder(dense)}-{mine}"):
        found = read_json(os.path.join(out, "config.json"))
        if found is None or found["identity"] == mine:
            break
    if not os.path.exists(os.path.join(out, "summary.json")):
        if machine.rank == 0:
            print(f"no backbone for this config and data yet: training one into {out} (once; every gate and seed reuses it)", flush=True)
        train({**dense, "out_dir": out}, machine, data, meta)
    return out


# -----------------------------------------------------------------------------
# the loop

def open_data(config, machine):
    if config["dataset"] == "stdlib" and not os.path.isdir(os.path.join("data", "stdlib")):
        if machine.rank == 0:
            print("no data/stdlib yet: making it from the English inside CPython", flush=True)
            prepare()
        machine.barrier()
    return load_data(config["dataset"], config["block_size"])


def train(config, machine, data=None, meta=None):
    """Run or resume one training -> its summary. Raises ConfigError."""
    out, dense = run_folder(config), config["mode"] == "dense"
    path = functools.partial(os.path.join, out)
    say = functools.partial(print, flush=True) if machine.rank == 0 else lambda *a: None
    if data is None:
        data, meta = open_data(config, machine)
    slices = machine.world * config["gradient_accumulation_steps"]
    if slices > 1 and wants_labels(config) and config["batch_size"] // machine.world * config["label_share"] % 1:
        raise ConfigError(f"--label_share={config['label_share']} of the {config['batch_size'] // machine.world} rows of a slice is no whole number; "
                          "give another share or batch")
    known = None
    if not config["overwrite"]:
        refuse_another_config(out, {**config, "out_dir": out})  # before a backbone is trained for it
    if not dense:
        backbone = find_backbone(config, meta, data, machine)
    model = build(config, meta, machine)
    if not dense:
        known = load_backbone(model, backbone, machine)
    mine = {"out_dir": out, "identity": identity(config, meta) if dense else known["identity"],
            "data": {s: v["sha256"] for s, v in meta["splits"].items()}, "processes": machine.world}
    lock = open_run(out, {**config, **mine}, config["overwrite"]) if machine.rank == 0 else None
    machine.barrier()
    if os.path.exists(path("summary.json")):
        say(f"{out} is finished already; --overwrite runs it again")
        return read_json(path("summary.json"))

    # What is trained, and the proof that nothing else is.
    parts = {"dense": ("",), "topk": (".cheap.", ".gate.")}.get(config["mode"], (".cheap.",))
    trained = {n: p for n, p in model.named_parameters() if any(part in n for part in parts)}
    frozen = {n: p for n, p in model.named_parameters() if n not in trained}
    for p in frozen.values():
        p.requires_grad_(False)
    optimizers = make_optimizers(model, config)
    assert {id(p) for g in param_groups(optimizers) for p in g["params"]} == {id(p) for p in trained.values()}
    frozen_hash = weights_hash(frozen)

    step, seconds, evals, resumed = 0, 0.0, [], None
    if os.path.exists(path("ckpt.pt")):
        resumed = read_checkpoint(out)
        load_controllers(model, resumed, out, known)
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        step, seconds, evals = resumed["step"], resumed["seconds"], resumed["evals"]
        say(f"resuming {out} at step {step}")
    machine.barrier()  # before the first process writes a checkpoint, all have seen whether there was one
    log = open(path("log.jsonl") if machine.rank == 0 else os.devnull, "ab")
    if machine.rank == 0:
        log.truncate(resumed["log_bytes"] if resumed else 0)  # what was logged after the checkpoint happens again

    def record(values):
        try:
            log.write(json.dumps(values).encode() + b"\n")
            log.flush()
        except OSError as error:
            raise ConfigError(f"cannot write {path('log.jsonl')} ({error.strerror}); the last checkpoint is intact: free space and run the same command") from None

    say(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {sum(p.numel() for p in trained.values()):,} trained; "
        + machine.describe())
    batches = eval_batches(data, config)
    if config["compile"]:
        for block in model.h:
            block.compile()
    logged = step, seconds
    pending = []  # (step, values) whose losses nobody has looked at: looking waits for the GPU

    def look():
        for at, values in pending:
            for name in ("lm_loss", "util", "rank", "jepa"):
                if not math.isfinite(values.get(name, 0.0)):
                    raise ConfigError(f"the {name} is {float(values[name])} at step {at}; the last good checkpoint in {out} is kept: "
                                      "start again with --overwrite and a lower --learning_rate or --gate_lr")
        pending.clear()

    while True:
        last = step == config["max_iters"]
        if last:
            batches["calibrate"] = eval_batches(data, config, final=True)["calibrate"]
        if (step % config["eval_interval"] == 0 or last) and not (resumed and resumed["step"] == step):
            look()
            if machine.rank == 0:
                losses, budgets = evaluate_all(model, config, batches, machine)
                for m, v in losses.items():
                    if not math.isfinite(v):
                        raise ConfigError(f"the val loss under {m} is {v} at step {step}; the last good checkpoint in {out} is kept: "
                                          "start again with --overwrite and a lower --learning_rate or --gate_lr")
                record({"step": step, "val_loss": losses, "realised_budget": budgets, "health": health(model, config, batches["val"], machine)})
                evals.append({"step": step, **losses})
                say(f"step {step}: val loss " + ", ".join(describe_mode(m, v) for m, v in losses.items()))
                ckpt = {"config": config, "identity": mine["identity"], "backbone": known, "step": step, "seconds": seconds, "evals": evals,
                        "log_bytes": log.tell(), "model": {k: v for k, v in model.state_dict().items() if k not in frozen or k in model.controllers()},
                        "budgets": [model.h[i].budget for i in model.config.controlled], "optimizers": [o.state_dict() for o in optimizers]}
                for name in ("ckpt.pt", *([f"ckpt-{step}.pt"] if config["keep_checkpoints"] else [])):
                    write_whole(path(name), lambda part: torch.save(ckpt, part))
            machine.barrier()
        if last:
            break
        if config["share_step"] and config["mode"] == "topk" and step == config["max_iters"] // 10:
            with machine.autocast():  # by now the cheap FFNs have learned
                shares = allocate(model, *(t.to(machine.device) for t in batches["calibrate"]), config["budget"], config["share_step"])
            say(f"shares of full tokens per controlled layer, chosen on training text: {[round(s, 3) for s in shares]}")

        began = time.time()
        set_learning_rate(optimizers, config, step)
        logging = step % config["log_interval"] == 0
        values = train_step(model, optimizers, config, data["train"], step, machine, logging)
        pending.append((step, values))
        if logging:
            look()
            values = json.loads(json.dumps(values, default=float))  # tensors become numbers
        seconds += time.time() - began
        if logging:
            rate = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"] * (step + 1 - logged[0]) / (seconds - logged[1])
            logged = step + 1, seconds
            record({"step": step, **values, "tokens_per_s": rate, "seconds": seconds})
            left = (config["max_iters"] - step) * seconds / (step + 1)
            say(f"step {step}/{config['max_iters']}: " + ", ".join(f"{k} {values[k]:.4f}" for k in ("lm_loss", "util", "rank", "jepa") if k in values)
                + f", {rate:,.0f} tokens/s, {left // 60:.0f}:{left % 60:02.0f} left")
        step += 1

    hashes = {"before": frozen_hash, "after": weights_hash(frozen)}
    if hashes["before"] != hashes["after"]:
        raise ConfigError(f"a frozen weight moved in {out}: its checkpoint is no controller-only run; see what the gate's forward writes to")
    summary = {}
    if machine.rank == 0:
        summary = summarise(model, config, mine, known, hashes, evals, seconds, data, machine)
        write_json(path("summary.json"), summary)
        say("val_loss: " + ", ".join(describe_mode(m, v) for m, v in summary["val_loss"].items()))
        say("\n".join(f"{k}: {json.dumps(v)}" for k, v in summary.items() if k in ("realised_budget", "gap_closed")))
        say(f"finished in {seconds:.0f} s of training: {path('summary.json')}")
        if config["mode"] == "topk":
            show_depth(model, config, data["val"], meta, machine)
    machine.barrier()
    return summary


@torch.no_grad()
def show_depth(model, config, data, meta, machine):
    """Print a stretch of validation text, each token with the number of controlled layers that it took full."""
    x = torch.from_numpy(data[:min(128, config["block_size"])].astype(np.int64))[None].to(machine.device)
    with machine.autocast():
        depth = sum(r.mask[0].int() for r in model.blocks(model.embed(x), "threshold")[1]).tolist()
    try:
        enc = tokenizer(meta["tokenizer"])
    except ConfigError as error:
        print(f"the routing of the validation text is not shown: {error}", flush=True)
        return
    pieces = [piece(t, enc) for t in x[0].tolist()]
    print(f"which tokens went full, of {len(config['controlled'])} layers (the first validation text, under threshold):")
    print(paint(pieces, depth, len(config["controlled"]), sys.stdout.isatty()), flush=True)


def describe_mode(mode, loss):
    return f"{loss:.4f} under {mode}{' (not causal)' if mode == 'topk' else ''}"


def causal(losses):
    """{mode: loss} -> the loss under the mode that can generate."""
    return next(v for m, v in losses.items() if m != "topk")


def summarise(model, config, mine, known, hashes, evals, seconds, data, machine):
    """The run in one record. The test split is read here, once, and nothing is chosen by it."""
    final = {s: eval_batch(data[s], config, config["final_eval_iters"]) for s in ("val", "test") if s in data}
    results = {s: evaluate_all(model, config, {"val": b}, machine) for s, b in final.items()}  # calibrated at the last step
    summary = {"val_loss": results["val"][0], "test_loss": results.get("test", ({},))[0], "realised_budget": results["val"][1]}
    curves = {m: [e[m] for e in evals] for m in results["val"][0]}
    summary |= {"best_val_loss": {m: min(c) for m, c in curves.items()}, "average_val_loss": {m: sum(c[1:]) / max(1, len(c) - 1) for m, c in curves.items()}}
    if config["mode"] != "dense":
        summary["dense_val_loss"] = evaluate(model, final["val"], "full", machine)[0]  # the frozen model, without controllers
        summary["dense_test_loss"] = evaluate(model, final["test"], "full", machine)[0] if "test" in final else None
        summary["gap_closed"] = gap_closed(config, mine, causal(summary["val_loss"]))
    budgets = [model.h[i].budget for i in model.config.controlled]
    flops = flops_of(model, config)
    summary |= {"steps": config["max_iters"], "seconds": seconds, "layer_budgets": budgets,
                "flops": {k: flops[k] for k in ("forward_proxy", "train_ratio", "inference_ratio")},
                "parameters": sum(p.numel() for p in model.parameters()),
                "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "identity": mine["identity"], "backbone": known, "frozen_hash": hashes,
                "data": mine["data"], "machine": machine.describe()}
    return summary


def flops_of(model, config):
    """The ledger of a recipe."""
    labels = (config["oracle"], config["label_layers"], config["label_share"]) if wants_labels(config) else None
    return ledger(model, config["mode"], label=labels, jepa=config["lambda_jepa"] > 0 and GATES[config["gate"]].predicts)


def gap_closed(config, mine, loss):
    """(L_cheap - L) / (L_cheap - L_dense) against this seed's references, or a line that says which is missing."""
    found = {}
    for name in ("cheap_only", "full_adapter"):
        folder = os.path.join(os.path.dirname(os.path.dirname(mine["out_dir"])), name, f"seed{config['seed']}")
        summary, there = (read_json(os.path.join(folder, f)) for f in ("summary.json", "config.json"))
        same = summary and there["identity"] == mine["identity"] and all(there[k] == config[k] for k in ("max_iters", "batch_size", "cheap_rank", "controlled"))
        if not same:
            return f"unknown: {folder} of the same backbone, data and steps is not there yet"
        found[name] = causal(summary["val_loss"])
    return (found["cheap_only"] - loss) / (found["cheap_only"] - found["full_adapter"])


def main():
    config = validate(configure(DEFAULTS, sys.argv[1:]))
    if config["eval_only"]:
        budget, of_model = config["budget"], {"mode", "dataset", *GPTConfig.__dataclass_fields__} - {"budget", "vocab_size"}
        refuse_another_config(run_folder(config), {k: config[k] for k in of_model})
        model, config, data, meta, machine = load_run(run_folder(config), {k: config[k] for k in ("device", "dtype", "threads")})
        if model.config.controlled:
            model.set_budget(budget)
        batches = eval_batches(data, config, final=True)
        losses, budgets = evaluate_all(model, config, batches, machine)
        print(json.dumps({"budget": budget, "val_loss": losses, "realised_budget": budgets, "not_causal": ["topk"]}))
        return
    machine = Machine(config)
    train(config, machine)
    machine.close()


if __name__ == "__main__":
    exit_on_error(main)
