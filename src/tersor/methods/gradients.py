"""What is done to gradients between backward and the optimizer's step: shrinking gammas, keeping the largest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import ModelError


def slimmed_gammas(module: nn.Module) -> list[nn.Parameter]:
    """The trainable gammas of all batch norms. Raises ModelError where there is none."""
    gammas = [
        layer.weight
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.affine and layer.weight.requires_grad
    ]
    if not gammas:
        raise ModelError(
            f"slimming: {type(module).__name__} has no batch norm with a trainable gamma; train without "
            "slimming"
        )
    return gammas


@torch.no_grad()
def add_subgradient_(gammas: Iterable[nn.Parameter], strength: float) -> None:
    """Add strength * sign(gamma) to each gradient: the subgradient of strength * sum |gamma|
    (network slimming, Liu 2017, eq. 1)."""
    for gamma in gammas:
        if gamma.grad is not None:
            gamma.grad.add_(gamma.sign(), alpha=strength)


class LargestGradients(nn.Module):
    """Leaves the largest `share` of each gradient, by magnitude; the rest waits for later steps.

    Deep Gradient Compression (Lin 2018, sections 3.1 and 3.2, algorithm 4): momentum is applied to the own
    gradient u, what is not sent accumulates in v, and both start anew where something was sent. The
    optimizer must have no momentum of its own for these parameters. On one machine nothing is saved: it
    shows what a training over a slow network would learn.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], share: float, momentum: float) -> None:
        super().__init__()
        self.parameters_held = list(parameters)
        self.share, self.momentum = share, momentum
        for kind in ("velocity", "waiting"):
            for number, parameter in enumerate(self.parameters_held):
                self.register_buffer(f"{kind}_{number}", torch.zeros_like(parameter.detach()))

    @torch.no_grad()
    def compress_(self) -> None:
        """Replace each gradient by what is sent of it: as many values as round(share * size), one at least."""
        for number, parameter in enumerate(self.parameters_held):
            if parameter.grad is None:
                continue
            velocity = self.get_buffer(f"velocity_{number}")
            waiting = self.get_buffer(f"waiting_{number}")
            velocity.mul_(self.momentum).add_(parameter.grad)
            waiting.add_(parameter.grad).add_(velocity, alpha=self.momentum)  # Nesterov's form
            count = max(1, round(self.share * waiting.numel()))
            sent = torch.zeros_like(waiting, memory_format=torch.contiguous_format).flatten()
            values = waiting.flatten()
            chosen = values.abs().topk(count, sorted=False).indices
            sent[chosen] = values[chosen]
            parameter.grad = sent.view(waiting.shape).to(parameter.grad)
            kept = sent.view(waiting.shape) == 0
            velocity.mul_(kept)
            waiting.mul_(kept)
