"""Speed, memory and FLOPs: ratios measured in one run, beside the limit that FLOPs or bytes allow.

    python bench.py                                     tiny: a few minutes
    python bench.py config/paper.py --batch_size=4      the paper's shape: 10 GB, an hour on 2 cores
    python bench.py config/paper.py --dtype=bfloat16 --compile --batch_size=16    the same on a GPU
    python bench.py --baseline=../nanoGPT               beside a nanoGPT checkout, timed in the same run
    python bench.py --rows=forward,training             some of: forward, training, labels, distillation,
                                                        decode, memory, nanogpt, tokenizing, ledger, profile
    python bench.py --rows=ledger                       the FLOPs of every arm, no timing
    python bench.py --rows=profile --arm=best           where the time of an arm's training step goes
    python bench.py --rows=tokenizing --text='my/*.jsonl'    on your own files
    python bench.py --dtype=bfloat16 --repeat=9         one dtype instead of two, medians of 9 instead of 5

What is compared is timed in turn, and medians are compared. A limit is what FLOPs (the ledger), bytes of
weights or a matrix product measured in the same run allow. An aim is only what we would like: of the figure,
or of its part of the limit. Numbers are compared as they are printed. The last line is JSON.
"""
import contextlib
import gc
import glob
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from configurator import HERE, ConfigError, arm_words, configure, did_you_mean, exit_on_error, load_plugin
from configurator import parse_file, read_arms
from gates import Context, Step, make_label
from prepare import get_batch, local_documents, local_files, prepare, stdlib_documents, tokenizer
from runs.backbone import cast_frozen, freeze
from runs.files import read_json
from runs.machine import Machine, compile_layers
from runs.optim import make_optimizers
from runs.options import validate
from runs.run import build, ledger_of
from sample import new_cache
from train import configure_run, dense_stream, labelled_rows, train_step

OPTIONS = dict(
    rows="",  # by default all but profile
    arm="best",  # whose step is profiled
    baseline="",  # the folder of a nanoGPT checkout
    text="",  # a glob of files to tokenize; by default the English inside CPython
    repeat=5,
)
STEP_ARMS = ("g1_no_utilrank", "g1_scaled", "g1_full_aux", "g1_distill", "best")
MEMORY_ARMS = ("g1_no_utilrank", "g1_scaled", "best")
DECODED = 16  # tokens


# -----------------------------------------------------------------------------
# a row of the table

class Aim(NamedTuple):
    """What we would like of the figure, or, with of_limit, of its part of the limit."""
    value: float
    at_most: bool = False
    of_limit: bool = False

    def describe(self):
        sign = "<=" if self.at_most else ">="
        return f"{sign} {self.value}" + (" of the limit" if self.of_limit else "")


class Row(NamedTuple):
    what: str
    figure: float
    limit: float | None = None
    aim: Aim | None = None
    note: str = ""

    def facts(self):
        """What is printed of it -> dict: rounded first and compared then."""
        facts = {"what": self.what, "figure": round(self.figure, 3), "limit": None, "part": None,
                 "aim": "", "met": None, "note": self.note}
        if self.limit is not None:
            facts["limit"], facts["part"] = round(self.limit, 3), round(self.figure / self.limit, 3)
        if self.aim is not None:
            compared = facts["part"] if self.aim.of_limit else facts["figure"]
            facts["aim"] = self.aim.describe()
            facts["met"] = compared <= self.aim.value if self.aim.at_most else compared >= self.aim.value
        return facts


def table_line(facts):
    numbers = ["" if facts[key] is None else f"{facts[key]:.3f}" for key in ("figure", "limit", "part")]
    verdict = {None: "", True: "met", False: "missed"}[facts["met"]]
    cells = [facts["what"], *numbers, f"{facts['aim']} {verdict}".strip(), facts["note"]]
    return f"| {' | '.join(cells)} |"


# At tiny a layer is so small that the limits of FLOPs are out of reach: the aims there are for the figures.
TINY_AIMS = {"forward": Aim(1.1), "decode": Aim(1.0), "g1_no_utilrank": Aim(0.65, at_most=True),
             "g1_full_aux": Aim(0.95, at_most=True)}


def aim_for(name, config, value, at_most=False):
    """The aim of a row at this scale: `value` of the limit, unless tiny has its own."""
    if config["scale"] == "tiny" and name in TINY_AIMS:
        return TINY_AIMS[name]
    return Aim(value, at_most, of_limit=True)


