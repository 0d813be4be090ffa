"""From saliency to a mask (True = keep), with exact counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tersor.errors import ModelError


def keep_top(saliency: torch.Tensor, num_removed: int) -> torch.Tensor:
    """Bool mask of the shape of `saliency` with exactly `num_removed` entries False: the lowest ones.

    Equal saliencies go in the order of their index, so one input has one answer. Raises ModelError for NaN.
    """
    values = saliency.detach().flatten().numpy()
    if np.isnan(values).any():
        raise ModelError("the saliency holds NaN: the weights or their statistics are not finite")
    if not 0 <= num_removed <= values.size:
        raise ModelError(f"cannot remove {num_removed} of {values.size} weights")
    if num_removed == 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    threshold = np.partition(values, num_removed - 1)[num_removed - 1]
    mask = values > threshold
    tied = np.flatnonzero(values == threshold)
    surplus = values.size - num_removed - int(mask.sum())
    mask[tied[tied.size - surplus :]] = True
    return torch.from_numpy(mask).view(saliency.shape)


def removed_by_layer(
    saliencies: Sequence[torch.Tensor], sparsity: float, floor: float
) -> list[int]:
    """Entries each tensor loses when `sparsity` of all entries go, the lowest anywhere first.

    No tensor keeps fewer than ceil(floor * size) entries; what the floor saves is taken from the others,
    so that the total stays exact as far as the floors allow.
    """
    sizes = [s.numel() for s in saliencies]
    most = [size - max(1, int(np.ceil(floor * size))) for size in sizes]
    target = min(round(sparsity * sum(sizes)), sum(most))
    capped: dict[int, int] = {}
    while True:
        free = [i for i in range(len(sizes)) if i not in capped]
        left = target - sum(capped.values())
        removed = dict(capped)
        if free:
            pooled = torch.cat([saliencies[i].flatten() for i in free])
            mask = keep_top(pooled, left)
            for i, part in zip(free, torch.split(mask, [sizes[i] for i in free]), strict=True):
                removed[i] = int(part.numel() - part.sum())
        over = [i for i in free if removed[i] > most[i]]
        if not over:
            return [removed[i] for i in range(len(sizes))]
        capped.update({i: most[i] for i in over})
