"""The routing of a text, in a terminal."""
import sys

import numpy as np
import torch

from configurator import ConfigError
from gates import Context
from prepare import piece, tokenizer


def paint(pieces, depths, most, color):
    """Text in which each token shows its depth, how many of the `most` controlled layers ran full: as a
    background from black (none) to red (all) in colour, or else as a digit under each character."""
    if color:
        ramp = [16, 52, 88, 124, 160, 196]
        shades = [ramp[round(depth * 5 / max(1, most))] for depth in depths]
        return "".join(f"\x1b[48;5;{shade};38;5;231m{p}" for p, shade in zip(pieces, shades)) + "\x1b[0m"
    text = "".join(p.replace("\n", " ") for p in pieces)
    names = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    digits = "".join(names[min(depth, 35)] * len(p) for p, depth in zip(pieces, depths))
    lines = [f"{text[i:i + 100]}\n{digits[i:i + 100]}" for i in range(0, len(text), 100)]
    return "\n".join(lines)


@torch.no_grad()
def show_depth(model, tokens, meta, machine):
    """Print the first block of `tokens` (uint16), each token with the number of controlled layers that it
    took full."""
    length = min(128, model.config.block_size)
    row = torch.from_numpy(tokens[:length].astype(np.int64))[None].to(machine.device)
    context = Context(row, row.new_zeros(1))
    with machine.autocast():
        _, routes = model.run(model.embed(context), "threshold", context)
    depth = sum(r.mask[0].int() for r in routes).tolist()
    try:
        enc = tokenizer(meta["tokenizer"])
    except ConfigError as error:
        print(f"the routing of the validation text is not shown: {error}", flush=True)
        return
    pieces = [piece(token, enc) for token in row[0].tolist()]
    print(f"which tokens went full, of {len(routes)} layers (the first validation text, under threshold):")
    print(paint(pieces, depth, len(routes), sys.stdout.isatty()), flush=True)
