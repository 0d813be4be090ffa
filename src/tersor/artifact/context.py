"""Codes of a weight under a model of their neighbours: adaptive, in whole numbers, many at a time.

A step takes all codes of one position in a block of rows (`grid`); it is coded under tables and sums
that only earlier steps have filled. Three decisions a code, each under a context: is it 0; its sign;
its size. The contexts know

- what the row, the column and the channel let expect (`activity`),
- how large the neighbours in the kernel are,
- a prediction of the value from its neighbours, its column and its row (weights stored).

The decisions follow DeepCABAC (Wiedemann et al. 2020); contexts by whole steps, the sums over rows
and columns and the predicted signs are ours.
"""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from tersor.artifact.activity import OCTAVE, ONE, Ints, Sums
from tersor.artifact.encoding import Array
from tersor.artifact.entropy import UNIT, Coder, Counts
from tersor.artifact.grid import Grid

MAX_MAGNITUDE = 255
LIMIT = 8192  # symbols of one context before old ones are halved
PREDICTION_PARTS = 1024  # of one step of the codes
# Classes of what is expected, half an octave each, and the class of an expected mean of 1.
_HALF, _HALF_BITS = OCTAVE // 2, 5
FLAG_SCALES, SPARSE_ONE, DENSE_ONE = 32, 24, 8
SIZE_SCALES, SIZE_ONE = 24, 8
# Percent of the mean size from which neighbours, or a prediction, count for one level more.
ENERGY_STEPS = (1, 50, 90, 140, 220)
PREDICTION_STEPS = (1, 4, 10, 20, 35, 55, 80, 120, 180)
# What a level of the prediction means for "is it 0", and for the size where the sign is as predicted
# (the first ten) or is not.
_FLAG_LEVEL = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 3], np.int64)
_SIZE_LEVEL = np.array([3, 3, 3, 4, 4, 5, 6, 6, 7, 8, 3, 3, 3, 2, 2, 1, 1, 0, 0, 0], np.int64)
_EXACT = 8  # magnitudes 1 to 8 are symbols of their own; then four symbols an octave


@dc.dataclass(frozen=True)
class Model:
    """What a grid is coded under.

    largest   the largest magnitude that is possible, 1 to 255
    dense     magnitudes (up to 15) are summed in rows and columns, not whether they are 0
    striped   flags say which rows have only 0 at a position
    cut       flags say which columns (a channel at a position) have only 0
    weights   int8 (positions, NEIGHBOURS), of the prediction, nearest first, in 1/64
    means     int8 (2,): the weights of the column's and of the row's mean
    """

    largest: int
    dense: bool
    striped: bool
    cut: bool
    weights: npt.NDArray[np.int8]
    means: npt.NDArray[np.int8]


# Takes rows from, to, the position, and the codes (rows, channels) found there.
Put = Callable[[int, int, int, Array], None]


def code_grid(coder: Coder, grid: Grid, model: Model, codes: Array | None, put: Put | None) -> None:
    """Write `codes` (rows, positions, channels), whole numbers up to `model.largest` in magnitude, or
    read them and `put` them step by step."""
    walk_grid(Walk(grid, model), coder, codes, put)


def walk_grid(walk: Walk, coder: Coder, codes: Array | None, put: Put | None) -> None:
    """`code_grid` with a walk of the caller's."""
    grid = walk.grid
    if walk.model.cut:
        walk.cut(coder, codes)
    for start, end in grid.blocks():
        walk.begin(end - start)
        for position in range(grid.positions):
            known = None if codes is None else codes[start:end, position].astype(np.int32)
            found = walk.step(coder, position, known)
            if put is not None:
                put(start, end, position, found)
        walk.end()
        coder.boundary()


