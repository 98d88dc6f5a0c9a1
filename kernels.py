"""What is written for speed, each beside its plain formula; and the hash behind random numbers.

A reader of the method can take this file on trust: every function equals the formula in its docstring, and
the tests hold the two equal. First random numbers, permutations, attention and FFNs. Then the losses of the
LM head, which are taken a chunk of tokens at a time: with 50,257 words in the vocabulary the logits of a
batch of 16 x 1024 tokens would fill 3.3 GB.
"""
import contextlib
import math

import torch
import torch.nn.functional as F


# -----------------------------------------------------------------------------
# random numbers

def uniform(row_seeds, stream, length, start=0):
    """Uniform numbers (B, length) in [0, 1), a function of (row seed, stream, position).

    Why a hash and no generator: a text is read in one piece, in two halves of a batch, or token by token
    behind a KV cache, and each token must meet the same number each time. The mix is splitmix64's (Steele,
    Lea and Flood, 2014). int64 wraps around; >> copies the sign bit, so a mask clears the copies."""
    position = torch.arange(start, start + length, device=row_seeds.device)
    offset = ((stream + 1) * 0x14D049BB133111EB + 2 ** 63) % 2 ** 64 - 2 ** 63
    x = row_seeds[:, None] * 0x1E3779B97F4A7C15 + position * 0x3F58476D1CE4E5B9 + offset  # (B, length)
    for _ in range(2):
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * 0x3F58476D1CE4E5B9
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * 0x14D049BB133111EB
    return ((x >> 33) & 0xFFFFFF).float() / 2 ** 24


# -----------------------------------------------------------------------------
# gathering

def permute(x, order, inverse):
    """x[order] of x (N, ...), where `order` (N,) is a permutation and `inverse` its inverse."""
    return Permute.apply(x, order, inverse)


class Permute(torch.autograd.Function):
    """PyTorch's gradient of indexing adds rows up, because an index may come twice. That of a permutation is
    another permutation, and a tenth of a training step at tiny less."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def in_compute_dtype(x, weight):
    """x in the dtype of its products with `weight`: autocast's, where autocast is on, so that it is cast once and
    not once a product; else the weight's, for a model whose matrices have been cast for good. Decoding does
    without autocast: at one token it would take a quarter of the time."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x.to(weight.dtype)


def no_autocast(x):
    """A context in which nothing on x's device is cast; where autocast is off, one that costs nothing."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


# -----------------------------------------------------------------------------
# attention and FFNs

def short_attention(q, k, v):
    """scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) of q (B, H, T, d), k and v (B,
    Hkv, T, d), written out: for rows of up to 256 tokens in bfloat16 the fused kernel of a CPU is slow. At
    (16, 4, 128, 32) forward and backward take 15 ms in one thread, and 3 here; at T = 1024 the fused one
    wins."""
    B, H, T, d = q.shape
    groups = k.size(1)
    future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    q = q.view(B, groups, H // groups, T, d) / math.sqrt(d)  # the heads that share a key stand together
    weights = (q @ k.unsqueeze(2).transpose(-2, -1) + future).softmax(-1)  # (B, Hkv, H/Hkv, T, T)
    return (weights @ v.unsqueeze(2)).view(B, H, T, d)


def activate(z, activation):
    """The nonlinearity of an FFN. For swiglu z holds a gate and a value, each half of it wide."""
    if activation == "swiglu":
        gate, value = z.chunk(2, dim=-1)
        return F.silu(gate) * value
    if activation == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_new" else "none")


def activate_backward(grad, z, activation):
    """The gradient of activate(z) with respect to z."""
    if activation == "swiglu":
        gate, value = z.chunk(2, dim=-1)
        into_gate = torch.ops.aten.silu_backward(grad * value, gate)
        return torch.cat([into_gate, grad * F.silu(gate)], dim=-1)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    return torch.ops.aten.gelu_backward(grad, z, approximate="tanh" if activation == "gelu_new" else "none")


def ffn_at(ffn, h, chosen):
    """ffn(h) of h (N, D). Only the tokens `chosen` (n,) get a gradient; that of the others is zero."""
    weights = ffn.c_fc.weight, ffn.c_fc.bias, ffn.c_proj.weight, ffn.c_proj.bias
    if any(w is not None and w.requires_grad for w in weights):
        return ffn(h)
    weights = [None if w is None else w.to(h.dtype) for w in weights]
    return FrozenFFN.apply(h, chosen, *weights, ffn.activation)


class FrozenFFN(torch.autograd.Function):
    """An FFN whose weights are not trained: the value of every token, the gradient of some."""

    @staticmethod
    def forward(ctx, h, chosen, w_in, b_in, w_out, b_out, activation):
        z = F.linear(h, w_in, b_in)  # (N, hidden)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(chosen, z[chosen], w_in, w_out)
            ctx.activation = activation
        return F.linear(activate(z, activation), w_out, b_out)

    @staticmethod
    def backward(ctx, grad):
        chosen, z, w_in, w_out = ctx.saved_tensors
        d = grad[chosen].to(w_out.dtype) @ w_out
        d = activate_backward(d, z, ctx.activation)
        dh = torch.zeros(len(grad), w_in.size(1), dtype=w_in.dtype, device=grad.device)
        dh[chosen] = d @ w_in
        return dh, None, None, None, None, None, None


# -----------------------------------------------------------------------------
# losses of the LM head: hidden states x (B, T, D), head weight (V, D)

def lm_loss(x, weight, targets):
    """cross_entropy(x @ weight.T, targets (B, T)), a mean, differentiable in x and weight."""
    return HeadLoss.apply(x.flatten(0, 1), weight, targets.flatten(), cross_entropy_and_gradient)


def kl_loss(x, weight, teacher):
    """KL(softmax(teacher @ weight.T) || softmax(x @ weight.T)), a mean, differentiable in x and weight;
    teacher: hidden states (B, T, D) too."""
    return HeadLoss.apply(x.flatten(0, 1), weight, teacher.flatten(0, 1), kl_and_gradient)


def cross_entropy_and_gradient(logits, weight, targets):
    """Logits (n, V), tokens (n,) -> the sum of the losses, and its gradient (n, V) in the logits: p - 1 at the
    token that came, p elsewhere."""
    p = logits.softmax(-1, dtype=torch.float32)
    targets = targets[:, None]
    loss = (log_normaliser(logits, p) - logits.gather(1, targets).squeeze(1).float()).sum()
    return loss, p.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=p.dtype))


def kl_and_gradient(logits, weight, teacher):
    """Logits (n, V), the teacher's hidden states (n, D) -> the sum of KL(q || p), and its gradient, p - q."""
    p = logits.softmax(-1, dtype=torch.float32)
    log_q = F.linear(teacher.to(weight.dtype), weight).log_softmax(-1, dtype=torch.float32)
    q = log_q.exp()
    loss = (q * (log_q - logits)).sum() + log_normaliser(logits, p).sum()
    return loss, p.sub_(q)


