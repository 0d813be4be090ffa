"""The study from start to end: every measurement in order, resumable, and its report."""

from __future__ import annotations

import pathlib

from tersor.data.arrays import Splits
from tersor.errors import RunError, UnknownNameError
from tersor.models.load import MODELS
from tersor.report import require_matplotlib, write_report
from tersor.study.journal import Journal
from tersor.study.lab import (
    Lab,
    Watch,
    float_module,
    measure_float,
    measure_pruned,
    measure_quantized,
    measure_timing,
    same_settings,
)
from tersor.study.settings import StudySettings


def run_study(
    settings: StudySettings,
    splits: Splits,
    out: pathlib.Path,
    *,
    weights: dict[str, str] | None = None,
    watch: Watch | None = None,
) -> pathlib.Path:
    """Run what is missing in `out` and write the report; returns the path of its HTML page.

    `weights` maps a model's name to a file of trained float weights; a model without one is trained first.
    Killed at any moment, the next call goes on: finished rows are kept, trainings continue from their last
    checkpoint. Raises RunError when `out` cannot be used, belongs to other settings or is in use.
    """
    weights = dict(weights or {})
    require_matplotlib()
    for name in settings.models:
        MODELS[name]
    if unknown := sorted(set(weights) - set(settings.models)):
        raise UnknownNameError(
            f"weights given for {unknown[0]!r}, which is not among the models {', '.join(settings.models)}"
        )
    try:
        (out / "models").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output directory {out} cannot be made: {error}") from None
    position = _Position(len(settings.models) * _num_steps(settings), watch)
    with Journal(out / "rows.jsonl") as journal:
        lab = Lab(settings, splits, out, journal, weights, position.show)
        same_settings(lab)
        _measure_all(lab, position)
        return write_report(journal.rows(), out)


class _Position:
    """Which of how many measurements is under way; shown before what it says of itself."""

    def __init__(self, total: int, watch: Watch | None) -> None:
        self.total, self.watch, self.done = total, watch, 0

    def show(self, text: str, share: float) -> None:
        """Pass `text` on with the position before it."""
        if self.watch is not None:
            self.watch(f"[{min(self.done + 1, self.total)}/{self.total}] {text}", share)


def _num_steps(settings: StudySettings) -> int:
    sweep = len(settings.scopes) * len(settings.sparsities)
    return 1 + len(settings.modes) + len(settings.batches) + sweep


def _measure_all(lab: Lab, position: _Position) -> None:
    """Every measurement, the cheap ones of all networks first; what is done already costs nothing."""
    settings = lab.settings
    modules, originals = {}, {}
    for model in settings.models:
        modules[model] = float_module(lab, model)
        originals[model] = measure_float(lab, model, modules[model])
        position.done += 1
        for mode in settings.modes:
            measure_quantized(lab, model, modules[model], mode, originals[model])
            position.done += 1
    for model in settings.models:
        for batch in settings.batches:
            measure_timing(lab, model, modules[model], batch)
            position.done += 1
    lab.graphs.clear()
    for sparsity in settings.sparsities:
        for scope in settings.scopes:
            for model in settings.models:
                measure_pruned(lab, model, modules[model], scope, sparsity, originals[model])
                position.done += 1
