"""Text from a run, and which of its tokens went full.

    python sample.py out/tiny/g3_full_aux/seed0 --prompt="The iterator"
    python sample.py out/tiny/g3_full_aux/seed0 --prompt="The iterator" --view=routing.html
    python sample.py out/tiny/g3_full_aux/seed0 --prompt_file=story.txt --max_new_tokens=0

The depth of a token is the number of controlled layers that ran full for it. A terminal shows it as the
background, from black (none) to red (all). A file or a pipe gets the text alone; where nothing is generated, the
text with the depth of each character below it. --view writes a page with every decision of every layer.

The run and its backbone are needed. Their training text is needed for --budget only.
"""
import html
import os
import sys
import time

from configurator import ConfigError, configure, exit_on_error, load_plugin, show_help_if_asked

import torch

from encoding import load_tokenizer
from run import CHOICES, load_run, recalibrate, write_text

DEFAULTS = dict(
    prompt="The ", prompt_file="",  # the text to go on from, or a file that holds it
    max_new_tokens=300,  # fewer where the model ends the text; 0 only reads the prompt
    temperature=0.8,  # 0 takes the likeliest token
    top_k=50,  # draw among the k likeliest tokens; 0: no limit
    top_p=1.0,  # draw among the likeliest tokens that together have this probability; 1: no limit
    seed=0,
    mode="",  # threshold, or full or cheap for comparison; a run without gates has one way only
    budget=-1.0,  # calibrate another budget than the run's, on its training text; -1 keeps it
    view="", overwrite=False,  # write the routing as a page, FILE.html
    device="auto", dtype="auto", threads=0,  # as in train.py
    plugin=[],  # --plugin=FILE, several times if need be: in place of the run's own
)


# -----------------------------------------------------------------------------
# the KV cache

class LayerCache:
    """The keys and values of one layer for the text so far: room for `shape` (B, Hkv, block_size, d) each."""

    def __init__(self, shape):
        self.shape, self.length, self.k, self.v = shape, 0, None, None

    def extend(self, k, v):
        """Append k and v (B, Hkv, T, d) -> all keys and all values, views (B, Hkv, length, d)."""
        if self.k is None:  # in the dtype of the attention, so that nothing is cast later
            self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


