"""Grids: the few values that the codes of a weight stand for, and how they are fitted to it.

A weight is a matrix (O, K), output channels first. value = scale * (level - zero_point): all rows
and groups share the levels, each has its own scale. Adding a code is a function with the decorator:
it gets the runs of values that share a scale and gives a Grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tersor.errors import ModelError, SpecError
from tersor.registry import Registry
from tersor.tensors.affine import LARGEST, SMALLEST_SCALE
from tersor.tensors.codebook import k_means
from tersor.tensors.scale_search import (
    Ladder,
    Runs,
    bounded_scales,
    divide,
    fit_scales,
    squared_errors,
)

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
SEARCHES = ("minmax", "mse")
# 2^-30 of the largest weight is less than half a float32 step of it: more exponents say nothing.
MOST_EXPONENTS = 31
# Levels of a codebook with scales are at least this far apart, in units of the largest, so that a
# level is found again from its float32 value.
CLOSEST_LEVELS = 2.0**-20
# Of the mean magnitude: what Li, Zhang, Liu 2016 keep of a ternary weight.
TERNARY_THRESHOLD = 0.7
ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that codes stand for: value = scale * (level - zero_point), level =
    levels[index].

    levels      (n,) float32, ascending, 2 <= n <= 2^bits.
    scale       (O or 1, G) float32 > 0, G groups of `group_size` columns; the last may be shorter.
    zero_point  shape of scale, whole numbers as float32; all 0 where symmetric.
    group_size  columns that share a scale; K where there is one group.

    Raises ModelError for arrays that do not fit together.
    """

    levels: FloatArray
    scale: FloatArray
    zero_point: FloatArray
    group_size: int
    bits: int

    def __post_init__(self) -> None:
        kinds = [str(array.dtype) for array in (self.levels, self.scale, self.zero_point)]
        if kinds != ["float32"] * 3:
            raise ModelError(f"levels, scale and zero point are float32, got {', '.join(kinds)}")
        # compared, not subtracted: the distance of two float32 may overflow
        count, ascending = self.levels.size, bool((self.levels[1:] > self.levels[:-1]).all())
        if self.levels.ndim != 1 or not (2 <= count <= 2**self.bits <= 256 and ascending):
            raise ModelError(
                f"a grid of {self.bits} bits holds 2 to {2**self.bits} ascending levels, got "
                f"{self.levels.tolist()}"
            )
        if self.scale.ndim != 2 or self.zero_point.shape != self.scale.shape:
            raise ModelError(
                f"scale and zero point of a grid have one shape (rows, groups), got "
                f"{self.scale.shape} and {self.zero_point.shape}"
            )
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ModelError("the scales of a grid must be finite and above zero")
        if self.zero_point.any() and self._ladder.borders is not None:
            raise ModelError("only levels that are whole numbers one apart take a zero point")

    @cached_property
    def _ladder(self) -> Ladder:
        return Ladder(self.levels)

    @property
    def integers(self) -> bool:
        """Whether the levels are whole numbers within -128 to 127: integer kernels can run them."""
        whole = (self.levels == np.rint(self.levels)).all()
        return bool(whole and self.levels[0] >= -128 and self.levels[-1] <= 127)

    def encode(self, values: Array, columns: Array | None = None) -> Array:
        """Index into `levels` of the nearest value, (O, k) uint8, of `values` (O, k) float.

        `columns` (k,) says which columns of K these are (default: the first k). The quotient value
        / scale is float32; ties as in `Ladder`. Infinities take the outermost levels; NaN raises
        ModelError.
        """
        exact = np.asarray(values, np.float32)
        steps = divide(exact, self._of_columns(self.scale, exact.shape, columns))
        if np.isnan(steps).any():
            raise ModelError("NaN has no code; clean the values before quantizing")
        return self._ladder.index(steps, self._of_columns(self.zero_point, exact.shape, columns))

    def decode(self, indexes: Array, columns: Array | None = None) -> FloatArray:
        """Values (O, k) float32 of `indexes` (O, k), bit-equal to ONNX's DequantizeLinear: the
        difference of level and zero point is exact, its product with the scale float32."""
        offsets = self.levels[indexes]
        offsets -= self._of_columns(self.zero_point, indexes.shape, columns)
        offsets *= self._of_columns(self.scale, indexes.shape, columns)
        return offsets

    def _of_columns(
        self, numbers: FloatArray, shape: tuple[int, ...], columns: Array | None
    ) -> FloatArray:
        """`numbers` (rows, groups) so that they broadcast against (O, k)."""
        num_rows, num_groups = numbers.shape
        if len(shape) != 2 or num_rows not in (1, shape[0]):
            raise ModelError(
                f"this grid has scales for {num_rows} rows; values of shape {shape} do not fit"
            )
        if num_groups == 1:
            return numbers
        groups = (np.arange(shape[1]) if columns is None else columns) // self.group_size
        if groups.size and not (groups.min() >= 0 and groups.max() < num_groups):
            raise ModelError(
                f"this grid has {num_groups} groups of {self.group_size} columns; there is no "
                f"column {int(np.max(columns)) if columns is not None else shape[1] - 1}"
            )
        return numbers[:, groups]


