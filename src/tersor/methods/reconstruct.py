"""Masks with the remaining weights fitted to the original's outputs, layer after layer, without labels.

Each layer sees the inputs that the network gives whose earlier layers are pruned already, and is fitted by
least squares to what the original network's layer gives for the same images, so that it also makes up for
what the layers before it lost (Frantar 2022, section 4; He 2017, section 3.2).
"""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import ModelError
from tersor.graph.layers import weight_layers
from tersor.graph.weights import as_rows, from_rows, num_groups
from tersor.methods.finetune import off_device, on_device, usable_precision
from tersor.methods.layer_statistics import (
    POSITIONS,
    FloatArray,
    checked_inputs,
    column_chunks,
    layer_statistics,
    refuse_wide,
)
from tersor.methods.lockstep import Walk, stopping
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.tensors.least_squares import Moments, fit_gradually
from tersor.tensors.statistics import LayerStatistics

CHUNK = 256  # images that are walked together, and share batch statistics

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
    precision: str = "bf16",
    positions_per_image: int = POSITIONS,
    seed: int = 0,
) -> Reconstruction:
    """Prune a copy of `module`, layer by layer as `choices` say, and fit what stays to `original`.

    `batches` are inputs (N, ...) float32; the values that live at one point of the network are held for
    all of them. `before` (by layer, bool, in the form (O, I, *kernel)) is what earlier prunings kept.
    `statistics` hands gradients to criteria that need them. Biases are fitted too, and batch norms
    re-estimated. `precision` "bf16" runs the passes in bfloat16 where the processor has it. Raises
    DataError for unusable inputs, ModelError for a layer with too many inputs.
    """
    inputs = _chunks(batches)
    device = inputs[0].device
    teacher = on_device(copy.deepcopy(original).eval(), device)
    student = on_device(copy.deepcopy(module).eval(), device)
    layers = {name: layer for name, layer in weight_layers(student) if name in choices}
    reading = _Reading(student, inputs[0][:2])
    fitted = {n: layer for n, layer in layers.items() if reading.calls.get(n) == 1}
    for name, layer in fitted.items():
        refuse_wide(name, layer)
    work = _Work(
        fitted, choices, dict(before or {}), dict(statistics or {}), positions_per_image, seed
    )
    for name in [name for name in layers if name not in fitted]:
        needs = ("input_sq_norm", "hessian")
        for found in layer_statistics(student, needs, inputs, layers=[name], seed=seed).values():
            work.statistics[name] = _joined(work.statistics.get(name), found.hessian)
        work.only_mask(name, layers[name])
    bf16 = usable_precision(precision, device) == "bf16"
    with _BatchStatistics(student):
        _walk(teacher, student, inputs, work, reading.normed, bf16)
    for name in fitted.keys() - work.masks.keys():  # branches that no input took
        work.only_mask(name, fitted[name])
    renewed = reestimate_batch_norm(
        off_device(student), [chunk.numpy() for chunk in inputs], precision=precision
    )
    return Reconstruction(renewed, {n: work.masks[n] for n in layers}, work.errors)


