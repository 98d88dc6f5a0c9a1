"""Gates: which token goes through the full FFN, and what teaches a gate to decide.

To add a gate, write one class here (or in your own file that imports this one) and register it:

    @register("norm")
    class NormGate(Gate):
        def __init__(self, config, layer):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, h, noise):
            return self.scale * h.float().std(dim=-1), None

The contract:
- `h` (B, T, D) is the layer's FFN input ln_2(x), detached: a gate never sends a gradient into the backbone.
- It returns (scores, prediction). Scores are (B, T), higher means that full is worth more; they are made
  float32. The score of a token depends on that token alone: decoding sees one token at a time.
- `noise()` gives uniform numbers (B, T) that depend only on (seed, step, layer, row, position), so that a
  random gate repeats under resume, accumulation, several processes and a KV cache.
- `prediction` is None, or the predicted outcome (B, T, 2, d) of [full, cheap]. A gate that predicts says
  `predicts = True`, has `target(full, cheap)`, which returns what to align it with, and gets the JEPA loss.
- `learned = False` says that no gradient reaches the scores: the route weight is the plain mask.
- `config` is a model.GPTConfig. The tests run over every registered gate.

After the gates: selection, estimators, losses, labels, in the order in which a training step uses them.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

GATES = {}
ESTIMATORS = ("ste", "ste_norm", "scaled", "hard")
ORACLES = ("off_policy", "on_policy")


def register(name):
    def add(cls):
        GATES[name] = cls
        return cls
    return add


class Gate(nn.Module):
    learned = True
    predicts = False

    def flops(self):
        """{item: (forward, backward)} per token, for the ledger: here every linear map once, the first without an input
        gradient, since h is detached."""
        maps = [2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear)]
        return {"gate": (sum(maps), 2 * sum(maps) - maps[0])} if maps else {}


# -----------------------------------------------------------------------------
# the gates

@register("g1")
class MLPGate(Gate):
    """G1, the MLP gate: D -> g1_hidden -> 1."""

    def __init__(self, config, layer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(config.n_embd, config.g1_hidden), nn.GELU(),
                                 nn.Linear(config.g1_hidden, 1))

    def forward(self, h, noise):
        return self.net(h).squeeze(-1), None  # (B, T)


@register("g3")
class JEPAGate(Gate):
    """G3, the JEPA-guided gate: it predicts, in a small latent space, the outcome of full and of cheap,
    and scores the token from the two predictions. Latent d; predictor and scorer are 3d wide."""
    predicts = True

    def __init__(self, config, layer):
        super().__init__()
        d = config.latent
        self.enc = nn.Linear(config.n_embd, d)
        self.action = nn.Parameter(torch.randn(2, d) * 0.02)  # [full, cheap]
        self.predictor = nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))
        self.scorer = nn.Sequential(nn.Linear(3 * d, 3 * d), nn.GELU(), nn.Linear(3 * d, 1))
        # The fixed target head: seeded by the layer alone, so that every run of every seed aims at the same targets.
        q, _ = torch.linalg.qr(torch.randn(config.n_embd, d, generator=torch.Generator().manual_seed(4228 + layer)))
        self.register_buffer("head", q)  # (D, d), orthonormal columns

    def forward(self, h, noise):
        z = self.enc(h)  # (B, T, d)
        prediction = self.predictor(z.unsqueeze(2) + self.action)  # (B, T, 2, d)
        full, cheap = prediction.unbind(2)
        return self.scorer(torch.cat([full, cheap, full - cheap], -1)).squeeze(-1), prediction

    @torch.no_grad()
    def target(self, full, cheap):
        """FFN outputs (B, T, D) twice -> targets (B, T, 2, d), float32; all zero where the output is zero."""
        out = torch.stack([full, cheap], dim=2).float()  # (B, T, 2, D)
        rms = out.square().mean(-1, keepdim=True).sqrt()
        with torch.autocast(out.device.type, enabled=False):
            return (out / rms.clamp_min(1e-12)) @ self.head.float()  # (B, T, 2, d)

    def flops(self):
        D, d = self.head.shape
        predictor, scorer = 2 * 12 * d * d, 18 * d * d + 6 * d  # the predictor runs once for each action
        return {"gate": (2 * D * d + scorer, 2 * D * d + 2 * scorer), "predictor": (predictor, 2 * predictor),
                "target_head": (4 * D * d, 0.0)}


@register("linear")
class LinearGate(Gate):
    """One linear map, as Mixture-of-Depths (Raposo et al., arXiv:2404.02258) routes."""

    def __init__(self, config, layer):
        super().__init__()
        self.score = nn.Linear(config.n_embd, 1)

    def forward(self, h, noise):
        return self.score(h).squeeze(-1), None


@register("random")
class RandomGate(Gate):
    """Fresh noise for every token: what a budget is worth with no decision at all."""
    learned = False

    def __init__(self, config, layer):
        super().__init__()

    def forward(self, h, noise):
        return noise(), None


@register("static")
class StaticGate(RandomGate):
    """No gate at all: with share_step = 1, `allocate` makes whole layers full; inside a layer with a broken share
    the tokens are random. A learned gate has to beat this."""


# -----------------------------------------------------------------------------
# noise, selection, estimators

def uniform(keys, stream, length, start=0):
    """Uniform numbers (B, length) in [0, 1): a hash of (key, stream, position), the same on every device.

    keys (B,) int64, one per row; stream: an int (the layer). The multiply-xorshift mix is splitmix64's."""
    position = torch.arange(start, start + length, device=keys.device)
    offset = ((stream + 1) * 0x14D049BB133111EB + 2 ** 63) % 2 ** 64 - 2 ** 63  # as int64 wraps
    x = keys[:, None] * 0x1E3779B97F4A7C15 + position * 0x3F58476D1CE4E5B9 + offset
    for _ in range(2):
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * 0x3F58476D1CE4E5B9  # (B, length); int64 wraps
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * 0x14D049BB133111EB
    return ((x >> 33) & 0xFFFFFF).float() / 2 ** 24


