"""What is measured of a model besides its loss: FLOPs, gradient norms, the health of scores and predictors,
and how much of the gap between all-cheap and dense a run closes. Nothing here trains anything."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gates import GATES, LABELS, TARGETS, Context, active_losses, standardise

DEAD = 0.01  # a gate whose mean p (1 - p) is below this has a flat sigmoid: the LM loss teaches it nothing
HIT_LEVELS = (0.25, 0.5, 0.75, 0.9)


# -----------------------------------------------------------------------------
# one training step

class StepRecord:
    """What a training step says of itself: its losses, and on a logged step gradient norms, realised budgets
    and the health of the scores. Means over the slices of the batch and over all processes."""

    def __init__(self, model, config, machine, logged):
        self.config, self.logged, self.machine = config, logged, machine
        self.slices = config["gradient_accumulation_steps"] * machine.processes
        self.sums = {}  # name -> the sum over slices of a tensor
        self.gate = []
        if config["mode"] == "topk":
            self.gate = [p for n, p in model.named_parameters() if ".gate." in n and p.requires_grad]
        self.layers = len(model.config.controlled)

    def add(self, name, value):
        value = torch.as_tensor(value, device=self.machine.device).detach().float() / self.slices
        self.sums[name] = self.sums.get(name, 0) + value

    def before_backward(self, step, losses):
        for name, loss in losses.items():
            self.add(name, loss)
        if not self.logged:
            return
        if "lm" not in losses:  # nothing trains on it, and a reader wants to see it
            self.add("lm", step.model.token_losses([step.x], step.targets)[0].mean())
        if step.routes:
            self.add("budget", torch.stack([r.mask.float().mean() for r in step.routes]))
        if self.gate:
            estimators = [step.model.h[r.layer].estimator for r in step.routes]
            health = [score_health(r.scores, estimator) for r, estimator in zip(step.routes, estimators)]
            self.add("health", torch.stack(health))
        if step.labels:
            correlations = [spearman(label.scores.detach(), label.raw) for label in step.labels]
            self.add("label_correlation", sum(correlations) / len(correlations))
        for route in step.routes:
            if route.scores.requires_grad:
                route.scores.retain_grad()
        if "jepa" in losses:
            loss = self.config["lambda_jepa"] * losses["jepa"]
            grads = torch.autograd.grad(loss, self.gate, retain_graph=True, allow_unused=True)
            self.add("jepa_gradient", flatten(grads, self.gate))

    def after_backward(self, step):
        if self.logged:
            grads = [r.scores.grad for r in step.routes if r.scores.grad is not None]
            self.add("score_gradient", self.slices * sum(g.square().sum() for g in grads))

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
        values["grad_norm"] = {"all": norm(every), "scores": scores.sqrt()}
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


def norm(tensors):
    return torch.stack([t.norm() for t in tensors]).norm()


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
def predictor_health(prediction, target):
    """Is G3's predictor alive? prediction, target (N, 2, d) -> dict. R^2 is on unit vectors, against the mean
    target of each action and against the action-blind prediction (the mean of both predictions). Collapsed:
    R^2 over action-blind <= 0, or the effective rank (the exponential of the spectrum's entropy) < 2."""
    prediction = prediction.float()
    unit, aim = F.normalize(prediction, dim=-1), F.normalize(target, dim=-1)
    present = (target.square().sum(-1, keepdim=True) > 0).float()  # (N, 2, 1)
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

@torch.no_grad()
def evaluate(model, batch, mode, machine):
    """The mean loss over a batch (N, T), and the realised budget of each controlled layer."""
    total, full, rows = 0.0, [], max(1, 8192 // batch.tokens.size(1))
    with machine.autocast():
        for i in range(0, len(batch.tokens), rows):
            part = batch.rows(slice(i, i + rows)).to(machine.device)
            context = Context(part.tokens, part.row_seeds)
            x, routes = model.run(model.embed(context), mode, context)
            total += model.token_losses([x], part.targets)[0].sum().item()
            full.append([r.mask.float().sum().item() for r in routes])
    n = batch.targets.numel()
    return total / n, [sum(layer) / n for layer in zip(*full)]


def evaluate_modes(model, config, machine, batch, calibration=None):
    """{mode: loss} and {mode: realised budgets} under each mode of this kind of run. calibration: the
    training rows that set the thresholds first. `topk` ranks inside the sequence, so its loss is not
    causal."""
    modes = ["topk", "threshold"] if config["mode"] == "topk" else [config["mode"]]
    if calibration and "threshold" in modes:
        rows = calibration.to(machine.device)
        with machine.autocast():
            model.calibrate(Context(rows.tokens, rows.row_seeds))
    results = {mode: evaluate(model, batch, mode, machine) for mode in modes}
    losses = {mode: loss for mode, (loss, _) in results.items()}
    return losses, {mode: budgets for mode, (_, budgets) in results.items() if budgets}


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


# -----------------------------------------------------------------------------
# budgets

@torch.no_grad()
def allocate(model, config, machine, batch):
    """Hand out config["budget"] * (number of controlled layers) in portions of config["share_step"], each to
    the layer where it lowers the loss on this batch most; a layer holds 1 at most. Sets every layer's
    budget."""
    blocks = [model.h[i] for i in model.config.controlled]
    for block in blocks:
        block.budget = 0.0
    left = config["budget"] * len(blocks)
    while left > 1e-9:
        losses = {}
        for block in blocks:
            if block.budget < 1:
                before = block.budget
                block.budget = min(1.0, before + min(config["share_step"], left))
                losses[block], _ = evaluate(model, batch, "topk", machine)
                block.budget = before
        best = min(losses, key=losses.get)
        portion = min(config["share_step"], left, 1 - best.budget)
        best.budget += portion
        left -= portion
    budgets = [round(block.budget, 3) for block in blocks]
    machine.print(f"budgets of the controlled layers, chosen on training text: {budgets}")


def set_budget(model, budget):
    """Give the controlled layers budgets whose mean is `budget`, keeping their order."""
    blocks = [model.h[i] for i in model.config.controlled]
    mean = sum(block.budget for block in blocks) / len(blocks)
    for block in blocks:
        if budget < mean:
            block.budget = block.budget * budget / mean
        else:
            block.budget = 1 - (1 - block.budget) * (1 - budget) / max(1 - mean, 1e-12)


# -----------------------------------------------------------------------------
# the gap

def causal(losses):
    """{mode: loss} -> the loss under the mode that can generate."""
    return next(loss for mode, loss in losses.items() if mode != "topk")


def describe_losses(losses):
    return ", ".join(f"{loss:.4f} under {mode}" + (" (not causal)" if mode == "topk" else "")
                     for mode, loss in losses.items())


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

def ledger(model, config):
    """What a run of this config costs per token at T = block_size, label passes and dense forwards included.

    Returns {"train": {item: (forward, backward)}, "inference": {item: forward}, "forward", "backward",
    "inference_flops", "dense_forward": their sums and those of a full-only forward, and three ratios:
    forward_proxy (what training executes forward over a full-only forward, the paper's reading), train_ratio
    (over a dense training step) and inference_ratio; "causal_attention": attention with half of the T^2}."""
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
            "inference_ratio": served / dense_forward, "dense_forward": dense_forward,
            "causal_attention": c.n_layer * (costs["attention"] - costs["products"] / 2)}


def unit_costs(c):
    """The forward FLOPs per token of one piece of one layer, and of the head."""
    linear = 8 * c.n_embd ** 2
    products = 4 * c.block_size * c.n_embd  # q @ k and p @ v
    return {"linear": linear, "products": products, "attention": linear + products,
            "full": 16 * c.n_embd ** 2, "cheap": 4 * c.n_embd * c.cheap_rank,
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
        if trained:
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
    to_dense = bool(teaching) and TARGETS[config["label_target"]].needs_dense
    share = 1.0 if "distill" in losses else config["label_share"] if to_dense else 0.0
    if share:
        layers = model.config.n_layer - model.config.controlled[0]  # the routed forward shares those before
        forward = layers * (costs["attention"] + costs["full"])
        items["dense"] = (share * forward + ("distill" in losses) * costs["head"], 0.0)
    if teaching:
        label = LABELS[config["oracle"]]
        passes = [label_pass(model, label, layer, to_dense, costs) for layer in model.config.controlled]
        each = sum(passes) / len(passes)  # of the layer that is drawn
        layers = min(config["label_layers"], len(passes))
        items["labels"] = (each * layers * config["label_share"], 0.0)
    return items


def label_pass(model, label, layer, to_dense, costs):
    """The FLOPs of a label of one layer: both branches, from its FFN to the loss."""
    total = costs["full"] + costs["cheap"]
    if label.suffix is None:
        return total
    total += (2 + to_dense) * costs["head"]
    masked = model.config.execution == "masked"  # then the label's branches run masked too
    for block in model.h[layer + 1:]:
        total += 2 * sum(layer_inference(block, label.suffix, costs, masked).values())
    return total