def _chunks(batches: Iterable[FloatArray]) -> list[torch.Tensor]:
    """All inputs, in nearly equal parts of at most CHUNK."""
    whole = torch.cat([inputs for _, inputs in checked_inputs(batches)])
    return list(whole.tensor_split(-(-len(whole) // CHUNK)))


class _Reading:
    """How a network runs: how often each weight layer, and which of them feed a batch norm directly."""

    def __init__(self, module: nn.Module, example: torch.Tensor) -> None:
        self.calls: dict[str, int] = {}
        self.normed: set[str] = set()
        last: tuple[str, torch.Tensor] | None = None

        def ran(name: str) -> Callable[..., None]:
            def note(_: nn.Module, inputs: object, output: torch.Tensor) -> None:
                nonlocal last
                self.calls[name] = self.calls.get(name, 0) + 1
                last = (name, output)

            return note

        def norm(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if last is not None and inputs[0] is last[1]:
                self.normed.add(last[0])

        handles = [layer.register_forward_hook(ran(name)) for name, layer in weight_layers(module)]
        handles += [
            part.register_forward_pre_hook(norm)
            for part in module.modules()
            if isinstance(part, _BatchNorm)
        ]
        try:
            with torch.no_grad():
                module(example)
        finally:
            for handle in handles:
                handle.remove()


class _BatchStatistics:
    """Batch norms of `module` use each batch's own mean and variance and leave theirs alone: pruned layers
    before them have changed what they see, and they are re-estimated at the end anyway."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]

    def __enter__(self) -> None:
        self.momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
            norm.train()

    def __exit__(self, *_: object) -> None:
        for norm, momentum in zip(self.norms, self.momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _walk(
    teacher: nn.Module,
    student: nn.Module,
    inputs: Sequence[torch.Tensor],
    work: _Work,
    normed: set[str],
    bf16: bool,
) -> None:
    """Walk both networks through all inputs and change each layer of the student when all are there."""
    of_teacher = {n: layer for n, layer in weight_layers(teacher) if n in work.layers}

    def done(name: str) -> bool:
        return name in work.masks

    walks = [
        (Walk(teacher, chunk, bf16=bf16), Walk(student, chunk, bf16=bf16)) for chunk in inputs
    ]
    try:
        with (
            stopping(of_teacher, after=True, done=done),
            stopping(work.layers, after=False, done=done),
        ):
            moving = walks
            while True:
                for _, ours in moving:
                    ours.advance()
                waiting = [pair for pair in walks if not pair[1].ended]
                if not waiting:
                    return
                name = waiting[0][1].name
                moving = [pair for pair in waiting if pair[1].name == name]
                for theirs, _ in moving:
                    while theirs.name != name and not theirs.ended:
                        theirs.advance()
                pairs = [(o.value, t.value) for t, o in moving]
                work.change(name, pairs, centred=name in normed)
    finally:
        for pair in walks:
            for walk in pair:
                walk.close()


class _Work:
    """What is done to each layer, and what came of it."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        choices: Mapping[str, Choose],
        before: dict[str, torch.Tensor],
        statistics: dict[str, LayerStatistics],
        positions: int,
        seed: int,
    ) -> None:
        self.layers, self.choices, self.before = layers, choices, before
        self.statistics, self.positions = statistics, positions
        self.generator = torch.Generator().manual_seed(seed)
        self.masks: dict[str, torch.Tensor] = {}
        self.errors: dict[str, float] = {}

    def only_mask(self, name: str, layer: nn.Module) -> None:
        """Mask a layer by its weights as they are."""
        weight = _weight(layer)
        rows, mask = as_rows(layer, weight.detach()), self._mask_before(name, layer)
        held = self.statistics.get(name, LayerStatistics())
        self._put(name, layer, rows, self.choices[name](rows, mask, held, 1.0) & mask)

    def change(
        self,
        name: str,
        pairs: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
        *,
        centred: bool,
    ) -> None:
        """Prune and fit the layer `name` from pairs of (its inputs, the original's outputs)."""
        layer = self.layers[name]
        bias = layer.bias
        centred = centred or bias is not None
        sums = _Sums(layer)
        for inputs, outputs in pairs:
            if inputs is None or outputs is None:
                raise ModelError(
                    f"layer {name!r} runs in the pruned network and not in the original for the same "
                    "inputs; give the network that it was pruned from"
                )
            chunks = column_chunks(layer, inputs, outputs, self.positions, self.generator)
            for columns, wanted in chunks:
                sums.add(columns, wanted)
        moments = sums.moments(centred)
        held = _joined(self.statistics.get(name), sums.second)
        shape = as_rows(layer, _weight(layer)).shape

        def choose(rows: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
            chosen = self.choices[name](rows.view(shape), mask.view(shape), held, share)
            return chosen.view(rows.shape)

        groups = num_groups(layer)
        flat = (groups, shape[0] // groups, -1)
        rows = as_rows(layer, _weight(layer).detach()).reshape(flat)
        before = self._mask_before(name, layer).reshape(flat)
        rows, mask = fit_gradually(rows, moments, choose, mask=before)
        self.errors[name] = moments.error(rows)
        self._put(name, layer, rows.reshape(shape), mask.reshape(shape))
        if isinstance(bias, nn.Parameter):
            with torch.no_grad():
                bias.copy_(sums.bias(rows))

    def _mask_before(self, name: str, layer: nn.Module) -> torch.Tensor:
        whole = torch.ones_like(as_rows(layer, _weight(layer)), dtype=torch.bool)
        return self.before.get(name, whole)

    def _put(self, name: str, layer: nn.Module, rows: torch.Tensor, mask: torch.Tensor) -> None:
        with torch.no_grad():
            _weight(layer).copy_(from_rows(layer, rows.masked_fill(~mask, 0.0)))
        self.masks[name] = from_rows(layer, mask).contiguous()


class _Sums:
    """Sums over columns x (groups, K) and wanted outputs y (groups, R)."""

    def __init__(self, layer: nn.Module) -> None:
        rows = as_rows(layer, _weight(layer))
        groups, width = num_groups(layer), rows[0].numel()
        self.groups = groups
        self.count = 0
        self.second = torch.zeros(groups, width, width)
        self.cross = torch.zeros(groups, len(rows) // groups, width)
        self.inputs = torch.zeros(groups, width, dtype=torch.float64)
        self.outputs = torch.zeros(groups, len(rows) // groups, dtype=torch.float64)
        self.squared = torch.zeros_like(self.outputs)

    def add(self, columns: torch.Tensor, wanted: torch.Tensor) -> None:
        """Columns (n, groups, K) and outputs (n, O)."""
        by_group = columns.transpose(0, 1)
        outputs = wanted.unflatten(1, (self.groups, -1)).transpose(0, 1)
        self.second.baddbmm_(by_group.transpose(1, 2), by_group)
        self.cross.baddbmm_(outputs.transpose(1, 2), by_group)
        self.inputs += by_group.sum(1, dtype=torch.float64)
        self.outputs += outputs.sum(1, dtype=torch.float64)
        self.squared += outputs.double().square().sum(1)
        self.count += len(columns)

    def moments(self, centred: bool) -> Moments:
        """Means, about the means where `centred`; the sums are turned into means."""
        for held in (self.second, self.cross, self.inputs, self.outputs, self.squared):
            held /= self.count
        if not centred:
            return Moments(self.second, self.cross, self.squared.float())
        x, y = self.inputs.float(), self.outputs.float()
        return Moments(
            self.second - x[:, :, None] * x[:, None],
            self.cross - y[:, :, None] * x[:, None],
            (self.squared - self.outputs.square()).float(),
        )

    def bias(self, rows: torch.Tensor) -> torch.Tensor:
        """(O,) with which `rows` give the wanted mean outputs; after `moments`."""
        given = (rows.double() @ self.inputs[:, :, None])[:, :, 0]
        return (self.outputs - given).flatten().float()


def _joined(held: LayerStatistics | None, hessian: torch.Tensor | None) -> LayerStatistics:
    """`held` with fresh second moments (groups, K, K) of the inputs."""
    norms = None if hessian is None else hessian.diagonal(dim1=1, dim2=2)
    return dc.replace(held or LayerStatistics(), hessian=hessian, input_sq_norm=norms)


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight
