"""What a way to store a tensor is, and the table of them (`artifact/encodings/` holds one a file).

Every encoding keeps all bits: NaN payloads and the sign of zero survive. `decode` gets bytes that
anybody may have written: it checks everything it relies on and takes no more memory than the tensor
that the caller asks for, whose size is checked before, and a few MiB.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tersor.errors import ArtifactError
from tersor.registry import Registry

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

# The element types a file may hold, all little-endian; a file of version 2 says the place in this list.
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


class Steps:
    """How many steps of context modelling a file may still ask for: each takes up to a quarter of a
    millisecond, and hardly a byte."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self, number: int) -> None:
        """Take `number` away. Raises ArtifactError where there are not as many."""
        self.left -= number
        if self.left < 0:
            raise ArtifactError("decoding takes more steps than a file of that content may ask for")


class Encoding(Protocol):
    """One way to write a tensor. `decode` of what `encode` gives equals the array bit for bit.

    `extra` is how many times the tensor's own memory decoding takes beside it, and a few MiB.
    """

    extra: float

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """Whether tensors of `dtype` (one of DTYPES) can be written this way."""
        ...

    @staticmethod
    def encode(array: Array, quick: bool) -> bytes | memoryview | None:
        """The bytes of `array`, any shape, C-contiguous, little-endian; None where this way does not
        suit its content. `quick`: without context modelling, in less time."""
        ...

    @staticmethod
    def fits(size_bytes: int, shape: Shape, dtype: np.dtype[Any]) -> bool:
        """Whether some tensor of that shape could take that many bytes: asked before the bytes are
        read."""
        ...

    @staticmethod
    def decode(data: memoryview, shape: Shape, dtype: np.dtype[Any], steps: Steps) -> Array:
        """The tensor. May share the memory of `data`, whose length `fits` has accepted.

        Raises ArtifactError when `data` is not what `encode` writes.
        """
        ...


ENCODINGS: Registry[type[Encoding]] = Registry("encoding")


def word_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Unsigned integers as wide as `dtype`."""
    return np.dtype(f"<u{dtype.itemsize}")


def words_of(array: Array) -> Array:
    """The elements (n,) as unsigned integers of the same width: zero means, all bits are zero."""
    return array.reshape(-1).view(word_type(array.dtype))


def count(shape: Shape) -> int:
    """Elements of a tensor; 1 for a scalar."""
    return math.prod(shape)


def check_bool(data: Array) -> None:
    """Raise ArtifactError unless all bytes are 0 or 1."""
    if data.size and int(data.view(np.uint8).max()) > 1:
        raise ArtifactError(f"an element of type bool is {int(data.max())}, not 0 or 1")


def smallest(array: Array, quick: bool = False) -> tuple[str, bytes | memoryview]:
    """The encoding that takes the fewest bytes for `array` (C-contiguous, of a type in DTYPES), and
    those bytes; "dense" wins ties. `quick`: see Encoding.encode."""
    found: list[tuple[int, bool, str, bytes | memoryview]] = []
    for name in ENCODINGS:
        if ENCODINGS[name].accepts(array.dtype):
            data = ENCODINGS[name].encode(array, quick)
            if data is not None:
                found.append((len(data), name != "dense", name, data))
    best = min(found, key=lambda each: each[:3])
    return best[2], best[3]
