"""One run: its folder, its checkpoint, its log, its summary.

A run's folder holds config.json, log.jsonl, ckpt.pt and, when it is finished, summary.json. The same command
goes on from the last checkpoint; folder.py says whose a folder is.
"""
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from contextlib import suppress

import torch

import metrics
from configurator import HERE, ConfigError, load_plugin
from model import GPT, GPTConfig
from prepare import eval_batch, load_data, prepare
from runs.backbone import cast_frozen, identity, load_backbone, load_weights, run_folder
from runs.files import digest_of, sync, weights_hash, write_json, write_whole
from runs.folder import (claim, is_taken, read_config, read_run, read_summary, refuse_another_config,
                         refuse_if_taken, summary_digest)
from runs.machine import Machine
from runs.optim import make_optimizers
from runs.options import check_memory
from runs.paint import show_depth

# Runs that differ in one of these are never compared.
COMPARABLE_KEYS = ("max_iters", "batch_size", "gradient_accumulation_steps", "block_size", "cheap_rank",
                   "controlled", "data", "identity")
# So much training text sets the thresholds.
CALIBRATION_TOKENS = {"on the way": 2 ** 14, "at the end": 2 ** 17}


# -----------------------------------------------------------------------------
# what a run is made of

def open_data(config, machine):
    """({split: uint16 array}, meta); the embedded text is made on first use."""
    if config["dataset"] == "stdlib" and not os.path.isdir(os.path.join("data", "stdlib")):
        machine.print("no data/stdlib yet: making it from the English inside CPython")
        if machine.main:
            prepare()
        machine.barrier()
    return load_data(config["dataset"], config["block_size"])


def build(config, meta, machine):
    """A model for this config, freshly initialised as a function of the seed."""
    torch.manual_seed(config["seed"])
    return GPT(model_config(config, meta["vocab_size"])).to(machine.device)


def model_config(config, vocab_size):
    fields = {key: config[key] for key in GPTConfig.__dataclass_fields__ if key in config}
    fields["controlled"] = () if config["mode"] == "full" else tuple(config["controlled"])
    return GPTConfig(**fields, vocab_size=vocab_size)


def ledger_of(config, vocab_size):
    """metrics.ledger of a config, without a model's memory and the seconds that its weights take to fill."""
    with torch.device("meta"):
        model = GPT(model_config(config, vocab_size))
    return metrics.ledger(model, config)


