"""Speed, memory and FLOPs, each figure beside the limit that FLOPs or bytes of weights allow.

    python bench.py                                               the scale tiny, minutes
    python bench.py config/smollm2.py --rows=decode,prefill       some of the rows
    python bench.py config/smollm2.py --rows=memory --arm=best    how much memory a training takes
    python bench.py config/paper.py --batch_size=4 --baseline=../nanoGPT    beside a nanoGPT checkout

The rows are forward, training, decode, prefill, nanogpt, ledger, and memory, which wants a process of its
own. Every key of train.py that a scale sets can be given too. With --backbone=hf:FOLDER the weights are real,
and the library `transformers`, where it is installed, runs the same weights beside us; else they are random.

What is compared is timed in turn, and medians are compared. A speed says how many times as fast, so more is
better; a time how many times as long, so less is better. A limit is what the figure would be if every FLOP
(counted by metrics.ledger), or every byte, took the same time in both.
"""
import contextlib
import importlib.util
import io
import os
import statistics
import sys
import time
from functools import cached_property, partial

from configurator import (ConfigError, arm_words, configure, did_you_mean, exit_on_error, read_arms, recipes,
                          show_help_if_asked)

import numpy as np
import torch

from foreign import hugging_face_folder, is_foreign
from gates import Context, active_losses
from machine import Machine, compile_layers
from metrics import ledger_of
from optim import make_optimizers
from prepare import get_batch
from run import Run, build, cast_frozen, check_config, load_backbone, model_config
from sample import new_cache
from train import configure_run, train_step

DEFAULTS = dict(
    rows="",  # such as forward,decode; by default all but memory
    repeat=5,  # medians of so many
    baseline="",  # the folder of a nanoGPT checkout
    arm="best",  # what the row memory trains: a recipe, a line of config/arms.ini, or dense
)
STEP_ARMS = ("g1_no_utilrank", "g1_full_aux", "g3_full_aux", "g1_scaled", "distill_labels", "best")
DECODED, PREFILLED = 32, 512  # tokens, at most block_size


def row(what, figure, limit=None, note=""):
    """A line of the table."""
    limits = ["", ""] if limit is None else [f"{limit:.3f}", f"{figure / limit:.3f}"]
    return f"| {' | '.join([what, f'{figure:,.3f}', *limits, note])} |"


def speed(what, ours, theirs, tokens, limit=None, note=""):
    """The row of two that take `ours` and `theirs` seconds for so many tokens."""
    return row(what, theirs / ours, limit, f"{tokens / ours:,.1f} and {tokens / theirs:,.1f} tokens/s{note}")


# -----------------------------------------------------------------------------
# what is measured

class Bench:
    """What every row reads: the config of the scale, the options, the machine, random text, the models."""

    def __init__(self, config, options):
        self.machine, self.options = Machine(config), options
        self.config = self.machine.resolved(config)
        self.vocab_size = config["vocab_size"] or (257 if config["dataset"] in ("stdlib", "web") else 50257)
        count = 64 * (PREFILLED + config["block_size"])
        self.data = {"train": np.random.default_rng(0).integers(0, self.vocab_size, count).astype(np.uint32)}

    def arm(self, name):
        """The config of an arm at this scale, or of the dense model that AdamW trains."""
        if name == "dense":  # the rate changes no time; this one keeps random weights finite
            return {**self.config, "mode": "full", "learning_rate": 1e-4}
        return check_config(configure(self.config, arm_words(name))[0])

    def ledger(self, config):
        return ledger_of(config, model_config(config, self.vocab_size))

    def model(self, config):
        """A model as train.py has it. Cheap FFNs start at zero there, and timings should not."""
        model = build(config, self.vocab_size, self.machine)
        if config["mode"] != "full":
            if is_foreign(config["backbone"]):
                load_backbone(model, config["backbone"], self.machine)
            for p in model.backbone().values():
                p.requires_grad_(False)
            cast_frozen(model, self.machine)
        for block in model.h:
            if block.controlled:
                torch.nn.init.normal_(block.cheap.c_proj.weight, std=0.02)
        if config["compile"]:
            compile_layers(model)
        return model

    def run(self, config):
        """A run of train.py, in no folder."""
        model = self.model(config)
        trained = [p for p in model.parameters() if p.requires_grad]
        return Run(config, self.machine, "", {}, self.data, model, active_losses(config), trained,
                   make_optimizers(model, config, self.machine.dtype))

    @cached_property
    def served(self):
        """A model that nothing trains. Under the mode full it is the dense one."""
        model = self.model(self.arm("g1_no_utilrank")).requires_grad_(False)
        cast_frozen(model, self.machine)
        return model

    @cached_property
    def transformers(self):
        """The same weights, run by the library `transformers`; None where it is not installed, or the weights are
        not of its kind. In bfloat16 its residual stream is bfloat16 too, and ours float32."""
        if not self.config["backbone"].startswith("hf:"):
            return None
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            print("transformers is not installed: its rows are left out", file=sys.stderr)
            return None
        folder = hugging_face_folder(self.config["backbone"][3:])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.machine.dtype)
        return model.eval().to(self.machine.device)

    def batch(self, config):
        return get_batch(self.data["train"], config, 0, 0, self.machine)

    def tokens(self, rows, length):
        """-> (rows, length), of which the served model's thresholds now send the budget's share full."""
        tokens = torch.from_numpy(self.data["train"][:rows * length].astype(np.int64)).view(rows, length)
        tokens = tokens.to(self.machine.device)
        with self.machine.autocast():
            self.served.calibrate(Context(tokens, torch.arange(rows, device=tokens.device)))
        return tokens

    def in_turn(self, *functions):
        """The median seconds of each of several functions, timed in turn after a warm-up."""
        gpu, times = self.machine.device == "cuda", [[] for _ in functions]
        wait = torch.cuda.synchronize if gpu else (lambda: None)
        for function in functions * (3 if gpu or self.config["compile"] else 1):
            function()
        for _ in range(self.options["repeat"]):
            for function, seconds in zip(functions, times):
                wait()
                began = time.perf_counter()
                function()
                wait()
                seconds.append(time.perf_counter() - began)
        return [statistics.median(seconds) for seconds in times]


