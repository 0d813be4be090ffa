"""Whole numbers of a wide range, such as int32 biases: how long each is, its sign, its low bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.artifact.cursor import Cursor, pack_streams, unpack_streams
from tersor.artifact.encoding import DTYPES, ENCODINGS, Array, Shape, Steps, count
from tersor.artifact.entropy import UNIT, Coder, Counts, Reader, Writer, flat_prior
from tersor.errors import ArtifactError

FIRST_RUN, LONGEST_RUN = 48, 1 << 16
PIECE = 16  # low bits coded at once
LIMIT = 1 << 20
MOST = 1 << 17  # elements; biases and the like


@ENCODINGS.register("integers")
class Integers:
    """Byte 0: by how many bits all numbers are shifted; byte 1: the bits of the largest; streams.

    For each number its length in bits (0 for 0), whether it is negative, the bit below the highest
    and all lower bits.
    """

    extra = 0.0

    @staticmethod
    def accepts(dtype: np.dtype[Any]) -> bool:
        """int32 and int64."""
        return dtype in (DTYPES["int32"], DTYPES["int64"])

    @staticmethod
    def encode(array: Array, quick: bool = False) -> bytes | None:
        """None for no element or too many, and for numbers without a positive counterpart."""
        flat = array.reshape(-1).astype(np.int64)
        if not 0 < flat.size <= MOST or int(flat.min()) == np.iinfo(np.int64).min:
            return None
        together = int(np.bitwise_or.reduce(np.abs(flat)))
        shift = (together & -together).bit_length() - 1 if together else 0
        longest = (together >> shift).bit_length()
        writer = Writer()
        _code(writer, flat.size, longest, flat >> shift)
        return bytes([shift, longest]) + pack_streams(writer.finish())

    @staticmethod
    def fits(size_bytes: int, shape: Shape, dtype: np.dtype[Any]) -> bool:
        """A few bytes may stand for many zeros."""
        return size_bytes >= 3 and 0 < count(shape) <= MOST

    @staticmethod
    def decode(data: memoryview, shape: Shape, dtype: np.dtype[Any], steps: Steps) -> Array:
        """Takes the tensor twice."""
        cursor = Cursor(data)
        shift = cursor.byte(62, "the shift")
        longest = cursor.byte(63 - shift, "the bits of the largest")
        reader = Reader(unpack_streams(cursor))
        found = _code(reader, count(shape), longest, None)
        reader.finish()
        if int(np.bitwise_or.reduce(np.abs(found))).bit_length() != longest:
            raise ArtifactError(f"no number is {longest} bits long, as the section says")
        found <<= shift
        limits = np.iinfo(dtype)
        if int(found.min()) < limits.min or int(found.max()) > limits.max:
            raise ArtifactError(f"a number of {shift + longest} bits is not of type {dtype.name}")
        return found.astype(dtype).reshape(shape)


def _code(coder: Coder, size: int, longest: int, known: Array | None) -> Array:
    """`size` numbers of at most `longest` bits, int64, in runs that grow by half."""
    found = np.zeros(size, np.int64)
    if not longest:
        return found
    lengths = Counts(flat_prior(longest + 1), LIMIT)
    signs = Counts(flat_prior(2, UNIT), LIMIT)
    seconds = Counts(np.full((longest + 1, 2), 4 * UNIT, np.int64), LIMIT)
    start, run = 0, FIRST_RUN
    while start < size:
        end = min(start + run, size)
        part = None if known is None else known[start:end]
        found[start:end] = _code_part(coder, end - start, lengths, signs, seconds, part)
        start, run = end, min(run * 3 // 2, LONGEST_RUN)
        coder.boundary()
    return found


def _code_part(
    coder: Coder, size: int, lengths: Counts, signs: Counts, seconds: Counts, known: Array | None
) -> Array:
    value = None if known is None else np.abs(known)
    length = coder.run(lengths, size, None if value is None else _bit_lengths(value)).astype(
        np.int64
    )
    lengths.update(np.int64(0), length)
    some = np.flatnonzero(length)
    negative = coder.run(signs, some.size, None if known is None else known[some] < 0)
    signs.update(np.int64(0), negative)
    found = np.minimum(length, 1)
    long = np.flatnonzero(length > 1)
    second = None if value is None else value[long] >> (length[long] - 2) & 1
    bit = coder.symbols(seconds, length[long], second)
    seconds.update(length[long], bit)
    found[long] = 2 + bit
    rest = np.maximum(length - 2, 0)
    for _ in range(0, 64, PIECE):
        lanes = np.flatnonzero(rest)
        now = np.minimum(rest[lanes], PIECE)
        rest[lanes] -= now
        piece = None if value is None else value[lanes] >> rest[lanes] & ((1 << now) - 1)
        low = coder.uniform((1 << now).astype(np.int32), piece)
        found[lanes] = found[lanes] << now | low
    found[some[negative != 0]] *= -1
    return found


def _bit_lengths(values: Array) -> Array:
    """Bits of whole numbers from 0 to 2^63 - 1; halves of 32 bits, which float64 holds exactly."""
    high, low = values >> 32, values & 0xFFFFFFFF
    bits = np.where(high > 0, 32 + np.frexp(high.astype(np.float64))[1], 0)
    return np.where(high > 0, bits, np.frexp(low.astype(np.float64))[1])
