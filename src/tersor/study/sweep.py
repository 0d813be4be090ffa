"""The grid of a study: each network pruned to each sparsity in each scope, wherever there is a processor free."""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
import pathlib
import tempfile
from typing import Any

import torch
from torch import nn

from tersor.bench.timing import time_sessions
from tersor.engines import open_session
from tersor.graph.export import export_onnx
from tersor.graph.fold import fold_copies_
from tersor.pipeline import prune_model, write
from tersor.results import Score
from tersor.runs.directory import ROWS
from tersor.runs.executors import Watch
from tersor.specs import Finetune, Prune
from tersor.study.lab import Lab, accuracy_row, coverage_row, judge, unwatched


def measure_pruned(
    lab: Lab, model: str, module: nn.Module, scope: str, sparsity: float, original: Score
) -> None:
    """One sparsity in its three states: one-shot, re-estimated, fine-tuned."""
    key = {
        "kind": "accuracy",
        "model": model,
        "variant": "pruned",
        "scope": scope,
        "sparsity": sparsity,
    }
    todo = {r for r in ("none", "bn", "finetune") if lab.missing(**key, recovery=r)}
    if not todo:
        return
    settings = lab.settings
    label = f"{model} pruned {sparsity:.0%} by {scope}"
    lab.watch(f"{label}: prune", 0.0)
    place = settings.sparsities.index(sparsity)
    recovery = Finetune(
        epochs=settings.finetune_epochs[place],
        learning_rate=settings.finetune_learning_rate[place],
        batch_size=settings.batch_size,
        augment=settings.augment,
        seed=settings.seed,
    )
    checkpoint = lab.work / f"{model}.{scope}.{sparsity}.pt"
    pruned = prune_model(
        module,
        lab.splits,
        Prune(sparsity=sparsity, criterion=settings.criterion, scope=scope),
        recovery=recovery if "finetune" in todo else None,
        checkpoint=checkpoint,
        on_progress=lab.progress(f"{label}: fine-tune"),
        seed=settings.seed,
    )
    states = {
        "none": pruned.one_shot,
        "bn": pruned.reestimated,
        "finetune": None if pruned.finetuned is None else pruned.finetuned.module,
    }
    if lab.missing(kind="coverage", model=model, variant="pruned", scope=scope, sparsity=sparsity):
        row = coverage_row("pruned", pruned.plan, {})
        lab.record(model, {**row, "scope": scope, "sparsity": sparsity})
    for state, candidate in states.items():
        if state not in todo or candidate is None:
            continue
        row = _pruned_row(lab, f"{label}, {state}", candidate, original, state)
        row |= {"scope": scope, "sparsity": sparsity, "recovery": state}
        if state == "finetune":
            row["recipe"] = recovery.to_dict()
        if settings.time_pruned:
            _time_pruned(lab, model, module, candidate, (scope, sparsity, state))
        lab.record(model, row)
    checkpoint.unlink(missing_ok=True)


def _time_pruned(
    lab: Lab, model: str, module: nn.Module, pruned: nn.Module, key: tuple[str, float, str]
) -> None:
    """Time a pruned form beside the eager float network, interleaved."""
    threads, shape = lab.settings.threads, lab.splits.input_shape
    sessions = {
        "float": open_session(module, engine="torch", threads=threads),
        "pruned": open_session(export_onnx(pruned, shape), threads=threads),
    }
    seconds = lab.settings.timing_seconds / 4
    for batch in lab.settings.batches:
        timings = time_sessions(sessions, shape, batch, seconds=seconds)
        ratio = timings["pruned"].median_ms / timings["float"].median_ms
        row = {"kind": "timing", "variant": "pruned", **timings["pruned"].to_dict(), "ratio": ratio}
        lab.record(model, row | dict(zip(("scope", "sparsity", "recovery"), key, strict=True)))


def _pruned_row(
    lab: Lab, label: str, module: nn.Module, original: Score, recovery: str
) -> dict[str, Any]:
    """Bytes of the written file, and accuracy in the precision the settings ask for."""
    fast = lab.settings.accuracy_precision == "bf16"
    size = None
    if not fast or recovery == "finetune":
        graph = export_onnx(module, lab.splits.input_shape)
        with tempfile.TemporaryDirectory() as name:
            size = write(graph, pathlib.Path(name) / "candidate.tersor")
    if fast:
        # Exactly folded: the same function, less time.
        folded = copy.deepcopy(module)
        fold_copies_(folded, torch.zeros(2, *lab.splits.input_shape))
        session = open_session(folded, engine="torch_bf16", threads=lab.settings.threads)
    else:
        session = open_session(graph, threads=lab.settings.threads)
    row = accuracy_row("pruned", judge(lab, label, session), original, size)
    if fast:
        row |= {"engine": session.engine, "precision": "bf16"}
    return row


@dc.dataclass(frozen=True, eq=False)
class Cell:
    """One sparsity of one network in one scope, to be measured where there is a processor free."""

    model: str
    scope: str
    sparsity: float


Networks = dict[str, tuple[nn.Module, Score]]  # the trained network and its score, by name


def measure_cell(shared: tuple[Lab, Networks], cell: Cell, watch: Watch) -> list[dict[str, Any]]:
    """Measure `cell`; returns the rows that were made. They are in the lab's journal too.

    A worker on a machine that does not see the study's directory keeps checkpoints in one of its own.
    """
    lab, networks = shared
    module, original = networks[cell.model]
    before = len(lab.journal.rows())
    with contextlib.ExitStack() as closing:
        if not (lab.out / ROWS).exists():
            own = closing.enter_context(tempfile.TemporaryDirectory())
            lab = dc.replace(lab, out=pathlib.Path(own))
        if watch is not unwatched:
            lab = dc.replace(lab, watch=watch)
        measure_pruned(lab, cell.model, module, cell.scope, cell.sparsity, original)
    return lab.journal.rows()[before:]
