"""Inputs without labels: arrays, batches of a loader, a folder of images; split into their uses."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from tersor.data.arrays import ArraySet, Splits
from tersor.errors import DataError

HELD_SHARE = 0.25  # to judge a changed network on, never to make it
MOST_HELD = 5000
MOST_INPUTS = 20_000  # read of an iterable


def unlabelled(
    name: str,
    images: npt.NDArray[Any],
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    labels: npt.NDArray[np.int64] | None = None,
    seed: int = 0,
    num_calibration: int = 512,
) -> Splits:
    """A Splits of `images` (N, C, H, W), uint8 in 0..255 or float32 as the network sees them.

    A quarter, at most MOST_HELD, drawn by `seed`, becomes the validation part; the others are trained on and
    calibrated with. The test part is empty: nobody may say how well a network does on inputs without
    labels. `labels` (N,) are kept where there are some. Raises DataError for fewer than four images, other shapes or
    values that are not finite.
    """
    pixels = np.asarray(images)
    if pixels.ndim != 4 or not pixels.size:
        raise DataError(f"{name}: inputs have shape {pixels.shape}; expected (N, C, H, W)")
    if len(pixels) < 4:
        raise DataError(
            f"{name}: {len(pixels)} inputs are too few; give four at least, better hundreds"
        )
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "f":
            raise DataError(
                f"{name}: inputs are {pixels.dtype}; expected uint8 in 0..255, or floats as the network sees them"
            )
        pixels = pixels.astype(np.float32, copy=False)
        bad = np.flatnonzero(~np.isfinite(pixels).all(axis=(1, 2, 3)))
        if bad.size:
            raise DataError(f"{name}: input {bad[0]} holds NaN or infinity; clean the inputs")
    if labels is not None and len(labels) != len(pixels):
        raise DataError(f"{name}: {len(pixels)} inputs and {len(labels)} labels; give one for each")
    channels = pixels.shape[1]
    order = np.random.default_rng([seed, 0x11B]).permutation(len(pixels))
    count = min(max(1, round(HELD_SHARE * len(pixels))), MOST_HELD)
    every = ArraySet(pixels, None if labels is None else np.asarray(labels, np.int64))
    rest, held = every.take(order[count:]), every.take(order[:count])
    none = ArraySet(pixels[:0], None)
    classes = () if labels is None else tuple(str(c) for c in range(int(labels.max()) + 1))
    return Splits(
        name,
        rest,
        ArraySet(rest.images[:num_calibration], None),
        held,
        none,
        classes,
        mean or (0.0,) * channels,
        std or (1.0,) * channels,
        seed,
    )


def from_batches(name: str, batches: Iterable[Any], *, seed: int = 0) -> Splits:
    """A Splits of an iterable of batches: arrays or tensors (N, C, H, W), or pairs of such and labels, as a
    DataLoader gives them; the first MOST_INPUTS inputs are read. Raises DataError as `unlabelled`."""
    images, labels, seen = [], [], 0
    for number, batch in enumerate(batches):
        pair = isinstance(batch, list | tuple)
        first = batch[0] if pair and len(batch) else batch
        try:
            images.append(np.asarray(first))
            if pair and len(batch) > 1:
                labels.append(np.asarray(batch[1], np.int64).reshape(-1))
        except (TypeError, ValueError) as error:
            raise DataError(f"{name}: batch {number} is no array of inputs: {error}") from None
        if images[-1].ndim != 4 or images[-1].shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"{name}: batch {number} has shape {images[-1].shape}; expected (N, C, H, W), the same for all"
            )
        seen += len(images[-1])
        if seen >= MOST_INPUTS:
            break
    if not images:
        raise DataError(f"{name}: it gave no batches; a generator that was used up gives none")
    known = np.concatenate(labels) if len(labels) == len(images) else None
    return unlabelled(name, np.concatenate(images), labels=known, seed=seed)


def image_files(root: pathlib.Path, suffixes: Iterable[str]) -> list[pathlib.Path]:
    """The images below `root`, in order; hidden ones left out."""
    wanted = set(suffixes)
    return sorted(
        p
        for p in root.rglob("*")
        if p.suffix.lower() in wanted
        and not any(part.startswith(".") for part in p.relative_to(root).parts)
    )
