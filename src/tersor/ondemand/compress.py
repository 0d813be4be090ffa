"""`tersor.compress`: a network, some inputs and a budget in; the best model found within it out."""

from __future__ import annotations

import dataclasses as dc
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tersor.artifact import load, pack, save
from tersor.artifact.storage import write_whole
from tersor.bench.drop import measured_drop
from tersor.bench.environment import environment
from tersor.engines.load import available_cpus
from tersor.errors import BudgetError, RunError, SpecError
from tersor.methods.together import digest
from tersor.ondemand.answer import (
    MODEL,
    NEAREST,
    PLAN,
    RESULT,
    Answer,
    answered,
    refusal,
    write_json,
)
from tersor.ondemand.candidate import Measured
from tersor.ondemand.depth import shallower
from tersor.ondemand.effort import Clock, Effort, Watch, effort_of
from tersor.ondemand.facts import Facts, facts
from tersor.ondemand.kept import Kept
from tersor.ondemand.original import Given, Original, given, measured_original
from tersor.ondemand.page import tell, write_page
from tersor.ondemand.search import Found, Search
from tersor.runs import Run, processes
from tersor.runs.executors import EXECUTORS, open_executor
from tersor.runs.remaining import duration
from tersor.specs import Budget

DONE = "done"  # the kind of the last row


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
    executor: str = "local",
    on_progress: Watch | None = None,
    on_interrupt: Callable[[], None] | None = None,
) -> Answer:
    """Find the best form of `model` within `budget`, and write it to the directory `out`.

    `model` is a module that gives logits (N, classes) of images (N, C, H, W), or the name of one with `weights`.
    `data`: a name (`folder:DIR`, ...), a Splits, an array (N, C, H, W) as the network sees it, batches of such (a
    DataLoader), or None: inputs of `input_shape` are then made from the network's batch norms. Labels are used to
    judge, and with effort max to train, where `use_labels` and there are some; without them the drop is judged by
    the original's own answers, with an upper limit. The test part is never looked at. `effort`: quick (no training,
    2 minutes), standard (15 minutes, learns from the original), max (two hours); `minutes` sets another time. Times
    are those of this machine, on the engine that was the fastest of the right ones.

    `out` gets model.tersor, plan.json, result.json, details.json, rows.jsonl (one row a candidate) and report.html, a
    page to read; its pictures are small ones of inputs whose answer changed, which `examples=False` leaves out. With
    `dry_run` nothing but what must be measured is built, and the answer holds the prediction. Raises BudgetError
    where no model that was found fits: it names the best, which is written as nearest.tersor, the bound and the
    layer that binds; SpecError, DataError, ModelError for what cannot be used, RunError where `out` belongs to
    another request or process, or cannot be written.

    `executor` names where networks that lost channels are made and trained, several at once: local (here, one after
    the other) or ray. All times are measured here.

    Killed at any moment, the same call goes on from what was measured and made (`runs.Run`); once there is an answer
    it gives that again. The first Ctrl-C (`on_interrupt` is called) finishes what is measured.
    """
    EXECUTORS[executor]
    if not processes().alone:
        raise RunError("compress measures times and runs as one process: start it without torchrun")
    asked = budget if budget is not None else Budget(drop=0.5)
    chosen = effort_of(effort, minutes)
    clock = Clock(chosen.minutes)
    watch = _with_time_left(on_progress or (lambda text, share: None), clock)
    directory = pathlib.Path(out)
    if directory.suffix == ".tersor":
        raise SpecError(f"out {out}: a directory is expected; the model lies in it as {MODEL}")
    with Run(directory, tell=on_interrupt) as run:
        loaded = given(
            model,
            data,
            weights=weights,
            num_classes=num_classes,
            input_shape=input_shape,
            seed=seed,
        )
        run.begin(**_settings(model, loaded, asked, chosen, use_labels=use_labels, seed=seed))
        if run.journal.find(kind=DONE):
            run.forget()
            return answered(directory)
        kept = Kept(directory, clock, run)
        workers = open_executor(executor, threads=asked.threads or available_cpus())
        original = measured_original(
            loaded, asked, chosen, kept, use_labels=use_labels, seed=seed, watch=watch
        )
        _record(run, _first_row(original, asked, chosen, seed))
        limits = asked.limits(original.costs)
        original = _able_to_judge(original, limits)
        by_macs = bool(limits.keys() & {"macs", "energy_mj"})
        known = facts(original, chosen, kept, by_macs=by_macs, seed=seed, watch=watch)
        bound = asked.bound("latency")
        search = Search(
            original,
            known,
            limits,
            chosen,
            kept,
            relative_latency=bound is not None and bound.relative,
            seed=seed,
            workers=workers,
            record=lambda row: _record(run, row),
            watch=watch,
        )
        if dry_run:
            answer = _predicted(original, known, search, limits, clock)
            write_json(directory / PLAN, {"predicted": True, **answer.to_dict()})
            return answer
        found = shallower(search).run()
        watch("writing the answer", 0.0)
        answer = _written(original, found, directory, clock)
        _record(run, {"step": "answer", "met": found.met, **answer.to_dict()})
        name = model if isinstance(model, str) else type(model).__name__
        assert answer.path is not None, "only a dry run writes no file"
        told = (original, known, found.answer, answer.path, chosen)
        watch("the report", 0.0)
        pictures = tell(directory, *told, model=name, seed=seed, examples=examples)
        write_page(directory, run.journal.rows(), pictures=pictures)
        run.journal.append({"kind": DONE})
        run.forget()
        if not found.met:
            raise BudgetError(refusal(found, answer))
    return answer


def _with_time_left(watch: Watch, clock: Clock) -> Watch:
    def told(text: str, share: float) -> None:
        left = f"at most {duration(clock.left)} left" if clock.left > 0 else "its time is up"
        watch(f"{text}: {left}", share)

    return told


def _settings(
    model: nn.Module | str, loaded: Given, asked: Budget, effort: Effort, **options: Any
) -> dict[str, Any]:
    """What a directory belongs to: another network, budget or machine would not go on from what was measured."""
    splits = loaded.splits
    return {
        "command": "compress",
        "model": model if isinstance(model, str) else type(model).__name__,
        "weights": digest(loaded.module),
        "data": None if splits is None else splits.name,
        "data_fingerprint": None if splits is None else splits.fingerprint(),
        "input_shape": loaded.input_shape if splits is None else splits.input_shape,
        "budget": asked.to_dict(),
        "effort": dc.asdict(effort),
        "machine": environment(),
        **options,
    }


def _record(run: Run, row: dict[str, Any]) -> None:
    """Append a row, once."""
    if not run.journal.find(**{key: row[key] for key in ("step", "choice") if key in row}):
        run.journal.append(row)


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
        size = int(best.costs["size_bytes"])
        write_whole(target, [best.path.read_bytes()], size)
    answer = _answer(original, found, best, target, float(size), clock)
    write_json(directory / PLAN, best.plan.to_dict())
    write_json(
        directory / RESULT,
        {
            "met": found.met,
            "axis": found.axis,
            "layer": found.layer,
            **answer.to_dict(),
            **({} if found.met else {"refusal": refusal(found, answer)}),
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
