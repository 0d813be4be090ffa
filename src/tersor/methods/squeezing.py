"""From a trained network to the smallest file: codes chosen by rate and distortion, and a training on top."""

from __future__ import annotations

import copy
import dataclasses as dc
import functools
import importlib.metadata
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from tersor.artifact import pack, save
from tersor.artifact.storage import write_whole
from tersor.data.arrays import Splits
from tersor.errors import BudgetError, SpecError
from tersor.graph.export import export_onnx
from tersor.graph.fold import fold_copies_
from tersor.graph.layers import graph_layers
from tersor.methods.checkpoint import found_bytes
from tersor.methods.finetune import Progress, Trained, training_accuracy
from tersor.methods.learned import LayerBits, LearnedLayer
from tersor.methods.paired_moments import weight_of
from tersor.methods.qat import trainable_layers
from tersor.methods.small_graph import small_graph
from tersor.methods.squeeze import Calibration, CodedLayer, CodedNetwork
from tersor.methods.squeeze_search import Coder, Priced, Told, code_to_drop, code_to_size
from tersor.methods.squeeze_start import started_bytes, started_from
from tersor.methods.squeeze_training import finished, train_coded
from tersor.methods.steps import augmented
from tersor.runs import processes
from tersor.specs import LayerPlan, Plan, Squeeze

FloatArray = npt.NDArray[np.float32]
BATCH = 256
TRIES = 4  # of a file, until it is not larger than asked for
SPARE_BYTES = 64  # beside what is over: other scales take other bytes


@dc.dataclass(frozen=True, eq=False)
class Squeezed:
    """The deployment graph, the network behind it (equal copies of inputs folded, weights exactly scale *
    codes; of scales and biases the graph keeps a few bits, see small_graph), the plan, what each layer's
    codes came to, the price in nats a bit, and the training."""

    graph: onnx.ModelProto
    module: nn.Module
    plan: Plan
    layers: dict[str, CodedLayer]
    price: float
    trained: Trained | None = None


