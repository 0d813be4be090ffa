"""What the original costs and answers: all that a compressed model is compared with."""

from __future__ import annotations

import copy
import dataclasses as dc
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from tersor.bench.drop import Drop
from tersor.bench.energy import counted_energy_mj
from tersor.bench.timing import time_apart
from tersor.data import load_data
from tersor.data.arrays import Splits
from tersor.data.unlabelled import from_batches, unlabelled
from tersor.engines import open_session
from tersor.engines.load import available_cpus, logits_of
from tersor.errors import DataError, SpecError
from tersor.graph.fold import fold_copies_
from tersor.graph.layers import graph_layers
from tersor.methods.prune_structured import require_finite
from tersor.methods.restore import restructured
from tersor.methods.synthesize import synthetic_inputs
from tersor.models import load_model
from tersor.ondemand.effort import Effort, Watch
from tersor.ondemand.kept import Kept, read_array, write_array
from tersor.pipeline import deployment_graph
from tersor.specs import Budget, Plan

FloatArray = npt.NDArray[np.float32]
EAGER, FLOAT = "PyTorch eager float32", "ONNX Runtime float32"
# Without data: more are dear to make, and say little more.
SYNTHETIC = 128
INPUTS, LOGITS = "inputs.npy", "logits.npy"


@dc.dataclass(frozen=True, eq=False)
class Original:
    """The network as it was given, and what was measured of it.

    `as_given` is in eval mode; `module` too, with exact folds made where `folded`. `inputs` (N, C, H, W) float32
    calibrate; `held`, other ones, judge, with `labels` where these are used, and `logits` are the original's on them.
    `costs` are those of the network as it was given: size_bytes (its weights and buffers in float32), latency_ms
    (PyTorch eager float32), macs and energy_mj; `macs` and `engine_ms` (the float graph's time on ONNX Runtime) are
    those after the folds. `data` says in words what inputs these are; `notes` what a reader must know. Where blocks
    went before a search, `gone` is their plan, `module` and `graph` are without them, and `with_blocks` is the folded
    network with them.
    """

    as_given: nn.Module
    module: nn.Module
    splits: Splits
    graph: onnx.ModelProto
    inputs: FloatArray
    held: FloatArray
    labels: npt.NDArray[np.int64] | None
    logits: FloatArray
    costs: Mapping[str, float]
    macs: float
    engine_ms: float
    batch: int
    threads: int
    data: str
    synthetic: bool
    folded: tuple[str, ...]
    notes: tuple[str, ...]
    by_estimate: bool = False
    with_blocks: nn.Module | None = None
    gone: Plan | None = None

    @property
    def whole(self) -> nn.Module:
        """The network that gives the original's answers, at less cost than `as_given` where something was folded."""
        return self.module if self.with_blocks is None else self.with_blocks

    def without(self, gone: Plan) -> Original:
        """The same to compare with, but a search starts from the network without the blocks that `gone` removes."""
        module = restructured(self.whole, gone)
        graph = deployment_graph(module, self.input_shape)
        return dc.replace(self, module=module, graph=graph, with_blocks=self.whole, gone=gone)

    def judged_pt(self, drop: Drop) -> float:
        """What a budget's drop is held against: see Drop.judged_pt; `by_estimate` takes the estimate."""
        return drop.estimate_pt if self.by_estimate else drop.judged_pt

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        return self.splits.input_shape


@dc.dataclass(frozen=True, eq=False)
class Given:
    """A network and inputs as they were given; `splits` None: they are to be made from the network, in
    `input_shape`."""

    module: nn.Module
    splits: Splits | None
    input_shape: tuple[int, int, int] | None


