"""How much of a network's work multiplies by zero: sparsity of activations and gradients, on real data."""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from torch.nn import functional

from tersor.engines.load import available_cpus
from tersor.engines.onnxruntime import inference_session
from tersor.errors import DataError, ModelError
from tersor.graph.layers import graph_layers, weight_layers
from tersor.methods.calibrate import checked_batches, with_outputs

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
THRESHOLDS = (0.01, 0.1, 0.3, 1.0)  # in root mean squares of what the layer reads of an image
TOP_SHARE = 0.01
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dc.dataclass(frozen=True)
class LayerActivity:
    """What one convolutional or linear layer reads and gets back. All but `macs` are shares, 0 to 1.

    `macs` counts multiplications for one image. `input_zeros` is the share of exact zeros among the
    values read, `input_density` that of values above each of THRESHOLDS times the root mean square of
    the image's. `macs_zero_input` is the share of multiplications by an input of zero, `macs_zero` by an
    input or a weight of zero; those by the zeros of padding are left out of both counts.
    `gradient_zeros` is the share of exact zeros in the gradient of the layer's output with batch norm
    as in evaluation, `gradient_zeros_training` with the statistics of the batch, as training has it;
    `gradient_top` the share of the weight gradient's squared norm that its largest hundredth holds.
    """

    layer: str
    macs: int
    input_zeros: float
    input_density: tuple[float, ...]
    weight_zeros: float
    macs_zero_input: float
    macs_zero: float
    gradient_zeros: float
    gradient_zeros_training: float
    gradient_top: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; the densities by threshold."""
        density = {str(t): d for t, d in zip(THRESHOLDS, self.input_density, strict=True)}
        return {**dc.asdict(self), "input_density": density}


@dc.dataclass(frozen=True)
class Activity:
    """Layers in the order of the network, those never called as layers, and over how many images."""

    layers: tuple[LayerActivity, ...]
    unreached: tuple[str, ...]
    num_images: int
    num_gradient_images: int

    @property
    def macs_zero(self) -> float:
        """Share of all multiplications by an input or a weight of zero, 0 to 1."""
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.macs * layer.macs_zero for layer in self.layers) / max(total, 1)

    @property
    def potential_speedup(self) -> float:
        """How many times faster an engine would be that skips every such multiplication at no cost."""
        return 1 / max(1 - self.macs_zero, 1e-9)


def measure_activity(
    module: nn.Module,
    batches: Iterable[FloatArray],
    labels: IntArray | None = None,
    *,
    num_images: int = 128,
    num_gradient_images: int = 64,
    seed: int = 0,
) -> Activity:
    """Run the first `num_images` images of `batches` (N, C, H, W) float32 through a copy of `module`.

    Gradients are those of the cross-entropy over the first `num_gradient_images`, with their `labels` (N,) or
    without them with the network's own answers as labels: its distance to its own outputs is least there,
    and would have no gradient at all. `seed` decides dropout in the training form. Raises DataError for
    unusable images or labels, ModelError for a network without layers to measure.
    """
    network = copy.deepcopy(module).cpu().float().eval()
    layers = dict(weight_layers(network))
    if not layers:
        raise ModelError(f"{type(module).__name__} has no convolutional or linear layer to measure")
    counts = {name: _Counts(layer) for name, layer in layers.items()}
    images: list[FloatArray] = []
    with _watched(layers, lambda name, *values: counts[name].add(*values)), torch.no_grad():
        for _, batch in checked_batches(batches, [0, 0, 0], num_images):
            images.append(batch)
            network(torch.from_numpy(batch))
    if not images:
        raise DataError("no images were given; activity needs one at least")
    seen = sum(len(batch) for batch in images)
    some = torch.from_numpy(np.concatenate(images)[:num_gradient_images])
    targets = _targets(network, some, labels)
    frozen, tops = _gradients(network, layers, some, targets)
    network.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        moving, _ = _gradients(network, layers, some, targets)
    reached = {name: held for name, held in counts.items() if held.values}
    found = [
        held.activity(name, seen, frozen[name], moving[name], tops[name])
        for name, held in reached.items()
    ]
    missed = tuple(name for name in layers if name not in reached)
    return Activity(tuple(found), missed, seen, len(some))


class _Counts:
    """Sums over images of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.values = self.zeros = self.nominal = 0
        self.above = [0] * len(THRESHOLDS)
        self.macs = np.zeros(3)  # all but those by padding, by an input of zero, by any zero

    def add(self, given: torch.Tensor, made: torch.Tensor) -> None:
        """Count the inputs `given` (N, ...) of one call, and what was `made` of them."""
        self.values += given.numel()
        self.zeros += given.numel() - int(given.count_nonzero())
        rms = given.flatten(1).square().mean(1).sqrt()
        size = given.abs()
        for place, threshold in enumerate(THRESHOLDS):
            limit = (threshold * rms).view(-1, *(1,) * (given.ndim - 1))
            self.above[place] += int((size > limit).sum())
        all_macs, nonzero_inputs, nonzero = mac_counts(self.layer, given)
        self.macs += [all_macs, all_macs - nonzero_inputs, all_macs - nonzero]
        self.nominal += _nominal_macs(self.layer, given, made)

    def activity(
        self, name: str, seen: int, frozen: float, moving: float, top: float
    ) -> LayerActivity:
        weight = self.layer.get_parameter("weight")
        all_macs = max(float(self.macs[0]), 1.0)
        return LayerActivity(
            layer=name,
            macs=self.nominal // seen,
            input_zeros=self.zeros / self.values,
            input_density=tuple(above / self.values for above in self.above),
            weight_zeros=1 - int(weight.count_nonzero()) / max(weight.numel(), 1),
            macs_zero_input=float(self.macs[1]) / all_macs,
            macs_zero=float(self.macs[2]) / all_macs,
            gradient_zeros=frozen,
            gradient_zeros_training=moving,
            gradient_top=top,
        )


