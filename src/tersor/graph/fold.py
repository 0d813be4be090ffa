"""Exact algebra on modules: the same function with fewer parameters, and back again."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import itertools
from collections.abc import Iterator, Mapping

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
    what was folded. Undo with `unfold_copies_`. A fold that would change the function (the copies are permuted
    on the way, or something else reads them too) is taken back: the outputs for noise tell.
    """
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    found = _find_copies(module, noise)
    masks = dict(masks or {})
    if not found:
        return [], masks
    originals = {fold.linear: module.get_parameter(f"{fold.linear}.weight") for fold in found}
    for name, weight in originals.items():
        if (key := f"{name}.weight") in masks:
            _set_weight(module, name, weight.detach() * masks[key])
    expected = _output(module, noise)
    folded_masks = _fold(module, found, masks)
    if _same(expected, _output(module, noise)):
        return found, folded_masks
    for fold in found:
        _set_weight(module, fold.linear, originals[fold.linear])
        module.get_submodule(fold.pool).output_size = fold.output_size  # type: ignore[assignment]
    return [], masks


def _fold(
    module: nn.Module, found: list[FoldedCopies], masks: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Fold in place what was found; returns the masks of the folded module."""
    masks = dict(masks)
    for fold in found:
        linear = module.get_submodule(fold.linear)
        pool = module.get_submodule(fold.pool)
        assert isinstance(linear, nn.Linear) and isinstance(pool, nn.AdaptiveAvgPool2d)
        with torch.no_grad():
            folded = _grouped(linear.weight, fold.copies).sum(2)
        if (key := f"{fold.linear}.weight") in masks:
            masks[key] = _grouped(masks[key], fold.copies).any(2)
        _set_weight(module, fold.linear, folded)
        pool.output_size = 1
    return masks


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
        _set_weight(module, fold.linear, weight.flatten(1).contiguous())
        pool.output_size = fold.output_size  # type: ignore[assignment]


def _set_weight(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Give the linear layer another weight of another width; a Parameter is put in as it is."""
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    if not isinstance(weight, nn.Parameter):
        weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    linear.weight, linear.in_features = weight, weight.shape[1]


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _output(module: nn.Module, inputs: torch.Tensor) -> object:
    try:
        with _evaluating(module):
            return module(inputs)
    except RuntimeError:  # a second reader of the copies no longer fits
        return None


def _same(expected: object, found: object) -> bool:
    """Equal up to rounding, which is far below what a wrong fold changes."""
    if not (isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor)):
        return False
    size = float(expected.abs().max())
    return expected.shape == found.shape and torch.allclose(expected, found, 1e-3, 1e-3 * size)


def _grouped(weight: torch.Tensor, copies: int) -> torch.Tensor:
    return weight.view(weight.shape[0], -1, copies)


def _find_copies(module: nn.Module, example: torch.Tensor) -> list[FoldedCopies]:
    """Run `example` through hooks: a pool from 1x1 to k copies, directly followed by a linear layer of k * C."""
    calls: list[tuple[str, nn.Module, torch.Size, torch.Size]] = []

    def record(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def seen(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            shapes = [
                value.shape if isinstance(value, torch.Tensor) else torch.Size()
                for value in (next(iter(inputs), None), output)
            ]  # attention takes keywords and gives several values
            calls.append((name, layer, shapes[0], shapes[1]))

        return layer.register_forward_hook(seen)

    handles = [
        record(name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.AdaptiveAvgPool2d)
        or next(layer.parameters(recurse=False), None) is not None
    ]
    try:
        with _evaluating(module):
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for (pool_name, pool, before, after), (name, layer, *_) in itertools.pairwise(calls):
        if not (isinstance(pool, nn.AdaptiveAvgPool2d) and isinstance(layer, nn.Linear)):
            continue
        copies = after[2] * after[3]
        once = sum(call[1] is layer for call in calls) == 1
        if (
            tuple(before[2:]) == (1, 1)
            and copies > 1
            and layer.in_features == before[1] * copies
            and once
        ):
            found.append(FoldedCopies(pool_name, name, copies, pool.output_size))
    return found
