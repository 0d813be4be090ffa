"""Numbers of several bytes, byte by byte: the highest bytes are alike, the lowest are noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.artifact.cursor import Cursor, varint
from tersor.artifact.encoding import ENCODINGS, Array, Shape, Steps, count, word_type, words_of
from tersor.artifact.encodings.codes import Codes

RAW, CODED = 0, 1
CHUNK = 1 << 18


@ENCODINGS.register("planes")
class Planes:
    """Planes of one byte each, the highest first; floats are first turned left by one bit, so that
    the exponent fills the highest byte and the sign is the lowest bit.

    Each plane: how many bytes it takes (varint), 0 for one that is stored as it is; then those bytes
    or the section of `codes` for the tensor's shape (the highest plane) or for a row (the others).
    """

    extra = 0.5

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """More than one byte an element."""
        return dtype.itemsize > 1

    @staticmethod
    def encode(array: Array, quick: bool = False) -> bytes | None:
        """None for no or one element."""
        if array.size < 2:
            return None
        parts = []
        for number in range(array.itemsize):
            plane = _plane(array, number)
            shaped = plane if number else plane.reshape(array.shape)
            coded = (
                Codes.encode(shaped, True) or b""
            )  # exponents have no neighbours worth a context
            if coded and len(coded) < plane.size:
                parts += [varint(len(coded)), coded]
            else:
                parts += [varint(0), plane.tobytes()]
        return b"".join(parts)

    @staticmethod
    def fits(size_bytes: int, shape: Shape, dtype: np.dtype[Any]) -> bool:
        """At least a form and a plane an element byte."""
        return size_bytes >= 3 * dtype.itemsize - 1 and count(shape) > 1

    @staticmethod
    def decode(data: memoryview, shape: Shape, dtype: np.dtype[Any], steps: Steps) -> Array:
        """Plane by plane: beside the tensor, one plane and a chunk."""
        cursor = Cursor(data)
        size = count(shape)
        found = np.zeros((size, dtype.itemsize), np.uint8)
        for number in range(dtype.itemsize):
            length = cursor.varint(cursor.left, "the size of a plane")
            if length:
                form = shape if not number else (size,)
                plane = Codes.decode(cursor.take(length), form, np.dtype(np.uint8), steps).reshape(
                    -1
                )
            else:
                plane = np.frombuffer(cursor.take(size), np.uint8)
            found[:, dtype.itemsize - 1 - number] = plane
            del plane  # before the next one is made
        cursor.end()
        words = found.reshape(-1).view(word_type(dtype))
        if dtype.kind == "f":
            one = words.dtype.type(1)
            for start in range(0, size, CHUNK):
                part = words[start : start + CHUNK]
                part[...] = part >> one | part << words.dtype.type(8 * dtype.itemsize - 1)
        return words.view(dtype).reshape(shape)


def _plane(array: Array, number: int) -> Array:
    """Byte `number`, counted from the highest, of every element (n,)."""
    words, bits = words_of(array), 8 * array.itemsize
    found = np.empty(words.size, np.uint8)
    for start in range(0, words.size, CHUNK):
        part = words[start : start + CHUNK]
        if array.dtype.kind == "f":
            part = part << words.dtype.type(1) | part >> words.dtype.type(bits - 1)
        found[start : start + CHUNK] = (part >> words.dtype.type(bits - 8 * (number + 1))) & 255
    return found
