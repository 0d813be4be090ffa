"""One bit an element, then the elements that are not zero: for small sparse tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

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
from tersor.errors import ArtifactError

# Elements handled at once where a temporary of one byte per element is needed; a multiple of 8.
CHUNK = 1 << 20


@ENCODINGS.register("bitmap")
class Bitmap:
    """One bit per element (1 = stored; element 0 is the lowest bit of byte 0), then the stored
    elements in order.

    An element is left out only if all its bits are zero, so -0.0 is stored. Types of 8 bytes are not
    accepted: what such a section decodes to is at most 32 times its size.
    """

    extra = 0.25

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """Types of up to 4 bytes."""
        return dtype.itemsize <= 4

    @staticmethod
    def encode(array: Array, quick: bool = False) -> memoryview:
        """In chunks: beside the result, the temporaries stay under 8 MiB."""
        words = words_of(array)
        position = _mask_bytes(words.size)
        data = np.empty(position + np.count_nonzero(words) * array.itemsize, np.uint8)
        for start in range(0, words.size, CHUNK):
            chunk = words[start : start + CHUNK]
            stored = chunk != 0
            mask = np.packbits(stored, bitorder="little")
            data[start // 8 : start // 8 + mask.size] = mask
            values = chunk[stored].view(np.uint8)
            data[position : position + values.size] = values
            position += values.size
        return data.data

    @staticmethod
    def fits(size_bytes: int, shape: Shape, dtype: np.dtype[Any]) -> bool:
        """The mask and between none and all of the elements."""
        values = size_bytes - _mask_bytes(count(shape))
        return 0 <= values <= count(shape) * dtype.itemsize and values % dtype.itemsize == 0

    @staticmethod
    def decode(data: memoryview, shape: Shape, dtype: np.dtype[Any], steps: Steps) -> Array:
        """Scatter the stored elements; the mask must agree with their number to the bit."""
        num_elements = count(shape)
        mask, rest = np.split(np.frombuffer(data, np.uint8), [_mask_bytes(num_elements)])
        values = rest.view(word_type(dtype))
        _check_mask(mask, num_elements, values.size)
        if np.count_nonzero(values) != values.size:
            raise ArtifactError("an element that is zero is stored among the nonzero ones")
        if dtype == np.bool_:
            check_bool(rest)
        words = np.zeros(num_elements, values.dtype)
        position = 0
        for start in range(0, num_elements, CHUNK):
            bits = mask[start // 8 : (start + CHUNK) // 8]
            size = min(CHUNK, num_elements - start)
            stored = np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)
            num_stored = int(np.count_nonzero(stored))
            words[start : start + size][stored] = values[position : position + num_stored]
            position += num_stored
        return words.view(dtype).reshape(shape)


def _mask_bytes(num_elements: int) -> int:
    return (num_elements + 7) // 8


def _check_mask(mask: Array, num_elements: int, num_values: int) -> None:
    num_bits = sum(
        int(np.bitwise_count(mask[start : start + CHUNK]).sum(dtype=np.int64))
        for start in range(0, mask.size, CHUNK)
    )
    if num_bits != num_values:
        raise ArtifactError(f"the bit mask marks {num_bits} elements, but {num_values} are stored")
    if num_elements % 8 and int(mask[-1]) >> (num_elements % 8):
        raise ArtifactError("the bit mask marks elements behind the last one")
