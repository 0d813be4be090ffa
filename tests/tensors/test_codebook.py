"""k-means in one dimension against an oracle and its own conditions; centroids down the gradient."""

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from tersor.tensors.codebook import fine_tune_centroids, k_means


@pytest.mark.parametrize("count", [2, 4, 16, 64])
def test_k_means_is_that_of_scipy_from_the_same_start(count):
    rng = np.random.default_rng(count)
    values = np.concatenate([rng.normal(size=2000), rng.uniform(-4, 4, 2000)])
    start = np.linspace(values.min(), values.max(), count)
    theirs, _ = kmeans2(values, start, iter=1000, minit="matrix")
    assert np.allclose(k_means(values, count), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 3, 6])
@pytest.mark.parametrize("shape", ["normal", "heavy", "gaps"])
def test_centroids_are_the_means_of_their_members(bits, shape):
    rng = np.random.default_rng(bits)
    values = {
        "normal": rng.normal(size=4000),
        "heavy": rng.standard_t(2, size=4000),
        "gaps": np.concatenate([rng.normal(size=3900), 1000 + rng.normal(size=100)]),
    }[shape]
    centroids = k_means(values, 2**bits)
    assert centroids.size == 2**bits
    nearest = np.abs(values[:, None] - centroids).argmin(axis=1)
    assert np.array_equal(np.unique(nearest), np.arange(2**bits))
    means = np.bincount(nearest, values) / np.bincount(nearest)
    assert np.allclose(centroids, means, rtol=1e-9, atol=1e-9)


def test_a_huge_value_does_not_swallow_the_small_ones():
    small = np.linspace(1, 2, 100)
    first, *others = k_means(np.append(small, -1e30), 4)
    assert first == -1e30 and len(others) == 3
    assert all(1 <= centroid <= 2 for centroid in others)


def test_a_weight_counts_as_that_many_equal_values():
    values = np.random.default_rng(0).normal(size=300)
    times = np.random.default_rng(1).integers(1, 5, 300)
    repeated = k_means(np.repeat(values, times), 8)
    assert np.allclose(k_means(values, 8, times), repeated)


def test_the_gradient_of_a_centroid_is_the_sum_of_its_members():
    levels = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    indexes = np.random.default_rng(0).integers(0, 3, (7, 5)).astype(np.uint8)
    weight = levels[torch.from_numpy(indexes.astype(np.int64))]
    weight.retain_grad()
    (weight**3).sum().backward()
    tuned = fine_tune_centroids(levels.detach().numpy(), indexes, weight.grad.numpy(), 0.01)
    assert np.allclose(tuned, (levels - 0.01 * levels.grad).detach().numpy())
