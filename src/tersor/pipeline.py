"""From what a person names to a compressed file: the few compositions that commands and studies share."""

from __future__ import annotations

import copy
import dataclasses as dc
import functools
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from tersor.artifact import Artifact, load, pack, save
from tersor.data.arrays import Splits
from tersor.engines import Session, open_session
from tersor.errors import ModelError, SpecError
from tersor.graph.export import export_onnx
from tersor.graph.fold import fold_copies_
from tersor.graph.stripes import shrink_kernels_
from tersor.methods import factorize as factorization
from tersor.methods import prune as pruning
from tersor.methods import prune_structured as structured
from tersor.methods import quantize as quantization
from tersor.methods import share as sharing
from tersor.methods.dropout import fitted_dropout
from tersor.methods.finetune import Progress, Trained, finetune
from tersor.methods.quantize_aware import quantize_aware
from tersor.methods.reestimate import augmentation_of, reestimate_batch_norm
from tersor.methods.restore import plan_of, unheld
from tersor.methods.schedules import prune_gradually, remove_gradually
from tersor.models.load import load_model
from tersor.specs import Factorize, Finetune, Plan, Prune, Quantize, Share
from tersor.specs.prune import REMOVED

CALIBRATION_BATCH = 64
# One epoch at a small rate, from the float network's outputs alone: no labels.
QAT_TRAINING = Finetune(
    epochs=1.0,
    learning_rate=0.01,
    weight_decay=0.0,
    label_smoothing=0.0,
    distill=1.0,
    ema_decay=0.999,
)


