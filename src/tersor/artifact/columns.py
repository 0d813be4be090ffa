"""The skeleton's bytes as columns: what a graph repeats stands beside itself, and compresses.

A node's inputs and outputs become places in a table of names, what else it holds a place in a table
of its distinct forms; names keep what they share with the one before. `expand` undoes it to the byte
and never makes more than the caller allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tersor.artifact.cursor import Cursor, from_zigzag, varint, zigzag
from tersor.errors import ArtifactError

T = TypeVar("T")

PLAIN, COLUMNS = 0, 1
NO_NAME, NAME_OF_OUTPUT, OWN_NAME = 0, 1, 2


def collapse(skeleton: bytes) -> bytes:
    """A form byte (0 as it is, 1 columns) and the skeleton in that form."""
    try:
        columns = bytes([COLUMNS]) + _Columns(skeleton).write()
        if expand(memoryview(columns), len(skeleton)) == skeleton:
            return columns
    except (ArtifactError, _OddError):
        pass
    return bytes([PLAIN]) + skeleton


def expand(data: memoryview, size: int) -> bytes:
    """The skeleton, of exactly `size` bytes. Raises ArtifactError."""
    cursor = Cursor(data)
    if cursor.byte(COLUMNS, "the form of the skeleton") == PLAIN:
        found = bytes(cursor.rest())
    else:
        found = _read(cursor, size)
        cursor.end()
    if len(found) != size:
        raise ArtifactError(f"the skeleton has {len(found)} bytes, {size} are declared")
    return found


class _OddError(Exception):
    """The skeleton is not laid out as protobuf lays it out."""


def _fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Number, all bytes and content of each field of a message."""
    place = 0
    while place < len(data):
        start = place
        tag, place = _number(data, place)
        if tag & 7 == 2:
            size, place = _number(data, place)
            content, place = data[place : place + size], place + size
        elif tag & 7 == 0:
            before = place
            _, place = _number(data, place)
            content = data[before:place]
        else:
            size = {1: 8, 5: 4}.get(tag & 7, len(data))
            content, place = data[place : place + size], place + size
        if place > len(data):
            raise _OddError
        yield tag >> 3, data[start:place], content


def _number(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data) and shift < 70:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise _OddError


def _field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def _numbers(values: Iterable[int]) -> bytes:
    held = list(values)
    return varint(len(held)) + b"".join(map(varint, held))


def _texts(values: Iterable[bytes]) -> bytes:
    held = list(values)
    return _numbers(map(len, held)) + b"".join(held)


def _shared(one: bytes, other: bytes) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


class _Columns:
    """Takes a skeleton apart."""

    def __init__(self, skeleton: bytes) -> None:
        self.names: list[bytes] = []
        self.place: dict[bytes, int] = {}
        self.forms: dict[bytes, int] = {}
        self.kinds: dict[bytes, int] = {}
        self.columns: list[list[int]] = [[] for _ in range(7)]
        self.own: list[bytes] = []
        self.dims: list[int] = []
        self.rest: list[bytes] = [b""] * 5
        for number, raw, content in _fields(skeleton):
            if number == 7:
                self.graph(content)
            else:
                self.rest[0 if number < 7 else 4] += raw

    def write(self) -> bytes:
        shared = [_shared(a, b) for a, b in zip([b"", *self.names], self.names, strict=False)]
        suffixes = [name[keep:] for name, keep in zip(self.names, shared, strict=True)]
        parts = [_texts(self.rest), _texts(self.forms), _texts(self.kinds), _numbers(shared)]
        parts += [_texts(suffixes), _texts(self.own), _numbers(self.dims)]
        return b"".join([*parts, *map(_numbers, self.columns)])

    def graph(self, content: bytes) -> None:
        last_initializer = last_value = -1
        for number, raw, inner in _fields(content):
            if number == 1:
                self.node(inner)
            elif number == 5:
                last_initializer = self.initializer(inner, last_initializer)
            elif number == 13:
                last_value = self.value(inner, last_value)
            else:
                self.rest[1 if number < 5 else 2 if number < 13 else 3] += raw

    def node(self, content: bytes) -> None:
        form, name, inputs, outputs, operator = b"", None, [], [], b""
        for number, raw, inner in _fields(content):
            if number == 1:
                inputs.append(inner)
            elif number == 2:
                outputs.append(inner)
            elif number == 3:
                name = inner
            else:
                form += raw
                operator = inner if number == 4 else operator
        forms, num_inputs, num_outputs, places, names, _, _ = self.columns
        forms.append(self.forms.setdefault(form, len(self.forms)))
        num_inputs.append(len(inputs))
        num_outputs.append(len(outputs))
        for each in (*inputs, *outputs):  # how far back in the table; 0 for one that is new
            place = self.place_of(each)
            places.append(len(self.names) - place if each in self.place else 0)
            self.enter(each)
        if name is None:
            names.append(NO_NAME)
        elif outputs and name == outputs[0] + b"_" + operator:
            names.append(NAME_OF_OUTPUT)
        else:
            names.append(OWN_NAME)
            self.own.append(name)

    def initializer(self, content: bytes, last: int) -> int:
        dims, kind, name = [], 0, b""
        for number, raw, inner in _fields(content):
            if number == 1 and raw[0] == 8:
                dims.append(_number(inner, 0)[0])
            elif number == 2:
                kind = _number(inner, 0)[0]
            elif number == 8:
                name = inner
        place = self.place_of(name)
        self.columns[5].append(zigzag(place - last - 1))
        self.enter(name)
        self.dims += [kind, len(dims), *dims]
        return place

    def value(self, content: bytes, last: int) -> int:
        form, name = b"", b""
        for number, raw, inner in _fields(content):
            if number == 1:
                name = inner
            else:
                form += raw
        place = self.place_of(name)
        self.enter(name)
        self.columns[6] += [zigzag(place - last - 1), self.kinds.setdefault(form, len(self.kinds))]
        return place

    def place_of(self, name: bytes) -> int:
        return self.place.get(name, len(self.names))

    def enter(self, name: bytes) -> None:
        if name not in self.place:
            self.place[name] = len(self.names)
            self.names.append(name)


