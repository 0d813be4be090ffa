"""Convolutions whose kernels have empty positions, as smaller convolutions of the same function."""

from __future__ import annotations

import dataclasses as dc
import functools
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from tersor.errors import ModelError, SpecError
from tersor.graph.layers import weight_layers

DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PADS = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}


@dc.dataclass(frozen=True)
class KernelChange:
    """What became of one convolution: its kernel before and after; `reason` says why it was left alone.

    `macs_share` is the share of its multiplications that is left.
    """

    layer: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    macs_share: float = 1.0
    reason: str = ""


def shrink_kernels_(module: nn.Module) -> list[KernelChange]:
    """Replace, in place, every convolution that has rows, columns or planes of its kernel empty in all
    filters by one with a smaller kernel, dilated where a regular part is empty; exact but for the order
    of sums.

    Padding is adjusted; where its two sides differ it becomes a layer of its own in front, and the
    convolution is the element "1" of an nn.Sequential in the old place. Returns all convolutions with
    kernels of several positions, those left alone with the reason. Raises ModelError where a layer
    sits in two places of the module, which would no longer share it.
    """
    changes = []
    for name, layer in weight_layers(module):
        if not isinstance(layer, nn.Module) or layer.weight[0, 0].numel() == 1:  # type: ignore[index]
            continue
        kernel = tuple(layer.kernel_size)  # type: ignore[arg-type]
        reason = _obstacle(layer)
        boxes = [] if reason else [_used(layer, axis) for axis in range(len(kernel))]
        after = tuple(len(box) for box in boxes)
        if reason or after == kernel:
            reason = reason or "every row and column of the kernel is used by some filter"
            changes.append(KernelChange(name, kernel, kernel, reason=reason))
            continue
        replace_layer_(module, name, _smaller(layer, boxes))
        changes.append(KernelChange(name, kernel, after, math.prod(after) / math.prod(kernel)))
    return changes


def shift_kernels_(module: nn.Module, names: Iterable[str]) -> list[KernelChange]:
    """Replace, in place, the convolutions `names` by `ShiftedConvolution`: multiplications then count only
    the stripes that are there.

    Whether that is faster is a matter of the engine and the share of empty stripes: measure it
    (benchmarks/stripes.py). Raises SpecError for a name that is no convolution of one group with zero padding.
    """
    layers = dict(weight_layers(module))
    changes = []
    for name in names:
        layer = layers.get(name)
        if not isinstance(layer, DENSE) or layer.groups > 1 or _obstacle(layer):
            raise SpecError(
                f"layer {name!r} cannot become a sum of shifted convolutions: expected a convolution of "
                "one group, padded with zeros, not transposed"
            )
        shifted = ShiftedConvolution(layer)
        stripes = sum(weight.shape[0] for weight in shifted.weights)
        share = stripes / (layer.out_channels * math.prod(layer.kernel_size))
        replace_layer_(module, name, shifted)
        kernel = tuple(layer.kernel_size)
        changes.append(KernelChange(name, kernel, (1,) * len(kernel), share))
    return changes


