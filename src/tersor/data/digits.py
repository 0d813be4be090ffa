"""scikit-learn's handwritten digits: 1,797 real 8x8 images inside the library, so no download."""

from __future__ import annotations

import numpy as np

from tersor.data.arrays import ArraySet, Splits, split
from tersor.errors import missing_extra


def load_digits(*, seed: int = 0, num_calibration: int = 512) -> Splits:
    """Images (1797, 1, 8, 8) scaled to uint8; one quarter, drawn by a fixed permutation, is the test split."""
    try:
        from sklearn.datasets import load_digits as embedded
    except ImportError:
        raise missing_extra("scikit-learn", "study", "the data set 'digits'") from None
    found = embedded()
    images = np.round(found.images[:, None] * (255 / 16)).astype(np.uint8)
    labels = found.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(images))
    held = len(images) // 4
    pixels = images[order[held:]].astype(np.float64) / 255
    return split(
        "scikit-learn digits",
        ArraySet(images[order[held:]], labels[order[held:]]),
        ArraySet(images[order[:held]], labels[order[:held]]),
        tuple(str(d) for d in range(10)),
        (round(float(pixels.mean()), 4),),
        (round(float(pixels.std()), 4),),
        seed=seed,
        num_calibration=num_calibration,
    )
