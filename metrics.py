"""What is measured of a model besides its loss: gradient norms, the health of scores and predictors, evaluation
against the dense model, how much of the gap between all-cheap and dense a run closes, and FLOPs. Nothing here
trains anything."""
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gates import GATES, LABELS, Context, active_losses, standardise
from model import GPT

DEAD = 0.01  # a gate whose mean p (1 - p) is below this has a flat sigmoid: the LM loss teaches it nothing
HIT_LEVELS = (0.25, 0.5, 0.75, 0.9)


# -----------------------------------------------------------------------------
# one training step

class StepLog:
    """What a training step says of itself: its losses, and on a logged step gradient norms, realised budgets
    and the health of the scores. Means over the slices of the batch and over all processes."""

    def __init__(self, model, config, machine, slices, logged):
        self.config, self.logged, self.machine, self.slices = config, logged, machine, slices
        self.sums = {}  # name -> the sum over slices of a tensor
        self.gate = []
        if config["mode"] == "topk":
            self.gate = [p for n, p in model.named_parameters() if ".gate." in n and p.requires_grad]

    def add(self, trace, losses):
        """After the backward pass of a slice, whose graph is still there on a logged step."""
        for name, loss in losses.items():
            self.sum(name, loss)
        if not self.logged:
            return
        if "lm" not in losses:  # nothing trains on it, and a reader wants to see it
            self.sum("lm", trace.model.token_losses([trace.x], trace.targets)[0].mean())
        if trace.routes:
            self.sum("budget", torch.stack([r.mask.float().mean() for r in trace.routes]))
            grads = [r.scores.grad for r in trace.routes if r.scores.grad is not None]
            if grads:
                self.sum("score_gradient", self.slices * sum(g.square().sum() for g in grads))
        if self.gate:
            estimators = [trace.model.h[r.layer].estimator for r in trace.routes]
            health = [score_health(r.scores, estimator) for r, estimator in zip(trace.routes, estimators)]
            self.sum("health", torch.stack(health))
        if trace.labels:
            correlations = [spearman(label.scores.detach(), label.raw) for label in trace.labels]
            self.sum("label_correlation", sum(correlations) / len(correlations))
        if "jepa" in losses:
            loss = self.config["lambda_jepa"] * losses["jepa"]
            grads = torch.autograd.grad(loss, self.gate, allow_unused=True)
            self.sum("jepa_gradient", flatten(grads, self.gate))

    def sum(self, name, value):
        value = torch.as_tensor(value, device=self.machine.device).detach().float() / self.slices
        self.sums[name] = self.sums.get(name, 0) + value

    def values(self, trained, optimizers):
        """{name: value} for log.jsonl, tensors nobody has waited for. The gradients of `trained` are summed
        already."""
        self.machine.sum(list(self.sums.values()))
        sums = dict(self.sums)
        jepa, scores = sums.pop("jepa_gradient", None), sums.pop("score_gradient", None)
        health, budget = sums.pop("health", None), sums.pop("budget", None)
        values = {}
        if "label_correlation" in sums:
            values["label_correlation"] = sums.pop("label_correlation")
        values["losses"] = sums
        if not self.logged:
            return values
        every = [p.grad for p in trained if p.grad is not None]
        values["grad_norm"] = {"all": torch.stack([g.norm() for g in every]).norm()}
        if scores is not None:
            values["grad_norm"]["scores"] = scores.sqrt()
        if self.gate:
            gate = flatten([p.grad for p in self.gate], self.gate)
            values["grad_norm"]["gate"] = gate.norm()
            values["grad_norm"]["gate_without_jepa"] = gate.norm() if jepa is None else (gate - jepa).norm()
        if health is not None:
            values["scores"] = dict(zip(("mean", "std", "slope"), health.T))  # of each layer
        if budget is not None:
            values["budget"] = budget
        values["lr"] = sorted({group["lr"] for o in optimizers for group in o.param_groups})
        return values