def log_normaliser(logits, p):
    """log(sum(exp(logits))) (n,) from p = softmax(logits), without a second pass: the largest p is 1 /
    sum(exp(logits - max))."""
    return logits.amax(-1).float() - p.amax(-1).log()


class HeadLoss(torch.autograd.Function):
    """x (N, D), weight (V, D), reference (N, ...) -> the mean of loss_and_gradient. The gradient of a chunk's
    logits is taken in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx, x, weight, reference, loss_and_gradient):
        trained = ctx.needs_input_grad[1]
        dx, total = torch.empty_like(x), 0.0
        dw = torch.zeros_like(weight) if trained else None
        weight = in_compute_dtype(weight, weight)
        for tokens in chunks(len(x), weight, trained):
            hidden = x[tokens].to(weight.dtype)
            loss, dlogits = loss_and_gradient(F.linear(hidden, weight), weight, reference[tokens])
            total += loss
            dlogits = dlogits.to(weight.dtype)
            dx[tokens] = dlogits @ weight
            if trained:
                dw += dlogits.t() @ hidden
        dx.div_(len(x))
        if trained:
            dw.div_(len(x))
        ctx.save_for_backward(dx, dw)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return grad * dx, None if dw is None else grad * dw, None, None


def chunks(n, weight, trained=False):
    """Slices of n tokens whose float32 logits fit the cache of a CPU, or a small part of a GPU's memory. A
    head that is trained adds its whole gradient up at every chunk, so its chunks are longer: 4096 x 768 x
    50257 in bfloat16 on 2 cores takes 5.8 s in chunks of 166 and 4.4 s in chunks of 1024; with a frozen head
    2.1 and 2.7 s."""
    size = 2 ** 26 if trained else 2 ** 23
    if weight.device.type == "cuda":
        size = 2 ** 28
    step = max(64, size // len(weight))
    return [slice(i, i + step) for i in range(0, n, step)]


def logits_of(x, weight):
    """Hidden states (..., D) -> logits (..., V)."""
    return F.linear(in_compute_dtype(x, weight), weight)


@torch.no_grad()
def token_losses(streams, weight, reference):
    """For each of several hidden states (B, T, D) the cross entropy of every token (B, T), float32: with the
    tokens `reference` (B, T), or with the distribution of the hidden states `reference` (B, T, D), which is
    computed once for all of them."""
    shape, reference = reference.shape[:2], reference.flatten(0, 1)
    streams = [x.flatten(0, 1) for x in streams]
    losses = [torch.empty(len(reference), device=reference.device) for _ in streams]
    for tokens in chunks(len(reference), weight):
        wanted = reference[tokens]
        if wanted.is_floating_point():
            wanted = logits_of(wanted, weight).softmax(-1, dtype=torch.float32)  # (n, V)
        for x, loss in zip(streams, losses):
            logits = logits_of(x[tokens], weight).float()  # (n, V)
            loss[tokens] = F.cross_entropy(logits, wanted, reduction="none")
    return [loss.view(shape) for loss in losses]


@torch.no_grad()
def compare_heads(x, teacher, weight, targets):
    """Hidden states x and teacher (B, T, D), tokens (B, T) -> three sums over all tokens: the cross entropy of
    x with the tokens, KL(teacher || x), and how often both have the same likeliest token."""
    x, teacher, targets = x.flatten(0, 1), teacher.flatten(0, 1), targets.flatten()
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    for tokens in chunks(len(x), weight):
        log_p = logits_of(x[tokens], weight).log_softmax(-1, dtype=torch.float32)  # (n, V)
        log_q = logits_of(teacher[tokens], weight).log_softmax(-1, dtype=torch.float32)
        sums[0] += F.nll_loss(log_p, targets[tokens], reduction="sum")
        sums[1] += (log_q.exp() * (log_q - log_p)).sum()
        sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return sums
