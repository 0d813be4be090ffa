"""The images of each training step, augmented: a function of the seed and the step alone."""

from __future__ import annotations

import torch
from torch.nn import functional

from tersor.data.arrays import Splits
from tersor.methods.steps import augmented, cut_out
from tersor.methods.together import Together
from tersor.specs import Finetune


class Batches:
    """Batches of splits.train. Every epoch sees every image once, in an order of its own, but for the
    rest that fills no batch. Of several processes each takes its part of every batch."""

    def __init__(self, splits: Splits, spec: Finetune, device: torch.device) -> None:
        self.splits, self.spec, self.device = splits, spec, device
        self.count = len(splits.train)
        self.size = min(spec.batch_size, self.count)
        self.steps_per_epoch = self.count // self.size
        self.together = Together(self.size)
        self.images = torch.from_numpy(splits.train.images)
        labels = splits.train.labels
        self.labels = None if labels is None else torch.from_numpy(labels)

    def number(self, step: int) -> int:
        """The first step whose batch is that of `step`."""
        return step % (self.spec.views * self.steps_per_epoch) if self.spec.views else step

    def at(self, step: int, *, whole: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Inputs (N, C, H, W) float32, normalised, channels_last, and labels (N,) int64 or None: this process's
        part of the batch, or the `whole`."""
        part = slice(0, self.size) if whole else self.together.part
        step = self.number(step)
        epoch, position = divmod(step, self.steps_per_epoch)
        order = torch.randperm(
            self.count, generator=torch.Generator().manual_seed(self.spec.seed * 1_000_003 + epoch)
        )
        index = order[position * self.size : (position + 1) * self.size][part]
        pixels = torch.from_numpy(self.splits.normalise(self.images[index].numpy()))
        generator = torch.Generator().manual_seed(self.spec.seed * 7_368_787 + step)
        pixels = augmented(pixels, self.spec.augment, generator, part, self.size)
        if self.spec.cutout:
            pixels = cut_out(pixels, self.spec.cutout, generator, part, self.size)
        if self.spec.small_size and step < self.spec.small_epochs * self.steps_per_epoch:
            size = (self.spec.small_size, self.spec.small_size)
            pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        inputs = pixels.to(self.device, memory_format=torch.channels_last)
        labels = None if self.labels is None else self.labels[index].to(self.device)
        return inputs, labels
