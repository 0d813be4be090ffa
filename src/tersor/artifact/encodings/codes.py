"""Whole numbers of one byte, entropy-coded: the codes of a quantized weight, masks, indexes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tersor.artifact.clusters import row_classes
from tersor.artifact.context import Model, code_grid
from tersor.artifact.cursor import Cursor, pack_streams, unpack_streams
from tersor.artifact.encoding import ENCODINGS, Array, Shape, Steps, count
from tersor.artifact.entropy import (
    UNIT,
    Coder,
    Counts,
    Ints,
    Reader,
    Run,
    Writer,
    flat_prior,
)
from tersor.artifact.fitting import Choice, choose
from tersor.artifact.grid import NEIGHBOURS, Grid, as_grid, grid_of
from tersor.errors import ArtifactError

CONSTANT, RUNS, CONTEXT = 0, 1, 2
TRANSPOSED, DENSE, STRIPED, CUT, PREDICTED = 1, 2, 4, 8, 16
RUN_LIMIT = 1 << 22  # symbols; in effect, runs forget nothing
PIECE = 1 << 18  # elements handled at once
KEPT = 256  # symbols that a class of rows takes over from the one before
MAX_CLASSES, MAX_ROWS = 64, 1 << 16
LEAST_CONTEXT = 256  # elements


@ENCODINGS.register("codes")
class Codes:
    """Byte 0: 0 constant, 1 runs, 2 context. Byte 1: the lowest element (its byte); except in 0, byte
    2: the highest less the lowest. Then, see docs/format.md:

    runs      number of classes of rows less 1 (a byte); streams
    context   the element that counts as 0, less the lowest (a byte); flags (a byte); streams
    """

    extra = 0.0

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """One byte an element."""
        return dtype.itemsize == 1

    @staticmethod
    def encode(array: Array, quick: bool = False) -> bytes | None:
        """The smaller of runs and context."""
        if not array.size:
            return None
        wide = array.view(np.uint8) if array.dtype == np.bool_ else array
        lowest, highest = int(wide.min()), int(wide.max())
        first = bytes([lowest & 255])
        if lowest == highest:
            return bytes([CONSTANT]) + first
        first += bytes([highest - lowest])
        found = [
            bytes([RUNS]) + first + _write_runs(wide, lowest, highest, by_rows)
            for by_rows in (False, True)
        ]
        if wide.size >= LEAST_CONTEXT and not quick:
            center = _center(wide, lowest, highest)
            chosen = choose(wide.astype(np.int16) - np.int16(center))
            if (
                chosen is not None
                and chosen.cost < 1.05 * min(map(len, found))
                and chosen.grid.affordable
            ):
                head = bytes([CONTEXT]) + first + bytes([center - lowest])
                found.append(head + _write_context(wide, center, chosen))
        return min(found, key=len)

    @staticmethod
    def fits(size_bytes: int, shape: Shape, dtype: np.dtype[Any]) -> bool:
        """A few bytes may stand for many elements: what bounds memory is asked of the whole file."""
        return size_bytes >= 2 and count(shape) > 0

    @staticmethod
    def decode(data: memoryview, shape: Shape, dtype: np.dtype[Any], steps: Steps) -> Array:
        """Takes the tensor's memory and a few MiB."""
        kind = np.dtype(np.uint8) if dtype == np.bool_ else dtype
        cursor = Cursor(data)
        form = cursor.byte(CONTEXT, "the form")
        lowest = int(np.uint8(cursor.byte()).view(kind))
        span = 0 if form == CONSTANT else cursor.byte(what="the span")
        highest = 1 if dtype == np.bool_ else int(np.iinfo(kind).max)
        if lowest + span > highest or (form != CONSTANT and not span):
            raise ArtifactError(f"codes from {lowest} to {lowest + span} are not possible")
        if form == CONSTANT:
            cursor.end()
            return np.full(shape, lowest, kind).view(dtype)
        found = np.zeros(shape, kind)
        if form == RUNS:
            _read_runs(cursor, found, lowest, span)
        else:
            _read_context(cursor, found, lowest, span, steps)
        return found.view(dtype)


def _center(codes: Array, lowest: int, highest: int) -> int:
    """0 where it is common, else the most frequent element."""
    counts = np.bincount((codes.ravel().astype(np.int16) - lowest), minlength=highest - lowest + 1)
    most = int(counts.argmax()) + lowest
    return 0 if lowest <= 0 <= highest and 2 * counts[-lowest] >= counts.max() else most


def _rows(array: Array) -> Array:
    """The tensor as rows of its first axis; as one row where classes of rows would cost memory."""
    if array.shape and array.shape[0] > MAX_ROWS:
        return array.reshape(1, -1)
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)


