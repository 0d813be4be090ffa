"""How much time a search may take, and what it does with it."""

from __future__ import annotations

import dataclasses as dc
import time
from collections.abc import Callable

from tersor.errors import SpecError
from tersor.registry import did_you_mean

Watch = Callable[[str, float], None]  # what is done, and the share of it that is finished (0 to 1)


@dc.dataclass(frozen=True)
class Effort:
    """`trains`: by distillation from the original, without labels; where `learns_labels` and there are some, from
    these. One training takes `trained_share` of the time left (0 where nothing is trained): most of it where a second
    would not fit. `num_calibration` inputs are read to make a model, `num_held` others to judge it; at most `rounds`
    candidates are built."""

    name: str
    minutes: float
    trains: bool
    num_calibration: int
    num_held: int
    rounds: int
    trained_share: float = 0.0
    learns_labels: bool = False

    @property
    def timing_seconds(self) -> float:
        """What one timing of two models may take."""
        return min(max(1.5 * self.minutes, 0.2), 4.0)


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("quick", 2, False, 512, 2000, 8),
        Effort("standard", 15, True, 1024, 5000, 8, 0.8),
        Effort("max", 120, True, 1024, 5000, 12, 0.92, learns_labels=True),
    )
}


def effort_of(name: str, minutes: float | None = None) -> Effort:
    """The effort of that name, with other `minutes` where they are given. Raises SpecError."""
    if name not in EFFORTS:
        raise SpecError(
            f"effort must be one of {', '.join(EFFORTS)}, got {name!r}."
            + did_you_mean(name, EFFORTS)
        )
    if minutes is None:
        return EFFORTS[name]
    if not 0 < minutes < 1e5:
        raise SpecError(f"minutes must be above 0, got {minutes!r}")
    return dc.replace(EFFORTS[name], minutes=minutes)


class Clock:
    """The time of one search."""

    def __init__(self, minutes: float) -> None:
        self.started, self.limit = time.monotonic(), 60 * minutes

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def spend(self, seconds: float) -> None:
        """Count what was spent before the start, in a process that was ended."""
        self.started -= seconds

    @property
    def left(self) -> float:
        """Seconds until the end; below 0 after it."""
        return self.limit - self.passed
