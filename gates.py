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
  backbone.
- `context` is whatever else a gate may read: `context.tokens` (B, T), the token ids; `context.start`, the
  position of the first of them; `context.noise(layer)` (B, T), uniform numbers that repeat under resume,
  several processes and a KV cache.
- It returns (scores, prediction). Scores are (B, T): the higher, the more full is worth. A token's score
  depends on its own h, id and position alone, because decoding sees one token at a time.
- `prediction` is None, or the predicted outcomes (B, T, 2, d) of [full, cheap]. A gate that predicts says
  `predicts = True` and has `outcomes(full, cheap)`, the real ones to compare them with: see JEPAGate.
- `learned = False` says that no gradient reaches the scores.
- `config` is a model.GPTConfig, `layer` the index of the layer.

The tests run over every registered gate: `python -m pytest test_routing.py --plugin=my_gate.py`.

After the gates come the selection, the estimators, the labels and the losses, in the order in which training
uses them. They have registries of their own and are added in the same way. An estimator takes (scores, mask)
and returns w (B, T). A loss takes a Step and returns a scalar. A label takes (step, route), on the rows that
get labels, and returns (B, T); it can read the step's model, config, context, targets and dense, and the
route's layer, scores, mask, x and h.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import ConfigError, Registry
from kernels import uniform

GATES = Registry("gate")


@dataclass
class Context:
    """What a gate may read besides h."""
    tokens: torch.Tensor  # (B, T) int64, the token ids that h stands for
    row_seeds: torch.Tensor  # (B,) int64, one a row: noise and the pairs of labels come from it
    start: int = 0  # the position of the first token: above 0 behind a KV cache

    def noise(self, layer):
        """Uniform numbers (B, T) in [0, 1), a function of row seed, layer and position."""
        return uniform(self.row_seeds, layer, self.tokens.size(1), self.start)

    def twice(self):
        """The context of two branches of the same rows, (2B, T)."""
        return Context(self.tokens.repeat(2, 1), self.row_seeds.repeat(2), self.start)


class Gate(nn.Module):
    learned = True
    predicts = False

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer


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
        # The target head is fixed: the real outcomes are compared with predictions in d numbers of each FFN's
        # output. It is seeded by the layer alone: every run of every seed has the same targets.
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
    """No decision. Its recipe sets share_step = 1, so `metrics.allocate` makes whole layers full. Inside a
    layer that is full in part the tokens are random. A learned gate has to beat this."""


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
# estimators: (scores, mask), both (B, T) -> w (B, T) float32. The output is w * full + (1 - w) * cheap, so
# the gradient of w, by which the loss teaches the scores, is of (full - cheap). Three flags:
#   reads_both    w has a gradient on every token, so both outputs are needed there
#   mixes         w is not 1 on full tokens, so cheap is part of their output
#   standardises  the scores are standardised before the sigmoid

ESTIMATORS = Registry("estimator", reads_both=False, mixes=False, standardises=False)


def standardise(x):
    """Mean 0 and std 1 over each row of (B, T), with the biased std + 1e-6. Rows never mix, so accumulation
    and several processes agree."""
    return (x - x.mean(1, keepdim=True)) / (x.std(1, unbiased=False, keepdim=True) + 1e-6)


def straight_through(mask, p):
    """The mask in the forward pass, exactly; the gradient of p in the backward pass."""
    return mask.float() + (p - p.detach())


@ESTIMATORS.register("ste_norm", reads_both=True, standardises=True)
def ste_norm(scores, mask):
    """Top-k does not care if all scores of a row move together, and neither does this estimator."""
    return straight_through(mask, torch.sigmoid(standardise(scores)))


@ESTIMATORS.register("ste", reads_both=True)
def ste(scores, mask):
    """What most would write first. The scores of a row drift together until the sigmoid is flat: the gate is
    dead."""
    return straight_through(mask, torch.sigmoid(scores))


