"""Codebooks: the few values that stand for all weights of a layer, found by k-means in one
dimension and fine-tuned by the gradients of their members."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
# A round costs little (it does not touch the values), so that nearly all fits end by themselves.
MOST_ROUNDS = 1000


def k_means(
    values: Array, count: int, weights: Array | None = None, *, pin_zero: bool = False
) -> DoubleArray:
    """At most `count` centroids, ascending, float64: a local minimum of sum weights * (value -
    nearest centroid)^2.

    `values` any shape, finite; `weights` as many, positive (all 1 if None). Where there are no more
    distinct values than `count`, these are the answer, without error. With `pin_zero` the centroid
    nearest to zero is exactly 0 throughout.

    Lloyd's rounds (1982) from evenly spaced centroids between the extremes, which Han, Mao, Dally
    2016, section 3.2, found best: dense places would otherwise draw all centroids, and few but
    large weights matter. The values are sorted once; then a cluster is an interval of them and its
    mean a difference of prefix sums, so that a round takes count * log(values) steps. A cluster
    that lost all its values moves to the farther end of the cluster with the largest error.
    """
    order = np.argsort(values, axis=None) if weights is not None else None
    ascending = (np.sort(values, axis=None) if order is None else values.reshape(-1)[order]).astype(
        np.float64
    )
    is_first = np.append(True, np.diff(ascending) > 0)
    if np.count_nonzero(is_first) <= count:
        return np.asarray(ascending[is_first] + 0.0)
    ones = np.ones(1) if weights is None or order is None else weights.reshape(-1)[order]
    clusters = _Clusters(ascending, np.broadcast_to(ones.astype(np.float64), ascending.shape))
    centroids = np.linspace(ascending[0], ascending[-1], count)
    for _ in range(MOST_ROUNDS):
        moved = clusters.means(centroids)
        if pin_zero:
            moved[np.abs(moved).argmin()] = 0.0
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return np.unique(centroids) + 0.0


class _Clusters:
    """Sorted values (N,) with the sums of weight, weight * value and weight * value^2 before
    each."""

    def __init__(self, ascending: DoubleArray, weights: DoubleArray) -> None:
        self.ascending = ascending
        self.sums = np.zeros((3, ascending.size + 1))
        amounts = weights
        for power in range(3):
            np.cumsum(amounts, out=self.sums[power, 1:])
            amounts = amounts * ascending

    def means(self, centroids: DoubleArray) -> DoubleArray:
        """The mean of the values nearest to each centroid, ascending; lone centroids are moved."""
        middles = centroids[:-1] + np.diff(centroids) / 2
        inner = np.searchsorted(self.ascending, middles)
        bounds = np.concatenate([[0], inner, [self.ascending.size]])
        mass, total, squares = np.diff(self.sums[:, bounds], axis=1)
        first = self.ascending[np.minimum(bounds[:-1], self.ascending.size - 1)]
        last = self.ascending[np.maximum(bounds[1:] - 1, 0)]
        held = np.diff(bounds) > 0
        # Beside huge values the sums lose the digits of small ones; a mean lies between the ends.
        means = np.clip(total / np.where(mass > 0, mass, 1.0), first, np.maximum(first, last))
        if held.all():
            return np.asarray(means)
        error = np.where(held & (first < last), squares - mass * means**2, -np.inf)
        worst = np.argsort(-error)[: np.count_nonzero(~held)]
        worst = worst[error[worst] > -np.inf]
        farther = np.where(means - first > last - means, first, last)
        means[~held] = centroids[~held]
        means[np.flatnonzero(~held)[: worst.size]] = farther[worst]
        return np.asarray(np.sort(means))


def fine_tune_centroids(
    levels: Array, indexes: Array, gradient: Array, learning_rate: float
) -> FloatArray:
    """Centroids after one step down the gradient, (n,) float32 (Han, Mao, Dally 2016, section 3.3).

    `levels` (n,); `indexes` any shape, 0 to n-1; `gradient` of the loss by the level that stands at
    each place, same shape (where value = scale * level, that is the gradient by the value times its
    scale). The gradients of all members of a cluster are summed. The order of the centroids may
    change; sort them with their indexes before building a Grid.
    """
    sums = np.bincount(
        indexes.reshape(-1).astype(np.int64),
        weights=np.asarray(gradient, np.float64).reshape(-1),
        minlength=levels.size,
    )
    return np.asarray(levels - learning_rate * sums, np.float32)
