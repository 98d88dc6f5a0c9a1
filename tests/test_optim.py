"""optim.py: Muon is torch's, in any dtype and part by part; who trains at which rate, and when."""
import math

import pytest
import torch

from optim import Muon, make_optimizers
from test_routing import both_families, config_for, make
from train import budget_at, schedule

SHAPES = (64, 32), (32, 64), (48, 48)


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


def test_muon_in_bfloat16_is_torchs():
    theirs = trained(lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for dtype, tol in ((torch.bfloat16, 0), (torch.float32, 1e-3)):
        ours = trained(lambda p: Muon([{"params": p}], 1e-2, 0.1, dtype))
        for a, b in zip(ours, theirs):
            assert (a - b).abs().max() <= tol


def test_muon_makes_each_part_of_a_matrix_orthogonal_alone():
    whole, parts = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), []
    for matrices, sizes in (([whole], [16, 8, 8]), (whole.split([16, 8, 8]), None)):
        params = [torch.nn.Parameter(matrix.clone()) for matrix in matrices]
        for p in params:
            p.grad = p.detach() + 1
        Muon([{"params": params, "parts": sizes}], 1e-2, 0.1, torch.float32).step()
        parts.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*parts)


@both_families
def test_muon_takes_the_matrices_of_the_layers_and_adamw_all_else(family):
    model = make(family=family, gate="g3")
    config = config_for(model, learning_rate=1.0, gate_lr=2.0, muon_lr=3.0, weight_decay=0.5)
    rates = {}
    for optimizer in make_optimizers(model, config, torch.float32):
        for group in optimizer.param_groups:
            for p in group["params"]:
                rates[p] = type(optimizer).__name__, group["peak"], group["weight_decay"], group.get("parts")
    for name, p in model.named_parameters():
        want = ("AdamW", 2.0 if ".gate." in name else 1.0, 0.5 if p.dim() > 1 else 0.0, None)
        if name.startswith("h.") and ".gate." not in name and p.dim() == 2:
            want = ("Muon", 3.0, 0.5, model.h[0].attn.sizes if "c_attn" in name else None)
        assert rates[p] == want, name
    assert sum(model.h[0].attn.sizes) == len(model.h[0].attn.c_attn.weight)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine_and_the_budget_falls_in_a_line():
    config = dict(warmup_iters=4, min_lr_ratio=0.1, max_iters=100, budget=0.3, budget_fall=0.5)
    for step in range(100):
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * step / 100)) / 2
        assert schedule(config, step) == pytest.approx(cosine * min(1, (step + 1) / 4))
        assert budget_at(config, step) == pytest.approx(1 - 0.7 * min(1, step / 50))
    assert budget_at(config | {"budget_fall": 0.0}, 0) == 0.3
    assert schedule(config, 100) == pytest.approx(0.1)
