"""From an engine's name and a model to a session that runs batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from tersor.errors import EngineError, SpecError
from tersor.registry import Registry

FloatArray = npt.NDArray[np.float32]
LARGEST_BYTES = 2**31 - 1  # protobuf's limit, and so that of a graph held in memory
LARGE_BATCH = 64  # where the size does not matter: what is done once a run counts little


class Session(Protocol):
    """A model ready to run on one engine with a fixed number of threads."""

    engine: str
    threads: int

    def run(self, batch: FloatArray) -> FloatArray:
        """Logits (N, classes) of images (N, C, H, W), both float32, N >= 1. Raises EngineError."""
        ...


ENGINES: Registry[Callable[[Any, int], Session]] = Registry("engine")


def open_session(model: Any, *, engine: str = "onnxruntime", threads: int | None = None) -> Session:
    """A session of `model`: an onnx.ModelProto or an Artifact for "onnxruntime", "openvino" and
    "simulation", a torch.nn.Module for "torch".

    `threads` is the number of CPU threads of one run; by default all that this process may use.
    Raises UnknownNameError for an engine nobody registered, SpecError for `threads` below 1,
    EngineError for a model that the engine does not take, MissingExtraError for an engine whose
    library is not installed.
    """
    build = ENGINES[engine]
    if threads is None:
        threads = available_cpus()
    if not isinstance(threads, int) or threads < 1:
        raise SpecError(f"threads must be an integer of at least 1, got {threads!r}")
    return build(model, threads)


def available_cpus() -> int:
    """CPUs this process may run on (a container often holds fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def checked_batch(batch: Any, expected: tuple[int | None, ...], engine: str) -> FloatArray:
    """`batch` as a contiguous array, or EngineError where its type or shape is not `expected`.

    `expected` is (N, C, H, W); None is any size. The type must be float32 already: a silent
    conversion of uint8 images would run un-normalised inputs.
    """
    wanted = f"({', '.join('N' if d is None else str(d) for d in expected)})"
    if not isinstance(batch, np.ndarray):
        raise EngineError(
            f"{engine}: expected a numpy array {wanted} of float32, got {type(batch).__name__}"
        )
    if batch.dtype != np.float32:
        raise EngineError(
            f"{engine}: expected float32 of shape {wanted}, got {batch.dtype} of shape "
            f"{batch.shape}; normalise images first (Splits.normalise)"
        )
    fits = batch.ndim == len(expected) and all(
        want is None or size == want for size, want in zip(batch.shape, expected, strict=True)
    )
    if not fits:
        raise EngineError(f"{engine}: expected a batch of shape {wanted}, got {batch.shape}")
    if len(batch) == 0:
        raise EngineError(f"{engine}: the batch is empty {batch.shape}; give one image at least")
    return np.ascontiguousarray(batch)


def logits_of(session: Session, inputs: FloatArray, batch: int = LARGE_BATCH) -> FloatArray:
    """Logits (N, classes) of `inputs` (N, C, H, W), run in batches of `batch` images."""
    starts = range(0, len(inputs), batch)
    return np.concatenate([session.run(inputs[start : start + batch]) for start in starts])


def graph_of(model: Any, engine: str) -> onnx.ModelProto:
    """The graph in `model`: an onnx.ModelProto, or anything whose `to_onnx()` gives one.

    Raises EngineError for another kind of model, and for a graph without exactly one output.
    """
    graph = model.to_onnx() if callable(getattr(model, "to_onnx", None)) else model
    if not isinstance(graph, onnx.ModelProto):
        raise EngineError(
            f"{engine} runs an onnx.ModelProto or an Artifact, got {type(model).__name__}; "
            "make a graph of a module with tersor.graph.export_onnx(module, input_shape)"
        )
    if len(graph.graph.output) != 1:
        raise EngineError(
            f"{engine}: the graph has {len(graph.graph.output)} outputs; expected one, the logits"
        )
    return graph


def serialized(graph: onnx.ModelProto, engine: str) -> bytes:
    """`graph` as the bytes an engine reads. Raises EngineError for more than LARGEST_BYTES."""
    size = graph.ByteSize()
    if size > LARGEST_BYTES:
        raise EngineError(
            f"{engine}: the graph has {size} bytes; graphs in memory end at {LARGEST_BYTES}; "
            "quantize it"
        )
    return bytes(graph.SerializeToString())


def first_line(error: Exception) -> str:
    """What a library says first, without the lines that speak of its own sources."""
    lines = [line for line in str(error).splitlines() if not line.startswith("Exception from ")]
    return (lines or [type(error).__name__])[0].strip()[:300]
