"""Files of version 1, which are read for ever and written no more (docs/format.md, at the end)."""

from __future__ import annotations

import dataclasses as dc
import math
import zlib
from io import FileIO
from typing import Any

from tersor.artifact.artifact import Artifact, check_initializers, read_only
from tersor.artifact.checks import (
    MAX_DECODED_BYTES,
    MAX_SKELETON_BYTES,
    MAX_TENSORS,
    check_count,
    check_digest,
    check_keys,
    check_known,
    check_name,
    check_plain,
    check_shape,
    digest_of,
    parse_json,
    shown,
)
from tersor.artifact.encoding import DTYPES, Array, Steps
from tersor.artifact.encodings import ENCODINGS
from tersor.artifact.storage import read_exactly
from tersor.errors import ArtifactError

ENCODINGS_1 = ("dense", "bitmap", "packed")


@dc.dataclass(frozen=True)
class TensorEntry:
    """What the header says of one tensor. `size_bytes` is that of its section; `digest` see
    `digest_of`."""

    digest: str
    dtype: str
    encoding: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def num_elements(self) -> int:
        """Elements when decoded; 1 for a scalar."""
        return math.prod(self.shape)


@dc.dataclass(frozen=True)
class SkeletonEntry:
    """What the header says of the skeleton. `size_bytes` is that of its section, `decoded_bytes`
    that of its content."""

    decoded_bytes: int
    digest: str
    encoding: str
    size_bytes: int


@dc.dataclass(frozen=True)
class Header:
    """All that the header says; `tensors` by name, in the order of their sections (sorted by
    name)."""

    plan: dict[str, Any]
    provenance: dict[str, Any]
    skeleton: SkeletonEntry
    tensors: dict[str, TensorEntry]


def read_header(data: bytes) -> Header:
    """Check everything that can be checked without the sections. Raises ArtifactError."""
    content = parse_json(data)
    check_keys(content, Header, "the header")
    for part in ("plan", "provenance"):
        if not isinstance(content[part], dict):
            raise ArtifactError(f"{part} is not a JSON object")
        check_plain(content[part], part)
    tensors = content["tensors"]
    if not isinstance(tensors, dict) or len(tensors) > MAX_TENSORS:
        raise ArtifactError(f"tensors must be a JSON object of at most {MAX_TENSORS} entries")
    skeleton = _skeleton_entry(content["skeleton"])
    entries = {name: _tensor_entry(name, item) for name, item in tensors.items()}
    total = sum(e.num_elements * DTYPES[e.dtype].itemsize for e in entries.values())
    if total > MAX_DECODED_BYTES:
        raise ArtifactError(
            f"the tensors take {total} bytes; at most {MAX_DECODED_BYTES} are allowed"
        )
    return Header(content["plan"], content["provenance"], skeleton, entries)


def _skeleton_entry(content: Any) -> SkeletonEntry:
    check_keys(content, SkeletonEntry, "skeleton")
    if content["encoding"] != "zlib":
        raise ArtifactError(
            f"the skeleton uses the encoding {shown(content['encoding'])}; this Tersor knows zlib; "
            "upgrade with: pip install -U tersor"
        )
    check_count(content["size_bytes"], MAX_SKELETON_BYTES, "skeleton.size_bytes")
    check_count(content["decoded_bytes"], MAX_SKELETON_BYTES, "skeleton.decoded_bytes")
    check_digest(content["digest"], "skeleton")
    return SkeletonEntry(**content)


def _tensor_entry(name: str, content: Any) -> TensorEntry:
    check_name(name)
    where = f"tensor {shown(name)}"
    check_keys(content, TensorEntry, where)
    check_known(content["dtype"], DTYPES, f"{where} has the type")
    check_known(content["encoding"], ENCODINGS_1, f"{where} uses the encoding")
    dtype = DTYPES[content["dtype"]]
    check_shape(content["shape"], dtype.itemsize, where)
    check_count(content["size_bytes"], MAX_DECODED_BYTES, f"{where}: size_bytes")
    check_digest(content["digest"], where)
    entry = TensorEntry(**{**content, "shape": tuple(content["shape"])})
    encoding = ENCODINGS[entry.encoding]
    if not encoding.accepts(dtype):
        raise ArtifactError(
            f"{where}: {entry.encoding} does not hold elements of type {entry.dtype}"
        )
    if not encoding.fits(entry.size_bytes, entry.shape, dtype):
        raise ArtifactError(
            f"{where}: {entry.size_bytes} bytes cannot hold {entry.num_elements} elements "
            f"of type {entry.dtype} as {entry.encoding}"
        )
    return entry


def read(file: FileIO, data: bytes, left: int) -> tuple[Artifact, int]:
    """The artifact of a file whose header is `data` and has `left` bytes behind it, and the bytes of
    its skeleton's section.

    A tensor takes at most 32 times its section (one bit stands for at most 4 bytes), so no number in
    the file need be trusted to bound memory.
    """
    header = read_header(data)
    tensor_bytes = sum(entry.size_bytes for entry in header.tensors.values())
    if header.skeleton.size_bytes + tensor_bytes != left:
        raise ArtifactError(
            f"the sections take {header.skeleton.size_bytes + tensor_bytes} bytes, the file has {left}"
        )
    packed = read_exactly(file, header.skeleton.size_bytes, "the skeleton")
    if digest_of(packed.data) != header.skeleton.digest:
        raise ArtifactError("the skeleton is damaged: its digest does not match")
    skeleton = _decompress(packed.tobytes(), header.skeleton)
    kinds = {n: (e.dtype, e.shape) for n, e in header.tensors.items()}
    check_initializers(skeleton, kinds)
    tensors = {name: _read_tensor(file, name, entry) for name, entry in header.tensors.items()}
    encodings = {name: entry.encoding for name, entry in header.tensors.items()}
    sizes = {name: entry.size_bytes for name, entry in header.tensors.items()}
    artifact = Artifact(skeleton, tensors, encodings, header.plan, header.provenance)
    artifact.sizes.update(sizes)
    return artifact, header.skeleton.size_bytes


def _read_tensor(file: FileIO, name: str, entry: TensorEntry) -> Array:
    where = f"tensor {shown(name)}"
    data = read_exactly(file, entry.size_bytes, where)
    if digest_of(data.data) != entry.digest:
        raise ArtifactError(f"{where} is damaged: its digest does not match")
    try:
        dtype = DTYPES[entry.dtype]
        found = ENCODINGS[entry.encoding].decode(data.data, entry.shape, dtype, Steps(0))
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from None
    return read_only(found)


def _decompress(data: bytes, entry: SkeletonEntry) -> bytes:
    """Undo zlib; never takes more memory than the header declares."""
    stream = zlib.decompressobj()
    try:
        skeleton = stream.decompress(data, entry.decoded_bytes + 1)
    except zlib.error as error:
        raise ArtifactError(f"the skeleton cannot be decompressed ({error})") from None
    if len(skeleton) != entry.decoded_bytes or not stream.eof or stream.unused_data:
        raise ArtifactError(
            f"the skeleton does not decompress to the {entry.decoded_bytes} bytes declared"
        )
    return skeleton
