"""Observers: they see every activation of a calibration once and answer with the range that codes
cover.

Adding one is a class with `observe` and `range`, and the decorator. Its constructor takes `levels`,
the number of codes that shall cover the range: 256 for 8 bits, 16 for 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tersor.errors import DataError
from tersor.registry import Registry

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
LEVELS = 256
CANDIDATES = 128
MOST_VALUES = 2**17  # of one batch that a histogram counts: a quarter of the work on ResNet-18


class Observer(Protocol):
    """Accumulates over batches, in any order unless it says otherwise; its state does not grow with
    the data."""

    def observe(self, values: Array) -> None:
        """See one batch of values, any shape, float32. Raises DataError for NaN or infinity."""
        ...

    def range(self) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high. Raises DataError when nothing was observed."""
        ...


OBSERVERS: Registry[Callable[..., Observer]] = Registry("observer")


def _extent(values: Array) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError("the observed values hold NaN or infinity")
    return low, high


def thinned(values: Array) -> Array:
    """Evenly spaced ones of `values` (n,), about MOST_VALUES, or all where they are less than twice as
    many.

    The distance between them is odd, so that it does not fall in step with rows and maps, whose sizes
    are powers of two.
    """
    step = values.size // MOST_VALUES
    return values[:: step | 1] if step > 1 else values


@OBSERVERS.register("minmax")
class MinMax:
    """The smallest and the largest value seen, for any number of levels."""

    def __init__(self, *, levels: int = LEVELS) -> None:
        self.low, self.high, self.count = 0.0, 0.0, 0

    def observe(self, values: Array) -> None:
        """See one batch of values."""
        if not values.size:
            return
        low, high = _extent(values)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += values.size

    def range(self) -> tuple[float, float]:
        """The extremes, zero included."""
        _require_values(self.count)
        return self.low, self.high


@OBSERVERS.register("moving_average")
class MovingAverage:
    """Means of the extremes of batches that forget: 0.9 of the mean so far and 0.1 of the new batch
    (Jacob 2018, section 3.1), from the first batch on.

    One outlier moves them little. Unlike with other observers, the order and the size of the
    batches matter: the last ten batches weigh about two thirds.
    """

    momentum = 0.9

    def __init__(self, *, levels: int = LEVELS) -> None:
        self.low, self.high, self.count = 0.0, 0.0, 0

    def observe(self, values: Array) -> None:
        """See one batch of values."""
        if not values.size:
            return
        low, high = _extent(values)
        share = 1 - self.momentum if self.count else 1.0
        self.low += share * (low - self.low)
        self.high += share * (high - self.high)
        self.count += values.size

    def range(self) -> tuple[float, float]:
        """The means of the extremes, zero included."""
        _require_values(self.count)
        return min(self.low, 0.0), max(self.high, 0.0)


