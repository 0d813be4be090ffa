"""The measurements of a study: each appends its rows to the journal and is skipped when they are there."""

from __future__ import annotations

import dataclasses as dc
import datetime
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from torch import nn

from tersor.artifact.storage import write_whole
from tersor.bench.environment import environment
from tersor.bench.evaluate import evaluate
from tersor.bench.stats import paired_interval
from tersor.bench.timing import time_sessions
from tersor.data.arrays import Splits
from tersor.engines import Session, open_session
from tersor.errors import RunError
from tersor.graph.export import export_onnx
from tersor.methods.finetune import Progress, finetune
from tersor.methods.quantize import Quantized
from tersor.models.load import load_model, load_weights_, save_weights
from tersor.pipeline import quantize_graph, write
from tersor.results import Score
from tersor.runs import Rows
from tersor.runs.executors import Watch
from tersor.specs import Finetune, Plan, Quantize
from tersor.study.settings import StudySettings


@dc.dataclass(frozen=True, eq=False)
class Lab:
    """Where a study works: its settings, its data, its directory and its journal."""

    settings: StudySettings
    splits: Splits
    out: pathlib.Path
    journal: Rows
    weights: dict[str, str]
    watch: Watch
    graphs: dict[tuple[str, str], onnx.ModelProto | Quantized] = dc.field(default_factory=dict)

    @property
    def work(self) -> pathlib.Path:
        """Intermediate files: float weights, checkpoints, per-sample results."""
        path = self.out / "work"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def to_send(self) -> Lab:
        """This lab for a worker elsewhere: the rows so far in memory, and nobody to watch."""
        return dc.replace(self, journal=Rows(self.journal.rows()), watch=unwatched, graphs={})

    def record(self, model: str, row: dict[str, Any]) -> None:
        """Append a row with the facts that every row carries."""
        around = environment()
        self.journal.append(
            {
                **row,
                "model": model,
                "data": self.splits.name,
                "seed": self.settings.seed,
                "threads": self.settings.threads,
                "cpu": around["cpu"],
                "flags": around["flags"],
                "versions": around["versions"],
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
        )

    def graph(self, model: str, module: nn.Module) -> onnx.ModelProto:
        """The deployment graph of a float network; those of the network in hand are kept."""
        found = self.graphs.get((model, "float"))
        if found is None:
            self.graphs.clear()
            found = self.graphs[model, "float"] = export_onnx(module, self.splits.input_shape)
        assert isinstance(found, onnx.ModelProto)
        return found

    def missing(self, **key: Any) -> bool:
        """True when the journal holds no row with all these values."""
        return not self.journal.find(**key)

    def progress(self, label: str) -> Callable[[Progress], None]:
        """A training's progress as this study shows it."""
        return lambda p: self.watch(f"{label}: {p}", p.step / p.num_steps)


def unwatched(text: str, share: float) -> None:
    """Nobody looks."""


def float_module(lab: Lab, model: str) -> nn.Module:
    """The trained float network: from the weights given, else trained once and kept in the study's directory."""
    given = lab.weights.get(model)
    if given is not None:
        _record_given_training(lab, model, pathlib.Path(given))
        return load_model(model, weights=given)
    path = lab.work / f"{model}.safetensors"
    module = load_model(model, seed=lab.settings.seed)
    if path.exists():
        load_weights_(module, path)
        return module
    spec = Finetune(
        epochs=lab.settings.train_epochs,
        learning_rate=lab.settings.train_learning_rate,
        batch_size=lab.settings.batch_size,
        augment=lab.settings.augment,
        seed=lab.settings.seed,
    )
    checkpoint = lab.work / f"{model}.train.pt"
    trained = finetune(
        module, lab.splits, spec, checkpoint=checkpoint, on_progress=lab.progress(f"train {model}")
    )
    save_weights(trained.module, path)
    if lab.missing(kind="training", model=model):
        lab.record(
            model,
            {
                "kind": "training",
                "recipe": spec.to_dict(),
                "epochs": spec.epochs,
                "seconds": round(trained.seconds, 1),
                "images_per_s": trained.history[-1]["images_per_s"] if trained.history else None,
                "precision": trained.precision,
                "history": list(trained.history),
            },
        )
    checkpoint.unlink(missing_ok=True)
    return trained.module


def _record_given_training(lab: Lab, model: str, weights: pathlib.Path) -> None:
    """The recipe of weights that were given, from the .json that `tersor train` writes beside them."""
    told = weights.with_name(weights.name.partition(".safetensors")[0] + ".json")
    if not told.is_file() or not lab.missing(kind="training", model=model):
        return
    try:
        found = json.loads(told.read_text())
        keys = ("recipe", "seconds", "images_per_s", "precision", "started_from", "history")
        row = {key: found.get(key) for key in keys} | {"epochs": found["recipe"]["epochs"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{told} is not what tersor train writes: {error!r}; mend or remove it"
        ) from None
    lab.record(model, {"kind": "training", **row})


def measure_float(lab: Lab, model: str, module: nn.Module) -> Score:
    """Accuracy and bytes of the float file on ONNX Runtime, the score every other row is compared with; and the
    accuracy of eager PyTorch, whose time is the study's 100 %."""
    score = _float_file(lab, model, module)
    if lab.missing(kind="accuracy", model=model, variant="float", engine="torch"):
        session = open_session(module, engine="torch", threads=lab.settings.threads)
        eager = judge(lab, f"{model} float in eager PyTorch", session)
        lab.record(model, accuracy_row("float", eager, score, None) | {"engine": session.engine})
    return score


def _float_file(lab: Lab, model: str, module: nn.Module) -> Score:
    kept = lab.work / f"{model}.float.npy"
    key = {"kind": "accuracy", "model": model, "variant": "float", "engine": "onnxruntime"}
    if not lab.missing(**key) and kept.exists():
        return Score(np.load(kept))
    lab.watch(f"{model} float: export", 0.0)
    graph = lab.graph(model, module)
    size = write(graph, lab.out / "models" / f"{model}.float.tersor")
    score = judge(lab, f"{model} float", open_session(graph, threads=lab.settings.threads))
    stream = io.BytesIO()
    np.save(stream, score.per_sample)
    write_whole(kept, [stream.getvalue()], len(stream.getvalue()))
    if lab.missing(**key):
        lab.record(model, accuracy_row("float", score, None, size))
    return score


def accuracy_row(
    variant: str, score: Score, original: Score | None, size_bytes: int | None
) -> dict[str, Any]:
    """The part of an accuracy row that every variant has; the caller adds or replaces what is special."""
    interval = None if original is None else paired_interval(score, original).to_dict()
    return {
        "kind": "accuracy",
        "variant": variant,
        "scope": "",
        "sparsity": 0.0,
        "recovery": "",
        "engine": "onnxruntime",
        "precision": "float32" if variant in ("float", "pruned") else "int8",
        "accuracy": score.accuracy,
        "num_samples": score.num_samples,
        "interval": interval,
        "size_bytes": size_bytes,
    }


def judge(lab: Lab, label: str, session: Session) -> Score:
    """Evaluate on the test split, shown as `label`."""
    return evaluate(
        session, lab.splits, on_progress=lambda share: lab.watch(f"{label}: evaluate", share)
    )


def measure_quantized(lab: Lab, model: str, module: nn.Module, original: Score, mode: str) -> None:
    """Quantize in one mode: bytes, accuracy on ONNX Runtime, coverage."""
    key = {"kind": "accuracy", "model": model, "variant": mode}
    if not lab.missing(**key):
        return
    quantized = quantized_form(lab, model, module, mode)
    path = lab.out / "models" / f"{model}.{mode}.tersor"
    size = write(quantized.graph, path, plan=quantized.plan)
    session = open_session(quantized.graph, threads=lab.settings.threads)
    score = judge(lab, f"{model} {mode}", session)
    if lab.missing(kind="coverage", model=model, variant=mode):
        lab.record(model, coverage_row(mode, quantized.plan, quantized.coverage.to_dict()))
    lab.record(model, accuracy_row(mode, score, original, size))


def quantized_form(lab: Lab, model: str, module: nn.Module, mode: str) -> Quantized:
    """The quantized graph of a float module, from the study's settings."""
    graph = lab.graph(model, module)
    found = lab.graphs.get((model, mode))
    if found is None:
        lab.watch(f"{model} {mode}: calibrate and quantize", 0.0)
        spec = Quantize(
            mode=mode, observer=lab.settings.observer, num_calibration=lab.settings.num_calibration
        )
        found = lab.graphs[model, mode] = quantize_graph(graph, lab.splits, spec)
    assert isinstance(found, Quantized)
    return found


def coverage_row(variant: str, plan: Plan, shares: dict[str, float]) -> dict[str, Any]:
    """What was done to each layer, or why not, and the shares of MACs and bytes covered."""
    layers = [
        {k: v for k, v in decision.to_dict().items() if k != "kind"} for decision in plan.layers
    ]
    return {
        "kind": "coverage",
        "variant": variant,
        "layers": layers,
        "macs_share": shares.get("macs_share"),
        "bytes_share": shares.get("bytes_share"),
    }


def measure_timing(lab: Lab, model: str, module: nn.Module, batch: int) -> None:
    """Time eager float32, ONNX Runtime's float32 and each quantized form, interleaved in one run."""
    # Eager float32 is written last: where its row is there, all are; a kill before it repeats the whole.
    if not lab.missing(kind="timing", model=model, batch=batch, variant="float", engine="torch"):
        return
    threads = lab.settings.threads
    sessions: dict[str, Session] = {
        "float/torch": open_session(module, engine="torch", threads=threads),
        "float/onnxruntime": open_session(lab.graph(model, module), threads=threads),
    }
    for mode in lab.settings.modes:
        quantized = quantized_form(lab, model, module, mode)
        sessions[f"{mode}/onnxruntime"] = open_session(quantized.graph, threads=threads)
    lab.watch(f"{model}: time {len(sessions)} forms at batch {batch}", 0.0)
    timings = time_sessions(
        sessions, lab.splits.input_shape, batch, seconds=lab.settings.timing_seconds
    )
    eager = timings["float/torch"].median_ms
    for name, timing in reversed(timings.items()):
        ratio = timing.median_ms / eager
        row = {"kind": "timing", "variant": name.split("/")[0], **timing.to_dict(), "ratio": ratio}
        lab.record(model, row)
