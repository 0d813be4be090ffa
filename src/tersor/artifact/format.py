"""save and load: an `Artifact` as a `.tersor` file.

    0   magic (8 bytes)
    8   format version (u32), bytes of the packed header (u32), of the file (u64), little-endian
    24  SHA-256 of bytes 0..24 and the packed header
    56  packed header, skeleton, tensors in the graph's order, tensors of the state

`docs/format.md` describes the format for other readers.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import hashlib
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from io import FileIO

from tersor.artifact import derived, version1
from tersor.artifact import skeleton as skeletons
from tersor.artifact.artifact import (
    ELEMENTS_A_STEP,
    FREE_STEPS,
    Artifact,
    Kinds,
    check_consistent,
    in_order,
    initializer_kinds,
    num_elements,
    read_only,
    type_name,
)
from tersor.artifact.checks import (
    MAX_DECODED_BYTES,
    MAX_HEADER_BYTES,
    check_name,
    check_shape,
    shown,
)
from tersor.artifact.columns import collapse, expand
from tersor.artifact.encoding import DTYPES, Array, Steps, count, smallest
from tersor.artifact.encodings import ENCODINGS
from tersor.artifact.header import (
    Header,
    SkeletonEntry,
    groups,
    read_header,
    squeeze,
    unsqueeze,
    write_header,
)
from tersor.artifact.storage import open_regular, read_exactly, write_whole
from tersor.errors import ArtifactError

MAGIC = b"\x89TERSOR\n"  # not ASCII, not UTF-8, and broken by a change of line ends
FORMAT_VERSION = 2
_START = struct.Struct("<8sIIQ")
PROLOGUE_BYTES = _START.size + 32
# What a file may decode to and take while it is read, without its reader saying more.
FREE_BYTES, BYTES_A_BYTE = 56 << 20, 256
DIGEST_DIGITS = 16

Section = bytes | memoryview


@dc.dataclass(frozen=True)
class FileSizes:
    """What a file consists of, in bytes; `tensor_bytes` is the sum of its tensor sections."""

    format_version: int
    size_bytes: int
    header_bytes: int
    skeleton_bytes: int
    tensor_bytes: int


def save(artifact: Artifact, path: str | os.PathLike[str]) -> int:
    """Write `artifact` to `path` and return the file's size in bytes; equal artifacts give equal
    files.

    All or nothing: on any failure what was at `path` is still there. Raises RunError when the place
    cannot be written, ArtifactError on an artifact that `load` would refuse.
    """
    check_consistent(artifact)
    columns = collapse(artifact.skeleton)
    packed = squeeze(columns)
    arrays = {**artifact.tensors, **{f"state/{n}": a for n, a in artifact.beside.items()}}
    order = [
        *initializer_kinds(artifact.skeleton),
        *(f"state/{n}" for n in sorted(artifact.beside)),
    ]
    made = {**_derivations(artifact, order), **_stored(artifact, arrays)}
    sections = [packed, *(made[key][1] for key in order)]
    sizes = [len(section) for section in sections]
    header = write_header(
        Header(
            [_digest(sections[group.start : group.stop]) for group in groups(sizes)],
            [made[key][0] for key in order],
            artifact.plan,
            artifact.provenance,
            sizes[1:],
            SkeletonEntry(len(columns), len(artifact.skeleton), len(packed)),
            {n: (type_name(a), a.shape) for n, a in sorted(artifact.beside.items())},
        )
    )
    total = PROLOGUE_BYTES + len(header) + sum(sizes)
    start = _START.pack(MAGIC, FORMAT_VERSION, len(header), total)
    seal = hashlib.sha256(start + header).digest()
    write_whole(pathlib.Path(path), [start + seal + header, *sections], total)
    return total


def _stored(artifact: Artifact, arrays: dict[str, Array]) -> dict[str, tuple[str, Section]]:
    """Encoding and section of the tensors that are stored themselves."""
    return {
        key: (encoding, artifact.section(key, arrays[key], encoding))
        for key, encoding in artifact.encodings.items()
        if encoding != derived.NAME
    }


def _derivations(artifact: Artifact, order: list[str]) -> dict[str, tuple[str, Section]]:
    """The same of those that are said to be derived; stored where they are not (any more)."""
    told = {key for key, encoding in artifact.encodings.items() if encoding == derived.NAME}
    if not told:
        return {}
    places = {key: place for place, key in enumerate(order) if key in artifact.tensors}
    sizes = {key: 1 << 30 if key in told else 0 for key in places}
    found = derived.find(artifact.tensors, places, sizes)
    return {
        key: (derived.NAME, found[key])
        if key in found
        else smallest(in_order(artifact.tensors[key]))
        for key in told
    }


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Artifact:
    """Read a `.tersor` file. Nothing in it is executed or imported, and memory is taken only for what
    a file of its size may hold: 56 MiB and 256 bytes for each of its bytes above 1 MiB, or `max_bytes`
    (tensors decoded, the graph, and what reading takes) where given.

    Raises ArtifactError naming `path` (and the tensor) on anything that `save` does not write.
    """
    return read_file(path, max_bytes=max_bytes)[0]


def read_file(
    path: str | os.PathLike[str], *, max_bytes: int | None = None
) -> tuple[Artifact, FileSizes]:
    """`load`, and what the file consists of."""
    place = pathlib.Path(path)
    with open_regular(place) as (file, size_bytes):
        try:
            version, header, seal_bytes = _read_start(file, size_bytes)
            left = size_bytes - seal_bytes
            if version == 1:
                artifact, skeleton_bytes = version1.read(file, header.tobytes(), left)
            else:
                artifact, skeleton_bytes = _read(file, header, left, size_bytes, max_bytes)
        except ArtifactError as error:
            raise ArtifactError(f"{place}: {error}") from None
    tensor_bytes = left - skeleton_bytes
    return artifact, FileSizes(version, size_bytes, len(header), skeleton_bytes, tensor_bytes)


def _read_start(file: FileIO, size_bytes: int) -> tuple[int, memoryview, int]:
    """Format version, the header's bytes, and how many bytes lie before the sections."""
    start = read_exactly(file, min(PROLOGUE_BYTES, size_bytes), "its first bytes").tobytes()
    if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
        raise ArtifactError("this is not a .tersor file (its first bytes differ)")
    version = struct.unpack_from("<I", start, 8)[0] if len(start) >= 12 else FORMAT_VERSION
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"written by a newer Tersor: format {version}, this one reads up to {FORMAT_VERSION}; "
            "upgrade with: pip install -U tersor"
        )
    if len(start) < PROLOGUE_BYTES:
        raise ArtifactError(
            f"the file is cut off: it has {size_bytes} bytes, at least {PROLOGUE_BYTES} are needed"
        )
    _, version, header_bytes, total = _START.unpack_from(start)
    if version < 1 or header_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"format {version} and a header of {header_bytes} bytes are not possible "
            f"(formats start at 1, a header has at most {MAX_HEADER_BYTES} bytes)"
        )
    if total != size_bytes:
        state = "cut off" if size_bytes < total else "followed by bytes that do not belong to it"
        raise ArtifactError(
            f"the file is {state}: it has {size_bytes} bytes and should have {total}"
        )
    if header_bytes > size_bytes - PROLOGUE_BYTES:
        raise ArtifactError(f"a header of {header_bytes} bytes does not fit in the file")
    data = read_exactly(file, header_bytes, "the header")
    if hashlib.sha256(start[: _START.size] + data.tobytes()).digest() != start[_START.size :]:
        raise ArtifactError("the header is damaged: its digest does not match")
    return version, data.data, PROLOGUE_BYTES + header_bytes


