"""An `Artifact`: a network ready to be stored and run, as data only; `pack` makes it from a graph."""

from __future__ import annotations

import dataclasses as dc
import json
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tersor.artifact import derived
from tersor.artifact import skeleton as skeletons
from tersor.artifact.checks import (
    MAX_DECODED_BYTES,
    MAX_TENSORS,
    canonical_json,
    check_name,
    check_plain,
    check_shape,
    shown,
)
from tersor.artifact.encoding import DTYPES, Array, Shape, count, smallest
from tersor.artifact.encodings import ENCODINGS
from tersor.artifact.grid import grid_of
from tersor.errors import ArtifactError, ModelError

# Steps of context modelling that a file may ask for: so many, and one more for so many elements.
FREE_STEPS, ELEMENTS_A_STEP = 1 << 14, 1 << 10

_ONNX_NAMES = {"float32": "FLOAT", "float64": "DOUBLE"}
_ONNX_TYPES = {
    int(onnx.TensorProto.DataType.Value(_ONNX_NAMES.get(name, name.upper()))): name
    for name in DTYPES
}
Kinds = dict[str, tuple[str, Shape]]  # type and shape of tensors by name


@dc.dataclass(frozen=True, eq=False)
class Artifact:
    """A network ready to be stored and run: data only.

    `skeleton` is a serialized onnx.ModelProto whose initializers keep name, type and shape but no
    data; `tensors` holds their data by name, sorted (read-only arrays of a type in DTYPES);
    `encodings` says how each tensor stands in the file ("derived": computed from others). `plan` and
    `provenance` are JSON objects. `beside` holds named tensors that are no part of the graph, sorted.
    `sizes` has the bytes of the tensors' sections, as far as they are known (of `beside` under
    "state/NAME").
    """

    skeleton: bytes
    tensors: dict[str, Array]
    encodings: dict[str, str]
    plan: dict[str, Any]
    provenance: dict[str, Any]
    beside: dict[str, Array] = dc.field(default_factory=dict)
    sizes: dict[str, int] = dc.field(default_factory=dict)
    # Sections that were made while encodings were compared, with the array each was made from.
    _made: dict[str, tuple[Array, str, bytes]] = dc.field(default_factory=dict, repr=False)

    def to_onnx(self) -> onnx.ModelProto:
        """The graph with its initializers put back, bit for bit (each as `raw_data`)."""
        model: onnx.ModelProto = onnx.ModelProto.FromString(self.skeleton)
        for tensor in model.graph.initializer:
            tensor.raw_data = in_order(self.tensors[tensor.name]).tobytes()
        return model

    def state(self) -> dict[str, Array]:
        """The named tensors beside the graph, which `pack` was given: read-only arrays by name."""
        return dict(self.beside)

    def size_of(self, key: str) -> int:
        """Bytes of the section of tensor `key`."""
        if key not in self.sizes:
            self.sizes[key] = len(self.section(key, self.tensors[key], self.encodings[key]))
        return self.sizes[key]

    def section(self, key: str, array: Array, encoding: str) -> bytes | memoryview:
        """The bytes of `array` in `encoding`; made once. Raises ArtifactError where it does not suit."""
        held = self._made.get(key)
        if held is not None and held[0] is array and held[1] == encoding:
            return held[2]
        data = ENCODINGS[encoding].encode(in_order(array), False)
        if data is None:
            raise ArtifactError(f"tensor {shown(key)} cannot be encoded as {shown(encoding)}")
        return data


def pack(
    graph: onnx.ModelProto,
    *,
    plan: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    state: dict[str, Array] | None = None,
    quick: bool = False,
) -> Artifact:
    """Move the initializers of `graph` (left untouched) into tensors and choose each one's smallest
    encoding by making it.

    `plan` and `provenance` are JSON objects and come back from `load` as they are stored (tuples as
    lists). `state` holds further arrays by name, of a type in DTYPES, that belong to the network but
    not to its graph. `quick` leaves context modelling out: larger by a few percent to a third, many
    times faster. Raises ModelError on a graph that a file may not hold, ArtifactError on a plan,
    provenance or state that it may not.
    """
    notes = [_plain_copy(plan or {}, "plan"), _plain_copy(provenance or {}, "provenance")]
    beside = {name: _kept(name, array) for name, array in sorted((state or {}).items())}
    try:
        bare = skeletons.strip(graph).SerializeToString(deterministic=True)
        skeletons.parse(bare)
        arrays = {t.name: _to_array(t) for t in graph.graph.initializer}
        tensors = {name: arrays[name] for name in sorted(arrays)}
        check_amount([tensors, beside])
    except ArtifactError as error:
        raise ModelError(f"this graph cannot be packed: {error}") from None
    made = _encode({**tensors, **{f"state/{n}": a for n, a in beside.items()}}, quick)
    encodings = {key: encoding for key, (_, encoding, _) in made.items()}
    places = {name: place for place, name in enumerate(arrays)}
    for name, section in derived.find(
        tensors, places, {n: len(m[2]) for n, m in made.items()}
    ).items():
        made[name] = (tensors[name], derived.NAME, section)
        encodings[name] = derived.NAME
    sizes = {key: len(section) for key, (_, _, section) in made.items()}
    return Artifact(bare, tensors, encodings, notes[0], notes[1], beside, sizes, made)


