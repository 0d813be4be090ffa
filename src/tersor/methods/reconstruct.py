"""Masks with the remaining weights fitted to the original's outputs, layer after layer, without labels.

Each layer sees the inputs that the network gives whose earlier layers are pruned already, and is fitted by
least squares to what the original network's layer gives for the same images, so that it also makes up for
what the layers before it lost (Frantar 2022, section 4; He 2017, section 3.2).
"""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from tersor.graph.layers import weight_layers
from tersor.graph.weights import as_rows, from_rows
from tersor.methods.device import off_device, on_device
from tersor.methods.judging import BatchStatistics
from tersor.methods.layer_statistics import POSITIONS, FloatArray, layer_statistics
from tersor.methods.paired_moments import (
    MomentSums,
    Reading,
    input_chunks,
    walk_pairs,
    weight_of,
)
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.tensors.least_squares import Moments, damped, fit_gradually
from tersor.tensors.statistics import LayerStatistics

PATH_STEPS, PATH_SWEEPS = 2, 6

# (weight, mask, statistics of what the layer reads now, share of the removal from 0 to 1) -> mask, all in
# the form (O, I, *kernel).
Choose = Callable[[torch.Tensor, torch.Tensor, LayerStatistics, float], torch.Tensor]


@dc.dataclass(frozen=True, eq=False)
class Reconstruction:
    """The fitted copy, the mask of each layer in the shape of its weight (True = keep), and for each layer
    the squared error of its outputs as a share of their variance; layers without an entry kept their
    weights' values: the inputs do not reach them, or they run several times."""

    module: nn.Module
    masks: dict[str, torch.Tensor]
    errors: dict[str, float]


def reconstruct(
    original: nn.Module,
    module: nn.Module,
    choices: Mapping[str, Choose],
    batches: Iterable[FloatArray],
    *,
    before: Mapping[str, torch.Tensor] | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    augment: str = "auto",
    precision: str = "bf16",
    positions_per_image: int = POSITIONS,
    seed: int = 0,
) -> Reconstruction:
    """Prune a copy of `module`, layer by layer as `choices` say, and fit what stays to `original`.

    `batches` are inputs (N, ...) float32; the values that live at one point of the network are held for
    all of them. `before` (by layer, bool, in the form (O, I, *kernel)) is what earlier prunings kept.
    `statistics` hands gradients to criteria that need them. Biases are fitted too, and batch norms
    re-estimated, with images augmented by `augment` (as there). `precision` "bf16" runs the passes in bfloat16 where the processor has it. Raises
    DataError for unusable inputs, ModelError for a layer with too many inputs.
    """
    inputs = input_chunks(batches)
    device = inputs[0].device
    teacher = on_device(copy.deepcopy(original).eval(), device)
    student = on_device(copy.deepcopy(module).eval(), device)
    layers = {name: layer for name, layer in weight_layers(student) if name in choices}
    work = _Work(layers, choices, dict(before or {}), dict(statistics or {}))
    reading = Reading(student, inputs[0][:2])
    fitted = {n: layer for n, layer in layers.items() if reading.calls.get(n) == 1}
    arrays = [chunk.numpy() for chunk in inputs]
    for name in [name for name in layers if name not in fitted]:
        needs = ("input_sq_norm", "hessian")
        for found in layer_statistics(student, needs, arrays, layers=[name], seed=seed).values():
            work.statistics[name] = _joined(work.statistics.get(name), found.hessian)
        work.only_mask(name)

    def change(name: str, sums: MomentSums) -> None:
        work.change(name, sums, centred=name in reading.normed)

    with BatchStatistics(student):
        walk_pairs(teacher, student, inputs, fitted, change, precision, positions_per_image, seed)
    for name in fitted.keys() - work.masks.keys():  # branches that no input took
        work.only_mask(name)
    renewed = reestimate_batch_norm(
        off_device(student),
        arrays,
        original=original,
        augment=augment,
        precision=precision,
        seed=seed,
    )
    return Reconstruction(renewed, {n: work.masks[n] for n in layers}, work.errors)


