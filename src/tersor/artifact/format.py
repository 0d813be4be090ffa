"""pack, save and load: an ONNX graph as an `Artifact`, and an `Artifact` as a `.tersor` file.

    0   magic (8 bytes)
    8   format version (u32), header bytes (u32), total bytes (u64), little-endian
    24  SHA-256 of bytes 0..24 and the header
    56  header, skeleton, tensors in order of name

`docs/format.md` describes the format for other readers.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import os
import pathlib
import struct
from io import FileIO
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tersor.artifact import skeleton as skeletons
from tersor.artifact.encodings import DTYPES, ENCODINGS, Array, smallest_encoding
from tersor.artifact.header import (
    MAX_DECODED_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Header,
    SkeletonEntry,
    TensorEntry,
    canonical_json,
    check_name,
    check_plain,
    check_shape,
    digest_of,
    read_header,
    shown,
    write_header,
)
from tersor.artifact.storage import open_regular, read_exactly, write_whole
from tersor.errors import ArtifactError, ModelError

MAGIC = b"\x89TERSOR\n"  # not ASCII, not UTF-8, and broken by a change of line ends
FORMAT_VERSION = 1
_START = struct.Struct("<8sIIQ")
PROLOGUE_BYTES = _START.size + 32

_ONNX_NAMES = {"float32": "FLOAT", "float64": "DOUBLE"}
_ONNX_TYPES = {
    int(onnx.TensorProto.DataType.Value(_ONNX_NAMES.get(name, name.upper()))): name
    for name in DTYPES
}


@dc.dataclass(frozen=True, eq=False)
class Artifact:
    """A network ready to be stored and run: data only.

    `skeleton` is a serialized onnx.ModelProto whose initializers keep name, type and shape but no
    data; `tensors` holds their data by name, sorted (read-only arrays of a type in DTYPES);
    `encodings` the name of each tensor's encoding in the file. `plan` and `provenance` are JSON
    objects.
    """

    skeleton: bytes
    tensors: dict[str, Array]
    encodings: dict[str, str]
    plan: dict[str, Any]
    provenance: dict[str, Any]

    def to_onnx(self) -> onnx.ModelProto:
        """The graph with its initializers put back, bit for bit (each as `raw_data`)."""
        model: onnx.ModelProto = onnx.ModelProto.FromString(self.skeleton)
        for tensor in model.graph.initializer:
            tensor.raw_data = _in_order(self.tensors[tensor.name]).tobytes()
        return model


@dc.dataclass(frozen=True)
class FileSizes:
    """What a file consists of, in bytes; `tensor_bytes` is the sum of its tensor sections."""

    format_version: int
    size_bytes: int
    header_bytes: int
    skeleton_bytes: int
    tensor_bytes: int


def pack(
    graph: onnx.ModelProto,
    *,
    plan: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Artifact:
    """Move the initializers of `graph` (left untouched) into tensors and choose each one's
    smallest encoding.

    `plan` and `provenance` are JSON objects and come back from `load` as they are stored (tuples
    as lists). Raises ModelError on a graph that a file may not hold, ArtifactError on a plan or
    provenance that is no JSON.
    """
    notes = [_plain_copy(plan or {}, "plan"), _plain_copy(provenance or {}, "provenance")]
    try:
        bare = skeletons.strip(graph).SerializeToString(deterministic=True)
        skeletons.parse(bare)
        arrays = {t.name: _to_array(t) for t in graph.graph.initializer}
        tensors = {name: arrays[name] for name in sorted(arrays)}
        _check_amount(tensors)
    except ArtifactError as error:
        raise ModelError(f"this graph cannot be packed: {error}") from None
    encodings = {name: smallest_encoding(array) for name, array in tensors.items()}
    return Artifact(bare, tensors, encodings, notes[0], notes[1])


def save(artifact: Artifact, path: str | os.PathLike[str]) -> int:
    """Write `artifact` to `path` and return the file's size in bytes; equal artifacts give equal
    files.

    All or nothing: on any failure what was at `path` is still there. Raises RunError when the
    place cannot be written, ArtifactError on an artifact that `load` would refuse.
    """
    _check_consistent(artifact)
    packed = skeletons.compress(artifact.skeleton)
    sections, entries = {}, {}
    for name, array in sorted(artifact.tensors.items()):
        encoding = artifact.encodings[name]
        section = ENCODINGS[encoding].encode(_in_order(array)).data
        entries[name] = TensorEntry(
            digest_of(section), _type_name(array), encoding, array.shape, len(section)
        )
        sections[name] = section
    skeleton = SkeletonEntry(len(artifact.skeleton), digest_of(packed), "zlib", len(packed))
    header = write_header(Header(artifact.plan, artifact.provenance, skeleton, entries))
    total = PROLOGUE_BYTES + len(header) + len(packed) + sum(map(len, sections.values()))
    start = _START.pack(MAGIC, FORMAT_VERSION, len(header), total)
    seal = hashlib.sha256(start + header).digest()
    parts: list[bytes | memoryview] = [start + seal + header, packed, *sections.values()]
    write_whole(pathlib.Path(path), parts, total)
    return total


def load(path: str | os.PathLike[str]) -> Artifact:
    """Read a `.tersor` file. Nothing in it is executed or imported, and memory is taken only for
    what it holds.

    Raises ArtifactError naming `path` (and the tensor) on anything that `save` does not write.
    """
    return read_file(path)[0]


def read_file(path: str | os.PathLike[str]) -> tuple[Artifact, FileSizes]:
    """`load`, and what the file consists of."""
    place = pathlib.Path(path)
    with open_regular(place) as (file, size_bytes):
        try:
            return _read(file, size_bytes)
        except ArtifactError as error:
            raise ArtifactError(f"{place}: {error}") from None


def _read(file: FileIO, size_bytes: int) -> tuple[Artifact, FileSizes]:
    header, header_bytes = _read_header(file, size_bytes)
    tensor_bytes = sum(entry.size_bytes for entry in header.tensors.values())
    expected = PROLOGUE_BYTES + header_bytes + header.skeleton.size_bytes + tensor_bytes
    if expected != size_bytes:
        raise ArtifactError(f"the sections take {expected} bytes, the file has {size_bytes}")
    packed = read_exactly(file, header.skeleton.size_bytes, "the skeleton")
    if digest_of(packed.data) != header.skeleton.digest:
        raise ArtifactError("the skeleton is damaged: its digest does not match")
    skeleton = skeletons.decompress(packed.tobytes(), header.skeleton)
    _check_initializers(skeleton, {n: (e.dtype, e.shape) for n, e in header.tensors.items()})
    tensors = {name: _read_tensor(file, name, entry) for name, entry in header.tensors.items()}
    encodings = {name: entry.encoding for name, entry in header.tensors.items()}
    sizes = FileSizes(
        FORMAT_VERSION, size_bytes, header_bytes, header.skeleton.size_bytes, tensor_bytes
    )
    return Artifact(skeleton, tensors, encodings, header.plan, header.provenance), sizes


def _read_header(file: FileIO, size_bytes: int) -> tuple[Header, int]:
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
    data = read_exactly(file, header_bytes, "the header").tobytes()
    if hashlib.sha256(start[: _START.size] + data).digest() != start[_START.size :]:
        raise ArtifactError("the header is damaged: its digest does not match")
    return read_header(data), header_bytes


def _read_tensor(file: FileIO, name: str, entry: TensorEntry) -> Array:
    where = f"tensor {shown(name)}"
    data = read_exactly(file, entry.size_bytes, where)
    if digest_of(data.data) != entry.digest:
        raise ArtifactError(f"{where} is damaged: its digest does not match")
    try:
        flat = ENCODINGS[entry.encoding].decode(data, entry.num_elements, DTYPES[entry.dtype])
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from None
    array = flat.reshape(entry.shape)
    array.flags.writeable = False
    return array


def _check_initializers(skeleton: bytes, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """The graph asks for exactly the tensors there are."""
    graph = skeletons.parse(skeleton).graph
    wanted = {t.name: (_ONNX_TYPES.get(t.data_type, ""), tuple(t.dims)) for t in graph.initializer}
    if odd := sorted(set(wanted) ^ set(tensors)):
        state = "has no data" if odd[0] in wanted else "is not part of the graph"
        raise ArtifactError(f"tensor {shown(odd[0])} {state}")
    for name, is_ in tensors.items():
        if wanted[name] != is_:
            raise ArtifactError(
                f"tensor {shown(name)} is {is_[0]} {shown(is_[1])}, "
                f"the graph wants {wanted[name][0]} {shown(wanted[name][1])}"
            )


def _check_consistent(artifact: Artifact) -> None:
    """An artifact built by hand is held to the same rules as a file."""
    check_plain(artifact.plan, "plan")
    check_plain(artifact.provenance, "provenance")
    _check_amount(artifact.tensors)
    if artifact.encodings.keys() != artifact.tensors.keys():
        raise ArtifactError("encodings must name exactly the tensors")
    for name, encoding in artifact.encodings.items():
        if encoding not in ENCODINGS or not ENCODINGS[encoding].accepts(
            artifact.tensors[name].dtype
        ):
            raise ArtifactError(f"tensor {shown(name)} cannot be encoded as {shown(encoding)}")
    kinds = {name: (_type_name(array), array.shape) for name, array in artifact.tensors.items()}
    _check_initializers(artifact.skeleton, kinds)


def _check_amount(tensors: dict[str, Array]) -> None:
    if len(tensors) > MAX_TENSORS:
        raise ArtifactError(f"there are {len(tensors)} tensors; at most {MAX_TENSORS} are allowed")
    for name, array in tensors.items():
        check_name(name)
        check_shape(list(array.shape), array.itemsize, f"tensor {shown(name)}")
    total = sum(array.nbytes for array in tensors.values())
    if total > MAX_DECODED_BYTES:
        raise ArtifactError(
            f"the tensors take {total} bytes; at most {MAX_DECODED_BYTES} are allowed"
        )


def _to_array(tensor: onnx.TensorProto) -> Array:
    where = f"initializer {shown(tensor.name)}"
    if tensor.data_type not in _ONNX_TYPES:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        raise ArtifactError(f"{where} is of type {kind}; allowed are {', '.join(DTYPES)}")
    if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ArtifactError(f"{where} keeps {skeletons.EXTERNAL}")
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{where}: its data does not match its shape and type ({error})"
        ) from None
    array = np.ascontiguousarray(array, DTYPES[_ONNX_TYPES[tensor.data_type]]).reshape(array.shape)
    array.flags.writeable = False
    return array


def _type_name(array: Array) -> str:
    if array.dtype.name not in DTYPES:
        raise ArtifactError(
            f"a tensor is of type {array.dtype.name}; allowed are {', '.join(DTYPES)}"
        )
    return array.dtype.name


def _in_order(array: Array) -> Array:
    """C-contiguous and little-endian; a view where it already is."""
    return np.ascontiguousarray(array, DTYPES[array.dtype.name]).reshape(array.shape)


def _plain_copy(value: dict[str, Any], where: str) -> dict[str, Any]:
    check_plain(value, where)
    copy: dict[str, Any] = json.loads(canonical_json(value))
    return copy