GRIDS: Registry[Callable[..., Grid]] = Registry("weight code")


def fit_grid(
    code: str,
    weight: Array,
    bits: int,
    *,
    symmetric: bool,
    granularity: str,
    group_size: int,
    search: str = "minmax",
    smallest: Array | float = 0.0,
) -> Grid:
    """The grid of the registered `code` that suits `weight` (O, K) best.

    granularity  what shares a scale: per_tensor, per_channel (row), or per_group of `group_size`
                 columns of a row; a size that does not divide K leaves a shorter last group.
    search       minmax: by the extremes, or as the code's own paper says; mse: least squared error.
    smallest     bounds the scales from below: a number, or (O,) one for each row.

    A run of zeros gets scale 1 where 0 is a level, so that it decodes to exactly 0, else the
    smallest normal float. Raises SpecError for a request that makes no sense, ModelError for a
    weight that is no matrix or holds NaN or infinity.
    """
    fit = GRIDS[code]
    if search not in SEARCHES:
        raise SpecError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    runs = Runs.cut(weight, granularity, group_size, smallest)
    return fit(runs, bits, symmetric=symmetric, search=search)


@GRIDS.register("uniform")
def uniform(runs: Runs, bits: int, *, symmetric: bool, search: str) -> Grid:
    """Evenly spaced levels, 2 to 8 bits; the pinned formula of affine.py.

    Symmetric at 8 bits: -127 to 127, as choose_symmetric. At 3 to 7 bits the narrow range, or the
    full one with one more level below, whichever has less squared error over the whole weight (the
    narrow one at a tie). At 2 bits -3, -1, 1, 3 (no zero, but four useful levels), or -2 to 1.
    Asymmetric: -2^(bits-1) to 2^(bits-1) - 1 with a zero point among them, so that 0 is exact.
    """
    _require_bits("uniform", bits, 2, 8, "for 1 bit use code binary")
    half = 2 ** (bits - 1)
    full = np.arange(-half, half, dtype=np.float32)
    if not symmetric:
        return _fitted(runs, full, bits, search, symmetric=False)
    narrow = full[1:] if bits > 2 else np.array([-3, -1, 1, 3], np.float32)
    first = _fitted(runs, narrow, bits, search)
    if bits == 8:
        return first
    return min(first, _fitted(runs, full, bits, search), key=lambda grid: _error(runs, grid))


@GRIDS.register("power_of_two")
def power_of_two(runs: Runs, bits: int, *, symmetric: bool, search: str) -> Grid:
    """A sign and an exponent: levels 0 and +-2^e, e from 0 to 2^(bits-1) - 2 (as in Zhou 2017).

    2 to 8 bits. At 4 bits and fewer the levels are whole numbers up to 64, so that integer kernels
    run them. There are at most 31 exponents: 7 and 8 bits hold no more than 6. The scale is free,
    as for every code; a product with a level is a shift.
    """
    _require_bits("power_of_two", bits, 2, 8, "for 1 bit use code binary")
    _require_symmetric("power_of_two", symmetric)
    powers = np.exp2(np.arange(min(2 ** (bits - 1) - 1, MOST_EXPONENTS)))
    levels = np.concatenate([-powers[::-1], [0.0], powers]).astype(np.float32)
    return _fitted(runs, levels, bits, search)


