"""What the codes of a weight cost in bits, near enough to the file's coder and cheap to make anew.

Codes are whole numbers (R, K): R outputs, K = channels * positions inputs in C order, positions those of
the kernel. A code is coded as a flag (0 or not), a sign and a size, as in the file. How likely it is not 0
is told by how many codes of its row, of its column and of its channel are not, and by the codes before it
in its kernel; how large, by the mean size in its row. The tables are counted from codes at hand (those of
the round before), so choosing codes by them and counting anew goes on in turns.
"""

from __future__ import annotations

import dataclasses as dc

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int8]
FloatArray = npt.NDArray[np.float32]

LARGEST_CODE = 127
# Classes of the expected share that is not 0, half an octave each; the last stands for half or more.
ACTIVITY_CLASSES, FULL = 27, 24
NEIGHBOUR_CLASSES = 4
SIZE_CLASSES = 12
# How many codes a mean over more of them is worth, where few of the narrower group are known.
ROW, COLUMN, CHANNEL = 4, 12, 32
FLAG_PRIOR, SIZE_PRIOR = 6, 20


@dc.dataclass(frozen=True, eq=False)
class Rates:
    """Bits of a code: `zero` (R, K) float32 of 0, `some` (R, K) of not being 0 with its sign, and then
    `sizes` (classes, LARGEST_CODE + 1) by the class (R,) int64 of the row and the magnitude."""

    zero: FloatArray
    some: FloatArray
    sizes: FloatArray
    row_class: npt.NDArray[np.int64]

    def bits(self, codes: Codes) -> FloatArray:
        """Bits (R, K) float32 of each of `codes` (R, K)."""
        magnitude = np.abs(codes.astype(np.int16))
        of_size = self.sizes[self.row_class[:, None], magnitude]
        return np.where(magnitude == 0, self.zero, self.some + of_size)

    def of_rows(self, rows: slice) -> Rates:
        """The rates of some rows."""
        return Rates(self.zero[rows], self.some[rows], self.sizes, self.row_class[rows])


def fit_rates(codes: Codes, positions: int) -> Rates:
    """The rates that `codes` (R, K) have under what they tell of each other."""
    flags = codes != 0
    contexts = _contexts(flags, positions)
    number = ACTIVITY_CLASSES * NEIGHBOUR_CLASSES
    seen = np.bincount(contexts.ravel(), minlength=number).astype(np.float64)
    hits = np.bincount(contexts[flags], minlength=number).astype(np.float64)
    expected = np.exp2((np.arange(ACTIVITY_CLASSES) - FULL) / 2).clip(max=0.9)
    prior = np.repeat(expected, NEIGHBOUR_CLASSES)
    share = ((hits + FLAG_PRIOR * prior) / (seen + FLAG_PRIOR)).clip(1e-6, 1 - 1e-6)
    zero = -np.log2(1 - share).astype(np.float32)
    some = 1 - np.log2(share).astype(np.float32)
    sizes, row_class = _sizes(codes, flags)
    return Rates(zero[contexts], some[contexts], sizes, row_class)


def _contexts(flags: npt.NDArray[np.bool_], positions: int) -> npt.NDArray[np.uint8]:
    """The context (R, K) of each flag."""
    rows, columns = flags.shape
    kernels = flags.reshape(rows, -1, positions)
    mean = (flags.sum() + 1) / (flags.size + 2)
    by_row = (flags.sum(1) + ROW * mean) / (columns + ROW)
    channel = (kernels.sum((0, 2)) + CHANNEL * mean) / (rows * positions + CHANNEL)
    column = (kernels.sum(0) + COLUMN * channel[:, None]) / (rows + COLUMN)
    level = np.log2(by_row)[:, None] + (np.log2(column).reshape(1, -1) - np.log2(mean))
    activity = np.rint(2 * level.astype(np.float32) + FULL)
    found: npt.NDArray[np.uint8] = activity.clip(0, ACTIVITY_CLASSES - 1).astype(np.uint8)
    found *= NEIGHBOUR_CLASSES
    if positions > 1:
        before = np.zeros(kernels.shape, np.uint8)
        np.cumsum(kernels[:, :, :-1], axis=2, dtype=np.uint8, out=before[:, :, 1:])
        found += np.minimum(before, NEIGHBOUR_CLASSES - 1).reshape(rows, columns)
    return found


def _sizes(codes: Codes, flags: npt.NDArray[np.bool_]) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Bits of each magnitude by class of row, and the class of each row: half octaves of its mean size."""
    magnitude = np.abs(codes.astype(np.int16))
    counts = flags.sum(1)
    mean = (magnitude.sum(dtype=np.int64) + 1) / (counts.sum() + 1)
    of_row = (magnitude.sum(1) + 3 * mean) / (counts + 3)
    row_class = np.rint(2 * np.log2(of_row)).clip(0, SIZE_CLASSES - 1).astype(np.int64)
    sizes = np.empty((SIZE_CLASSES, LARGEST_CODE + 1), np.float32)
    place = np.arange(LARGEST_CODE)
    for number in range(SIZE_CLASSES):
        above = max(2 ** (number / 2) - 1, 0.02)
        falls = above / (1 + above)
        prior = (1 - falls) * falls**place + 1e-7
        held = magnitude[row_class == number]
        seen = np.bincount(held.ravel(), minlength=LARGEST_CODE + 1)[1:]
        share = (seen + SIZE_PRIOR * prior) / (seen.sum() + SIZE_PRIOR)
        sizes[number, 1:] = -np.log2(share)
    sizes[:, 0] = np.inf  # a size of 0 is the flag's
    return sizes, row_class
