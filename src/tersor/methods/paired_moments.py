"""Two networks walked together: what a layer of one reads, and what the other's layer gives for the same
images, as second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import ModelError
from tersor.graph.layers import weight_layers
from tersor.graph.weights import as_rows, num_groups
from tersor.methods.device import usable_precision
from tersor.methods.layer_statistics import (
    FloatArray,
    checked_inputs,
    column_chunks,
    refuse_wide,
)
from tersor.methods.lockstep import Walk, stopping
from tersor.tensors.least_squares import Moments

CHUNK = 256  # images that are walked together, and share batch statistics


def input_chunks(batches: Iterable[FloatArray]) -> list[torch.Tensor]:
    """All inputs, in nearly equal parts of at most CHUNK. Raises DataError for unusable ones."""
    whole = torch.cat([inputs for _, inputs in checked_inputs(batches)])
    if whole.dim() == 4:
        whole = whole.contiguous(memory_format=torch.channels_last)
    return list(whole.tensor_split(-(-len(whole) // CHUNK)))


class Reading:
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


def walk_pairs(
    teacher: nn.Module,
    student: nn.Module,
    inputs: Sequence[torch.Tensor],
    layers: Mapping[str, nn.Module],
    change: Callable[[str, MomentSums], None],
    precision: str,
    positions: int | Callable[[str], int],
    seed: int,
) -> None:
    """Walk both networks through all inputs; when all have come to a layer of `layers` (the student's), call
    `change` with the moments of its inputs there and of the teacher's outputs, over `positions` of each image
    (or so many for each layer)."""
    bf16 = usable_precision(precision, inputs[0].device) == "bf16"
    of_teacher = {name: layer for name, layer in weight_layers(teacher) if name in layers}
    generator = torch.Generator().manual_seed(seed)
    finished: set[str] = set()
    walks = [(Walk(teacher, chunk, bf16=bf16), Walk(student, chunk, bf16=bf16)) for chunk in inputs]
    try:
        with (
            stopping(of_teacher, after=True, done=finished.__contains__),
            stopping(layers, after=False, done=finished.__contains__),
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
                sums = MomentSums(name, layers[name])
                drawn = positions(name) if callable(positions) else positions
                for theirs, ours in moving:
                    while theirs.name != name and not theirs.ended:
                        theirs.advance()
                    sums.see(name, ours.value, theirs.value, drawn, generator)
                change(name, sums)
                finished.add(name)
    finally:
        for pair in walks:
            for walk in pair:
                walk.close()


class MomentSums:
    """Sums over columns x (groups, K) and wanted outputs y (groups, R)."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        refuse_wide(name, layer)
        rows = as_rows(layer, weight_of(layer))
        groups, width = num_groups(layer), rows[0].numel()
        self.layer, self.groups, self.count = layer, groups, 0
        self.second = torch.zeros(groups, width, width)
        self.cross = torch.zeros(groups, len(rows) // groups, width)
        self.inputs = torch.zeros(groups, width, dtype=torch.float64)
        self.outputs = torch.zeros(groups, len(rows) // groups, dtype=torch.float64)
        self.squared = torch.zeros_like(self.outputs)

    def see(
        self,
        name: str,
        inputs: torch.Tensor | None,
        outputs: torch.Tensor | None,
        positions: int,
        generator: torch.Generator,
    ) -> None:
        """What one walk's layer reads, and what the original's gives for the same images."""
        if inputs is None or outputs is None:
            raise ModelError(
                f"layer {name!r} runs in the pruned network and not in the original for the same "
                "inputs; give the network that it was pruned from"
            )
        for part in column_chunks(self.layer, inputs, outputs, positions, generator):
            self._add(*part)

    def _add(self, columns: torch.Tensor, wanted: torch.Tensor) -> None:
        """Columns (n, groups, K) and outputs (n, O)."""
        by_group = columns.transpose(0, 1)
        outputs = torch.unflatten(wanted, 1, (self.groups, -1)).transpose(0, 1)
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


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The weight of a layer of `weight_layers`."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight
