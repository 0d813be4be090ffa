"""The header of a `.tersor` file: canonical JSON in one LZMA stream, read as what it is: something
that anybody may have written."""

from __future__ import annotations

import dataclasses as dc
import lzma
from typing import Any

from tersor.artifact.checks import (
    MAX_DECODED_BYTES,
    MAX_HEADER_BYTES,
    MAX_SKELETON_BYTES,
    MAX_TENSORS,
    canonical_json,
    check_count,
    check_keys,
    check_known,
    check_name,
    check_plain,
    check_shape,
    parse_json,
    shown,
)
from tersor.artifact.cursor import Cursor, varint
from tersor.artifact.encoding import DTYPES, Shape
from tersor.artifact.encodings import ENCODINGS
from tersor.errors import ArtifactError

DERIVED = "derived"
SMALL_HEADER_BYTES = 1 << 20
# One raw LZMA stream with these settings and an end mark; see docs/format.md.
_FILTERS = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 22, "lc": 3, "lp": 0, "pb": 0}]
_WRITING = [{**_FILTERS[0], "mode": lzma.MODE_NORMAL, "nice_len": 273, "mf": lzma.MF_BT4}]


@dc.dataclass(frozen=True)
class SkeletonEntry:
    """Bytes of the skeleton's section, of the columns it decompresses to, and of the ModelProto."""

    columns_bytes: int
    decoded_bytes: int
    size_bytes: int


@dc.dataclass(frozen=True)
class Header:
    """All that the header says. `encodings` and `sizes` have one entry a tensor: those of the graph
    in its order, then those of `state` (name -> type, shape) in order of name. `digests`: see
    `groups`."""

    digests: list[str]
    encodings: list[str]
    plan: dict[str, Any]
    provenance: dict[str, Any]
    sizes: list[int]
    skeleton: SkeletonEntry
    state: dict[str, tuple[str, Shape]]


def squeeze(data: bytes) -> bytes:
    """`data` as one LZMA stream."""
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_WRITING)


def unsqueeze(data: memoryview, size: int, what: str) -> bytes:
    """Undo `squeeze`; takes `size` bytes and the 4 MiB of the dictionary. Raises ArtifactError."""
    stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    try:
        found = stream.decompress(data, size + 1)
        if len(found) == size and not stream.eof:  # the end mark is still to come
            found += stream.decompress(b"", 1)
    except lzma.LZMAError as error:
        raise ArtifactError(f"{what} cannot be decompressed ({error})") from None
    if len(found) != size or not stream.eof or stream.unused_data:
        raise ArtifactError(f"{what} does not decompress to the {size} bytes declared")
    return found


def groups(sizes: list[int]) -> list[range]:
    """Which sections share a digest: from the first on, as many as make 4096 bytes together."""
    found, start, held = [], 0, 0
    for number, size in enumerate(sizes):
        held += size
        if held >= 4096 or number == len(sizes) - 1:
            found.append(range(start, number + 1))
            start, held = number + 1, 0
    return found


def write_header(header: Header) -> bytes:
    """The bytes of `header`: how many JSON takes (varint), and JSON as one LZMA stream. Raises
    ArtifactError where `read_header` would refuse them."""
    data = canonical_json(dc.asdict(header))
    packed = varint(len(data)) + squeeze(data) if len(data) <= MAX_HEADER_BYTES else b""
    most = header_room(len(packed) + header.skeleton.size_bytes + sum(header.sizes))
    if len(data) > most:
        raise ArtifactError(
            f"the header would take {len(data)} bytes; at most {most} are allowed in a file of that "
            "size; make the plan or the provenance shorter"
        )
    return packed


def header_room(file_bytes: int) -> int:
    """How many bytes of JSON a file of that size may hold."""
    return min(MAX_HEADER_BYTES, max(SMALL_HEADER_BYTES, 4 * file_bytes))


def read_header(packed: memoryview, file_bytes: int) -> tuple[Header, int]:
    """Check everything that can be checked without the sections; and how many bytes the parsed JSON
    takes, at most. Raises ArtifactError."""
    cursor = Cursor(packed)
    size = cursor.varint(header_room(file_bytes), "the size of the header")
    data = unsqueeze(cursor.rest(), size, "the header")
    cost = size + 72 * sum(data.count(mark) for mark in (b"[", b"{", b",", b":"))
    content = parse_json(data)
    check_keys(content, Header, "the header")
    for part in ("plan", "provenance"):
        if not isinstance(content[part], dict):
            raise ArtifactError(f"{part} is not a JSON object")
        check_plain(content[part], part)
    check_keys(content["skeleton"], SkeletonEntry, "skeleton")
    for key, value in content["skeleton"].items():
        check_count(value, MAX_SKELETON_BYTES, f"skeleton.{key}")
    encodings, sizes = content["encodings"], content["sizes"]
    _check_list(encodings, "encodings")
    _check_list(sizes, "sizes")
    if len(encodings) != len(sizes):
        raise ArtifactError(f"there are {len(encodings)} encodings and {len(sizes)} sizes")
    for name in set(map(str, encodings)):
        check_known(name, {DERIVED, *ENCODINGS}, "a tensor uses the encoding")
    for value in sizes:
        check_count(value, MAX_DECODED_BYTES, "the size of a section")
    skeleton = SkeletonEntry(**content["skeleton"])
    expected = len(groups([skeleton.size_bytes, *sizes]))
    digests = content["digests"]
    if not isinstance(digests, list) or len(digests) != expected:
        raise ArtifactError(f"digests must be a list of {expected}")
    state = _read_state(content["state"], len(sizes))
    header = Header(
        digests, encodings, content["plan"], content["provenance"], sizes, skeleton, state
    )
    return header, cost


def _check_list(value: Any, what: str) -> None:
    if not isinstance(value, list) or len(value) > MAX_TENSORS:
        raise ArtifactError(f"{what} must be a list of at most {MAX_TENSORS} entries")


def _read_state(content: Any, most: int) -> dict[str, tuple[str, Shape]]:
    if not isinstance(content, dict) or len(content) > most:
        raise ArtifactError(f"state must be a JSON object of at most {most} entries")
    found = {}
    for name, entry in content.items():
        check_name(name)
        where = f"state {shown(name)}"
        if not isinstance(entry, list) or len(entry) != 2:
            raise ArtifactError(f"{where} must have a type and a shape")
        check_known(entry[0], DTYPES, f"{where} has the type")
        check_shape(entry[1], DTYPES[entry[0]].itemsize, where)
        found[name] = (entry[0], tuple(entry[1]))
    return found
