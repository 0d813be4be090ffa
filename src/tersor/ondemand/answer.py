"""What came of a budget, and the directory it lies in."""

from __future__ import annotations

import dataclasses as dc
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tersor.bench.drop import Drop
from tersor.errors import BudgetError, RunError
from tersor.specs import Plan, from_dict

MODEL, NEAREST, RESULT, PLAN = "model.tersor", "nearest.tersor", "result.json", "plan.json"


@dc.dataclass(frozen=True, eq=False)
class Answer:
    """What came of a budget.

    Attributes:
        path: the model's file; None of a dry run
        size_bytes, latency_ms, macs, energy_mj: what it costs; latency on `engine`
        original: the same of the original (its weights in float32, PyTorch's eager float32)
        speedup: over the original, in the same run
        drop: what of the accuracy is lost, and how that is known
        limits: the budget in these units
        front: what could be had instead: JSON objects, each "measured" or predicted
        plan: what was done layer by layer
        notes: what a reader must know
    """

    path: pathlib.Path | None
    size_bytes: float
    latency_ms: float
    macs: float
    energy_mj: float
    original: Mapping[str, float]
    engine: str
    speedup: float
    drop: Any
    limits: Mapping[str, float]
    front: tuple[dict[str, Any], ...]
    plan: Plan
    notes: tuple[str, ...]
    choice: Mapping[str, Any]
    data: str
    seconds: float
    input_shape: tuple[int, int, int]

    @property
    def smaller(self) -> float:
        """How many times smaller than the original's weights in float32."""
        return self.original["size_bytes"] / self.size_bytes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, without the plan."""
        told = {f.name: getattr(self, f.name) for f in dc.fields(self) if f.name != "plan"}
        return {
            **told,
            "path": None if self.path is None else str(self.path),
            "drop": self.drop if isinstance(self.drop, dict) else self.drop.to_dict(),
            "original": dict(self.original),
            "limits": dict(self.limits),
            "front": list(self.front),
            "notes": list(self.notes),
            "choice": dict(self.choice),
            "smaller": self.smaller,
        }


def answer_in(directory: pathlib.Path) -> Answer:
    """The answer that lies in `directory`. Raises BudgetError where that is a refusal, RunError for one that is not
    whole."""
    try:
        told = json.loads((directory / RESULT).read_bytes())
        plan = from_dict(json.loads((directory / PLAN).read_bytes()))
        held = {f.name: told[f.name] for f in dc.fields(Answer) if f.name not in ("path", "plan")}
        path = directory / (MODEL if told["met"] else NEAREST)
        if path.stat().st_size != told["size_bytes"] or not isinstance(plan, Plan):
            raise ValueError(f"{path.name} is not the file it tells of")
        for name in ("front", "notes", "input_shape"):
            held[name] = tuple(held[name])
        again = f"found before, and kept in {directory}: nothing was measured again"
        held |= {"notes": (*held["notes"], again), "drop": Drop.from_dict(held["drop"])}
        answer, refusal = Answer(path=path, plan=plan, **held), told.get("refusal")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{directory} holds an answer that is not whole any more ({error}); remove it, or name another directory"
        ) from None
    if refusal is not None:
        raise BudgetError(refusal)
    return answer
