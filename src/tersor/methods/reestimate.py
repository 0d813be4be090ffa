"""Batch-norm re-estimation: the cheapest help after any change of the weights; it needs no labels."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import DataError, SpecError
from tersor.methods.device import off_device, on_device, training_device, usable_precision
from tersor.methods.steps import augmented
from tersor.specs.finetune import AUGMENTATIONS
from tersor.specs.spec import one_of

FloatArray = npt.NDArray[np.float32]
JUDGED_IMAGES = 512  # to tell how the original's images were augmented


def reestimate_batch_norm(
    module: nn.Module,
    batches: Iterable[FloatArray],
    *,
    original: nn.Module | None = None,
    augment: str = "auto",
    precision: str = "bf16",
    seed: int = 0,
) -> nn.Module:
    """A copy whose batch-norm means and variances are the plain average over `batches` (N, C, H, W) float32.

    Training augments its images, and the statistics of plain ones are others: a network pays for that even where
    nothing else was changed. So images are augmented here too, by `seed`: `augment` is "none", "crop" or "flip_crop",
    as in a training, or "auto", as the statistics tell that `original` has, the network before it was changed
    (see `augmentation_of`; "none" without it). All other layers (dropout too) run as in evaluation. A network without
    batch norm comes back unchanged. Raises DataError when there are no batches, SpecError for an unknown augmentation
    or one of inputs that are no images.
    """
    one_of("augment", augment, ("auto", *AUGMENTATIONS))
    fresh = copy.deepcopy(module)
    norms = _norms(fresh)
    if not norms:
        return fresh.eval()
    if augment == "auto":
        augment = "none"
        if original is not None:
            first, batches = _split(batches)
            augment = augmentation_of(original, first, precision=precision, seed=seed)
    device = training_device()
    fresh = on_device(fresh.eval(), device)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average over all batches
        norm.train()
    use_bf16 = usable_precision(precision, device) == "bf16"
    seen = 0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
        for images in _augmented(batches, augment, seed):
            fresh(images.to(device, memory_format=_layout(images)))
            seen += len(images)
    if not seen:
        raise DataError("batch-norm re-estimation needs calibration inputs, and got none")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return off_device(fresh).eval()


def augmentation_of(
    original: nn.Module, batches: Iterable[FloatArray], *, precision: str = "bf16", seed: int = 0
) -> str:
    """How the images were augmented that `original` has its batch-norm statistics from: the one of AUGMENTATIONS under
    which re-estimation on the first JUDGED_IMAGES of `batches` comes nearest to them.

    "none" for a network without batch norm, or for inputs that are no images (N, C, H, W).
    """
    first, _ = _split(batches)
    held = [norm for norm in _norms(original) if norm.running_mean is not None]
    if not held or any(np.ndim(batch) != 4 for batch in first):
        return "none"

    def distance(augment: str) -> float:
        found = reestimate_batch_norm(
            original, first, augment=augment, precision=precision, seed=seed
        )
        fresh = [norm for norm in _norms(found) if norm.running_mean is not None]
        return sum(_apart(*pair) for pair in zip(held, fresh, strict=True))

    return min(AUGMENTATIONS, key=distance)


def _apart(one: _BatchNorm, other: _BatchNorm) -> float:
    """Mean over channels of the squared distances of means, in deviations, and of logarithms of variances."""
    means = [norm.running_mean.double().cpu() for norm in (one, other)]  # type: ignore[union-attr]
    variances = [norm.running_var.double().cpu() + norm.eps for norm in (one, other)]  # type: ignore[union-attr]
    shifts = (means[0] - means[1]).square() / variances[0]
    return float((shifts + (variances[0] / variances[1]).log().square()).mean())


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def _split(batches: Iterable[FloatArray]) -> tuple[list[FloatArray], Iterator[FloatArray]]:
    """The batches that hold the first JUDGED_IMAGES images, and all of them, these included."""
    left, first, seen = iter(batches), [], 0
    for batch in left:
        first.append(batch)
        seen += len(batch)
        if seen >= JUDGED_IMAGES:
            break
    return first, itertools.chain(first, left)


def _augmented(batches: Iterable[FloatArray], augment: str, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        inputs = torch.from_numpy(batch)
        if augment != "none" and inputs.ndim != 4:
            raise SpecError(
                f"augment {augment!r} is for images (N, C, H, W), got inputs of shape {tuple(inputs.shape)}; use none"
            )
        yield augmented(inputs, augment, generator)


def _layout(inputs: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if inputs.ndim == 4 else torch.preserve_format
