"""Rows times columns are what the layer computes, for every kind of layer, in float64."""

import pytest
import torch
from torch import nn

from tersor.graph.weights import (
    as_rows,
    from_rows,
    input_windows,
    num_groups,
    num_positions,
    outputs_by_position,
)

LAYERS = {
    "linear": lambda: nn.Linear(6, 7),
    "grouped, strided": lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2, groups=2),
    "depthwise, same, circular": lambda: nn.Conv2d(
        6, 6, 3, padding="same", dilation=2, groups=6, padding_mode="circular"
    ),
    "1d, reflect": lambda: nn.Conv1d(
        6, 4, 5, padding=3, stride=3, dilation=2, padding_mode="reflect"
    ),
    "3d, replicate": lambda: nn.Conv3d(6, 4, (1, 2, 3), padding=1, padding_mode="replicate"),
    "not padded, no bias": lambda: nn.Conv2d(6, 4, (2, 3), bias=False),
    "transposed, grouped": lambda: nn.ConvTranspose2d(
        6, 4, 3, stride=2, padding=1, output_padding=1, groups=2
    ),
    "transposed, cropped": lambda: nn.ConvTranspose2d(6, 4, (2, 3), padding=2, bias=False),
    "transposed 1d, dilated": lambda: nn.ConvTranspose1d(
        6, 4, 4, stride=3, dilation=2, padding=3
    ),
    "transposed 3d, grouped": lambda: nn.ConvTranspose3d(6, 4, 3, stride=2, groups=2),
}
EVERY = pytest.mark.parametrize("name", list(LAYERS))


def made(name):
    torch.manual_seed(0)
    return LAYERS[name]().double()


@EVERY
@pytest.mark.parametrize("batched", [True, False])
def test_rows_times_columns_are_the_outputs(name, batched):
    layer = made(name)
    rank = len(getattr(layer, "kernel_size", ()))
    size = [9, 10, 8][:rank] if rank else [5]
    shape = [6, *size] if rank else [*size, 6]
    inputs = torch.randn([3, *shape] if batched else shape).double()
    outputs = layer(inputs)
    rows = as_rows(layer, layer.weight)
    groups = num_groups(layer)
    windows = input_windows(layer, inputs)
    columns = windows.reshape(windows.shape[0], -1, groups, rows[0].numel())
    found = torch.einsum("npgk,grk->npgr", columns, rows.reshape(groups, -1, rows[0].numel()))
    found = found.flatten(2)
    if layer.bias is not None:
        found = found + layer.bias
    assert torch.allclose(found, outputs_by_position(layer, outputs), rtol=0, atol=1e-12)


@EVERY
def test_rows_come_back(name):
    layer = made(name)
    rows = as_rows(layer, layer.weight)
    assert rows.shape[0] == outputs_by_position(layer, probe(layer)).shape[2]
    assert torch.equal(from_rows(layer, rows), layer.weight)
    assert num_positions(layer) == rows[0, 0].numel()


def probe(layer):
    rank = len(getattr(layer, "kernel_size", ()))
    return layer(torch.zeros([1, 6, *[9] * rank]).double())
