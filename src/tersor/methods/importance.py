"""What an error at a layer's outputs is worth: the Fisher information of the network's answers, no labels."""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from tersor.graph.layers import weight_layers
from tersor.graph.weights import outputs_by_position
from tersor.methods.device import on_device, training_device, usable_precision
from tersor.methods.layer_statistics import FloatArray, checked_inputs

BATCH = 64  # images whose gradients are held at once


@dc.dataclass(frozen=True, eq=False)
class Outputs:
    """What a layer's outputs (O,) are: `importance`, of a squared error of 1, in nats, and `variance`; both
    float32, over images and positions."""

    importance: torch.Tensor
    variance: torch.Tensor


def output_importance(
    module: nn.Module, batches: Iterable[FloatArray], *, precision: str = "bf16", seed: int = 0
) -> dict[str, Outputs]:
    """The outputs of every weight layer that the inputs reach, by name. Their importance is half the mean
    over images of the squared gradient at each of them, summed over positions.

    The gradient is that of -log p(answer), the answer drawn by `seed` from the network's own outputs, so its
    mean square is the Fisher information (Martens 2020, section 5): an error e at one output, independent
    from position to position, raises KL(module || changed) by importance * E[e^2] nats. `batches` are inputs
    (N, ...) float32. A layer that runs several times adds up. Raises DataError for unusable inputs.
    """
    device = training_device()
    network = on_device(copy.deepcopy(module).eval(), device)
    bf16 = usable_precision(precision, device) == "bf16"
    generator = torch.Generator().manual_seed(seed)
    given: list[tuple[str, nn.Module, torch.Tensor]] = []
    sums: dict[str, _Sums] = {}

    def keeping(name: str) -> object:
        def keep(layer: nn.Module, _: object, output: torch.Tensor) -> None:
            given.append((name, layer, output))

        return keep

    count = 0
    for name, layer in weight_layers(network):
        layer.register_forward_hook(keeping(name))  # type: ignore[arg-type]
    for _, whole in checked_inputs(batches):
        for inputs in torch.split(whole, BATCH):
            given.clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = network(inputs.to(device)).float()
            drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)
            loss = functional.cross_entropy(logits, drawn[:, 0].to(device), reduction="sum")
            found = torch.autograd.grad(loss, [output for *_, output in given], allow_unused=True)
            for (name, layer, output), gradient in zip(given, found, strict=True):
                if gradient is not None:
                    sums.setdefault(name, _Sums()).add(layer, output.detach(), gradient)
            count += len(inputs)
    return {name: held.outputs(count) for name, held in sums.items()}


class _Sums:
    """Sums over images and positions, (O,) each."""

    def __init__(self) -> None:
        self.gradient: torch.Tensor | float = 0.0
        self.square: torch.Tensor | float = 0.0
        self.total: torch.Tensor | float = 0.0
        self.count = 0

    def add(self, layer: nn.Module, output: torch.Tensor, gradient: torch.Tensor) -> None:
        by_position = outputs_by_position(layer, output.float())
        self.gradient += outputs_by_position(layer, gradient.float()).square().sum((0, 1))
        self.square += by_position.square().sum((0, 1)).double()
        self.total += by_position.sum((0, 1)).double()
        self.count += by_position.shape[0] * by_position.shape[1]

    def outputs(self, num_images: int) -> Outputs:
        mean = torch.as_tensor(self.total) / self.count
        variance = (torch.as_tensor(self.square) / self.count - mean.square()).clamp(min=0)
        importance = torch.as_tensor(self.gradient) / (2 * num_images)
        return Outputs(importance.float().cpu(), variance.float().cpu())