@ESTIMATORS.register("scaled", mixes=True)
def scaled(scores, mask):
    """Mixture-of-Depths style: the weight acts in the forward pass; only selected tokens teach the gate. It
    lies between 0 and 2, and a score of 0 weighs 1. Above 1 cheap is subtracted."""
    return mask.float() * 2 * torch.sigmoid(scores)


@ESTIMATORS.register("hard")
def hard(scores, mask):
    """The mask. The LM loss teaches nothing, labels alone do."""
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

    def rows(self, index):
        """The scores, x and h of some rows."""
        return Route(self.layer, self.scores[index], self.mask[index], x=self.x[index], h=self.h[index])


class Label(NamedTuple):
    """The labels of one controlled layer, on the rows that got some."""
    scores: torch.Tensor  # (b, T) the gate's, with their gradient
    raw: torch.Tensor  # (b, T) what full saves over cheap, in nats
    target: torch.Tensor  # (b, T) the same, standardised per row and clamped to +-3: what the losses use
    permutation: torch.Tensor  # (b, T) int64: token t is paired with token permutation[t]


@dataclass
class Step:
    """What a training step's forward pass leaves for the labels and the losses."""
    model: nn.Module
    config: dict
    context: Context
    targets: torch.Tensor  # (B, T) int64, the next tokens
    x: torch.Tensor | None = None  # (B, T, D) the residual stream after the last layer
    routes: list = field(default_factory=list)  # of Route
    labels: list = field(default_factory=list)  # of Label
    dense: torch.Tensor | None = None  # (B, T, D) the stream of the frozen dense model after its last layer

    def rows(self, index):
        """What labels need of some rows."""
        context = Context(self.context.tokens[index], self.context.row_seeds[index])
        dense = None if self.dense is None else self.dense[index]
        return Step(self.model, self.config, context, self.targets[index], dense=dense)


# -----------------------------------------------------------------------------
# labels: (step, route) -> raw label (B, T) of the route's layer l: the larger, the more full is worth there.
# Those below are in nats, loss(cheap at l) - loss(full at l). The key --oracle picks one. `suffix` is the
# mode in which the layers after l run, for the count of FLOPs. A label's loss is against what the key
# --label_target picks: tokens (B, T), or a stream (B, T, D) that stands for the distribution it predicts.

LABELS = Registry("oracle", suffix=None)
TARGETS = Registry("label_target", needs_dense=False)


@LABELS.register("off_policy", suffix="full")
def off_policy_label(step, route):
    """The paper's oracle: the layers after l execute full."""
    return suffix_label(step, route, "full")


@LABELS.register("on_policy", suffix="topk")
def on_policy_label(step, route):
    """The layers after l run as the current gates route: re-scored and re-routed in each branch."""
    return suffix_label(step, route, "topk")


@TARGETS.register("next")
def next_token(step):
    """The token that came, (B, T)."""
    return step.targets


@TARGETS.register("dense", needs_dense=True)
def dense_model(step):
    """What the frozen model predicts, (B, T, D): a function of the context alone, as a gate's score is,
    without the surprise of the token that came."""
    return step.dense


@torch.no_grad()
def suffix_label(step, route, mode):
    """Both branches of the layer run to the end in one batch; the layers before are as executed: route.x."""
    branches = torch.cat(forced_branches(step.model, route))  # (2B, T, D)
    x, _ = step.model.run(branches, mode, step.context.twice(), first=route.layer + 1)
    target = TARGETS[step.config["label_target"]](step)
    loss_cheap, loss_full = step.model.token_losses(x.chunk(2), target)  # (B, T) each
    return loss_cheap - loss_full


def forced_branches(model, route):
    """The residual stream (B, T, D) after the route's layer: with every token cheap, and with all full."""
    block = model.h[route.layer]
    full, cheap = block.mlp(route.h), block.cheap(route.h)
    # 1, unless the estimator mixes: under `scaled` a full token is weighted by its score.
    w = block.estimator(route.scores, torch.ones_like(route.mask)).unsqueeze(-1)
    return route.x + cheap, route.x + w * full + (1 - w) * cheap