# -----------------------------------------------------------------------------
# what is measured

class Case:
    """A model with random weights and random tokens, at the shape and in the recipe of a config."""

    def __init__(self, config, vocab_size):
        self.machine = Machine(config)
        self.config = self.machine.resolved(config)
        self.model = build(self.config, {"vocab_size": vocab_size}, self.machine)
        if config["mode"] != "full":
            freeze(self.model, self.machine)
        for block in self.model.h:
            if block.controlled:  # cheap starts at zero, and timings should not
                torch.nn.init.normal_(block.cheap.c_proj.weight, std=0.02)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(self.model, self.config, self.machine.dtype)
        rows = config["batch_size"] * config["gradient_accumulation_steps"]
        tokens = max(rows * (config["block_size"] + 1), 20_000)
        self.data = {"train": np.random.default_rng(0).integers(0, vocab_size, tokens).astype(np.uint16)}
        self.batch = get_batch(self.data["train"], self.config, 0, 0, self.machine)
        self.context = Context(self.batch.tokens, self.batch.row_seeds)
        if config["compile"]:
            compile_layers(self.model)
        self.step = 0

    def served(self):
        """The same for inference: nothing trains, so every matrix is in the compute dtype."""
        cast_frozen(self.model.requires_grad_(False), self.machine)
        return self

    @torch.no_grad()
    def infer(self, mode):
        """One forward pass to the loss of every token."""
        with self.machine.autocast():
            x, _ = self.model.run(self.model.embed(self.context), mode, self.context)
            self.model.token_losses([x], self.batch.targets)

    @torch.no_grad()
    def decode(self, mode):
        """DECODED tokens through a KV cache, one at a time -> the Routes of each token."""
        cache, routes = new_cache(self.model, len(self.batch.tokens)), []
        with self.machine.autocast():
            for t in range(DECODED):
                token = self.batch.tokens[:, t:t + 1]
                routes.append(self.model(token, mode, self.batch.row_seeds, cache)[1])
        return routes


def one_step(case):
    """A training step of train.py that logs nothing -> its losses."""
    values = train_step(case, logged=False)
    case.step += 1
    return values["losses"]


