"""Speed and memory, as ratios measured in one run, beside the limit that FLOPs or bytes allow.

    python bench.py                                            tiny, a minute
    python bench.py config/paper.py --batch_size=4             the paper's shape: needs about 10 GB, half an hour on 2 cores
    python bench.py config/paper.py --batch_size=4 --baseline=../nanoGPT     beside a nanoGPT checkout, timed in the same run
    python bench.py --rows=ledger                              the FLOPs of every recipe, no timing
    python bench.py --rows=forward,training --dtype=bfloat16   some rows in one dtype; by default float32 and bfloat16
    python bench.py --rows=tokenizing --text='my/*.parquet'    on your own files

Pairs are timed in turn and medians compared. A `goal` is for the ratio of figure and limit. The last line is JSON.
Limits come from the ledger (FLOPs), for decoding from the bytes of weights that a token reads; the share of the machine that
a step uses (MFU) is against a matrix product measured in the same run.
"""
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time

import numpy as np
import torch

import train as trainer
from configurator import ConfigError, configure, exit_on_error
from gates import oracle_labels
from model import GPT, Cache, ledger
from prepare import dataset_documents, prepare, stdlib_documents, tokenizer
from runs import Machine, build, cast_frozen, freeze, model_config
from study import all_arms, recipe_words

OPTIONS = dict(baseline="", rows="", text="", repeat=5)


