"""The skeleton: the ONNX graph without the data of its initializers.

`strip` makes it, `check_wire` and `parse` read one that anybody may have written. A few bytes of
protobuf can stand for hundreds in memory, and the parser asks nobody; so `check_wire` walks the
bytes first, adds up what the parsed form will cost, and refuses fields that lead outside the file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from tersor.artifact.checks import MAX_SKELETON_BYTES, shown
from tersor.errors import ArtifactError

MAX_PARSED_BYTES = 24 << 20
MAX_WIRE_DEPTH = 48
# Upper bounds for what the parser takes for one field (measured: 205, 37, 17 bytes).
MESSAGE_COST, TEXT_COST, NUMBER_COST = 224, 64, 48

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
# EPContext makes an engine read another file.
REFUSED_OPERATORS = frozenset({("com.microsoft", "EPContext")})
EXTERNAL = "data outside the file; load it first (onnx.load_external_data_for_model)"
REFUSED_FIELDS = {
    "ModelProto.functions": "functions of its own; inline them (onnx.inliner)",
    "ModelProto.training_info": "training graphs",
    "ModelProto.configuration": "device configurations",
    "GraphProto.sparse_initializer": "sparse initializers; make them dense",
    "TensorProto.segment": "tensors in segments",
    "TensorProto.external_data": EXTERNAL,
    "TensorProto.data_location": EXTERNAL,
}

_STRING, _BYTES, _MESSAGE = 9, 12, 11  # FieldDescriptor.TYPE_*
_Fields = dict[int, tuple[str, int, Any]]


def strip(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `graph` whose initializers keep name, type and shape only.

    Exporters' notes (the `doc_string` and `metadata_props` below the model, the model's `pkg.`
    properties) are left out: they hold source code and paths of the machine that exported.
    """
    bare = onnx.ModelProto()
    _copy_fields(graph, bare, {"graph", "metadata_props"})
    bare.metadata_props.extend(p for p in graph.metadata_props if not p.key.startswith("pkg."))
    _copy_fields(graph.graph, bare.graph, {"initializer"})
    for tensor in graph.graph.initializer:
        bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    for part in graphs(bare.graph):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
        for item in (*part.node, *part.input, *part.output, *part.value_info):
            item.ClearField("doc_string")
            item.ClearField("metadata_props")
        for tensor in (*part.initializer, *_attribute_tensors(part)):
            if tensor.data_location == onnx.TensorProto.DEFAULT:
                tensor.ClearField("data_location")
    return bare


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and all graphs inside attributes of its nodes (the branches of If, the body of
    Loop)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)
            for inner in attribute.graphs:
                yield from graphs(inner)


def parse(skeleton: bytes) -> onnx.ModelProto:
    """The checked skeleton as a model. Raises ArtifactError on anything but a plain ONNX graph."""
    if len(skeleton) > MAX_SKELETON_BYTES:
        raise ArtifactError(
            f"the graph without its initializers takes {len(skeleton)} bytes; at most "
            f"{MAX_SKELETON_BYTES} are allowed; large tensors inside nodes should be initializers"
        )
    check_wire(skeleton)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(skeleton)
    except DecodeError as error:
        raise ArtifactError(f"the skeleton is not an ONNX model ({error})") from None
    if not (model.HasField("graph") and model.HasField("ir_version") and model.opset_import):
        raise ArtifactError("the skeleton lacks an ONNX graph, its ir_version or its opset_import")
    for opset in model.opset_import:
        _check_domain(opset.domain, "the skeleton imports")
    for part in graphs(model.graph):
        for node in part.node:
            _check_domain(
                node.domain, f"node {shown(node.name)} ({shown(node.op_type)}) belongs to"
            )
            if (node.domain, node.op_type) in REFUSED_OPERATORS:
                raise ArtifactError(
                    f"node {shown(node.name)}: {node.op_type} reads other files; not allowed"
                )
    _check_stripped(model.graph)
    return model


