"""A GPT-2 decoder in which each controlled layer routes every token through a full or a cheap FFN.

Module names are nanoGPT's and GPT-2's (wte, wpe, h, ln_1, attn.c_attn, mlp.c_fc, ...), so weights move freely.
How a forward pass executes is a `mode`:
  full       the dense model: every FFN full, no controller runs
  cheap      every controlled FFN cheap
  adapter    full and cheap added up: the dense reference with the same trainable cheap parameters
  topk       the budget's best tokens of each row go full; ranks inside the row, so it is NOT causal
  threshold  a token goes full iff its score exceeds the layer's threshold: causal, what decoding uses
  calibrate  sets each layer's threshold to the pooled quantile of its scores, then routes by it
and `gathered` says whether both FFNs run on all tokens (masked) or each on its own tokens (the fast one).
"""
import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gates import GATES, Route, route_weight, split_topk, full_tokens, threshold_for, uniform

ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh"}  # named as Hugging Face names them; on a CPU in bfloat16 tanh takes 4x as long


@dataclass
class GPTConfig:
    block_size: int = 128  # T, the longest context
    vocab_size: int = 257  # V
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 128  # D
    controlled: tuple = ()  # the layers that route, from 0; none is a plain dense model
    cheap_rank: int = 16  # r
    activation: str = "gelu"  # exact, as nanoGPT's; GPT-2's own is gelu_new
    gate: str = "g3"
    estimator: str = "ste"
    budget: float = 0.5
    g1_hidden: int = 47
    latent: int = 16  # g3's d


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D/H)
        start = 0
        if cache is not None:
            start = cache.position
            k, v = cache.extend(k, v)  # (B, H, start + T, D/H)
        mask = None
        if start and T > 1:  # a chunk behind a cache sees the cache and itself causally
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cpu" and q.dtype == torch.bfloat16 and mask is None and 1 < T <= 256:
                # Written out, because on a CPU the fused kernel is slow here: forward and backward 21 ms in bfloat16 and
                # 9 in float32 against 5 at (16, 4, 128, 32); at T = 1024 the fused one wins.
                future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
                y = (q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1) + future).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class FFN(nn.Module):
    """D -> hidden -> D. The full one has hidden = 4D, the cheap one hidden = r."""

    def __init__(self, config, hidden):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, hidden)
        self.c_proj = nn.Linear(hidden, config.n_embd)
        self.approximate = ACTIVATIONS[config.activation]

    def forward(self, h):
        return self.c_proj(F.gelu(self.c_fc(h), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.estimator, self.budget = layer, config.estimator, config.budget
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = FFN(config, 4 * config.n_embd)
        self.controlled = layer in config.controlled
        if self.controlled:
            self.cheap = FFN(config, config.cheap_rank)
            self.gate = GATES[config.gate](config, layer)
            self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, x, mode, keys=None, gathered=True, keep=False, align=False, cache=None):
        """x (B, T, D) -> x (B, T, D) and the Route, which is None where nothing was decided."""
        start = cache.position if cache is not None else 0
        x = x + self.attn(self.ln_1(x), cache)
        h = self.ln_2(x)
        if not self.controlled or mode == "full":
            return x + self.mlp(h), None
        if mode == "cheap":
            return x + self.cheap(h), None
        if mode == "adapter":
            return x + self.mlp(h) + self.cheap(h), None

        with torch.autocast(h.device.type, enabled=False):  # scores are float32, whatever the dtype around them
            scores, prediction = self.gate(h.detach().float(), lambda: uniform(keys, self.layer, h.size(1), start))
            scores = scores.float()  # (B, T)
        if mode == "topk":
            chosen, rest = split_topk(scores.detach(), full_tokens(self.budget, scores.size(1)))
            mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
            rows = torch.arange(len(x), device=x.device)[:, None] * x.size(1)
            order, n = torch.cat([(chosen + rows).flatten(), (rest + rows).flatten()]), chosen.numel()  # counts are known: no host sync
        else:
            if mode == "calibrate":
                self.threshold.copy_(threshold_for(scores, self.budget))
            mask = scores.detach() > self.threshold
            chosen = mask.flatten().nonzero().squeeze(1)
            order, n = torch.cat([chosen, (~mask).flatten().nonzero().squeeze(1)]), len(chosen)
        w = route_weight(scores, mask, self.estimator, self.gate.learned).unsqueeze(-1).to(x.dtype)  # (B, T, 1)

        align = align and self.gate.predicts
        if gathered:
            x_out, target = self.gathered_ffn(x, h, w, order, n, align)
        else:
            full, cheap = self.mlp(h), self.cheap(h)  # (B, T, D)
            x_out = x + (w * full + (1 - w) * cheap)
            target = self.gate.target(full, cheap) if align else None  # (B, T, 2, d)
        return x_out, Route(self.layer, scores, mask, prediction, target, *((x, h) if keep else (None, None)))

    def gathered_ffn(self, x, h, w, order, n, align):
        """x + w * full(h) + (1 - w) * cheap(h) without what nobody reads -> (B, T, D), target. order: the tokens of B * T, the
        n that go full first. Off its own tokens a path has weight 0 and no gradient, so it runs there only for its value:
                                        full of the rest     cheap of the chosen
            evaluation, unlearned gates, hard     -                    -
            ste, ste_norm in training         no graph             no graph      the gradient of w reads both
            scaled                                -                  graph       1 - w is not 0 there
            align                             no graph             no graph      the target reads both
        """
        scaled = self.estimator == "scaled" and self.gate.learned
        if len(order) == 1 and not torch.is_grad_enabled():  # a token in decoding: nothing to gather
            full = self.mlp(h) if n else None
            return x + (w * full + (1 - w) * self.cheap(h) if n and scaled else full if n else self.cheap(h)), None
        soft = w.requires_grad and not scaled
        (h1, h2), (w1, w2) = (t.flatten(0, 1)[order].tensor_split((n,)) for t in (h, w))  # (n, D), (B * T - n, D); (n, 1), ...
        full, cheap = self.mlp(h1), self.cheap(h2)
        if scaled or soft or align:
            with torch.set_grad_enabled(scaled and torch.is_grad_enabled()):
                cheap_of_chosen = self.cheap(h1)
        if soft or align:
            with torch.no_grad():
                full_of_rest = self.mlp(h2)
        out = torch.cat([w1 * full + (1 - w1) * cheap_of_chosen if scaled or soft else full.to(x.dtype),
                         w2 * full_of_rest + (1 - w2) * cheap if soft else cheap.to(x.dtype)])
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=x.device))
        target = None
        if align:
            both = torch.cat([full, full_of_rest]), torch.cat([cheap_of_chosen, cheap])  # (B * T, D) twice
            target = self.gate.target(*(t[back].view_as(h) for t in both))  # (B, T, 2, d)
        return x + out[back].view_as(x), target


