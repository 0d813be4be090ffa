"""The weight of a layer as rows of one form for every kind of layer, and the columns that its rows are
multiplied with.

The form is (O, I, *kernel): outputs, inputs of one group, positions. Rows of a grouped layer are those of
its groups in order. A transposed convolution is a convolution of its inputs with zeros between them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
Layer = nn.Module  # one of graph.layers.WEIGHT_LAYERS


def num_groups(layer: Layer) -> int:
    """Groups of a convolution, 1 for a linear layer."""
    return int(layer.groups) if isinstance(layer, CONVOLUTIONS) else 1


def as_rows(layer: Layer, stored: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape of `layer.weight` in the form (O, I, *kernel), a view where it can be."""
    if not isinstance(layer, TRANSPOSED):
        return stored
    split = stored.reshape(num_groups(layer), -1, *stored.shape[1:])  # (G, I, O / G, *kernel)
    return split.transpose(1, 2).flatten(0, 1)


def from_rows(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_rows`: (O, I, *kernel) in the shape of `layer.weight`."""
    if not isinstance(layer, TRANSPOSED):
        return rows
    split = rows.reshape(num_groups(layer), -1, *rows.shape[1:])
    return split.transpose(1, 2).flatten(0, 1)


def num_positions(layer: Layer) -> int:
    """Positions of the kernel: 1 for linear layers and 1x1 convolutions."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight[0, 0].numel())


def input_windows(layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
    """What each output position of each sample reads, mostly a view: (N, *positions, groups, I, *kernel).

    `inputs` is what `layer` was called with. The output of `layer` at a position, less its bias, is
    the sum over (I, *kernel) of the window times the rows of the group.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return inputs.reshape(inputs.shape[0], -1, 1, inputs.shape[-1])
    rank = len(layer.kernel_size)
    if inputs.dim() == rank + 1:
        inputs = inputs[None]
    transposed = isinstance(layer, TRANSPOSED)
    padded = _spread(layer, inputs) if transposed else _padded(layer, inputs)
    windows = padded
    for axis in range(rank):
        reach = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        windows = windows.unfold(2 + axis, reach, 1 if transposed else layer.stride[axis])
        windows = windows[..., :: layer.dilation[axis]]
    windows = windows.movedim(1, 1 + rank)
    if transposed:  # the first element of the kernel meets the last input of the window
        windows = windows.flip(tuple(range(-rank, 0)))
    return torch.unflatten(windows, 1 + rank, (num_groups(layer), -1))


def outputs_by_position(layer: Layer, outputs: torch.Tensor) -> torch.Tensor:
    """What `layer` gave, (N, positions, O)."""
    if not isinstance(layer, CONVOLUTIONS):
        return outputs.reshape(outputs.shape[0], -1, outputs.shape[-1])
    if outputs.dim() == len(layer.kernel_size) + 1:
        outputs = outputs[None]
    return outputs.flatten(2).transpose(1, 2)


def _padded(layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
    sides = layer._reversed_padding_repeated_twice  # a list where padding is "same"
    assert isinstance(sides, list | tuple)
    mode = layer.padding_mode
    assert isinstance(mode, str)
    return functional.pad(inputs, list(sides), mode="constant" if mode == "zeros" else mode)


def _spread(layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
    """The inputs of a transposed convolution with zeros between them and around: what a convolution of
    stride 1 with the flipped kernel reads (Dumoulin 2016, section 4)."""
    assert isinstance(layer, TRANSPOSED)
    sides: list[int] = []
    spread = inputs
    for axis, stride in enumerate(layer.stride):
        size = spread.shape[2 + axis]
        gaps = torch.zeros_like(spread).unsqueeze(3 + axis)
        shape = [1] * gaps.dim()
        shape[3 + axis] = stride - 1
        spread = torch.cat([spread.unsqueeze(3 + axis), gaps.repeat(shape)], 3 + axis)
        spread = spread.flatten(2 + axis, 3 + axis).narrow(2 + axis, 0, (size - 1) * stride + 1)
        assert isinstance(layer.padding, tuple)
        before = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - int(layer.padding[axis])
        sides = [before, before + int(layer.output_padding[axis]), *sides]
    return functional.pad(spread, sides)