def check_wire(data: bytes) -> int:
    """Walk the bytes of a ModelProto without building it, and return an upper bound of the memory it
    takes once parsed. Raises ArtifactError on unknown or refused fields, text that is not UTF-8, deep
    nesting, and on more than MAX_PARSED_BYTES."""
    fields = _fields_of(onnx.ModelProto.DESCRIPTOR)
    stack: list[tuple[_Fields, int]] = []
    position, end, cost = 0, len(data), 0
    while True:
        while position == end:
            if not stack:
                return cost
            fields, end = stack.pop()
        tag, position = _varint(data, position, end)
        name, kind, inner = fields.get(tag >> 3, ("", 0, None))
        if not name or name in REFUSED_FIELDS:
            held = REFUSED_FIELDS.get(name, f"the unknown field {tag >> 3}")
            raise ArtifactError(f"the graph holds {held}; not allowed")
        start, position = _skip(data, position, end, tag & 7)
        size = position - start
        if tag & 7 != 2:
            if kind in (_STRING, _BYTES, _MESSAGE):
                raise ArtifactError(f"the skeleton holds {name} in a wrong form")
            cost += NUMBER_COST
        elif kind == _MESSAGE:
            cost += MESSAGE_COST
            stack.append((fields, end))
            fields, position, end = _fields_of(inner), start, position
        else:
            if kind == _STRING:
                _check_utf8(data[start:position], name)
            # Packed numbers: one byte may become an int64, in an array that grows by doubling.
            cost += TEXT_COST + (size if kind in (_STRING, _BYTES) else 16 * size)
        if cost > MAX_PARSED_BYTES or len(stack) > MAX_WIRE_DEPTH:
            raise ArtifactError(
                f"the graph without its initializers would take more than {MAX_PARSED_BYTES} bytes "
                f"of memory or is nested more than {MAX_WIRE_DEPTH} levels deep"
            )


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ArtifactError("the skeleton is not an ONNX model (a number is cut off or too long)")


def _skip(data: bytes, position: int, end: int, wire_type: int) -> tuple[int, int]:
    """Where the content of the field starts and ends."""
    if wire_type == 0:
        return position, _varint(data, position, end)[1]
    if wire_type == 2:
        size, position = _varint(data, position, end)
    else:
        size = {1: 8, 5: 4}.get(
            wire_type, end
        )  # groups (3, 4) are refused: they always run over the end
    if size > end - position or wire_type in (3, 4, 6, 7):
        raise ArtifactError("the skeleton is not an ONNX model (a field runs over its end)")
    return position, position + size


@functools.cache
def _fields_of(descriptor: Any) -> _Fields:
    return {
        f.number: (f"{descriptor.name}.{f.name}", f.type, f.message_type) for f in descriptor.fields
    }


def _check_utf8(data: bytes, name: str) -> None:
    try:
        data.decode()
    except UnicodeDecodeError:
        raise ArtifactError(f"the skeleton holds {name} that is not UTF-8") from None


def _check_domain(domain: str, what: str) -> None:
    if domain not in DOMAINS:
        known = ", ".join(repr(name) for name in sorted(DOMAINS))
        raise ArtifactError(f"{what} the operator domain {shown(domain)}; allowed are {known}")


def _check_stripped(graph: onnx.GraphProto) -> None:
    seen: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in seen:
            raise ArtifactError(f"the graph holds the initializer {shown(tensor.name)} twice")
        seen.add(tensor.name)
        if {field.name for field, _ in tensor.ListFields()} - {"name", "data_type", "dims"}:
            raise ArtifactError(f"the skeleton holds data of tensor {shown(tensor.name)}")


def _copy_fields(source: Any, target: Any, leave_out: set[str]) -> None:
    """Copy all set fields but `leave_out`; copying the whole first would double a large model's
    memory."""
    for field, value in source.ListFields():
        if field.name in leave_out:
            continue
        if isinstance(value, int | float | str | bytes):
            setattr(target, field.name, value)
        elif hasattr(value, "MergeFrom") and not hasattr(value, "ListFields"):
            getattr(target, field.name).MergeFrom(value)
        else:
            getattr(target, field.name).CopyFrom(value)


def _attribute_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
