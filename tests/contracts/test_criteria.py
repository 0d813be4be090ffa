"""What every registered criterion must do with every masked structure: exact counts, masks that only grow, the
same answer for permuted layers, and sense for degenerate weights."""

import numpy as np
import pytest
import torch

from tersor.errors import ModelError, SpecError
from tersor.methods.choose import Choice, removable
from tersor.specs import Prune
from tersor.specs.prune import MASKED
from tersor.tensors.criteria import CRITERIA
from tersor.tensors.statistics import STATISTICS, LayerStatistics

SHAPE, GROUPS = (6, 5, 3, 2), 2  # of 5 inputs no pattern below divides
K = 5 * 3 * 2
DENORMAL = float(np.finfo(np.float32).smallest_subnormal)
LARGEST = float(np.finfo(np.float32).max)

EVERY = pytest.mark.parametrize("name", list(CRITERIA))
EACH = pytest.mark.parametrize("structure", MASKED)


def weight_of(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def statistics_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(GROUPS, 100, K, generator=generator)
    hessian = inputs.transpose(1, 2) @ inputs / 100
    gradient = torch.rand(SHAPE, generator=generator)
    norms = hessian.diagonal(dim1=1, dim2=2)
    return LayerStatistics(norms, hessian, gradient, gradient.square())


def request(name, structure, sparsity=0.5, pattern="2:4"):
    return Prune(criterion=name, structure=structure, sparsity=sparsity, pattern=pattern)


def mask_of(spec, weight, seed=0, statistics=None, before=None, share=1.0):
    before = torch.ones_like(weight, dtype=torch.bool) if before is None else before
    choice = Choice(spec, removable(spec, weight.shape), seed)
    return choice(weight, before, statistics or statistics_of(), share)


def num_removed(spec):
    if spec.structure == "n_m":  # 2 of 4 and, of the last one, none
        return 2 * 6 * 6
    size = 5 if spec.structure == "stripe" else 1
    return int(spec.sparsity * 180 + 0.5) // size * size


@EVERY
def test_saliencies_are_finite_seeded_not_negative_and_leave_their_input(name):
    for values in (weight_of(), torch.zeros(SHAPE), weight_of() * 1e15, weight_of() * (LARGEST / 9)):
        before = values.clone()
        saliency = CRITERIA[name](values, 3, statistics_of())
        assert saliency.shape == values.shape
        assert torch.isfinite(saliency).all() and (saliency >= 0).all()
        assert torch.equal(saliency, CRITERIA[name](values, 3, statistics_of()))
        assert torch.equal(values, before)


@EVERY
@EACH
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
def test_counts_are_exact(name, structure, sparsity):
    spec = request(name, structure, sparsity)
    mask = mask_of(spec, weight_of())
    assert mask.shape == SHAPE and mask.dtype == torch.bool
    assert int((~mask).sum()) == num_removed(spec) == removable(spec, mask.shape)
    if structure == "stripe":
        assert torch.equal(mask.all(1), mask.any(1))
    if structure == "n_m":
        assert (mask[:, :4].sum(1) == 2).all() and mask[:, 4].all()


@EVERY
@EACH
def test_masks_are_nested_as_sparsity_grows(name, structure):
    weight, before = weight_of(1), None
    for step in range(1, 9):
        if structure == "n_m":
            mask = mask_of(request(name, structure, pattern="1:5"), weight, share=step / 8)
        else:
            mask = mask_of(request(name, structure, step / 9), weight)
        assert before is None or not (mask & ~before).any()
        before = mask


@EVERY
@EACH
def test_what_is_gone_goes_first(name, structure):
    before = mask_of(request("random", structure, 0.4, "3:4"), weight_of(), seed=5)
    spec = request(name, structure, 0.7)
    mask = mask_of(spec, weight_of(), before=before)
    assert int((~mask).sum()) == num_removed(spec)
    assert not mask[~before].any()


@EVERY
@EACH
def test_permuted_layers_have_permuted_masks(name, structure):
    if name == "random":
        pytest.skip("noise belongs to places")
    told, weight = statistics_of(), weight_of(2)
    spec = request(name, structure, 0.6)
    expected = mask_of(spec, weight, statistics=told)
    outputs = torch.tensor([2, 0, 1, 5, 3, 4])  # within the groups
    moved = LayerStatistics(
        told.input_sq_norm, told.hessian, told.gradient[outputs], told.sample_gradient[outputs]
    )
    found = mask_of(spec, weight[outputs], statistics=moved)
    assert torch.equal(found, expected[outputs])
    if structure == "n_m":
        return  # which inputs share a pattern is a matter of their place
    inputs = torch.tensor([3, 1, 4, 0, 2])
    columns = torch.arange(K).view(5, 3, 2)[inputs].flatten()
    moved = LayerStatistics(
        told.input_sq_norm[:, columns],
        told.hessian[:, columns][:, :, columns],
        told.gradient[:, inputs],
        told.sample_gradient[:, inputs],
    )
    found = mask_of(spec, weight[:, inputs], statistics=moved)
    assert torch.equal(found, expected[:, inputs])


@EVERY
@EACH
@pytest.mark.parametrize(
    "values", [0.0, 1.0, LARGEST, DENORMAL], ids=["zero", "constant", "huge", "denormal"]
)
def test_equal_weights_lose_exactly_what_was_asked(name, structure, values):
    spec = request(name, structure, 0.5)
    mask = mask_of(spec, torch.full(SHAPE, values))
    assert int((~mask).sum()) == num_removed(spec)


@EVERY
def test_the_scale_of_a_layer_does_not_matter_within_it(name):
    spec = request(name, "unstructured", 0.5)
    expected = mask_of(spec, weight_of(3))
    for power in (-100, -60, 60, 120):
        assert torch.equal(mask_of(spec, torch.ldexp(weight_of(3), torch.tensor(power))), expected)


@EVERY
def test_dead_inputs_are_no_error(name):
    dead = LayerStatistics(
        torch.zeros(GROUPS, K), torch.zeros(GROUPS, K, K), torch.zeros(SHAPE), torch.zeros(SHAPE)
    )
    saliency = CRITERIA[name](weight_of(), 0, dead)
    assert torch.isfinite(saliency).all()
    if CRITERIA[name].needs:
        assert not saliency.any()


@EVERY
@EACH
def test_nan_is_refused(name, structure):
    if name == "random":
        pytest.skip("noise does not look at weights; plan refuses them before")
    weight = weight_of()
    weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        mask_of(request(name, structure), weight)


@EVERY
def test_a_missing_statistic_is_named(name):
    needs = CRITERIA[name].needs
    assert needs <= set(STATISTICS)
    if not needs:
        CRITERIA[name](weight_of(), 0)
        return
    with pytest.raises(SpecError, match=f"{name}.*{sorted(needs)[0]}"):
        CRITERIA[name](weight_of(), 0)