class Walk:
    """The state that both sides keep in step."""

    def __init__(self, grid: Grid, model: Model) -> None:
        self.grid, self.model = grid, model
        one = DENSE_ONE if model.dense else SPARSE_ONE
        self.flag_offset = _HALF * one - ONE * OCTAVE + _HALF // 2
        self.flags = Counts(_flag_prior(one), LIMIT)
        self.signs = Counts(np.full((len(PREDICTION_STEPS) + 1, 2), 4 * UNIT, np.int64), LIMIT)
        self.sizes = Counts(_size_prior(int(size_symbols(np.array([model.largest]))[0][0])), LIMIT)
        self.stripes = Counts(np.full((2 * grid.positions, 2), UNIT, np.int64), LIMIT)
        self.columns = np.ones((grid.positions, grid.channels), np.int64)
        self.active = Sums(grid.channels, grid.positions, relative=True)
        self.extent = Sums(grid.channels, grid.positions, relative=False)
        self.column_total = np.zeros((grid.positions, grid.channels), np.int64)
        self.num_rows = 0
        self.nearby = [grid.neighbours(p) for p in range(grid.positions)]

    def cut(self, coder: Coder, known: Array | None) -> None:
        """Which columns hold anything: one flag each, beside that of the position before."""
        table = Counts(np.full((2, 2), UNIT, np.int64), LIMIT)
        before = np.ones(self.grid.channels, np.int64)
        for position in range(self.grid.positions):
            told = None if known is None else known[:, position].any(axis=0)
            before = coder.symbols(table, before, told).astype(np.int64)
            table.update(self.columns[position - 1] if position else np.ones_like(before), before)
            self.columns[position] = before

    def begin(self, rows: int) -> None:
        """Start a block of `rows` rows."""
        self.rows = rows
        self.active.begin(rows)
        self.extent.begin(rows)
        self.row_total = np.zeros(rows, np.int64)
        self.row_coded = 0
        self.live = np.ones(rows, np.int64)
        held = self.grid.positions if self.grid.width else 0
        self.history = np.zeros((held, rows * self.grid.channels), np.float32)
        mean = self.extent.mean() + (1 << ONE)  # of the magnitudes that are not 0
        self.energy_level = _levels(ENERGY_STEPS, mean, 1, 2 * MAX_MAGNITUDE + 1)
        self.prediction_level = _levels(PREDICTION_STEPS, mean, PREDICTION_PARTS >> 3, 1 << 14)

    def end(self) -> None:
        """All positions of the block are coded."""
        self.num_rows += self.rows

    def step(self, coder: Coder, position: int, known: Array | None) -> Array:
        """All codes (rows, channels) of one position of the block, int32."""
        shape = (self.rows, self.grid.channels)
        if self.model.striped:
            index = 2 * position + self.live
            told = None if known is None else known.any(axis=1)
            self.live = coder.symbols(self.stripes, index, told).astype(np.int64)
            self.stripes.update(index, self.live)
        index, predicted, level = self.contexts(position)
        flat = None if known is None else known.ravel()
        lanes = self.flagged(coder, position, index, None if flat is None else flat != 0)
        values = np.zeros(index.size, np.int32)
        part = None if flat is None else flat[lanes]
        values[lanes] = self.nonzero(
            coder, position, lanes, predicted.take(lanes), level.take(lanes), part
        )
        self.take(position, values.reshape(shape))
        return values.reshape(shape)

    def contexts(self, position: int) -> tuple[Ints, Array, Array]:
        """(rows * channels,) each: the context of "is it 0", the prediction and its level."""
        predicted = self.predict(position)
        level = np.abs(predicted).astype(np.int64) >> 3
        level = self.prediction_level.take(np.minimum(level, len(self.prediction_level) - 1))
        row_term, channel_term = self.active.terms(position)
        index = _scales(row_term + self.flag_offset, channel_term, FLAG_SCALES)
        index += (4 * FLAG_SCALES * self.energy_level).take(self.energy(position))
        index += (FLAG_SCALES * _FLAG_LEVEL).take(level)
        return index, predicted, level

    def flagged(self, coder: Coder, position: int, index: Ints, known: Array | None) -> Array:
        """The places (n,) of the codes that are not 0."""
        if not self.model.striped and not self.model.cut:
            flags = coder.symbols(self.flags, index, known)
            self.flags.update(index, flags)
            return np.flatnonzero(flags)
        columns = np.flatnonzero(self.columns[position])
        rows = np.flatnonzero(self.live) * self.grid.channels
        lanes = (rows[:, None] + columns[None]).ravel()
        flags = coder.symbols(self.flags, index[lanes], None if known is None else known[lanes])
        self.flags.update(index[lanes], flags)
        return np.asarray(lanes[flags != 0])

    def nonzero(
        self, coder: Coder, position: int, lanes: Array, predicted: Array, level: Array, known: Any
    ) -> Array:
        """The codes at `lanes`, which are not 0: their signs, then their sizes."""
        below = predicted < 0
        signs = coder.symbols(self.signs, level, None if known is None else (known < 0) ^ below)
        self.signs.update(level, signs)
        index = self.extents(position).take(lanes) + size_contexts(signs, level)
        wanted = (None, None) if known is None else size_symbols(np.abs(known))
        sizes = coder.symbols(self.sizes, index, wanted[0])
        self.sizes.update(index, sizes)
        magnitudes, widths = _FIRST.take(sizes), _WIDTH.take(sizes)
        wide = np.flatnonzero(widths > 1)
        rest = None if wanted[1] is None else wanted[1][wide]
        magnitudes[wide] += coder.uniform(widths[wide], rest)
        return np.where((signs == 1) ^ below, -magnitudes, magnitudes)

    def extents(self, position: int) -> Ints:
        """(rows * channels,): the classes of the size that is expected."""
        row_term, channel_term = self.extent.terms(position)
        offset = _HALF * SIZE_ONE - ONE * OCTAVE + _HALF // 2
        return _scales(row_term + offset, channel_term, SIZE_SCALES)

    def predict(self, position: int) -> Array:
        """(rows * channels,) in 1/PREDICTION_PARTS. Whole numbers below 2^24 throughout, which
        float32 adds and multiplies without rounding, in any order."""
        column = (self.column_total[position] << 4) // (self.num_rows + 2)
        row = (self.row_total << 4) // (self.row_coded + 8)
        by_column, by_row = (int(weight) for weight in self.model.means)
        found = (by_row * row)[:, None] + (by_column * column)[None]
        found = found.astype(np.float32).ravel()
        near = self.nearby[position]
        weights = self.model.weights[position, : len(near)].astype(np.float32)
        if weights.any():
            found += (16 * weights) @ self.history[near]
        return np.asarray(found)

    def energy(self, position: int) -> Ints:
        """(rows * channels,): the magnitudes one position before and one row of the kernel above,
        added."""
        found = np.zeros(self.rows * self.grid.channels, np.float32)
        for back in {1, self.grid.width} if self.grid.width else ():
            if position >= back:
                found += np.abs(self.history[position - back])
        return found.astype(np.int64)

    def take(self, position: int, values: Array) -> None:
        """Add the codes of a step to the sums."""
        wide = values.astype(np.int64)
        magnitude = np.abs(wide)
        nonzero = (magnitude > 0).astype(np.int64)
        active = np.minimum(magnitude, 15) if self.model.dense else nonzero
        self.active.add(position, active, None, self.live)
        self.extent.add(position, magnitude - nonzero, nonzero, self.live)
        self.column_total[position] += wide.sum(axis=0)
        self.row_total += wide.sum(axis=1)
        self.row_coded += self.grid.channels
        if self.grid.width:
            self.history[position] = values.ravel()


