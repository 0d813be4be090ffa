"""What a graph computes from its constants alone, by the names that the network's parameters have."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tersor.engines.onnxruntime import inference_session
from tersor.graph.layers import CODES, DECODED, attribute

Array = npt.NDArray[Any]


def constant_values(graph: onnx.ModelProto) -> dict[str, Array]:
    """Float constants of `graph` by name; coded ones as the floats they stand for, under the name
    they had before."""
    values = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    known = set(values)
    nodes = []
    for node in graph.graph.node:
        if node.input and all(name in known or not name for name in node.input):
            known.update(node.output)
            nodes.append(node)
    made = {
        name: name.removesuffix(DECODED)
        for node in nodes
        for name in node.output
        if name.endswith(DECODED)
    }
    found = {n: v for n, v in values.items() if v.dtype == np.float32}
    if made:
        found |= {made[n]: v for n, v in _computed(graph, nodes, list(made)).items()}
    for node in graph.graph.node:
        if node.op_type == "MatMulInteger":
            found |= _dynamic(graph, node, values)
    return found


def right_factors(graph: onnx.ModelProto) -> set[str]:
    """Names, as those of `constant_values`, of the matrices (inputs, outputs) that values are
    multiplied by as they are stored: the transposes of linear layers' weights."""
    return {
        node.input[1].removesuffix(DECODED).removesuffix(CODES)
        for node in graph.graph.node
        if node.op_type in ("MatMul", "MatMulInteger")
        or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
    }


def codes_activations(graph: onnx.ModelProto) -> bool:
    """Whether the graph turns activations into codes, fixed or at run time."""
    return any(n.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for n in graph.graph.node)


def _computed(
    graph: onnx.ModelProto, nodes: list[onnx.NodeProto], names: list[str]
) -> dict[str, Array]:
    part = onnx.helper.make_graph(
        nodes,
        "constants",
        [],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names],
        initializer=list(graph.graph.initializer),
    )
    model = onnx.helper.make_model(
        part, opset_imports=list(graph.opset_import), ir_version=graph.ir_version
    )
    session = inference_session(model, 1, optimize=False)
    return dict(zip(names, session.run(names, {}), strict=True))


def _dynamic(
    graph: onnx.ModelProto, node: onnx.NodeProto, values: dict[str, Array]
) -> dict[str, Array]:
    """The weight of a product of integers, in the shape it had as a float."""
    made_by = {name: each for each in graph.graph.node for name in each.output}
    codes = node.input[1]
    turned = codes in made_by  # the engine gets the transpose of a linear layer's weight
    stored = made_by[codes].input[0] if turned else codes
    name = stored.removesuffix(CODES)
    scale = values[f"{name}_scale"].reshape((-1, 1) if turned else (1, -1))
    zero_point = values[f"{name}_zero_point"].reshape(scale.shape).astype(np.float32)
    return {name: ((values[stored] - zero_point) * scale).astype(np.float32)}
