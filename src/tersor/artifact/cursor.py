"""Reading and writing the small numbers of a section, with every step checked."""

from __future__ import annotations

from tersor.errors import ArtifactError

MAX_VARINT = (1 << 35) - 1


def varint(value: int) -> bytes:
    """A whole number from 0 to MAX_VARINT, 7 bits a byte, the lowest first; the fewest bytes."""
    if not 0 <= value <= MAX_VARINT:
        raise ArtifactError(f"the number {value} is not from 0 to {MAX_VARINT}")
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)


def zigzag(value: int) -> int:
    """A whole number as one that is not negative: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return 2 * value if value >= 0 else -2 * value - 1


def from_zigzag(value: int) -> int:
    """The inverse of `zigzag`."""
    return value >> 1 if value % 2 == 0 else -(value >> 1) - 1


class Cursor:
    """A place in bytes that anybody may have written. Raises ArtifactError."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.place = 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self.data) - self.place

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        if not 0 <= size <= self.left:
            raise ArtifactError(f"{size} bytes are needed, {self.left} are left")
        self.place += size
        return self.data[self.place - size : self.place]

    def byte(self, most: int = 255, what: str = "a byte") -> int:
        """The next byte, at most `most`."""
        value = self.take(1)[0]
        if value > most:
            raise ArtifactError(f"{what} is {value}; at most {most} is possible")
        return value

    def varint(self, most: int = MAX_VARINT, what: str = "a number") -> int:
        """The next `varint`, in its shortest form, at most `most`."""
        value = shift = 0
        while shift <= 28:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                if value > most or (byte == 0 and shift):
                    raise ArtifactError(
                        f"{what} is {value}; at most {most} is possible, in its shortest form"
                    )
                return value
            shift += 7
        raise ArtifactError(f"{what} takes more than 5 bytes")

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise ArtifactError(f"{self.left} bytes do not belong to the tensor")

    def rest(self) -> memoryview:
        """All that is left."""
        return self.take(self.left)


def pack_streams(streams: list[bytes]) -> bytes:
    """Streams behind each other: how many follow the first, the sizes of all but the last, then
    they."""
    sizes = b"".join(varint(len(stream)) for stream in streams[:-1])
    return varint(len(streams) - 1) + sizes + b"".join(streams)


def unpack_streams(cursor: Cursor) -> list[bytes]:
    """The inverse of `pack_streams`; takes all that is left."""
    more = cursor.varint(cursor.left, "the number of streams")
    sizes = [cursor.varint(cursor.left, "the size of a stream") for _ in range(more)]
    return [bytes(cursor.take(size)) for size in sizes] + [bytes(cursor.rest())]
