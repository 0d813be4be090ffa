"""One pass of inputs through a network: the statistics that pruning criteria declare they need."""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from tersor.errors import DataError, ModelError, SpecError
from tersor.graph.layers import weight_layers
from tersor.graph.weights import as_rows, from_rows, input_windows, num_groups, outputs_by_position
from tersor.tensors.statistics import STATISTICS, LayerStatistics

FloatArray = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
LARGEST_INPUTS = 8192  # a second moment of this side takes 268 MB
GATHERED_VALUES = 2**24  # of columns or of gradients at a time: 67 MB
POSITIONS = 64  # drawn of a larger map, for each image


def layer_statistics(
    module: nn.Module,
    needs: Collection[str],
    batches: Iterable[FloatArray],
    *,
    labels: Iterable[Labels] | None = None,
    original: nn.Module | None = None,
    layers: Collection[str] | None = None,
    positions_per_image: int = POSITIONS,
    seed: int = 0,
) -> dict[str, LayerStatistics]:
    """The statistics `needs` of the weight layers of `module` that the inputs reach, by layer name.

    `batches` are inputs (N, ...) float32 as the network sees them. Moments of inputs are over
    `positions_per_image` positions of each image, drawn by `seed` without repetition. Gradients are those
    of the cross-entropy with `labels` (one array (N,) for each batch) or, without, with answers drawn from
    the outputs of `original` (by default `module` itself): their mean is the gradient of
    KL(original || module), their second moment its curvature, the Fisher information (Martens 2020,
    section 5). A layer that runs several times adds up moments; its `sample_gradient` leaves out products
    between the runs. The module is left alone. Raises SpecError for an unknown statistic, DataError for
    no inputs, NaN or infinity, or labels that do not fit, ModelError for a layer with more than
    LARGEST_INPUTS inputs where second moments are asked for, or outputs that are no logits.
    """
    for name in needs:
        if name not in STATISTICS:
            raise SpecError(f"unknown statistic {name!r}; expected one of {', '.join(STATISTICS)}")
    held = copy.deepcopy(module).eval()
    watched = {
        name: _Watch(name, layer, frozenset(needs), positions_per_image, seed)
        for name, layer in weight_layers(held)
        if layers is None or name in layers
    }
    backward = bool({"gradient", "sample_gradient"} & set(needs))
    answers = _Answers(None if original is None else copy.deepcopy(original).eval(), labels, seed)
    handles = [watch.layer.register_forward_hook(watch.see) for watch in watched.values()]
    try:
        for number, inputs in checked_inputs(batches):
            with torch.set_grad_enabled(backward):
                outputs = held(inputs)
            if backward:
                _backward(outputs, answers.of(number, inputs, outputs), watched)
    finally:
        for handle in handles:
            handle.remove()
    return {name: watch.statistics() for name, watch in watched.items() if watch.num_images}