class ShiftedConvolution(nn.Module):
    """A convolution as a sum over the positions of its kernel: each filter that has a stripe there adds a 1x1
    convolution of the shifted input (Meng 2020, section 3.3)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, DENSE)
        self.kernel_size, self.stride = tuple(layer.kernel_size), tuple(layer.stride)
        self.dilation, self.out_channels = tuple(layer.dilation), layer.out_channels
        self.padding = _pads(layer)
        self.positions: list[tuple[int, ...]] = []
        self.weights = nn.ParameterList()
        weight = layer.weight.detach()
        for flat in range(math.prod(self.kernel_size)):
            place = _place(flat, self.kernel_size)
            stripes = weight.flatten(2)[:, :, flat]
            filters = (stripes != 0).any(1).nonzero()[:, 0]
            if len(filters):
                held = stripes[filters].reshape(len(filters), -1, *[1] * len(place))
                self.register_buffer(f"filters{len(self.positions)}", filters)
                self.weights.append(nn.Parameter(held.clone()))
                self.positions.append(place)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs (N, O, ...) of inputs (N, C, ...), as of the convolution."""
        rank = len(self.kernel_size)
        padded = functional.pad(inputs, self.padding)
        sizes = [
            (padded.shape[2 + axis] - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in range(rank)
        ]
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
        total = padded.new_zeros(padded.shape[0], self.out_channels, *sizes)
        for number, (place, weight) in enumerate(zip(self.positions, self.weights, strict=True)):
            seen = padded
            for axis, at in enumerate(place):
                start, step = at * self.dilation[axis], self.stride[axis]
                seen = seen.narrow(2 + axis, start, (sizes[axis] - 1) * step + 1)
            added = convolve(seen, weight, stride=self.stride)
            if len(weight) == self.out_channels:
                total = total + added
            else:
                total = total.index_add(1, self.get_buffer(f"filters{number}"), added)
        if self.bias is not None:
            total = total + self.bias.view(1, -1, *[1] * rank)
        return total


def replace_layer_(module: nn.Module, name: str, fresh: nn.Module) -> None:
    """Put `fresh` in the place `name` of `module`. Raises ModelError where the layer has two places."""
    layer = module.get_submodule(name)
    places = [n for n, part in module.named_modules(remove_duplicate=False) if part is layer]
    if len(places) > 1:
        raise ModelError(
            f"layer {name!r} is also {places[1]!r} of the network; replacing it in one place would end "
            "the sharing: exclude it"
        )
    if not name:
        raise ModelError("the network is a single layer; wrap it in nn.Sequential to replace it")
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, fresh.train(layer.training))


def _obstacle(layer: nn.Module) -> str:
    if not isinstance(layer, DENSE):
        return "transposed convolutions are left alone"
    return "" if layer.padding_mode == "zeros" else f"it pads by {layer.padding_mode}"


def _used(layer: nn.Module, axis: int) -> range:
    """The indexes of the kernel along `axis` that a smaller, evenly dilated kernel must have."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    found = (weight.detach() != 0).movedim(2 + axis, 0).flatten(1).any(1).nonzero()[:, 0].tolist()
    if not found:
        return range(1)
    step = functools.reduce(math.gcd, (index - found[0] for index in found), 0) or 1
    return range(found[0], found[-1] + 1, step)


def _smaller(layer: nn.Module, boxes: list[range]) -> nn.Module:
    """The convolution with the part `boxes` of the kernel, and its padding."""
    assert isinstance(layer, DENSE)
    sides = _pads(layer)
    pads: list[tuple[int, int]] = []
    weight = layer.weight.detach()
    for axis, box in enumerate(boxes):
        before, after = sides[-2 * axis - 2], sides[-2 * axis - 1]
        cut = layer.kernel_size[axis] - 1 - box[-1]
        dilation = layer.dilation[axis]
        pads.append((before - dilation * box[0], after - dilation * cut))
        weight = weight[(slice(None),) * (2 + axis) + (slice(box[0], box[-1] + 1, box.step),)]
    even = all(left == right >= 0 for left, right in pads)
    smaller = type(layer)(
        layer.in_channels,
        layer.out_channels,
        tuple(len(box) for box in boxes),  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=tuple(left for left, _ in pads) if even else 0,  # type: ignore[arg-type]
        dilation=tuple(d * box.step for d, box in zip(layer.dilation, boxes, strict=True)),  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias is not None,
        device="meta",
        dtype=weight.dtype,
    )
    smaller.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        smaller.bias = layer.bias
    if even:
        return smaller
    flat = tuple(side for pair in reversed(pads) for side in pair)
    return nn.Sequential(PADS[len(pads)](flat, 0.0), smaller)  # type: ignore[arg-type]


def _pads(layer: nn.Module) -> list[int]:
    """Zeros around the input as functional.pad takes them: the last axis first."""
    sides = layer._reversed_padding_repeated_twice  # a list where padding is "same"
    assert isinstance(sides, list | tuple)
    return list(sides)


def _place(flat: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    place: list[int] = []
    for size in reversed(kernel):
        place.insert(0, flat % size)
        flat //= size
    return tuple(place)