class _Room:
    """How many bytes may still be made."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, parts: list[bytes]) -> bytes:
        """The parts, one behind the other."""
        self.left -= sum(map(len, parts))
        if self.left < 0:
            raise ArtifactError("the skeleton grows beyond the bytes declared")
        return b"".join(parts)


def _read_numbers(cursor: Cursor) -> list[int]:
    return [cursor.varint() for _ in range(cursor.varint(cursor.left, "a count in the skeleton"))]


def _read_texts(cursor: Cursor) -> list[bytes]:
    return [bytes(cursor.take(size)) for size in _read_numbers(cursor)]


def _read(cursor: Cursor, size: int) -> bytes:
    rest, forms, kinds = (_read_texts(cursor) for _ in range(3))
    shared, suffixes, own = _read_numbers(cursor), _read_texts(cursor), _read_texts(cursor)
    dims = _read_numbers(cursor)
    columns = [_read_numbers(cursor) for _ in range(7)]
    if len(rest) != 5:
        raise ArtifactError("the skeleton lacks a part")
    try:
        names = _read_names(shared, suffixes, size)
        room = _Room(2 * size)
        parts = [
            *_read_nodes(columns, forms, names, iter(own), room),
            rest[1],
            *_read_initializers(columns[5], iter(dims), names, room),
            rest[2],
            *_read_values(iter(columns[6]), len(columns[6]) // 2, kinds, names, room),
            rest[3],
        ]
        return _Room(size).take([rest[0], _field(7, room.take(parts)), rest[4]])
    except (IndexError, ValueError):
        raise ArtifactError("the columns of the skeleton do not fit together") from None


def _read_names(shared: list[int], suffixes: list[bytes], size: int) -> list[bytes]:
    names, before, room = [], b"", _Room(2 * size)
    for keep, suffix in zip(shared, suffixes, strict=True):
        before = room.take([before[:keep], suffix])
        names.append(before)
    return names


def _read_nodes(
    columns: list[list[int]],
    forms: list[bytes],
    names: list[bytes],
    own: Iterator[bytes],
    room: _Room,
) -> Iterator[bytes]:
    places, known = iter(columns[3]), 0
    for form, num_inputs, num_outputs, kind in zip(*columns[:3], columns[4], strict=True):
        parts, first = [], b""
        for number in range(num_inputs + num_outputs):
            back = _next(places)
            if back > known:
                raise ArtifactError("a node of the skeleton refers to a name before the first")
            name = names[known - back]
            known += back == 0
            first = name if number == num_inputs else first
            parts.append(_field(1 if number < num_inputs else 2, name))
        if kind == NAME_OF_OUTPUT:
            parts.append(_field(3, first + b"_" + _operator(forms[form])))
        elif kind == OWN_NAME:
            parts.append(_field(3, _next(own)))
        yield _field(1, room.take([*parts, forms[form]]))


def _operator(form: bytes) -> bytes:
    try:
        return next((inner for number, _, inner in _fields(form) if number == 4), b"")
    except _OddError:
        raise ArtifactError("a node of the skeleton is cut off") from None


def _read_initializers(
    deltas: list[int], dims: Iterator[int], names: list[bytes], room: _Room
) -> Iterator[bytes]:
    last = -1
    for delta in deltas:
        last += 1 + from_zigzag(delta)
        kind = _next(dims)
        shape = [b"\x08" + varint(_next(dims)) for _ in range(_next(dims))]
        yield _field(5, room.take([*shape, b"\x10", varint(kind), _field(8, _at(names, last))]))


def _read_values(
    column: Iterator[int], count: int, kinds: list[bytes], names: list[bytes], room: _Room
) -> Iterator[bytes]:
    last = -1
    for _ in range(count):
        last += 1 + from_zigzag(_next(column))
        yield _field(13, room.take([_field(1, _at(names, last)), kinds[_next(column)]]))


def _at(names: list[bytes], place: int) -> bytes:
    if place < 0:
        raise ArtifactError("a part of the skeleton refers to a name before the first")
    return names[place]


def _next(values: Iterator[T]) -> T:
    for value in values:
        return value
    raise ArtifactError("the columns of the skeleton do not fit together")
