"""All elements, as they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.artifact.encoding import ENCODINGS, Array, Shape, Steps, check_bool, count


@ENCODINGS.register("dense")
class Dense:
    """All elements in C order, little-endian."""

    extra = 0.0

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """Every type."""
        return True

    @staticmethod
    def encode(array: Array, quick: bool = False) -> memoryview:
        """A view: nothing is copied."""
        return array.reshape(-1).view(np.uint8).data

    @staticmethod
    def fits(size_bytes: int, shape: Shape, dtype: np.dtype[Any]) -> bool:
        """Exactly one size is possible."""
        return size_bytes == count(shape) * dtype.itemsize

    @staticmethod
    def decode(data: memoryview, shape: Shape, dtype: np.dtype[Any], steps: Steps) -> Array:
        """A view: nothing is copied."""
        found = np.frombuffer(data, np.uint8)
        if dtype == np.bool_:
            check_bool(found)
        return found.view(dtype).reshape(shape)