def _encode(arrays: dict[str, Array], quick: bool) -> dict[str, tuple[Array, str, bytes]]:
    """The smallest encoding of each; the largest tensors get the steps of context modelling first."""
    steps = allowed_steps(list(arrays.values()))
    made = {}
    for key in sorted(arrays, key=lambda each: (-arrays[each].size, each)):
        needed = _steps(arrays[key].shape)
        encoding, data = smallest(arrays[key], quick or needed > steps)
        steps -= 0 if quick or needed > steps else needed
        made[key] = (arrays[key], encoding, bytes(data) if encoding != "dense" else data)
    return made  # type: ignore[return-value]


def allowed_steps(arrays: list[Array]) -> int:
    """How many steps of context modelling a file of these tensors may ask for."""
    return FREE_STEPS + sum(array.size for array in arrays) // ELEMENTS_A_STEP


def _steps(shape: Shape) -> int:
    grids = [grid_of(shape, transposed) for transposed in (False, True)]
    return max((grid.steps for grid in grids if grid is not None and grid.affordable), default=0)


def initializer_kinds(skeleton: bytes) -> Kinds:
    """Type and shape of the tensors that the graph asks for, in its order. Raises ArtifactError."""
    graph = skeletons.parse(skeleton).graph
    return {t.name: (_ONNX_TYPES.get(t.data_type, ""), tuple(t.dims)) for t in graph.initializer}


def check_initializers(skeleton: bytes, tensors: Kinds) -> None:
    """Raise ArtifactError unless the graph asks for exactly the tensors there are."""
    wanted = initializer_kinds(skeleton)
    if odd := sorted(set(wanted) ^ set(tensors)):
        state = "has no data" if odd[0] in wanted else "is not part of the graph"
        raise ArtifactError(f"tensor {shown(odd[0])} {state}")
    for name, is_ in tensors.items():
        if wanted[name] != is_:
            raise ArtifactError(
                f"tensor {shown(name)} is {is_[0]} {shown(is_[1])}, "
                f"the graph wants {wanted[name][0]} {shown(wanted[name][1])}"
            )


def check_consistent(artifact: Artifact) -> None:
    """Hold an artifact built by hand to the same rules as a file. Raises ArtifactError."""
    check_plain(artifact.plan, "plan")
    check_plain(artifact.provenance, "provenance")
    check_amount([artifact.tensors, artifact.beside])
    arrays = {**artifact.tensors, **{f"state/{n}": a for n, a in artifact.beside.items()}}
    if artifact.encodings.keys() != arrays.keys():
        raise ArtifactError("encodings must name exactly the tensors")
    for key, encoding in artifact.encodings.items():
        if encoding == derived.NAME and key in artifact.tensors:
            continue
        if encoding not in ENCODINGS or not ENCODINGS[encoding].accepts(arrays[key].dtype):
            raise ArtifactError(f"tensor {shown(key)} cannot be encoded as {shown(encoding)}")
    kinds = {name: (type_name(array), array.shape) for name, array in artifact.tensors.items()}
    check_initializers(artifact.skeleton, kinds)


def check_amount(groups: list[dict[str, Array]]) -> None:
    """Raise ArtifactError for more tensors, or larger ones, than a file may hold."""
    number = sum(map(len, groups))
    if number > MAX_TENSORS:
        raise ArtifactError(f"there are {number} tensors; at most {MAX_TENSORS} are allowed")
    for name, array in (item for group in groups for item in group.items()):
        check_name(name)
        check_shape(list(array.shape), array.itemsize, f"tensor {shown(name)}")
    total = sum(array.nbytes for group in groups for array in group.values())
    if total > MAX_DECODED_BYTES:
        raise ArtifactError(
            f"the tensors take {total} bytes; at most {MAX_DECODED_BYTES} are allowed"
        )


def type_name(array: Array) -> str:
    """The name of the elements' type. Raises ArtifactError for one that a file does not hold."""
    if array.dtype.name not in DTYPES:
        raise ArtifactError(
            f"a tensor is of type {array.dtype.name}; allowed are {', '.join(DTYPES)}"
        )
    return array.dtype.name


def in_order(array: Array) -> Array:
    """C-contiguous and little-endian; a view where it already is."""
    return np.ascontiguousarray(array, DTYPES[array.dtype.name]).reshape(array.shape)


def read_only(array: Array) -> Array:
    """The array, which nobody may write into."""
    array.flags.writeable = False
    return array


def _kept(name: str, array: Array) -> Array:
    held = np.asarray(array)
    try:
        type_name(held)
    except ArtifactError as error:
        raise ArtifactError(f"state {shown(name)}: {error}") from None
    return read_only(np.array(in_order(held), order="C"))


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
    return read_only(array)


def _plain_copy(value: dict[str, Any], where: str) -> dict[str, Any]:
    check_plain(value, where)
    copy: dict[str, Any] = json.loads(canonical_json(value))
    return copy


def num_elements(kinds: Kinds) -> int:
    """Elements of all tensors together."""
    return sum(count(shape) for _, shape in kinds.values())
