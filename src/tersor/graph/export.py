"""From a PyTorch module to the deployment graph: an ONNX model with batch norm folded and names
kept."""

from __future__ import annotations

import contextlib
import copy
import io
import pathlib
import re
import traceback
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from torch import nn

from tersor.errors import ModelError
from tersor.graph.layers import WEIGHT_OPS
from tersor.graph.simplify import simplify_pools_

OPSET = 20
ANY_BATCH = "let forward use x.shape[0] or -1 for the size of the batch, not a fixed number"


def export_onnx(module: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """The graph of `module` in eval mode for float32 images of `input_shape` (C, H, W), any batch
    size.

    Input "input" (batch, C, H, W), one output "output"; opset 20. Batch normalisation is folded
    into the convolutions before it, weights keep their names in the module, and no source paths are
    left inside. The module is untouched. Raises ModelError with the user's line where it cannot be
    traced.
    """
    example = torch.zeros(2, *input_shape)
    failure: ModelError | None = None
    with _ready(module) as ready, _silence():
        try:
            program = torch.onnx.export(
                ready,
                (example,),
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
            assert program is not None
            graph: onnx.ModelProto = program.model_proto
        except Exception as error:
            failure = ModelError(_explain(module, input_shape, error))
    if failure is not None:
        raise failure
    _check_signature(module, graph)
    simplify_pools_(graph)
    _name_weights_(graph, module)
    _strip_(graph)
    _positive_zeros_(graph)
    return graph


def _check_signature(module: nn.Module, graph: onnx.ModelProto) -> None:
    """One input and one output, both of any batch size: the exporter itself accepts a fixed one."""
    name = type(module).__name__
    values = [*graph.graph.input, *graph.graph.output]
    if len(graph.graph.input) != 1 or len(graph.graph.output) != 1:
        raise ModelError(
            f"{name} returns {len(graph.graph.output)} values; a classifier returns one tensor of "
            "logits: wrap it in a module that returns that tensor alone"
        )
    if any(v.type.tensor_type.shape.dim[:1] == [] for v in values):
        raise ModelError(f"{name} returns a number; a classifier returns logits (batch, classes)")
    if any(v.type.tensor_type.shape.dim[0].HasField("dim_value") for v in values):
        raise ModelError(f"{name} works for one batch size only; {ANY_BATCH}")


@contextlib.contextmanager
def _ready(module: nn.Module) -> Iterator[nn.Module]:
    """The module in eval mode, float32 and on the CPU: itself, put back afterwards, or where it
    must be converted a copy."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(
        t.device.type != "cpu" or (t.is_floating_point() and t.dtype != torch.float32)
        for t in tensors
    ):
        yield copy.deepcopy(module).cpu().float().eval()
        return
    training = [(part, part.training) for part in module.modules()]
    try:
        yield module.eval()
    finally:
        for part, was_training in training:
            part.training = was_training


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No words of the exporter: what matters of them is in our error."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _explain(module: nn.Module, input_shape: tuple[int, int, int], error: BaseException) -> str:
    """One message: the model, the innermost reason, the user's line and what to do."""
    causes = [error]
    while (
        cause := causes[-1].__cause__ or causes[-1].__context__
    ) is not None and cause not in causes:
        causes.append(cause)
    text = "\n".join(str(c) for c in causes)
    innermost = causes[-1]
    reason = next((line for line in str(innermost).splitlines() if line.strip()), "")
    line = _user_line(text, causes)
    remedy = "check that it runs on a batch of this shape"
    if "data-dependent" in text.lower() or "GuardOnDataDependent" in text:
        remedy = (
            "replace control flow that depends on tensor values by tensor operations (torch.where)"
        )
    elif "batch" in text and "Constraint" in text:
        remedy = ANY_BATCH
    return (
        f"{type(module).__name__} cannot be exported for an input of shape (batch, "
        f"{', '.join(map(str, input_shape))}): {type(innermost).__name__}: {reason.strip()[:300]}"
        f"{line}; {remedy}"
    )


def _user_line(text: str, causes: list[BaseException]) -> str:
    """Where in the user's file: by the exporter's words, or the last frame outside of libraries."""
    said = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s*([^\n]+)', text)
    frames = [(f, int(n), w, s) for f, n, w, s in said]
    for cause in causes:
        frames += [
            (f.filename, f.lineno or 0, f.name, f.line or "")
            for f in traceback.extract_tb(cause.__traceback__)
        ]
    mine = str(pathlib.Path(__file__))
    own = [f for f in frames if "site-packages" not in f[0] and "<" not in f[0] and f[0] != mine]
    own = [
        f
        for f in own
        if f"{pathlib.Path(torch.__file__).parent}" not in f[0] and "/lib/python" not in f[0]
    ]
    if not own:
        return ""
    file, number, where, source = own[-1]
    return f" (in {where}, {pathlib.Path(file).name} line {number}: {source.strip()[:120]})"


def _name_weights_(graph: onnx.ModelProto, module: nn.Module) -> None:
    """Give back to folded biases and transposed matrices the names they have in the module."""
    initializers = {i.name: i for i in graph.graph.initializer}
    renamed: dict[str, str] = {}
    matrices = {
        name: parameter.detach().cpu().float().numpy().T
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2 and name not in initializers
    }
    for node in graph.graph.node:
        if (
            node.op_type not in WEIGHT_OPS
            or len(node.input) < 2
            or node.input[1] not in initializers
        ):
            continue
        weight = node.input[1]
        if node.op_type == "MatMul" and weight not in renamed:
            held = onnx.numpy_helper.to_array(initializers[weight])
            for name, original in matrices.items():
                if held.shape == original.shape and np.array_equal(held, original):
                    renamed[weight] = name
                    del matrices[name]
                    break
        owner = renamed.get(weight, weight)
        if owner.endswith(".weight") and len(node.input) > 2 and node.input[2] in initializers:
            wanted = f"{owner.removesuffix('.weight')}.bias"
            if wanted not in initializers and wanted not in renamed.values():
                renamed.setdefault(node.input[2], wanted)
    for old, new in renamed.items():
        initializers[old].name = new
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    for info in graph.graph.value_info:
        info.name = renamed.get(info.name, info.name)


def _positive_zeros_(graph: onnx.ModelProto) -> None:
    """-0.0 to 0.0: masking and folding leave signs on zeros, which cost a sparse file its savings."""
    for held in graph.graph.initializer:
        if held.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(held)
            if np.signbit(values[values == 0]).any():
                held.CopyFrom(onnx.numpy_helper.from_array(values + np.float32(0), held.name))


def _strip_(graph: onnx.ModelProto) -> None:
    """Take out what names the machine that exported: stack traces and file paths."""
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.graph.metadata_props[:]
    graph.graph.doc_string = ""
    for part in (*graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    for value in (*graph.graph.input, *graph.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
