"""Gates: which token goes through the full FFN, and what teaches a gate to decide.

The contract. A gate is one class and one line, in a file of your own (`--plugin=my_gate.py`):

    @GATES.register("my_gate")
    class TokenGate(Gate):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.score = nn.Embedding(config.vocab_size, 1)

        def forward(self, h, context):
            return self.score(context.tokens).squeeze(-1), None

- `h` (B, T, D) is the layer's FFN input ln_2(x), float32 and detached: no gate sends a gradient into the
  backbone, and none may change h in place.
- `context` is whatever else a gate may read: `context.tokens` (B, T), the token ids; `context.start`, the
  position of the first of them; `context.noise(layer)` (B, T), uniform numbers that repeat under resume,
  several processes and a KV cache.
- It returns (scores, prediction). Scores are (B, T): the higher, the more full is worth. A token's score
  depends on its own h, id, position and noise alone, because decoding sees one token at a time.
- `prediction` is None, or the predicted outcomes (B, T, 2, d) of [full, cheap]. A gate that predicts says
  `predicts = True` and has `outcomes(full, cheap)`, the real ones to compare them with: see JEPAGate.
- `learned = False` says that no gradient reaches the scores.
- `config` is a model.GPTConfig, `layer` the index of the layer.

The tests run over every registered gate: `python -m pytest test_routing.py --plugin=my_gate.py`.

After the gates come the selection, the estimators, what a forward pass leaves, the labels and the losses, in the
order in which training uses them. Estimators, labels and losses have registries and are added like a gate: a small
class with a few attributes and __call__.
Everywhere a pair of the two actions stands in the order [full, cheap].
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import ConfigError, Registry, where_is
from kernels import uniform

GATES = Registry("gate")


@dataclass
class Context:
    """What a gate may read besides h."""
    tokens: torch.Tensor  # (B, T) int64, the token ids that h stands for
    row_seeds: torch.Tensor  # (B,) int64, one a row: noise and the pairs of the rank loss come from it
    start: int = 0  # the position of the first token: above 0 behind a KV cache

    def noise(self, layer):
        """Uniform numbers (B, T) in [0, 1), a function of row seed, layer and position."""
        return uniform(self.row_seeds, layer, self.tokens.size(1), self.start)

    def twice(self):
        """The context of two branches of the same rows, (2B, T)."""
        return Context(self.tokens.repeat(2, 1), self.row_seeds.repeat(2), self.start)


class Gate(nn.Module):
    """What every gate has. Its forward takes (h, context) and gives (scores, prediction or None)."""
    learned = True
    predicts = False

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer

    def forward(self, h, context):
        raise NotImplementedError


# -----------------------------------------------------------------------------
# the gates

@GATES.register("g1")
class MLPGate(Gate):
    """G1, the MLP gate: D -> g1_hidden -> 1."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.net = nn.Sequential(nn.Linear(config.n_embd, config.g1_hidden), nn.GELU(),
                                 nn.Linear(config.g1_hidden, 1))

    def forward(self, h, context):
        return self.net(h).squeeze(-1), None  # (B, T)


@GATES.register("g3")
class JEPAGate(Gate):
    """G3, the JEPA-guided gate. It predicts, in a latent space of d numbers, the outcome of full and of
    cheap, and scores the token from the two predictions. Predictor and scorer are 3d wide."""
    predicts = True

    def __init__(self, config, layer):
        super().__init__(config, layer)
        d = config.latent
        self.enc = nn.Linear(config.n_embd, d)
        self.action = nn.Parameter(torch.randn(2, d) * 0.02)  # [full, cheap]
        self.predictor = nn.Sequential(nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))
        self.scorer = nn.Sequential(nn.Linear(3 * d, 3 * d), nn.GELU(), nn.Linear(3 * d, 1))
        # The target head is fixed: it turns an FFN's real output into the d numbers that were to be predicted.
        # It is seeded by the layer alone, so every run of every seed has the same outcomes.
        generator = torch.Generator().manual_seed(4228 + layer)
        orthonormal, _ = torch.linalg.qr(torch.randn(config.n_embd, d, generator=generator))
        self.register_buffer("target_head", orthonormal)  # (D, d)

    def forward(self, h, context):
        z = self.enc(h)  # (B, T, d)
        prediction = self.predictor(z.unsqueeze(2) + self.action)  # (B, T, 2, d)
        full, cheap = prediction.unbind(2)
        scores = self.scorer(torch.cat([full, cheap, full - cheap], -1)).squeeze(-1)
        return scores, prediction

    @torch.no_grad()
    def outcomes(self, full, cheap):
        """FFN outputs (B, T, D) twice -> (B, T, 2, d), float32; all zero where an output is zero."""
        outputs = torch.stack([full, cheap], dim=2).float()  # (B, T, 2, D)
        rms = outputs.square().mean(-1, keepdim=True).sqrt()
        with torch.autocast(outputs.device.type, enabled=False):
            return (outputs / rms.clamp_min(1e-12)) @ self.target_head.float()  # (B, T, 2, d)


