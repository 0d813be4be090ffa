"""The writer's choice of classes of rows: rows of a class share a table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tersor.artifact.encoding import Array

NUMBERS = (2, 4, 8, 16, 32)
ROUNDS = 4
CHUNK = 1 << 20


def row_classes(rows: Array, lowest: int, size: int) -> npt.NDArray[np.int64]:
    """A class (rows,), from 0, of each row of whole numbers from `lowest`, `size` of them.

    Lloyd's iteration with code lengths for distances: rows go to the class whose table costs them
    least, tables become those of their rows. Classes start as ranges of equal cost of the rows in
    order of their cost. The number of classes is the one whose bits, with its tables, are fewest.
    """
    counts = _counts(rows, lowest, size)
    best, found = _bits(counts, np.zeros(len(rows), np.int64)), np.zeros(len(rows), np.int64)
    whole = counts.sum(axis=0) + 0.05
    cost = counts @ (np.log2(whole.sum()) - np.log2(whole))
    order = np.argsort(cost / max(rows.shape[1], 1), kind="stable")
    share = np.cumsum(cost[order]) / max(cost.sum(), 1e-9)
    for number in NUMBERS:
        if number > len(rows):
            break
        classes = np.empty(len(rows), np.int64)
        classes[order] = np.minimum((share * number).astype(np.int64), number - 1)
        for _ in range(ROUNDS):
            tables = np.stack(
                [counts[classes == each].sum(axis=0) + 0.05 for each in range(number)]
            )
            lengths = np.log2(tables.sum(axis=1, keepdims=True)) - np.log2(tables)
            classes = (counts @ lengths.T).argmin(axis=1)
        bits = _bits(counts, classes)
        if bits < best:
            best, found = bits, classes
    return np.unique(found, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _counts(rows: Array, lowest: int, size: int) -> npt.NDArray[np.float64]:
    found = np.zeros((len(rows), size))
    step = max(1, CHUNK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].astype(np.int64) - lowest
        part += size * np.arange(len(part))[:, None]
        seen = np.bincount(part.ravel(), minlength=size * len(part))
        found[start : start + step] = seen.reshape(len(part), size)
    return found


def _bits(counts: npt.NDArray[np.float64], classes: npt.NDArray[np.int64]) -> float:
    """Bits of the rows under their classes' tables, of learning the tables, and of the classes."""
    total = 0.0
    for each in np.unique(classes):
        table = counts[classes == each].sum(axis=0)
        table = table[table > 0]
        total += float((table * (np.log2(table.sum()) - np.log2(table))).sum())
        total += float((0.5 * np.log2(table + 1) + 3).sum())
    sizes = np.unique(classes, return_counts=True)[1]
    return total + float((sizes * (np.log2(len(classes)) - np.log2(sizes))).sum())