@torch.no_grad()
def mac_counts(layer: nn.Module, given: torch.Tensor) -> tuple[int, int, int]:
    """Multiplications of `layer` for the inputs `given` (N, ...): all, by an input that is not zero, and
    by such an input and such a weight. Those by the zeros of padding are in none of the three.

    A transposed convolution is counted as if nothing were cropped at its edges.
    """
    weight = layer.get_parameter("weight")
    live, kept = given != 0, weight != 0
    if isinstance(layer, CONVOLUTIONS):
        groups = layer.groups
        inputs, total = _tap_counts(layer, live), _tap_counts(layer, torch.ones_like(live))
        # (O, C / g, ...) to the weights that an input channel meets at each tap of the kernel: (C, ...)
        taps = kept.view(groups, -1, *weight.shape[1:]).sum(1).flatten(0, 1)
        outputs = weight.shape[0] // groups
    elif isinstance(layer, TRANSPOSED):
        inputs, total = (m.transpose(0, 1).flatten(1).sum(1) for m in (live, torch.ones_like(live)))
        taps = kept.flatten(1).sum(1)
        outputs = weight[0].numel()
    else:
        inputs, total = (m.reshape(-1, m.shape[-1]).sum(0) for m in (live, torch.ones_like(live)))
        taps = kept.sum(0)
        outputs = weight.shape[0]
    return (
        int(total.sum()) * outputs,
        int(inputs.sum()) * outputs,
        int((inputs * taps).sum()),
    )


def _tap_counts(layer: Any, live: torch.Tensor) -> torch.Tensor:
    """How often each input channel is live at each tap of the kernel, over images and positions: (C, *kernel)."""
    pads = list(layer._reversed_padding_repeated_twice)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(live.float(), pads, mode=mode) if any(pads) else live.float()
    spans = [
        (size - (kernel - 1) * dilation - 1) // stride + 1
        for size, kernel, dilation, stride in zip(
            padded.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True
        )
    ]
    counts = []
    for tap in itertools.product(*map(range, layer.kernel_size)):
        window = padded
        for axis, (place, dilation, stride, span) in enumerate(
            zip(tap, layer.dilation, layer.stride, spans, strict=True), start=2
        ):
            start = place * dilation
            window = window.narrow(axis, start, stride * (span - 1) + 1)
            window = window.index_select(axis, torch.arange(0, window.shape[axis], stride))
        counts.append(window.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64))
    return torch.stack(counts, 1).to(torch.int64).view(live.shape[1], *layer.kernel_size)