@OBSERVERS.register("histogram")
class Histogram:
    """The range with the least expected squared error of `levels` evenly spaced codes.

    A streaming histogram of `num_bins` (even) bins. When a value falls outside, neighbouring bins
    are merged in pairs, which doubles the range and moves no count to a wrong place. Exact zeros
    are counted apart: they have a code of their own and never a rounding error. Of a batch of more
    than MOST_VALUES values the extremes are exact, and evenly spaced ones are counted.
    """

    def __init__(self, num_bins: int = 2048, *, levels: int = LEVELS) -> None:
        assert num_bins % 2 == 0 and levels >= 2
        self.levels = levels
        self.bins: Counts = np.zeros(num_bins, np.int64)
        self.origin, self.width = 0.0, 0.0
        self.low, self.high = 0.0, 0.0
        self.num_zeros = 0

    @property
    def count(self) -> int:
        """Number of values counted."""
        return self.num_zeros + int(self.bins.sum())

    @property
    def centres(self) -> FloatArray:
        """(num_bins,) float64: the value that stands for those of a bin, within what was seen."""
        centres = self.origin + (np.arange(self.bins.size) + 0.5) * self.width
        return np.clip(centres, self.low, self.high)

    def observe(self, values: Array) -> None:
        """See one batch of values."""
        if not values.size:
            return
        low, high = _extent(values)
        self.low, self.high = min(self.low, low), max(self.high, high)
        flat = thinned(np.ascontiguousarray(values).reshape(-1))
        seen = flat[flat != 0]
        self.num_zeros += flat.size - seen.size
        if not seen.size:
            return
        if self.width == 0.0:
            self.origin = self.low
            self.width = max(
                (self.high - self.low) / self.bins.size, float(np.finfo(np.float32).tiny)
            )
        self._grow()
        # float64: the difference of two float32 may overflow float32
        index = (seen.astype(np.float64) - self.origin) * (1 / self.width)
        index = np.clip(index, 0, self.bins.size - 1).astype(np.int64)
        self.bins += np.bincount(index, minlength=self.bins.size)

    def _grow(self) -> None:
        half = self.bins.size // 2
        while self.low < self.origin or self.high > self.origin + self.bins.size * self.width:
            merged = self.bins[0::2] + self.bins[1::2]
            self.bins = np.zeros_like(self.bins)
            if self.low < self.origin:
                self.origin -= self.bins.size * self.width
                self.bins[half:] = merged
            else:
                self.bins[:half] = merged
            self.width *= 2

    def range(self) -> tuple[float, float]:
        """The best of `CANDIDATES` lows and highs, each tried with each, by expected squared error.

        A value inside errs by step^2 / 12 on average (a uniform error), a value outside by its
        squared distance from the end.
        """
        _require_values(self.count)
        centres = self.centres
        lows, low_counts, low_errors = _tail(-centres, self.bins, -self.low)
        highs, high_counts, high_errors = _tail(centres, self.bins, self.high)
        step = (highs[None, :] + lows[:, None]) / (self.levels - 1)
        inside = self.bins.sum() - low_counts[:, None] - high_counts[None, :]
        error = inside * step**2 / 12 + low_errors[:, None] + high_errors[None, :]
        best_low, best_high = np.unravel_index(int(error.argmin()), error.shape)
        return 0.0 - float(lows[best_low]), float(highs[best_high])


def _tail(centres: Array, bins: Counts, largest: float) -> tuple[Array, Array, Array]:
    """For ends from `largest` / CANDIDATES to `largest`: how many values lie beyond each, and the
    sum of their squared distances from it. Only the end 0 where `largest` is 0."""
    if largest <= 0:
        return np.zeros(1), np.zeros(1), np.zeros(1)
    order = np.argsort(centres)
    sorted_centres, counts = centres[order], bins[order].astype(np.float64)
    ends = largest * np.arange(1, CANDIDATES + 1) / CANDIDATES
    first = np.searchsorted(sorted_centres, ends, side="right")

    def beyond(amounts: Array) -> Array:
        return np.append(amounts[::-1].cumsum()[::-1], 0.0)[first]

    # Distances from `largest` keep the sums small, so that no digits cancel.
    gap = sorted_centres - largest
    number, total, squares = beyond(counts), beyond(counts * gap), beyond(counts * gap**2)
    shift = largest - ends
    return ends, number, np.maximum(squares + 2 * shift * total + shift**2 * number, 0.0)


class _OnHistogram:
    """What observers share that answer from a histogram alone."""

    def __init__(self, *, levels: int = LEVELS) -> None:
        self.histogram = Histogram(levels=levels)

    def observe(self, values: Array) -> None:
        """See one batch of values."""
        self.histogram.observe(values)


@OBSERVERS.register("percentile")
class Percentile(_OnHistogram):
    """The range that leaves 0.01 % of the values outside at each end, from a histogram, for any
    number of levels."""

    share = 1e-4

    def range(self) -> tuple[float, float]:
        """Edges of the bins in which the two percentiles fall, zero included."""
        seen = self.histogram
        _require_values(seen.count)
        outside = self.share * seen.count
        edges = seen.origin + np.arange(seen.bins.size + 1) * seen.width
        above = np.append(seen.bins[::-1].cumsum()[::-1], 0)
        below = np.append(0, seen.bins.cumsum())
        high = float(edges[int(np.argmax(above <= outside))])
        low = float(edges[::-1][int(np.argmax(below[::-1] <= outside))])
        return max(min(low, 0.0), seen.low), min(max(high, 0.0), seen.high)


