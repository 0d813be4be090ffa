"""Pruning of activations: before each layer only the largest values of what it reads are kept.

Nothing is stored and no weight changes: it is an operation of the network that comes along into training
and into the deployment graph.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tersor.errors import DataError, ModelError, SpecError
from tersor.graph.layers import weight_layers
from tersor.graph.select import excluded_layers
from tersor.specs.spec import one_of, require

METHODS = ("top_k", "threshold")


class KeepLargest(nn.Module):
    """Keeps the largest values of each sample by magnitude, `density` of them and one at least; the rest is zero.

    Gradients pass where a value was kept. In ONNX: TopK, GatherElements, ScatterElements.
    """

    def __init__(self, density: float) -> None:
        super().__init__()
        self.density = density

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (N, ...), any float dtype; same shape."""
        flat = values.flatten(1)
        count = max(1, round(self.density * flat.shape[1]))
        chosen = flat.abs().topk(count, dim=1, sorted=False).indices
        kept = torch.zeros_like(flat).scatter(1, chosen, flat.gather(1, chosen))
        return kept.reshape(values.shape)


class KeepAbove(nn.Module):
    """Keeps the values whose magnitude is above `threshold`, a number found by calibration.

    Cheaper than a choice of the largest, which has to order them; how many are kept varies by sample. In
    ONNX: Abs, Greater, Where.
    """

    threshold: torch.Tensor

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor(threshold))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (N, ...), any float dtype; same shape."""
        return torch.where(values.abs() > self.threshold, values, 0.0)


def prune_activations(
    module: nn.Module,
    sparsity: float,
    *,
    method: str = "top_k",
    images: npt.NDArray[np.float32] | None = None,
    exclude: Sequence[str] = (),
) -> nn.Module:
    """A copy of `module`, in eval mode, whose layers read `sparsity` (0 to 1) of zeros or more.

    All convolutional and linear layers but the first, which reads the images themselves, and those of
    `exclude` (names or `re:PATTERN`) get a KeepLargest ("top_k"), or a KeepAbove ("threshold") whose number
    is calibrated on `images` (N, C, H, W) float32, layer after layer: a layer that reads more zeros than asked
    already is left as it is. The copy trains, and exports, as any network. Raises SpecError for a sparsity
    or method that cannot be, DataError for missing images, ModelError for nothing to prune.
    """
    require(
        0 <= sparsity < 1,
        f"the sparsity of activations must be at least 0 and below 1, got {sparsity!r}",
    )
    one_of("method", method, METHODS)
    if (images is None) == (method == "threshold"):
        raise SpecError(
            "method threshold is calibrated on images: give some"
            if images is None
            else "method top_k needs no images; give none, or method threshold"
        )
    network = copy.deepcopy(module).eval()
    names = [name for name, _ in weight_layers(network)]
    skipped = {*names[:1], *excluded_layers(names, exclude)}
    layers = [(name, layer) for name, layer in weight_layers(network) if name not in skipped]
    if not layers:
        raise ModelError(
            f"{type(module).__name__} has no layer left whose input could be pruned; the first one reads the "
            "images and stays as it is"
        )
    for name, layer in layers:
        if hasattr(layer, "activation_mask"):
            raise ModelError(f"the input of layer {name!r} is pruned already; give the original")
        mask = KeepLargest(1 - sparsity) if method == "top_k" else KeepAbove()
        layer.add_module("activation_mask", mask)
    if images is not None:
        _calibrate_(network, layers, sparsity, images)
    for _, layer in layers:
        layer.register_forward_pre_hook(_mask_input)
    return network


def _mask_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Finds the mask through the layer, so that a deep copy uses its own."""
    assert isinstance(layer.activation_mask, nn.Module)
    return layer.activation_mask(inputs[0]), *inputs[1:]


def _calibrate_(
    network: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    sparsity: float,
    images: npt.NDArray[np.float32],
) -> None:
    """Set each threshold to the quantile of what its layer reads, the layers before it pruned already."""
    if not len(images):
        raise DataError("no calibration images were given; a threshold needs one at least")

    def set_and_mask(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = layer.activation_mask
        assert isinstance(mask, KeepAbove)
        size = inputs[0].detach().abs().flatten().numpy()
        removed = int(sparsity * size.size)
        found = 0.0
        if removed:  # between two values, so that rounding elsewhere moves none across
            found = float(
                np.partition(size, (removed - 1, removed))[removed - 1 : removed + 1].mean()
            )
        known = calibrated.get(id(layer))  # a layer called again keeps the lower one
        calibrated[id(layer)] = found if known is None else min(found, known)
        mask.threshold.fill_(calibrated[id(layer)])
        return mask(inputs[0]), *inputs[1:]

    calibrated: dict[int, float] = {}
    handles = [layer.register_forward_pre_hook(set_and_mask) for _, layer in layers]
    try:
        with torch.no_grad():
            network(torch.from_numpy(images))
    finally:
        for handle in handles:
            handle.remove()