def _size_classes() -> tuple[Array, Array]:
    first, width = list(range(1, _EXACT + 1)), [1] * _EXACT
    step = _EXACT // 4
    while first[-1] + width[-1] <= MAX_MAGNITUDE:
        for _ in range(4):
            first.append(first[-1] + width[-1])
            width.append(step)
        step *= 2
    return np.array(first, np.int32), np.array(width, np.int32)


_FIRST, _WIDTH = _size_classes()


def size_symbols(magnitudes: Array) -> tuple[Array, Array]:
    """The symbols of magnitudes from 1 to MAX_MAGNITUDE, and how far above the first of its symbol
    each is."""
    symbols = np.searchsorted(_FIRST, magnitudes, side="right") - 1
    return symbols, magnitudes - _FIRST[symbols]


def widths_of(symbols: Any) -> Any:
    """How many magnitudes each symbol of `size_symbols` stands for."""
    return _WIDTH[symbols]


def size_contexts(signs: Array, level: Array) -> Ints:
    """What a sign (1 where it is not as predicted) and the prediction's level add to the class of the
    size that is expected."""
    return (SIZE_SCALES * _SIZE_LEVEL).take(len(_SIZE_LEVEL) // 2 * signs + level)


def _scales(row_term: Ints, channel_term: Ints, number: int) -> Ints:
    """(rows * channels,): the classes, half an octave each and `number` in all, of the sums of two
    terms."""
    found = (row_term[:, None] + channel_term[None]).ravel()
    found >>= _HALF_BITS
    np.maximum(found, 0, out=found)
    np.minimum(found, number - 1, out=found)
    return np.asarray(found)


def _levels(steps: tuple[int, ...], mean: int, parts: int, size: int) -> Array:
    """For the whole numbers from 0 to `size` - 1, in 1/parts: how many of `steps` (percent of `mean`)
    they reach."""
    bounds = [-(-step * mean * parts // (100 << ONE)) for step in steps]
    return np.searchsorted(np.array(bounds), np.arange(size), side="right")


def _half_octaves(steps: int) -> int:
    """2^(steps / 2) in 1/2^32, rounded down, by whole numbers alone."""
    return isqrt(1 << (64 + steps))


@functools.cache
def _flag_prior(one: int) -> Ints:
    """Where a mean of m is expected, a code is not 0 with probability m / (1 + m): as if seen 6
    times."""
    rows = []
    for scale in range(FLAG_SCALES):
        mean = _half_octaves(scale - one)
        nonzero = min(max(mean * 6 * UNIT // (mean + (1 << 32)), 1), 6 * UNIT - 1)
        rows.append((6 * UNIT - nonzero, nonzero))
    return np.tile(np.array(rows, np.int64), (4 * (len(ENERGY_STEPS) + 1), 1))


@functools.cache
def _size_prior(largest_symbol: int) -> Ints:
    """Where sizes above 1 have mean m, they fall off by m / (1 + m) each: as if seen 20 times."""
    rows = []
    for scale in range(SIZE_SCALES):
        mean = _half_octaves(scale - SIZE_ONE)
        left, row = 1 << 32, []
        for width in _WIDTH[: largest_symbol + 1]:
            kept = left
            for _ in range(width):
                kept = kept * mean // (mean + (1 << 32))
            row.append(1 + ((left - kept) * 20 * UNIT >> 32))
            left = kept
        rows.append(row)
    rows = [[*row, 1] if len(row) == 1 else row for row in rows]  # a coder wants two symbols
    return np.tile(np.array(rows, np.int64), (9, 1))