def _code_runs(
    coder: Coder, rows: Array, classes: Ints, span: int, lowest: int, known: bool
) -> None:
    """The elements of the rows of each class behind each other, in pieces that bound memory; a class
    starts from what the one before it has counted."""
    run = Run(Counts(flat_prior(span + 1), RUN_LIMIT))
    columns = rows.shape[1]
    for number in range(int(classes.max()) + 1):
        held = np.flatnonzero(classes == number)
        group = max(1, PIECE // columns)
        for first in range(0, len(held), group):
            some: Any = held[first : first + group]
            some = slice(some[0], some[-1] + 1) if some[-1] - some[0] + 1 == len(some) else some
            for start in range(0, columns, PIECE):
                part = np.s_[some, start : start + PIECE]
                told = rows[part].astype(np.int32) - lowest if known else None
                size = min(group, len(held) - first) * min(PIECE, columns - start)
                found = run.code(coder, size, None if told is None else told.ravel())
                if not known:
                    found += lowest
                    rows[part] = found.reshape(rows[part].shape)
        counts = run.table.counts
        run = Run(Counts(np.maximum(1, counts * KEPT * UNIT // counts.sum()), RUN_LIMIT))


def _write_runs(array: Array, lowest: int, highest: int, by_rows: bool) -> bytes:
    rows = _rows(array)
    classes = (
        row_classes(rows, lowest, highest - lowest + 1)
        if by_rows
        else np.zeros(len(rows), np.int64)
    )
    num_classes = int(classes.max()) + 1
    writer = Writer()
    if num_classes > 1:
        Run(Counts(flat_prior(num_classes), RUN_LIMIT)).code(writer, len(rows), classes)
    _code_runs(writer, rows, classes, highest - lowest, lowest, True)
    return bytes([num_classes - 1]) + pack_streams(writer.finish())


def _read_runs(cursor: Cursor, found: Array, lowest: int, span: int) -> None:
    rows = _rows(found)
    num_classes = cursor.byte(min(MAX_CLASSES, len(rows)) - 1, "the number of classes") + 1
    reader = Reader(unpack_streams(cursor))
    classes: Ints = np.zeros(len(rows), np.int64)
    if num_classes > 1:
        run = Run(Counts(flat_prior(num_classes), RUN_LIMIT))
        classes = run.code(reader, len(rows), None).astype(np.int64)
    _code_runs(reader, rows, classes, span, lowest, False)
    reader.finish()


def _write_context(array: Array, center: int, chosen: Choice) -> bytes:
    model = chosen.model
    predicted = bool(model.weights.any() or model.means.any())
    flags = (
        TRANSPOSED * chosen.transposed
        | DENSE * model.dense
        | STRIPED * model.striped
        | CUT * model.cut
        | PREDICTED * predicted
    )
    writer = Writer()
    if predicted:
        _code_weights(writer, chosen.grid, model.weights, model.means, True)
    codes = as_grid(array.astype(np.int16) - np.int16(center), chosen.transposed)
    code_grid(writer, chosen.grid, model, codes, None)
    return bytes([flags]) + pack_streams(writer.finish())


def _read_context(cursor: Cursor, found: Array, lowest: int, span: int, steps: Steps) -> None:
    center = lowest + cursor.byte(span, "the element that counts as 0")
    flags = cursor.byte(2 * PREDICTED - 1, "the flags")
    grid = grid_of(found.shape, bool(flags & TRANSPOSED))
    if grid is None or not grid.affordable:
        raise ArtifactError(f"a tensor of shape {found.shape} is not coded in context")
    steps.spend(grid.steps)
    reader = Reader(unpack_streams(cursor))
    weights = np.zeros((grid.positions, NEIGHBOURS), np.int8)
    means = np.zeros(2, np.int8)
    if flags & PREDICTED:
        _code_weights(reader, grid, weights, means, False)
    largest = max(center - lowest, lowest + span - center)
    model = Model(
        largest, bool(flags & DENSE), bool(flags & STRIPED), bool(flags & CUT), weights, means
    )
    view = as_grid(found, bool(flags & TRANSPOSED))

    def put(start: int, end: int, position: int, codes: Array) -> None:
        elements = codes + center
        if int(elements.min()) < lowest or int(elements.max()) > lowest + span:
            raise ArtifactError(f"an element is not from {lowest} to {lowest + span}")
        view[start:end, position] = elements

    code_grid(reader, grid, model, None, put)
    reader.finish()


def _code_weights(coder: Coder, grid: Grid, weights: Array, means: Array, known: bool) -> None:
    """The weights of the prediction that are used, behind each other, under one fixed table."""
    used = np.array(
        [(p, n) for p in range(grid.positions) for n in range(len(grid.neighbours(p)))], np.int64
    ).reshape(-1, 2)
    part = np.concatenate([weights[used[:, 0], used[:, 1]], means]) if known else None
    table = Counts(_weight_prior(), RUN_LIMIT)
    told = None if part is None else part.astype(np.int64) + 128
    found = (coder.run(table, len(used) + 2, told) - 128).astype(np.int8)
    weights[used[:, 0], used[:, 1]] = found[:-2]
    means[:] = found[-2:]


@functools.cache
def _weight_prior() -> Ints:
    """Weights of 1/64 fall off by the half every 6."""
    return np.array([[1 + (512 >> abs(value) // 6) for value in range(-128, 128)]], np.int64)
