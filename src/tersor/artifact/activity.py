"""How large the codes of a row and of a column are, as far as they are known: whole numbers only.

Both sides of a stream keep these sums from what they have coded, so nothing of them is stored. A
`Sums` answers, for one step (a block of rows, one position), with two terms, one a row and one a
channel, whose sum is the binary logarithm of what is expected, in 1/OCTAVE.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

OCTAVE = 64  # parts of a doubling
ONE = 16  # fractional bits of a mean
# How many elements a mean of a wider group is worth where few of the narrower one are known.
ROW, COLUMN, CHANNEL = 3, 12, 32
_MANTISSA = np.array([round(OCTAVE * math.log2(1 + (i + 0.5) / 256)) for i in range(256)], np.int64)


def log2_parts(values: npt.NDArray[Any]) -> Ints:
    """OCTAVE * log2 of whole numbers from 1 to 2^53, to within 1.

    The same on every machine: the exponent is read off, the first 8 bits of the mantissa are looked
    up.
    """
    fraction, exponent = np.frexp(np.asarray(values, np.float64))
    place = (fraction * 512).astype(np.int64) - 256
    return OCTAVE * (exponent.astype(np.int64) - 1) + _MANTISSA[place]


class Sums:
    """Sums of one statistic of the codes over rows, columns (a channel at a position) and channels,
    and how many codes each sum is of."""

    def __init__(self, channels: int, positions: int, relative: bool) -> None:
        self.relative = relative  # rows are measured against what their columns let expect
        self.column = np.zeros((positions, channels), np.int64)
        self.column_count = np.zeros((positions, channels), np.int64)
        self.channel = np.zeros(channels, np.int64)
        self.channel_count = np.zeros(channels, np.int64)
        self.whole, self.whole_count = 1, 2

    def begin(self, rows: int) -> None:
        """Start a block of `rows` rows, of which nothing is known."""
        self.row = np.zeros(rows, np.int64)
        self.row_count = np.zeros(rows, np.int64)
        self.expected = np.zeros(rows, np.int64)

    def mean(self) -> int:
        """The mean of the whole in 1/2^ONE, at least 1."""
        return max(1, (self.whole << ONE) // self.whole_count)

    def terms(self, position: int) -> tuple[Ints, Ints]:
        """(rows,) and (channels,); their sum is ONE * OCTAVE where a mean of 1 is expected."""
        mean = self.mean()
        channel = ((self.channel << ONE) + CHANNEL * mean) // (self.channel_count + CHANNEL)
        column = (self.column[position] << ONE) + COLUMN * channel
        column //= self.column_count[position] + COLUMN
        self.column_mean = column
        level = int(log2_parts(np.array(mean)))
        by_column = log2_parts(np.maximum(column, 1)) - level
        by_channel = log2_parts(np.maximum(channel, 1)) - level
        row = (self.row << ONE) + ROW * mean
        if self.relative:
            by_row = log2_parts(row) - log2_parts(self.expected + ROW * mean)
        else:
            by_row = log2_parts(np.maximum(row // (self.row_count + ROW), 1)) - level
        return level + by_row, (8 * by_column + 5 * by_channel) >> 4

    def add(self, position: int, values: Ints, counts: Ints | None, live: Ints) -> None:
        """Take in the `values` (rows, channels) of a step. `counts`, alike, says how many codes each
        is of (0 or 1; None for 1 throughout); `live` (rows,) is 0 where a row had no codes."""
        per_row, per_channel = values.sum(axis=1), values.sum(axis=0)
        self.row += per_row
        self.column[position] += per_channel
        self.channel += per_channel
        self.whole += int(per_row.sum())
        if counts is None:
            self.row_count += values.shape[1] * live
            channel_count: Any = int(live.sum())
            self.whole_count += channel_count * values.shape[1]
        else:
            self.row_count += counts.sum(axis=1)
            channel_count = counts.sum(axis=0)
            self.whole_count += int(channel_count.sum())
        self.column_count[position] += channel_count
        self.channel_count += channel_count
        if self.relative:
            self.expected += int(self.column_mean.sum()) * live