def one_step(run):
    """A training step that logs nothing -> its losses."""
    values = train_step(run, logged=False)
    run.step += 1
    return values["losses"]


@torch.no_grad()
def forward(bench, model, batch, mode, execution="gathered"):
    """One forward pass to the loss of every token."""
    context, model.config.execution = Context(batch.tokens, batch.row_seeds), execution
    trained = model.wte.weight.requires_grad  # the matrices of a served model are cast already
    with bench.machine.autocast() if trained else contextlib.nullcontext():
        x, _ = model.run(model.embed(context), mode, context)
        model.token_losses([x], batch.targets)
    model.config.execution = "gathered"


@torch.inference_mode()
def prefill(bench, tokens, mode):
    """A prompt (B, T) into a KV cache -> the logits of its last token (B, 1, V)."""
    return bench.served(tokens, mode, cache=new_cache(bench.served, len(tokens)), last_only=True)[0]


@torch.inference_mode()
def decode(bench, tokens, mode):
    """Greedy decoding behind a KV cache -> the Routes of every step. The likeliest token is found, but the next one
    in `tokens` (B, n) is read: random weights would soon write the same token for ever."""
    cache, routes = new_cache(bench.served, len(tokens)), []
    for token in tokens.split(1, dim=1):
        logits, decided = bench.served(token, mode, cache=cache, last_only=True)
        logits.argmax(-1)
        routes.append(decided)
    return routes


def bytes_read(model, mode, routes=()):
    """The bytes of weights that one step of decoding reads. routes: what was decided in that step; an FFN is read
    where some token of the batch takes it."""
    masks, total = {route.layer: route.mask for route in routes}, size(model.ln_f) + model.head.nbytes
    for block in model.h:
        full = not block.controlled or mode == "full"
        cheap = not full
        if block.layer in masks:
            full = masks[block.layer].any().item()
            cheap = block.estimator.mixes or not masks[block.layer].all().item()
            total += size(block.gate)
        read = [block.ln_1, block.attn, block.ln_2] + [block.mlp] * full + ([block.cheap] if cheap else [])
        total += sum(map(size, read))
    return total


def size(module):
    return sum(p.nbytes for p in module.parameters())


# -----------------------------------------------------------------------------
# the rows

def forward_rows(bench):
    """Routing, the fast and the plain way, beside the dense model: nothing trains."""
    config = bench.arm("g1_no_utilrank")
    limits = [1 / bench.ledger(config)["inference_ratio"],
              1 / bench.ledger({**config, "execution": "masked"})["forward_proxy"]]
    for B in dict.fromkeys((1, config["batch_size"])):
        batch = bench.batch({**config, "batch_size": B})
        dense, *routed = bench.in_turn(*[partial(forward, bench, bench.served, batch, *how) for how in
                                         (("full",), ("topk", "gathered"), ("topk", "masked"))])
        for way, seconds, limit in zip(("gathered", "masked"), routed, limits):
            yield speed(f"forward, B={B}: speed of {way} over dense", seconds, dense, batch.tokens.numel(), limit)


