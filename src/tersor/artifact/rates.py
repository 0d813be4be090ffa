"""What codes take in a file, and what others in their place would: for methods that choose codes by
their rate."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import numpy as np
import numpy.typing as npt

from tersor.artifact.context import Model, Walk, size_contexts, size_symbols, walk_grid, widths_of
from tersor.artifact.encoding import Array, smallest
from tersor.artifact.entropy import TOTAL, Counts, Ints
from tersor.artifact.fitting import Meter, choose
from tersor.artifact.grid import Grid, as_grid

Floats = npt.NDArray[np.float32]


def coded_bytes(codes: Array, quick: bool = False) -> int:
    """Bytes of the smallest section for `codes` (any shape, a type of a file); scales and the like are
    tensors of their own. `quick`: without context modelling."""
    return len(smallest(np.ascontiguousarray(codes), quick)[1])


def code_lengths(codes: npt.NDArray[Any], values: npt.NDArray[Any]) -> Floats:
    """Bits (len(values), *codes.shape) float32 that each of `values` would take in the place of each of
    `codes`, whole numbers from -255 to 255, under the contexts that the other codes make.

    The contexts are those of the file's coder with its choices for `codes`; tensors of fewer than two
    axes, or too narrow for contexts, are rated by how often each value occurs. Rows and columns of
    nothing but 0 are not flagged here, so that a first code in them has a price.
    """
    wanted = np.asarray(values, np.int32)
    held = np.ascontiguousarray(codes, np.int16)
    found = np.empty((len(wanted), *held.shape), np.float32)
    chosen = choose(held)
    if chosen is None or not chosen.grid.affordable:
        counts = np.bincount(held.ravel().astype(np.int64) + 255, minlength=511) + 1 / 2
        bits = np.log2(counts.sum()) - np.log2(counts)
        found[...] = bits[wanted + 255].reshape(-1, *[1] * held.ndim)
        return found
    largest = max(chosen.model.largest, int(np.abs(wanted).max(initial=1)))
    model = dc.replace(chosen.model, largest=largest, striped=False, cut=False)
    views = [as_grid(each, chosen.transposed) for each in found]
    walk = _Rating(chosen.grid, model, wanted, views)
    walk_grid(walk, Meter(), as_grid(held, chosen.transposed), None)
    return found


class _Rating(Walk):
    """Writes into `views` (rows, positions, channels), one a value, what it would take."""

    def __init__(self, grid: Grid, model: Model, values: Array, views: list[Array]) -> None:
        super().__init__(grid, model)
        self.values, self.views = values, views

    def contexts(self, position: int) -> tuple[Ints, Array, Array]:
        """See Walk; the tables are as the coder will use them."""
        index, predicted, level = super().contexts(position)
        flags, signs, sizes = (_lengths(table) for table in (self.flags, self.signs, self.sizes))
        rows = slice(self.num_rows, self.num_rows + self.rows)
        expected, below = self.extents(position), predicted < 0
        for value, view in zip(self.values.tolist(), self.views, strict=True):
            bits = flags[index, int(value != 0)]
            if value:
                other = ((value < 0) ^ below).astype(np.int64)
                symbol = int(size_symbols(np.array([abs(value)]))[0][0])
                bits += signs[level, other] + np.float32(np.log2(widths_of(symbol)))
                bits += sizes[expected + size_contexts(other, level), symbol]
            view[rows, position] = bits.reshape(self.rows, -1)
        return index, predicted, level


def _lengths(table: Counts) -> Floats:
    """Bits of each symbol in each context."""
    return (np.log2(TOTAL) - np.log2(table.frequencies)).astype(np.float32)
