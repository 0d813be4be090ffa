"""What is inside an artifact or a file, as rows."""

from __future__ import annotations

import dataclasses as dc
import os
from typing import Any

import numpy as np

from tersor.artifact.artifact import Artifact
from tersor.artifact.encoding import Array
from tersor.artifact.format import load, read_file


def inspect(source: Artifact | str | os.PathLike[str]) -> list[dict[str, Any]]:
    """One JSON-ready row per tensor, by name, those of the state last: name, shape, dtype, encoding,
    size_bytes (of its section), bits_per_weight (encoded bits per element; 0 where there is no
    element) and density (share of elements that are not zero, 0 to 1). A path is loaded, with the
    errors of `load`."""
    artifact = source if isinstance(source, Artifact) else load(source)
    beside = {f"state/{name}": array for name, array in artifact.beside.items()}
    return [
        _row(key, array, artifact.encodings[key], artifact.size_of(key))
        for part in (artifact.tensors, beside)
        for key, array in sorted(part.items())
    ]


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON-ready account of the file at `path`, which is read and checked in full: `layers`
    (rows of `inspect`), format_version, size_bytes and its parts header_bytes, skeleton_bytes,
    tensor_bytes, and plan, provenance."""
    artifact, sizes = read_file(path)
    return {
        **dc.asdict(sizes),
        "layers": inspect(artifact),
        "plan": artifact.plan,
        "provenance": artifact.provenance,
    }


def _row(key: str, array: Array, encoding: str, size_bytes: int) -> dict[str, Any]:
    count = max(array.size, 1)
    return {
        "name": key,
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "encoding": encoding,
        "size_bytes": size_bytes,
        "bits_per_weight": 8 * size_bytes / count,
        "density": int(np.count_nonzero(array)) / count,
    }
