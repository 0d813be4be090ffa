"""What criteria want to know of units beyond their weights, from one pass over images."""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import DataError, ModelError
from tersor.graph.groups import Group
from tersor.graph.watch import Product, Products

BATCH = 64  # images at a time


def _folded(values: Tensor, size: int) -> Tensor:
    """(..., channels) summed over the groups of a convolution whose weight has `size` entries for them."""
    return values.reshape(*values.shape[:-1], -1, size).sum(-2)


@dc.dataclass(frozen=True, eq=False)
class UnitStatistics:
    """By name of a weight: `effects_in` and `effects_out` (num_images, channels), the derivative of each image's loss
    by a factor on a channel that the layer reads, or makes; `norms` (channels,), the Euclidean norm of a channel that
    it reads, over images and positions."""

    effects_in: dict[str, Tensor]
    effects_out: dict[str, Tensor]
    norms: dict[str, Tensor]

    def effects(self, group: Group) -> Tensor | None:
        """(num_images, num_units): the derivative by a factor on all that a unit's values go into; by a factor on what
        makes them where none of their readers is a layer; None where neither is seen."""
        for role, held in (("input", self.effects_in), ("output", self.effects_out)):
            parts = [
                held[m.name][:, torch.from_numpy(m.index)].sum(2)
                for m in group.members
                if m.role == role and m.name in held
            ]
            if parts:
                return torch.stack(parts).sum(0)
        return None


def unit_statistics(
    module: nn.Module,
    images: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64] | None,
    *,
    gradients: bool,
    seed: int = 0,
) -> UnitStatistics:
    """One pass of `images` (N, C, H, W) in eval mode, and back where `gradients` are wanted.

    The loss is the cross entropy with `labels` (N,). Without labels each image's label is drawn from what the network
    itself answers: the mean square of such a derivative is the curvature of KL(original || changed) (Fisher's
    information), whose own first derivative is zero at the original. Raises DataError for labels that do not fit.
    """
    twin = copy.deepcopy(module).eval().requires_grad_(False)
    effects_in: dict[str, list[Tensor]] = {}
    effects_out: dict[str, list[Tensor]] = {}
    squares: dict[str, Any] = {}
    count = 0
    batch: dict[tuple[int, str], Tensor] = {}  # effects of the batch that runs

    def watch(way: int, product: Product, value: Tensor, held: Tensor, size: int) -> None:
        key = way, product.name
        batch.setdefault(key, torch.zeros(count, size))

        def add(gradient: Tensor) -> None:
            effect = (held * gradient).movedim(product.axis, -1)
            rows = count if effect.shape[0] % count == 0 else 1  # images in no order: shared by all
            effect = _folded(effect.reshape(rows, -1, effect.shape[-1]).sum(1), size)
            batch[key] += effect * (rows / count)

        value.register_hook(add)  # type: ignore[no-untyped-call]

    def before(product: Product, value: Tensor) -> Tensor:
        norm = value.detach().double().square().movedim(product.axis, -1).flatten(0, -2).sum(0)
        squares[product.name] = squares.get(product.name, 0.0) + _folded(norm, product.reads)
        if gradients and value.requires_grad:
            value = value.clone()  # what else reads it has its own gradient, or writes into it
            watch(0, product, value, value.detach(), product.reads)
        return value

    def after(product: Product, out: Tensor) -> None:
        if gradients and out.requires_grad:
            watch(1, product, out, out.detach().clone(), product.makes)

    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(images), BATCH):
        inputs = torch.from_numpy(images[start : start + BATCH]).requires_grad_(gradients)
        count, batch = len(inputs), {}
        with torch.set_grad_enabled(gradients), Products(twin, before, after):
            logits = twin(inputs)
        if gradients:
            answers = _answers(module, logits, labels, start, generator)
            functional.cross_entropy(logits, answers, reduction="sum").backward()  # type: ignore[no-untyped-call]
            for (way, name), effect in batch.items():
                (effects_in, effects_out)[way].setdefault(name, []).append(effect)
    return UnitStatistics(
        {name: torch.cat(parts) for name, parts in effects_in.items()},
        {name: torch.cat(parts) for name, parts in effects_out.items()},
        {name: total.sqrt().float() for name, total in squares.items()},
    )


def _answers(
    module: nn.Module,
    logits: Any,
    labels: npt.NDArray[np.int64] | None,
    start: int,
    generator: torch.Generator,
) -> Tensor:
    """(N,) int64: the given labels of a batch, or labels drawn from the answers."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ModelError(
            f"{type(module).__name__} returns no logits (N, classes), so there is no loss to derive; wrap it in a "
            "module that returns them"
        )
    if labels is None:
        return torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    given = torch.from_numpy(np.asarray(labels[start : start + len(logits)], np.int64))
    if len(given) != len(logits) or int(given.min()) < 0 or int(given.max()) >= logits.shape[1]:
        raise DataError(
            f"{len(labels)} labels from {int(np.min(labels))} to {int(np.max(labels))} do not fit: one is needed for "
            f"each image, 0 to {logits.shape[1] - 1}"
        )
    return given


def first_labels(labels: Iterable[Any] | None, num_images: int) -> npt.NDArray[np.int64] | None:
    """The labels of the first images, from one array (N,) or from batches of them."""
    if labels is None:
        return None
    parts = [np.atleast_1d(np.asarray(part)) for part in labels]
    return np.concatenate(parts)[:num_images].astype(np.int64) if parts else np.zeros(0, np.int64)


def norms_of(statistics: UnitStatistics, name: str, index: npt.NDArray[np.int64]) -> Tensor:
    """(num_units, k): the norms of what the columns of a weight read; ones where it was not seen."""
    held = statistics.norms.get(name)
    return torch.ones(index.shape) if held is None else held[torch.from_numpy(index)]
