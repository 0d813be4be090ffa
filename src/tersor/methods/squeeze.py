"""A network coded by rate and distortion, layer after layer, after training and without labels.

Each layer sees the inputs that the network gives whose earlier layers are coded already, and is fitted to what
the original's layer gives for the same images before its codes are chosen: what the layers before it lost is
made up for as far as it can be. What an error is worth comes from the Fisher information of the original's
answers, so that one price of a bit holds in all layers.
"""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tersor.artifact.rates import coded_bytes
from tersor.errors import ModelError
from tersor.graph.layers import weight_layers
from tersor.graph.weights import as_rows, from_rows, num_positions
from tersor.methods.device import off_device, on_device
from tersor.methods.importance import output_importance
from tersor.methods.judging import BatchStatistics
from tersor.methods.layer_statistics import FloatArray
from tersor.methods.learned import LayerBits, LearnedLayer
from tersor.methods.paired_moments import (
    CHUNK,
    MomentSums,
    Reading,
    input_chunks,
    walk_pairs,
    weight_of,
)
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.tensors.rate_distortion import at_least, code_by_rate, factor

CODED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
MOST_COLUMNS = 8  # drawn of a layer's inputs, for each input of a row: what its second moment needs
LEAST_POSITIONS, MOST_POSITIONS = 4, 64  # of an image's map


@dc.dataclass(frozen=True, eq=False)
class CodedLayer:
    """What coding a layer came to: `size_bytes` of its codes in a file, `bits` as `tensors.rates` counts them,
    `error` the squared error of its outputs as a share of their variance. An error of 1 in a weight of output
    r and input k was worth about outputs[r] * inputs[k] nats, (O,) and (K,) float32."""

    size_bytes: int
    bits: float
    error: float
    outputs: FloatArray
    inputs: FloatArray


