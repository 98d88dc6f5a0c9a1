"""A GPT-2 decoder in which each controlled layer routes every token through a full or a cheap FFN.

Module names are nanoGPT's and GPT-2's (wte, wpe, h, ln_1, attn.c_attn, mlp.c_fc, ...), so weights move
freely. How a forward pass routes is its `mode`:
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

from configurator import ConfigError
from gates import ESTIMATORS, GATES, Context, Route, full_tokens, threshold_for, topk_mask
from kernels import ffn_at_rows, head_loss, head_token_losses, in_compute_dtype, permute, short_attention

# Named as Hugging Face names them. On a CPU in bfloat16 tanh takes four times as long.
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh"}


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
    estimator: str = "ste_norm"
    budget: float = 0.5  # the share of tokens that goes full
    execution: str = "gathered"  # or masked: the fast and the plain way to the same result
    g1_hidden: int = 47  # so that g1 has as many parameters as g3
    latent: int = 16  # g3's d


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, H, S, D/H), S >= T: all positions so far
        with torch.autocast(x.device.type, enabled=False):
            y = attend(q, k, v)  # (B, H, T, D/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


def attend(q, k, v):
    """Causal attention of the last T of S positions: q (B, H, T, D/H), k and v (B, H, S, D/H) -> like q."""
    T, S = q.size(2), k.size(2)
    if T == 1:  # one token sees everything before it
        return F.scaled_dot_product_attention(q, k, v)
    if T < S:  # a chunk behind a cache
        past = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=past)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 256:
        return short_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


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
        self.config, self.layer, self.budget = config, layer, config.budget
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = FFN(config, 4 * config.n_embd)
        self.controlled = layer in config.controlled
        if self.controlled:
            self.cheap = FFN(config, config.cheap_rank)
            self.gate = GATES[config.gate](config, layer)
            # A gate that learns nothing has the mask for its weight.
            self.estimator = ESTIMATORS[config.estimator if self.gate.learned else "hard"]
            self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, x, mode, context, keep=False, want_outcomes=False, cache=None):
        """x (B, T, D) -> x (B, T, D) and the layer's Route, None where nothing was decided.
        keep: the Route holds x and h. want_outcomes: it holds what a predicting gate should predict."""
        return self.ffn_part(self.attention_part(x, cache), mode, context, keep, want_outcomes)

    def attention_part(self, x, cache=None):
        return x + self.attn(self.ln_1(x), cache)

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
        with torch.autocast(h.device.type, enabled=False):
            result = self.gate(h.detach().float(), context)
        if type(result) is not tuple or result[0].shape != h.shape[:2]:
            raise ConfigError(f"the gate {self.config.gate!r} must return scores (B, T), and a prediction or "
                              "None")
        return result[0].float(), result[1]

    def select(self, scores, mode):
        if mode == "topk":
            return topk_mask(scores, full_tokens(self.budget, scores.size(1)))
        return scores > self.threshold

    def masked(self, h, scores, mask, want_outcomes):
        """w * full(h) + (1 - w) * cheap(h), both paths on every token -> (B, T, D), outcomes or None."""
        w = self.estimator(scores, mask).unsqueeze(-1)  # (B, T, 1)
        full, cheap = self.mlp(h), self.cheap(h)  # (B, T, D) each
        outcomes = self.gate.outcomes(full, cheap) if want_outcomes else None  # (B, T, 2, d)
        return w * full + (1 - w) * cheap, outcomes

    def gathered(self, h, scores, mask, mode, want_outcomes):
        """The same result for less."""
        if mask.numel() == 1 and not torch.is_grad_enabled() and not want_outcomes:
            return self.one_token(h, scores, mask), None
        # Full tokens first. Under topk their number is known, and a GPU need not be waited for.
        order = torch.argsort(~mask.flatten(), stable=True)  # (B * T,)
        n = mask.size(0) * full_tokens(self.budget, mask.size(1)) if mode == "topk" else int(mask.sum())
        # The gradient of w is of (full - cheap), and outcomes are of both: then every token needs both.
        if want_outcomes or (self.estimator.reads_both and scores.requires_grad):
            return self.both_paths(h, scores, mask, order[:n], want_outcomes)
        return self.own_paths(h, scores, mask, order, n), None

    def both_paths(self, h, scores, mask, full_rows, want_outcomes):
        """Both paths on every token. Of a frozen full only the gradient in h is wanted, and on cheap tokens,
        where w is 0, that is 0: it is computed for full tokens alone."""
        shape, h = h.shape, in_compute_dtype(h).flatten(0, 1)  # (B * T, D)
        w = self.estimator(scores, mask).view(-1, 1)  # (B * T, 1)
        full, cheap = ffn_at_rows(self.mlp, h, full_rows), self.cheap(h)  # (B * T, D) each
        outcomes = self.gate.outcomes(full.view(shape), cheap.view(shape)) if want_outcomes else None
        return (w * full + (1 - w) * cheap).view(shape), outcomes

    def own_paths(self, h, scores, mask, order, n):
        """Each path on its own tokens: full on the first n of `order`, cheap on the others."""
        inverse = order.argsort()
        rows = permute(in_compute_dtype(h).flatten(0, 1), order, inverse)  # (B * T, D)
        h_full, h_cheap = rows.split((n, len(rows) - n))  # (n, D) and (B * T - n, D)
        full, cheap = self.mlp(h_full), self.cheap(h_cheap)
        if self.estimator.mixes:
            w = self.estimator(scores, mask).view(-1, 1).index_select(0, order[:n])  # (n, 1)
            full = w * full + (1 - w) * self.cheap(h_full)
        return permute(torch.cat([full, cheap]), inverse, order).view(h.shape)

    def one_token(self, h, scores, mask):
        """A token in decoding: there is nothing to gather."""
        if not mask.item():
            return self.cheap(h)
        if not self.estimator.mixes:
            return self.mlp(h)
        w = self.estimator(scores, mask).unsqueeze(-1)  # (1, 1, 1)
        return w * self.mlp(h) + (1 - w) * self.cheap(h)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the LM head
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

    def forward(self, idx, mode="full", row_seeds=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V), routes. With a cache (see sample.py) idx goes on from it."""
        if row_seeds is None:
            row_seeds = torch.arange(idx.size(0), device=idx.device)
        context = Context(idx, row_seeds, cache[0].length if cache else 0)
        x, routes = self.run(self.embed(context), mode, context, cache=cache)
        return F.linear(self.ln_f(x), self.wte.weight), routes

    def embed(self, context):
        """-> the residual stream (B, T, D), float32, before the first layer."""
        tokens = context.tokens  # (B, T)
        positions = torch.arange(context.start, context.start + tokens.size(1), device=tokens.device)
        return self.wte(tokens).float() + self.wpe(positions)

    def run(self, x, mode, context, first=0, end=None, keep=(), want_outcomes=False, cache=None):
        """Layers first..end-1 on x (B, T, D) -> x, [the Route of each layer that decided]. The Routes of the
        layers in `keep` hold x and h; with `want_outcomes` those of a predicting gate hold its outcomes."""
        routes = []
        for i in range(first, self.config.n_layer if end is None else end):
            x, route = self.h[i](x, mode, context, i in keep, want_outcomes, cache[i] if cache else None)
            if route is not None:
                routes.append(route)
        return x, routes

    # losses of a stream x (B, T, D) after the last layer. In kernels.py, because at a vocabulary of 50,000
    # the logits are never held whole; each equals the formula in its docstring.

    def lm_loss(self, x, targets):
        """cross_entropy(head(x), targets (B, T)), a mean, differentiable."""
        return head_loss(self.ln_f(x), self.wte.weight, targets)

    def distill_loss(self, x, dense):
        """KL(softmax(head(dense)) || softmax(head(x))), a mean, differentiable in the stream x; `dense` is
        a stream too, that of the frozen model."""
        with torch.no_grad():
            dense = self.ln_f(dense)
        return head_loss(self.ln_f(x), self.wte.weight, dense)

    @torch.no_grad()
    def token_losses(self, streams, reference):
        """For each of several streams the loss of every token (B, T), float32: the cross entropy with a token
        that is given, reference (B, T), or with the distribution of a stream that is given, reference (B, T,
        D)."""
        if reference.dim() == 3:
            reference = self.ln_f(reference)
        return head_token_losses([self.ln_f(x) for x in streams], self.wte.weight, reference)

    def controllers(self):
        """{name: parameter} of what a controller-only run trains: gates, their predictors, cheap FFNs."""
        return {n: p for n, p in self.named_parameters() if ".gate." in n or ".cheap." in n}

    def backbone(self):
        """{name: parameter} of the dense model, without controllers."""
        return {n: p for n, p in self.named_parameters() if not (".gate." in n or ".cheap." in n)}

    @torch.no_grad()
    def calibrate(self, context, rows=64):
        """Set every layer's threshold to the quantile of its scores over context.tokens (N, T), `rows` rows
        at a time: a layer's threshold is set before that layer routes, so later layers see the routing to
        come."""
        parts = [Context(t, s) for t, s in zip(context.tokens.split(rows), context.row_seeds.split(rows))]
        streams = [self.embed(part) for part in parts]
        for block in self.h:
            streams = [block.attention_part(x) for x in streams]
            if block.controlled:
                scores = [block.score(block.ln_2(x), part)[0] for x, part in zip(streams, parts)]
                block.threshold.copy_(threshold_for(torch.cat(scores), block.budget))
            streams = [block.ffn_part(x, "threshold", part)[0] for x, part in zip(streams, parts)]
