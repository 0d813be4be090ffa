"""ONNX Runtime on the CPU: the engine that is always there."""

from __future__ import annotations

import functools
import pathlib
import platform
import re
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tersor.engines.load import (
    ENGINES,
    FloatArray,
    checked_batch,
    first_line,
    graph_of,
    serialized,
)
from tersor.errors import EngineError


@ENGINES.register("onnxruntime")
class OnnxRuntimeSession:
    """A session of an onnx.ModelProto, or of anything whose `to_onnx()` gives one."""

    engine = "onnxruntime"
    may_be_chosen = True

    def __init__(self, model: Any, threads: int) -> None:
        self.threads = threads
        self._session = self._opened(graph_of(model, self.engine))
        found = self._session.get_inputs()
        if len(found) != 1 or found[0].type != "tensor(float)":
            raise EngineError(
                f"{self.engine}: the graph's inputs are {[(i.name, i.type) for i in found]}; "
                "expected one, of float32 images"
            )
        self._name = found[0].name
        self._shape = tuple(d if isinstance(d, int) else None for d in found[0].shape)

    def _opened(self, graph: onnx.ModelProto) -> Any:
        return inference_session(graph, self.threads)

    def run(self, batch: FloatArray) -> FloatArray:
        """Logits (N, classes) float32 of images (N, C, H, W) float32."""
        inputs = checked_batch(batch, self._shape, self.engine)
        try:
            (logits,) = self._session.run(None, {self._name: inputs})
        except Exception as error:  # the library's exceptions have no common class
            raise EngineError(
                f"{self.engine}: running the graph failed: {first_line(error)}"
            ) from None
        return np.asarray(logits, np.float32)


def inference_session(graph: onnx.ModelProto, threads: int, *, optimize: bool = True) -> Any:
    """ONNX Runtime's own session of `graph`, for more than logits. Raises EngineError."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    # Its threads would spin on after a run and slow down whatever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if _sums_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if _only_weights_quantized(graph):
        # Else the weights would be dequantized again in every run.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    model = serialized(graph, "onnxruntime")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's exceptions have no common class
        raise EngineError(f"onnxruntime: the graph cannot be loaded: {first_line(error)}") from None


def _only_weights_quantized(graph: onnx.ModelProto) -> bool:
    ops = {node.op_type for node in graph.graph.node}
    return "DequantizeLinear" in ops and "QuantizeLinear" not in ops


@functools.cache
def _sums_saturate() -> bool:
    """Whether this processor's fast kernels add pairs of uint8 x int8 products in 16 bits, which
    overflows.

    x86 without VNNI does; there the exact kernels are asked for. They are several times slower, so
    not elsewhere. Where the flags cannot be read, exactness wins.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return re.search(r"\b(avx512_?vnni|avx_vnni)\b", flags) is None
