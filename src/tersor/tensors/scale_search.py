"""Scales of weights: the runs of values that share one, the nearest of a few levels, and the search
for the scale with the least squared error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tersor.errors import ModelError, SpecError
from tersor.tensors.affine import LARGEST, SMALLEST_SCALE

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
GRANULARITIES = ("per_tensor", "per_channel", "per_group")
# Factors of the search: SHRINK^0 to SHRINK^39 (1 to 0.04), then one end's SHRINK^-12 to SHRINK^12
# (2.7 to 0.4), then 41 from SHRINK^-1 to SHRINK.
SHRINK, COARSE, ONE_SIDED, FINE = 0.92, 40, 12, 41
# Values looked at together: few enough that all intermediate arrays stay in the cache.
BLOCK = 1 << 15
SOME_RUNS = 1 << 14
# Up to here, comparing with every border is faster than a binary search for each value.
FEW_BORDERS = 16


@dataclass(frozen=True, eq=False)
class Ladder:
    """Ascending levels (n,) float32 and which of them is nearest to a number.

    Whole numbers one apart follow the pinned formula of affine.py: halves to even. Between other
    levels a tie goes to the one nearer to zero, and between two equally near to the upper one.
    """

    levels: FloatArray

    @cached_property
    def borders(self) -> FloatArray | None:
        """(n - 1,) float32, or None for whole numbers one apart: a float32 belongs above a border
        if it is larger. Exact although the middle of two levels may be no float32."""
        exact = self.levels.astype(np.float64)
        if (np.diff(exact) == 1).all() and exact[0] == np.rint(exact[0]):
            return None
        middles = exact[:-1] + np.diff(exact) / 2
        borders = middles.astype(np.float32)
        too_high = (borders > middles) | ((borders == middles) & (middles <= 0))
        return np.where(too_high, np.nextafter(borders, np.float32(-np.inf)), borders)

    def index(self, steps: FloatArray, zero_point: FloatArray) -> Array:
        """Which level is nearest, uint8, same shape. `steps` = value / scale is overwritten;
        `zero_point` broadcasts against it and is 0 but for whole numbers one apart."""
        if self.borders is None:
            return np.asarray(self._round(steps, zero_point) - self.levels[0], np.uint8)
        if self.borders.size > FEW_BORDERS:
            return np.searchsorted(self.borders, steps).astype(np.uint8)
        above = np.zeros(steps.shape, np.uint8)
        for border in self.borders:
            above += steps > border
        return above

    def snap(self, steps: FloatArray, zero_point: FloatArray) -> FloatArray:
        """The nearest level less `zero_point`, same shape; else as `index`."""
        if self.borders is None:
            nearest = self._round(steps, zero_point)
            nearest -= zero_point
            return nearest
        return self.levels[self.index(steps, zero_point)]

    def _round(self, steps: FloatArray, zero_point: FloatArray) -> FloatArray:
        np.rint(steps, out=steps)
        steps += zero_point
        return np.clip(steps, self.levels[0], self.levels[-1], out=steps)


@dataclass(frozen=True, eq=False)
class Runs:
    """A weight (O, K) cut into runs that share a scale.

    `parts` hold the runs as rows: one part (runs, length), or two where the last group of each row
    is shorter than the others. `smallest` bounds the scale of each run from below, (runs,) float32.
    """

    parts: tuple[FloatArray, ...]
    smallest: tuple[FloatArray, ...]
    num_rows: int
    group_size: int

    @classmethod
    def cut(
        cls, weight: Array, granularity: str, group_size: int, smallest: Array | float = 0.0
    ) -> Runs:
        """Cut `weight` (O, K). A per_group size that does not divide K leaves a shorter last group.

        Raises ModelError for a weight that is no matrix, is empty or holds NaN or infinity,
        SpecError for an unknown granularity or a senseless group size.
        """
        if granularity not in GRANULARITIES:
            allowed = ", ".join(GRANULARITIES)
            raise SpecError(f"granularity must be one of {allowed}, got {granularity!r}")
        if granularity == "per_group" and group_size < 1:
            raise SpecError(f"group_size must be at least 1 column, got {group_size}")
        matrix = np.asarray(weight, np.float32)
        if matrix.ndim != 2 or not matrix.size:
            raise ModelError(
                f"a weight of shape {matrix.shape} has no grid; give a matrix (outputs, inputs) "
                "with one value at least"
            )
        if not np.isfinite(matrix).all():
            raise ModelError("weights hold NaN or infinity; load finite weights before quantizing")
        num_rows, num_columns = matrix.shape
        bound = np.broadcast_to(np.asarray(smallest, np.float32), (num_rows,))
        if granularity == "per_tensor":
            return cls((matrix.reshape(1, -1),), (bound.max(keepdims=True),), 1, num_columns)
        size = min(group_size, num_columns) if granularity == "per_group" else num_columns
        whole = num_columns // size
        parts = [matrix[:, : whole * size].reshape(-1, size)]
        bounds = [np.repeat(bound, whole)]
        if num_columns % size:
            parts.append(matrix[:, whole * size :])
            bounds.append(bound)
        return cls(tuple(parts), tuple(bounds), num_rows, size)

    def join(self, fitted: list[FloatArray]) -> FloatArray:
        """One number for each run of each part, as an array (rows, groups) float32."""
        columns = [values.reshape(self.num_rows, -1) for values in fitted]
        return np.concatenate(columns, axis=1, dtype=np.float32)

    def split(self, joined: FloatArray) -> list[FloatArray]:
        """The inverse of `join`."""
        whole = len(self.parts[0]) // self.num_rows
        columns = [joined[:, :whole], joined[:, whole:]]
        return [values.reshape(-1) for values in columns[: len(self.parts)]]


def extremes(part: FloatArray) -> tuple[DoubleArray, DoubleArray]:
    """(low, high) of each row of `part` (runs, length), zero included, within +-LARGEST."""
    low = np.maximum(part.min(axis=1).astype(np.float64), -LARGEST)
    high = np.minimum(part.max(axis=1).astype(np.float64), LARGEST)
    return np.minimum(low, 0.0), np.maximum(high, 0.0)


def bounded_scales(exact: DoubleArray, smallest: FloatArray, at_zero: float = 1.0) -> FloatArray:
    """Scales as float32, normal and at least `smallest`; `at_zero` where the run holds only zeros
    (exact scale 0)."""
    normal = np.maximum(exact, SMALLEST_SCALE).astype(np.float32)
    return np.maximum(np.where(exact == 0, np.float32(at_zero), normal), smallest)


def fit_scales(
    part: FloatArray,
    ladder: Ladder,
    smallest: FloatArray,
    *,
    symmetric: bool,
    search: str,
) -> tuple[FloatArray, FloatArray]:
    """Scale and zero point, (runs,) float32 each, of every row of `part` (runs, length).

    minmax: the smallest scale with which the outermost levels reach the extremes and zero.
    mse: the extremes are shrunk to where the values that the codes stand for have the least squared
    error: by 40 common factors, then (asymmetric) each end by itself, then by 41 factors around the
    best. Never worse than minmax.

    A run of zeros gets scale 1, so that its codes say 0, or SMALLEST_SCALE where no level is 0: its
    values are then about 1e-38.
    """
    fitted = [
        _fit_scales(part[i : i + SOME_RUNS], ladder, smallest[i : i + SOME_RUNS], symmetric, search)
        for i in range(0, len(part), SOME_RUNS)
    ]
    scales, zero_points = (np.concatenate(arrays) for arrays in zip(*fitted, strict=True))
    return scales, zero_points


def _fit_scales(
    part: FloatArray, ladder: Ladder, smallest: FloatArray, symmetric: bool, search: str
) -> tuple[FloatArray, FloatArray]:
    """`fit_scales` for few enough runs that the arrays (candidates, runs) stay small."""
    levels = ladder.levels
    low, high = extremes(part)
    most = LARGEST / float(np.abs(levels).max())
    at_zero = 1.0 if 0 in levels else SMALLEST_SCALE

    def candidates(factors: DoubleArray) -> tuple[FloatArray, FloatArray]:
        """Scales and zero points (candidates, runs) for shares (candidates, 2, runs) of the
        ends."""
        lows, highs = low * factors[:, 0], high * factors[:, 1]
        if symmetric:
            exact = np.minimum(np.maximum(highs / levels[-1], lows / levels[0]), most)
            scales = bounded_scales(exact, smallest, at_zero)
            return scales, np.zeros_like(scales)
        scales = bounded_scales((highs - lows) / (levels.size - 1), smallest, at_zero)
        offset = np.rint(-lows / scales.astype(np.float64)) + levels[0]
        return scales, np.clip(offset, levels[0], levels[-1]).astype(np.float32)

    best = np.ones((2, low.size))
    for moves in _moves(symmetric) if search == "mse" else ():
        tried = np.minimum(best * moves[:, :, None], 1.0)
        least = squared_errors(part, ladder, *candidates(tried)).argmin(axis=0)
        best = np.take_along_axis(tried, least[None, None, :], axis=0)[0]
    scales, zero_points = candidates(best[None])
    return scales[0], zero_points[0]


def _moves(symmetric: bool) -> Iterator[DoubleArray]:
    """For each pass of the search, factors (candidates, 2) of the two ends; the smallest change
    first, which a tie then keeps."""
    yield np.repeat(SHRINK ** np.arange(COARSE)[:, None], 2, axis=1)
    if not symmetric:
        powers = np.array(sorted(range(-ONE_SIDED, ONE_SIDED + 1), key=abs))[:, None]
        one, other = SHRINK**powers, np.ones_like(powers)
        yield np.concatenate([np.hstack([one, other]), np.hstack([other, one])])
    powers = np.array(sorted(np.linspace(-1, 1, FINE), key=abs))[:, None]
    yield np.repeat(SHRINK**powers, 2, axis=1)


def squared_errors(
    part: FloatArray, ladder: Ladder, scales: FloatArray, zero_points: FloatArray
) -> DoubleArray:
    """Sum over each row of `part` (runs, length) of (decoded value - value)^2, for each candidate.

    `scales` and `zero_points` (candidates, runs) float32; (candidates, runs) float64. The decoded
    values are the float32 that Grid.decode gives, their errors exact in float64.
    """
    errors = np.zeros(scales.shape)
    num_runs, length = part.shape
    height = max(1, BLOCK // length)
    for top in range(0, num_runs, height):
        rows = slice(top, top + height)
        for left in range(0, length, BLOCK):
            block = part[rows, left : left + BLOCK]
            exact = block.astype(np.float64)
            for number in range(len(scales)):
                scale = scales[number, rows, None]
                zero_point = zero_points[number, rows, None]
                decoded = ladder.snap(divide(block, scale), zero_point)
                decoded *= scale
                error = decoded - exact
                errors[number, rows] += np.einsum("ij,ij->i", error, error)
    return errors


def divide(values: FloatArray, scale: FloatArray) -> FloatArray:
    """The pinned float32 division; a quotient past the largest float is infinite, hence
    outermost."""
    with np.errstate(over="ignore"):
        return np.asarray(values / scale, np.float32)
