"""The original CIFAR-10 (Krizhevsky 2009) by torchvision's loader, which verifies the archive's digest."""

from __future__ import annotations

import numpy as np

from tersor.data.arrays import ArraySet, Splits, split
from tersor.data.folder import cache_dir
from tersor.errors import DataError, missing_extra

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def load_cifar10(*, seed: int = 0, num_calibration: int = 512) -> Splits:
    """45,000 training, 5,000 validation and 10,000 test images (3, 32, 32) uint8; downloads 163 MiB once.

    Raises DataError where the download fails; an image folder needs no network.
    """
    try:
        from torchvision.datasets import CIFAR10
    except ImportError:
        raise missing_extra("torchvision", "study", "the data set 'cifar10'") from None
    root = cache_dir() / "cifar10"
    parts = []
    for is_train in (True, False):
        try:
            found = CIFAR10(str(root), train=is_train, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"cifar10: the download to {root} failed ({error}); check the network, or use "
                "--data folder:DIR with images of your own"
            ) from None
        images = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
        parts.append(ArraySet(images, np.asarray(found.targets, np.int64)))
        classes = tuple(found.classes)
    return split(
        "CIFAR-10",
        parts[0],
        parts[1],
        classes,
        MEAN,
        STD,
        seed=seed,
        num_calibration=num_calibration,
    )
