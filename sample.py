"""Text from a run, and which of its tokens went full, under causal threshold routing.

    python sample.py out/tiny/g3_full_aux/seed0 --prompt="The iterator"
    python sample.py out/tiny/g3_full_aux/seed0 --prompt="Any text" --max_new_tokens=0 --view=routing.html

--view=FILE.html writes a page with every token's decision at every controlled layer; --view=FILE.png the same
as a picture, for which it needs matplotlib.
"""
import math
import os
import sys

from configurator import ConfigError, configure, exit_on_error

import torch

import metrics
from gates import Context
from prepare import piece, tokenizer
from runs.paint import paint
from runs.run import calibration_rows, load_run
from runs.view import require_matplotlib, write_view

DEFAULTS = dict(
    prompt="The ", max_new_tokens=300,
    temperature=0.8, top_k=50,  # temperature 0 takes the likeliest token
    mode="",  # threshold, or full or cheap for comparison; by default threshold, or a run's only way
    budget=-1.0,  # calibrate another budget than the run's; -1 keeps it
    seed=0, view="", overwrite=False, device="auto",
)


# -----------------------------------------------------------------------------
# generation

class LayerCache:
    """The keys and values of one layer of the text so far, at most block_size positions."""

    def __init__(self, config, batch, device, dtype):
        shape = (2, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv, self.length = torch.zeros(shape, device=device, dtype=dtype), 0

    def extend(self, k, v):
        """Add k and v (B, H, T, D/H) -> all keys and all values, (B, H, length, D/H) each."""
        start, self.length = self.length, self.length + k.size(2)
        self.kv[0, :, :, start:self.length] = k
        self.kv[1, :, :, start:self.length] = v
        keys, values = self.kv[:, :, :, :self.length].to(k.dtype)
        return keys, values


def new_cache(model, batch=1):
    """An empty KV cache: one LayerCache for each layer."""
    weight = model.wte.weight
    return [LayerCache(model.config, batch, weight.device, weight.dtype) for _ in model.h]


@torch.no_grad()
def generate(model, idx, max_new_tokens, mode="threshold", temperature=0.8, top_k=200, generator=None):
    """idx (1, T) -> yields (token id, [did each controlled layer run full]) for every token that was read,
    the prompt's first. Past block_size it goes on from the last half of the context."""
    cache, text, unread = new_cache(model), idx, idx
    window = max(1, model.config.block_size // 2)
    for n in range(max_new_tokens + 1):
        fresh = unread.size(1)
        if cache[0].length + fresh > model.config.block_size:
            cache, unread = new_cache(model), text[:, -window:]
            fresh = min(fresh, unread.size(1))  # a prompt longer than block_size
        logits, routes = model(unread, mode, idx.new_zeros(1), cache)
        decisions = [[]] * fresh
        if routes:
            decisions = torch.stack([r.mask[0, -fresh:] for r in routes], 1).tolist()
        yield from zip(text[0, -fresh:].tolist(), decisions)
        if n < max_new_tokens:
            unread = next_token(logits[0, -1].float(), temperature, top_k, generator)[None]  # (1, 1)
            text = torch.cat([text, unread], 1)[:, -window:]


def next_token(logits, temperature, top_k, generator):
    """logits (V,) -> a token id (1,); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax()[None]
    logits = logits / temperature
    logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# -----------------------------------------------------------------------------
# the script

def encode_prompt(text, enc, block_size):
    """text -> a list of token ids, or a ConfigError."""
    try:
        text.encode()  # tiktoken would replace what is no Unicode, silently
    except UnicodeEncodeError:
        raise ConfigError(f"--prompt={text!r} has characters that are no Unicode text; the tokenizer "
                          f"{enc.name} lacks them") from None
    ids = enc.encode(text, disallowed_special=())
    if not ids:
        raise ConfigError("--prompt='' is empty; give at least one character to go on from")
    if len(ids) > block_size:
        raise ConfigError(f"--prompt is {len(ids)} tokens long, longer than the context of {block_size}; "
                          "shorten it")
    return ids


def check_options(options):
    """Refuse what no run could do."""
    if options["mode"] not in ("", "threshold", "full", "cheap"):
        raise ConfigError(f"--mode={options['mode']!r} cannot generate; use threshold, full or cheap "
                          "(topk sees the future)")
    if options["max_new_tokens"] < 0 or options["temperature"] < 0 or options["top_k"] < 1:
        raise ConfigError("--max_new_tokens and --temperature take 0 or more, --top_k takes 1 or more")
    if 0 < options["temperature"] < 1e-3:
        raise ConfigError(f"--temperature={options['temperature']} is too small to divide by; 0 takes the "
                          "likeliest")
    if options["budget"] != -1 and not 0 <= options["budget"] <= 1:
        raise ConfigError(f"--budget={options['budget']} is outside [0, 1]")
    if options["view"]:
        check_view(options["view"], options["overwrite"])


def check_view(path, overwrite):
    """Before any text is made: can the picture be written?"""
    if not path.endswith((".html", ".png")):
        raise ConfigError(f"--view={path!r} must end in .html or .png")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ConfigError(f"--view={path!r}: the folder {folder} does not exist; make it, or name another "
                          "file")
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(f"{path} exists already; name another file or add --overwrite")
    if path.endswith(".png"):
        require_matplotlib(path)


def choose_mode(asked, config, folder):
    """How the text is made. A run without gates has one way only."""
    if config["mode"] == "topk":
        return asked or "threshold"
    if asked not in ("", config["mode"]):
        raise ConfigError(f"--mode={asked!r}: {folder} has no gates and always runs {config['mode']}; leave "
                          "--mode out")
    return config["mode"]


def recalibrate(model, data, config, budget, machine):
    """Set the thresholds for another budget than the run's."""
    metrics.set_budget(model, budget)
    rows = calibration_rows(data, config, final=True).to(machine.device)
    model.calibrate(Context(rows.tokens, rows.row_seeds))


def write_text(tokens, enc, layers):
    """Print what `generate` yields, as it comes if a terminal shows colours -> pieces of text, masks."""
    color = sys.stdout.isatty()
    pieces, masks = [], []
    for token, mask in tokens:
        pieces.append(piece(token, enc))
        masks.append(mask)
        if color:
            print(paint(pieces[-1:], [sum(mask)], layers, True), end="", flush=True)
    depths = [sum(mask) for mask in masks]
    if color:
        print()
    elif layers:
        print(paint(pieces, depths, layers, False))
    else:
        print("".join(pieces))
    if layers:
        print(f"\nfull at {sum(depths) / len(depths):.2f} of {layers} controlled layers a token, on average")
    return pieces, masks


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        raise ConfigError("name the folder of a run first: python sample.py out/tiny/g3_full_aux/seed0 "
                          "--prompt=...")
    folder, options = sys.argv[1], configure(DEFAULTS, sys.argv[2:])
    check_options(options)
    model, config, data, meta, machine = load_run(folder, {"device": options["device"]})
    mode = choose_mode(options["mode"], config, folder)
    budget, view = options["budget"], options["view"]
    if budget >= 0 and mode != "threshold":
        raise ConfigError(f"--budget={budget}: under {mode} nothing routes; leave --budget out")
    if view and mode != "threshold":
        raise ConfigError(f"--view shows routing, and under {mode} nothing routes; leave --view out, or "
                          "name a run with gates")
    controlled = model.config.controlled if mode == "threshold" else ()
    enc = tokenizer(meta["tokenizer"])
    ids = encode_prompt(options["prompt"], enc, config["block_size"])
    generator = torch.Generator(machine.device).manual_seed(options["seed"])
    with machine.autocast():
        if budget >= 0:
            recalibrate(model, data, config, budget, machine)
        prompt = torch.tensor([ids], device=machine.device)
        tokens = generate(model, prompt, options["max_new_tokens"], mode, options["temperature"],
                          options["top_k"], generator)
        pieces, masks = write_text(tokens, enc, len(controlled))
    if view:
        budget = config["budget"] if budget < 0 else budget
        title = (f"Which tokens go through the full FFN: {config['recipe']}, seed {config['seed']}, "
                 f"budget {budget:.0%}")
        write_view(view, title, pieces, masks, controlled, len(ids))


if __name__ == "__main__":
    exit_on_error(main)