def checked_inputs(batches: Iterable[Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """Batches as float32 tensors with their numbers. Raises DataError for none, another dtype, an empty
    one, NaN or infinity."""
    number = -1
    for number, batch in enumerate(batches):
        inputs = torch.as_tensor(batch if isinstance(batch, torch.Tensor) else np.array(batch))
        if inputs.dtype != torch.float32 or not inputs.dim() or not len(inputs):
            raise DataError(
                f"input batch {number} is {inputs.dtype} of shape {tuple(inputs.shape)}; expected "
                "float32 (N, ...) as the network sees it (Splits.batches normalises)"
            )
        if not torch.isfinite(inputs).all():
            wrong = int((~torch.isfinite(inputs)).flatten(1).any(1).nonzero()[0])
            raise DataError(
                f"input batch {number} holds NaN or infinity in sample {wrong}; clean the inputs"
            )
        yield number, inputs
    if number < 0:
        raise DataError("no inputs were given; statistics of layers need one at least")


def column_chunks(
    layer: nn.Module,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None,
    positions_per_image: int,
    generator: torch.Generator,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Columns (n, groups, K) that the rows of `layer` are multiplied with, and the outputs (n, O) there,
    a few at a time, float32. Without `outputs` the second is empty."""
    windows = input_windows(layer, inputs)
    shape = windows.shape
    spatial = shape[1 : _first_group_axis(layer)]
    available = int(np.prod(spatial))
    taken = min(available, positions_per_image)
    if taken < available:
        noise = torch.rand(shape[0], available, generator=generator)
        place = noise.argsort(1)[:, :taken].flatten()
    else:
        place = torch.arange(available).repeat(shape[0])
    image = torch.arange(shape[0]).repeat_interleave(taken)
    by_position = None if outputs is None else outputs_by_position(layer, outputs)
    where = np.unravel_index(place.numpy(), tuple(spatial))
    along = [torch.from_numpy(np.asarray(index)) for index in where]
    width = int(np.prod(shape[1 + len(spatial) :]))
    step = max(1, GATHERED_VALUES // width)
    for start in range(0, len(image), step):
        part = slice(start, start + step)
        columns = windows[(image[part], *(index[part] for index in along))]
        columns = columns.reshape(len(columns), num_groups(layer), -1).float()
        if by_position is None:
            yield columns, columns.new_empty(0)
        else:
            yield columns, by_position[image[part], place[part]].float()


def refuse_wide(name: str, layer: nn.Module) -> None:
    """Raise ModelError where the second moment of the layer's inputs would take too much memory."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    width = as_rows(layer, weight)[0].numel()
    if width > LARGEST_INPUTS:
        raise ModelError(
            f"layer {name!r} reads {width} inputs; their second moments need "
            f"{width**2 * 4 / 2**30:.1f} GiB, and {LARGEST_INPUTS} inputs are the most. Sum its equal "
            "inputs first (graph.fold.fold_copies_), exclude the layer, or take another criterion"
        )


def _first_group_axis(layer: nn.Module) -> int:
    kernel = getattr(layer, "kernel_size", (0,))
    return 1 + len(kernel)


class _Watch:
    """Sums over what one layer saw."""

    def __init__(
        self, name: str, layer: nn.Module, needs: frozenset[str], positions: int, seed: int
    ) -> None:
        self.name, self.layer, self.needs, self.positions = name, layer, needs, positions
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        if "hessian" in needs:
            refuse_wide(name, layer)
        self.generator = torch.Generator().manual_seed(seed)
        self.sums: dict[str, torch.Tensor] = {}
        self.num_columns = self.num_images = self.num_batches = 0
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(
        self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Forward hook."""
        self.num_images += len(inputs[0])
        if {"input_sq_norm", "hessian"} & self.needs:
            self._see_columns(inputs[0].detach())
        if "sample_gradient" not in self.needs:
            return None
        self.calls.append((inputs[0].detach(), output))
        return output.clone()  # what follows may write into it, and its gradient would be another's

    def _see_columns(self, inputs: torch.Tensor) -> None:
        chunks = column_chunks(self.layer, inputs, None, self.positions, self.generator)
        for columns, _empty in chunks:
            self.num_columns += len(columns)
            if "hessian" in self.needs:
                by_group = columns.transpose(0, 1)
                self._add("hessian", by_group.transpose(1, 2) @ by_group)
            else:
                self._add("input_sq_norm", columns.square().sum(0))

    def add_gradient(self, gradient: torch.Tensor | None) -> None:
        """The gradient of one batch's loss; None where the layer has no part in it."""
        self.num_batches += 1
        if gradient is not None:
            self._add("gradient", gradient.double().square())

    def add_sample_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """The gradients of the summed loss with respect to this batch's outputs, call by call."""
        for (inputs, _), gradient in zip(self.calls, gradients, strict=True):
            if gradient is not None:
                self._add("sample_gradient", self._squared(inputs, gradient))
        self.calls.clear()

    def _squared(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Sum over samples of the squared gradient of the weight, in its stored shape, float64."""
        groups = num_groups(self.layer)
        axis = _first_group_axis(self.layer)
        rows = as_rows(self.layer, self.weight)
        by_output = outputs_by_position(self.layer, gradient)  # (N, P, O)
        by_output = torch.unflatten(by_output, 2, (groups, -1)).permute(
            0, 2, 3, 1
        )  # (N, G, O / G, P)
        windows = input_windows(self.layer, inputs)
        positions = by_output.shape[-1]
        step = max(1, GATHERED_VALUES // max(positions * groups * rows[0].numel(), rows.numel()))
        total = torch.zeros(groups, by_output.shape[2], rows[0].numel(), dtype=torch.float64)
        for start in range(0, len(windows), step):
            part = windows[start : start + step]
            columns = part.flatten(1, axis - 1).flatten(3).transpose(1, 2)  # (N, G, P, K)
            total += (by_output[start : start + step] @ columns).square().sum(0)
        return from_rows(self.layer, total.view(rows.shape))

    def _add(self, name: str, value: torch.Tensor) -> None:
        held = self.sums.get(name)
        self.sums[name] = value if held is None else held.add_(value)

    def statistics(self) -> LayerStatistics:
        """The means."""
        found: dict[str, torch.Tensor] = {}
        zeros = torch.zeros_like(self.weight, dtype=torch.float64)
        if "hessian" in self.needs:
            found["hessian"] = self.sums["hessian"] / self.num_columns
            if "input_sq_norm" in self.needs:
                found["input_sq_norm"] = found["hessian"].diagonal(dim1=1, dim2=2).clone()
        elif "input_sq_norm" in self.needs:
            found["input_sq_norm"] = self.sums["input_sq_norm"] / self.num_columns
        for name, count in (("gradient", self.num_batches), ("sample_gradient", self.num_images)):
            if name in self.needs:
                mean = self.sums.get(name, zeros) / max(count, 1)
                found[name] = as_rows(self.layer, mean).float()
        return dc.replace(LayerStatistics(), **found)


def _backward(outputs: torch.Tensor, answers: torch.Tensor, watched: dict[str, _Watch]) -> None:
    """Gradients of the batch's loss for every watch that asks for them."""
    seen = [watch for watch in watched.values() if watch.num_images]
    loss = functional.cross_entropy(outputs, answers, reduction="sum")
    weights = [watch.weight for watch in seen if "gradient" in watch.needs]
    values = [output for watch in seen for _, output in watch.calls]
    found = torch.autograd.grad(loss, [*weights, *values], allow_unused=True)
    of_weights, of_values = found[: len(weights)], list(found[len(weights) :])
    for watch, gradient in zip(seen, of_weights, strict=False):
        watch.add_gradient(None if gradient is None else gradient / len(outputs))
    for watch in seen:
        count = len(watch.calls)
        watch.add_sample_gradients(of_values[:count])
        del of_values[:count]


class _Answers:
    """The class that each sample is held to: its label, or a draw from the original's outputs."""

    def __init__(
        self, original: nn.Module | None, labels: Iterable[Labels] | None, seed: int
    ) -> None:
        self.original = original  # None: the module itself
        self.labels = None if labels is None else iter(labels)
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, number: int, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """(N,) int64 for batch `number`."""
        if not isinstance(outputs, torch.Tensor) or outputs.dim() != 2:
            kind = getattr(outputs, "shape", type(outputs).__name__)
            raise ModelError(
                f"gradients need a classifier's logits (N, classes), got {kind}; use a criterion "
                "without gradients"
            )
        if self.labels is None:
            with torch.no_grad():
                logits = outputs if self.original is None else self.original(inputs)
            drawn = torch.multinomial(logits.softmax(1), 1, generator=self.generator)
            return drawn[:, 0]
        given = torch.as_tensor(np.array(next(self.labels, ())))
        if given.shape != (len(inputs),) or given.dtype != torch.int64:
            raise DataError(
                f"labels of batch {number} are {given.dtype} of shape {tuple(given.shape)}; expected "
                f"({len(inputs)},) int64"
            )
        if not 0 <= int(given.min()) <= int(given.max()) < outputs.shape[1]:
            raise DataError(
                f"labels of batch {number} range from {int(given.min())} to {int(given.max())}; the "
                f"network has {outputs.shape[1]} outputs"
            )
        return given
