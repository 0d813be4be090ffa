"""The study from start to end: every measurement in order, resumable, and its report."""

from __future__ import annotations

import importlib.metadata
import pathlib
from collections.abc import Callable

from tersor.data.arrays import Splits
from tersor.errors import RunError, SpecError, TersorError, UnknownNameError
from tersor.models.load import MODELS
from tersor.report import require_matplotlib, write_report
from tersor.runs import Run, processes
from tersor.runs.executors import EXECUTORS, Executor, Watch, open_executor
from tersor.runs.remaining import Remaining
from tersor.study.lab import (
    Lab,
    float_module,
    measure_float,
    measure_quantized,
    measure_timing,
    unwatched,
)
from tersor.study.settings import StudySettings
from tersor.study.sweep import Cell, Networks, measure_cell


def run_study(
    settings: StudySettings,
    splits: Splits,
    out: pathlib.Path,
    *,
    weights: dict[str, str] | None = None,
    watch: Watch | None = None,
    executor: str = "local",
    tell: Callable[[], None] | None = None,
) -> pathlib.Path:
    """Run what is missing in `out` and write the report; returns the path of its HTML page.

    `weights` maps a model's name to a file of trained float weights; a model without one is trained first.
    Killed at any moment, the next call goes on: finished rows are kept, trainings continue from their last
    checkpoint. The first Ctrl-C (`tell` is called) finishes the measurement. `executor` names where the grid of
    pruned networks is measured; trainings of float networks and all timings stay in this process.
    Raises RunError when `out` cannot be used, belongs to other settings, data or version, or is in use.
    """
    weights = dict(weights or {})
    require_matplotlib()
    _check_request(settings, weights, executor)
    with Run(out, tell=tell) as run:
        asked = {
            **settings.to_dict(),
            "data": splits.name,
            "data_fingerprint": splits.fingerprint(),
            "weights": sorted(weights),
            "tersor": importlib.metadata.version("tersor"),
        }
        run.begin(**asked)
        workers = open_executor(executor, threads=settings.threads)
        _make(out / "models")
        position = _Position(settings, watch or unwatched)
        lab = Lab(settings, splits, out, run.journal, weights, position.show)
        _measure_all(lab, run, position, workers)
        return write_report(run.journal.rows(), out)


def _make(directory: pathlib.Path) -> None:
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"output directory {directory} cannot be made: {error.strerror}") from None


def _check_request(settings: StudySettings, weights: dict[str, str], executor: str) -> None:
    for name in settings.models:
        MODELS[name]
    if unknown := sorted(set(weights) - set(settings.models)):
        raise UnknownNameError(
            f"weights given for {unknown[0]!r}, which is not among the models {', '.join(settings.models)}"
        )
    EXECUTORS[executor]
    if executor != "local" and settings.time_pruned:
        raise SpecError(
            f"time_pruned beside other work, as the executor {executor!r} does it, would time that work too; "
            "leave it out, or use the executor local"
        )
    if not processes().alone:
        raise RunError(
            "a study runs as one process: start it without torchrun, and spread its grid with the executor ray"
        )


class _Position:
    """What is under way of all measurements, and how long the rest takes; shown before what a measurement says."""

    def __init__(self, settings: StudySettings, watch: Watch) -> None:
        per_model = [("float", 1.0)] + [("quantized", 1.0)] * len(settings.modes)
        per_model += [("timing", 1.0)] * len(settings.batches)
        # Evaluations, and the epochs of fine-tuning.
        per_model += [("pruned", 1 + e) for e in settings.finetune_epochs] * len(settings.scopes)
        self.remaining = Remaining(per_model * len(settings.models))
        self.watch, self._rows = watch, 0

    def show(self, text: str, share: float) -> None:
        """Pass `text` on with the position before it."""
        self.watch(f"[{self.remaining}] {text}", share)

    def finish(self, lab: Lab, kind: str, weight: float = 1.0) -> None:
        """One measurement is done; one that made no rows was there before."""
        rows = len(lab.journal.rows())
        self.remaining.finish(kind, weight, found=rows == self._rows)
        self._rows = rows


def _measure_all(lab: Lab, run: Run, position: _Position, workers: Executor) -> None:
    """Every measurement, the cheap ones of all networks first; what is done already costs nothing."""
    settings = lab.settings
    networks: Networks = {}
    for model in settings.models:
        module = float_module(lab, model)
        run.check()
        networks[model] = module, measure_float(lab, model, module)
        position.finish(lab, "float")
        run.check()
        for mode in settings.modes:
            measure_quantized(lab, model, *networks[model], mode)
            position.finish(lab, "quantized")
            run.check()
    for model in settings.models:
        for batch in settings.batches:
            measure_timing(lab, model, networks[model][0], batch)
            position.finish(lab, "timing")
            run.check()
    lab.graphs.clear()
    _measure_sweep(lab, run, position, workers, networks)


def _measure_sweep(
    lab: Lab, run: Run, position: _Position, workers: Executor, networks: Networks
) -> None:
    """The grid of pruned networks, wherever `workers` are. Only this process appends rows."""
    settings = lab.settings
    cells = {
        f"{model} pruned {sparsity:.0%} by {scope}": Cell(model, scope, sparsity)
        for sparsity in settings.sparsities
        for scope in settings.scopes
        for model in settings.models
    }
    sent = lab if workers.here else lab.to_send()
    errors: list[TersorError] = []
    for outcome in workers.run(
        measure_cell, (sent, networks), cells, watch=position.show, check=run.check
    ):
        if outcome.error is not None:
            if workers.here:
                raise outcome.error
            errors.append(outcome.error)  # the others are under way
            continue
        for row in outcome.value if not workers.here else ():
            run.journal.append(row)
        place = settings.sparsities.index(cells[outcome.name].sparsity)
        position.finish(lab, "pruned", 1 + settings.finetune_epochs[place])
    if errors:
        raise errors[0]
    run.check()
