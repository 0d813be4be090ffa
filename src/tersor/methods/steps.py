"""What a training step gets besides the module: its learning rate and its augmented images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from tersor.specs import Finetune


def learning_rate(spec: Finetune, step: int, num_steps: int) -> float:
    """The rate of `step` (from 0) of `num_steps`, by spec.schedule.

    one_cycle (Smith 2018): linear from 4 % to the peak over spec.warmup, then half a cosine to zero. rewind
    (Renda 2020): what one_cycle over original_epochs had in its last spec.epochs. cosine: half a cosine from
    the peak to zero (Loshchilov 2017, eq. 5, without restarts). constant: the peak.
    """
    if spec.schedule == "constant":
        return spec.learning_rate
    if spec.schedule == "cosine":
        return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    if spec.schedule == "rewind":
        whole = round(num_steps * spec.original_epochs / spec.epochs)
        step, num_steps = whole - num_steps + step, whole
    position = (step + 1) / (num_steps + 1)
    if position < spec.warmup:
        return spec.learning_rate * (0.04 + 0.96 * position / spec.warmup)
    progress = (position - spec.warmup) / (1 - spec.warmup)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Update for AveragedModel: an exponential moving average whose decay grows to `decay`.

    The decay after n steps is min(decay, (1 + n) / (10 + n)), so that a run of few steps is not held back by the
    weights it started from. Integer buffers are copied.
    """

    @torch.no_grad()
    def update(averaged: Any, current: Any, num_averaged: Any) -> None:
        seen = float(num_averaged)
        share = 1 - min(decay, (1 + seen) / (10 + seen))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, share)
        else:
            for mean, value in zip(averaged, current, strict=True):
                mean.copy_(value)

    return update


def augmented(
    pixels: torch.Tensor,
    augment: str,
    generator: torch.Generator,
    part: slice | None = None,
    batch_size: int | None = None,
) -> torch.Tensor:
    """Random shifts by up to an eighth of the width (edges padded with the mean: zero) and, for flip_crop,
    mirrored halves. `pixels` (N, C, H, W) float32, normalised; they may be the `part` of a batch of `batch_size`
    images, and are shifted as they would be in the whole batch."""
    if augment == "none":
        return pixels
    count, _, height, width = pixels.shape
    part, drawn = part or slice(None), batch_size or count
    pad = max(1, width // 8)
    padded = functional.pad(pixels, (pad, pad, pad, pad))
    down = torch.randint(0, 2 * pad + 1, (drawn, 1), generator=generator)[part]
    right = torch.randint(0, 2 * pad + 1, (drawn, 1), generator=generator)[part]
    columns = right + torch.arange(width)
    if augment == "flip_crop":
        flip = torch.rand(drawn, 1, generator=generator)[part] < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    rows = down + torch.arange(height)
    number = torch.arange(count)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)


def cut_out(
    pixels: torch.Tensor,
    share: float,
    generator: torch.Generator,
    part: slice | None = None,
    batch_size: int | None = None,
) -> torch.Tensor:
    """Each image without one square (DeVries and Taylor 2017, "Improved regularization of convolutional neural
    networks with cutout"): its side is `share` of the image's, its centre anywhere in the image, so that some of it may
    be outside; zero, the mean, is there instead. Arguments as those of `augmented`."""
    count, _, height, width = pixels.shape
    drawn = batch_size or count
    inside = []
    for size in (height, width):
        centre = torch.randint(0, size, (drawn, 1), generator=generator)[part or slice(None)]
        side = round(share * size)
        start = centre - side // 2
        inside.append((torch.arange(size) >= start) & (torch.arange(size) < start + side))
    rows, columns = inside
    return pixels.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
