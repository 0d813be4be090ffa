"""`tersor.compress`: a network, some inputs and a budget in; the best model found within it out."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tersor.artifact import load, pack, save
from tersor.artifact.storage import write_whole
from tersor.bench.drop import measured_drop
from tersor.bench.environment import environment
from tersor.errors import BudgetError, RunError, SpecError
from tersor.ondemand.candidate import Measured
from tersor.ondemand.effort import Clock, Effort, Watch, effort_of
from tersor.ondemand.original import Original, measured_original
from tersor.ondemand.page import PAGE, tell, write_page
from tersor.ondemand.search import Facts, Found, Search, facts
from tersor.specs import Budget, Plan
from tersor.study.journal import Journal

MODEL, NEAREST, ROWS, RESULT, PLAN = (
    "model.tersor",
    "nearest.tersor",
    "rows.jsonl",
    "result.json",
    "plan.json",
)


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


def compress(
    model: nn.Module | str,
    data: Any = None,
    budget: Budget | None = None,
    *,
    out: str | os.PathLike[str],
    effort: str = "quick",
    minutes: float | None = None,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    use_labels: bool = True,
    dry_run: bool = False,
    examples: bool = True,
    seed: int = 0,
    on_progress: Watch | None = None,
) -> Answer:
    """Find the best form of `model` within `budget`, and write it to the directory `out`.

    `model` is a module that gives logits (N, classes) of images (N, C, H, W), or the name of one with `weights`.
    `data`: a name (`folder:DIR`, ...), a Splits, an array (N, C, H, W) as the network sees it, batches of such (a
    DataLoader), or None: inputs of `input_shape` are then made from the network's batch norms. Labels are used to
    judge, never to make, where `use_labels` and there are some; without them the drop is judged by the original's
    own answers, with an upper limit. The test part is never looked at. `effort`: quick (no training, 2 minutes),
    standard (15 minutes, learns from the original), max; `minutes` sets another time. Times are those of this
    machine, on the engine that was the fastest of the right ones.

    `out` gets model.tersor, plan.json, result.json, details.json, rows.jsonl (one row a candidate) and report.html,
    a page to read; its pictures are small ones of inputs whose answer changed, which `examples=False` leaves out.
    With `dry_run` nothing but what must be measured is built, and the answer holds the prediction. Raises
    BudgetError where no model that was found fits: it names the best, which is written as nearest.tersor, the bound
    and the layer that binds; SpecError, DataError, ModelError for what cannot be used, RunError where `out` holds
    an answer or cannot be written.
    """
    asked = budget if budget is not None else Budget(drop=0.5)
    chosen = effort_of(effort, minutes)
    watch: Watch = on_progress or (lambda text, share: None)
    clock = Clock(chosen.minutes)
    with _directory(out) as (directory, work, journal):
        original = measured_original(
            model,
            data,
            asked,
            chosen,
            weights=weights,
            num_classes=num_classes,
            input_shape=input_shape,
            use_labels=use_labels,
            seed=seed,
            watch=watch,
        )
        journal.append(_first_row(original, asked, chosen, seed))
        limits = asked.limits(original.costs)
        original = _able_to_judge(original, limits)
        known = facts(original, chosen, work, seed=seed, watch=watch)
        bound = asked.bound("latency")
        search = Search(
            original,
            known,
            limits,
            chosen,
            work,
            clock,
            relative_latency=bound is not None and bound.relative,
            seed=seed,
            record=journal.append,
            watch=watch,
        )
        if dry_run:
            answer = _predicted(original, known, search, limits, clock)
            _write_json(directory / PLAN, {"predicted": True, **answer.to_dict()})
            return answer
        found = search.run()
        watch("writing the answer", 0.0)
        answer = _written(original, found, directory, clock)
        journal.append({"step": "answer", "met": found.met, **answer.to_dict()})
        # The answer is safe: what follows only tells of it.
        name = model if isinstance(model, str) else type(model).__name__
        given = (
            original,
            known,
            found.answer,
            directory / (MODEL if found.met else NEAREST),
            chosen,
        )
        watch("the report", 0.0)
        pictures = tell(directory, *given, model=name, seed=seed, examples=examples)
        write_page(directory, journal.rows(), pictures=pictures)
        if not found.met:
            raise BudgetError(_refusal(found, answer))
    return answer


def _able_to_judge(original: Original, limits: Mapping[str, float]) -> Original:
    """So few inputs that even no change could not be shown to keep the drop: the estimate is judged then, and
    said."""
    least = measured_drop(original.logits, original.logits).high_pt
    if original.labels is not None or least <= 0.8 * limits.get("drop_pt", math.inf):
        return original
    wanted = math.ceil(1.2 * len(original.held) * least / limits["drop_pt"])
    note = (
        f"{len(original.held)} held-out inputs cannot show a drop below {least:.2f} points, so the estimate is judged, "
        f"not its upper limit; give about {4 * wanted:,} inputs to have it shown"
    )
    return dc.replace(original, by_estimate=True, notes=(*original.notes, note))


def _written(original: Original, found: Found, directory: pathlib.Path, clock: Clock) -> Answer:
    """Put the answer where it belongs: the file coded with context models, its plan, and what was measured."""
    target = directory / (MODEL if found.met else NEAREST)
    best = found.answer
    held = load(best.path)
    again = pack(held.to_onnx(), plan=held.plan, provenance=held.provenance, state=held.state())
    size = save(again, target)
    if size > best.costs["size_bytes"]:  # never seen; the file that was judged is the answer then
        shutil.copyfile(best.path, target)
        size = int(best.costs["size_bytes"])
    answer = _answer(original, found, best, target, float(size), clock)
    _write_json(directory / PLAN, best.plan.to_dict())
    _write_json(
        directory / RESULT,
        {
            "met": found.met,
            "axis": found.axis,
            "layer": found.layer,
            **answer.to_dict(),
            "environment": environment(),
        },
    )
    return answer


def _answer(
    original: Original,
    found: Found,
    best: Measured,
    target: pathlib.Path,
    size: float,
    clock: Clock,
) -> Answer:
    front = tuple(
        {**row, "size_bytes": size} if row.get("file") == best.path.name else row
        for row in found.front
    )
    return Answer(
        target,
        size,
        best.costs["latency_ms"],
        best.costs["macs"],
        best.costs["energy_mj"],
        original.costs,
        best.engine,
        best.speedup,
        best.drop,
        found.limits,
        front,
        best.plan,
        (*original.notes, *found.notes, *_warnings(best, original)),
        best.choice,
        original.data,
        round(clock.passed, 1),
        original.input_shape,
    )


def _warnings(best: Measured, original: Original) -> list[str]:
    told = []
    if best.costs["latency_ms"] >= original.engine_ms:
        told.append(
            f"not faster than the float network on ONNX Runtime, which takes {original.engine_ms:.4g} ms"
        )
    if original.folded:
        told.append(f"equal inputs of {', '.join(original.folded)} were summed (the same function)")
    return told


def _predicted(
    original: Original, known: Facts, search: Search, limits: Mapping[str, float], clock: Clock
) -> Answer:
    point, axis = search.point()
    described = search.predictor.described(point)
    drop = {
        "estimate_pt": described["drop_pt"],
        "judged_pt": described["drop_pt"],
        "predicted": True,
    }
    notes = (*original.notes, *known.notes)
    if axis:
        notes = (*notes, f"by prediction nothing fits: {axis} would be passed")
    return Answer(
        None,
        described["size_bytes"],
        described["latency_ms"],
        described["macs"],
        described["energy_mj"],
        original.costs,
        known.first.engine,
        original.costs["latency_ms"] / described["latency_ms"],
        drop,
        limits,
        tuple(search.found().front),
        known.first.plan,
        notes,
        {"channels_share": described["channels_share"], "bits": described["bits"]},
        original.data,
        round(clock.passed, 1),
        original.input_shape,
    )


def _refusal(found: Found, answer: Answer) -> str:
    costs = {
        "size_bytes": answer.size_bytes,
        "latency_ms": answer.latency_ms,
        "macs": answer.macs,
        "energy_mj": answer.energy_mj,
        "drop_pt": found.answer.drop.judged_pt,
    }
    met = ", ".join(
        f"{axis} {costs[axis]:,.4g} of {limit:,.4g}" for axis, limit in found.limits.items()
    )
    return (
        f"no model that was found is within the budget; the nearest has {met}. What binds is {found.axis}, at layer "
        f"{found.layer!r}. It is written as {answer.path}, and {answer.report} shows it: raise that bound, or take "
        "more effort"
    )


def _first_row(original: Original, asked: Budget, effort: Effort, seed: int) -> dict[str, Any]:
    return {
        "step": "original",
        "budget": asked.to_dict(),
        "effort": dc.asdict(effort),
        "seed": seed,
        "data": original.data,
        "original": dict(original.costs),
        "float_engine_ms": original.engine_ms,
        "environment": environment(),
    }


@contextlib.contextmanager
def _directory(out: str | os.PathLike[str]) -> Iterator[tuple[pathlib.Path, pathlib.Path, Journal]]:
    """The directory of the answer, one for candidates inside it that is removed at the end, and the journal."""
    directory = pathlib.Path(out)
    if directory.suffix == ".tersor":
        raise SpecError(f"out {out}: a directory is expected; the model lies in it as {MODEL}")
    if (directory / RESULT).exists():
        raise RunError(f"{directory} holds an answer already ({RESULT}); name another directory")
    work = directory / "candidates"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from None
    try:
        with Journal(directory / ROWS) as journal:
            yield directory, work, journal
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    data = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    write_whole(path, [data], len(data))
