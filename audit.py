"""Questions to finished runs: do the labels say what a flip does, and what does one checkpoint lose at other budgets?

    python audit.py out/tiny/study/g1_full_aux/seed0                       both, of one run or of several
    python audit.py --checkpoint=ckpt-30.pt out/tiny/study/g1_full_aux/seed0     of an earlier checkpoint (train.py --keep_checkpoints)
"""
import json
import sys

import numpy as np
import torch

from configurator import ConfigError, configure, exit_on_error
from gates import ORACLES, exact_labels, oracle_labels, rank_correlation
from prepare import eval_batch
from runs import load_run
from train import calibrate, eval_batches, evaluate

OPTIONS = dict(checkpoint="ckpt.pt", rows=16, positions=24)
BUDGETS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
# What a gated execution rewards: one token flipped, the later layers re-routed, its own and all later losses.
TRUTH = "flip_routed_later"
# Pairs that differ in one thing: how the later layers execute, one token or all flipped, the later tokens' losses counted or not.
FACTORS = {"policy": ("flip_full_own", "flip_routed_own"), "single flip": ("on_policy", "flip_routed_own"),
           "later losses": ("flip_routed_own", TRUTH)}


def load_gated(folder, overrides, checkpoint):
    loaded = load_run(folder, overrides, checkpoint)
    if loaded[1]["mode"] != "topk":
        raise ConfigError(f"{folder} has no gates (its mode is {loaded[1]['mode']!r}); name a run that routes")
    return loaded


@torch.no_grad()
def label_audit(folder, checkpoint="ckpt.pt", rows=16, positions=24):
    """{layer: {what: Spearman's rho with TRUTH, over sampled positions of a row, mean of rows}}, and of the pairs in FACTORS.

    rows of validation text, and as many positions of each, the same for every layer. In float32: a flip moves little."""
    model, config, data, _, machine = load_gated(folder, {"dtype": "float32"}, checkpoint)
    x, y, keys = (t[:rows].to(machine.device) for t in eval_batch(data["val"], {**config, "batch_size": rows}, 1))
    picked = sorted(np.random.default_rng(0).permutation(x.size(1))[:positions].tolist())
    result = {}
    for layer in config["controlled"]:
        route = model.blocks(model.embed(x), "topk", keys, last=layer, keep={layer})[1][-1]
        values = {oracle: oracle_labels(model, route, y, keys, oracle)[:, picked] for oracle in ORACLES}  # (B, P)
        for name, suffix in (("routed", "topk"), ("full", "full")):
            own, later = exact_labels(model, x, y, keys, layer, picked, suffix).unbind(2)  # (B, P) twice
            values |= {f"flip_{name}_own": own, f"flip_{name}_later": later}
        values["scores"] = route.scores[:, picked]
        result[layer] = {name: rank_correlation(v, values[TRUTH]) for name, v in values.items() if name != TRUTH}
        result[layer] |= {name: rank_correlation(values[a], values[b]) for name, (a, b) in FACTORS.items()}
    return result


def budget_curve(folder, checkpoint="ckpt.pt"):
    """[(budget, validation loss under threshold, realised budget)] of one checkpoint, calibrated at each budget."""
    model, config, data, _, machine = load_gated(folder, {}, checkpoint)
    batches = eval_batches(data, config, final=True)
    blocks, curve = [model.h[i] for i in config["controlled"]], []
    shares = [b.budget for b in blocks]
    for budget in BUDGETS:
        for block, share in zip(blocks, shares):
            block.budget = share
        calibrate(model, batches["calibrate"], machine, budget)
        loss, realised = evaluate(model, batches["val"], "threshold", machine)
        curve.append((budget, loss, sum(realised) / len(realised)))
    return curve


def main():
    words = [w for w in sys.argv[1:] if w.startswith("--")]
    options = configure(OPTIONS, words)
    folders = [w for w in sys.argv[1:] if w not in words]
    if not folders:
        raise ConfigError("name the folder of a run, such as out/tiny/g1_full_aux/seed0")
    for folder in folders:
        audit = label_audit(folder, options["checkpoint"], options["rows"], options["positions"])
        print(f"{folder}, {options['checkpoint']}: Spearman's rho with {TRUTH}, by layer; then the factors apart")
        for name in next(iter(audit.values())):
            print(f"  {name:18s}" + " ".join(f"{audit[layer][name]:+.3f}" for layer in audit))
        curve = budget_curve(folder, options["checkpoint"])
        print("  budget, val loss under threshold, realised:", "; ".join(f"{b:.2f} {loss:.4f} {r:.3f}" for b, loss, r in curve))
        print(json.dumps({"run": folder, "checkpoint": options["checkpoint"], "labels": audit, "budget_curve": curve}))


if __name__ == "__main__":
    exit_on_error(main)
