"""How long the rest of some work takes, judged by what is done of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


class Remaining:
    """The parts of some work, each of a `kind` and of a `weight` (any unit, the same within a kind).

    A kind that is not measured yet is judged by all the others. `clock` gives seconds.
    """

    def __init__(
        self, parts: Iterable[tuple[str, float]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.left: list[tuple[str, float]] = list(parts)
        self.total = len(self.left)
        self._spent: dict[str, list[float]] = {}  # seconds and weight of what was done, by kind
        self._clock, self._since = clock, clock()

    @property
    def done(self) -> int:
        """How many parts are done."""
        return self.total - len(self.left)

    def finish(self, kind: str, weight: float, *, found: bool = False) -> None:
        """One part is done; with `found` it was done before, and tells nothing of the time."""
        self.left.remove((kind, weight))
        now = self._clock()
        if not found:
            spent = self._spent.setdefault(kind, [0.0, 0.0])
            spent[0] += now - self._since
            spent[1] += weight
        self._since = now

    def seconds(self) -> float | None:
        """Seconds until all is done; None while nothing was measured."""
        totals = [sum(column) for column in zip(*self._spent.values(), strict=True)]
        if not totals or totals[1] <= 0:
            return None
        rates = {
            kind: seconds / weight for kind, (seconds, weight) in self._spent.items() if weight
        }
        every = totals[0] / totals[1]
        expected = [rates.get(kind, every) * weight for kind, weight in self.left]
        under_way = min(self._clock() - self._since, expected[0]) if expected else 0.0
        return float(sum(expected) - under_way)

    def __str__(self) -> str:
        """For instance "3/20, about 12 min left"."""
        left = self.seconds()
        position = f"{min(self.done + 1, self.total)}/{self.total}"
        return position if left is None else f"{position}, about {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds in words, rounded: "40 s", "12 min", "3.5 h", "2.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
