"""Masks remove exactly what was asked, the lowest first; criteria order as their papers say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import ModelError
from tersor.tensors.criteria import CRITERIA
from tersor.tensors.masks import keep_top, removed_by_layer

VALUES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 1e-30, 1e30]), min_size=1, max_size=40)


@given(VALUES, st.data())
def test_keep_top_removes_exactly_the_lowest(values, data):
    saliency = torch.tensor(values)
    removed = data.draw(st.integers(0, len(values)))
    mask = keep_top(saliency, removed)
    assert int((~mask).sum()) == removed
    if 0 < removed < len(values):
        assert saliency[~mask].max() <= saliency[mask].min()


@given(VALUES, st.data())
def test_ties_go_in_the_order_of_their_index(values, data):
    saliency = torch.tensor(values)
    removed = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: (float(saliency[i]), i))
    expected = torch.ones(len(values), dtype=torch.bool)
    expected[order[:removed]] = False
    assert torch.equal(keep_top(saliency, removed), expected)


def test_nan_and_impossible_counts_are_refused():
    with pytest.raises(ModelError, match="NaN"):
        keep_top(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ModelError, match="cannot remove 3 of 2"):
        keep_top(torch.tensor([1.0, 2.0]), 3)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.floats(0, 0.99),
    st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    st.integers(0, 2**31),
)
def test_global_allocation_meets_its_total_and_its_floors(sizes, sparsity, floor, seed):
    generator = np.random.default_rng(seed)
    scores = [
        torch.from_numpy(generator.random(n).astype(np.float32) * 10.0**i)
        for i, n in enumerate(sizes)
    ]
    removed = removed_by_layer(scores, sparsity, floor)
    least = [max(1, int(np.ceil(floor * n))) for n in sizes]
    assert all(n - r >= k for n, r, k in zip(sizes, removed, least, strict=True))
    possible = sum(sizes) - sum(least)
    assert sum(removed) == min(round(sparsity * sum(sizes)), possible)


def test_global_allocation_without_a_floor_is_one_common_threshold():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(500, generator=generator) * s for s in (1.0, 0.8, 2.0)]
    removed = removed_by_layer(scores, 0.6, 0.0)
    pooled = torch.cat(scores)
    threshold = pooled.sort().values[round(0.6 * 1500) - 1]
    assert removed == [int((s <= threshold).sum()) for s in scores]


def test_l1_equals_the_magnitude_and_torchs_own_pruning():
    from torch import nn
    from torch.nn.utils import prune as oracle

    layer = nn.Linear(40, 30)
    mask = keep_top(CRITERIA["l1"](layer.weight, 0), round(0.7 * 1200))
    oracle.l1_unstructured(layer, "weight", amount=0.7)
    assert torch.equal(mask, layer.weight_mask.bool())


def test_lamp_follows_its_equation():
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.5]])
    squared = weight.double().square()
    expected = torch.stack([w / squared[squared >= w].sum() for w in squared.flatten()])
    assert torch.allclose(CRITERIA["lamp"](weight, 0).double().flatten(), expected, atol=1e-7)
