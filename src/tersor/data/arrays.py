"""Images as arrays: what every data set becomes after it is read once."""

from __future__ import annotations

import dataclasses as dc
import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tersor.errors import DataError, SpecError

FloatArray = npt.NDArray[np.float32]


@dc.dataclass(frozen=True, eq=False)
class ArraySet:
    """Images (N, C, H, W), uint8 in 0..255 or float32 already normalised, and labels (N,) int64 or None."""

    images: npt.NDArray[np.uint8] | FloatArray
    labels: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: npt.NDArray[np.int64]) -> ArraySet:
        """The images and labels at `index` (M,), copied."""
        labels = None if self.labels is None else self.labels[index]
        return ArraySet(self.images[index], labels)


@dc.dataclass(frozen=True, eq=False)
class Splits:
    """A data set in its four uses. `calibration` never holds labels and is drawn from `train`.

    `mean` and `std` (C,) normalise images scaled to 0..1. `name` is printed beside every number.
    """

    name: str
    train: ArraySet
    calibration: ArraySet
    validation: ArraySet
    test: ArraySet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int

    @property
    def num_classes(self) -> int:
        """Number of classes the labels range over."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return int(channels), int(height), int(width)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the images and labels of all parts (SHA-256): other data, other digits."""
        digest = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for part in (self.train, self.calibration, self.validation, self.test):
            for array in (part.images, part.labels):
                if array is not None:
                    digest.update(repr((array.shape, array.dtype.str)).encode())
                    digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def normalise(self, images: npt.NDArray[np.uint8] | FloatArray) -> FloatArray:
        """Images (N, C, H, W) to the float32 input of a network: (x / 255 - mean) / std for uint8;
        float32 images pass unchanged."""
        if images.dtype != np.uint8:
            return images.astype(np.float32, copy=False)
        mean = np.asarray(self.mean, np.float32).reshape(1, -1, 1, 1) * 255
        std = np.asarray(self.std, np.float32).reshape(1, -1, 1, 1) * 255
        return np.asarray((images.astype(np.float32) - mean) / std, np.float32)

    def batches(self, part: ArraySet, batch_size: int) -> Iterator[FloatArray]:
        """Normalised inputs of `part` in order, `batch_size` at a time (the last may be smaller)."""
        for start in range(0, len(part), batch_size):
            yield self.normalise(part.images[start : start + batch_size])


def split(
    name: str,
    train: ArraySet,
    test: ArraySet,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    seed: int = 0,
    validation_share: float = 0.1,
    num_calibration: int = 512,
    validation: ArraySet | None = None,
) -> Splits:
    """Hold `validation_share` of the training images out, or where there is a `validation` part of its own none, and
    draw calibration inputs from the rest.

    The permutation depends on `seed` alone. Raises DataError where a split would be empty,
    SpecError for a negative seed or no calibration inputs.
    """
    for option, value, least in (("seed", seed, 0), ("num_calibration", num_calibration, 1)):
        if value < least:
            raise SpecError(f"{option} must be {least} or more, got {value}")
    order = np.random.default_rng([seed, 0x5711]).permutation(len(train))
    held = round(len(train) * validation_share) if validation is None else 0
    validation = train.take(order[:held]) if validation is None else validation
    if len(validation) < 1 or len(train) - held < 1 or len(test) < 1:
        raise DataError(
            f"{name}: {len(train)} training and {len(test)} test images are too few: every split needs "
            f"one image at least (validation takes {validation_share:.0%} of training)"
        )
    rest = train.take(order[held:])
    calibration = ArraySet(rest.images[:num_calibration], None)
    return Splits(name, rest, calibration, validation, test, classes, mean, std, seed)
