"""The optimizers and their learning rate."""
import math

import torch


def make_optimizers(model, config):
    """AdamW over exactly what requires a gradient; with muon_lr, Muon takes the matrices of attention and
    FFNs. A gate keeps AdamW and its gate_lr."""
    groups, matrices = {}, []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if config["muon_lr"] and p.dim() == 2 and name.startswith("h.") and ".gate." not in name:
            matrices.append(p)
            continue
        lr = config["gate_lr"] if ".gate." in name else config["learning_rate"]
        decay = config["weight_decay"] if p.dim() > 1 else 0.0
        groups.setdefault((lr, decay), []).append(p)
    groups = [{"params": p, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    optimizers = [torch.optim.AdamW(groups, betas=(config["beta1"], config["beta2"]), fused=True)]
    if matrices:
        group = {"params": matrices, "peak": config["muon_lr"]}
        optimizers.append(torch.optim.Muon([group], lr=config["muon_lr"], weight_decay=config["weight_decay"],
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def set_learning_rate(optimizers, config, step):
    """Linear warmup, then a cosine to min_lr_ratio of the peak."""
    warm = min(1.0, (step + 1) / max(1, config["warmup_iters"]))
    least, cosine = config["min_lr_ratio"], 0.5 * (1 + math.cos(math.pi * step / config["max_iters"]))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warm * (least + (1 - least) * cosine)