def fitted_paths(
    module: nn.Module,
    choices: Mapping[str, Sequence[Choose]],
    inputs: Sequence[torch.Tensor],
    judge: Callable[[str, Iterator[torch.Tensor]], None],
    *,
    before: Mapping[str, torch.Tensor],
    statistics: Mapping[str, LayerStatistics],
    precision: str = "bf16",
    positions_per_image: int = POSITIONS,
    seed: int = 0,
) -> None:
    """Hand `judge` the fitted weights (O, I, *kernel) of each layer after each of its `choices`, one after
    the other and all else unpruned. Layers that run several times or never are left out."""
    teacher = on_device(copy.deepcopy(module).eval(), inputs[0].device)
    layers = {name: layer for name, layer in weight_layers(teacher) if name in choices}
    reading = Reading(teacher, inputs[0][:2])
    layers = {n: layer for n, layer in layers.items() if reading.calls.get(n) == 1}

    def change(name: str, sums: MomentSums) -> None:
        layer = layers[name]
        centred = layer.bias is not None or name in reading.normed
        moments = sums.moments(centred)
        told = _joined(statistics.get(name), sums.second)
        judge(name, _path(layer, choices[name], moments, before[name], told))

    student = copy.deepcopy(teacher)
    watched = {name: layer for name, layer in weight_layers(student) if name in layers}
    walk_pairs(teacher, student, inputs, watched, change, precision, positions_per_image, seed)


def _path(
    layer: nn.Module,
    choices: Sequence[Choose],
    moments: Moments,
    mask: torch.Tensor,
    told: LayerStatistics,
) -> Iterator[torch.Tensor]:
    shape, flat = mask.shape, moments.cross.shape
    rows = as_rows(layer, weight_of(layer).detach()).reshape(flat)
    pulled, kept = damped(moments, rows), mask.reshape(flat)
    for choice in choices:
        choose = _flat(choice, shape, told)
        rows, kept = fit_gradually(
            rows, pulled, choose, mask=kept, steps=PATH_STEPS, last_sweeps=PATH_SWEEPS
        )
        yield rows.reshape(shape)


def _flat(
    choice: Choose, shape: torch.Size, told: LayerStatistics
) -> Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """A choice among weights (O, I, *kernel) as one among rows (groups, R, K)."""

    def choose(rows: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
        return choice(rows.view(shape), mask.view(shape), told, share).view(rows.shape)

    return choose


class _Work:
    """What is done to each layer, and what came of it."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        choices: Mapping[str, Choose],
        before: dict[str, torch.Tensor],
        statistics: dict[str, LayerStatistics],
    ) -> None:
        self.layers, self.choices = layers, choices
        self.before, self.statistics = before, statistics
        self.masks: dict[str, torch.Tensor] = {}
        self.errors: dict[str, float] = {}

    def only_mask(self, name: str) -> None:
        """Mask a layer by its weights as they are."""
        layer = self.layers[name]
        rows, mask = as_rows(layer, weight_of(layer).detach()), self._mask_before(name, layer)
        held = self.statistics.get(name, LayerStatistics())
        self._put(name, layer, rows, self.choices[name](rows, mask, held, 1.0) & mask)

    def change(self, name: str, sums: MomentSums, *, centred: bool) -> None:
        """Prune and fit the layer `name`."""
        layer = self.layers[name]
        moments = sums.moments(centred or layer.bias is not None)
        shape, flat = as_rows(layer, weight_of(layer)).shape, moments.cross.shape
        rows = as_rows(layer, weight_of(layer).detach()).reshape(flat)
        choose = _flat(self.choices[name], shape, _joined(self.statistics.get(name), sums.second))
        before = self._mask_before(name, layer).reshape(flat)
        rows, mask = fit_gradually(rows, damped(moments, rows), choose, mask=before)
        self.errors[name] = moments.error(rows)
        self._put(name, layer, rows.reshape(shape), mask.reshape(shape))
        if isinstance(layer.bias, nn.Parameter):
            with torch.no_grad():
                layer.bias.copy_(sums.bias(rows))

    def _mask_before(self, name: str, layer: nn.Module) -> torch.Tensor:
        whole = torch.ones_like(as_rows(layer, weight_of(layer)), dtype=torch.bool)
        return self.before.get(name, whole)

    def _put(self, name: str, layer: nn.Module, rows: torch.Tensor, mask: torch.Tensor) -> None:
        with torch.no_grad():
            weight_of(layer).copy_(from_rows(layer, rows.masked_fill(~mask, 0.0)))
        self.masks[name] = from_rows(layer, mask).contiguous()


def _joined(held: LayerStatistics | None, hessian: torch.Tensor | None) -> LayerStatistics:
    """`held` with fresh second moments (groups, K, K) of the inputs."""
    norms = None if hessian is None else hessian.diagonal(dim1=1, dim2=2)
    return dc.replace(held or LayerStatistics(), hessian=hessian, input_sq_norm=norms)
