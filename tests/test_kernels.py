"""kernels.py: each function against the plain formula in its docstring. The losses of the head stand in
test_losses.py."""
import pytest
import torch
import torch.nn.functional as F

from kernels import ffn_at_rows, permute, short_attention
from test_routing import make, same


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_permutation_and_its_gradient():
    x, order = numbers(7, 3).requires_grad_(), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    weight = numbers(7, 3, seed=2)
    [plain] = torch.autograd.grad((x[order] * weight).sum(), x)
    permuted = permute(x, order, order.argsort())
    assert torch.equal(permuted, x[order])
    assert torch.equal(torch.autograd.grad((permuted * weight).sum(), x)[0], plain)
    assert torch.equal(permute(permuted, order.argsort(), order), x)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_short_attention_is_causal_attention(dtype, tolerance):
    q, k, v = (numbers(2, 3, 17, 8, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    weight = numbers(2, 3, 17, 8, seed=4).to(dtype)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    short = short_attention(q, k, v)
    same(short.float(), plain.float(), tolerance)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (plain, short))):
        same(a.float(), b.float(), tolerance)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [[], [0, 3, 4], list(range(6))])
def test_an_ffn_at_rows_gives_every_value_and_the_gradient_of_the_rows(activation, trained, rows):
    """Where the loss does not read other rows, that is the whole gradient: of h, and of trained weights."""
    ffn = make(activation=activation).h[1].mlp.requires_grad_(trained)
    rows = torch.tensor(rows, dtype=torch.int64)
    h, weight = numbers(6, ffn.c_fc.in_features).requires_grad_(), torch.zeros(6, 1).index_fill(0, rows, 1.0)
    wanted = [h, *(p for p in ffn.parameters() if trained)]
    plain, at_rows = ffn(h), ffn_at_rows(ffn, h, rows)
    same(at_rows, plain)
    for a, b in zip(*(torch.autograd.grad((y.square() * weight).sum(), wanted) for y in (plain, at_rows))):
        same(a, b)


def test_an_ffn_at_rows_takes_no_other_gradient():
    """The proof that it saves something: a loss that reads all rows gets the gradient of some."""
    ffn = make().h[1].mlp.requires_grad_(False)
    h, rows = numbers(6, ffn.c_fc.in_features).requires_grad_(), torch.tensor([1, 5])
    [plain] = torch.autograd.grad(ffn(h).sum(), h)
    [at_rows] = torch.autograd.grad(ffn_at_rows(ffn, h, rows).sum(), h)
    same(at_rows[rows], plain[rows])
    assert at_rows[[0, 2, 3, 4]].count_nonzero() == 0 and plain[0].count_nonzero() > 0
