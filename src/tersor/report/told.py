"""The answer to a budget as a report reads it: JSON objects with units in their names, and words for numbers."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

from tersor.report.reference import TITLES
from tersor.report.words import clean, engine_title, milliseconds, percent, times

Json = Mapping[str, Any]
EAGER = "PyTorch's eager float32"
GAIN = 0.005  # points below which nothing is said to be lost or gained


@dc.dataclass(frozen=True, eq=False)
class Told:
    """All that is known of an answer.

    `result`, `plan` and `details` are the objects of result.json, plan.json and details.json ({} where that is
    missing: an older run), `rows` those of rows.jsonl, `pictures` PNGs of examples by their index.
    """

    result: Json
    plan: Json
    details: Json
    rows: tuple[Json, ...] = ()
    pictures: Mapping[int, bytes] = dc.field(default_factory=dict)

    @property
    def first(self) -> Json:
        """The row of the original, which holds what was asked; {} where there is none."""
        return next((row for row in self.rows if row.get("step") == "original"), {})

    @property
    def candidates(self) -> list[Json]:
        """The rows of the models that were built, each once."""
        found = {
            row["file"]: row
            for row in self.rows
            if str(row.get("step", "")).startswith("candidate ") and "file" in row
        }
        return list(found.values())

    @property
    def conditions(self) -> Json:
        """How it was measured, as far as it is known."""
        held: Json = self.details.get("conditions", {})
        return held

    @property
    def model(self) -> str:
        """What the network is called."""
        name = str(self.conditions.get("model") or "the network")
        return clean(TITLES.get(name, name))

    @property
    def batch(self) -> int:
        """Inputs of one run."""
        asked = self.first.get("budget", {}).get("batch", 1)
        return int(self.conditions.get("batch", asked))

    @property
    def eager_ms(self) -> float:
        """The original on PyTorch in the run in which the answer was timed."""
        return float(self.result["latency_ms"] * self.result["speedup"])

    @property
    def float_engine_ms(self) -> float | None:
        """The original on ONNX Runtime."""
        found = self.first.get("float_engine_ms", self.conditions.get("float_engine_ms"))
        return None if found is None else float(found)

    @property
    def engine(self) -> str:
        """The answer's engine by its proper name."""
        return engine_title(self.result["engine"])

    @property
    def judged_pt(self) -> float:
        """The points that the budget's drop was held against."""
        drop: Json = self.result["drop"]
        by_estimate = bool(self.conditions.get("by_estimate"))
        return float(drop["estimate_pt"] if by_estimate else drop["judged_pt"])


def decimal(size_bytes: float) -> str:
    """Bytes in units of 1000: "7.02 MB", "170 kB", "940 bytes"."""
    for unit, value in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= value * 0.9995:
            return f"{digits(size_bytes / value)} {unit}"
    return f"{size_bytes:,.0f} bytes"


def digits(value: float) -> str:
    """Three digits, none after the point of large numbers: "0.0123", "1.36", "16.3", "1,240", "−0.5"."""
    if value < 0:
        return f"−{digits(-value)}"
    if value >= 99.95:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.995 or value == 0 else f"{value:.3g}"


def ms(value: float | None) -> str:
    """Milliseconds with their unit; microseconds for what is short, seconds for what is long."""
    if value is None:
        return milliseconds(None)
    if value >= 999.5:
        return f"{digits(value / 1000)} s"
    return f"{digits(1000 * value)} µs" if value < 0.0995 else f"{digits(value)} ms"


def million(macs: float) -> str:
    """Multiplications: "506 million"."""
    for word, unit in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if macs >= unit * 0.9995:
            return f"{digits(macs / unit)} {word}"
    return f"{macs:,.0f}"


def factor(before: float, after: float, less: str, more: str) -> str:
    """ "6.37 times smaller", or how many times more where it is."""
    if after <= before:
        return f"{times(before / after)} times {less}"
    return f"{times(after / before)} times {more}"


def points(value: float) -> str:
    """Points of accuracy in words: "0.20 points lost", "0.05 points gained", "nothing lost"."""
    if abs(value) < GAIN:
        return "nothing lost"
    return f"{abs(value):.2f} points {'lost' if value > 0 else 'gained'}"


def most_points(value: float) -> str:
    """A bound on points: "1 point", "0.5 points"."""
    return f"{value:g} point{'' if value == 1 else 's'}"


def end(value: float) -> str:
    """One end of an interval of points: "0.91 lost"."""
    if abs(value) < GAIN:
        return "0.00"
    return f"{abs(value):.2f} {'lost' if value > 0 else 'gained'}"


def interval_words(drop: Json) -> str:
    """The interval of a drop: "95 % interval 0.50 gained to 0.91 lost", or its upper limit."""
    held = drop.get("interval")
    if held is None:
        return f"95 % upper limit: {end(drop['high_pt'])}"
    level = percent(held["level"], 0)
    return f"{level} % interval: {end(-held['high_pt'])} to {end(-held['low_pt'])}"