def training_rows(bench):
    """The dense step beside its forward pass, and the steps of arms beside the dense step."""
    dense = bench.run(bench.arm("dense"))
    batch = bench.batch(dense.config)
    step, passed = bench.in_turn(partial(one_step, dense), partial(forward, bench, dense.model, batch, "full"))
    slices = dense.config["gradient_accumulation_steps"]
    tokens = batch.tokens.numel() * slices
    yield row("training: time of a dense step over its forward", step / passed / slices, 3.0,
              f"{step:.3g} s, {tokens / step:,.1f} tokens/s")
    for arm in STEP_ARMS:
        run = bench.run(bench.arm(arm))
        step, ours = bench.in_turn(partial(one_step, dense), partial(one_step, run))
        yield row(f"training: time of a step of {arm} over a dense step", ours / step,
                  bench.ledger(run.config)["train_ratio"],
                  f"{ours:.3g} and {step:.3g} s, {tokens / ours:,.1f} and {tokens / step:,.1f} tokens/s")


def decode_rows(bench):
    """KV-cached decoding, beside the bytes of weights that a step reads."""
    n, model = min(DECODED, bench.config["block_size"]), bench.served
    for B in (1, 64) if bench.machine.device == "cuda" else (1,):
        tokens = bench.tokens(B, n)
        functions = [partial(decode, bench, tokens, mode) for mode in ("full", "threshold", "cheap")]
        if bench.transformers:  # n tokens from one: n passes, as ours
            first = {"input_ids": tokens[:, :1], "attention_mask": torch.ones_like(tokens[:, :1])}
            functions.append(partial(bench.transformers.generate, **first, pad_token_id=0, do_sample=False,
                                     use_cache=True, max_new_tokens=n, min_new_tokens=n))
        dense, routed, cheap, *theirs = bench.in_turn(*functions)
        routes, dense_bytes = decode(bench, tokens, "threshold"), bytes_read(model, "full")
        share = np.mean([route.mask.float().mean().item() for step in routes for route in step])
        read = statistics.mean(bytes_read(model, "threshold", step) for step in routes)
        yield speed(f"decode, B={B}: speed of routed over dense", routed, dense, B * n, dense_bytes / read,
                    f"; {share:.0%} went full; dense reads {dense_bytes * n / dense / 1e9:.1f} GB/s of weights")
        yield speed(f"decode, B={B}: speed of all cheap over dense", cheap, dense, B * n,
                    dense_bytes / bytes_read(model, "cheap"))
        for seconds in theirs:
            yield speed(f"decode, B={B}: speed of our dense over transformers' generate", dense, seconds, B * n)
            yield speed(f"decode, B={B}: speed of routed over transformers' generate", routed, seconds, B * n)


def prefill_rows(bench):
    """A prompt into the KV cache, with the logits of its last token alone, beside its FLOPs."""
    n = min(PREFILLED, bench.config["block_size"])
    tokens, costs = bench.tokens(1, n), bench.ledger({**bench.arm("g1_no_utilrank"), "block_size": n})
    functions = [partial(prefill, bench, tokens, mode) for mode in ("full", "threshold")]
    if bench.transformers:
        theirs = partial(bench.transformers, tokens, use_cache=True, logits_to_keep=1)
        functions.append(torch.inference_mode()(theirs))
    dense, routed, *theirs = bench.in_turn(*functions)
    spared = costs["inference"]["lm_head"] * (1 - 1 / n)  # the ledger counts the head at every token
    limit = (costs["dense_forward"] - spared) / (costs["inference_flops"] - spared)
    yield speed(f"prefill of {n} tokens: speed of routed over dense", routed, dense, n, limit)
    for seconds in theirs:
        difference = (functions[0]().float() - functions[-1]().logits.float()).abs().max()
        yield speed(f"prefill of {n} tokens: speed of our dense over transformers'", dense, seconds, n, None,
                    f"; both fill a cache and give the last token's logits, which differ by {difference:.1g}")
        yield speed(f"prefill of {n} tokens: speed of routed over transformers'", routed, seconds, n)


def memory_rows(bench):
    """The most that this process has held, Python and PyTorch included, after two steps of --arm."""
    run = bench.run(bench.arm(bench.options["arm"]))
    for _ in range(2):
        one_step(run)
    peak = peak_memory(bench.machine.device) / 2 ** 20
    yield row(f"memory: MiB at most while training {bench.options['arm']}", peak)