def new_cache(model, batch=1):
    """An empty cache: a LayerCache for each layer."""
    c = model.config
    return [LayerCache((batch, c.n_kv_head, c.block_size, c.n_embd // c.n_head)) for _ in model.h]


# -----------------------------------------------------------------------------
# generation

@torch.inference_mode()
def generate(model, idx, max_new_tokens, mode="threshold", temperature=0.8, top_k=50, top_p=1.0, generator=None,
             vocab_size=None, eot_token=None):
    """idx (1, T) -> yields (token id, [did each controlled layer run full]) for every token that was read, the
    prompt's first. It ends before an eot_token. Ids from vocab_size on only pad the head and are not drawn.

    When the cache is full, the model goes on from the last half of the context, read afresh."""
    text, done = idx[0].tolist(), 0  # all tokens so far, and how many of them were read
    cache, block_size = new_cache(model), model.config.block_size
    for n in range(max_new_tokens + 1):
        while done < len(text):
            begin = done
            if cache[0].length == block_size:
                cache, begin = new_cache(model), done + 1 - max(1, block_size // 2)
            chunk = idx.new_tensor([text[begin:begin + block_size - cache[0].length]])  # (1, T)
            logits, routes = model(chunk, mode, cache=cache, last_only=True)  # (1, 1, V)
            new = begin + chunk.size(1) - done  # the others were read before
            decisions = [[]] * new
            if routes:
                decisions = torch.stack([route.mask[0, -new:] for route in routes], 1).tolist()
            yield from zip(text[done:done + new], decisions)
            done += new
        if n < max_new_tokens:
            token = next_token(logits[0, -1, :vocab_size], temperature, top_k, top_p, generator)
            if token == eot_token:
                return
            text.append(token)


def next_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (V,) -> a token id. top_k: draw among the k likeliest. top_p: draw among the likeliest that
    together have at least this probability (Holtzman et al., arXiv:1904.09751)."""
    if temperature == 0:
        return logits.argmax().item()
    values, ids = logits.topk(min(top_k or len(logits), len(logits)))  # the likeliest first
    p = ((values - values[0]).double() / temperature).softmax(0)
    if top_p < 1:
        p[p.cumsum(0) - p >= top_p] = 0  # the tokens before it have enough
    return ids[torch.multinomial(p, 1, generator=generator)].item()


# -----------------------------------------------------------------------------
# in a terminal, and as plain text

def colored(piece, mask):
    """A token for a terminal of 256 colours, on the colour of its depth."""
    shade = (16, 52, 88, 124, 160, 196)[round(5 * sum(mask) / len(mask))]
    return f"\x1b[48;5;{shade};38;5;231m{piece}\x1b[0m".replace("\n", "\x1b[0m\n")


def with_digits(pieces, masks, width=100):
    """Lines of text, and below each character the depth of its token: 0 to 9, then A to Z."""
    text, names = "".join(pieces).replace("\n", " "), "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    depths = "".join(names[min(sum(mask), 35)] * len(piece) for piece, mask in zip(pieces, masks))
    return "\n".join(f"{text[i:i + width]}\n{depths[i:i + width]}" for i in range(0, len(text), width))


# -----------------------------------------------------------------------------
# as a page

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 880px; margin: 2em auto }
h1 { font-size: 1.35em }
.text { font: 19px/1.75 Georgia, "DejaVu Serif", serif; white-space: pre-wrap; overflow-wrap: anywhere }
.text span { padding: .12em 0 }
.prompt { text-decoration: underline; text-underline-offset: 5px }
.newline::before { content: "\\21b5"; color: #0006; font-size: .8em }
.key { padding: .15em .7em }
svg { display: block; width: 100%; margin: 1em 0; font: 8.5px system-ui, sans-serif; text-anchor: end }
rect { fill: #e9ebef } path { fill: #b8410c } line { stroke: #fff }
"""
COLOR = "background: rgb(232 96 32 / {:.0%})"  # behind a token, by its share of full layers
COLUMNS, WIDTH = 160, 800  # of a strip: tokens side by side, and their width
LABEL, ROW = 80, 10  # the width of a layer's label, the height of its row


def page(title, pieces, masks, controlled, n_prompt):
    """A page of HTML: the text on the colours of its depths, then every decision. masks: of each token [did each
    controlled layer run full]. A character of several tokens stands with the last of them."""
    depth, layers, spans, hints = sum(map(sum, masks)) / len(masks), len(controlled), [], []
    for i, (piece, mask) in enumerate(zip(pieces, masks)):
        full = ", ".join(str(layer) for layer, went_full in zip(controlled, mask) if went_full) or "none"
        hints.append(html.escape(f"{piece!r} full at: {full}"))
        kind = "prompt" * (i < n_prompt) + " newline" * ("\n" in piece)
        spans.append(f'<span class="{kind}" style="{COLOR.format(sum(mask) / layers)}" title="{hints[i]}">'
                     f"{html.escape(piece)}</span>")
    key = [f'<span class="key" style="{COLOR.format(n / layers)}">{n}</span>'
           for n in sorted({round(layers * i / 5) for i in range(6)})]
    return "\n".join([
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
        f"<p>On average a token went full at {depth:.2f} of {layers} controlled layers ({depth / layers:.0%}). The "
        "colour behind a token says at how many; point at it to see at which. The prompt is underlined.</p>",
        f'<p>full at {"".join(key)} layers</p><div class="text">{"".join(spans)}</div>',
        "<h3>Layer by layer</h3><p>A column is a token, in reading order. Dark: it went through the full FFN of "
        "that layer. Pale: through the cheap one. The share beside a layer is that of the dark cells.</p>",
        *(strip(range(i, min(i + COLUMNS, len(masks))), masks, hints, controlled)
          for i in range(0, len(masks), COLUMNS))])


def strip(tokens, masks, hints, controlled):
    """The decisions about a range of tokens: a column for each, a row for each layer."""
    size, parts = min(16, WIDTH // min(COLUMNS, len(masks))), []
    for left, i in zip(range(LABEL, LABEL + WIDTH, size), tokens):
        cells = [f"M{left} {n * ROW}h{size - 1}v{ROW}h{1 - size}z" for n, full in enumerate(masks[i]) if full]
        parts.append(f'<g><title>{hints[i]}</title><rect x="{left}" width="{size}" height="100%"/>'
                     f'<path d="{"".join(cells)}"/></g>')
    for n, layer in enumerate(controlled):
        share = sum(masks[i][n] for i in tokens) / len(tokens)
        parts.append(f'<text x="{LABEL - 8}" y="{n * ROW + 7.5}">layer {layer}, {share:.0%}</text>'
                     f'<line x1="{LABEL}" x2="100%" y1="{n * ROW}" y2="{n * ROW}"/>')
    return f'<svg viewBox="0 0 {LABEL + WIDTH} {len(controlled) * ROW}">{"".join(parts)}</svg>'


# -----------------------------------------------------------------------------
# the script

def check_options(options, given):
    """Refuse what no run could do, before one is read."""
    view, budget = options["view"], options["budget"]
    for key, fits, remedy in (
            *((key, options[key] >= 0, "0 or more") for key in ("max_new_tokens", "temperature", "top_k", "threads")),
            *((key, options[key] in CHOICES[key], " or ".join(CHOICES[key])) for key in ("device", "dtype")),
            ("top_p", 0 < options["top_p"] <= 1, "a share above 0, at most 1"),
            ("budget", budget == -1 or 0 <= budget <= 1, "a share in [0, 1]"),
            ("prompt_file", not {"prompt", "prompt_file"} <= given, "either this or --prompt"),
            ("view", not view or view.endswith(".html") and os.path.isdir(os.path.dirname(view) or "."),
             "the name of an .html file, in a folder that exists"),
            ("view", options["overwrite"] or not os.path.lexists(view), "another name or --overwrite; it exists")):
        if not fits:
            raise ConfigError(f"--{key}={options[key]}: give {remedy}")


def choose_mode(options, config, folder):
    """How the text is made. topk is no way: it ranks a token among those to come."""
    modes = ("threshold", "full", "cheap") if config["mode"] == "topk" else (config["mode"],)
    mode = options["mode"] or modes[0]
    if mode not in modes:
        raise ConfigError(f"--mode={mode!r}: {folder} generates under {' or '.join(modes)} only")
    if mode != "threshold" and (options["budget"] >= 0 or options["view"]):
        raise ConfigError(f"under {mode} nothing routes; leave --budget and --view out")
    return mode


def read_prompt(options, tokenizer):
    """The prompt -> its token ids, a list. An empty one begins a text."""
    text, path = options["prompt"], options["prompt_file"]
    try:
        if path:
            with open(path, encoding="utf-8") as f:
                text = f.read()
        text.encode()
    except (OSError, UnicodeError) as error:
        where = f"--prompt_file={path}" if path else "--prompt"
        raise ConfigError(f"{where} cannot be read ({error}); give text in UTF-8") from None
    return tokenizer.encode_prompt(text) or [tokenizer.eot_token]


def main():
    show_help_if_asked(sys.argv[1:], __file__)
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ConfigError("name the folder of a run first: python sample.py out/tiny/best/seed0 --prompt=...")
    folder, words = sys.argv[1], sys.argv[2:]
    plugins = [load_plugin(word.partition("=")[2]) for word in words if word.startswith("--plugin=")]
    options, given = configure(DEFAULTS, [word for word in words if not word.startswith("--plugin=")])
    check_options(options, given)
    model, checkpoint, machine = load_run(folder, {key: options[key] for key in ("device", "dtype", "threads")},
                                          plugins=plugins)
    config, meta = checkpoint["record"]["config"], checkpoint["record"]["tokenizer"]
    mode = choose_mode(options, config, folder)
    if options["budget"] >= 0:
        recalibrate(model, folder, checkpoint, machine, options["budget"])
    tokenizer = load_tokenizer(meta, folder)
    ids = read_prompt(options, tokenizer)
    controlled = model.config.controlled if mode == "threshold" else ()
    color = bool(controlled) and sys.stdout.isatty()
    digits = bool(controlled) and not color and options["max_new_tokens"] == 0

    sampling = {key: options[key] for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    generator = torch.Generator(machine.device).manual_seed(options["seed"])
    tokens = generate(model, torch.tensor([ids], device=machine.device), mode=mode, generator=generator,
                      vocab_size=tokenizer.n_vocab, eot_token=tokenizer.eot_token, **sampling)
    decode, pieces, masks = tokenizer.decoder(), [], []
    for token, mask in tokens:
        pieces.append(decode(token))
        masks.append(mask)
        if not digits:
            print(colored(pieces[-1], mask) if color else pieces[-1], end="", flush=True)
        if len(pieces) == len(ids):
            began = time.perf_counter()
    seconds, new = time.perf_counter() - began, len(pieces) - len(ids)
    print(with_digits(pieces, masks) if digits else "", end="\n\n")
    if options["max_new_tokens"]:
        ends = "; the model ended the text" if new < options["max_new_tokens"] else ""
        print(f"{new} tokens, {new / seconds:.1f} a second{ends}", file=sys.stderr)  # stdout repeats itself
    if controlled:
        depth, asked = sum(map(sum, masks)) / len(masks), sum(model.h[i].budget for i in controlled)
        print(f"full at {depth:.2f} of {len(controlled)} controlled layers a token, on average")
        if len(masks) >= 20 and abs(depth - asked) > 0.15 * len(controlled):
            print(f"the budget asks for {asked:.2f}: this text is unlike the training text that set the thresholds")
    if options["view"]:
        budget = config["budget"] if options["budget"] < 0 else options["budget"]
        title = f"Which tokens go full: {config['recipe']}, seed {config['seed']}, budget {budget:.0%}"
        write_text(options["view"], page(title, pieces, masks, controlled, len(ids)))
        print(f"wrote {options['view']}")


if __name__ == "__main__":
    exit_on_error(main)