def calibration_rows(data, config, final=False):
    """The rows of training text that set the thresholds: more of them at the end of a run."""
    tokens = CALIBRATION_TOKENS["at the end" if final else "on the way"]
    return eval_batch(data["train"], config, max(1, tokens // (config["block_size"] * config["batch_size"])))


def recorded(config, meta, backbone):
    """The config with what else a run depends on: its plugins and its data, by their hashes, and its
    backbone."""
    return {**config, "plugin_sha256": [load_plugin(path) for path in config["plugin"]],
            "data": {split: facts["sha256"] for split, facts in meta["splits"].items()},
            "identity": backbone["identity"] if backbone else identity(config, meta)}


def git_commit():
    with suppress(OSError):
        done = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True)
        return done.stdout.strip() or "not a git checkout"
    return "no git"


# -----------------------------------------------------------------------------
# the run

class Run:
    """One training: what it reads, where it stands, and what it leaves in its folder."""

    def __init__(self, config, machine, backbone=None):
        """backbone: the folder of a finished one or hf:..., None for a run that makes one. Raises
        ConfigError, and then nothing in the folder has changed."""
        self.config, self.machine, self.folder = config, machine, run_folder(config)
        check_memory(config, machine)
        self.data, self.meta = open_data(config, machine)
        self.model = build(config, self.meta, machine)
        self.backbone = load_backbone(self.model, backbone, machine) if backbone else None
        self.record = recorded(config, self.meta, self.backbone)
        self.summary, self.lock = None, None
        if not config["overwrite"]:
            self.summary = self.finished()
        machine.barrier()  # before the first process claims the folder, all have seen what is in it
        if machine.main and not self.summary:
            self.lock = claim(self.folder, self.record, config["overwrite"])
        machine.barrier()
        self.frozen = self.freeze_the_rest()
        self.frozen_hash = weights_hash(self.frozen)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(self.model, config, machine.dtype)
        self.val = eval_batch(self.data["val"], config, config["eval_iters"])
        self.step, self.seconds, self.evaluations, self.machines = 0, 0.0, [], []
        self.resumed_at = None
        self.log, self.log_hash = None, hashlib.sha256()  # log.jsonl, and a hash of what it holds
        self.logged_at = 0, 0.0  # step and seconds of the last record
        self.unseen = []  # (step, losses) nobody has looked at: looking waits for the GPU
        self.warned = False

    def path(self, name):
        return os.path.join(self.folder, name)

    def finished(self):
        """The summary of this run, if it is finished already. Such a folder is read, never written to."""
        if not is_taken(self.folder):
            return None
        refuse_if_taken(self.folder, self.record)
        summary = read_summary(self.folder)
        if summary and not os.path.lexists(self.path("ckpt.pt")):
            raise ConfigError(f"{self.folder} has a summary.json but no ckpt.pt: it was deleted; put it "
                              "back, or start again with --overwrite")
        if summary:
            checkpoint = read_run(self.folder)
            refuse_another_config(self.path("ckpt.pt"), checkpoint["config"], self.record)
            log_seen(self.path("log.jsonl"), checkpoint)
        return summary

    def freeze_the_rest(self):
        """-> {name: parameter} of what this run does not train. A reference has no gates that learn."""
        frozen = {n: p for n, p in self.model.named_parameters() if not p.requires_grad}
        if self.config["mode"] in ("cheap", "adapter"):
            frozen |= {n: p for n, p in self.model.named_parameters() if ".gate." in n}
        for p in frozen.values():
            p.requires_grad_(False)
        return frozen

    def resume(self):
        """Go on from the checkpoint, if there is one. What was logged after it happens again, to the same
        numbers. Whatever is refused here leaves the folder as it was."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in self.trained}
        checkpoint = None
        if os.path.exists(self.path("ckpt.pt")):
            checkpoint = read_run(self.folder)
            self.take_up(checkpoint)
        self.machine.barrier()  # all have seen the checkpoint, before the first process writes another
        if self.machine.main:
            self.open_log(checkpoint)
            if checkpoint is None or read_config(self.folder) is None:
                versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
                facts = {"versions": versions, "git_commit": git_commit()}
                write_json(self.path("config.json"), self.record | facts)
        self.note_machine()
        self.machine.print(f"{self.folder}: {sum(p.numel() for p in self.model.parameters()):,} parameters, "
                           f"{sum(p.numel() for p in self.trained):,} trained; {self.machine.describe()}")

    def take_up(self, checkpoint):
        """Stand where the checkpoint stood."""
        path, steps = self.path("ckpt.pt"), self.config["max_iters"]
        refuse_another_config(path, checkpoint["config"], self.record)
        if not 0 <= checkpoint["step"] <= steps:
            raise ConfigError(f"{path} is at step {checkpoint['step']} of {steps}; it belongs to another run")
        load_controllers(self.model, checkpoint, self.folder, self.backbone)
        load_optimizers(self.optimizers, checkpoint, path)
        self.step = self.resumed_at = checkpoint["step"]
        self.seconds, self.evaluations = checkpoint["seconds"], checkpoint["evaluations"]
        self.logged_at = self.step, self.seconds
        self.machines = checkpoint["machines"]
        self.machine.print(f"resuming {self.folder} at step {self.step}")

    def open_log(self, checkpoint):
        """Open log.jsonl, cut to what the checkpoint saw of it."""
        path = self.path("log.jsonl")
        try:
            seen = log_seen(path, checkpoint) if checkpoint else b""
            self.log = open(path, "ab")
            self.log.truncate(len(seen))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read and written ({error.strerror}); look at what it is "
                              "and who may write there") from None
        self.log_hash.update(seen)

    def note_machine(self):
        here = self.machine.describe()
        if self.machines and self.machines[-1] != here:
            self.machine.print(f"this run was on {self.machines[-1]} before, and is on {here} now: the last "
                               "bits of its numbers may differ from a run on one machine")
        if here not in self.machines[-1:]:
            self.machines = [*self.machines, here]

    def write(self, values):
        """One record of log.jsonl."""
        if not self.machine.main:
            return
        try:
            line = json.dumps(values).encode() + b"\n"
            self.log.write(line)
            self.log.flush()
            self.log_hash.update(line)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path('log.jsonl')} ({error.strerror}); the last "
                              "checkpoint is intact") from None

    def check_finite(self, losses, step):
        """Raises ConfigError where a loss is no number; the last good checkpoint stays."""
        for name, loss in losses.items():
            if not math.isfinite(loss):
                left = "there was no checkpoint yet"
                if os.path.exists(self.path("ckpt.pt")):
                    left = f"the last good checkpoint in {self.folder} is kept"
                raise ConfigError(f"the {name} loss is {float(loss)} at step {step}; {left}. Give a lower "
                                  "--learning_rate or --gate_lr, and --overwrite to start again")

    def check_unseen(self):
        for step, losses in self.unseen:
            self.check_finite(losses, step)
        self.unseen = []

    def stepped(self, values, logged, began):
        """A training step is over: count it, and where it is logged write its record and print a line."""
        self.unseen.append((self.step, values["losses"]))
        if logged:
            self.check_unseen()
            values = as_numbers(values)
        self.seconds += time.time() - began
        if logged:
            steps, seconds = self.step + 1 - self.logged_at[0], self.seconds - self.logged_at[1]
            self.logged_at = self.step + 1, self.seconds
            c = self.config
            tokens = steps * c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"]
            self.write({"step": self.step, **values, "tokens_per_s": tokens / seconds,
                        "seconds": self.seconds})
            left = (c["max_iters"] - self.step) * self.seconds / (self.step + 1)
            losses = ", ".join(f"{name} {value:.4f}" for name, value in values["losses"].items())
            self.machine.print(f"step {self.step}/{c['max_iters']}: {losses}, {tokens / seconds:,.0f} "
                               f"tokens/s, {left // 60:.0f}:{left % 60:02.0f} left")
            self.warn_of_dead_gates(values)
        self.step += 1

    def warn_of_dead_gates(self, values):
        dead = metrics.dead_layers(values, self.config["controlled"])
        if dead and not self.warned:
            self.machine.print(f"step {self.step}: the gates of layers {dead} are dead (mean p (1 - p) below "
                               f"{metrics.DEAD}): the loss of the model teaches them nothing any more")
            self.warned = True

    def wants_evaluation(self):
        due = self.step % self.config["eval_interval"] == 0 or self.step == self.config["max_iters"]
        return due and self.step != self.resumed_at

    def evaluate(self):
        """The losses on the val rows under each mode, thresholds calibrated: a record and a printed line."""
        self.check_unseen()
        rows = calibration_rows(self.data, self.config, final=self.step == self.config["max_iters"])
        losses, budgets = metrics.evaluate_modes(self.model, self.config, self.machine, self.val, rows)
        self.check_finite({f"val ({mode})": loss for mode, loss in losses.items()}, self.step)
        health = metrics.predictors_health(self.model, self.config, self.machine, self.val)
        self.write({"step": self.step, "val_loss": losses, "realised_budget": budgets, "health": health})
        self.evaluations.append({"step": self.step, **losses})
        self.machine.print(f"step {self.step}: val loss {metrics.describe_losses(losses)}")

    def wants_allocation(self):
        """Budgets that differ by layer are chosen once, when the cheap FFNs have learned something."""
        return self.config["share_step"] and self.step == self.config["max_iters"] // 10

    def allocate(self):
        metrics.allocate(self.model, self.config, self.machine, calibration_rows(self.data, self.config))

    def save(self):
        """Write ckpt.pt: the controllers (of a backbone everything), the optimizers, and where the run
        stands. There is none at step 0: until something is trained the folder is nobody's."""
        if self.machine.main:
            checkpoint = self.checkpoint()

            def write(temporary):
                torch.save(checkpoint, temporary)
            sync(self.path("log.jsonl"))
            if self.step:
                write_whole(self.path("ckpt.pt"), write)
            if self.config["keep_checkpoints"]:
                write_whole(self.path(f"ckpt-{self.step}.pt"), write)
        self.machine.barrier()

    def checkpoint(self):
        weights = {name: tensor for name, tensor in self.model.state_dict().items()
                   if name not in self.frozen or name in self.model.controllers()}
        checkpoint = {"config": self.record, "identity": self.record["identity"], "backbone": self.backbone,
                      "step": self.step, "seconds": self.seconds, "evaluations": self.evaluations,
                      "machines": self.machines, "log_bytes": self.log.tell(),
                      "log_sha256": self.log_hash.hexdigest(), "model": weights,
                      "budgets": [self.model.h[i].budget for i in self.model.config.controlled],
                      "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        return {**checkpoint, "digest": digest_of(checkpoint)}

    def finish(self):
        """Evaluate val and test, prove that nothing frozen has moved, write summary.json -> the summary. The
        test split is read here, once, and nothing is chosen by it."""
        after = weights_hash(self.frozen)
        if after != self.frozen_hash:
            raise ConfigError(f"a frozen weight moved in {self.folder}: this is no controller-only run; see "
                              "what the gate's forward writes to")
        summary = {}
        if self.machine.main:
            summary = self.summarise()
            summary |= {"identity": self.record["identity"], "backbone": self.backbone,
                        "data": self.record["data"],
                        "frozen_hash": {"before": self.frozen_hash, "after": after},
                        "machine": "; then ".join(self.machines)}
            summary = json.loads(json.dumps(summary))
            digest = summary_digest(summary, read_config(self.folder) or {})
            write_json(self.path("summary.json"), {**summary, "digest": digest})
            self.machine.print(f"val loss: {metrics.describe_losses(summary['val_loss'])}")
            for key in ("realised_budget", "dense_val_loss", "gap_closed", "steps_to_75", "cost_to_75",
                        "dead_layers"):
                if summary.get(key) not in (None, [], {}):
                    self.machine.print(f"{key}: {json.dumps(summary[key])}")
            self.machine.print(f"finished in {self.seconds:.0f} s of training: {self.path('summary.json')}")
            if self.config["mode"] == "topk":
                show_depth(self.model, self.data["val"], self.meta, self.machine)
        self.machine.barrier()
        return summary

    def summarise(self):
        model, config, machine = self.model, self.config, self.machine
        final = {split: eval_batch(self.data[split], config, config["final_eval_iters"])
                 for split in ("val", "test") if split in self.data}
        results = {}
        for split, rows in final.items():
            results[split] = metrics.evaluate_modes(model, config, machine, rows)
        curves = {mode: [e[mode] for e in self.evaluations] for mode in results["val"][0]}
        flops = metrics.ledger(model, config)
        summary = {
            "val_loss": results["val"][0], "test_loss": results.get("test", ({}, {}))[0],
            "realised_budget": results["val"][1],
            "best_val_loss": {mode: min(curve) for mode, curve in curves.items()},
            "average_val_loss": {mode: sum(c[1:]) / max(1, len(c) - 1) for mode, c in curves.items()},
            "evaluations": self.evaluations,
            "steps": config["max_iters"], "seconds": self.seconds,
            "layer_budgets": [model.h[i].budget for i in model.config.controlled],
            "flops": {key: flops[key] for key in ("forward_proxy", "train_ratio", "inference_ratio")},
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in self.trained),
            "dead_layers": self.dead_layers()}
        if config["mode"] != "full":
            for split, batch in final.items():  # the frozen model, without controllers
                summary[f"dense_{split}_loss"] = metrics.evaluate(model, batch, "full", machine)[0]
            summary |= self.against_references(summary)
        return summary

    def dead_layers(self):
        """Of the last logged step."""
        with open(self.path("log.jsonl"), encoding="utf-8") as f:
            logged = [record for record in map(json.loads, f) if "scores" in record]
        return metrics.dead_layers(logged[-1], self.config["controlled"]) if logged else []

    def against_references(self, summary):
        """The gap closed and the cost to three quarters of it, where this seed's references are beside this
        run."""
        cheap, dense = self.reference("cheap_only"), self.reference("full_adapter")
        if not cheap or not dense:
            return {"gap_closed": "unknown: cheap_only and full_adapter of this seed and length, trained as "
                                  "this run is, are not finished beside it"}
        floor, top = (metrics.causal(reference["val_loss"]) for reference in (cheap, dense))
        gap = metrics.gap_closed(metrics.causal(summary["val_loss"]), floor, top)
        # The curves are over fewer rows than the final loss, so the references are taken on those rows too.
        floor, top = (causal_curve(reference["evaluations"])[-1][1] for reference in (cheap, dense))
        hit = metrics.first_hits(causal_curve(self.evaluations), floor, top)[0.75]
        cost = None if hit is None else hit * summary["flops"]["train_ratio"]
        return {"gap_closed": gap, "steps_to_75": hit, "cost_to_75": cost}

    def reference(self, recipe):
        """The summary of this seed's finished reference beside this run, trained as it is (by distillation,
        by Muon); None where there is none that may be compared with it."""
        if self.config["lambda_distill"]:
            recipe += "_distill"
        if self.config["muon_lr"]:
            recipe += "_muon"
        beside = os.path.dirname(os.path.dirname(self.folder))
        folder = os.path.join(beside, recipe, f"seed{self.config['seed']}")
        with suppress(ConfigError):  # a broken reference is a missing one
            held, finished = read_config(folder), read_summary(folder)
            if held and finished and all(held.get(key) == self.record[key] for key in COMPARABLE_KEYS):
                return finished
        return None


def causal_curve(evaluations):
    """[{"step", mode: loss}] -> [(step, the loss under the mode that can generate)]."""
    return [(e["step"], metrics.causal({k: v for k, v in e.items() if k != "step"})) for e in evaluations]


def open_run(config, machine, backbone=None):
    """A Run that stands where it was left; one that is finished already has its summary."""
    run = Run(config, machine, backbone)
    if not run.summary:
        run.resume()
    return run


def as_numbers(value):
    """Tensors in a record become numbers and lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: as_numbers(v) for key, v in value.items()}
    return value


# -----------------------------------------------------------------------------
# a run that is looked at again

def load_controllers(model, checkpoint, folder, backbone):
    """Put a checkpoint into a model whose backbone is loaded; it must be the backbone that it was trained
    on."""
    held = checkpoint.get("backbone")
    if backbone and (not isinstance(held, dict) or held.get("weights") != backbone["weights"]):
        raise ConfigError(f"{folder} was trained on another backbone than the one now in {backbone['path']}; "
                          "put that one back")
    needed = model.controllers() if backbone else dict(model.named_parameters())
    load_weights(model, checkpoint["model"], folder, needed)
    for i, budget in zip(model.config.controlled, checkpoint["budgets"]):
        model.h[i].budget = budget


def log_seen(path, checkpoint):
    """The bytes of log.jsonl that the checkpoint counted."""
    seen, size = b"", checkpoint["log_bytes"]
    if os.path.lexists(path):
        with open(path, "rb") as f:
            seen = f.read(size)
    digest = hashlib.sha256(seen).hexdigest()
    again = "put it back, or start again with --overwrite"
    if len(seen) < size:
        raise ConfigError(f"{path} has {len(seen)} bytes, fewer than the {size} that its checkpoint counted: "
                          f"it was cut or deleted; {again}")
    if checkpoint.get("log_sha256", digest) != digest:  # older checkpoints have none
        raise ConfigError(f"{path} is not what its checkpoint saw: it was changed, or is another run's; "
                          f"{again}")
    return seen


def load_optimizers(optimizers, checkpoint, path):
    """Put a checkpoint's optimizer state into the optimizers of the same parameters."""
    wrong = f"{path} has the optimizer state of other parameters; start again with --overwrite"
    if len(checkpoint["optimizers"]) != len(optimizers):
        raise ConfigError(wrong)
    for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
        try:
            sizes = [len(group["params"]) for group in state["param_groups"]]
            trained = bool(state["state"]) or not checkpoint["step"]
            if not trained or sizes != [len(group["params"]) for group in optimizer.param_groups]:
                raise ValueError
            optimizer.load_state_dict(state)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            raise ConfigError(wrong) from None


def load_run(folder, overrides=None, name="ckpt.pt"):
    """A run's checkpoint -> (model, config, data, meta, machine), to look at: nothing in it is trained
    further."""
    checkpoint = read_run(folder, name)
    config = checkpoint["config"]
    for path, digest in zip(config["plugin"], config["plugin_sha256"]):
        if load_plugin(path) != digest:
            raise ConfigError(f"the plugin {path} has changed since {folder} was trained; put that "
                              "version back")
    machine = Machine({**config, "device": "auto", "dtype": "auto", **(overrides or {})})
    config = machine.resolved(config)
    data, meta = load_data(config["dataset"], config["block_size"])
    model = build(config, meta, machine)
    backbone = None
    if checkpoint["backbone"]:
        backbone = load_backbone(model, checkpoint["backbone"]["path"], machine)
    load_controllers(model, checkpoint, folder, backbone)
    cast_frozen(model.requires_grad_(False), machine)
    return model, config, data, meta, machine


def evaluate_only(config):
    """Print the losses of a finished run, calibrated at config["budget"]."""
    folder, budget = run_folder(config), config["budget"]
    of_model = {"mode", "dataset", *GPTConfig.__dataclass_fields__} - {"budget", "vocab_size"}
    asked = {key: config[key] for key in of_model}
    refuse_if_taken(folder, asked)
    machine_keys = {key: config[key] for key in ("device", "dtype", "threads")}
    model, config, data, _, machine = load_run(folder, machine_keys)
    if model.config.controlled:
        metrics.set_budget(model, budget)
    val = eval_batch(data["val"], config, config["final_eval_iters"])
    rows = calibration_rows(data, config, final=True)
    losses, budgets = metrics.evaluate_modes(model, config, machine, val, rows)
    print(json.dumps({"budget": budget, "val_loss": losses, "realised_budget": budgets,
                      "not_causal": ["topk"]}))