def full_tokens(budget, length):
    """k, the number of full tokens in a row: floor(budget * length + 0.5)."""
    return math.floor(budget * length + 0.5)


def split_topk(scores, k):
    """scores (B, T) -> positions of the k largest (B, k) and of the rest (B, T - k), each in ascending order.

    Exactly k whatever the scores; ties go to the earlier position (hence the stable sort)."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values, order[:, k:].sort(dim=1).values


def threshold_for(scores, budget):
    """The score that a share `budget` of all `scores` lies strictly above; +-inf at budget 0 and 1."""
    k = full_tokens(budget, scores.numel())
    if k == 0 or k == scores.numel():
        return torch.full((), -math.inf if k else math.inf, device=scores.device)
    below, above = (scores.flatten().kthvalue(scores.numel() - k + i).values for i in (0, 1))
    middle = below + (above - below) / 2  # on a score itself, rounding would decide when the same context comes again
    return torch.where(middle < above, middle, below)


def standardise(x):
    """Per row (B, T), biased std + 1e-6: rows never mix, so accumulation and several processes agree."""
    return (x - x.mean(1, keepdim=True)) / (x.std(1, unbiased=False, keepdim=True) + 1e-6)


def route_weight(scores, mask, estimator, learned=True):
    """w (B, T) float32, what the full path is multiplied by. The *estimator* decides what L_LM can teach s:
    `ste` hard forward, sigmoid gradient, every token; `ste_norm` the same with s standardised over its row;
    `scaled` (Mixture-of-Depths style) 2 * sigmoid(s) on the selected tokens, forward and backward; `hard` the mask: L_LM
    teaches nothing, labels alone do."""
    mask = mask.float()
    if not learned or estimator == "hard":
        return mask
    if estimator == "scaled":
        return mask * 2 * torch.sigmoid(scores)
    p = torch.sigmoid(standardise(scores) if estimator == "ste_norm" else scores)
    return mask + (p - p.detach())  # in this order the forward value is exactly 0 or 1


class Route(NamedTuple):
    """What one controlled layer did in a forward pass; x and h only where the caller asked to keep them."""
    layer: int
    scores: torch.Tensor  # (B, T) float32
    mask: torch.Tensor  # (B, T) bool, True where the token went full
    prediction: torch.Tensor | None  # (B, T, 2, d)
    target: torch.Tensor | None  # (B, T, 2, d)
    x: torch.Tensor | None  # (B, T, D) the residual stream before the FFN
    h: torch.Tensor | None  # (B, T, D) the FFN's input


# -----------------------------------------------------------------------------
# losses; each returns one value a row (B,), so that any slicing of the batch gives the same sum

def jepa_loss(prediction, target):
    """1 - cosine, mean over actions and tokens; an outcome of zero norm (cheap starts at zero) is left out."""
    seen = target.square().sum(-1) > 0  # (B, T, 2)
    loss = 1 - F.cosine_similarity(prediction.float(), target, dim=-1)
    return (loss * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)


def util_loss(scores, label):
    """Smooth L1 between the raw scores and the label d, both (B, T)."""
    return F.smooth_l1_loss(scores, label, reduction="none").mean(1)


def rank_loss(scores, label, permutation):
    """Pairs (t, permutation[t]) of a row: mean of |dd| * softplus(-sign(dd) * ds); all (B, T)."""
    dd = label - label.gather(1, permutation)
    ds = scores - scores.gather(1, permutation)
    return (dd.abs() * F.softplus(-dd.sign() * ds)).mean(1)


# -----------------------------------------------------------------------------
# labels

@torch.no_grad()
def forced_branches(model, route):
    """The residual stream after layer `route.layer` with every token cheap, and with every token full."""
    block = model.h[route.layer]
    full, cheap = block.mlp(route.h), block.cheap(route.h)
    w = 1.0
    if model.config.estimator == "scaled" and block.gate.learned:
        w = 2 * torch.sigmoid(route.scores).unsqueeze(-1)
    return route.x + cheap, route.x + w * full + (1 - w) * cheap


@torch.no_grad()
def oracle_labels(model, route, targets, keys, oracle):
    """CE(cheap at l for all tokens) - CE(full at l for all tokens), per token (B, T) float32, raw.

    The layers before l are as executed (route.x is reused). The layers after l run, both branches in one
    batch, all full (`off_policy`, the paper's) or as the current gates route each branch (`on_policy`)."""
    cheap, full = forced_branches(model, route)
    x = model.blocks(torch.cat([cheap, full]), "full" if oracle == "off_policy" else "topk",
                     keys=keys.repeat(2), first=route.layer + 1)[0]
    losses = model.token_losses(x, targets.repeat(2, 1))  # (2B, T)
    return losses[:len(targets)] - losses[len(targets):]


def label(raw):
    """d: the raw label standardised per row and clamped to +-3."""
    return standardise(raw).clamp(-3, 3)


@torch.no_grad()
def exact_labels(model, idx, targets, keys, layer, positions, suffix="topk"):
    """What flipping one token at layer l does, the other tokens at l as routed: for audits, expensive.

    positions: list of P ints. Returns (B, P, 2): CE(cheap) - CE(full) of the token itself, and summed over
    it and all later tokens. suffix: how the layers after l run, `topk` (re-routed) or `full`."""
    x, routes = model.blocks(model.embed(idx), "topk", keys=keys, last=layer, keep={layer})
    cheap, full = forced_branches(model, routes[-1])
    out = []
    for t in positions:
        branches = []
        for forced in (cheap, full):
            flipped = x.clone()
            flipped[:, t] = forced[:, t].to(x.dtype)
            branches.append(flipped)
        after = model.blocks(torch.cat(branches), suffix, keys=keys.repeat(2), first=layer + 1)[0]
        losses = model.token_losses(after, targets.repeat(2, 1))
        delta = losses[:len(idx)] - losses[len(idx):]  # (B, T)
        out.append(torch.stack([delta[:, t], delta[:, t:].sum(1)], -1))
    return torch.stack(out, 1)  # (B, P, 2)


@torch.no_grad()
def allocate(model, idx, targets, keys, budget, step):
    """Hand out budget * (number of controlled layers) in portions of `step`, each to the layer where it lowers the loss
    on this training text most; a layer holds 1 at most. Sets every layer's share of full tokens and returns them."""
    blocks = [model.h[i] for i in model.config.controlled]
    for block in blocks:
        block.budget = 0.0
    left = budget * len(blocks)
    while left > 1e-9:
        losses = {}
        for block in (b for b in blocks if b.budget < 1):
            before, block.budget = block.budget, min(1.0, block.budget + min(step, left))
            losses[block] = model.token_losses(model.blocks(model.embed(idx), "topk", keys)[0], targets).mean().item()
            block.budget = before
        best = min(losses, key=losses.get)
        portion = min(step, left, 1 - best.budget)
        best.budget += portion
        left -= portion
    return [block.budget for block in blocks]


# -----------------------------------------------------------------------------
# measurements

def rank_correlation(a, b):
    """Spearman's rho per row, averaged: a, b (B, T) -> float."""
    a, b = (standardise(v.argsort(1).argsort(1).float()) for v in (a, b))
    return (a * b).mean().item()


@torch.no_grad()
def predictor_health(prediction, target):
    """Is G3's predictor alive? prediction, target (N, 2, d) -> dict. R^2 is on unit vectors, against the mean
    target of each action and against the action-blind prediction (the mean of both predictions).
    Collapsed: R^2 over action-blind <= 0, or the effective rank (exp of the spectrum's entropy) < 2."""
    prediction = prediction.float()
    unit, aim = F.normalize(prediction, dim=-1), F.normalize(target, dim=-1)
    seen = (target.square().sum(-1, keepdim=True) > 0).float()  # (N, 2, 1)
    error = ((unit - aim).square() * seen).sum()
    mean = (aim * seen).sum(0) / seen.sum(0).clamp_min(1)
    blind = F.normalize(prediction.mean(1, keepdim=True), dim=-1)
    flat = prediction.flatten(0, 1)
    spectrum = torch.linalg.svdvals(flat - flat.mean(0)).square()
    spectrum = spectrum / spectrum.sum().clamp_min(1e-20)
    health = {
        "std": flat.std(0).mean().item(),
        "effective_rank": torch.exp(-(spectrum * spectrum.clamp_min(1e-20).log()).sum()).item(),
        "cosine_full_cheap": F.cosine_similarity(prediction[:, 0], prediction[:, 1], dim=-1).mean().item(),
        "r2_mean": 1 - (error / ((aim - mean).square() * seen).sum().clamp_min(1e-20)).item(),
        "r2_action_blind": 1 - (error / ((aim - blind).square() * seen).sum().clamp_min(1e-20)).item(),
    }
    health["collapsed"] = health["r2_action_blind"] <= 0 or health["effective_rank"] < 2
    return health
