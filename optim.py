"""The optimizers: AdamW, and Muon for matrices."""
import math

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal: every singular value of a matrix's update becomes about 1
    (Jordan et al., kellerjordan.github.io/posts/muon, 2024). Weights decay as in AdamW, and the update is
    scaled to the size of AdamW's, 0.2 a number (Liu et al., arXiv:2502.16982).

    A group's `parts` are the heights of the matrices that a parameter holds one below the other: queries, keys
    and values are three, and each is made orthogonal alone. (The backbone at tiny, seeds 0 1 2: val loss 1.479
    1.473 1.481 apart, 1.501 1.492 1.507 together.) torch.optim.Muon multiplies in bfloat16 always, and hardware
    without it is forty times slower at that; this one multiplies in `dtype`.
    """

    def __init__(self, groups, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": None})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])  # Nesterov: one step ahead
                p.mul_(1 - group["lr"] * group["weight_decay"])
                for weight, part in zip(p.split(group["parts"] or len(p)), update.split(group["parts"] or len(p))):
                    size = 0.2 * math.sqrt(max(part.shape))
                    weight.add_(orthogonalised(part, self.dtype), alpha=-group["lr"] * size)


def orthogonalised(update, dtype):
    """A matrix with the singular vectors of `update` and singular values between about 0.7 and 1.2, by five
    Newton-Schulz steps x <- 3.4445 x - 4.7750 (x x') x + 2.0315 (x x')^2 x."""
    x = update.to(dtype)
    wide = x.size(0) <= x.size(1)
    if not wide:
        x = x.T  # the products below are then of the smaller square
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.T


def make_optimizers(model, config, dtype):
    """AdamW over exactly what requires a gradient; with muon_lr, Muon takes the matrices of attention and
    FFNs. A gate keeps AdamW and its gate_lr. dtype: in which the hardware multiplies fast."""
    groups, matrices = {}, {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if config["muon_lr"] and p.dim() == 2 and name.startswith("h.") and ".gate." not in name:
            matrices.setdefault("c_attn" in name, []).append(p)
            continue
        lr = config["gate_lr"] if ".gate." in name else config["learning_rate"]
        decay = config["weight_decay"] if p.dim() > 1 else 0.0
        groups.setdefault((lr, decay), []).append(p)
    groups = [{"params": p, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    optimizers = [torch.optim.AdamW(groups, betas=(config["beta1"], config["beta2"]), fused=True)]
    if matrices:
        groups = [{"params": params, "peak": config["muon_lr"], "parts": model.h[0].attn.sizes if qkv else None}
                  for qkv, params in matrices.items()]
        optimizers.append(Muon(groups, config["muon_lr"], config["weight_decay"], dtype))
    return optimizers
