"""What came of a budget: the answer, its files, and the words of a refusal."""

from __future__ import annotations

import dataclasses as dc
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tersor.artifact.storage import write_whole
from tersor.bench.drop import Drop
from tersor.errors import BudgetError, RunError
from tersor.ondemand.page import PAGE
from tersor.ondemand.search import Found
from tersor.specs import Plan, from_dict

MODEL, NEAREST, RESULT, PLAN = "model.tersor", "nearest.tersor", "result.json", "plan.json"
NAMES = {
    "size_bytes": "size",
    "latency_ms": "latency",
    "macs": "number of multiplications",
    "energy_mj": "energy",
    "drop_pt": "loss",
}
UNITS = {"latency_ms": "ms", "energy_mj": "mJ", "drop_pt": "points"}


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

    @property
    def report(self) -> pathlib.Path | None:
        """The page that tells of it; None of a dry run."""
        return None if self.path is None else self.path.with_name(PAGE)

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


def answered(directory: pathlib.Path) -> Answer:
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


def refusal(found: Found, answer: Answer) -> str:
    """Why nothing fits, in words: the nearest, the bound that is passed and the layer that binds."""
    costs = {
        "size_bytes": answer.size_bytes,
        "latency_ms": answer.latency_ms,
        "macs": answer.macs,
        "energy_mj": answer.energy_mj,
        "drop_pt": found.answer.drop.judged_pt,
    }
    met = ", ".join(
        f"{NAMES[axis]} {in_words(axis, costs[axis])} where {in_words(axis, limit)} may be"
        for axis, limit in found.limits.items()
    )
    return (
        f"no model that was found is within the budget; the nearest has {met}. What binds is the "
        f"{NAMES[found.axis]}, at layer {found.layer!r}. It is written as {answer.path}, and {answer.report} shows "
        "it: raise that bound, or take more effort"
    )


def in_words(axis: str, value: float) -> str:
    """A cost with its unit: "75.4 kB", "1.29 ms", "555M", "0.15 mJ", "0.36 points"."""
    if axis == "size_bytes":
        return f"{value / 1000:,.4g} kB"
    if axis == "macs":
        return f"{value / 1e6:,.4g}M"
    return f"{value:.3g} {UNITS[axis]}"


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Write `value` whole or not at all. Raises as `write_whole`."""
    data = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    write_whole(path, [data], len(data))
