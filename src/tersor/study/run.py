"""The study from start to end: every measurement in order, resumable, and its report."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from tersor.data.arrays import Splits
from tersor.errors import RunError, UnknownNameError
from tersor.models.load import MODELS
from tersor.report import write_report
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
    shown = watch or (lambda text, share: None)
    with Journal(out / "rows.jsonl") as journal:
        lab = Lab(settings, splits, out, journal, weights, shown)
        same_settings(lab)
        for model in settings.models:
            _run_model(lab, model)
        return write_report(journal.rows(), out)


def _run_model(lab: Lab, model: str) -> None:
    """All measurements of one network; what is done already costs nothing."""
    module = float_module(lab, model)
    original = measure_float(lab, model, module)
    steps: list[Callable[[], None]] = []
    for mode in lab.settings.modes:
        steps.append(lambda mode=mode: measure_quantized(lab, model, module, mode, original))  # type: ignore[misc]
    for batch in lab.settings.batches:
        steps.append(lambda batch=batch: measure_timing(lab, model, module, batch))  # type: ignore[misc]
    for scope in lab.settings.scopes:
        for sparsity in lab.settings.sparsities:
            steps.append(
                lambda scope=scope, sparsity=sparsity: measure_pruned(  # type: ignore[misc]
                    lab, model, module, scope, sparsity, original
                )
            )
    for step in steps:
        step()
