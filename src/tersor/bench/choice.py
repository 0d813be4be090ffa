"""What was measured of each model on each engine, and the choice that follows from it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import onnx

from tersor.engines.agreement import Agreement
from tersor.results import Timing

FLOAT = "float"  # the name of the float graph among the models


@dc.dataclass(frozen=True)
class Candidate:
    """One model on one engine. Either `refused` says why it is out, or `timing` how fast it is.

    Attributes:
        model: the candidate's name, or "float" for the float graph
        agreement: with the function that the model defines; None where the engine did not run it
        left_float: layers that had to be left in float for the engine to be right
        slower_than_float: than the float graph on its fastest engine; None where that was not timed
    """

    model: str
    engine: str
    agreement: Agreement | None = None
    timing: Timing | None = None
    refused: str = ""
    left_float: tuple[str, ...] = ()
    slower_than_float: bool | None = None

    @property
    def median_ms(self) -> float | None:
        """Median time of one batch in milliseconds; None where it was refused."""
        return None if self.timing is None else self.timing.median_ms

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            **dc.asdict(self),
            "agreement": None if self.agreement is None else self.agreement.to_dict(),
        }


@dc.dataclass(frozen=True, eq=False)
class Choice:
    """What was measured at one batch size, and what follows from it; prints as a table.

    Attributes:
        chosen: the fastest candidate that is right, never the float graph; None where none is right
        graph: the graph to run: the chosen candidate's, with `chosen.left_float` in float
        inputs: what the agreement was measured on, in words
    """

    chosen: Candidate | None
    graph: onnx.ModelProto | None = dc.field(repr=False)
    candidates: tuple[Candidate, ...]
    batch: int
    threads: int
    inputs: str

    COLUMNS = ("model", "engine", "agreement", "median_ms", "note")

    @property
    def engine(self) -> str | None:
        """Name of the engine to run the model on."""
        return None if self.chosen is None else self.chosen.engine

    def rows(self) -> list[list[Any]]:
        """One row a candidate, under COLUMNS."""
        return [
            [
                row.model,
                row.engine,
                None if row.agreement is None else str(row.agreement),
                row.median_ms,
                self._note(row),
            ]
            for row in self.candidates
        ]

    def verdict(self) -> str:
        """The choice in one line; a model slower than float is said plainly."""
        where = f"batch {self.batch}, {self.threads} threads"
        if self.chosen is None:
            return f"{where}: no engine here computes the right function; the model cannot be used"
        said = f"{where}: {self.chosen.model} on {self.engine}, {self.chosen.median_ms:.4g} ms"
        if self.chosen.slower_than_float:
            best = fastest([c for c in self.candidates if c.model == FLOAT])
            assert best is not None, "there is a float time to be slower than"
            said += f"; SLOWER THAN FLOAT, which takes {best.median_ms:.4g} ms on {best.engine}"
        return said

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, without the graph."""
        return {
            "batch": self.batch,
            "threads": self.threads,
            "engine": self.engine,
            "model": None if self.chosen is None else self.chosen.model,
            "inputs": self.inputs,
            "candidates": [c.to_dict() for c in self.candidates],
        }

    def __str__(self) -> str:
        cells = [list(self.COLUMNS), *([_cell(v) for v in row] for row in self.rows())]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([*lines, f"agreement on {self.inputs}", self.verdict()])

    def _note(self, candidate: Candidate) -> str:
        notes = ["chosen"] if candidate is self.chosen else []
        if candidate.refused:
            notes.append(f"refused: {candidate.refused}")
        if candidate.left_float:
            notes.append(f"left in float: {', '.join(candidate.left_float)}")
        if candidate.slower_than_float:
            notes.append("slower than float")
        return "; ".join(notes)


def fastest(rows: Sequence[Candidate]) -> Candidate | None:
    """The row with the least median time; None where none was timed."""
    timed = [row for row in rows if row.timing is not None]
    return min(timed, key=lambda row: row.median_ms or 0.0, default=None)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
