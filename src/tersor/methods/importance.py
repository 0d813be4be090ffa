"""What an error at a layer's outputs is worth: the Fisher information of the network's answers, no labels."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from tersor.graph.layers import weight_layers
from tersor.graph.weights import outputs_by_position
from tersor.methods.device import on_device, training_device, usable_precision
from tersor.methods.layer_statistics import FloatArray, checked_inputs

BATCH = 64  # images whose gradients are held at once


def output_importance(
    module: nn.Module, batches: Iterable[FloatArray], *, precision: str = "bf16", seed: int = 0
) -> dict[str, torch.Tensor]:
    """For every weight layer that the inputs reach, by name: (O,) float32, half the mean over images of the
    squared gradient at each of its outputs, summed over positions.

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
    sums: dict[str, torch.Tensor] = {}
    count = 0

    def keeping(name: str) -> object:
        def keep(layer: nn.Module, _: object, output: torch.Tensor) -> None:
            given.append((name, layer, output))

        return keep

    for name, layer in weight_layers(network):
        layer.register_forward_hook(keeping(name))  # type: ignore[arg-type]
    for _, whole in checked_inputs(batches):
        for inputs in whole.split(BATCH):
            given.clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = network(inputs.to(device)).float()
            drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)
            loss = functional.cross_entropy(logits, drawn[:, 0].to(device), reduction="sum")
            found = torch.autograd.grad(loss, [output for *_, output in given], allow_unused=True)
            for (name, layer, _), gradient in zip(given, found, strict=True):
                if gradient is not None:
                    squares = outputs_by_position(layer, gradient.float()).square().sum((0, 1))
                    sums[name] = sums[name] + squares if name in sums else squares
            count += len(inputs)
    return {name: (held / (2 * count)).cpu() for name, held in sums.items()}
