"""Tensors that are computed from others of the same file: copies, and products such as the scale of a
bias (input scale times weight scale)."""

from __future__ import annotations

import numpy as np

from tersor.artifact.cursor import Cursor, varint
from tersor.artifact.encoding import Array, Shape
from tersor.errors import ArtifactError

NAME = "derived"
SAME, PRODUCT = 0, 1


def find(
    tensors: dict[str, Array], places: dict[str, int], sizes: dict[str, int]
) -> dict[str, bytes]:
    """Sections by name for the tensors that cost less this way than `sizes`: a byte 0 and the place
    of an equal tensor, or a byte 1 and the places of a float32 scalar and of a float32 tensor whose
    product, rounded once, it is. `places` are those in the graph. What is computed from is stored."""
    found: dict[str, bytes] = {}
    used: set[str] = set()
    seen: dict[tuple[str, Shape, bytes], str] = {}
    scalars = [n for n in places if tensors[n].dtype == np.float32 and tensors[n].size == 1]
    factors = np.array([tensors[n].reshape(-1)[0] for n in scalars], np.float32)
    by_shape: dict[Shape, list[str]] = {}
    for name in places:
        if tensors[name].dtype == np.float32:
            by_shape.setdefault(tensors[name].shape, []).append(name)
    for name in places:
        array = tensors[name]
        if name in used or array.size == 0 or array.nbytes > 1 << 20:
            continue
        key = (array.dtype.name, array.shape, array.tobytes())
        if key in seen:
            section = bytes([SAME]) + varint(places[seen[key]])
            sources = [seen[key]]
        else:
            seen[key] = name
            other = _product(name, tensors, scalars, factors, by_shape, found)
            if other is None:
                continue
            section = bytes([PRODUCT]) + b"".join(varint(places[each]) for each in other)
            sources = list(other)
        if len(section) < sizes[name]:
            found[name] = section
            used.update(sources)
            if seen.get(key) == name:
                del seen[key]
    return found


def _product(
    name: str,
    tensors: dict[str, Array],
    scalars: list[str],
    factors: Array,
    by_shape: dict[Shape, list[str]],
    found: dict[str, bytes],
) -> tuple[str, str] | None:
    array = tensors[name]
    if array.dtype != np.float32 or array.size < 2:
        return None
    first = array.reshape(-1)[0]
    with np.errstate(all="ignore"):
        for other in by_shape[array.shape]:
            if other == name or other in found:
                continue
            for place in np.flatnonzero(factors * tensors[other].reshape(-1)[0] == first):
                scalar = scalars[place]
                product = factors[place] * tensors[other]
                if scalar not in found and product.tobytes() == array.tobytes():
                    return scalar, other
    return None


def compute(
    data: memoryview, shape: Shape, dtype: np.dtype[np.generic], stored: list[Array | None]
) -> Array:
    """The tensor of a section, from the tensors of the graph in order (None: not stored itself).
    Raises ArtifactError."""
    cursor = Cursor(data)
    form = cursor.byte(PRODUCT, "how a tensor is derived")
    sources = [_source(cursor, stored) for _ in range(1 + form)]
    cursor.end()
    last = sources[-1]
    if last.shape != shape or any(each.dtype != dtype for each in sources):
        raise ArtifactError("a tensor is derived from one of another shape or type")
    if form == SAME:
        return last.copy()
    if dtype != np.float32 or sources[0].size != 1:
        raise ArtifactError("a product is of a float32 scalar and a float32 tensor")
    with np.errstate(all="ignore"):
        return np.asarray(sources[0].reshape(-1)[0] * last, np.float32)


def _source(cursor: Cursor, stored: list[Array | None]) -> Array:
    place = cursor.varint(len(stored) - 1, "the place of a tensor")
    found = stored[place]
    if found is None:
        raise ArtifactError("a tensor is derived from one that is derived itself")
    return found