@dc.dataclass(frozen=True, eq=False)
class Subject:
    """A model a person named: a module, or the artifact of a `.tersor` file."""

    name: str
    module: nn.Module | None
    artifact: Artifact | None
    path: pathlib.Path | None = None

    def graph(
        self, input_shape: tuple[int, int, int], *, fold_copies: bool = False
    ) -> onnx.ModelProto:
        """The deployment graph for inputs (N, *input_shape)."""
        if self.artifact is not None:
            return self.artifact.to_onnx()
        assert self.module is not None, "a subject is a module or an artifact"
        return deployment_graph(self.module, input_shape, fold_copies=fold_copies)

    def state(self, graph: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
        """What `graph`, made of this model, does not hold of the network, by name."""
        if self.artifact is not None:
            return self.artifact.state()
        assert self.module is not None, "a subject is a module or an artifact"
        return unheld(self.module, graph)

    @property
    def plan(self) -> Plan | None:
        """What was done to the network that a file holds; None for a network itself."""
        return None if self.artifact is None else plan_of(self.artifact)

    def need_module(self, purpose: str) -> nn.Module:
        """The module, or a ModelError that says why a file will not do."""
        if self.module is None:
            raise ModelError(
                f"{purpose} needs the network itself, and {self.name} is a deployed file; "
                "name the network and its --weights instead"
            )
        return self.module

    def session(
        self, input_shape: tuple[int, int, int], *, engine: str, threads: int | None
    ) -> Session:
        """Open the model on an engine; `torch` runs the module itself."""
        if engine.startswith("torch"):
            module = self.need_module(f"the engine {engine!r}")
            return open_session(module, engine=engine, threads=threads)
        return open_session(self.graph(input_shape), engine=engine, threads=threads)


def resolve(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> Subject:
    """`NAME | torchvision:NAME | FILE.py:FUNCTION | FILE.tersor` to a Subject."""
    if not name.endswith(".tersor"):
        module = load_model(name, weights=weights, num_classes=num_classes, seed=seed)
        return Subject(name, module, None)
    for flag, value in (("--weights", weights), ("--num-classes", num_classes)):
        if value is not None:
            raise SpecError(f"{flag} does not apply to {name}: the file holds its own weights")
    return Subject(name, None, load(name), pathlib.Path(name))


def deployment_graph(
    module: nn.Module, input_shape: tuple[int, int, int], *, fold_copies: bool = False
) -> onnx.ModelProto:
    """The graph of `module`; with `fold_copies` a linear layer that reads equal copies of each value
    is folded first: the same function for this input shape, with fewer weights. Kernels of which rows
    or columns are empty in all filters are smaller in it."""
    if fold_copies:
        module = copy.deepcopy(module)
        fold_copies_(module, torch.zeros(2, *input_shape))
    graph = export_onnx(module, input_shape)
    shrink_kernels_(graph)
    return graph


def input_shape_of(graph: onnx.ModelProto) -> tuple[int, int, int]:
    """(C, H, W) that a deployment graph takes. Raises ModelError when it is not fixed."""
    dims = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
    if len(dims) != 4 or not all(dims[1:]):
        raise ModelError(f"the graph's input has dimensions {dims}; expected (batch, C, H, W)")
    return dims[1], dims[2], dims[3]


def calibration_batches(splits: Splits, num_images: int) -> Iterator[npt.NDArray[np.float32]]:
    """Unlabelled calibration inputs, `num_images` at most, normalised, in batches."""
    part = splits.calibration
    if num_images > len(part):
        raise SpecError(
            f"{num_images} calibration images asked for, {splits.name} was loaded with {len(part)}; "
            "lower --num-calibration"
        )
    return splits.batches(part.take(np.arange(num_images)), CALIBRATION_BATCH)


@dc.dataclass(frozen=True)
class Compressed:
    """A changed network in the three states the study compares; a state not asked for is None."""

    one_shot: nn.Module
    reestimated: nn.Module | None
    finetuned: Trained | None
    plan: Plan

    @property
    def module(self) -> nn.Module:
        """The furthest state."""
        if self.finetuned is not None:
            return self.finetuned.module
        return self.one_shot if self.reestimated is None else self.reestimated


def prune_model(
    module: nn.Module,
    splits: Splits,
    spec: Prune,
    *,
    reestimate: bool = True,
    augment: str = "auto",
    recovery: Finetune | None = None,
    teacher: nn.Module | None = None,
    checkpoint: pathlib.Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
) -> Compressed:
    """Prune, re-estimate batch norm from calibration inputs (`augment` as there), and fine-tune: with
    the masks kept, or the network that is left of structures that are removed.

    With a schedule of rounds that follows each round, and the training of round N resumes from
    `checkpoint` with .N before its ending. A training that distils learns from `teacher`, by default
    from `module`. Inputs that a criterion, a scope or a
    reconstruction asks for are calibration inputs, without their labels.
    """
    following = _Recovery(
        module, splits, reestimate, augment, recovery, checkpoint, on_progress, teacher
    )
    inputs, example = following.inputs, torch.zeros(1, *splits.input_shape)
    if spec.structure in REMOVED and spec.schedule == "one_shot":
        decided = structured.plan(module, spec, example, inputs=inputs, seed=seed)
        smaller = structured.apply(module, decided, inputs=inputs, seed=seed)
        return following.after(smaller, decided)
    evidence = pruning.Evidence(inputs=inputs, augment=augment)
    if spec.schedule == "one_shot":
        pruned = pruning.prune(module, spec, seed=seed, evidence=evidence)
        return following.after(pruned.module, pruned.plan, pruned.masks)
    states: list[Compressed] = []

    def recover(changed: nn.Module, masks: Mapping[str, torch.Tensor], number: int) -> nn.Module:
        place = None if checkpoint is None else checkpoint.with_suffix(f".{number}.checkpoint")
        states.append(following.after(changed, Plan(spec), dict(masks), place))
        return states[-1].module

    if spec.structure in REMOVED:
        left = remove_gradually(module, spec, example, recover=recover, inputs=inputs, seed=seed)
        return dc.replace(states[-1], plan=left.plan)
    pruned = prune_gradually(module, spec, recover=recover, seed=seed, evidence=evidence)
    return dc.replace(states[-1], plan=pruned.plan)


def factorize_model(
    module: nn.Module,
    splits: Splits,
    spec: Factorize,
    *,
    reestimate: bool = True,
    augment: str = "auto",
    recovery: Finetune | None = None,
    checkpoint: pathlib.Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Compressed:
    """Replace layers by thinner ones in series, re-estimate batch norm, and fine-tune. No labels but
    for a fine-tuning that uses them."""
    following = _Recovery(module, splits, reestimate, augment, recovery, checkpoint, on_progress)
    found = factorization.factorize(module, spec, following.inputs)
    return following.after(found.module, found.plan)


def share_model(
    module: nn.Module, splits: Splits, spec: Share, *, augment: str = "auto", seed: int = 0
) -> Compressed:
    """Make filters from others, and re-estimate batch norm from calibration inputs."""
    found = sharing.share(module, spec, seed=seed)
    return _Recovery(module, splits, augment=augment).after(found.module, found.plan)


@dc.dataclass(frozen=True, eq=False)
class _Recovery:
    """What every method does after it has changed the network `original`."""

    original: nn.Module
    splits: Splits
    reestimate: bool = True
    augment: str = "auto"
    training: Finetune | None = None
    checkpoint: pathlib.Path | None = None
    on_progress: Callable[[Progress], None] | None = None
    teacher: nn.Module | None = None

    @functools.cached_property
    def inputs(self) -> list[npt.NDArray[np.float32]]:
        """All calibration inputs, without labels, in batches."""
        return list(calibration_batches(self.splits, len(self.splits.calibration)))

    @functools.cached_property
    def augmentation(self) -> str:
        """How images are augmented for batch norms."""
        return (
            augmentation_of(self.original, self.inputs) if self.augment == "auto" else self.augment
        )

    def after(
        self,
        changed: nn.Module,
        plan: Plan,
        masks: dict[str, torch.Tensor] | None = None,
        checkpoint: pathlib.Path | None = None,
    ) -> Compressed:
        """Batch norm re-estimated and the network trained, as far as asked for; zeros of `masks` stay.
        `checkpoint` stands in the place of its own."""
        fresh = None
        if self.reestimate:
            fresh = reestimate_batch_norm(changed, self.inputs, augment=self.augmentation)
        tuned = None
        if self.training is not None:
            first = self.teacher or self.original
            example = torch.zeros(1, *self.splits.input_shape)
            tuned = finetune(
                fitted_dropout(fresh or changed, first, example),
                self.splits,
                self.training,
                masks=masks,
                teacher=first if self.training.needs_teacher else None,
                checkpoint=checkpoint or self.checkpoint,
                on_progress=self.on_progress,
            )
        return Compressed(changed, fresh, tuned, plan)


def quantize_graph(
    graph: onnx.ModelProto, splits: Splits | None, spec: Quantize
) -> quantization.Quantized:
    """Quantize a deployment graph; calibration inputs are read where the request needs any."""
    if not spec.needs_inputs:
        return quantization.quantize(graph, spec)
    if splits is None:
        raise SpecError(f"{needing_inputs(spec)} needs calibration inputs; give --data")
    return quantization.quantize(graph, spec, calibration_batches(splits, spec.num_calibration))


def quantize_network(
    module: nn.Module,
    splits: Splits,
    spec: Quantize,
    training: Finetune | None = None,
    *,
    fold_copies: bool = True,
    checkpoint: pathlib.Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> quantization.Quantized:
    """Quantize a network: with `training` for mode qat (by default one epoch of distillation from
    the float network, without labels), else by its graph."""
    if spec.mode != "qat":
        if training is not None:
            raise SpecError(f"a training is for mode qat, got mode {spec.mode}")
        graph = deployment_graph(module, splits.input_shape, fold_copies=fold_copies)
        return quantize_graph(graph, splits, spec)
    return quantize_aware(
        module,
        splits,
        spec,
        training or QAT_TRAINING,
        fold_copies=fold_copies,
        checkpoint=checkpoint,
        on_progress=on_progress,
    )


def needing_inputs(spec: Quantize) -> str:
    """What of a request reads calibration inputs, in words."""
    if spec.mode in ("static", "qat"):
        return f"mode {spec.mode}"
    if spec.rounding != "nearest":
        return f"rounding {spec.rounding}"
    return "a correction of moments" if spec.corrects else "mixed precision"


def write(
    graph: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    provenance: dict[str, Any] | None = None,
    state: dict[str, npt.NDArray[Any]] | None = None,
) -> int:
    """Pack a deployment graph into a `.tersor` file; returns its bytes on disk. `state` is what the
    graph does not hold of its network, by name (see `Subject.state`)."""
    told = {"tersor": importlib.metadata.version("tersor"), **(provenance or {})}
    decided = None if plan is None else plan.to_dict()
    return save(pack(graph, plan=decided, provenance=told, state=state), path)
