"""Small whole numbers in as few bits as their span needs."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.artifact.encoding import DTYPES, ENCODINGS, Array, Shape, Steps, count
from tersor.errors import ArtifactError

CHUNK = 1 << 20


@ENCODINGS.register("packed")
class Packed:
    """Small whole numbers, each in as few bits as the span of the tensor needs (1 to 8).

    Byte 0 is the number of bits, byte 1 the lowest element (its byte), then the distances from the
    lowest, one after another, lowest bit first; bits behind the last are 0.
    """

    extra = 2.0

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """Whole numbers of one byte."""
        return dtype in (DTYPES["int8"], DTYPES["uint8"])

    @staticmethod
    def encode(array: Array, quick: bool = False) -> memoryview:
        """In chunks: beside the result, the temporaries stay under 24 MiB."""
        flat, bits = array.reshape(-1), _span_bits(array)
        lowest = flat.min() if flat.size else flat.dtype.type(0)
        data = np.empty(2 + _packed_bytes(flat.size, bits), np.uint8)
        data[0], data[1] = bits, np.asarray(lowest).view(np.uint8)
        for start in range(0, flat.size, CHUNK):
            # modulo 256: the distance of any two elements of one byte fits one
            above = flat[start : start + CHUNK].view(np.uint8) - data[1]
            spread = np.unpackbits(above[:, None], axis=1, count=bits, bitorder="little")
            packed = np.packbits(spread, bitorder="little")
            data[2 + start * bits // 8 :][: packed.size] = packed
        return data.data

    @staticmethod
    def fits(size_bytes: int, shape: Shape, dtype: np.dtype[Any]) -> bool:
        """Some number of bits gives that size."""
        return any(size_bytes == 2 + _packed_bytes(count(shape), bits) for bits in range(1, 9))

    @staticmethod
    def decode(data: memoryview, shape: Shape, dtype: np.dtype[Any], steps: Steps) -> Array:
        """Exactly one form is accepted: the fewest bits, from the lowest element that is there."""
        num_elements, held = count(shape), np.frombuffer(data, np.uint8)
        bits, lowest = int(held[0]), held[1]
        if not 1 <= bits <= 8 or held.size != 2 + _packed_bytes(num_elements, bits):
            raise ArtifactError(
                f"{held.size} bytes do not hold {num_elements} elements of {bits} bits"
            )
        above = np.empty(num_elements, np.uint8)
        for start in range(0, num_elements, CHUNK):
            size = min(CHUNK, num_elements - start)
            chunk = held[2 + start * bits // 8 :][: _packed_bytes(size, bits)]
            spread = np.unpackbits(chunk, count=size * bits, bitorder="little")
            above[start : start + size] = np.packbits(
                spread.reshape(size, bits), axis=1, bitorder="little"
            )[:, 0]
        above += lowest
        found: Array = above.view(dtype).reshape(shape)
        if Packed.encode(found) != data:
            raise ArtifactError("the packed elements are not in their shortest form")
        return found


def _packed_bytes(num_elements: int, bits: int) -> int:
    return (num_elements * bits + 7) // 8


def _span_bits(array: Array) -> int:
    """Bits (1 to 8) of the largest distance between two elements."""
    if not array.size:
        return 1
    return max(1, (int(array.max()) - int(array.min())).bit_length())
