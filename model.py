"""A decoder in which each controlled layer routes every token through a full or a cheap FFN.

Two families of one block: GPT-2's (LayerNorm, learned positions, GELU, biases) and Llama's (RMSNorm, rotary
positions, SwiGLU, several query heads to a key head, no biases). The fields `norm`, `positions`, `activation`,
`n_kv_head`, `bias` and `tied_head` of GPTConfig tell them apart. Module names are nanoGPT's (wte, h, ln_1,
attn.c_attn, mlp.c_fc, ...). How a forward pass routes is its `mode`:

  full       the dense model: every FFN full, no gate runs
  cheap      every controlled FFN cheap
  adapter    full and cheap added up: the dense reference with the same trainable cheap FFNs
  topk       the best tokens of each row go full, as many as the budget; it ranks with the future: NOT causal
  threshold  a token goes full iff its score exceeds the layer's threshold: causal, what decoding uses
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from configurator import ConfigError, where_is
from gates import ESTIMATORS, GATES, Context, Route, full_tokens, threshold_for, topk_mask
from kernels import activate, ffn_at, in_compute_dtype, logits_of, no_autocast, permute, short_attention

ACTIVATIONS = ("gelu", "gelu_new", "silu", "swiglu")  # gelu_new is tanh's; on a CPU in bfloat16 it is slow


@dataclass
class GPTConfig:
    block_size: int = 128  # T, the longest context
    vocab_size: int = 257  # V
    n_layer: int = 6
    n_head: int = 4
    n_kv_head: int = 0  # heads of keys and values; 0: as many as n_head
    n_embd: int = 128  # D
    n_inner: int = 0  # the width of the full FFN; 0: 4 n_embd
    activation: str = "gelu"  # exact, as nanoGPT's; GPT-2's own is gelu_new, Llama's is swiglu
    norm: str = "layernorm"  # or rmsnorm
    norm_eps: float = 1e-5
    positions: str = "learned"  # or rotary
    rope_theta: float = 10_000.0
    bias: bool = True  # in the backbone's linear maps and LayerNorms
    tied_head: bool = True  # the LM head is the embedding
    controlled: tuple = ()  # the layers that route, from 0; none is a plain dense model
    cheap_rank: int = 16  # r
    gate: str = "g3"
    estimator: str = "ste_norm"
    budget: float = 0.5  # the share of tokens that goes full
    layer_spread: float = 0.0  # how unevenly the layers share it, see GPT.set_budget
    execution: str = "gathered"  # or masked: the fast and the plain way to the same result
    g1_hidden: int = 47  # so that g1 has as many parameters as g3
    latent: int = 16  # g3's d

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd


# -----------------------------------------------------------------------------
# the parts of a block

def make_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    """Queries of n_head heads; keys and values of n_kv_head, each shared by neighbouring query heads."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_size = config.n_embd // config.n_head  # d
        self.sizes = [config.n_embd, self.n_kv_head * self.head_size, self.n_kv_head * self.head_size]
        self.c_attn = nn.Linear(config.n_embd, sum(self.sizes), bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rotation=None, cache=None):
        B, T, D = x.shape
        x = in_compute_dtype(x, self.c_attn.weight)
        qkv = self.c_attn(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H + 2 Hkv, T, d)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=1)
        if rotation is not None:
            qk = rotate(qk, *rotation)
        q, k = qk.split([self.n_head, self.n_kv_head], dim=1)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, Hkv, S, d), S >= T: all positions so far
        with no_autocast(x):
            y = attend(q, k, v)  # (B, H, T, d)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


def attend(q, k, v):
    """Causal attention of the last T of S positions: q (B, H, T, d), k and v (B, Hkv, S, d) -> like q."""
    T, S = q.size(2), k.size(2)
    shared = q.size(1) != k.size(1)
    if T == 1:  # one token sees everything before it; the heads that share a key stand together, as its queries
        return F.scaled_dot_product_attention(q.view(q.size(0), k.size(1), -1, q.size(3)), k, v).view(q.shape)
    if T < S:  # a chunk behind a cache
        past = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=past, enable_gqa=shared)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 256:
        return short_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)


