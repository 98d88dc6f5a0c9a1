"""What a reader of the method can take on trust: what is written for speed alone, and the hash behind random
numbers. Each fast function equals a plain formula, which its docstring gives and the tests compare it with.

First random numbers, permutations and short attention. Then the losses of the LM head, in chunks of tokens:
with 50,257 words in the vocabulary the logits of a batch are too large to hold (3.3 GB at 16 x 1024 tokens in
float32), and so is a second set for the model that is distilled. The reference of a loss is either the tokens
that came, int64, or hidden states of the frozen model, whose distribution is meant: q = softmax(reference @
weight.T).
"""
import math

import torch
import torch.nn.functional as F


def uniform(row_seeds, stream, length, start=0):
    """Uniform numbers (B, length) in [0, 1): a hash of (row seed, stream, position), the same on every
    device. The mix is splitmix64's (Steele, Lea and Flood, 2014); int64 wraps, and since >> copies the sign
    bit, a mask clears the copies."""
    position = torch.arange(start, start + length, device=row_seeds.device)
    offset = ((stream + 1) * 0x14D049BB133111EB + 2 ** 63) % 2 ** 64 - 2 ** 63
    x = row_seeds[:, None] * 0x1E3779B97F4A7C15 + position * 0x3F58476D1CE4E5B9 + offset  # (B, length)
    for _ in range(2):
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * 0x3F58476D1CE4E5B9
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * 0x14D049BB133111EB
    return ((x >> 33) & 0xFFFFFF).float() / 2 ** 24


def permute(x, order, inverse):
    """x[order] of x (N, ...), where `order` (N,) is a permutation."""
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


def in_compute_dtype(x):
    """x as the matrix products under autocast take it: cast once, not once a product."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def ffn_at_rows(ffn, h, rows):
    """ffn(h) of h (N, D) where the gradient of all rows but `rows` is zero and is not taken."""
    weights = ffn.c_fc.weight, ffn.c_fc.bias, ffn.c_proj.weight, ffn.c_proj.bias
    if any(weight.requires_grad for weight in weights):
        return ffn(h)
    return FrozenFFN.apply(h, rows, *(weight.to(h.dtype) for weight in weights), ffn.approximate)


class FrozenFFN(torch.autograd.Function):
    """An FFN whose weights are not trained: the value of every row, the gradient of some."""

    @staticmethod
    def forward(ctx, h, rows, w_in, b_in, w_out, b_out, approximate):
        hidden = F.linear(h, w_in, b_in)  # (N, 4D)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(rows, hidden[rows], w_in, w_out)
            ctx.approximate = approximate
        return F.linear(F.gelu(hidden, approximate=approximate), w_out, b_out)

    @staticmethod
    def backward(ctx, grad):
        rows, hidden, w_in, w_out = ctx.saved_tensors
        d = grad[rows].to(w_out.dtype) @ w_out
        d = torch.ops.aten.gelu_backward(d, hidden, approximate=ctx.approximate)
        dh = torch.zeros(grad.shape, dtype=w_in.dtype, device=grad.device)
        dh[rows] = d @ w_in
        return dh, None, None, None, None, None, None


def short_attention(q, k, v):
    """scaled_dot_product_attention(q, k, v, is_causal=True) of q, k, v (B, H, T, D/H), written out: for rows
    of up to 256 tokens in bfloat16 the fused kernel of a CPU is slow. At (16, 4, 128, 32) forward and
    backward take 15 ms in one thread, and 3 here; at T = 1024 the fused one wins."""
    T = q.size(2)
    future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    return (q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1) + future).softmax(-1) @ v


# -----------------------------------------------------------------------------
# losses of the LM head

def head_loss(x, weight, reference):
    """The mean loss of hidden states x (B, T, D) under the head `weight` (V, D), differentiable in x and
    weight: the cross entropy with tokens (B, T), or KL(q || p) with the distribution q of hidden states (B,
    T, D)."""
    return HeadLoss.apply(x.flatten(0, 1), weight, reference.flatten(0, 1))


@torch.no_grad()
def head_token_losses(streams, weight, reference):
    """For each of several hidden states (B, T, D) the cross entropy of every token (B, T), float32, with
    tokens (B, T) or with the distribution of hidden states (B, T, D), which is computed once for all of
    them."""
    shape, flat = reference.shape[:2], reference.flatten(0, 1)
    streams = [x.flatten(0, 1) for x in streams]
    losses = [torch.empty(len(flat), device=flat.device) for _ in streams]
    for rows in chunks(len(flat), weight):
        wanted = flat[rows]
        if is_hidden(reference):
            wanted = F.linear(wanted, weight).softmax(-1, dtype=torch.float32)  # (n, V)
        for x, loss in zip(streams, losses):
            logits = F.linear(x[rows], weight).float()  # (n, V)
            loss[rows] = F.cross_entropy(logits, wanted, reduction="none")
    return [loss.view(shape) for loss in losses]


def is_hidden(reference):
    return reference.is_floating_point()


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


class HeadLoss(torch.autograd.Function):
    """x (N, D), weight (V, D), reference (N,) or (N, D) -> the mean loss. The gradient of the logits, p minus
    what p should be, is at hand in the forward pass while a chunk's logits are; so it is taken there."""

    @staticmethod
    def forward(ctx, x, weight, reference):
        trained = ctx.needs_input_grad[1]
        dx, total = torch.empty_like(x), 0.0
        dw = torch.zeros_like(weight) if trained else None
        weight = in_compute_dtype(weight)
        for rows in chunks(len(x), weight, trained):
            hidden = x[rows].to(weight.dtype)
            loss, dlogits = loss_and_gradient(F.linear(hidden, weight), weight, reference[rows])
            total += loss
            dlogits = dlogits.to(weight.dtype)
            dx[rows] = dlogits @ weight
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
        return grad * dx, None if dw is None else grad * dw, None


def loss_and_gradient(logits, weight, reference):
    """Logits (n, V) -> the sum of the losses, and its gradient (n, V) float32 with respect to the logits."""
    p = logits.softmax(-1, dtype=torch.float32)
    # The largest probability is 1 / sum(exp(logits - max)): it gives log(sum(exp(logits))) without a second
    # pass.
    normaliser = logits.amax(-1).float() - p.amax(-1).log()  # (n,)
    if is_hidden(reference):
        log_q = F.linear(reference.to(weight.dtype), weight).log_softmax(-1, dtype=torch.float32)
        q = log_q.exp()
        loss = (q * (log_q - logits)).sum() + normaliser.sum()
        return loss, p.sub_(q)
    token = reference[:, None]
    loss = (normaliser - logits.gather(1, token).squeeze(1).float()).sum()
    return loss, p.scatter_add_(1, token, torch.full_like(token, -1, dtype=p.dtype))
