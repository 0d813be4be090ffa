"""Where the elements are that are not zero, and they: floats and wide whole numbers after pruning."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.artifact.cursor import Cursor, varint
from tersor.artifact.encoding import ENCODINGS, Array, Shape, Steps, count, word_type, words_of
from tersor.artifact.encodings.codes import Codes
from tersor.errors import ArtifactError

INNER = ("dense", "planes", "integers")
LEAST_ZEROS = 0.1


@ENCODINGS.register("sparse")
class Sparse:
    """How many bytes the places take (varint); the section of `codes` for the places (bool, the
    tensor's shape; 1 where an element has a bit that is not 0, so for -0.0 too); how the elements
    are stored (a byte: 0 dense, 1 planes, 2 integers); their section, as one row.
    """

    extra = 1.5

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """More than one byte an element: for bytes, `codes` knows zeros."""
        return dtype.itemsize > 1

    @staticmethod
    def encode(array: Array, quick: bool = False) -> bytes | None:
        """None for too few zeros."""
        words = words_of(array)
        stored = words != 0
        zeros = words.size - int(np.count_nonzero(stored))
        if not zeros or zeros < LEAST_ZEROS * words.size:
            return None
        places = Codes.encode(stored.reshape(array.shape), quick)
        assert places is not None, "there are elements"
        values = words[stored].view(array.dtype)
        able = [name for name in INNER if ENCODINGS[name].accepts(array.dtype)]
        coded = {name: ENCODINGS[name].encode(values, quick) for name in able}
        sections = {name: section for name, section in coded.items() if section is not None}
        name = min(sections, key=lambda each: (len(sections[each]), INNER.index(each)))
        head = varint(len(places)) + places
        return head + bytes([INNER.index(name)]) + bytes(sections[name])

    @staticmethod
    def fits(size_bytes: int, shape: Shape, dtype: np.dtype[Any]) -> bool:
        """The places, and how the elements are stored."""
        return size_bytes >= 4 and count(shape) > 0

    @staticmethod
    def decode(data: memoryview, shape: Shape, dtype: np.dtype[Any], steps: Steps) -> Array:
        """Takes the places, one byte each, and the elements that are not zero beside the tensor."""
        cursor = Cursor(data)
        places = cursor.take(cursor.varint(cursor.left, "the size of the places"))
        stored = Codes.decode(places, shape, np.dtype(np.bool_), steps).reshape(-1)
        name = INNER[cursor.byte(len(INNER) - 1, "how the elements are stored")]
        inner, form = ENCODINGS[name], (int(np.count_nonzero(stored)),)
        if not inner.accepts(dtype) or not inner.fits(cursor.left, form, dtype):
            raise ArtifactError(f"{cursor.left} bytes cannot hold {form[0]} elements as {name}")
        values = inner.decode(cursor.rest(), form, dtype, steps)
        found = np.zeros(stored.size, word_type(dtype))
        words = words_of(np.ascontiguousarray(values))
        if np.count_nonzero(words) != words.size:
            raise ArtifactError("an element that is zero is stored among the nonzero ones")
        found[stored] = words
        return found.view(dtype).reshape(shape)