def _nominal_macs(layer: nn.Module, given: torch.Tensor, made: torch.Tensor) -> int:
    """Multiplications as they are usually counted, padding included."""
    weight = layer.get_parameter("weight")
    if isinstance(layer, TRANSPOSED):
        return math.prod(given.shape[2:]) * weight.numel() * len(given)
    positions = made.numel() // weight.shape[0]  # images times places
    return positions * weight.numel()


def zeros_read(graph: onnx.ModelProto, images: FloatArray) -> float:
    """Share of exact zeros among all values that the layers of `graph` read of `images` (N, C, H, W)."""
    held = {i.name for i in graph.graph.initializer}
    (image,) = [i.name for i in graph.graph.input if i.name not in held]
    reads = [graph.graph.node[n].input[0] for la in graph_layers(graph) for n in la.nodes]
    inner = sorted(set(reads) - {image})
    session = inference_session(with_outputs(graph, inner), available_cpus())
    values = dict(zip(inner, session.run(inner, {image: images}) if inner else [], strict=True))
    values[image] = images
    total = sum(int(values[name].size) for name in reads)
    zeros = sum(int((values[name] == 0).sum()) for name in reads)
    return zeros / max(total, 1)


@contextlib.contextmanager
def _watched(
    layers: dict[str, nn.Module], watch: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Calls `watch(name, input, output)` after every call of each layer, inside the block."""

    def hooked(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return layer.register_forward_hook(lambda _, given, made: watch(name, given[0], made))

    handles = [hooked(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _targets(network: nn.Module, images: torch.Tensor, labels: IntArray | None) -> torch.Tensor:
    with torch.no_grad():
        outputs: torch.Tensor = network(images)
    if outputs.ndim != 2:
        raise ModelError(
            f"{type(network).__name__} gives outputs of shape {tuple(outputs.shape)}; expected (N, classes)"
        )
    if labels is None:
        return outputs.argmax(1)
    some = torch.from_numpy(np.asarray(labels[: len(images)], np.int64))
    if len(some) < len(images) or not 0 <= some.min() <= some.max() < outputs.shape[1]:
        raise DataError(
            f"{len(images)} labels from 0 to {outputs.shape[1] - 1} are expected, got {len(some)} from "
            f"{some.min() if len(some) else 'none'} to {some.max() if len(some) else 'none'}"
        )
    return some


def _gradients(
    network: nn.Module, layers: dict[str, nn.Module], images: torch.Tensor, targets: torch.Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """By layer: the share of zeros in the gradient of its output, and of the weight gradient's squared norm that
    its largest hundredth holds."""
    zeros: dict[str, list[int]] = {name: [0, 0] for name in layers}

    def watch(name: str, _: torch.Tensor, made: torch.Tensor) -> None:
        def count(gradient: torch.Tensor) -> None:
            zeros[name][0] += gradient.numel() - int(gradient.count_nonzero())
            zeros[name][1] += gradient.numel()

        made.register_hook(count)  # type: ignore[no-untyped-call]

    network.zero_grad(set_to_none=True)
    with torch.enable_grad(), _watched(layers, watch):
        functional.cross_entropy(network(images), targets).backward()  # type: ignore[no-untyped-call]
    shares = {name: count / max(total, 1) for name, (count, total) in zeros.items()}
    return shares, {name: _top(layer.get_parameter("weight")) for name, layer in layers.items()}


def _top(weight: nn.Parameter) -> float:
    if weight.grad is None:
        return 0.0
    squares = weight.grad.flatten().double().square()
    count = max(1, round(TOP_SHARE * squares.numel()))
    total = float(squares.sum())
    return float(squares.topk(count).values.sum()) / total if total else 0.0