def peak_memory(device):
    """The most bytes that this process has held, of the GPU's memory or of the machine's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    import resource  # there is none on Windows; on Linux it would count what the parent had held
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def nanogpt_rows(bench):
    """The dense step by AdamW and the dense forward pass, beside a nanoGPT of the same shape."""
    if not bench.options["baseline"]:
        return
    dense = bench.run({**bench.arm("dense"), "gradient_accumulation_steps": 1})
    batch, c, device = bench.batch(dense.config), dense.model.config, bench.machine.device
    spec = importlib.util.spec_from_file_location("nanogpt", os.path.join(bench.options["baseline"], "model.py"))
    nanogpt = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)  # its dataclass looks there
    with contextlib.redirect_stdout(io.StringIO()):
        spec.loader.exec_module(nanogpt)
        shape = nanogpt.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer,
                                  n_head=c.n_head, n_embd=c.n_embd, dropout=0.0, bias=c.bias)
        model = nanogpt.GPT(shape).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device)
    if bench.config["compile"]:
        model = torch.compile(model)

    def loss():
        with bench.machine.autocast():
            return model(batch.tokens.contiguous(), batch.targets.contiguous())[1]

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    theirs, their_forward, ours, our_forward = bench.in_turn(
        step, torch.no_grad()(loss), partial(one_step, dense), partial(forward, bench, dense.model, batch, "full"))
    n = batch.tokens.numel()
    yield speed("training: speed of our dense step over nanoGPT's", ours, theirs, n)
    yield speed("forward: speed of our dense model over nanoGPT's", our_forward, their_forward, n)


def ledger_rows(bench):
    """The FLOPs of every recipe of config/ and every line of config/arms.ini. Nothing is timed."""
    yield (f"\nFLOPs per token at T = {bench.config['block_size']}. Forward: what training executes forward / a "
          "dense forward. Step: a training step / a dense one. Inference: / a dense forward. Items: forward + "
          "backward, MFLOP a token.\n\n| arm | forward | step | inference | items |\n|---|---|---|---|---|")
    for arm in [*recipes(bench.config), *read_arms()]:
        costs = bench.ledger(bench.arm(arm))
        ratios = " | ".join(f"{costs[key]:.3f}" for key in ("forward_proxy", "train_ratio", "inference_ratio"))
        items = ", ".join(f"{name} {f / 1e6:.3g} + {b / 1e6:.3g}" for name, (f, b) in costs["train"].items())
        yield f"| {arm} | {ratios} | {items} |"


ROWS = {"forward": forward_rows, "training": training_rows, "decode": decode_rows, "prefill": prefill_rows,
        "nanogpt": nanogpt_rows, "memory": memory_rows, "ledger": ledger_rows}


# -----------------------------------------------------------------------------
# the script

def read_words(words):
    """The words of the command line -> (config of the scale, options, names of rows). Raises ConfigError."""
    own = [word for word in words if word.lstrip("-").partition("=")[0] in DEFAULTS]
    options = configure(DEFAULTS, own)[0]
    config, _, given = configure_run([word for word in words if word not in own])
    asked = options["rows"].split(",") if options["rows"] else set(ROWS) - {"memory"}
    for name in asked:
        if name not in ROWS:
            raise ConfigError(f"--rows names {name!r}; {did_you_mean(name, ROWS)}")
    if {"recipe", "mode"} & given:
        raise ConfigError("the rows name their own recipes; give a scale alone, without recipe and mode")
    if options["repeat"] < 1:
        raise ConfigError(f"--repeat={options['repeat']} measures nothing; give 1 or more")
    baseline = options["baseline"]
    if baseline and not (os.path.exists(os.path.join(baseline, "model.py")) and config["positions"] == "learned"):
        raise ConfigError(f"--baseline={baseline!r}: name the folder of a nanoGPT checkout, with its model.py, and a "
                          "scale of GPT-2's family")
    return config, options, [name for name in ROWS if name in asked]


def main():
    show_help_if_asked(sys.argv[1:], __file__)
    config, options, names = read_words(sys.argv[1:])
    bench = Bench(config, options)
    weights = config["backbone"] if is_foreign(config["backbone"]) else "random"
    print(f"{bench.machine.describe()}\n{config['scale']}: {config['n_layer']} layers, width {config['n_embd']}, "
          f"T = {config['block_size']}, B = {config['batch_size']}, budget {config['budget']}; weights {weights}; "
          f"medians of {options['repeat']}" + ", compiled" * config["compile"])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"warning: the machine is not idle (load average {load:.2f}): what is timed now means little")
    if names != ["ledger"]:
        print("\n| what | figure | limit | figure / limit | note |\n|---|---|---|---|---|", flush=True)
    for name in names:
        for line in ROWS[name](bench):
            print(line, flush=True)


if __name__ == "__main__":
    exit_on_error(main)