def rotation_table(config):
    """Rotary positions (Su et al., arXiv:2104.09864): cosines and sines (2, block_size, d) of the angle
    position * theta^(-2i/d). Number i of a head turns together with number i + d/2, as in Llama; the sines
    carry the sign of that turn."""
    d = config.n_embd // config.n_head
    frequencies = config.rope_theta ** (-torch.arange(0, d, 2).float() / d)  # (d/2,)
    angles = torch.arange(config.block_size).float()[:, None] * frequencies  # (block_size, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)])


def rotate(x, cos, sin):
    """x (B, H, T, d), cos and sin (T, d) of its positions -> x, turned."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class FFN(nn.Module):
    """D -> hidden -> D. The full one has hidden = n_inner, the cheap one hidden = r."""

    def __init__(self, config, hidden, activation, bias):
        super().__init__()
        self.activation = activation
        inputs = 2 if activation == "swiglu" else 1  # SwiGLU's own gate and its value, in one product
        self.c_fc = nn.Linear(config.n_embd, inputs * hidden, bias=bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=bias)

    def forward(self, h):
        h = in_compute_dtype(h, self.c_fc.weight)
        return self.c_proj(activate(self.c_fc(h), self.activation))

    def fit(self, h, y):
        """Set the weights in closed form so that self(h) is near y; both (N, D) float32.

        Every activation here has act(a) - act(-a) = a. So two units that read +a and -a make any linear map of a,
        and `hidden` units make every linear map of rank hidden / 2. The first layer reads the directions of the
        best such map from h to y (reduced-rank regression, Izenman 1975). The second is then a regression of y on
        what the units put out."""
        hidden, mean = self.c_fc.out_features, h.mean(0)
        directions = best_directions(h - mean, y - y.mean(0), (hidden + 1) // 2)  # (D, k)
        w_in = torch.cat([directions, -directions], dim=1)[:, :hidden].T  # (hidden, D)
        self.c_fc.weight.copy_(w_in)
        self.c_fc.bias.copy_(-(w_in @ mean))
        units = activate(self.c_fc(h), self.activation)  # (N, hidden)
        w_out = regression(torch.cat([units, torch.ones_like(units[:, :1])], dim=1), y)  # (hidden + 1, D)
        self.c_proj.weight.copy_(w_out[:-1].T)
        self.c_proj.bias.copy_(w_out[-1])


def regression(x, y):
    """The w (A, B) with the least ||x w - y||^2, x (N, A), y (N, B); a little ridge keeps it bounded."""
    gram = x.T @ x
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y)


def best_directions(x, y, k):
    """The k directions (A, k) of x (N, A) that predict y (N, B) best, so scaled that x has variance 1 along each:
    the best w of rank k is regression(x, y) times the projection on the k main directions of its predictions."""
    w = regression(x, y)
    _, main = torch.linalg.eigh((x @ w).T @ (x @ w))  # in ascending order
    directions = w @ main[:, -k:].flip(1)  # the main one first
    return directions / (x @ directions).std(0).clamp_min(1e-6)


# -----------------------------------------------------------------------------
# the block

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.budget = config, layer, config.budget
        self.ln_1 = make_norm(config)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = FFN(config, config.n_inner, config.activation, config.bias)
        self.controlled = layer in config.controlled
        if self.controlled:
            # The same nonlinearity; swiglu without the gate of its own is silu.
            activation = "silu" if config.activation == "swiglu" else config.activation
            self.cheap = FFN(config, config.cheap_rank, activation, bias=True)
            self.gate = GATES[config.gate](config, layer)
            # A gate that learns nothing has the mask for its weight.
            self.estimator = ESTIMATORS[config.estimator if self.gate.learned else "hard"]()
            self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, x, mode, context, rotation=None, keep=False, want_outcomes=False, cache=None):
        """x (B, T, D) -> x (B, T, D) and the layer's Route, None where nothing was decided.
        keep: the Route holds x and h. want_outcomes: it holds what a predicting gate should predict."""
        x = self.attention_part(x, rotation, cache)
        return self.ffn_part(x, mode, context, keep, want_outcomes)

    def attention_part(self, x, rotation=None, cache=None):
        return x + self.attn(self.ln_1(x), rotation, cache)

    def ffn_part(self, x, mode, context, keep=False, want_outcomes=False):
        h = self.ln_2(x)
        if not self.controlled or mode == "full":
            return x + self.mlp(h), None
        if mode == "cheap":
            return x + self.cheap(h), None
        if mode == "adapter":
            return x + self.mlp(h) + self.cheap(h), None

        s, prediction = self.score(h, context)  # (B, T)
        m = self.select(s.detach(), mode)  # (B, T)
        want_outcomes = want_outcomes and self.gate.predicts
        if self.config.execution == "masked":
            y, outcomes = self.masked(h, s, m, want_outcomes)
        else:
            y, outcomes = self.gathered(h, s, m, mode, want_outcomes)
        route = Route(self.layer, s, m, prediction, outcomes, x if keep else None, h if keep else None)
        return x + y, route

    def score(self, h, context):
        """Scores (B, T) in float32, whatever the dtype around them, and the gate's prediction or None."""
        with no_autocast(h):
            result = self.gate(h.detach().float(), context)
        if type(result) is not tuple or len(result) != 2 or getattr(result[0], "shape", None) != h.shape[:2]:
            raise ConfigError(f"the gate {self.config.gate!r} ({where_is(type(self.gate))}) must return scores (B, "
                              "T), and a prediction or None")
        return result[0].float(), result[1]

    def select(self, scores, mode):
        """-> the mask (B, T): True where the token goes full."""
        if mode == "topk":
            return topk_mask(scores, full_tokens(self.budget, scores.size(1)))
        return scores > self.threshold

    def masked(self, h, scores, mask, want_outcomes=False):
        """The plain way: w * full(h) + (1 - w) * cheap(h), both on every token -> (B, T, D), outcomes or
        None."""
        w = self.estimator(scores, mask).unsqueeze(-1)  # (B, T, 1)
        full, cheap = self.mlp(h), self.cheap(h)  # (B, T, D) each
        outcomes = self.gate.outcomes(full, cheap) if want_outcomes else None  # (B, T, 2, d)
        return w * full + (1 - w) * cheap, outcomes

    # The fast way to the same result. What runs on which tokens depends on who calls:
    #
    #   who calls                                full                           cheap
    #   training, ste_norm or ste; jepa          forward on all tokens,         forward and backward on all
    #     (both_paths)                             backward on its own alone
    #   training, scaled or hard without jepa;   on its own tokens              on its own; scaled: on all
    #     random and static (own_paths)
    #   evaluation, label passes (own_paths)     forward on its own tokens      forward on its own; scaled: on all
    #   decoding one token (one_token)           only if the token goes full    only if it goes cheap, or scaled
    #
    # So under the default estimator training saves the backward pass of the frozen full FFN on cheap tokens, and
    # nothing else: the gradient of w is of (full - cheap), which needs both outputs everywhere.

    def gathered(self, h, scores, mask, mode, want_outcomes=False):
        trains = torch.is_grad_enabled()
        if mask.numel() == 1 and not trains and not want_outcomes:
            return self.one_token(h, scores, mask), None
        # Full tokens first. Under topk their number is known, and a GPU need not be waited for.
        order = torch.argsort(~mask.flatten(), stable=True)  # (B * T,)
        n = mask.size(0) * full_tokens(self.budget, mask.size(1)) if mode == "topk" else int(mask.sum())
        if want_outcomes or (self.estimator.reads_both and scores.requires_grad):
            return self.both_paths(h, scores, mask, order[:n], want_outcomes)
        return self.own_paths(h, scores, mask, order, n), None

    def both_paths(self, h, scores, mask, chosen, want_outcomes):
        """Both FFNs on every token. chosen (n,): the places of the full tokens in B * T. On the others w is 0, so
        the gradient that full sends to h is 0 too, and it is not computed."""
        shape, h = h.shape, in_compute_dtype(h, self.mlp.c_fc.weight).flatten(0, 1)  # (B * T, D)
        w = self.estimator(scores, mask).view(-1, 1)  # (B * T, 1)
        full, cheap = ffn_at(self.mlp, h, chosen), self.cheap(h)  # (B * T, D) each
        outcomes = self.gate.outcomes(full.view(shape), cheap.view(shape)) if want_outcomes else None
        return (w * full + (1 - w) * cheap).view(shape), outcomes

    def own_paths(self, h, scores, mask, order, n):
        """Each FFN on its own tokens: full on the first n of `order` (B * T,), cheap on the others."""
        inverse = order.argsort()
        flat = in_compute_dtype(h, self.mlp.c_fc.weight).flatten(0, 1)  # (B * T, D)
        h_full, h_cheap = permute(flat, order, inverse).split((n, len(order) - n))
        full, cheap = self.mlp(h_full), self.cheap(h_cheap)  # (n, D) and (B * T - n, D)
        if self.estimator.mixes:
            w = self.estimator(scores, mask).view(-1, 1).index_select(0, order[:n])  # (n, 1)
            full = w * full + (1 - w) * self.cheap(h_full)
        return permute(torch.cat([full, cheap]), inverse, order).view(h.shape)

    def one_token(self, h, scores, mask):
        """The FFN of the token's own choice: there is nothing to gather."""
        if not mask.item():
            return self.cheap(h)
        if not self.estimator.mixes:
            return self.mlp(h)
        w = self.estimator(scores, mask).unsqueeze(-1)  # (1, 1, 1)
        return w * self.mlp(h) + (1 - w) * self.cheap(h)