@GATES.register("linear")
class LinearGate(Gate):
    """One linear map, as Mixture-of-Depths (Raposo et al., arXiv:2404.02258) routes."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.score = nn.Linear(config.n_embd, 1)

    def forward(self, h, context):
        return self.score(h).squeeze(-1), None


@GATES.register("random")
class RandomGate(Gate):
    """Fresh noise for every token: what a budget is worth with no decision at all."""
    learned = False

    def forward(self, h, context):
        return context.noise(self.layer), None


@GATES.register("static")
class StaticGate(RandomGate):
    """No decision. With this gate `model.set_budget` makes whole layers full, in the order of
    `model.choose_layers`. At most one is full in part, and there the tokens are random. A learned gate has to beat
    this."""


# -----------------------------------------------------------------------------
# selection

def full_tokens(budget, length):
    """k, the number of full tokens in a row of `length`."""
    return math.floor(budget * length + 0.5)


def topk_mask(scores, k):
    """scores (B, T) -> mask (B, T), True at exactly k tokens of each row, the largest. Of equal scores the
    earlier token is taken."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :k], True)


def threshold_for(scores, budget):
    """The score that a share `budget` of all `scores` lies strictly above; +-inf at budget 0 and 1."""
    n = scores.numel()
    k = full_tokens(budget, n)
    if k == 0:
        return torch.full((), math.inf, device=scores.device)
    if k == n:
        return torch.full((), -math.inf, device=scores.device)
    below = scores.flatten().kthvalue(n - k).values  # the highest score that stays cheap
    above = scores.flatten().kthvalue(n - k + 1).values  # the lowest that goes full
    middle = below + (above - below) / 2  # a threshold that equals a score could flip it by rounding
    return torch.where(middle < above, middle, below)


# -----------------------------------------------------------------------------
# estimators: (scores, mask), both (B, T) -> the route weight w (B, T) float32. The layer's output is w * full +
# (1 - w) * cheap, so dL/dw of a token is the inner product of dL/d(output) with (full - cheap). This is what teaches
# the scores, and why both outputs are needed wherever w has a gradient.

ESTIMATORS = Registry("estimator")


class Estimator:
    """What every estimator has: three flags, and __call__(scores, mask) -> w."""
    reads_both = False  # w has a gradient on every token, so both outputs are needed there
    mixes = False  # w is not 1 on full tokens, so cheap is part of their output
    standardises = False  # the scores are standardised before the sigmoid


def standardise(x):
    """Mean 0 and std 1 over each row of (B, T), with the biased std + 1e-6. Rows never mix, so accumulation
    and several processes agree."""
    return (x - x.mean(1, keepdim=True)) / (x.std(1, unbiased=False, keepdim=True) + 1e-6)


def straight_through(mask, p):
    """The mask in the forward pass, exactly; the gradient of p in the backward pass."""
    return mask.float() + (p - p.detach())


@ESTIMATORS.register("ste_norm")
class StandardisedStraightThrough(Estimator):
    """Top-k does not care if all scores of a row move together, and neither does this estimator."""
    reads_both = True
    standardises = True

    def __call__(self, scores, mask):
        return straight_through(mask, torch.sigmoid(standardise(scores)))


@ESTIMATORS.register("ste")
class StraightThrough(Estimator):
    """The plain straight-through estimator. Its gradient says of most tokens that more full would lower the loss.
    Top-k does not care if all scores of a row rise together, so nothing pushes back: they drift up until the
    sigmoid is flat. Then there is no gradient, and the gate is dead."""
    reads_both = True

    def __call__(self, scores, mask):
        return straight_through(mask, torch.sigmoid(scores))


@ESTIMATORS.register("scaled")
class Scaled(Estimator):
    """Mixture-of-Depths style: the weight acts in the forward pass; only selected tokens teach the gate. It
    lies between 0 and 2, and a score of 0 weighs 1. Above 1 cheap is subtracted."""
    mixes = True

    def __call__(self, scores, mask):
        return mask.float() * 2 * torch.sigmoid(scores)


@ESTIMATORS.register("hard")
class Hard(Estimator):
    """The mask. The loss at the top teaches nothing, labels alone do."""

    def __call__(self, scores, mask):
        return mask.float()


