"""Smaller networks judged without labels: how far their outputs lie from the original's on the same images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tersor.errors import DataError, ModelError, SpecError
from tersor.methods.calibrate import checked_batches
from tersor.methods.judging import BatchStatistics, logits_of
from tersor.methods.sensitivity import output_distance

FloatArray = npt.NDArray[np.float32]
TRIAL_BATCH = 128  # images; batch norms of a trial take their statistics from so many


def image_shape(example: object, wanted_for: str) -> tuple[int, ...]:
    """(C, H, W) of the example input. Raises SpecError where the network does not read images, one at a time."""
    inputs = example if isinstance(example, tuple) else (example,)
    first = inputs[0]
    if len(inputs) > 1 or not isinstance(first, Tensor) or first.ndim != 4:
        raise SpecError(f"{wanted_for} needs a network of one input, images (N, C, H, W)")
    return tuple(first.shape[1:])


def calibration_images(
    inputs: Iterable[FloatArray] | None, shape: Sequence[int], num_images: int, wanted_for: str
) -> FloatArray:
    """The first `num_images` images (N, C, H, W) float32 of `inputs`, an iterable of batches.

    Raises SpecError where there are no `inputs`, naming what they are `wanted_for`; DataError for no images, another
    shape than (C, H, W) `shape` (0 stands for any size), NaN or infinity.
    """
    if inputs is None:
        raise SpecError(
            f"{wanted_for} needs calibration inputs: give inputs=, batches (N, C, H, W)"
        )
    batches = [batch for _, batch in checked_batches(inputs, shape, num_images)]
    if not batches:
        raise DataError(f"{wanted_for} needs calibration inputs, and got none")
    return np.concatenate(batches)


class Trials:
    """What the original answers on `images` (N, C, H, W) float32, to compare others with.

    A trial's batch norms use the statistics of the trial's own batches, since re-estimation follows every pruning
    and a trial without it mostly shows shifted means; one run does both. The distance that this alone makes is
    subtracted. bfloat16 where the processor has it.
    """

    def __init__(self, module: nn.Module, images: FloatArray) -> None:
        pieces = max(1, round(len(images) / TRIAL_BATCH))
        self.images = [torch.from_numpy(piece) for piece in np.array_split(images, pieces)]
        original = copy.deepcopy(module).eval()
        self.original = self._logits(original)
        if not np.isfinite(self.original).all():
            raise ModelError(
                f"{type(module).__name__} gives NaN or infinity for a calibration image; mend the network, or use "
                "other images"
            )
        self.offset = 0.0
        self.offset = self.harm_(original)

    def harm_(self, smaller: nn.Module) -> float:
        """Mean over images of KL(softmax(original) || softmax(smaller)) in nats, 0 or more; infinite where `smaller`
        overflows. `smaller` is in eval mode then."""
        with BatchStatistics(smaller.eval()):
            logits = self._logits(smaller)
        if not np.isfinite(logits).all():
            return float("inf")
        return max(output_distance(self.original, logits)[0] - self.offset, 0.0)

    def _logits(self, module: nn.Module) -> FloatArray:
        module = module.to(memory_format=torch.channels_last)
        parts = [
            logits_of(module, images.contiguous(memory_format=torch.channels_last))
            for images in self.images
        ]
        return np.concatenate(parts)