def flatten(grads, parameters):
    """Gradients, of which some may be None, as one vector."""
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters)])


@torch.no_grad()
def score_health(scores, estimator):
    """Scores (B, T) -> (3,): mean and std of a row's scores and the mean of p (1 - p), the slope of the
    sigmoid through which the LM loss reaches them."""
    p = torch.sigmoid(standardise(scores) if estimator.standardises else scores)
    return torch.stack([scores.mean(), scores.std(1, unbiased=False).mean(), (p * (1 - p)).mean()])


def dead_layers(values, controlled):
    """The layers whose gate is dead, by a logged record."""
    slopes = values.get("scores", {}).get("slope", [])
    return [layer for layer, slope in zip(controlled, slopes) if slope < DEAD]


# -----------------------------------------------------------------------------
# ranks and predictors

def ranks(x):
    """The ranks of each row of (B, T), float32; ties share the mean of their ranks."""
    position = x.argsort(dim=1, stable=True).argsort(dim=1).float()
    equal = (x.unsqueeze(2) == x.unsqueeze(1)).float()  # (B, T, T)
    return (equal @ position.unsqueeze(2)).squeeze(2) / equal.sum(2)


def spearman(a, b):
    """Spearman's rho of each row of a and b (B, T), averaged -> float tensor."""
    return (standardise(ranks(a)) * standardise(ranks(b))).mean()


@torch.no_grad()
def predictor_health(prediction, outcomes):
    """Is G3's predictor alive? prediction, outcomes (N, 2, d) -> dict. R^2 is on unit vectors, against the mean
    outcome of each action and against the action-blind prediction (the mean of both predictions). Collapsed:
    R^2 over action-blind <= 0, or the effective rank (the exponential of the spectrum's entropy) < 2."""
    prediction = prediction.float()
    unit, aim = F.normalize(prediction, dim=-1), F.normalize(outcomes, dim=-1)
    present = (outcomes.square().sum(-1, keepdim=True) > 0).float()  # (N, 2, 1)
    error = ((unit - aim).square() * present).sum()
    mean = (aim * present).sum(0) / present.sum(0).clamp_min(1)
    blind = F.normalize(prediction.mean(1, keepdim=True), dim=-1)
    latents = prediction.flatten(0, 1)
    spectrum = torch.linalg.svdvals(latents - latents.mean(0)).square()
    spectrum = spectrum / spectrum.sum().clamp_min(1e-20)
    entropy = -(spectrum * spectrum.clamp_min(1e-20).log()).sum()
    health = {
        "std": latents.std(0).mean().item(),
        "effective_rank": entropy.exp().item(),
        "cosine_full_cheap": F.cosine_similarity(prediction[:, 0], prediction[:, 1], dim=-1).mean().item(),
        "r2_mean": 1 - (error / ((aim - mean).square() * present).sum().clamp_min(1e-20)).item(),
        "r2_action_blind": 1 - (error / ((aim - blind).square() * present).sum().clamp_min(1e-20)).item(),
    }
    health["collapsed"] = health["r2_action_blind"] <= 0 or health["effective_rank"] < 2
    return health


# -----------------------------------------------------------------------------
# evaluation

