"""The writer's choices for `context`: which way round, which sums, which weights of the prediction.

Only the writer runs this; what it decides is stored. Costs are added up in whole numbers and the
sums of squares are exact, so that two machines decide alike.
"""

from __future__ import annotations

import dataclasses as dc
import functools
from typing import Any

import numpy as np

from tersor.artifact.context import Model, code_grid
from tersor.artifact.encoding import Array
from tersor.artifact.entropy import TOTAL, Counts, Symbols
from tersor.artifact.grid import NEIGHBOURS, Grid, as_grid, grid_of

SAMPLE = 1 << 19  # codes on which choices are compared
FITTED = 1 << 21  # codes to which the prediction is fitted
EMPTY_SHARE = 64  # empty rows or columns are flagged from 1/64 of them
PART = 1 << 20  # of a bit
SMALL_BYTES = 4096  # below that many, the weights of the prediction may cost more than they save


@dc.dataclass(frozen=True)
class Choice:
    """How a tensor of codes is coded: its grid, and `model`."""

    transposed: bool
    grid: Grid
    model: Model
    cost: float  # bytes, of the sample


class Meter:
    """A coder that writes nothing and adds up what it would take."""

    def __init__(self) -> None:
        self.parts = 0  # 1/PART bit

    def symbols(self, table: Counts, index: Any, known: Any) -> Symbols:
        """See Coder."""
        held = np.asarray(known, np.int32)
        self.parts += int(_costs().take(table.frequencies[index, held].astype(np.int64)).sum())
        return held

    def run(self, table: Counts, count: int, known: Any) -> Symbols:
        """See Coder."""
        return self.symbols(table, 0, known)

    def uniform(self, sizes: Any, known: Any) -> Symbols:
        """See Coder."""
        self.parts += int(_costs().take(TOTAL // sizes).sum())
        return np.asarray(known, np.int32)

    def boundary(self) -> None:
        """See Coder."""


@functools.cache
def _costs() -> Array:
    """1/PART bit of a symbol of frequency 1 to TOTAL, rounded."""
    bits = np.log2(TOTAL) - np.log2(np.maximum(np.arange(TOTAL + 1), 1))
    return np.asarray(np.round(PART * bits), np.int64)


def choose(codes: Array) -> Choice | None:
    """The cheapest way found for `codes`, whole numbers of at most 255 in magnitude, any shape; None
    where the shape has no grid."""
    if grid_of(codes.shape, False) is None:
        return None
    best = min(
        (_candidate(codes, transposed, None) for transposed in (False, True)),
        key=lambda each: each.cost,
    )
    used = int(np.count_nonzero(codes))
    none = {"weights": 0 * best.model.weights, "means": 0 * best.model.means}
    for changes in (
        {"dense": not best.model.dense}
        if 10 * used > codes.size and 10 * used < 9 * codes.size
        else None,
        {"striped": False} if best.model.striped else None,
        {"cut": False} if best.model.cut else None,
        none if best.cost < SMALL_BYTES else None,
    ):
        if changes is not None:
            model = dc.replace(best.model, **changes)
            other = _candidate(codes, best.transposed, model)
            best = min(best, other, key=lambda each: each.cost)
    return best


def _candidate(codes: Array, transposed: bool, model: Model | None) -> Choice:
    grid, view = grid_of(codes.shape, transposed), as_grid(codes, transposed)
    assert grid is not None, "choose has looked"
    model = _model(grid, view) if model is None else model
    sample = view[:: max(1, min(grid.rows // 16, view.size // SAMPLE))]
    meter = Meter()
    code_grid(meter, dc.replace(grid, rows=len(sample)), model, sample, None)
    return Choice(transposed, grid, model, meter.parts / PART / 8 * grid.rows / len(sample))


def _model(grid: Grid, view: Array) -> Model:
    """What the data say themselves."""
    live = view != 0
    rows, columns = live.any(axis=2), live.any(axis=0)
    weights, means = _prediction(grid, view)
    return Model(
        largest=max(1, int(view.max()), -int(view.min())),
        dense=2 * int(np.count_nonzero(live)) > live.size,
        striped=EMPTY_SHARE * int(np.count_nonzero(~rows)) > rows.size,
        cut=EMPTY_SHARE * int(np.count_nonzero(~columns)) > columns.size,
        weights=weights,
        means=means,
    )


def _prediction(grid: Grid, view: Array) -> tuple[Array, Array]:
    """Least squares of each position on its neighbours, its column's and its row's mean so far."""
    view = view[:: max(1, min(grid.rows // 16, view.size // FITTED))]
    num_rows = len(view)
    weights = np.zeros((grid.positions, NEIGHBOURS), np.int8)
    means = np.zeros((grid.positions, 2))
    row_total = np.zeros(num_rows)
    for position in range(grid.positions):
        target = view[:, position].astype(np.float64)
        near = grid.neighbours(position)
        column = (np.cumsum(target, axis=0) - target) / (np.arange(num_rows)[:, None] + 2)
        row = np.repeat(row_total[:, None] / (position * grid.channels + 8), grid.channels, axis=1)
        known = [view[:, other].astype(np.float64) for other in near]
        features = np.stack([np.floor(16 * each).ravel() for each in (*known, column, row)])
        # whole numbers, so these products are exact in whatever order they are added
        square = features @ features.T + 4096 * np.eye(len(features))
        found = np.linalg.solve(square, features @ (16 * target.ravel()))
        found = np.clip(np.round(64 * found), -127, 127)
        weights[position, : len(near)] = found[: len(near)]
        means[position] = found[len(near) :]
        row_total += target.sum(axis=1)
    return weights, np.round(means.mean(axis=0)).astype(np.int8)