def clock(function, device):
    """Seconds of one call; on a GPU by its own clock."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def warm_up(function, config, machine):
    """Compilation, the choice of kernels and the first allocations are over after this."""
    for _ in range(3 if config["compile"] or machine.device == "cuda" else 1):
        function()


def in_turn(functions, bench):
    """The median seconds of each of several functions, timed in turn after a warm-up."""
    for function in functions:
        warm_up(function, bench.config, bench.machine)
    times = []
    for _ in range(bench.options["repeat"]):
        times.append([clock(function, bench.machine.device) for function in functions])
    return [statistics.median(column) for column in zip(*times)]


def peak_flops(dtype, bench):
    """FLOP/s of a large matrix product, the best of several: what this machine can multiply."""
    device = bench.machine.device
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    product = partial(torch.matmul, a, a)
    warm_up(product, bench.config, bench.machine)
    return 2 * n ** 3 / min(clock(product, device) for _ in range(4 + bench.options["repeat"]))


class Bench:
    """What every row reads: the config of the scale, the options, the machine."""

    def __init__(self, config, options):
        self.config, self.options, self.machine = config, options, Machine(config)
        meta = read_json(os.path.join("data", config["dataset"], "meta.json")) or {}
        by_name = 257 if config["dataset"] in ("stdlib", "web") else 50257
        self.vocab_size = meta.get("vocab_size", by_name)
        self.dtypes = ["float32", "bfloat16"] if config["dtype"] == "auto" else [config["dtype"]]
        self.place = self.machine.describe().replace(str(self.machine.dtype)[6:], " and ".join(self.dtypes))

    def arm(self, name, **changes):
        """The config of an arm at this scale."""
        return validate({**configure(self.config, arm_words(name)), **changes})

    def dense(self, **changes):
        """The config of the dense model, trained as a backbone is."""
        return validate({**self.config, "mode": "full", **changes})

    def case(self, config):
        return Case(config, self.vocab_size)

    def ledger(self, config):
        return ledger_of(config, self.vocab_size)


# -----------------------------------------------------------------------------
# the rows

def forward_rows(bench):
    """Gathered and masked against dense: all weights frozen, topk, to the loss."""
    for dtype in bench.dtypes:
        for B in dict.fromkeys((1, bench.config["batch_size"])):
            gathered = bench.arm("g1_no_utilrank", dtype=dtype, batch_size=B)
            masked = {**gathered, "execution": "masked"}
            dense = bench.case(bench.dense(dtype=dtype, batch_size=B)).served()
            routed = [bench.case(config).served() for config in (gathered, masked)]
            functions = [partial(dense.infer, "full"), *(partial(case.infer, "topk") for case in routed)]
            slow, fast, both = in_turn(functions, bench)
            tokens = B * bench.config["block_size"]
            yield Row(f"forward, gathered vs dense, {dtype}, B={B}", slow / fast,
                      1 / bench.ledger(gathered)["inference_ratio"],
                      aim_for("forward", bench.config, 0.95 if dtype == "float32" else 0.90),
                      f"{tokens / slow:,.0f} and {tokens / fast:,.0f} tokens/s")
            yield Row(f"forward, masked vs dense, {dtype}, B={B}", slow / both,
                      1 / bench.ledger(masked)["forward_proxy"], None, "for comparison: it saves nothing")


def training_rows(bench):
    """The dense step beside a matrix product, and the steps of arms beside the dense one."""
    c = bench.config
    tokens = c["block_size"] * c["batch_size"] * c["gradient_accumulation_steps"]
    for dtype in bench.dtypes:
        dense = bench.case(bench.dense(dtype=dtype))
        peak = peak_flops(dense.machine.dtype, bench)
        [seconds] = in_turn([partial(one_step, dense)], bench)
        flops = 3 * bench.ledger(dense.config)["dense_forward"] * tokens
        yield Row(f"dense step: part of a matrix product's FLOP/s (MFU), {dtype}", flops / seconds / peak,
                  1.0, Aim(0.5), f"of {peak / 1e12:.2f} TFLOP/s; {tokens / seconds:,.0f} tokens/s")
        attention = attention_seconds(dense, bench)
        for arm in STEP_ARMS:
            config = bench.arm(arm, dtype=dtype)
            case = bench.case(config)
            slow, fast = in_turn([partial(one_step, dense), partial(one_step, case)], bench)
            own = limit_at_attentions_rate(bench, config, attention, slow)
            note = (f"{fast:.3g} of {slow:.3g} s, {tokens / fast:,.0f} tokens/s; with attention at its own "
                    f"rate the limit is {own:.3f}")
            if c["scale"] == "paper":
                hours = 20_000 * 16 * 1024 / tokens * fast / 3600
                note += f"; 20,000 steps of 16 x 1024 tokens in {hours:.2f} h"
            part = 1.08 if case.config["lambda_distill"] else 1.05
            limit = bench.ledger(config)["train_ratio"]
            yield Row(f"step of {arm} vs dense step, {dtype}", fast / slow, limit,
                      aim_for(arm, c, part, at_most=True), note)


class AttentionSeconds(NamedTuple):
    """Of one layer's attention in a step: forward, and backward without and with the gradient of weights."""
    forward: float
    backward: float
    backward_trained: float


def attention_seconds(dense, bench):
    """Measured alone, at the shape of a step of this case -> AttentionSeconds."""
    attention, machine = dense.model.h[-1].attn, dense.machine
    x = dense.model.embed(dense.context).detach().requires_grad_()
    weights = list(attention.parameters())

    def forward():
        with torch.no_grad(), machine.autocast():
            attention(x)

    def both(*wanted):
        with machine.autocast():
            y = attention(x)
        torch.autograd.grad(y, wanted, torch.ones_like(y))
    times = in_turn([forward, partial(both, x), partial(both, x, *weights)], bench)
    return AttentionSeconds(times[0], times[1] - times[0], times[2] - times[0])


def limit_at_attentions_rate(bench, config, attention, seconds):
    """What a step could take, in dense steps, which take `seconds`. No routing saves attention, and its FLOPs
    take longer than those of the FFNs. So it is counted as measured, and the rest at the dense step's
    rate."""
    costs, layers = bench.ledger(config), config["n_layer"]
    with_gradient = layers - config["controlled"][0] - 1
    teaching = teaching_layers(config, costs)
    forward, backward = costs["train"]["attention"]
    one_layer = forward / layers
    rest = costs["forward"] + costs["backward"] - forward - backward - teaching * one_layer
    rest_of_dense = 3 * costs["dense_forward"] - 3 * layers * one_layer
    rest_seconds = seconds - layers * (attention.forward + attention.backward_trained)
    routed = (layers + teaching) * attention.forward + with_gradient * attention.backward
    return (routed + rest / rest_of_dense * rest_seconds) / seconds


