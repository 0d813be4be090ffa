"""Exact algebra on modules: the same function with fewer parameters, and back again."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping

import torch
from torch import nn


@dc.dataclass(frozen=True)
class FoldedCopies:
    """An average pool that enlarged a 1x1 map to `copies` equal values, and the linear layer that read them."""

    pool: str
    linear: str
    copies: int
    output_size: int | tuple[int | None, ...] | None


def fold_copies_(
    module: nn.Module, example: torch.Tensor, masks: Mapping[str, torch.Tensor] | None = None
) -> tuple[list[FoldedCopies], dict[str, torch.Tensor]]:
    """Sum the columns of a linear layer that reads equal copies of one value, in place.

    torchvision's VGG-16 at 32x32 has a 1x1 map before `AdaptiveAvgPool2d(7)`: its first linear layer sees every
    value 49 times, so 25088 inputs become 512 with no change of the function (up to rounding).
    `masks` holds bool masks of weights by parameter name (True = keep); the folded masks are returned beside
    what was folded. Undo with `unfold_copies_`.
    """
    found = _find_copies(module, example)
    masks = dict(masks or {})
    for fold in found:
        linear = module.get_submodule(fold.linear)
        pool = module.get_submodule(fold.pool)
        assert isinstance(linear, nn.Linear) and isinstance(pool, nn.AdaptiveAvgPool2d)
        with torch.no_grad():
            weight = linear.weight
            key = f"{fold.linear}.weight"
            if key in masks:
                weight = weight * masks[key]
                masks[key] = _grouped(masks[key], fold.copies).any(2)
            folded = _grouped(weight, fold.copies).sum(2)
        linear.weight = nn.Parameter(folded)
        linear.in_features = folded.shape[1]
        pool.output_size = 1
    return found, masks


def unfold_copies_(
    module: nn.Module,
    folded: list[FoldedCopies],
    masks: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Undo `fold_copies_`: each folded weight is shared equally by the copies that `masks` (unfolded) keep."""
    for fold in folded:
        linear = module.get_submodule(fold.linear)
        pool = module.get_submodule(fold.pool)
        assert isinstance(linear, nn.Linear) and isinstance(pool, nn.AdaptiveAvgPool2d)
        with torch.no_grad():
            weight = linear.weight[:, :, None].expand(-1, -1, fold.copies)
            key = f"{fold.linear}.weight"
            if masks is not None and key in masks:
                keep = _grouped(masks[key], fold.copies)
                weight = weight / keep.sum(2, keepdim=True).clamp(min=1) * keep
            else:
                weight = weight / fold.copies
        linear.weight = nn.Parameter(weight.flatten(1).contiguous())
        linear.in_features = linear.weight.shape[1]
        pool.output_size = fold.output_size  # type: ignore[assignment]


def _grouped(weight: torch.Tensor, copies: int) -> torch.Tensor:
    return weight.view(weight.shape[0], -1, copies)


def _find_copies(module: nn.Module, example: torch.Tensor) -> list[FoldedCopies]:
    """Run `example` through hooks: a pool from 1x1 to k copies, directly followed by a linear layer of k * C."""
    calls: list[tuple[str, nn.Module, torch.Size, torch.Size]] = []

    def record(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return layer.register_forward_hook(
            lambda _, inputs, output: calls.append((name, layer, inputs[0].shape, output.shape))
        )

    handles = [
        record(name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.AdaptiveAvgPool2d) or next(layer.parameters(recurse=False), None) is not None
    ]
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()(example)
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    found = []
    for (pool_name, pool, before, after), (name, layer, *_) in zip(calls, calls[1:], strict=False):
        if not (isinstance(pool, nn.AdaptiveAvgPool2d) and isinstance(layer, nn.Linear)):
            continue
        copies = after[2] * after[3]
        once = sum(call[1] is layer for call in calls) == 1
        if tuple(before[2:]) == (1, 1) and copies > 1 and layer.in_features == before[1] * copies and once:
            found.append(FoldedCopies(pool_name, name, copies, pool.output_size))
    return found
