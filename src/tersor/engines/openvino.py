"""OpenVINO on the CPU, where the extra `openvino` is installed."""

from __future__ import annotations

import functools
import importlib
import pathlib
import sys
from typing import Any

import numpy as np

from tersor.engines.load import (
    ENGINES,
    FloatArray,
    checked_batch,
    first_line,
    graph_of,
    serialized,
)
from tersor.errors import EngineError, missing_extra


@ENGINES.register("openvino")
class OpenVinoSession:
    """A session of an onnx.ModelProto, or of anything whose `to_onnx()` gives one.

    One stream of `threads` threads, made for latency. What the graph computes in float is computed
    in float32: without the hint OpenVINO takes bfloat16 in silence where the processor has it, and
    without the group size of 0 it quantizes the inputs of integer weights.
    """

    engine = "openvino"
    precision = "f32"
    may_be_chosen = True
    may_crash = True
    a_stream_a_thread = False

    def __init__(self, model: Any, threads: int) -> None:
        library = _library()
        graph = serialized(graph_of(model, self.engine), self.engine)
        self.threads = threads
        streams = threads if self.a_stream_a_thread else 1
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": str(streams),
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        try:
            read = _machine().read_model(graph, b"")
            compiled = _machine().compile_model(read, "CPU", settings)
        except Exception as error:  # the library's exceptions have no common class
            raise EngineError(
                f"{self.engine}: the graph cannot be loaded: {first_line(error)}"
            ) from None
        found = compiled.inputs
        if len(found) != 1 or found[0].get_element_type() != library.Type.f32:
            kinds = [(i.get_any_name(), i.get_element_type().get_type_name()) for i in found]
            raise EngineError(
                f"{self.engine}: the graph's inputs are {kinds}; expected one, of float32 images"
            )
        self._shape = tuple(
            d.get_length() if d.is_static else None for d in found[0].get_partial_shape()
        )
        self._requests = [compiled.create_infer_request() for _ in range(streams)]

    def run(self, batch: FloatArray) -> FloatArray:
        """Logits (N, classes) float32 of images (N, C, H, W) float32."""
        inputs = checked_batch(batch, self._shape, self.engine)
        try:
            return self._run(inputs)
        except Exception as error:  # the library's exceptions have no common class
            raise EngineError(
                f"{self.engine}: running the graph failed: {first_line(error)}"
            ) from None

    def _run(self, inputs: FloatArray) -> FloatArray:
        (logits,) = self._requests[0].infer([inputs]).values()
        return np.array(logits, np.float32)


@ENGINES.register("openvino_streams")
class OpenVinoStreamsSession(OpenVinoSession):
    """The same with one stream a thread, each on its share of the batch: no thread waits for another
    at the end of every layer. Faster on large batches (4 % at 64 images); at batch 1 one thread
    works alone."""

    engine = "openvino_streams"
    a_stream_a_thread = True

    def _run(self, inputs: FloatArray) -> FloatArray:
        parts = [part for part in np.array_split(inputs, self.threads) if len(part)]
        running = self._requests[: len(parts)]
        for request, part in zip(running, parts, strict=True):
            request.start_async([part])
        for request in running:
            request.wait()
        return np.concatenate(
            [np.array(request.get_output_tensor(0).data, np.float32) for request in running]
        )


@ENGINES.register("openvino_bf16")
class OpenVinoBf16Session(OpenVinoSession):
    """The same with bfloat16 for what the graph computes in float, where the processor has it."""

    engine = "openvino_bf16"
    precision = "bf16"

    def __init__(self, model: Any, threads: int) -> None:
        if not has_bf16():
            raise EngineError(
                "openvino_bf16: this processor has no bfloat16 instructions; use engine 'openvino'"
            )
        super().__init__(model, threads)


def intermediate(model: Any, directory: pathlib.Path) -> pathlib.Path:
    """Write OpenVINO's own form of a graph (model.xml and model.bin) into `directory`, floats as they
    are; returns the .xml. Raises EngineError, MissingExtraError."""
    library = _library()
    graph = serialized(graph_of(model, "openvino"), "openvino")
    target = directory / "model.xml"
    try:
        library.save_model(_machine().read_model(graph, b""), target, compress_to_fp16=False)
    except Exception as error:  # the library's exceptions have no common class
        raise EngineError(f"openvino: the graph cannot be written: {first_line(error)}") from None
    return target


def has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor. Raises MissingExtraError."""
    return "BF16" in _machine().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@functools.cache
def _machine() -> Any:
    """OpenVINO's own list of devices; one for all sessions."""
    return _library().Core()


def _library() -> Any:
    """The module `openvino`, imported so that it reports to nobody. Raises MissingExtraError.

    Importing OpenVINO sends an event to its makers from a forked process and writes an identity
    into the home directory. The documented remedy (opt_in_out --opt_out) is a file in the home
    directory too, for all programs of the user. So the library that sends is hidden during the
    import: OpenVINO then uses its own stub for it. A program that has imported OpenVINO before is
    left as it is.
    """
    sender = "openvino_telemetry"
    hidden = "openvino" not in sys.modules and sender not in sys.modules
    if hidden:
        sys.modules[sender] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    except ImportError:
        raise missing_extra("openvino", "openvino", "the engine 'openvino'") from None
    finally:
        if hidden:
            del sys.modules[sender]