def make_label(step, route):
    """The Label of a route; step and route hold the same rows."""
    with torch.no_grad():
        raw = LABELS[step.config["oracle"]](step, route).float()
        if raw.shape != route.scores.shape:
            raise ConfigError(f"the label {step.config['oracle']!r} must be (B, T), not {tuple(raw.shape)}")
        target = standardise(raw).clamp(-3, 3)
        permutation = uniform(step.context.row_seeds, -1, raw.size(1)).argsort(1)  # -1 is no layer's stream
    return Label(route.scores, raw, target, permutation)


# -----------------------------------------------------------------------------
# losses: Step -> a scalar. `weight` is the default of the config key lambda_<name>. `needs` says what of the
# step a loss reads: stream, dense, scores, labels or outcomes. Where a run has none the loss does not apply.

LOSSES = Registry("loss", weight=0.0, needs="scores")


@LOSSES.register("lm", weight=1.0, needs="stream")
def lm_loss(step):
    """Cross entropy with the next token."""
    return step.model.lm_loss(step.x, step.targets)


@LOSSES.register("distill", needs="dense")
def distill_loss(step):
    """KL(dense || routed), mean over tokens: be the model that was frozen, for less."""
    return step.model.distill_loss(step.x, step.dense)


@LOSSES.register("jepa", weight=1.0, needs="outcomes")
def jepa_loss(step):
    """1 - cosine of predicted and real outcomes, mean over the two paths, tokens and layers."""
    return sum(alignment(r.prediction, r.outcomes).mean() for r in step.routes) / len(step.routes)


def alignment(prediction, outcomes):
    """(B, T, 2, d) twice -> (B,). An outcome of zero norm is left out: cheap starts at zero."""
    present = outcomes.square().sum(-1) > 0  # (B, T, 2)
    distance = 1 - F.cosine_similarity(prediction.float(), outcomes, dim=-1)
    return (distance * present).sum((1, 2)) / present.sum((1, 2)).clamp_min(1)


@LOSSES.register("util", weight=1.0, needs="labels")
def util_loss(step):
    """Regression of the scores, as they are, on the labels' targets: smooth L1."""
    distances = [F.smooth_l1_loss(l.scores, l.target, reduction="none").mean(1).mean() for l in step.labels]
    return sum(distances) / len(distances)


@LOSSES.register("rank", weight=1.0, needs="labels")
def rank_loss(step):
    """Pairs of tokens should be ordered as their labels are."""
    return sum(pairwise(l.scores, l.target, l.permutation).mean() for l in step.labels) / len(step.labels)


def pairwise(scores, target, permutation):
    """|dt| * softplus(-sign(dt) * ds), dt and ds the differences of target and score in the pairs (t,
    permutation[t]): all (B, T) -> (B,)."""
    dt = target - target.gather(1, permutation)
    ds = scores - scores.gather(1, permutation)
    return (dt.abs() * F.softplus(-dt.sign() * ds)).mean(1)


@LOSSES.register("anchor")
def anchor_loss(step):
    """The square of a row's mean score: it holds the scores of `ste` where the sigmoid has a slope."""
    return sum(r.scores.mean(1).square().mean() for r in step.routes) / len(step.routes)


def active_losses(config):
    """{name: loss} of a run's config: those with a weight, where the run has what they need."""
    gate, routed = GATES[config["gate"]], config["mode"] == "topk"
    learned = routed and gate.learned
    present = {"stream": True,
               "dense": config["mode"] != "full", "scores": learned,
               "labels": learned and config["label_share"] > 0,
               "outcomes": routed and gate.predicts}
    weighted = {name: loss for name, loss in LOSSES.items() if config[f"lambda_{name}"] > 0}
    return {name: loss for name, loss in weighted.items() if present[loss.needs]}