def progress(items, what, quiet=10.0):
    """Yield the items of a list; where that takes longer than `quiet` seconds, say every so often how far it
    is and how long the rest will take."""
    began = shown = time.time()
    for done, item in enumerate(items):
        now = time.time()
        if now - shown > quiet:
            shown, left = now, (now - began) / done * (len(items) - done)
            print(f"  {what}: {done} of {len(items)}, {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
        yield item


def slices_of(batch, tokens=2 ** 12):
    """A batch (N, T) in parts of about so many tokens: what a CPU's memory holds easily."""
    rows = max(1, tokens // batch.tokens.size(1))
    return [batch.rows(slice(i, i + rows)) for i in range(0, len(batch.tokens), rows)]


@torch.no_grad()
def evaluate(model, batch, modes, machine):
    """Each of some modes on a batch (N, T) -> {mode: {"loss", "budget": the realised share of each controlled
    layer, "kl": KL(dense || this mode), "agreement": how often both have the same likeliest token}}."""
    totals = {mode: torch.zeros(3, dtype=torch.float64) for mode in modes}  # loss, kl, agreement
    full = {mode: [] for mode in modes}
    with machine.autocast():
        for part in progress(slices_of(batch), f"evaluating under {', '.join(modes)}"):
            part = part.to(machine.device)
            context = Context(part.tokens, part.row_seeds)
            x = model.embed(context)
            dense_x, _ = model.run(x, "full", context)
            for mode in modes:
                routed_x, routes = (dense_x, []) if mode == "full" else model.run(x, mode, context)
                totals[mode] += model.compare(routed_x, dense_x, part.targets).cpu()
                full[mode].append([r.mask.float().sum().item() for r in routes])
    n, results = batch.targets.numel(), {}
    for mode in modes:
        loss, kl, agreement = (totals[mode] / n).tolist()
        results[mode] = {"loss": loss, "budget": [sum(layer) / n for layer in zip(*full[mode])], "kl": kl,
                         "agreement": agreement}
    return results


def evaluate_modes(model, config, machine, batch):
    """evaluate(...) under each mode of this kind of run, and the dense model beside it. `topk` ranks inside the
    sequence, so its loss is not causal."""
    modes = ["topk", "threshold"] if config["mode"] == "topk" else [config["mode"]]
    return evaluate(model, batch, list(dict.fromkeys([*modes, "full"])), machine)


def calibrate(model, batch, machine):
    """Set the thresholds on a batch of training text."""
    batch = batch.to(machine.device)
    with machine.autocast():
        model.calibrate(Context(batch.tokens, batch.row_seeds),
                        watch=lambda layers: progress(layers, "calibrating, layer"))


@torch.no_grad()
def predictors_health(model, config, machine, batch, rows=16):
    """{layer: predictor_health} on a few rows, for a gate that predicts."""
    if config["mode"] != "topk" or not GATES[config["gate"]].predicts:
        return {}
    part = batch.rows(slice(rows)).to(machine.device)
    context = Context(part.tokens, part.row_seeds)
    with machine.autocast():
        _, routes = model.run(model.embed(context), "topk", context, want_outcomes=True)
    return {r.layer: predictor_health(r.prediction.flatten(0, 1), r.outcomes.flatten(0, 1)) for r in routes}


def warnings_of(results, health, budgets):
    """What a user should know of an evaluation, in words: a realised budget far from the asked one, a predictor
    that has collapsed. budgets: what was asked of each layer."""
    lines = []
    if "threshold" in results:
        asked, realised = (sum(shares) / len(shares) for shares in (budgets, results["threshold"]["budget"]))
        if abs(asked - realised) > 0.1:
            lines.append(f"the realised budget is {realised:.2f} where {asked:.2f} was asked: this text is unlike "
                         "the training text that set the thresholds")
    collapsed = [layer for layer, values in health.items() if values["collapsed"]]
    if collapsed:
        lines.append(f"the predictors of layers {collapsed} have collapsed: they say the same of full and cheap, "
                     "or of all tokens")
    return lines


def describe(results):
    """The results of `evaluate` in words."""
    parts = []
    for mode, result in results.items():
        words = f"{result['loss']:.4f} under {mode}"
        if mode == "topk":
            words += " (not causal)"
        elif mode != "full":
            words += f" (KL {result['kl']:.3f}, {result['agreement']:.0%} as the dense model)"
        parts.append(words)
    return ", ".join(parts)


# -----------------------------------------------------------------------------
# the gap

def causal(results):
    """{mode: value} -> the value under the mode that can generate."""
    return next(value for mode, value in results.items() if mode != "topk")


def gap_closed(loss, cheap, dense):
    """The part of the distance from all-cheap to dense that a loss has covered."""
    return (cheap - loss) / (cheap - dense)


def first_hits(curve, cheap, dense):
    """curve [(step, loss)] -> {level: the step of the first evaluation with that much of the gap closed, or
    None}."""
    hits = {}
    for level in HIT_LEVELS:
        reached = [step for step, loss in curve if gap_closed(loss, cheap, dense) >= level]
        hits[level] = reached[0] if reached else None
    return hits


# -----------------------------------------------------------------------------
# the FLOPs ledger: 2 FLOPs per multiply-add, attention as T^2

def ledger_of(config, model_config):
    """The ledger of a config, by a model that has shapes and no weights."""
    with torch.device("meta"):
        model = GPT(model_config)
    return ledger(model, config)


def ledger(model, config):
    """What a run of this config costs per token at T = block_size, label passes and dense forwards included.

    Returns {"train": {item: (forward, backward)}, "inference": {item: forward}, "forward", "backward",
    "inference_flops", "dense_forward": their sums and those of a full-only forward, and three ratios:
    forward_proxy (what training executes forward over a full-only forward, the paper's reading), train_ratio
    (over a dense training step) and inference_ratio}."""
    c, costs = model.config, unit_costs(model.config)
    dense_forward = c.n_layer * (costs["attention"] + costs["full"]) + costs["head"]
    train, inference = {}, {}
    for block in model.h:
        add_items(train, layer_training(block, config, costs, c))
        add_items(inference, {k: (f, 0.0) for k, f in layer_inference(block, config["mode"], costs).items()})
    trained = 2 if config["mode"] == "full" else 1
    streams = [name for name in ("lm", "distill") if name in active_losses(config)]
    add_items(train, {"lm_head": (len(streams) * costs["head"], len(streams) * trained * costs["head"])})
    add_items(inference, {"lm_head": (costs["head"], 0.0)})
    add_items(train, supervision(model, config, costs))
    forward = sum(f for f, _ in train.values())
    backward = sum(b for _, b in train.values())
    served = sum(f for f, _ in inference.values())
    return {"train": train, "inference": {k: f for k, (f, _) in inference.items()}, "forward": forward,
            "backward": backward, "forward_proxy": forward / dense_forward,
            "train_ratio": (forward + backward) / (3 * dense_forward), "inference_flops": served,
            "inference_ratio": served / dense_forward, "dense_forward": dense_forward}


def unit_costs(c):
    """The forward FLOPs per token of one piece of one layer, and of the head."""
    keys = c.n_kv_head * c.n_embd // c.n_head  # the width of the keys, and of the values
    linear = 2 * c.n_embd * (2 * c.n_embd + 2 * keys)
    products = 4 * c.block_size * c.n_embd  # q @ k and p @ v
    matrices = 3 if c.activation == "swiglu" else 2
    return {"linear": linear, "products": products, "attention": linear + products,
            "full": 2 * matrices * c.n_embd * c.n_inner, "cheap": 4 * c.n_embd * c.cheap_rank,
            "head": 2 * c.n_embd * c.vocab_size}


def add_items(table, items):
    for name, (forward, backward) in items.items():
        f, b = table.get(name, (0.0, 0.0))
        table[name] = (f + forward, b + backward)


def layer_training(block, config, costs, c):
    """{item: (forward, backward)} of one layer in a training step, as Block.gathered and Block.masked run
    it."""
    mode, jepa = config["mode"], "jepa" in active_losses(config)
    # No gradient is needed below the first controlled layer, and none of frozen weights: backward costs 1x,
    # not 2x.
    grad = 2 if mode == "full" else int(bool(c.controlled) and block.layer > c.controlled[0])
    items = {"attention": (costs["attention"], grad * costs["linear"] + 2 * costs["products"] * (grad > 0))}
    if not block.controlled or mode == "full":
        items["full"] = (costs["full"], grad * costs["full"])
        return items
    routed, masked = mode == "topk", c.execution == "masked"
    share = block.budget if routed else float(mode == "adapter")
    full_back = 1.0 if routed and masked else share
    both = routed and (jepa or block.estimator.reads_both)
    cheap_back = 1.0
    if routed and not (masked or both or block.estimator.mixes):
        cheap_back = 1 - share
    cheap_grad = 2 if grad else 1.5  # the first controlled layer's h needs no gradient
    full_forward = 1.0 if both else full_back
    cheap_forward = 1.0 if both else cheap_back
    items["full"] = (full_forward * costs["full"], full_back * grad * costs["full"])
    items["cheap"] = (cheap_forward * costs["cheap"], cheap_back * cheap_grad * costs["cheap"])
    if routed:
        for item, (forward, backward) in gate_costs(block.gate, c).items():
            if item != "target_head" or jepa:
                items[item] = (forward, backward)
    return items


def gate_costs(gate, c):
    """{item: (forward, backward)} of a gate for one token, by PyTorch's counter. h is detached: no gradient
    there."""
    tensors = [*gate.parameters(), *gate.buffers()]
    device = tensors[0].device if tensors else "cpu"
    h = torch.zeros(1, 1, c.n_embd, device=device)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    trained = [p for p in gate.parameters() if p.requires_grad]
    with FlopCounterMode(display=False) as forward:
        scores, _ = gate(h, Context(token, token[0]))
    with FlopCounterMode(display=False) as backward:
        if scores.requires_grad:
            torch.autograd.grad(scores.sum(), trained, allow_unused=True)
    items = {"gate": (forward.get_total_flops(), backward.get_total_flops())}
    if gate.predicts:
        items["target_head"] = (4 * gate.target_head.numel(), 0)
    return items


def layer_inference(block, mode, costs, masked=False):
    """{item: forward} of one layer without gradients; gathered, unless it is said to be masked."""
    items = {"attention": costs["attention"], "full": costs["full"]}
    if not block.controlled or mode == "full":
        return items
    routed = mode in ("topk", "threshold")
    share = block.budget if routed else float(mode == "adapter")
    items["full"] = share * costs["full"]
    items["cheap"] = (1 - share if routed and not block.estimator.mixes else 1.0) * costs["cheap"]
    if routed and masked:
        items["full"], items["cheap"] = costs["full"], costs["cheap"]
    if routed:
        items["gate"] = gate_costs(block.gate, block.config)["gate"][0]
    return items


def supervision(model, config, costs):
    """{item: (forward, 0)} of the passes that teach: the dense model's forward, and the labels' branches."""
    items, losses = {}, active_losses(config)
    teaching = [name for name in losses if losses[name].needs == "labels"]
    to_dense = bool(teaching) and config["label_target"] == "dense"
    if to_dense or "distill" in losses:
        layers = model.config.n_layer - model.config.controlled[0]  # the routed forward shares those before
        forward = layers * (costs["attention"] + costs["full"])
        items["dense"] = (forward + ("distill" in losses) * costs["head"], 0.0)
    if teaching:
        label, masked = LABELS[config["oracle"]], model.config.execution == "masked"  # the branches run masked too
        served = [sum(layer_inference(block, label.suffix, costs, masked).values()) if label.suffix else 0.0
                  for block in model.h]
        passes = [label_pass(label, sum(served[layer + 1:]), to_dense, costs)
                  for layer in model.config.controlled]
        each = sum(passes) / len(passes)  # of the layer that is drawn
        layers = min(config["label_layers"], len(passes))
        items["labels"] = (each * layers * config["label_share"], 0.0)
    return items


def label_pass(label, behind, to_dense, costs):
    """The FLOPs of a label of one layer: both branches, from its FFN to the loss. behind: those of one branch in
    the layers after it."""
    total = costs["full"] + costs["cheap"]
    if label.suffix is None:
        return total
    return total + (2 + to_dense) * costs["head"] + 2 * behind
