"""Pruning criteria: how much each weight matters (saliency, higher = keep)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tersor.registry import Registry

CRITERIA: Registry[Callable[[torch.Tensor, int], torch.Tensor]] = Registry("criterion")


@CRITERIA.register("l1")
def l1(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """Magnitude |w|: the study's criterion. `weight` any shape; saliency of the same shape, float32."""
    return weight.detach().float().abs()


@CRITERIA.register("lamp")
def lamp(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """Layer-adaptive magnitude (Lee 2021, eq. 4): w^2 over the sum of all w'^2 >= w^2 of the layer.

    Within a layer it orders as magnitude does; across layers it keeps thin layers alive. The saliency of the
    largest weight is 1. All-zero layers get zeros.
    """
    squared = weight.detach().double().square().flatten()
    order = torch.argsort(squared, stable=True)
    ascending = squared[order]
    at_least = ascending.flip(0).cumsum(0).flip(0)
    score = torch.where(at_least > 0, ascending / at_least.clamp(min=1e-300), 0.0)
    saliency = torch.empty_like(squared)
    saliency[order] = score
    return saliency.view(weight.shape).float()


@CRITERIA.register("random")
def random(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """Uniform noise from `seed`: the control that every criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator)