@OBSERVERS.register("mse")
class SquaredError(_OnHistogram):
    """The range whose codes, zero point and all, have the least squared error on a histogram.

    Each bin errs by the distance of its centre from the value that its code stands for, inside and
    outside alike; "histogram" takes step^2 / 12 inside, which holds for many codes only.
    """

    def range(self) -> tuple[float, float]:
        """The best range that the search of `_cheapest_range` meets."""
        return _cheapest_range(self.histogram, _squared_error)


@OBSERVERS.register("entropy")
class Entropy(_OnHistogram):
    """The range whose codes lose the least information: the least Kullback-Leibler divergence.

    As Migacz 2017 for calibration, with two ends and a zero point. P is the histogram inside the
    range, with all counts outside added to the outermost bins held. Q is what codes keep of the
    inside alone: the counts that share a code are spread evenly over their bins that are not empty.
    The cost is sum P log(P / Q), both divided by their sums. Exact zeros take no part.
    """

    def range(self) -> tuple[float, float]:
        """The best range that the search of `_cheapest_range` meets."""
        return _cheapest_range(self.histogram, _divergence)


def _cheapest_range(
    seen: Histogram, cost: Callable[[FloatArray, Counts, float, float, int], float]
) -> tuple[float, float]:
    """(low, high) between zero and the extremes, of little `cost` (centres of the bins that are not
    empty, their counts, low, high, levels).

    Both ends are shrunk by one factor first, 1 to 1 / CANDIDATES. Then, of all ranges that differ
    in one end, the best is taken, until the cost falls no more.
    """
    _require_values(seen.count)
    held = seen.bins > 0
    centres, counts = seen.centres[held], seen.bins[held]
    if not counts.size:
        return 0.0, 0.0
    shares = np.arange(CANDIDATES, 0, -1) / CANDIDATES
    lows = [float(low) for low in (seen.low * shares if seen.low else (0.0,))]
    highs = [float(high) for high in (seen.high * shares if seen.high else (0.0,))]

    def best(pairs: Iterable[tuple[float, float]]) -> tuple[float, tuple[float, float]]:
        tried = [(cost(centres, counts, *ends, seen.levels), ends) for ends in pairs]
        return min(tried, key=lambda one: one[0])

    least, (low, high) = best((seen.low * float(s), seen.high * float(s)) for s in shares)
    while True:
        found, ends = best([(other, high) for other in lows] + [(low, other) for other in highs])
        if not found < least:
            return low, high
        least, (low, high) = found, ends


def _levels_of(centres: FloatArray, low: float, high: float, levels: int) -> FloatArray:
    """The multiple of the step that the code of each centre stands for: code - zero point."""
    step = (high - low) / (levels - 1)
    zero_point = np.rint(-low / step)
    return np.clip(np.rint(centres / step), -zero_point, levels - 1 - zero_point)


def _squared_error(
    centres: FloatArray, counts: Counts, low: float, high: float, levels: int
) -> float:
    """Sum of count * (centre - value of its code)^2."""
    values = _levels_of(centres, low, high, levels) * ((high - low) / (levels - 1))
    return float((counts * (centres - values) ** 2).sum())


def _divergence(centres: FloatArray, counts: Counts, low: float, high: float, levels: int) -> float:
    """The divergence that `Entropy` describes, in nats; infinite where no value lies inside."""
    first, last = np.searchsorted(centres, low), np.searchsorted(centres, high, side="right")
    inside = counts[first:last].astype(np.float64)
    if not inside.size:
        return math.inf
    codes = _levels_of(centres[first:last], low, high, levels)
    groups = (codes - codes[0]).astype(np.int64)
    kept = (np.bincount(groups, inside) / np.maximum(np.bincount(groups), 1))[groups]
    clipped = inside.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    ratio = clipped / clipped.sum() / (kept / inside.sum())
    return float((clipped * np.log(ratio)).sum() / clipped.sum())


def _require_values(count: int) -> None:
    if count == 0:
        raise DataError("no values were observed; calibrate with one batch at least")
