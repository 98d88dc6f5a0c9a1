"""Text from a run, and which of its tokens went full, under causal threshold routing.

    python sample.py out/tiny/g3_full_aux/seed0 --prompt="The iterator"
    python sample.py out/tiny/g3_full_aux/seed0 --prompt="Any text to look at" --max_new_tokens=0 --view=routing.html

--view=FILE.html writes a page with every token's decision at every controlled layer; FILE.png the same as a picture.
"""
import html
import os
import sys

import torch

from configurator import ConfigError, configure, exit_on_error
from prepare import piece, tokenizer
from runs import load_run, paint, write_whole
from train import calibrate, eval_batches

DEFAULTS = dict(
    prompt="The ", max_new_tokens=300,
    temperature=0.8, top_k=50,  # temperature 0 takes the likeliest token
    mode="threshold",  # threshold, or full or cheap for comparison; topk sees the future and cannot generate
    budget=-1.0,  # calibrate another budget than the run's; -1 keeps it
    seed=0, view="", overwrite=False, device="auto",
)

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body{{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;background:#fff;color:#222}}
.t{{display:inline-flex;flex-direction:column;align-items:stretch;min-width:.62em;margin:0 0 .6em;vertical-align:top}}
.t b{{font:14px ui-monospace,monospace;white-space:pre;text-align:center;border-radius:2px}}
.t i{{height:5px;margin:1px .5px 0;background:#e4e7ec}} .t i.f{{background:#c2410c}} .p b{{text-decoration:underline}}
table{{border-collapse:collapse;margin:1em 0}} td{{padding:.1em .8em .1em 0}}</style>
<h1>{title}</h1><p>Each column is a token, each cell below it a controlled layer, the first on top:
<span style="color:#c2410c">&#9632;</span> went through the full FFN, <span style="color:#a8b0bd">&#9632;</span> through the
cheap one. The letter's background deepens with the number of full layers. The prompt is underlined. Hover for the layers.</p>
<table>{layers}</table><div>{tokens}</div>"""


def page(title, pieces, masks, controlled, prompt_length):
    """A self-contained page, tokens x layers. masks: per token the list of bools, one a controlled layer."""
    rows = []
    for l, column in zip(controlled, zip(*masks)):
        rows.append(f"<tr><td>layer {l}<td>{sum(column) / len(column):.0%} of these tokens full")
    cells = []
    for i, (text, mask) in enumerate(zip(pieces, masks)):
        share = sum(mask) / max(1, len(mask))
        shown = html.escape(text).replace("\n", "&#9166;").replace("\t", "&#8677;")
        full = ", ".join(str(l) for l, m in zip(controlled, mask) if m) or "none"
        bars = "".join('<i class="f"></i>' if m else "<i></i>" for m in mask)
        cells.append(f'<span class="t{" p" if i < prompt_length else ""}" title="{html.escape(repr(text), quote=True)}: full at {full}">'
                     f'<b style="background:rgba(234,88,12,{share * 0.75:.2f})">{shown}</b>{bars}</span>' + ("<br>" if "\n" in text else ""))
    return PAGE.format(title=html.escape(title), layers="".join(rows), tokens="".join(cells))


def picture(title, pieces, masks, controlled):
    """The same as a matplotlib figure: lines of at most 64 tokens, the characters above their columns."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    width = 64
    lines = [range(i, min(i + width, len(pieces))) for i in range(0, len(pieces), width)]
    figure, axes = plt.subplots(len(lines), 1, figsize=(13, 0.5 + 1.15 * len(lines)), squeeze=False, layout="constrained")
    for axis, line in zip(axes[:, 0], lines):
        grid = [[masks[i][l] if i in line else 0 for i in range(line.start, line.start + width)] for l in range(len(controlled))]
        axis.imshow(grid, aspect="auto", cmap="Oranges", vmin=0, vmax=1.25, interpolation="nearest")
        axis.set_xticks(range(len(line)), [pieces[i].replace("\n", "\u23ce").replace("$", r"\$") for i in line], family="monospace", fontsize=9)
        axis.xaxis.tick_top()
        axis.set_yticks(range(len(controlled)), [f"layer {l}" for l in controlled], fontsize=7)
        axis.tick_params(length=0)
        axis.set_xticks([i - 0.5 for i in range(1, width)], minor=True)
        axis.grid(which="minor", axis="x", color="white", linewidth=0.8)
    figure.suptitle(title, fontsize=11)
    return figure


def encode_prompt(text, enc, block_size):
    """text -> a list of token ids, or a ConfigError."""
    try:
        text.encode()  # tiktoken would replace what is no Unicode, silently
        ids = enc.encode(text, disallowed_special=())
    except UnicodeEncodeError:
        raise ConfigError(f"--prompt={text!r} has characters that are no Unicode text; the tokenizer {enc.name} lacks them") from None
    if not ids:
        raise ConfigError("--prompt='' is empty; give at least one character to go on from")
    if len(ids) > block_size:
        raise ConfigError(f"--prompt is {len(ids)} tokens long, longer than the context of {block_size}; shorten it")
    return ids


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        raise ConfigError("name the folder of a run first: python sample.py out/tiny/g3_full_aux/seed0 --prompt=...")
    folder, options = sys.argv[1], configure(DEFAULTS, sys.argv[2:])
    view = options["view"]
    if options["mode"] not in ("threshold", "full", "cheap"):
        raise ConfigError(f"--mode={options['mode']!r} cannot generate; use threshold, full or cheap (topk sees the future)")
    if options["max_new_tokens"] < 0 or options["temperature"] < 0 or options["top_k"] < 1:
        raise ConfigError("--max_new_tokens and --temperature take 0 or more, --top_k takes 1 or more")
    if options["budget"] != -1 and not 0 <= options["budget"] <= 1:
        raise ConfigError(f"--budget={options['budget']} is outside [0, 1]")
    if view and not view.endswith((".html", ".png")):
        raise ConfigError(f"--view={view!r} must end in .html or .png")
    if view and os.path.exists(view) and not options["overwrite"]:
        raise ConfigError(f"{view} exists already; name another file or add --overwrite")
    model, config, data, meta, machine = load_run(folder, {"device": options["device"]})
    mode = options["mode"] if config["mode"] == "topk" else {"dense": "full"}.get(config["mode"], config["mode"])
    if options["budget"] >= 0 and config["mode"] != "topk":
        raise ConfigError(f"--budget={options['budget']}: {folder} has no gates; leave --budget out")
    enc = tokenizer(meta["tokenizer"])
    ids = encode_prompt(options["prompt"], enc, config["block_size"])
    if options["budget"] >= 0:
        calibrate(model, eval_batches(data, config, final=True)["calibrate"], machine, options["budget"])
    controlled = model.config.controlled if mode == "threshold" else ()
    if view and not controlled:
        raise ConfigError(f"--view shows routing, and under {mode} nothing routes; leave --view out, or name a run with gates")
    color = sys.stdout.isatty()
    pieces, masks = [], []
    generator = torch.Generator(machine.device).manual_seed(options["seed"])
    with machine.autocast():
        for token, mask in model.generate(torch.tensor([ids], device=machine.device), options["max_new_tokens"], mode,
                                          options["temperature"], options["top_k"], generator):
            pieces.append(piece(token, enc))
            masks.append(mask)
            if color:
                print(paint(pieces[-1:], [sum(mask)], len(controlled), True), end="", flush=True)
    depths = [sum(m) for m in masks]
    print() if color else print(paint(pieces, depths, len(controlled), False))
    if controlled:
        print(f"\nfull at {sum(depths) / len(depths):.2f} of {len(controlled)} controlled layers a token, on average")
    if view:
        title = f"{config['recipe']}, seed {config['seed']}: which tokens go full"
        if view.endswith(".html"):
            write_whole(view, lambda part: open(part, "w", encoding="utf-8").write(page(title, pieces, masks, controlled, len(ids))))
        else:
            write_whole(view, lambda part: picture(title, pieces, masks, controlled).savefig(part, dpi=110, format="png"))
        print(f"wrote {view}")


if __name__ == "__main__":
    exit_on_error(main)
