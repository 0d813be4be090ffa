"""Axes: values to per cent of a plot's side, and where its marks stand."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Iterable

MOST_TICKS = 5


@dc.dataclass(frozen=True, eq=False)
class Scale:
    """From `low` to `high`, on the scale that `bend` makes even; `ticks` lie between."""

    low: float
    high: float
    bend: Callable[[float], float]
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Per cent of the way from low to high, 0 to 100; what lies outside stands at the end."""
        start, end = self.bend(self.low), self.bend(self.high)
        return 100 * min(max((self.bend(value) - start) / (end - start), 0.0), 1.0)


def logarithmic(values: Iterable[float], room: float = 1.18) -> Scale:
    """For values above 0, with some room at both ends."""
    found = [value for value in values if value > 0]
    low, high = min(found, default=1.0) / room, max(found, default=1.0) * room
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) <= MOST_TICKS:
            break
    while len(ticks) > MOST_TICKS:
        ticks = ticks[::2]
    return Scale(low, high, math.log10, tuple(ticks))


def bent(values: Iterable[float], even: float = 0.3) -> Scale:
    """From 0 for values of 0 or more: even up to `even`, logarithmic far beyond."""
    high = max([*values, even]) * 1.25

    def bend(value: float) -> float:
        return math.asinh(value / even)

    known = [step * 10.0**decade for decade in range(-2, 4) for step in (1, 2, 5)]
    ticks, last = [0.0], 0.0
    for tick in known:  # as many as have a ninth of the side to themselves
        if tick <= high and bend(tick) - last >= bend(high) / 9:
            ticks.append(tick)
            last = bend(tick)
    return Scale(0.0, high, bend, tuple(ticks))