@dc.dataclass(frozen=True, eq=False)
class CodedNetwork:
    """A copy of the network whose weights are exactly scale * codes (`learned`, by layer name), batch norms
    re-estimated, and how it went layer by layer. Layers without an entry stay in float; `kept` says why."""

    module: nn.Module
    learned: dict[str, LearnedLayer]
    layers: dict[str, CodedLayer]
    kept: dict[str, str]

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes."""
        return sum(layer.size_bytes for layer in self.layers.values())


class Calibration:
    """The unlabelled inputs that codes are chosen by, and what they tell of the original network."""

    def __init__(
        self, original: nn.Module, batches: Iterable[FloatArray], *, precision: str, seed: int
    ) -> None:
        self.precision, self.seed = precision, seed
        self.inputs = input_chunks(batches)
        self.original = on_device(copy.deepcopy(original).eval(), self.inputs[0].device)
        self.outputs = output_importance(
            original, [chunk.numpy() for chunk in self.inputs], precision=precision, seed=seed
        )

    @property
    def num_images(self) -> int:
        """How many there are."""
        return sum(map(len, self.inputs))

    def part(self, num_images: int) -> Calibration:
        """The same with the first images alone."""
        found = copy.copy(self)
        found.inputs = list(torch.split(torch.cat(self.inputs)[:num_images], CHUNK))
        return found

    def worth_of_a_weight(self, names: Iterable[str]) -> float:
        """What all outputs of the layers `names` are worth, in nats, over the number of their weights."""
        layers = dict(weight_layers(self.original))
        held = {name: self.outputs[name] for name in names if name in self.outputs}
        worth = sum(float((each.importance * each.variance).sum()) for each in held.values())
        return worth / max(sum(weight_of(layers[name]).numel() for name in held), 1)


def code_network(
    calibration: Calibration,
    price: float | Callable[[str], float],
    *,
    names: Iterable[str] | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    told: Callable[[str, CodedLayer], None] | None = None,
    quick: bool = False,
) -> CodedNetwork:
    """Code the convolutional and linear layers `names` (default: all) of a copy of the original.

    `price` is what a bit may cost in nats of KL(original || coded), or gives it for a layer by name when its
    turn comes. `masks` (parameter name -> bool, True = keep): pruned weights stay 0. `told` hears of each
    layer when it is done. `quick`: one step and one round, which cost a few percent of the bytes. Raises
    DataError for unusable inputs, ModelError for weights that are not finite and layers that are too wide.
    """
    student = copy.deepcopy(calibration.original)
    work = _Work(student, calibration, price, masks or {}, quick)
    work.told = told
    layers = {name: layer for name, layer in weight_layers(student) if isinstance(layer, CODED)}
    if names is not None:
        layers = {name: layers[name] for name in names}
    work.take(layers)
    with BatchStatistics(student):
        walk_pairs(
            calibration.original,
            student,
            calibration.inputs,
            work.layers,
            work.change,
            calibration.precision,
            work.positions,
            calibration.seed,
        )
    for name in work.layers:
        if name not in work.learned:
            work.kept[name] = "no input reaches it"
    settled = reestimate_batch_norm(
        off_device(student),
        [chunk.numpy() for chunk in calibration.inputs],
        precision=calibration.precision,
    )
    return CodedNetwork(settled, work.learned, work.done, work.kept)


class _Work:
    """What is done to each layer, and what came of it."""

    def __init__(
        self,
        student: nn.Module,
        calibration: Calibration,
        price: float | Callable[[str], float],
        masks: Mapping[str, torch.Tensor],
        quick: bool,
    ) -> None:
        self.calibration, self.price, self.masks = calibration, price, masks
        self.told: Callable[[str, CodedLayer], None] | None = None
        self.search: dict[str, Any] = {"rounds": 1, "step_shares": (1.0,)} if quick else {}
        self.reading = Reading(student, calibration.inputs[0][:2])
        self.layers: dict[str, nn.Module] = {}
        self.learned: dict[str, LearnedLayer] = {}
        self.done: dict[str, CodedLayer] = {}
        self.kept: dict[str, str] = {}

    def take(self, layers: Mapping[str, nn.Module]) -> None:
        """Be told which layers to code."""
        for name, layer in layers.items():
            if not torch.isfinite(weight_of(layer)).all():
                raise ModelError(f"layer {name!r} holds NaN or infinity; load finite weights")
            calls = self.reading.calls.get(name, 0)
            if calls > 1:
                self.kept[name] = f"it runs {calls} times in one pass: errors would not add up"
            else:
                self.layers[name] = layer

    def positions(self, name: str) -> int:
        """Positions of a map to draw for each image."""
        rows = as_rows(self.layers[name], weight_of(self.layers[name]))
        wanted = MOST_COLUMNS * rows[0].numel() // self.calibration.num_images
        return min(max(wanted, LEAST_POSITIONS), MOST_POSITIONS)

    def change(self, name: str, sums: MomentSums) -> None:
        """Code the layer `name`."""
        layer = self.layers[name]
        moments = sums.moments(name in self.reading.normed or layer.bias is not None)
        before = as_rows(layer, weight_of(layer).detach())
        rows = before.reshape(moments.cross.shape)
        factors = [factor(each) for each in moments.hessian.numpy()]
        pairs = zip(factors, moments.cross.numpy(), rows.numpy(), strict=True)
        wanted = np.concatenate([each.fitted(cross, own) for each, cross, own in pairs])
        importance = at_least(self._importance(name, len(wanted)))
        price = self.price(name) if callable(self.price) else self.price
        coded = code_by_rate(
            wanted,
            factors,
            importance,
            price,
            positions=num_positions(layer),
            keep=self._keep(name, wanted.shape),
            **self.search,
        )
        size = coded_bytes(np.ascontiguousarray(coded.codes.reshape(before.shape)))
        weight = torch.from_numpy(coded.values())
        with torch.no_grad():
            weight_of(layer).copy_(from_rows(layer, weight.reshape(before.shape)))
            if isinstance(layer.bias, nn.Parameter):
                layer.bias.copy_(sums.bias(weight.reshape(rows.shape)))
        self.learned[name] = LearnedLayer(LayerBits(8), coded.codes, coded.scale, None)
        error = moments.error(weight.reshape(rows.shape))
        inputs = np.mean([each.curvature() for each in factors], axis=0)
        self.done[name] = CodedLayer(size, coded.bits, error, importance, inputs)
        if self.told is not None:
            self.told(name, self.done[name])

    def _importance(self, name: str, rows: int) -> npt.NDArray[np.float32]:
        held = self.calibration.outputs.get(name)
        return np.ones(rows, np.float32) if held is None else held.importance.numpy()

    def _keep(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
        mask = self.masks.get(f"{name}.weight")
        if mask is None:
            return None
        return as_rows(self.layers[name], mask).reshape(shape).numpy()