def given(
    model: nn.Module | str,
    data: Any,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> Given:
    """Load. See `ondemand.compress` for `model` and `data`."""
    module = _module(model, weights, num_classes, seed)
    if data is None and input_shape is None:
        raise SpecError(
            "without data the size of an input must be given: --input-shape 3 32 32 (channels height width)"
        )
    return Given(module, None if data is None else _splits(data, seed), input_shape)


def measured_original(
    given: Given,
    budget: Budget,
    effort: Effort,
    kept: Kept,
    *,
    use_labels: bool = True,
    seed: int = 0,
    watch: Watch,
) -> Original:
    """Fold exactly, run and time the original."""
    as_given, synthetic = given.module, given.splits is None
    splits = given.splits if given.splits is not None else _made(given, seed, kept, watch)
    watch("the original: its graph, answers and time", 0.0)
    require_finite(as_given)
    module = copy.deepcopy(as_given)
    folded = tuple(
        fold.linear for fold in fold_copies_(module, torch.zeros(2, *splits.input_shape))[0]
    )
    if not folded:
        module = as_given
    graph = deployment_graph(module, splits.input_shape)
    inputs = splits.normalise(splits.train.images[: effort.num_calibration])
    held = splits.normalise(splits.validation.images[: effort.num_held])
    labels = splits.validation.labels if use_labels else None
    threads = budget.threads or available_cpus()

    def run(place: pathlib.Path) -> dict[str, float]:
        engine = open_session(graph, threads=threads)
        logits = logits_of(engine, held)
        if logits.ndim != 2 or not np.isfinite(logits).all():
            raise DataError(
                f"the network gives outputs of shape {logits.shape}, or NaN or infinity, for the inputs of "
                f"{splits.name}; finite logits (N, classes) are compared here"
            )
        sessions = {EAGER: open_session(as_given, engine="torch", threads=threads), FLOAT: engine}
        seconds = effort.timing_seconds
        times = time_apart(sessions, splits.input_shape, budget.batch, seconds=seconds)
        write_array(place / LOGITS, logits)
        return {"latency_ms": times[EAGER].median_ms, "engine_ms": times[FLOAT].median_ms}

    times, place = kept.piece("original", {}, run)
    tensors = [*as_given.parameters(), *as_given.buffers()]
    size = 4.0 * sum(t.numel() for t in tensors if t.is_floating_point())
    macs = macs_of(graph)
    before = macs + sum(_weights(as_given, name) - _weights(module, name) for name in folded)
    costs = {
        "size_bytes": size,
        "latency_ms": times["latency_ms"],
        "macs": before,
        "energy_mj": counted_energy_mj(before, size, integers=False, batch=budget.batch),
    }
    notes, words = _told(splits, labels, synthetic, len(held))
    return Original(
        as_given,
        module,
        splits,
        graph,
        inputs,
        held,
        None if labels is None else labels[: len(held)],
        read_array(place / LOGITS),
        costs,
        macs,
        times["engine_ms"],
        budget.batch,
        threads,
        words,
        synthetic,
        folded,
        notes,
    )


def macs_of(graph: onnx.ModelProto) -> float:
    """Multiplications of one run on one input."""
    return float(sum(layer.macs for layer in graph_layers(graph)))


def _weights(module: nn.Module, linear: str) -> int:
    return module.get_parameter(f"{linear}.weight").numel()


def _module(model: nn.Module | str, weights: Any, num_classes: int | None, seed: int) -> nn.Module:
    if isinstance(model, nn.Module):
        for name, value in (("weights", weights), ("num_classes", num_classes)):
            if value is not None:
                raise SpecError(f"{name} does not apply to a network that is given as a module")
        return copy.deepcopy(model).cpu().float().eval()
    if model.endswith(".tersor"):
        raise SpecError(
            f"{model} is a deployed file; compressing needs the network itself: name it and its --weights"
        )
    return load_model(model, weights=weights, num_classes=num_classes, seed=seed)


def _made(given: Given, seed: int, kept: Kept, watch: Watch) -> Splits:
    """Inputs made from the network."""
    assert given.input_shape is not None, "checked where it was given"
    shape = given.input_shape

    def make(place: pathlib.Path) -> int:
        made = synthetic_inputs(
            given.module,
            shape,
            SYNTHETIC,
            seed=seed,
            on_progress=lambda share: watch("making inputs from batch norms", share),
        )
        write_array(place / INPUTS, made)
        return len(made)

    _, place = kept.piece("inputs", {}, make)
    return unlabelled("synthetic inputs", read_array(place / INPUTS), seed=seed)


def _splits(data: Any, seed: int) -> Splits:
    """The data in its uses."""
    if isinstance(data, Splits):
        return data
    if isinstance(data, str):
        return load_data(data, seed=seed)
    if isinstance(data, np.ndarray | torch.Tensor):
        return unlabelled("the given inputs", np.asarray(data), seed=seed)
    if isinstance(data, Iterable):
        return from_batches("the given inputs", data, seed=seed)
    raise SpecError(
        f"data is {type(data).__name__}; expected a name, a Splits, an array of inputs, batches of them, or None"
    )


def _told(
    splits: Splits, labels: Any, synthetic: bool, num_held: int
) -> tuple[tuple[str, ...], str]:
    """What must be known of the judgement, and the inputs in words."""
    if synthetic:
        return (
            "no data: inputs were made from batch-norm statistics. What they say of a drop is a guess, usually too "
            "low for real inputs; evaluate the file on real ones before use, or give some unlabelled inputs",
        ), "synthetic inputs from batch norms"
    if labels is None:
        return (
            f"no labels: the drop is judged by the original's own answers on {num_held} held-out inputs of "
            f"{splits.name}",
        ), f"{num_held} held-out inputs of {splits.name}, no labels"
    return (
        "labels: where the original was itself trained on these held-out inputs, it does better on them than on new "
        "ones, and networks that learnt without them lose less than is said; inputs it never saw, under DIR/val, judge "
        "fairly",
    ), f"{num_held} held-out inputs of {splits.name} with their labels (validation part)"