# -----------------------------------------------------------------------------
# the model

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.register_buffer("rotation", rotation_table(config), persistent=False)  # (2, block_size, d)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = make_norm(config)
        if not config.tied_head:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if ".gate." in name:
                continue  # a gate initialises itself
            if name.endswith("cheap.c_proj.weight") or name.endswith("bias"):
                nn.init.zeros_(p)  # cheap starts at zero, unless fit_cheap follows
            elif p.dim() == 2:
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / scale)

    @property
    def head(self):
        """The weight of the LM head (V, D)."""
        return self.wte.weight if self.config.tied_head else self.lm_head.weight

    def forward(self, idx, mode="full", row_seeds=None, cache=None, last_only=False):
        """idx (B, T) int64 -> logits (B, T, V), routes. With a cache (see sample.py) idx goes on from it.
        last_only: the logits of the last token alone, (B, 1, V)."""
        if row_seeds is None:
            row_seeds = torch.arange(idx.size(0), device=idx.device)
        context = Context(idx, row_seeds, cache[0].length if cache else 0)
        x, routes = self.run(self.embed(context), mode, context, cache=cache)
        if last_only:
            x = x[:, -1:]
        return logits_of(self.ln_f(x), self.head), routes

    def embed(self, context):
        """-> the residual stream (B, T, D), float32, before the first layer."""
        x = self.wte(context.tokens).float()
        if self.config.positions == "learned":
            end = context.start + context.tokens.size(1)
            x = x + self.wpe(torch.arange(context.start, end, device=x.device))
        return x

    def run(self, x, mode, context, first=0, end=None, keep=(), want_outcomes=False, cache=None):
        """Layers first..end-1 on x (B, T, D) -> x, [the Route of each layer that decided]. The Routes of the
        layers in `keep` hold x and h; with `want_outcomes` those of a predicting gate hold its outcomes."""
        rotation, routes = self.rotation_of(context), []
        for i in range(first, self.config.n_layer if end is None else end):
            layer_cache = cache[i] if cache else None
            x, route = self.h[i](x, mode, context, rotation, i in keep, want_outcomes, layer_cache)
            if route is not None:
                routes.append(route)
        return x, routes

    def rotation_of(self, context):
        """The (cosines, sines) of the context's positions, (T, d) each, in the dtype of the attention; None
        where positions are learned."""
        if self.config.positions == "learned":
            return None
        table = self.rotation[:, context.start:context.start + context.tokens.size(1)]
        return in_compute_dtype(table, self.h[0].attn.c_attn.weight).unbind(0)

    # Losses of a stream x (B, T, D) after the last layer, see kernels.py for their formulas.

    def lm_loss(self, x, targets):
        """The mean cross entropy with the tokens `targets` (B, T)."""
        return kernels.lm_loss(self.ln_f(x), self.head, targets)

    def kl_loss(self, x, dense_x):
        """The mean KL(dense || routed); dense_x (B, T, D): the stream of the dense model."""
        with torch.no_grad():
            dense_x = self.ln_f(dense_x)
        return kernels.kl_loss(self.ln_f(x), self.head, dense_x)

    @torch.no_grad()
    def token_losses(self, streams, reference):
        """[the loss of every token (B, T)] of several streams: against tokens, `reference` (B, T), or against
        what another stream predicts, `reference` (B, T, D)."""
        if reference.dim() == 3:
            reference = self.ln_f(reference)
        return kernels.token_losses([self.ln_f(x) for x in streams], self.head, reference)

    @torch.no_grad()
    def compare(self, x, dense_x, targets):
        """Three sums over the tokens of x: the loss, KL(dense || x), agreements on the likeliest token."""
        return kernels.compare_heads(self.ln_f(x), self.ln_f(dense_x), self.head, targets)

    def controllers(self):
        """{name: parameter} of what a controller-only run trains: gates, their predictors, cheap FFNs."""
        return {n: p for n, p in self.named_parameters() if ".gate." in n or ".cheap." in n}

    def backbone(self):
        """{name: parameter} of the dense model, without controllers."""
        return {n: p for n, p in self.named_parameters() if not (".gate." in n or ".cheap." in n)}

    # How a budget becomes thresholds, where the cheap FFNs start, and how layers share the budget.

    def layer_by_layer(self, context, mode, rows, watch):
        """Run context.tokens (N, T) under `mode`, `rows` rows at a time, all of them through a layer before the
        next. Yields every controlled layer before its FFN runs, so that the caller can set it from what it meets:
        (block, [FFN inputs h (rows, T, D)], [their Contexts])."""
        parts = [Context(t, s) for t, s in zip(context.tokens.split(rows), context.row_seeds.split(rows))]
        streams = [self.embed(part) for part in parts]
        rotation = self.rotation_of(context)
        for block in watch(self.h):
            streams = [block.attention_part(x, rotation) for x in streams]
            if block.controlled:
                yield block, [block.ln_2(x) for x in streams], parts
            streams = [block.ffn_part(x, mode, part)[0] for x, part in zip(streams, parts)]

    @torch.no_grad()
    def calibrate(self, context, rows=16, watch=iter):
        """Set every layer's threshold to the quantile of its scores over context.tokens (N, T), `rows` rows
        at a time. A layer's threshold is set before that layer routes, so later layers see the routing to
        come. watch wraps the loop over the layers, to show progress."""
        for block, inputs, parts in self.layer_by_layer(context, "threshold", rows, watch):
            scores = [block.score(h, part)[0] for h, part in zip(inputs, parts)]
            block.threshold.copy_(threshold_for(torch.cat(scores), block.budget))

    @torch.no_grad()
    def fit_cheap(self, context, mode, rows=16, watch=iter):
        """Start every cheap FFN near the full one of its layer (FFN.fit), on context.tokens (N, T), `rows` rows
        at a time. The layers before it run under `mode`, the run's, with the cheap FFNs that they have just been
        given: what a routed model feeds a layer is not what the dense one does. watch: as in calibrate."""
        for block, inputs, _ in self.layer_by_layer(context, mode, rows, watch):
            outputs = [block.mlp(h) for h in inputs]
            h, y = (torch.cat(pieces).flatten(0, 1).float() for pieces in (inputs, outputs))  # (N * T, D)
            with no_autocast(h):
                block.cheap.fit(h, y)

    @torch.no_grad()
    def choose_layers(self, context, targets, watch=iter):
        """Which layers need the full FFN most? -> the controlled layers, the most needed first: by the loss on
        context.tokens (B, T) when that layer alone is cheap and all others are full."""
        losses, x, rotation = {}, self.embed(context), self.rotation_of(context)
        for block in watch(self.h):
            x = block.attention_part(x, rotation)
            if block.controlled:
                branch, _ = block.ffn_part(x, "cheap", context)
                branch, _ = self.run(branch, "full", context, first=block.layer + 1)
                losses[block.layer] = self.token_losses([branch], targets)[0].mean().item()
            x, _ = block.ffn_part(x, "full", context)
        return sorted(losses, key=losses.get, reverse=True)

    def set_budget(self, budget, order=None):
        """Give every controlled layer the budget. With an order of choose_layers, hand the same total out
        unevenly: to `static` in whole layers, and what is left to the next one; to any other gate along a line.
        With layer_spread = 1 and half of the tokens it goes nearly from 1 to 0, with 0 it is level."""
        if order is None:
            shares = {layer: budget for layer in self.config.controlled}
        elif self.config.gate == "static":
            shares = {layer: min(1.0, max(0.0, budget * len(order) - i)) for i, layer in enumerate(order)}
        else:
            slope = self.config.layer_spread * min(budget, 1 - budget)
            shares = {layer: budget + slope * (1 - (2 * i + 1) / len(order)) for i, layer in enumerate(order)}
        for layer, share in shares.items():
            self.h[layer].budget = share