@GRIDS.register("ternary")
def ternary(runs: Runs, bits: int, *, symmetric: bool, search: str) -> Grid:
    """Levels -1, 0, 1 (bits 2); ternary weight networks, Li, Zhang, Liu 2016.

    The scale is the mean magnitude of the weights kept: for search minmax those above 0.7 times the
    mean magnitude, their threshold; for mse those k largest whose (sum of magnitudes)^2 / k is
    greatest, which is the exact minimum of the squared error that the threshold stands in for. The
    codes are the nearest levels: the least error for the scale.
    """
    _require_bits("ternary", bits, 2, 2, "its levels -1, 0, 1 take 2")
    _require_symmetric("ternary", symmetric)
    scales = []
    for part, smallest in zip(runs.parts, runs.smallest, strict=True):
        magnitude = _magnitudes(part)
        if search == "mse":
            kept = np.sort(magnitude, axis=1)[:, ::-1].cumsum(axis=1)
            number = np.arange(1, kept.shape[1] + 1)
            best = (kept**2 / number).argmax(axis=1)[:, None]
            exact = np.take_along_axis(kept, best, axis=1)[:, 0] / (best[:, 0] + 1)
        else:
            above = magnitude > TERNARY_THRESHOLD * magnitude.mean(axis=1, keepdims=True)
            kept = np.where(above, magnitude, 0.0).sum(axis=1)
            exact = kept / np.maximum(above.sum(axis=1), 1)
        scales.append(bounded_scales(exact, smallest))
    return _symmetric(runs, np.array([-1, 0, 1], np.float32), scales, bits)


@GRIDS.register("binary")
def binary(runs: Runs, bits: int, *, symmetric: bool, search: str) -> Grid:
    """Levels -1, 1 (bits 1) with the mean magnitude as scale, which has the least squared error for
    either search (Rastegari 2016, section 3.1). Zero has the code of 1."""
    _require_bits("binary", bits, 1, 1, "its levels -1, 1 take 1")
    _require_symmetric("binary", symmetric)
    scales = [
        bounded_scales(_magnitudes(part).mean(axis=1), smallest, SMALLEST_SCALE)
        for part, smallest in zip(runs.parts, runs.smallest, strict=True)
    ]
    return _symmetric(runs, np.array([-1, 1], np.float32), scales, bits)


@GRIDS.register("codebook")
def codebook(runs: Runs, bits: int, *, symmetric: bool, search: str) -> Grid:
    """The 2^bits centroids of k-means over all weights (Han, Mao, Dally 2016), 1 to 8 bits.

    One run: scale 1, the levels are the values. Several: each is divided by its largest magnitude
    first, and every weight counts in k-means by the square of that, so that the squared error of
    the weights themselves is minimised. search mse then improves scales (least squares) and levels
    in turns; k-means over one run has the least squared error already.

    Where zeros are more than their share of 1 / 2^bits, the weight was pruned: the level nearest to
    zero is then exactly 0, so that they stay zeros (not at 1 bit, which needs both its levels).
    """
    _require_bits("codebook", bits, 1, 8, "more would be as large as the weights")
    _require_symmetric("codebook", symmetric)
    weights = [np.clip(part, -LARGEST, LARGEST) for part in runs.parts]
    one_run = sum(len(part) for part in weights) == 1
    exact = [np.ones(1)] if one_run else [np.abs(part).max(axis=1) for part in weights]
    scales = [
        bounded_scales(s.astype(np.float64), b) for s, b in zip(exact, runs.smallest, strict=True)
    ]
    best = _shared_levels(runs, weights, scales, bits, one_run)
    if search == "minmax" or one_run:
        return best
    least = _error(runs, best)
    for _ in range(ROUNDS):
        scales = _refitted(runs, weights, best)
        grid = _shared_levels(runs, weights, scales, bits, one_run)
        error = _error(runs, grid)
        if error >= least:
            break
        best, least = grid, error
    return best


