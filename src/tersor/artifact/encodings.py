"""How the elements of one tensor become bytes: pairs of encode and decode, side by side, by name.

Every encoding keeps all bits: NaN payloads and the sign of zero survive. `decode` gets bytes that
anybody may have written: it checks everything it relies on and never allocates more than
`num_elements` elements, a number that `fits` has compared with the number of bytes before.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tersor.errors import ArtifactError
from tersor.registry import Registry

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

# The element types a file may hold, all little-endian.
DTYPES: dict[str, np.dtype[Any]] = {
    "bool": np.dtype("?"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "int8": np.dtype("i1"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "uint8": np.dtype("u1"),
}
# Elements handled at once where a temporary of one byte per element is needed; a multiple of 8.
CHUNK = 1 << 20


class Encoding(Protocol):
    """One way to write a tensor. All functions are pure; `decode(encode(a))` equals `a` bit for
    bit."""

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """Whether tensors of `dtype` (one of DTYPES) can be written this way."""
        ...

    @staticmethod
    def size(array: Array) -> int:
        """The exact number of bytes `encode` would give."""
        ...

    @staticmethod
    def encode(array: Array) -> Bytes:
        """The bytes (size_bytes,) of `array`, any shape, C-contiguous. May share its memory."""
        ...

    @staticmethod
    def fits(size_bytes: int, num_elements: int, dtype: np.dtype[Any]) -> bool:
        """Whether some tensor of that many elements takes exactly that many bytes."""
        ...

    @staticmethod
    def decode(data: Bytes, num_elements: int, dtype: np.dtype[Any]) -> Array:
        """The elements (num_elements,). May share the memory of `data`, whose length `fits` has
        accepted.

        Raises ArtifactError when `data` is not what `encode` writes.
        """
        ...


ENCODINGS: Registry[type[Encoding]] = Registry("encoding")


@ENCODINGS.register("dense")
class Dense:
    """All elements in C order, little-endian."""

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """Every type."""
        return True

    @staticmethod
    def size(array: Array) -> int:
        """One element after another."""
        return array.nbytes

    @staticmethod
    def encode(array: Array) -> Bytes:
        """A view: nothing is copied."""
        return array.reshape(-1).view(np.uint8)

    @staticmethod
    def fits(size_bytes: int, num_elements: int, dtype: np.dtype[Any]) -> bool:
        """Exactly one size is possible."""
        return size_bytes == num_elements * dtype.itemsize

    @staticmethod
    def decode(data: Bytes, num_elements: int, dtype: np.dtype[Any]) -> Array:
        """A view: nothing is copied."""
        if dtype == np.bool_:
            _check_bool(data)
        return data.view(dtype)


@ENCODINGS.register("bitmap")
class Bitmap:
    """One bit per element (1 = stored; element 0 is the lowest bit of byte 0), then the stored
    elements in order.

    An element is left out only if all its bits are zero, so -0.0 is stored. Types of 8 bytes are
    not accepted: what a file decodes to is then at most 32 times its size, a bound that needs no
    trust.
    """

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """Types of up to 4 bytes."""
        return dtype.itemsize <= 4

    @staticmethod
    def size(array: Array) -> int:
        """The mask and the elements that are not zero."""
        num_stored = int(np.count_nonzero(_words(array)))
        return _mask_bytes(array.size) + num_stored * array.itemsize

    @staticmethod
    def encode(array: Array) -> Bytes:
        """In chunks: beside the result, the temporaries stay under 8 MiB."""
        words = _words(array)
        data = np.empty(Bitmap.size(array), np.uint8)
        num_mask = _mask_bytes(words.size)
        position = num_mask
        for start in range(0, words.size, CHUNK):
            chunk = words[start : start + CHUNK]
            stored = chunk != 0
            mask = np.packbits(stored, bitorder="little")
            data[start // 8 : start // 8 + mask.size] = mask
            values = chunk[stored].view(np.uint8)
            data[position : position + values.size] = values
            position += values.size
        return data

    @staticmethod
    def fits(size_bytes: int, num_elements: int, dtype: np.dtype[Any]) -> bool:
        """The mask and between none and all of the elements."""
        values = size_bytes - _mask_bytes(num_elements)
        return 0 <= values <= num_elements * dtype.itemsize and values % dtype.itemsize == 0

    @staticmethod
    def decode(data: Bytes, num_elements: int, dtype: np.dtype[Any]) -> Array:
        """Scatter the stored elements; the mask must agree with their number to the bit."""
        mask, rest = np.split(data, [_mask_bytes(num_elements)])
        values = rest.view(_word_type(dtype))
        _check_mask(mask, num_elements, values.size)
        if np.count_nonzero(values) != values.size:
            raise ArtifactError("an element that is zero is stored among the nonzero ones")
        if dtype == np.bool_:
            _check_bool(rest)
        words = np.zeros(num_elements, values.dtype)
        position = 0
        for start in range(0, num_elements, CHUNK):
            bits = mask[start // 8 : (start + CHUNK) // 8]
            count = min(CHUNK, num_elements - start)
            stored = np.unpackbits(bits, count=count, bitorder="little").view(np.bool_)
            num_stored = int(np.count_nonzero(stored))
            words[start : start + count][stored] = values[position : position + num_stored]
            position += num_stored
        return words.view(dtype)


@ENCODINGS.register("packed")
class Packed:
    """Small whole numbers, each in as few bits as the span of the tensor needs (1 to 8).

    Byte 0 is the number of bits, byte 1 the lowest element (its byte), then the distances from the
    lowest, one after another, lowest bit first; bits behind the last are 0. Codes of few bits take
    their bits and no more.
    """

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """Whole numbers of one byte."""
        return dtype in (DTYPES["int8"], DTYPES["uint8"])

    @staticmethod
    def size(array: Array) -> int:
        """Two bytes and the bits."""
        return 2 + _packed_bytes(array.size, _span_bits(array))

    @staticmethod
    def encode(array: Array) -> Bytes:
        """In chunks: beside the result, the temporaries stay under 24 MiB."""
        flat, bits = array.reshape(-1), _span_bits(array)
        lowest = flat.min() if flat.size else flat.dtype.type(0)
        data = np.empty(Packed.size(array), np.uint8)
        data[0], data[1] = bits, np.asarray(lowest).view(np.uint8)
        for start in range(0, flat.size, CHUNK):
            # modulo 256: the distance of any two elements of one byte fits one
            above = flat[start : start + CHUNK].view(np.uint8) - data[1]
            spread = np.unpackbits(above[:, None], axis=1, count=bits, bitorder="little")
            packed = np.packbits(spread, bitorder="little")
            data[2 + start * bits // 8 :][: packed.size] = packed
        return data

    @staticmethod
    def fits(size_bytes: int, num_elements: int, dtype: np.dtype[Any]) -> bool:
        """Some number of bits gives that size."""
        return any(size_bytes == 2 + _packed_bytes(num_elements, bits) for bits in range(1, 9))

    @staticmethod
    def decode(data: Bytes, num_elements: int, dtype: np.dtype[Any]) -> Array:
        """Exactly one form is accepted: the fewest bits, from the lowest element that is there."""
        bits, lowest = int(data[0]), data[1]
        if not 1 <= bits <= 8 or data.size != 2 + _packed_bytes(num_elements, bits):
            raise ArtifactError(
                f"{data.size} bytes do not hold {num_elements} elements of {bits} bits"
            )
        above = np.empty(num_elements, np.uint8)
        for start in range(0, num_elements, CHUNK):
            count = min(CHUNK, num_elements - start)
            chunk = data[2 + start * bits // 8 :][: _packed_bytes(count, bits)]
            spread = np.unpackbits(chunk, count=count * bits, bitorder="little")
            above[start : start + count] = np.packbits(
                spread.reshape(count, bits), axis=1, bitorder="little"
            )[:, 0]
        found: Array = (above + lowest).view(dtype)
        if Packed.encode(found).tobytes() != data.tobytes():
            raise ArtifactError("the packed elements are not in their shortest form")
        return found


def smallest_encoding(array: Array) -> str:
    """The name of the encoding that takes the fewest bytes for `array` (C-contiguous); "dense"
    wins ties."""
    names = [name for name in ENCODINGS if ENCODINGS[name].accepts(array.dtype)]
    return min(names, key=lambda name: (ENCODINGS[name].size(array), name != "dense", name))


def _words(array: Array) -> Array:
    """The elements as unsigned integers of the same width, so that zero means: all bits zero."""
    return array.reshape(-1).view(_word_type(array.dtype))


def _word_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"<u{dtype.itemsize}")


def _packed_bytes(num_elements: int, bits: int) -> int:
    return (num_elements * bits + 7) // 8


def _span_bits(array: Array) -> int:
    """Bits (1 to 8) of the largest distance between two elements."""
    if not array.size:
        return 1
    return max(1, (int(array.max()) - int(array.min())).bit_length())


def _mask_bytes(num_elements: int) -> int:
    return (num_elements + 7) // 8


def _check_mask(mask: Bytes, num_elements: int, num_values: int) -> None:
    num_bits = sum(
        int(np.bitwise_count(mask[start : start + CHUNK]).sum(dtype=np.int64))
        for start in range(0, mask.size, CHUNK)
    )
    if num_bits != num_values:
        raise ArtifactError(f"the bit mask marks {num_bits} elements, but {num_values} are stored")
    if num_elements % 8 and int(mask[-1]) >> (num_elements % 8):
        raise ArtifactError("the bit mask marks elements behind the last one")


def _check_bool(data: Bytes) -> None:
    if data.size and int(data.max()) > 1:
        raise ArtifactError(f"an element of type bool is {int(data.max())}, not 0 or 1")