class Case:
    """A model with random weights and a batch of random tokens, at the shape of a config."""

    def __init__(self, config, **overrides):
        self.config = trainer.validate({**config, **overrides})
        self.machine = Machine(self.config)
        self.model = build(self.config, {"vocab_size": VOCAB[0]}, self.machine)
        if self.config["mode"] != "dense":
            freeze(self.model, self.machine)
            for block in self.model.h:
                if block.controlled:  # cheap starts at zero, and timings should not
                    torch.nn.init.normal_(block.cheap.c_proj.weight, std=0.02)
        self.optimizers = trainer.make_optimizers(self.model, self.config)
        rows = self.config["batch_size"] * self.config["gradient_accumulation_steps"] * (self.config["block_size"] + 1)
        self.data = np.random.default_rng(0).integers(0, VOCAB[0], max(rows, 20_000)).astype(np.uint16)
        self.batch = trainer.get_batch(self.data, self.config, 0, 0, self.machine)
        if self.config["compile"]:
            for block in self.model.h:
                block.compile()
        self.steps = 0

    @torch.no_grad()
    def forward(self, mode="topk", gathered=True):
        x, y, keys = self.batch
        with self.machine.autocast():
            self.model.token_losses(self.model.blocks(self.model.embed(x), mode, keys, gathered)[0], y)

    def step(self):
        self.steps += 1
        trainer.train_step(self.model, self.optimizers, self.config, self.data, self.steps, self.machine)

    @torch.no_grad()
    def labels(self, share):
        x, y, keys = self.batch
        n = max(1, int(share * len(x)))
        layers = self.config["controlled"]
        with self.machine.autocast():
            for layer in (layers[0], layers[len(layers) // 2], layers[-1]):  # their mean is that of a uniform draw
                route = self.routes[layer]
                oracle_labels(self.model, route._replace(x=route.x[:n], h=route.h[:n], scores=route.scores[:n]), y[:n], keys[:n], "on_policy")

    @torch.no_grad()
    def keep_routes(self):
        with self.machine.autocast():
            routes = self.model.blocks(self.model.embed(self.batch[0]), "topk", self.batch[2], keep=set(self.config["controlled"]))[1]
        self.routes = {r.layer: r for r in routes}

    @torch.no_grad()
    def decode(self, mode, tokens=16):
        cache, full = Cache(self.model.config, 1, self.machine.device, self.machine.dtype), []
        with self.machine.autocast():
            for t in range(tokens):
                full += self.model(self.batch[0][:1, t:t + 1], mode, self.batch[2][:1], cache=cache)[1]
        return full

    def flops(self, **kw):
        return ledger(self.model, self.config["mode"], **kw)


VOCAB = [0]  # set by main from the tokenizer of the config's data


def clock(function, device):
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def pair(a, b, repeat, device):
    """Median seconds of a and of b, timed in turn after a warm-up of each."""
    a(), b()
    times = [(clock(a, device), clock(b, device)) for _ in range(repeat)]
    return tuple(statistics.median(t) for t in zip(*times))


def peak_flops(dtype, device):
    """FLOP/s of a large matrix product, the best of 9: what this machine can multiply."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(clock(lambda: a @ a, device) for _ in range(9))


# -----------------------------------------------------------------------------
# rows: each yields (what, limit, figure, goal for figure / limit, note); a negative goal is an upper bound

def dtypes(config):
    return ("float32", "bfloat16") if config["dtype"] == "auto" else (config["dtype"],)


def gathered_forward(config, options):
    for dtype in dtypes(config):
        goal = 0.95 if dtype == "float32" else 0.90
        for B in dict.fromkeys((1, config["batch_size"])):
            dense, case = Case(config, mode="dense", dtype=dtype, batch_size=B), Case(config, gate="g1", dtype=dtype, batch_size=B)
            slow, fast = pair(lambda: dense.forward("full"), case.forward, options["repeat"], case.machine.device)
            limit = 1 / case.flops()["inference_ratio"]
            tokens = B * config["block_size"]
            yield f"forward, gathered vs dense, {dtype}, B={B}", limit, slow / fast, goal, f"{tokens / slow:,.0f} and {tokens / fast:,.0f} tokens/s"
        slow, fast = pair(lambda: dense.forward("full"), lambda: case.forward(gathered=False), max(1, options["repeat"] // 2), case.machine.device)
        yield f"forward, masked vs dense, {dtype}, B={B}", 1 / case.flops(gathered=False)["forward_proxy"], slow / fast, None, "for comparison: no saving"


STEPS = {"`ste`, LM only": {"estimator": "ste", "lambda_util": 0.0, "lambda_rank": 0.0},
         "`scaled`, LM only": {"estimator": "scaled", "lambda_util": 0.0, "lambda_rank": 0.0},
         "`ste`, util and rank off-policy (full aux)": {"estimator": "ste", "oracle": "off_policy"},
         "`scaled`, util and rank on-policy, half of the rows (best)": {"estimator": "scaled", "oracle": "on_policy", "label_share": 0.5}}


def training_steps(config, options):
    repeat, baseline = options["repeat"], options["baseline"]
    for dtype in dtypes(config):
        dense = Case(config, mode="dense", dtype=dtype)
        device, tokens = dense.machine.device, config["batch_size"] * config["block_size"]
        if baseline:
            theirs, step = nanogpt(baseline, dense)
            slow, fast = pair(step, dense.step, repeat, device)
            yield f"dense training step vs nanoGPT, {dtype}", 1.0 if dtype == "float32" else 1.5, slow / fast, 1.0, f"{slow:.2f} and {fast:.2f} s"
            del theirs, step
        peak, (fast, _) = peak_flops(dense.machine.dtype, device), pair(dense.step, lambda: None, repeat, device)
        mfu = 3 * dense.flops()["dense_forward"] * tokens / fast / peak
        yield f"dense training step, share of a matrix product's FLOP/s (MFU), {dtype}", 1.0, mfu, 0.5, f"of {peak / 1e12:.2f} TFLOP/s; attention as T^2"
        for name, over in STEPS.items():
            case = Case(config, gate="g1", dtype=dtype, **over)
            slow, fast = pair(dense.step, case.step, repeat, device)
            limit, masked = (case.flops(gathered=g, label=(over["oracle"], 1, over.get("label_share", 1.0)) if "oracle" in over else None)["train_ratio"] for g in (True, False))
            yield (f"controller step, {name}, vs dense step, {dtype}", limit, fast / slow, -1.05,
                   f"{fast:.2f} of {slow:.2f} s, {tokens / fast:,.0f} tokens/s, 20,000 steps of 16 x 1024 tokens in {20_000 * 16 * 1024 / tokens * fast / 3600:.2f} h; masked, its limit would be {masked:.3f}")


def label_passes(config, options):
    for dtype in dtypes(config):
        dense, case = Case(config, mode="dense", dtype=dtype), Case(config, gate="g1", dtype=dtype)
        case.keep_routes()
        for share, word in ((1.0, "whole batch"), (0.25, "a quarter")):
            slow, fast = pair(dense.step, lambda: case.labels(share), max(1, options["repeat"] // 2), dense.machine.device)
            with_labels = case.flops(label=("on_policy", 1, share))
            limit = with_labels["train"]["labels"][0] / (3 * with_labels["dense_forward"])
            yield f"labels, one layer, on-policy, {word}, {dtype}", limit, fast / 3 / slow, -1.08, "as a share of a dense step"


def decode(config, options):
    for dtype in dtypes(config):
        dense, case = Case(config, mode="dense", dtype=dtype, batch_size=1), Case(config, gate="g1", dtype=dtype, batch_size=1)
        for c in (dense, case):
            cast_frozen(c.model.requires_grad_(False), c.machine)
        trainer.calibrate(case.model, case.batch, case.machine)
        slow, fast = pair(lambda: dense.decode("full"), lambda: case.decode("threshold"), options["repeat"], case.machine.device)
        size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
        everything = sum(size(b) for b in dense.model.h) + size(dense.model.wte)
        share = dict.fromkeys(config["controlled"], 0.0)
        for r in case.decode("threshold"):
            share[r.layer] += r.mask.float().mean().item() / 16
        saved = sum((1 - share[b.layer]) * (size(b.mlp) - size(b.cheap)) - size(b.gate) for b in case.model.h if b.controlled)
        yield (f"KV-cached decode, B=1, routed vs dense, {dtype}", everything / (everything - saved), slow / fast, 0.90,
               f"{16 / slow:,.1f} and {16 / fast:,.1f} tokens/s; full share {sum(share.values()) / len(share):.2f}; {everything * 16 / slow / 1e9:.1f} GB/s")


def memory(config, options):
    """Peak memory of building a model and two steps; on a CPU resident memory, each in a process of its own."""
    if Machine(dict(config)).device == "cuda":
        def peak(**over):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            case = Case(config, **over)
            case.step(), case.step()
            return torch.cuda.max_memory_allocated()
    else:
        def peak(**over):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                return pool.apply(peak_of, ({**config, **over}, VOCAB[0]))
    for dtype in dtypes(config):
        dense = peak(mode="dense", dtype=dtype)
        for name, over in list(STEPS.items())[:2]:
            ours = peak(gate="g1", dtype=dtype, **over)
            yield f"peak memory, controller step {name} vs dense step, {dtype}", 0.5, ours / dense, -1.0, f"{ours / 2**20:,.0f} and {dense / 2**20:,.0f} MiB"


def peak_of(config, vocab):
    VOCAB[0] = vocab
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case = Case(config)
    case.step(), case.step()
    return max(1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def versus_nanogpt(config, options):
    if not options["baseline"]:
        return
    dense, case = Case(config, mode="dense", dtype="float32"), Case(config, gate="g1")
    theirs, _ = nanogpt(options["baseline"], dense)
    x, y = (t.contiguous() for t in dense.batch[:2])
    with torch.no_grad():
        slow, fast = pair(lambda: theirs(x, y), case.forward, options["repeat"], dense.machine.device)
    peaks = [peak_flops(getattr(torch, d), case.machine.device) / 1e12 for d in ("float32", case.config["dtype"])]
    yield (f"forward + loss, gathered {case.config['dtype']} vs nanoGPT float32", 4.0, slow / fast, 1.0,
           f"{slow:.2f} and {fast:.2f} s; a matrix product: {peaks[0]:.2f} and {peaks[1]:.2f} TFLOP/s")


def nanogpt(folder, case):
    """The model of a nanoGPT checkout at the same shape, and its training step with AdamW and autocast."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(folder, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = case.model.config
    theirs = module.GPT(module.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                                         n_embd=c.n_embd, dropout=0.0, bias=True)).to(case.machine.device)
    optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), case.machine.device)
    x, y = (t.contiguous() for t in case.batch[:2])

    def step():
        optimizer.zero_grad(set_to_none=True)
        with case.machine.autocast():
            loss = theirs(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    return theirs, step


def tokenizing(config, options):
    """The whole of prepare.py, from files to bins, beside raw tiktoken on the same text in memory with as many threads."""
    try:
        enc = tokenizer("gpt2")
    except ConfigError as error:
        print(f"the tokenizing row is left out: {error}", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = options["text"]
        if not source:  # documents as long as a web page's, none twice
            source, texts = os.path.join(folder, "text.jsonl"), list(stdlib_documents())
            with open(source, "w") as f:
                f.writelines(json.dumps({"text": f"{k} " + "\n".join(texts[i:i + 16])}) + "\n" for k in range(8) for i in range(0, len(texts), 16))
        documents, workers, runs = list(dataset_documents(source)), os.cpu_count(), []

        def ours():
            runs.append(0)
            with contextlib.redirect_stdout(io.StringIO()):
                prepare(source, f"run{len(runs)}", root=folder)
        raw, mine = pair(lambda: enc.encode_ordinary_batch(documents, num_threads=workers), ours, options["repeat"], "cpu")
    yield "tokenizing, prepare.py vs raw tiktoken", 1.0, raw / mine, 0.9, f"{sum(map(len, documents)) / mine / 1e6:.1f} MB/s, {workers} threads"


def show_ledger(config):
    """FLOPs of every recipe, train and inference, against both denominators."""
    print(f"\nFLOPs per token at T = {config['block_size']}; forward proxy: what training executes forward / a full-only forward; "
          "step: a training step / a dense training step; inference: / a dense forward\n\n| recipe | forward proxy | step | inference | items (forward + backward, MFLOP a token) |\n|---|---|---|---|---|")
    out = {}
    for arm in all_arms():
        c = trainer.validate(configure({**trainer.DEFAULTS, **{k: v for k, v in config.items() if k not in RECIPE_KEYS}}, recipe_words(arm)))
        with torch.device("meta"):
            model = GPT(model_config(c, VOCAB[0]))
        f = trainer.flops_of(model, c)
        out[arm] = {k: f[k] for k in ("forward_proxy", "train_ratio", "inference_ratio", "forward", "backward", "inference_flops")}
        items = ", ".join(f"{k} {a / 1e6:.3g} + {b / 1e6:.3g}" for k, (a, b) in f["train"].items())
        print(f"| {arm} | {f['forward_proxy']:.3f} | {f['train_ratio']:.3f} | {f['inference_ratio']:.3f} | {items} |")
    return out


RECIPE_KEYS = ("recipe", "mode", "gate", "estimator", "oracle", "budget", "share_step", "label_share", "label_layers", "lambda_util", "lambda_rank", "lambda_jepa")
ROWS = {"forward": gathered_forward, "nanogpt": versus_nanogpt, "training": training_steps, "labels": label_passes, "decode": decode, "memory": memory, "tokenizing": tokenizing}


def main():
    mine = [w for w in sys.argv[1:] if w.startswith("--") and w[2:].partition("=")[0] in OPTIONS]
    options = configure(OPTIONS, mine)
    config = trainer.validate(configure(trainer.DEFAULTS, [w for w in sys.argv[1:] if w not in mine]))
    VOCAB[0] = 257 if config["dataset"] == "stdlib" else 50257
    names = options["rows"].split(",") if options["rows"] else [*ROWS, "ledger"]
    for name in names:
        if name not in (*ROWS, "ledger"):
            raise ConfigError(f"--rows names {name!r}; known: {', '.join((*ROWS, 'ledger'))}")
    if options["baseline"] and not os.path.exists(os.path.join(options["baseline"], "model.py")):
        raise ConfigError(f"--baseline={options['baseline']!r} has no model.py; name the folder of a nanoGPT checkout")
    machine = Machine(dict(config))
    print(f"{machine.describe()}; {config['scale']}: {config['n_layer']} layers, width {config['n_embd']}, T = {config['block_size']}, "
          f"B = {config['batch_size']}, budget {config['budget']}\n\n| what | limit | figure | figure / limit | goal | |\n|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in (n for n in names if n in ROWS):
        for what, limit, figure, goal, note in ROWS[name](config, options):
            aim = "" if goal is None else f">= {goal}" if goal > 0 else f"<= {-goal}"
            met = "" if goal is None else " met" if (figure / limit >= goal if goal > 0 else figure / limit <= -goal) else " missed"
            print(f"| {what} | {limit:.3f} | {figure:.3f} | {figure / limit:.3f} | {aim}{met} | {note} |", flush=True)
            rows.append({"what": what, "limit": limit, "figure": figure, "ratio": figure / limit, "goal": aim, "met": met.strip(), "note": note})
    recipes = show_ledger(config) if "ledger" in names else {}
    print(json.dumps({"machine": machine.describe(), "scale": config["scale"], "rows": rows, "ledger": recipes}))


if __name__ == "__main__":
    exit_on_error(main)