# -----------------------------------------------------------------------------
# what a forward pass leaves

class Route(NamedTuple):
    """What one controlled layer did. x and h are there for layers that get labels, outcomes for JEPA."""
    layer: int
    scores: torch.Tensor  # (B, T) float32
    mask: torch.Tensor  # (B, T) bool, True where the token went full
    prediction: torch.Tensor | None = None  # (B, T, 2, d)
    outcomes: torch.Tensor | None = None  # (B, T, 2, d) the real outcomes
    x: torch.Tensor | None = None  # (B, T, D) the residual stream before the FFN
    h: torch.Tensor | None = None  # (B, T, D) the FFN's input

    def first_rows(self, n):
        """The scores, mask, x and h of the first n rows."""
        return Route(self.layer, self.scores[:n], self.mask[:n], x=self.x[:n], h=self.h[:n])


class LayerLabels(NamedTuple):
    """The labels of one controlled layer, on the b rows that get some."""
    layer: int
    scores: torch.Tensor  # (b, T) the gate's, with their gradient
    raw: torch.Tensor  # (b, T) what full saves over cheap, in nats
    d: torch.Tensor  # (b, T) the same, standardised per row and clamped to +-3: what the losses use
    partner: torch.Tensor  # (b, T) int64: token t is paired with token partner[t]


@dataclass
class Trace:
    """What a forward pass of training leaves for the labels and the losses."""
    model: nn.Module
    config: dict  # train.py's keys; the model's own config is a GPTConfig
    context: Context
    targets: torch.Tensor  # (B, T) int64, the next tokens
    x: torch.Tensor | None = None  # (B, T, D) the residual stream after the last layer
    dense_x: torch.Tensor | None = None  # (B, T, D) the same of the dense model: mode full, no gradient
    routes: list = field(default_factory=list)  # of Route, one a controlled layer
    labels: list = field(default_factory=list)  # of LayerLabels, of the layers that got labels

    def first_rows(self, n):
        """What labels need of the first n rows."""
        context = Context(self.context.tokens[:n], self.context.row_seeds[:n])
        dense_x = None if self.dense_x is None else self.dense_x[:n]
        return Trace(self.model, self.config, context, self.targets[:n], dense_x=dense_x)


# -----------------------------------------------------------------------------
# labels: (trace, route) -> (B, T), the larger, the more full is worth at the route's layer. A label can read the
# trace's model, config, context, targets and dense_x, and the route's layer, scores, mask, x and h.

LABELS = Registry("oracle")  # the key --oracle names one


class Label:
    # The mode in which a SuffixLabel runs the layers after its own; the count of FLOPs reads it too. None: they do
    # not run.
    suffix = None

    def __call__(self, trace, route):
        raise NotImplementedError


class SuffixLabel(Label):
    """In nats: loss(cheap at the layer, for all tokens) - loss(full there, for all tokens). The layers before
    it are as they were executed. Both branches run to the end in one batch."""

    @torch.no_grad()
    def __call__(self, trace, route):
        branches = torch.cat(forced_branches(trace.model, route))  # (2B, T, D)
        x, _ = trace.model.run(branches, self.suffix, trace.context.twice(), first=route.layer + 1)
        loss_full, loss_cheap = trace.model.token_losses(x.chunk(2), label_reference(trace))  # (B, T) each
        return loss_cheap - loss_full


def label_reference(trace):
    """What a label's losses are against, by the key label_target: `next`, the token that came, (B, T); or
    `dense`, what the dense model predicts, as its stream (B, T, D). The second is a function of the context
    alone, as a score is; the first adds the surprise of the token that came."""
    if trace.config["label_target"] == "dense":
        return trace.dense_x
    return trace.targets


def forced_branches(model, route):
    """The residual stream (B, T, D) after the route's layer: with all tokens full, and with all cheap."""
    block = model.h[route.layer]
    full, cheap = block.mlp(route.h), block.cheap(route.h)
    # 1, unless the estimator mixes: under `scaled` a full token is weighted by its score.
    w = block.estimator(route.scores, torch.ones_like(route.mask)).unsqueeze(-1)
    return route.x + w * full + (1 - w) * cheap, route.x + cheap


@LABELS.register("off_policy")
class OffPolicyLabel(SuffixLabel):
    """The paper's oracle: the layers after the labelled one execute full."""
    suffix = "full"


@LABELS.register("on_policy")
class OnPolicyLabel(SuffixLabel):
    """The layers after the labelled one run as the gates route now: re-scored and re-routed in each branch."""
    suffix = "topk"