class Cache:
    """Keys and values of one sequence in the making, (n_layer, 2, B, H, block_size, D/H)."""

    def __init__(self, config, batch, device, dtype):
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.kv, self.position, self.layer = torch.zeros(shape, device=device, dtype=dtype), 0, 0

    def extend(self, k, v):
        end = self.position + k.size(2)
        kv = self.kv[self.layer]
        kv[0, :, :, self.position:end], kv[1, :, :, self.position:end] = k, v
        return kv[0, :, :, :end].to(k.dtype), kv[1, :, :, :end].to(v.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of x @ weight.T in chunks of rows: the logits of a 50k vocabulary never exist at once,
    and the gradient is taken while a chunk's logits do."""

    @staticmethod
    def forward(ctx, x, weight, targets, rows):
        dx, dw, total = torch.empty_like(x), torch.zeros_like(weight) if ctx.needs_input_grad[1] else None, 0.0
        if torch.is_autocast_enabled(x.device.type):
            weight = weight.to(torch.get_autocast_dtype(x.device.type))  # once, not once a chunk
        for i in range(0, len(x), rows):
            chunk = x[i:i + rows].to(weight.dtype)
            logits, target = F.linear(chunk, weight), targets[i:i + rows, None]
            p = logits.softmax(-1, dtype=torch.float32)
            # The largest probability is 1 / sum(exp(logits - max)), so it gives the loss without a second pass of exponentials.
            total += (logits.amax(-1).float() - p.amax(-1).log() - logits.gather(1, target).squeeze(1).float()).sum()
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            p = p.to(weight.dtype)
            dx[i:i + rows] = p @ weight
            if dw is not None:
                dw += p.t() @ chunk
        ctx.save_for_backward(dx.div_(len(x)), dw if dw is None else dw.div_(len(x)))
        return total / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return grad * dx, None if dw is None else grad * dw, None, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if ".gate." in name:
                continue  # a gate initialises itself
            if name.endswith("cheap.c_proj.weight") or name.endswith("bias"):
                nn.init.zeros_(p)  # cheap starts at zero
            elif p.dim() == 2:
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / scale)

    def embed(self, idx, start=0):
        """idx (B, T) int64 -> x (B, T, D)"""
        positions = torch.arange(start, start + idx.size(1), device=idx.device)
        return self.wte(idx).float() + self.wpe(positions)  # the residual stream is float32

    def blocks(self, x, mode, keys=None, gathered=True, first=0, last=None, keep=(), align=False, cache=None):
        """Run layers first..last on x (B, T, D) -> x, [Route of each layer that decided]. keys (B,) int64 seed
        the noise of random gates, one a row; the Routes of the layers in `keep` hold x and h; with `align`
        a predicting gate's Route holds its target."""
        if keys is None:
            keys = torch.arange(x.size(0), device=x.device)
        routes = []
        for i in range(first, self.config.n_layer if last is None else last + 1):
            if cache is not None:
                cache.layer = i
            x, route = self.h[i](x, mode, keys, gathered, i in keep, align, cache)
            if route is not None:
                routes.append(route)
        if cache is not None:
            cache.position += x.size(1)
        return x, routes

    def forward(self, idx, mode="full", keys=None, gathered=True, cache=None):
        """idx (B, T) int64 -> logits (B, T, V), routes. With a cache, idx continues what the cache holds."""
        x, routes = self.blocks(self.embed(idx, cache.position if cache is not None else 0), mode, keys, gathered, cache=cache)
        return F.linear(self.ln_f(x), self.wte.weight), routes

    def lm_loss(self, x, targets):
        """x (B, T, D) after the last layer, targets (B, T) -> the mean cross entropy, float32, differentiable."""
        # Small chunks stay in the cache, but a trained head adds its whole gradient up at every chunk: 5.8 s with 166 rows,
        # 4.4 s with 1024; a frozen one 2.1 and 2.7 s (4096 x 768 x 50257, bfloat16, 2 cores).
        rows = max(64, 2 ** (26 if self.wte.weight.requires_grad else 23) // self.config.vocab_size)
        return LinearCrossEntropy.apply(self.ln_f(x).flatten(0, 1), self.wte.weight, targets.flatten(), rows)

    @torch.no_grad()
    def token_losses(self, x, targets):
        """x (B, T, D) after the last layer, targets (B, T) -> the cross entropy of each token (B, T), float32."""
        x, flat = self.ln_f(x).flatten(0, 1), targets.flatten()
        rows = max(64, 2 ** 23 // self.config.vocab_size)
        return torch.cat([F.cross_entropy(F.linear(x[i:i + rows], self.wte.weight).float(), flat[i:i + rows], reduction="none")
                          for i in range(0, len(x), rows)]).view_as(targets)

    def controllers(self):
        """{name: parameter} of what a controller-only run trains: gates with their predictors, and cheap FFNs."""
        return {n: p for n, p in self.named_parameters() if ".gate." in n or ".cheap." in n}

    def backbone(self):
        """{name: parameter} of the dense model, without controllers."""
        return {n: p for n, p in self.named_parameters() if not (".gate." in n or ".cheap." in n)}

    def set_budget(self, budget):
        """Give the controlled layers shares of full tokens whose mean is `budget`, keeping their order."""
        blocks = [self.h[i] for i in self.config.controlled]
        mean = sum(b.budget for b in blocks) / len(blocks)
        for b in blocks:
            b.budget = b.budget * budget / mean if budget < mean else 1 - (1 - b.budget) * (1 - budget) / max(1 - mean, 1e-12)

    @torch.no_grad()
    def calibrate(self, idx, keys=None):
        """Set every layer's threshold from one forward over idx (B, T): a layer's before that layer routes."""
        self.blocks(self.embed(idx), "calibrate", keys)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, mode="threshold", temperature=0.8, top_k=200, generator=None):
        """idx (1, T) -> yields (token id, [did each controlled layer run full]) for every token that was read,
        the prompt's first. Past block_size it goes on from the last half of the context."""
        device, dtype = idx.device, self.wte.weight.dtype
        cache, tokens, fed = Cache(self.config, 1, device, dtype), idx, idx
        for n in range(max_new_tokens + 1):
            fresh = fed.size(1)
            if cache.position + fresh > self.config.block_size:
                cache, fed = Cache(self.config, 1, device, dtype), tokens[:, -(self.config.block_size // 2):]
                fresh = min(fresh, fed.size(1))  # a prompt longer than block_size
            logits, routes = self(fed, mode, cache=cache, keys=torch.zeros(1, dtype=torch.int64, device=device))
            masks = torch.stack([r.mask[0, -fresh:] for r in routes], 1).tolist() if routes else [[]] * fresh
            yield from zip(tokens[0, -fresh:].tolist(), masks)
            if n == max_new_tokens:
                return
            logits = logits[0, -1].float()
            if temperature > 0:
                logits = logits / temperature
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
                fed = torch.multinomial(logits.softmax(-1), 1, generator=generator)[None]
            else:
                fed = logits.argmax()[None, None]
            tokens = torch.cat([tokens, fed], 1)


# -----------------------------------------------------------------------------
# weights from Hugging Face

def load_gpt2(model, source):
    """Copy GPT-2 weights (a Hugging Face folder, or a hub name) into `model`'s backbone. Raises ValueError, with
    a one-line reason, when they are missing or of another shape. Logits then equal `transformers`'."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    config, path = gpt2_source(source)
    mine = {"n_layer": model.config.n_layer, "n_head": model.config.n_head, "n_embd": model.config.n_embd,
            "n_positions": model.config.block_size, "vocab_size": model.config.vocab_size}
    other = {k: config.get(k) for k, v in mine.items() if config.get(k) != v and not (k == "n_positions" and config.get(k, 0) >= v)}
    if other:
        raise ValueError(f"{source} is of another shape: it has {other}, the config asks {({k: mine[k] for k in other})}")
    theirs = config.get("activation_function", "gelu_new")
    if theirs != model.config.activation:
        raise ValueError(f"{source} has the nonlinearity {theirs!r}, the config {model.config.activation!r}; "
                         + (f"give --activation={theirs}" if theirs in ACTIVATIONS else f"known are {', '.join(ACTIVATIONS)}"))
    try:
        weights = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    found = {}
    for name, p in model.backbone().items():
        w = weights.get(name, torch.empty(0))
        w = w.t() if name.startswith("h.") and w.dim() == 2 else w  # GPT-2's Conv1D holds (in, out)
        found[name] = w[:p.size(0)] if name == "wpe.weight" else w
        if found[name].shape != p.shape:
            raise ValueError(f"{path}: {name} is missing or of another shape, {tuple(w.shape)} instead of {tuple(p.shape)}")
    with torch.no_grad():
        for name, p in model.backbone().items():
            p.copy_(found[name])


def gpt2_source(source):
    """A folder or a hub name -> (its config.json as a dict, the path of its safetensors file)."""
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download
        try:
            source = snapshot_download(source, allow_patterns=["config.json", "model.safetensors"])
        except Exception as error:
            raise ValueError(f"no folder {source!r}, and the hub did not give it ({type(error).__name__}); "
                             "name a folder with config.json and model.safetensors") from None
    try:
        with open(os.path.join(source, "config.json")) as f:
            config = json.load(f)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}/config.json cannot be read ({error})") from None
    path = os.path.join(source, "model.safetensors")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing")
    return config, path


# -----------------------------------------------------------------------------
# the FLOPs ledger

def ledger(model, mode, gathered=True, label=None, jepa=False):
    """FLOPs per token at T = block_size, itemised (2 per multiply-add; attention counted as T^2, `causal_attention`
    beside it). mode `dense` trains everything, the others the controllers alone. gathered: what a training step runs
    (Block.gathered_ffn), or else masked: both paths forward and backward on every token. label: None, or (oracle, layers
    a step, share of the batch). jepa: the loss that reads both outcomes. Returns {train: {item: (forward, backward)}, inference: {item: forward}, and totals
    with the two ratios: forward_proxy (what training executes forward over a full-only forward, the paper's reading)
    and train_ratio (over a dense training step)}."""
    c = model.config
    D, T, V, r, L, C = c.n_embd, c.block_size, c.vocab_size, c.cheap_rank, c.n_layer, list(c.controlled)
    linear, scores, full, cheap, head = 8 * D * D, 4 * T * D, 16 * D * D, 4 * D * r, 2 * D * V
    dense_forward = L * (linear + scores + full) + head
    items, inference = {}, {}

    def add(item, forward, backward=0.0, table=items):
        f, b = table.get(item, (0.0, 0.0))
        table[item] = (f + forward, b + backward)

    routed = mode in ("topk", "threshold")
    learned = bool(C) and model.h[C[0]].gate.learned
    scaled = c.estimator == "scaled" and learned
    both = jepa or learned and c.estimator in ("ste", "ste_norm")  # who reads the path not taken: the target, and the gradient of w under `ste`
    for i in range(L):
        # No gradient is needed below the first controlled layer, and none of frozen weights: backward costs 1x, not 2x.
        grad = 2 if mode == "dense" else 1 if C and i > C[0] else 0
        add("attention", linear + scores, grad * linear + 2 * scores * (grad > 0))
        add("attention", linear + scores, table=inference)
        if i not in C or mode in ("dense", "full"):
            add("full", full, grad * full)
            add("full", full, table=inference)
            continue
        share = model.h[i].budget if routed else float(mode == "adapter")
        full_back = 1.0 if routed and not gathered else share
        cheap_back = 1 - share if routed and gathered and not scaled else 1.0
        add("full", (1.0 if routed and both else full_back) * full, full_back * grad * full)
        add("cheap", (1.0 if routed and both else cheap_back) * cheap, cheap_back * (2 if grad else 1.5) * cheap)  # the first h needs no gradient
        add("full", share * full, table=inference)
        add("cheap", cheap * (1 - share if routed and not scaled else 1.0), table=inference)
        if routed:
            for item, (forward, backward) in model.h[i].gate.flops().items():
                if item != "target_head" or jepa:
                    add(item, forward, backward)
                if item != "target_head":
                    add(item, forward, table=inference)
    add("lm_head", head, head * (2 if mode == "dense" else 1))
    add("lm_head", head, table=inference)
    if label:
        oracle, layers, part = label
        suffix = 0.0
        for l in C:  # both branches, from l + 1 to the loss, averaged over the layer that is drawn
            suffix += full + cheap + 2 * head
            for i in range(l + 1, L):
                ffn = full
                if i in C and oracle == "on_policy":  # routed and gathered, its gate included
                    share = model.h[i].budget
                    ffn = share * full + (1.0 if scaled else 1 - share) * cheap + sum(
                        f for item, (f, _) in model.h[i].gate.flops().items() if item != "target_head")
                suffix += 2 * (linear + scores + ffn)
        add("labels", suffix / len(C) * layers * part)
    forward, backward = (sum(x[j] for x in items.values()) for j in (0, 1))
    served = sum(f for f, _ in inference.values())
    return {"train": items, "inference": {k: f for k, (f, _) in inference.items()}, "forward": forward, "backward": backward,
            "forward_proxy": forward / dense_forward, "train_ratio": (forward + backward) / (3 * dense_forward),
            "inference_flops": served, "inference_ratio": served / dense_forward, "dense_forward": dense_forward,
            "causal_attention": L * (linear + scores / 2)}
