"""What a model may cost, in the words of a person: "500kB", "10x smaller", "2ms", "6x faster"."""

from __future__ import annotations

import dataclasses as dc
import math
import re
from collections.abc import Mapping

from tersor.errors import SpecError
from tersor.specs.spec import Spec, require

BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9}
BYTES |= {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
MILLIJOULES = {"nJ": 1e-6, "uJ": 1e-3, "µJ": 1e-3, "mJ": 1.0, "J": 1e3}
_NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_TIMES = re.compile(rf"{_NUMBER} ?[x×](?: ?([a-z]+))?")
_SHARE = re.compile(rf"{_NUMBER} ?%")
_PLAIN = re.compile(rf"{_NUMBER} ?([A-Za-zµ]*)")


@dc.dataclass(frozen=True)
class Axis:
    """One thing that costs: its name with its unit, the units a person may write, the word that says
    "less of it", and an example."""

    name: str
    units: Mapping[str, float]
    less: str
    example: str


AXES = {
    "size": Axis("size_bytes", BYTES, "smaller", "500kB"),
    "latency": Axis("latency_ms", MILLISECONDS, "faster", "2ms"),
    "macs": Axis("macs", COUNTS, "fewer", "50M"),
    "energy": Axis("energy_mj", MILLIJOULES, "less", "0.5mJ"),
}


@dc.dataclass(frozen=True)
class Bound:
    """The most of one axis: `value` in its unit or, where `relative`, that share of the original's."""

    value: float
    relative: bool

    def of(self, original: float) -> float:
        """The bound in the axis' unit, for an original that costs `original`."""
        return self.value * original if self.relative else self.value


@dc.dataclass(frozen=True)
class Budget(Spec, kind="budget"):
    """What a compressed model may cost; what is left empty is made as small as the rest allows.

    size      the whole file: "500kB" (1000 bytes; "KiB" is 1024), or of the original's weights in float32:
              "10x smaller", "10%".
    latency   one run of `batch` inputs on `threads` threads (0: all of this process), measured here: "2ms",
              or of PyTorch's eager float32: "6x faster".
    macs      multiplications of one input: "50M", "4x fewer". `energy` of one input, counted operations and
              weight bytes at the prices of Horowitz 2014: "0.5mJ", "10x less".
    drop      the most points of accuracy (percentage points, above 0) that may be lost.

    Raises SpecError for words that mean nothing, with what may be written; for no bound at all.
    """

    size: str = ""
    latency: str = ""
    macs: str = ""
    energy: str = ""
    drop: float | None = None
    batch: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("size", "latency", "macs", "energy"):
            if getattr(self, name):
                _ = self.bound(name)
        if self.drop is not None:
            number = isinstance(self.drop, int | float) and not isinstance(self.drop, bool)
            require(
                number and 0 < self.drop <= 100,
                f"budget.drop is in points of accuracy, above 0 and at most 100, got {self.drop!r}",
            )
        require(self.batch >= 1, f"budget.batch must be 1 or more, got {self.batch}")
        require(self.threads >= 0, f"budget.threads must be 0 (all) or more, got {self.threads}")
        require(
            any((self.size, self.latency, self.macs, self.energy)) or self.drop is not None,
            "the budget is empty: give size, latency, macs, energy or drop, for instance drop=0.5",
        )

    def bound(self, name: str) -> Bound | None:
        """The bound on "size", "latency", "macs" or "energy"; None where it is left free."""
        text: str = getattr(self, name)
        return parsed(name, text) if text else None

    def limits(self, original: Mapping[str, float]) -> dict[str, float]:
        """The bounds that are given, by "size_bytes", "latency_ms", "macs", "energy_mj" and "drop_pt", for an
        original that costs `original` (the same names)."""
        found = {
            axis.name: bound.of(original[axis.name])
            for name, axis in AXES.items()
            if (bound := self.bound(name)) is not None
        }
        return found if self.drop is None else {**found, "drop_pt": float(self.drop)}


def parsed(name: str, text: str) -> Bound:
    """`text` as a bound on the axis `name`. Raises SpecError with what may be written."""
    axis, words = AXES[name], text.strip()
    if found := _TIMES.fullmatch(words):
        factor, less = float(found[1]), found[2]
        if less not in (None, axis.less):
            raise _refused(name, text)
        if not (math.isfinite(factor) and factor > 1):
            raise SpecError(
                f"budget.{name} {text!r}: a factor is above 1 ({factor:g} asks for no saving)"
            )
        return Bound(1 / factor, True)
    if found := _SHARE.fullmatch(words):
        share = float(found[1]) / 100
        if not 0 < share < 1:
            raise SpecError(
                f"budget.{name} {text!r}: a share of the original is between 0 % and 100 %"
            )
        return Bound(share, True)
    found = _PLAIN.fullmatch(words)
    if found is None or found[2] not in axis.units:
        raise _refused(name, text)
    value = float(found[1]) * axis.units[found[2]]
    if not (math.isfinite(value) and value > 0):
        raise SpecError(f"budget.{name} {text!r}: must be above 0 and finite")
    return Bound(value, False)


def _refused(name: str, text: str) -> SpecError:
    axis = AXES[name]
    units = ", ".join(unit for unit in axis.units if unit)
    return SpecError(
        f'budget.{name} {text!r} is not understood; write a number with its unit ("{axis.example}"; units: '
        f'{units}), a factor ("10x {axis.less}") or a share of the original ("10%")'
    )
