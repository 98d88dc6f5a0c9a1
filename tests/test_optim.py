"""Muon: equal to torch.optim.Muon where that is fast, and orthogonal in any dtype."""
import pytest
import torch

from runs.optim import Muon, orthogonalised

SHAPES = [(64, 32), (32, 64), (48, 48)]


def trained(optimizer_of, steps=6):
    """Matrices after some steps on the same gradients."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = optimizer_of(matrices)
    for _ in range(steps):
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return matrices


def test_in_bfloat16_it_is_torchs():
    theirs = trained(lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for dtype, tol in ((torch.bfloat16, 0), (torch.float32, 1e-3)):
        ours = trained(lambda p: Muon([{"params": p}], 1e-2, 0.1, dtype))
        for a, b in zip(ours, theirs):
            assert (a - b).abs().max() <= tol


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_has_singular_values_of_about_one(shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(update, torch.float32))
    assert 0.3 < values.min() and values.max() < 1.3