def squeeze(
    module: nn.Module,
    splits: Splits,
    spec: Squeeze,
    *,
    provenance: Mapping[str, Any] | None = None,
    earlier: tuple[Plan, ...] = (),
    masks: Mapping[str, torch.Tensor] | None = None,
    checkpoint: pathlib.Path | None = None,
    told: Told | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Squeezed:
    """Squeeze a copy of `module` as `spec` says, by unlabelled calibration inputs of `splits`.

    spec.size is of the file that `tersor.write` makes of result.graph, result.plan and `provenance`.
    `earlier` are the plans applied before; `masks` (parameter name -> bool, True = keep) what a pruning set
    to zero and stays zero, without training. `told` hears what is done and how much of it, `on_progress` of
    the training, which resumes from `checkpoint` and a .start beside it (the caller removes both). Raises
    BudgetError where the goal cannot be met, SpecError for patterns that match no layer, DataError for
    unusable inputs, ModelError for networks that cannot be exported or hold NaN.
    """
    if masks and spec.epochs:
        raise SpecError(
            "squeeze.epochs trains all weights, also those that a step before set to zero; squeeze without "
            "training, or prune a structure that is removed"
        )
    work = _Work(module, splits, spec, dict(masks or {}), told)
    work.earlier, work.provenance = earlier, dict(provenance or {})
    if spec.size:
        return work.to_size(checkpoint, on_progress)
    if spec.drop:
        return work.squeezed(code_to_drop(work.coder, spec.drop, work.lost))
    return work.squeezed(Priced(work.coder(spec.price, "coding"), spec.price))


class _Work:
    """What a squeeze keeps in mind."""

    def __init__(
        self,
        module: nn.Module,
        splits: Splits,
        spec: Squeeze,
        masks: dict[str, torch.Tensor],
        told: Told | None,
    ) -> None:
        self.splits, self.spec = splits, spec
        self.earlier: tuple[Plan, ...] = ()
        self.provenance: dict[str, Any] = {}
        self.original = copy.deepcopy(module).cpu().eval()
        _, masks = fold_copies_(self.original, torch.zeros(2, *splits.input_shape), masks)
        graph = export_onnx(self.original, splits.input_shape)
        self.layers = graph_layers(graph)
        chosen = trainable_layers(self.original, graph, spec.exclude)
        self.calibration = Calibration(
            self.original, _inputs(splits, spec), precision=spec.precision, seed=spec.seed
        )
        self.coder = Coder(self.calibration, tuple(layer.name for layer in chosen), masks, told)

    def to_size(
        self, checkpoint: pathlib.Path | None, on_progress: Callable[[Progress], None] | None
    ) -> Squeezed:
        """The file of at most spec.size_bytes."""
        size_bytes, training = self.spec.size_bytes, self.spec.training
        beside = self.bytes_beside()
        if beside >= size_bytes:
            raise BudgetError(
                f"squeeze.size {self.spec.size}: the graph, scales, biases and layers left in float take "
                f"{beside:,} bytes without any code; ask for more than that"
            )
        code_bytes = size_bytes - beside
        trained = None
        if training is None:
            found = code_to_size(self.coder, code_bytes)
        else:
            start = self.started(code_bytes, checkpoint)
            trained = train_coded(
                self.original,
                start,
                self.splits,
                training,
                code_bytes=code_bytes,
                checkpoint=checkpoint,
                on_progress=on_progress,
            )
            found = self.after(trained, code_bytes, start.price)
        for _ in range(TRIES):
            result = dc.replace(self.squeezed(found), trained=trained)
            over = self.file_bytes(result.graph, result.plan) - size_bytes
            if over <= 0:
                return result
            code_bytes -= over + SPARE_BYTES
            if trained is None:
                found = code_to_size(self.coder, code_bytes, near=found)
            else:
                found = self.after(trained, code_bytes, found.price)
        raise BudgetError(
            f"squeeze.size {self.spec.size}: after {TRIES} tries the file is {over:,} bytes larger; ask for a "
            "little more"
        )

    def started(self, code_bytes: int, checkpoint: pathlib.Path | None) -> Priced:
        """Where the training starts: coded anew, or as a killed run coded it; by the leader of several processes,
        and the others have it from there."""
        place = None if checkpoint is None else checkpoint.with_suffix(".start")
        among = processes()
        content = None if place is None or not among.leads else found_bytes(place)
        if content is None and among.leads:
            start = code_to_size(self.coder, int(self.spec.start * code_bytes))
            content = started_bytes(self.spec, start)
            if place is not None:
                write_whole(place, [content], len(content))
        content = among.agreed(content)
        return started_from(content, self.spec, copy.deepcopy(self.original), path=place)

    def after(self, trained: Trained, code_bytes: int, price: float) -> Priced:
        """What a training came to."""
        made = finished(trained.module, self.original, self.calibration, code_bytes, price)
        return Priced(made, price)

    def squeezed(self, found: Priced) -> Squeezed:
        """The graph and plan of a coded network."""
        coded = found.coded
        graph = small_graph(coded.module, coded.learned, self.splits.input_shape)
        lines = tuple(self._line(layer.name, coded) for layer in self.layers)
        plan = Plan(self.spec, lines).after(self.earlier)
        return Squeezed(graph, coded.module, plan, coded.layers, found.price)

    def _line(self, name: str, coded: CodedNetwork) -> LayerPlan:
        learned = coded.learned.get(name)
        if learned is None:
            problem = next(layer.problem for layer in self.layers if layer.name == name)
            why = coded.kept.get(name) or problem or "excluded by the request"
            return LayerPlan(name, "keep", reason=why)
        largest = int(np.abs(learned.codes).max(initial=1))
        zeros = 1 - np.count_nonzero(learned.codes) / learned.codes.size
        bits = int(largest).bit_length() + 1
        return LayerPlan(name, "weight_only", round(float(zeros), 3), bits)

    def bytes_beside(self) -> int:
        """About what a file takes beside its codes: of a network whose codes cost nothing."""
        parts = dict(self.original.named_modules())
        learned = {}
        for name in self.coder.names:
            rows = weight_of(parts[name]).detach().flatten(1).numpy()
            codes = np.zeros(rows.shape, np.int8)
            codes[:, 0] = 1
            learned[name] = LearnedLayer(LayerBits(8), codes, np.abs(rows).mean(1) + 1e-6, None)
        bare = copy.deepcopy(self.original)
        for name, layer in learned.items():
            weight = weight_of(bare.get_submodule(name))
            with torch.no_grad():
                weight.copy_(torch.from_numpy(layer.weight()).view(weight.shape))
        lines = tuple(LayerPlan(n.name, "weight_only", 0.123, 4) for n in self.layers)
        plan = Plan(self.spec, lines).after(self.earlier)
        return self.file_bytes(small_graph(bare, learned, self.splits.input_shape), plan)

    def file_bytes(self, graph: onnx.ModelProto, plan: Plan) -> int:
        """The size of the file, everything counted."""
        told = {"tersor": importlib.metadata.version("tersor"), **self.provenance}
        held = pack(graph, plan=plan.to_dict(), provenance=told)
        with tempfile.TemporaryDirectory() as place:
            return save(held, pathlib.Path(place) / "file.tersor")

    @functools.cached_property
    def before(self) -> float | npt.NDArray[np.int64]:
        """The original's accuracy on the validation images; its answers where they have no labels."""
        if self.splits.validation.labels is None:
            return self._answers(self.original)
        return training_accuracy(self.original, self.splits, self.splits.validation)

    def lost(self, coded: CodedNetwork) -> float:
        """Points that a coded network lost on the validation images, or percent of answers that changed."""
        if isinstance(self.before, np.ndarray):
            return 100 * float((self._answers(coded.module) != self.before).mean())
        now = training_accuracy(coded.module, self.splits, self.splits.validation)
        return 100 * (self.before - now)

    def _answers(self, module: nn.Module) -> npt.NDArray[np.int64]:
        batches = self.splits.batches(self.splits.validation, BATCH)
        with torch.inference_mode():
            return np.concatenate([module(torch.from_numpy(b)).argmax(1).numpy() for b in batches])


def _inputs(splits: Splits, spec: Squeeze) -> list[FloatArray]:
    """Unlabelled calibration inputs, augmented as in training: batch norms were set on such."""
    part = splits.calibration
    if spec.num_calibration > len(part):
        raise SpecError(
            f"squeeze.num_calibration {spec.num_calibration}: {splits.name} was loaded with {len(part)} "
            "calibration images; load more, or lower it"
        )
    generator = torch.Generator().manual_seed(spec.seed)
    chosen = part.take(np.arange(spec.num_calibration))
    return [
        augmented(torch.from_numpy(batch), spec.augment, generator).numpy()
        for batch in splits.batches(chosen, BATCH)
    ]