def _read(
    file: FileIO, packed: memoryview, left: int, size_bytes: int, max_bytes: int | None
) -> tuple[Artifact, int]:
    header, taken = read_header(packed, size_bytes)
    sizes = [header.skeleton.size_bytes, *header.sizes]
    if sum(sizes) != left:
        raise ArtifactError(f"the sections take {sum(sizes)} bytes, the file has {left}")
    sections = _read_sections(file, sizes, header.digests)
    skeleton = _read_skeleton(next(sections), header.skeleton)
    taken += len(skeleton) + skeletons.check_wire(skeleton)
    kinds = _kinds(skeleton, header)
    free = FREE_BYTES + BYTES_A_BYTE * max(0, size_bytes - (1 << 20))
    _check_room(header, kinds, taken, free if max_bytes is None else max_bytes, size_bytes)
    steps = Steps(FREE_STEPS + num_elements(kinds) // ELEMENTS_A_STEP)
    arrays: dict[str, Array | None] = dict.fromkeys(kinds)
    later = {}
    for (key, (dtype, shape)), encoding, data in zip(
        kinds.items(), header.encodings, sections, strict=True
    ):
        if encoding == derived.NAME:
            later[key] = data
        else:
            with _naming(key):
                arrays[key] = ENCODINGS[encoding].decode(data, shape, DTYPES[dtype], steps)
    stored = list(arrays.values())[: len(kinds) - len(header.state)]
    found = {key: array for key, array in arrays.items() if array is not None}
    for key, data in later.items():
        with _naming(key):
            found[key] = derived.compute(data, kinds[key][1], DTYPES[kinds[key][0]], stored)
    return _artifact(skeleton, header, found), header.skeleton.size_bytes


def _read_sections(file: FileIO, sizes: list[int], digests: list[str]) -> Iterator[memoryview]:
    """Section after section; none is given out before its group's digest was compared."""
    for group, digest in zip(groups(sizes), digests, strict=True):
        where = (
            f"section {group.start}"
            if len(group) == 1
            else f"sections {group.start} to {group.stop - 1}"
        )
        data = [read_exactly(file, sizes[number], where).data for number in group]
        if _digest(data) != digest:
            raise ArtifactError(f"{where} (0 is the graph) is damaged: the digest does not match")
        yield from data


def _digest(sections: Sequence[Section]) -> str:
    """The first 64 bits of the SHA-256 of sections behind each other, in hexadecimal digits."""
    whole = hashlib.sha256()
    for section in sections:
        whole.update(section)
    return whole.hexdigest()[:DIGEST_DIGITS]


def _read_skeleton(section: memoryview, entry: SkeletonEntry) -> bytes:
    columns = unsqueeze(section, entry.columns_bytes, "the skeleton")
    return expand(memoryview(columns), entry.decoded_bytes)


def _kinds(skeleton: bytes, header: Header) -> Kinds:
    """Types and shapes of all tensors, those of the state under "state/NAME"."""
    kinds = initializer_kinds(skeleton)
    for name, (dtype, shape) in kinds.items():
        check_name(name)
        if dtype not in DTYPES:
            raise ArtifactError(f"tensor {shown(name)} is of a type that a file does not hold")
        check_shape(list(shape), DTYPES[dtype].itemsize, f"tensor {shown(name)}")
    number = len(kinds) + len(header.state)
    if number != len(header.sizes):
        raise ArtifactError(f"{number} tensors are needed, {len(header.sizes)} sections are there")
    kinds.update({f"state/{name}": kind for name, kind in header.state.items()})
    if len(kinds) != number:
        raise ArtifactError("a tensor of the graph is called as one of the state")
    return kinds


def _check_room(header: Header, kinds: Kinds, taken: int, most: int, size_bytes: int) -> None:
    """Refuse sections that cannot hold their tensor, and more memory than may be taken."""
    total, extra = taken, 0
    for (key, (dtype, shape)), encoding, size in zip(
        kinds.items(), header.encodings, header.sizes, strict=True
    ):
        kind = DTYPES[dtype]
        num_bytes = count(shape) * kind.itemsize
        total += num_bytes
        if encoding == derived.NAME:
            continue
        way = ENCODINGS[encoding]
        if not way.accepts(kind) or not way.fits(size, shape, kind):
            raise ArtifactError(
                f"tensor {shown(key)}: {size} bytes cannot hold {count(shape)} elements of type "
                f"{dtype} as {encoding}"
            )
        extra = max(extra, int(way.extra * num_bytes))
    if total + extra > min(most, MAX_DECODED_BYTES):
        raise ArtifactError(
            f"reading it would take {total + extra} bytes of memory, at most {min(most, MAX_DECODED_BYTES)} "
            f"are taken for a file of {size_bytes}; if you know where it comes from: "
            f"tersor.load(path, max_bytes={total + extra})"
        )


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"tensor {shown(key)}: {error}") from None


def _artifact(skeleton: bytes, header: Header, arrays: dict[str, Array]) -> Artifact:
    beside = {name: read_only(arrays.pop(f"state/{name}")) for name in header.state}
    tensors = {name: read_only(arrays[name]) for name in sorted(arrays)}
    order = [*initializer_kinds(skeleton), *(f"state/{name}" for name in header.state)]
    encodings = dict(zip(order, header.encodings, strict=True))
    sizes = dict(zip(order, header.sizes, strict=True))
    return Artifact(skeleton, tensors, encodings, header.plan, header.provenance, beside, sizes)
