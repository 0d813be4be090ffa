"""From the name a person types to a `Splits`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tersor.data.arrays import ArraySet, Splits, split
from tersor.data.cifar10 import load_cifar10
from tersor.data.digits import load_digits
from tersor.data.folder import channel_statistics, load_folder
from tersor.errors import DataError
from tersor.registry import Registry
from tersor.userfile import is_user_file, load_function

DATASETS: Registry[Callable[..., Splits]] = Registry("data set")
DATASETS.register("cifar10")(load_cifar10)
DATASETS.register("digits")(load_digits)


def load_data(name: str, *, seed: int = 0, num_calibration: int = 512) -> Splits:
    """Load the data set called `name` (see the module's list) and split it.

    `FILE.py:FUNCTION` is called without arguments and returns a `Splits`, or
    `((train_images, train_labels), (test_images, test_labels))` as arrays: images (N, C, H, W), uint8 in
    0..255 or float32 already normalised, labels (N,) integers.
    Raises UnknownNameError for an unknown name and DataError for data that cannot be used.
    """
    if name.startswith("folder:"):
        found = load_folder(
            name.removeprefix("folder:"), seed=seed, num_calibration=num_calibration
        )
    elif is_user_file(name):
        found = _from_user(name, seed=seed, num_calibration=num_calibration)
    else:
        names = [*DATASETS, "folder:DIR", "FILE.py:FUNCTION"]
        if name not in DATASETS:
            from tersor.errors import UnknownNameError
            from tersor.registry import did_you_mean

            raise UnknownNameError(
                f"unknown data set {name!r}; expected one of {', '.join(names)}."
                + did_you_mean(name, names)
            )
        found = DATASETS[name](seed=seed, num_calibration=num_calibration)
    return found


def _from_user(name: str, *, seed: int, num_calibration: int) -> Splits:
    function = load_function(name)
    try:
        value = function()
    except Exception as error:
        raise DataError(f"{name} raised {type(error).__name__}: {error}") from error
    if isinstance(value, Splits):
        return value
    try:
        (train_images, train_labels), (test_images, test_labels) = value
    except (TypeError, ValueError):
        raise DataError(
            f"{name} returned {type(value).__name__}; expected a Splits or "
            "((train_images, train_labels), (test_images, test_labels))"
        ) from None
    train = _checked(name, "train", train_images, train_labels)
    test = _checked(name, "test", test_images, test_labels)
    assert train.labels is not None and test.labels is not None
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{name}: train images are {train.images.shape[1:]}, test images {test.images.shape[1:]}"
        )
    if train.images.dtype != test.images.dtype:
        raise DataError(
            f"{name}: train images are {train.images.dtype}, test images {test.images.dtype}; give "
            "both in one type"
        )
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    channels = train.images.shape[1]
    if train.images.dtype == np.uint8:
        mean, std = channel_statistics(train.images)
    else:
        mean, std = (0.0,) * channels, (1.0,) * channels
    classes = tuple(str(c) for c in range(num_classes))
    return split(name, train, test, classes, mean, std, seed=seed, num_calibration=num_calibration)


def _checked(name: str, part: str, images: Any, labels: Any) -> ArraySet:
    pixels = _array(name, f"{part} images", images)
    numbers = _array(name, f"{part} labels", labels)
    if pixels.ndim != 4 or not pixels.size:
        raise DataError(f"{name}: {part} images have shape {pixels.shape}; expected (N, C, H, W)")
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "f":
            raise DataError(
                f"{name}: {part} images are {pixels.dtype}; expected uint8 in 0..255, or floats "
                "already normalised"
            )
        pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            index = int(np.argwhere(~np.isfinite(pixels))[0][0])
            raise DataError(f"{name}: {part} image {index} holds NaN or infinity; clean the inputs")
    if numbers.shape != (len(pixels),) or not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(
            f"{name}: {part} labels have shape {numbers.shape} and type {numbers.dtype}; expected "
            f"({len(pixels)},) integers"
        )
    if numbers.min() < 0:
        raise DataError(f"{name}: {part} label {int(numbers.min())} is negative; labels start at 0")
    return ArraySet(pixels, numbers.astype(np.int64))


def _array(name: str, what: str, values: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: {what} are no array: {error}") from None