def _shared_levels(
    runs: Runs, weights: list[FloatArray], scales: list[FloatArray], bits: int, one_run: bool
) -> Grid:
    """The codebook of the weights divided by given scales."""
    held = [part.any(axis=1) for part in weights]
    values = [
        (p[h] / s[h, None]).reshape(-1) for p, s, h in zip(weights, scales, held, strict=True)
    ]
    squares = [
        np.repeat(s[h].astype(np.float64) ** 2, p.shape[1])
        for p, s, h in zip(weights, scales, held, strict=True)
    ]
    num_zeros = sum(p.size - np.count_nonzero(p) for p in weights)
    pruned = bits > 1 and num_zeros * 2**bits > sum(p.size for p in weights)
    if pruned:  # also where all zeros lie in runs of zeros, which are left out above
        values.append(np.zeros(1, np.float32))
        squares.append(np.concatenate([*squares, [1.0]]).min(keepdims=True))
    flat = np.concatenate(values)
    mass = None if one_run else np.concatenate(squares)
    levels = k_means(flat, 2**bits, mass, pin_zero=pruned) if flat.size else np.zeros(1)
    if any((s != 1).any() for s in scales) and levels.any():
        gap = CLOSEST_LEVELS * 2.0 ** np.floor(np.log2(np.abs(levels).max()))
        levels = np.rint(levels / gap) * gap + 0.0
    distinct = np.unique(levels.astype(np.float32))
    if distinct.size == 1:
        distinct = np.unique(np.append(distinct, np.float32(0.0 if distinct[0] else 1.0)))
    at_zero = 1.0 if 0 in distinct else SMALLEST_SCALE
    final = [
        np.where(h, s, np.maximum(np.float32(at_zero), b))
        for h, s, b in zip(held, scales, runs.smallest, strict=True)
    ]
    return _symmetric(runs, distinct, final, bits)


def _refitted(runs: Runs, weights: list[FloatArray], grid: Grid) -> list[FloatArray]:
    """Scales that fit the codes of `grid` to the weights best: <w, level> / <level, level>."""
    ladder, refitted = Ladder(grid.levels), []
    largest = LARGEST / float(np.abs(grid.levels).max())
    for part, scale, smallest in zip(weights, runs.split(grid.scale), runs.smallest, strict=True):
        level = ladder.snap(divide(part, scale[:, None]), np.zeros((1, 1), np.float32))
        level = level.astype(np.float64)
        product, square = (level * part).sum(axis=1), (level * level).sum(axis=1)
        fitted = np.where(product > 0, product / np.where(square > 0, square, 1.0), scale)
        refitted.append(bounded_scales(np.minimum(fitted, largest), smallest))
    return refitted


def _fitted(
    runs: Runs, levels: FloatArray, bits: int, search: str, *, symmetric: bool = True
) -> Grid:
    """The grid of given levels with a fitted scale for each run."""
    fitted = [
        fit_scales(part, Ladder(levels), smallest, symmetric=symmetric, search=search)
        for part, smallest in zip(runs.parts, runs.smallest, strict=True)
    ]
    scale, zero_point = (runs.join([pair[i] for pair in fitted]) for i in (0, 1))
    return Grid(levels, scale, zero_point, runs.group_size, bits)


def _symmetric(runs: Runs, levels: FloatArray, scales: list[FloatArray], bits: int) -> Grid:
    scale = runs.join(scales)
    return Grid(levels, scale, np.zeros_like(scale), runs.group_size, bits)


def _error(runs: Runs, grid: Grid) -> float:
    """Squared error of the whole weight."""
    ladder = Ladder(grid.levels)
    pairs = zip(runs.split(grid.scale), runs.split(grid.zero_point), strict=True)
    return sum(
        float(squared_errors(part, ladder, scale[None], zero_point[None]).sum())
        for part, (scale, zero_point) in zip(runs.parts, pairs, strict=True)
    )


def _magnitudes(part: FloatArray) -> npt.NDArray[np.float64]:
    return np.asarray(np.minimum(np.abs(part.astype(np.float64)), LARGEST))


def _require_bits(code: str, bits: int, least: int, most: int, remedy: str) -> None:
    if not least <= bits <= most:
        allowed = f"{least}" if least == most else f"{least} to {most}"
        raise SpecError(f"weight code {code} has {allowed} bits, got {bits}; {remedy}")


def _require_symmetric(code: str, symmetric: bool) -> None:
    if not symmetric:
        raise SpecError(
            f"asymmetric levels belong to weight code uniform; {code} has its own: ask for "
            "symmetric"
        )