def teaching_layers(config, costs):
    """How many layers of attention the whole batch passes, without a gradient, for labels and the teacher."""
    layers, controlled, count = config["n_layer"], config["controlled"], 0.0
    if "dense" in costs["train"]:
        share = 1.0 if config["lambda_distill"] else config["label_share"]
        count += share * (layers - controlled[0])
    if "labels" in costs["train"]:
        behind = sum(layers - 1 - layer for layer in controlled) / len(controlled)  # a mean
        labelled = min(config["label_layers"], len(controlled))
        count += 2 * behind * labelled * config["label_share"]  # two branches
    return count


def label_rows(bench):
    """Label passes of one layer, on-policy, against a dense step. The first, the middle and the last layer
    are timed: their mean is that of the layer that is drawn."""
    controlled = bench.config["controlled"]
    layers = [controlled[0], controlled[len(controlled) // 2], controlled[-1]]
    for dtype in bench.dtypes:
        dense, functions, configs = bench.case(bench.dense(dtype=dtype)), {}, {}
        for target, arm in (("next", "g1_on_policy"), ("dense", "g1_on_policy_dense")):
            for share, words in ((1.0, "whole batch"), (0.5, "half of the rows")):
                what = f"labels of one layer, {target} target, on-policy, {words}, {dtype}"
                configs[what] = bench.arm(arm, dtype=dtype, label_share=share)
                functions[what] = partial(label_layers, *routed_rows(bench.case(configs[what]), layers))
        step, *passes = in_turn([partial(one_step, dense), *functions.values()], bench)
        for what, seconds in zip(functions, passes):
            costs = bench.ledger(configs[what])
            limit = costs["train"]["labels"][0] / (3 * costs["dense_forward"])
            yield Row(what, seconds / len(layers) / step, limit, Aim(1.08, at_most=True, of_limit=True),
                      "as a part of a dense step; the dense forward is not in it")


@torch.no_grad()
def routed_rows(case, layers):
    """-> case, and what labels read: the Step of the labelled rows, and the Routes of `layers`."""
    step = Step(case.model, case.config, case.context, case.batch.targets)
    with case.machine.autocast():
        x = case.model.embed(case.context)
        _, routes = case.model.run(x, "topk", case.context, keep=layers)
        step.dense = dense_stream(case.model, x, case.context, 0)
    rows = torch.tensor(labelled_rows(len(x), case.config["label_share"]), device=x.device)
    return case, step.rows(rows), [route.rows(rows) for route in routes if route.layer in layers]


def label_layers(case, step, routes):
    with case.machine.autocast():
        for route in routes:
            make_label(step, route)


def distillation_rows(bench):
    """The dense forward that distillation and `dense` labels read, from the first controlled layer on."""
    first = bench.config["controlled"][0]
    for dtype in bench.dtypes:
        config = bench.arm("g1_on_policy_dense", dtype=dtype, label_share=1.0)
        dense, case = bench.case(bench.dense(dtype=dtype)), bench.case(config)
        with torch.no_grad(), case.machine.autocast():
            x, _ = case.model.run(case.model.embed(case.context), "topk", case.context, end=first)

        def teach():
            with case.machine.autocast():
                dense_stream(case.model, x, case.context, first)
        step, seconds = in_turn([partial(one_step, dense), teach], bench)
        costs = bench.ledger(config)
        yield Row(f"dense forward of distillation, {dtype}", seconds / step,
                  costs["train"]["dense"][0] / (3 * costs["dense_forward"]),
                  Aim(1.08, at_most=True, of_limit=True), "as a part of a dense step; the head is not in it")


def decode_rows(bench):
    """KV-cached decoding, beside the bytes of weights that a token reads."""
    for dtype in bench.dtypes:
        for B in (1, 64) if bench.machine.device == "cuda" else (1,):
            shape = {"dtype": dtype, "batch_size": B, "block_size": max(DECODED, bench.config["block_size"])}
            dense = bench.case(bench.dense(**shape)).served()
            case = bench.case(bench.arm("g1_no_utilrank", **shape)).served()
            with case.machine.autocast():
                case.model.calibrate(case.context)
            slow, fast = in_turn([partial(dense.decode, "full"), partial(case.decode, "threshold")], bench)
            routes = case.decode("threshold")
            all_bytes, read = bytes_read(dense.model, [[]]), bytes_read(case.model, routes)
            full = np.mean([route.mask.float().mean().item() for token in routes for route in token])
            tokens = DECODED * B
            yield Row(f"KV-cached decode, routed vs dense, {dtype}, B={B}", slow / fast, all_bytes / read,
                      aim_for("decode", bench.config, 0.90),
                      f"{tokens / slow:,.1f} and {tokens / fast:,.1f} tokens/s; {full:.2f} of them full; "
                      f"dense reads {all_bytes * DECODED / slow / 1e9:.1f} GB/s")


def bytes_read(model, routes):
    """The bytes of weights that one step of decoding reads, a mean over steps. routes: the Routes of each
    step, an empty list where all is dense. A path is read where a token of the batch takes it."""
    total = sum(size(block) for block in model.h) + size(model.ln_f) + size(model.wte)
    spared = 0
    for route in sum(routes, []):
        block = model.h[route.layer]
        if not route.mask.any():
            spared += size(block.mlp)
        if route.mask.all() and not block.estimator.mixes:
            spared += size(block.cheap)
    return total - spared / len(routes)


def size(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


def memory_rows(bench):
    """The peak of building a model and two steps, less what the process held before."""
    for dtype in bench.dtypes:
        dense = peak_memory(bench.dense(dtype=dtype), bench)
        for arm in MEMORY_ARMS:
            peak = peak_memory(bench.arm(arm, dtype=dtype), bench)
            yield Row(f"peak memory, step of {arm} vs dense step, {dtype}", peak / dense, None,
                      Aim(0.5, at_most=True), f"{peak / 2**20:,.0f} and {dense / 2**20:,.0f} MiB")


def peak_memory(config, bench):
    """Bytes: on a GPU what PyTorch allocates, on a CPU resident memory, in a process of its own."""
    if bench.machine.device != "cuda":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(resident_peak, (config, bench.vocab_size))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    two_steps(config, bench.vocab_size)
    return torch.cuda.max_memory_allocated() - before


def two_steps(config, vocab_size):
    case = Case(config, vocab_size)
    one_step(case)
    one_step(case)


def resident_peak(config, vocab_size):
    for path in config["plugin"]:
        load_plugin(path)
    torch.ones(8, 8) @ torch.ones(8, 8)  # loads the library of matrix products
    before = high_water()
    two_steps(config, vocab_size)
    return max(1, high_water() - before)


def high_water():
    """The most bytes that this process has had in memory. On Linux getrusage counts the parent's too."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def nanogpt_rows(bench):
    """Beside a nanoGPT of the same shape: the dense step, and the routed forward in the last dtype."""
    if not bench.options["baseline"]:
        return
    for dtype in bench.dtypes:
        dense = bench.case(bench.dense(dtype=dtype))
        nanogpt_step = partial(step_of_nanogpt, *nanogpt(dense, bench.options["baseline"]), dense)
        slow, fast = in_turn([nanogpt_step, partial(one_step, dense)], bench)
        yield Row(f"dense step vs nanoGPT's, {dtype}", slow / fast, None,
                  Aim(1.0 if dtype == "float32" else 1.5), f"{slow:.3g} and {fast:.3g} s")
    plain = bench.case(bench.dense(dtype="float32"))
    case = bench.case(bench.arm("g1_no_utilrank", dtype=dtype)).served()
    model, _ = nanogpt(plain, bench.options["baseline"])
    nanogpt_forward = torch.no_grad()(partial(loss_of_nanogpt, model, plain))
    slow, fast = in_turn([nanogpt_forward, partial(case.infer, "topk")], bench)
    peaks = [peak_flops(c.machine.dtype, bench) for c in (plain, case)]
    limit = peaks[1] / peaks[0] / bench.ledger(case.config)["inference_ratio"]
    yield Row(f"forward and loss, gathered {dtype} vs nanoGPT float32", slow / fast, limit, Aim(4.0),
              f"{slow:.3g} and {fast:.3g} s; a matrix product: {peaks[0] / 1e12:.2f} and "
              f"{peaks[1] / 1e12:.2f} TFLOP/s")


def nanogpt(case, folder):
    """A nanoGPT of the case's shape and its AdamW; compiled if the case is."""
    c, device = case.model.config, case.machine.device
    path = os.path.join(folder, "model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            spec.loader.exec_module(module)
            shape = module.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer,
                                     n_head=c.n_head, n_embd=c.n_embd, dropout=0.0, bias=True)
            model = module.GPT(shape).to(device)
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
    except Exception as error:  # whatever that file holds
        raise ConfigError(f"--baseline: {path} is no nanoGPT ({type(error).__name__}: {error}); name the "
                          "folder of a nanoGPT checkout") from None
    return torch.compile(model) if case.config["compile"] else model, optimizer


def loss_of_nanogpt(model, case):
    return model(case.batch.tokens.contiguous(), case.batch.targets.contiguous())[1]


def step_of_nanogpt(model, optimizer, case):
    optimizer.zero_grad(set_to_none=True)
    with case.machine.autocast():
        loss = loss_of_nanogpt(model, case)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def tokenizing_rows(bench):
    """The whole of prepare.py, from files to bins, beside tiktoken alone on the same text in memory."""
    try:
        enc = tokenizer("gpt2")
    except ConfigError as error:
        print(f"the tokenizing row is left out: {error}", file=sys.stderr)
        return
    threads = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        source = bench.options["text"] or write_documents(os.path.join(folder, "text.jsonl"))
        documents, names = [text for _, text in local_documents(local_files(source))], itertools.count()

        def from_files():
            with contextlib.redirect_stdout(io.StringIO()):
                prepare(source, f"run{next(names)}", root=folder)
        in_memory = partial(enc.encode_ordinary_batch, documents, num_threads=threads)
        raw, whole = in_turn([in_memory, from_files], bench)
    yield Row("tokenizing, prepare.py vs tiktoken alone", raw / whole, None, Aim(0.9),
              f"{sum(map(len, documents)) / whole / 1e6:.1f} MB/s, {threads} threads")


def write_documents(path):
    """Documents as long as a web page's, none twice -> path."""
    texts = list(stdlib_documents())
    with open(path, "w", encoding="utf-8") as f:
        for copy in range(8):
            for i in range(0, len(texts), 16):
                f.write(json.dumps({"text": f"{copy} " + "\n".join(texts[i:i + 16])}) + "\n")
    return path


ROWS = {"forward": forward_rows, "training": training_rows, "labels": label_rows,
        "distillation": distillation_rows, "decode": decode_rows, "memory": memory_rows,
        "nanogpt": nanogpt_rows, "tokenizing": tokenizing_rows}
TABLES = ("ledger", "profile")


# -----------------------------------------------------------------------------
# the ledger, and a profile

def all_arms():
    """Every recipe of config/, then every line of config/arms.ini."""
    recipes = []
    for path in sorted(glob.glob(os.path.join(HERE, "config", "*.py"))):
        if any(key == "recipe" for _, key, _ in parse_file(path)):
            recipes.append(os.path.splitext(os.path.basename(path))[0])
    return [*recipes, *read_arms()]


def show_ledger(bench):
    """Print the FLOPs of every arm, in training and inference -> {arm: dict}."""
    print(f"\nFLOPs per token at T = {bench.config['block_size']}. Forward proxy: what training executes "
          "forward / a full-only forward. Step: a training step / a dense one. Inference: / a dense forward. "
          "Items: forward + backward, MFLOP a token.\n\n| arm | forward proxy | step | inference | items |\n"
          "|---|---|---|---|---|")
    kept = ("forward_proxy", "train_ratio", "inference_ratio", "forward", "backward", "inference_flops")
    tables = {}
    for arm in all_arms():
        costs = bench.ledger(bench.arm(arm))
        tables[arm] = {key: costs[key] for key in kept}
        items = ", ".join(f"{name} {f / 1e6:.3g} + {b / 1e6:.3g}" for name, (f, b) in costs["train"].items())
        ratios = " | ".join(f"{costs[key]:.3f}" for key in kept[:3])
        print(f"| {arm} | {ratios} | {items} |")
    return tables


def show_profile(bench):
    """Print where the time of an arm's training step goes -> {dtype: facts}."""
    return {dtype: profile_step(bench, dtype) for dtype in bench.dtypes}


def profile_step(bench, dtype):
    arm, steps, on_gpu = bench.options["arm"], bench.options["repeat"], bench.machine.device == "cuda"
    step = partial(one_step, bench.case(bench.arm(arm, dtype=dtype)))
    [plain] = in_turn([step], bench)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        wall = sum(clock(step, bench.machine.device) for _ in range(steps)) / steps
    milliseconds, calls = {}, {}
    is_counted = is_kernel if on_gpu else is_operator
    for event in profiler.key_averages():
        if is_counted(event):
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            milliseconds[event.key], calls[event.key] = own / steps / 1e3, event.count / steps
    inside = sum(milliseconds.values())
    print(f"\nA step of {arm}, {dtype}: {plain * 1e3:.1f} ms, and {wall * 1e3:.1f} ms under the profiler, "
          f"{inside:.1f} ms of it in operators and {1 - inside / wall / 1e3:.0%} outside (Python, autograd, "
          "launching).\n\n| operator | ms a step | share | calls a step |\n|---|---|---|---|")
    largest = sorted(milliseconds, key=milliseconds.get, reverse=True)[:12]
    for name in largest:
        share = milliseconds[name] / wall / 1e3
        print(f"| {name[:60]} | {milliseconds[name]:.2f} | {share:.1%} | {calls[name]:.0f} |")
    return {"step_ms": plain * 1e3, "profiled_ms": wall * 1e3, "operators_ms": inside,
            "largest": {name: milliseconds[name] for name in largest}}


def is_kernel(event):
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation


def is_operator(event):
    """aten::mm is one; a node of autograd or a step of an optimizer also holds Python's time."""
    return "::" in event.key and not event.key.startswith("autograd::")


# -----------------------------------------------------------------------------

def read_words(words):
    """The words of the command line -> (config of the scale, options, names of rows). Raises ConfigError."""
    own = [w for w in words if w.startswith("--") and w[2:].partition("=")[0] in OPTIONS]
    options = configure(OPTIONS, own)
    config, defaults = configure_run([w for w in words if w not in own])
    names = options["rows"].split(",") if options["rows"] else [*ROWS, "ledger"]
    for name in names:
        if name not in (*ROWS, *TABLES):
            raise ConfigError(f"--rows names {name!r}; known: {', '.join((*ROWS, *TABLES))}")
    if config["recipe"] != defaults["recipe"] or config["mode"] == "full":
        raise ConfigError("the rows of the benchmark name their arms: give a scale, and leave the recipe out "
                          "(--rows=profile takes --arm=NAME)")
    if options["repeat"] < 1:
        raise ConfigError(f"--repeat={options['repeat']} measures nothing; give 1 or more")
    if options["arm"] not in all_arms():
        raise ConfigError(f"--arm={options['arm']!r} is unknown; {did_you_mean(options['arm'], all_arms())}")
    if options["baseline"] and not os.path.exists(os.path.join(options["baseline"], "model.py")):
        raise ConfigError(f"--baseline={options['baseline']!r} has no model.py; name the folder of a nanoGPT "
                          "checkout")
    return config, options, names


def print_machine(bench):
    """Where this is measured, and a warning where it means little."""
    config = bench.config
    print(f"{bench.place}; {config['scale']}: {config['n_layer']} layers, width {config['n_embd']}, T = "
          f"{config['block_size']}, B = {config['batch_size']}, budget {config['budget']}, medians of "
          f"{bench.options['repeat']}" + ", compiled" * config["compile"])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"warning: the machine is not idle (load average {load:.2f}): a ratio that is measured now "
              "means little")
    return load


def main():
    config, options, names = read_words(sys.argv[1:])
    bench = Bench(config, options)
    load = print_machine(bench)
    timed = [name for name in names if name in ROWS]
    if timed:
        print("\n| what | figure | limit | figure / limit | aim | |\n|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in timed:
        for row in ROWS[name](bench):
            rows.append(row.facts())
            print(table_line(rows[-1]), flush=True)
    tables = show_ledger(bench) if "ledger" in names else {}
    profiles = show_profile(bench) if "profile" in names else {}
    print(json.dumps({"machine": bench.place, "load": load, "scale": config["scale"],
                      "rows": rows, "ledger": tables, "profile": profiles}))


if __name__ == "__main__":
    exit_on_error(main)
