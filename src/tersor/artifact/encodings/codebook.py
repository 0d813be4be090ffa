"""Few different elements: a table of them, and for each element its place in the table."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.artifact.cursor import Cursor
from tersor.artifact.encoding import (
    ENCODINGS,
    Array,
    Shape,
    Steps,
    check_bool,
    count,
    word_type,
    words_of,
)
from tersor.artifact.encodings.codes import Codes
from tersor.errors import ArtifactError

MAX_LEVELS = 256
PROBE = 4096
CHUNK = 1 << 18  # elements looked up at once: numpy takes 8 bytes for the place of each


@ENCODINGS.register("codebook")
class Codebook:
    """Byte 0: levels less 1; the levels, in order of value; then the section of `codes` for the
    places (uint8, the tensor's shape).

    In order of value means: of their bits, read as a sign and a magnitude for floats, in two's
    complement for whole numbers; NaNs so stand at the ends. Each level occurs.
    """

    extra = 0.5

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """Every type but bool."""
        return dtype != np.bool_

    @staticmethod
    def encode(array: Array, quick: bool = False) -> bytes | None:
        """None for more than 256 levels, and for bytes whose levels are not far apart."""
        words = words_of(array)
        if words.size < 4 or np.unique(words[:PROBE]).size > min(MAX_LEVELS, words.size // 2):
            return None
        levels, places = np.unique(words, return_inverse=True)
        if levels.size > min(MAX_LEVELS, words.size // 2):
            return None
        order = np.argsort(_keys(levels, array.dtype), kind="stable")
        levels = levels[order]
        if array.itemsize == 1:
            span = int(array.max()) - int(array.min()) + 1
            if 2 * levels.size > span:
                return None
        rank = np.empty(levels.size, np.uint8)
        rank[order] = np.arange(levels.size, dtype=np.uint8)
        coded = Codes.encode(rank[places].reshape(array.shape), quick)
        assert coded is not None, "there are elements"
        return bytes([levels.size - 1]) + levels.tobytes() + coded

    @staticmethod
    def fits(size_bytes: int, shape: Shape, dtype: np.dtype[Any]) -> bool:
        """At least one level."""
        return size_bytes >= 3 + dtype.itemsize and count(shape) > 0

    @staticmethod
    def decode(data: memoryview, shape: Shape, dtype: np.dtype[Any], steps: Steps) -> Array:
        """Takes the places, one byte each, beside the tensor; none where elements are bytes."""
        cursor = Cursor(data)
        num_levels = cursor.byte() + 1
        raw = np.frombuffer(bytes(cursor.take(num_levels * dtype.itemsize)), np.uint8)
        levels = raw.view(word_type(dtype))
        keys = _keys(levels, dtype)
        if not (keys[1:] > keys[:-1]).all():
            raise ArtifactError("the levels of the codebook are not in order of value")
        places = Codes.decode(cursor.rest(), shape, np.dtype(np.uint8), steps)
        highest = int(places.max())
        if highest >= num_levels:
            raise ArtifactError(f"a place in the codebook is {highest}, it has {num_levels} levels")
        if dtype == np.bool_:
            check_bool(levels)
        found = places if dtype.itemsize == 1 else np.empty(shape, levels.dtype)
        for start in range(0, places.size, CHUNK):
            part = slice(start, start + CHUNK)
            found.reshape(-1)[part] = levels[places.reshape(-1)[part]]
        return found.view(dtype)


def _keys(levels: Array, dtype: np.dtype[Any]) -> Array:
    """Whole numbers in the order of the values whose bits are `levels`."""
    top = np.uint64(1 << (8 * dtype.itemsize - 1))
    wide = levels.astype(np.uint64)
    if dtype.kind == "f":  # larger magnitudes of negative numbers come first
        return np.where(wide & top, (top - np.uint64(1)) - (wide & ~top), wide | top)
    return wide ^ top if dtype.kind == "i" else wide
