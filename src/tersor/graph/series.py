"""Thinner layers in series in the place of one: what they cost, and how they are put in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tersor.tensors.factorize import Factors

FACTORIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # exactly these: a subclass may differ


def series_cost(
    layer: nn.Module, ranks: Sequence[int], positions: int, positions_in: int
) -> tuple[int, int]:
    """Weights, and multiplications for one image, of `layer` at `ranks`; (): as it is.

    It writes `positions` and reads `positions_in` for one image (1 each for a vector).
    """
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if not ranks:
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        return weight.numel(), weight.numel() * (positions_in if transposed else positions)
    outputs, inputs = weight.shape[:2]
    kernel = weight[0, 0].numel()
    if len(ranks) == 1:
        size = ranks[0] * (inputs * kernel + outputs)
        return size, size * positions
    rank_out, rank_in = ranks
    first, rest = rank_in * inputs, rank_out * rank_in * kernel + outputs * rank_out
    return first + rest, first * positions_in + rest * positions


def ranks_fit(layer: nn.Module, ranks: Sequence[int]) -> bool:
    """Whether `layer` can have these ranks: one, or (outputs, inputs) of a convolution."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if len(ranks) == 1:
        return 1 <= ranks[0] <= min(weight.flatten(1).shape)
    pairs = zip(ranks, weight.shape, strict=False)
    return len(ranks) == 2 and weight.ndim > 2 and all(1 <= rank <= size for rank, size in pairs)


def series_of(layer: nn.Module, ranks: Sequence[int], *, with_bias: bool) -> nn.Sequential:
    """The layers that stand for `layer` at `ranks`, their weights zero, on its device, in its type.

    A matrix: two linear layers. A convolution at one rank: its kernel with so many filters, then
    1x1; at two: 1x1, its kernel, 1x1. Only the last may have a bias.
    """
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    outputs, inputs = weight.shape[:2]
    like = {"device": weight.device, "dtype": weight.dtype}
    kernel = () if isinstance(layer, nn.Linear) else (1,)
    kind = type(layer)
    last = _zeros(kind, ranks[0], outputs, *kernel, bias=with_bias, **like)
    if isinstance(layer, nn.Linear):
        parts = [_zeros(kind, inputs, ranks[0], bias=False, **like), last]
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        spatial = _zeros(
            kind,
            ranks[-1] if len(ranks) == 2 else inputs,
            ranks[0],
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
            bias=False,
            **like,
        )
        first = [_zeros(kind, inputs, ranks[1], 1, bias=False, **like)] if len(ranks) == 2 else []
        parts = [*first, spatial, last]
    series = nn.Sequential(*parts).train(layer.training)
    return series.requires_grad_(weight.requires_grad)


def fill_(series: nn.Module, factors: Factors) -> None:
    """Put `factors` into layers made by `series_of`."""
    assert isinstance(series, nn.Sequential)
    with torch.no_grad():
        for part, weight in zip(series, factors.weights, strict=True):
            part.get_parameter("weight").copy_(weight)
        if factors.bias is not None:
            series[-1].get_parameter("bias").copy_(factors.bias)


def _zeros(kind: Any, *sizes: Any, **options: Any) -> nn.Module:
    """A layer with zero weights, made without a draw from anybody's random numbers."""
    layer: nn.Module = nn.utils.skip_init(kind, *sizes, **options)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer
