"""Criteria are what their papers say: against loops and brute force in float64."""

import pytest
import torch
from torch.nn.utils import prune as oracle

from tersor.errors import ModelError
from tersor.tensors.criteria import CRITERIA, layer_adaptive
from tersor.tensors.statistics import LayerStatistics


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_wanda_is_a_loop_over_weights():
    weight, groups = normal(4, 3, 2), 2
    norms = normal(groups, 6).square()
    found = CRITERIA["wanda"](weight, 0, LayerStatistics(input_sq_norm=norms))
    for o in range(4):
        for i in range(3):
            for k in range(2):
                norm = norms[o // 2, i * 2 + k].sqrt()
                assert found[o, i, k] == pytest.approx(float(weight[o, i, k].abs() * norm))


def test_obc_is_the_rise_of_the_squared_error_after_the_best_update():
    """Brute force: for every weight, least squares over all others with this one at zero."""
    groups, columns = 2, 5
    inputs = normal(groups, 40, columns)
    hessian = inputs.transpose(1, 2) @ inputs / 40
    weight = normal(6, columns, seed=1)
    found = CRITERIA["obc"](weight, 0, LayerStatistics(hessian=hessian))
    for row, values in enumerate(weight):
        held = hessian[row // 3].clone()
        held += 0.01 * held.diagonal().mean() * torch.eye(columns)
        root = torch.linalg.cholesky(held).T  # |root d|^2 = d H d
        for gone in range(columns):
            others = [i for i in range(columns) if i != gone]
            wanted = root @ values
            best = torch.linalg.lstsq(root[:, others], wanted[:, None]).solution[:, 0]
            rise = (root[:, others] @ best - wanted).square().sum()
            assert float(found[row, gone]) == pytest.approx(float(rise), rel=1e-9)


def test_obc_gives_inputs_that_are_always_zero_no_saliency():
    inputs = normal(1, 30, 4)
    inputs[..., 2] = 0
    hessian = inputs.transpose(1, 2) @ inputs / 30
    weight = normal(3, 4, seed=1)
    alive = [0, 1, 3]
    found = CRITERIA["obc"](weight, 0, LayerStatistics(hessian=hessian))
    smaller = LayerStatistics(hessian=hessian[:, alive][:, :, alive])
    assert not found[:, 2].any()
    assert torch.allclose(found[:, alive], CRITERIA["obc"](weight[:, alive], 0, smaller))


def test_obc_refuses_what_is_no_second_moment():
    hessian = torch.tensor([[[1.0, 1e6], [1e6, 1.0]]])
    with pytest.raises(ModelError, match="not positive semidefinite"):
        CRITERIA["obc"](torch.ones(1, 2), 0, LayerStatistics(hessian=hessian))


def test_gradients_enter_squared():
    weight, gradient = normal(3, 4), normal(3, 4, seed=1).square()
    told = LayerStatistics(gradient=gradient, sample_gradient=2 * gradient)
    expected = weight.square() * gradient
    assert torch.allclose(CRITERIA["taylor"](weight, 0, told), expected)
    assert torch.allclose(CRITERIA["fisher"](weight, 0, told), expected)


def test_l1_equals_torchs_and_l2_its_square():
    layer = torch.nn.Linear(40, 30)
    expected = oracle.L1Unstructured(0.5).compute_mask(layer.weight, torch.ones(30, 40)).bool()
    for name in ("l1", "l2"):
        saliency = CRITERIA[name](layer.weight)
        assert torch.equal(saliency > saliency.flatten().sort().values[599], expected)


def test_random_differs_by_seed():
    weight = normal(30, 30)
    first, second = (CRITERIA["random"](weight, seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_layer_adaptive_keeps_the_order_and_gives_every_layer_a_one():
    values = normal(5, 6).square()
    adapted = layer_adaptive(values)
    assert torch.equal(values.flatten().argsort(), adapted.flatten().argsort())
    assert adapted.max() == 1
    assert torch.allclose(adapted, layer_adaptive(values * 1e-20))
    assert not layer_adaptive(torch.zeros(4)).any()