@LABELS.register("shuffled")
class ShuffledLabel(OffPolicyLabel):
    """A control: the paper's labels, shuffled within each row. They say nothing about a token. What they gain
    is what any loss on the scores gains."""

    def __call__(self, trace, route):
        order = uniform(trace.context.row_seeds, -2, route.scores.size(1)).argsort(1)  # -2: no layer's stream
        return super().__call__(trace, route).gather(1, order)


def make_labels(trace, route):
    """-> the LayerLabels of a route; trace and route hold the same rows."""
    label = LABELS[trace.config["oracle"]]
    with torch.no_grad():
        raw = label()(trace, route).float()
        if raw.shape != route.scores.shape:
            raise ConfigError(f"the label {trace.config['oracle']!r} ({where_is(label)}) must be (B, T) = "
                              f"{tuple(route.scores.shape)}, not {tuple(raw.shape)}")
        d = standardise(raw).clamp(-3, 3)
        partner = uniform(trace.context.row_seeds, -1, raw.size(1)).argsort(1)  # -1: no layer's stream
    return LayerLabels(route.layer, route.scores, raw, d, partner)


# -----------------------------------------------------------------------------
# losses: Trace -> a scalar

LOSSES = Registry("loss")


class Loss:
    weight = 0.0  # the default of a plugin's key lambda_<name>; those of our own stand in train.py
    # What of the trace it reads: x, dense_x, routes, labels or outcomes. A run that has none of it goes without
    # the loss.
    needs = "routes"

    def __call__(self, trace):
        raise NotImplementedError


@LOSSES.register("lm")
class LMLoss(Loss):
    """Cross entropy with the next token."""
    needs = "x"

    def __call__(self, trace):
        return trace.model.lm_loss(trace.x, trace.targets)


@LOSSES.register("distill")
class DistillLoss(Loss):
    """KL(dense || routed), mean over tokens: be the model that was frozen, for less."""
    needs = "dense_x"

    def __call__(self, trace):
        return trace.model.kl_loss(trace.x, trace.dense_x)


@LOSSES.register("jepa")
class JEPALoss(Loss):
    """1 - cosine of predicted and real outcomes, mean over the two actions, tokens and layers."""
    needs = "outcomes"

    def __call__(self, trace):
        return mean(cosine_distance(r.prediction, r.outcomes).mean() for r in trace.routes)


def cosine_distance(prediction, outcomes):
    """1 - cosine, a mean over a row's outcomes: (B, T, 2, d) twice -> (B,). An outcome of zero norm is left out:
    cheap may start at zero."""
    present = outcomes.square().sum(-1) > 0  # (B, T, 2)
    distance = 1 - F.cosine_similarity(prediction.float(), outcomes, dim=-1)
    return (distance * present).sum((1, 2)) / present.sum((1, 2)).clamp_min(1)


@LOSSES.register("util")
class UtilLoss(Loss):
    """Regression of the raw scores on the normalised labels d: smooth L1."""
    needs = "labels"

    def __call__(self, trace):
        return mean(F.smooth_l1_loss(l.scores, l.d, reduction="none").mean(1).mean() for l in trace.labels)


@LOSSES.register("rank")
class RankLoss(Loss):
    """Pairs of tokens should be ordered as their labels are."""
    needs = "labels"

    def __call__(self, trace):
        return mean(pairwise(l.scores, l.d, l.partner).mean() for l in trace.labels)


def pairwise(scores, d, partner):
    """|dd| * softplus(-sign(dd) * ds), dd and ds the differences of label and score in the pairs (t,
    partner[t]): all (B, T) -> (B,)."""
    dd = d - d.gather(1, partner)
    ds = scores - scores.gather(1, partner)
    return (dd.abs() * F.softplus(-dd.sign() * ds)).mean(1)


@LOSSES.register("anchor")
class AnchorLoss(Loss):
    """The square of a row's mean score: it holds the scores of `ste` where the sigmoid has a slope."""

    def __call__(self, trace):
        return mean(r.scores.mean(1).square().mean() for r in trace.routes)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def active_losses(config):
    """{name: loss} of a run's config: the losses with a weight, where the run has what they need."""
    gate, routed = GATES[config["gate"]], config["mode"] == "topk"
    present = {"x"}
    if config["mode"] != "full":  # a backbone is the dense model itself
        present.add("dense_x")
    if routed and gate.learned:
        present.add("routes")
    if routed and gate.learned and config["label_share"] > 0:
        present.add("labels")
    if routed and gate.predicts:
        present.add("outcomes")
    weighted = {name: loss for name, loss in LOSSES.items() if config[f"lambda_{name}"] > 0}
    return {name: loss() for name, loss in weighted.items() if loss.needs in present}
