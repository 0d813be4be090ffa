"""The dense twin of a graph: the same operations on the same shapes, with no zero among the activations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tersor.graph.layers import WEIGHT_OPS, graph_layers

FloatArray = npt.NDArray[np.float32]
BIAS = 0.1
# By the place of an input of BatchNormalization: scale, bias, mean, variance.
NORM_INPUTS = {1: 1.0, 2: BIAS, 3: 0.0, 4: 1.0}


def dense_twin(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a float graph whose layers give positive values for positive images: their weights are the
    magnitudes over their sum, so that each output is a mean of inputs, and biases are 0.1.

    It says what an engine gains from the zeros that ReLU makes: nothing but the values differs. Graphs
    with other operations between the layers may still make zeros; count them.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(graph)
    held = {i.name: i for i in twin.graph.initializer}
    axes = {layer.weight: layer.axis for layer in graph_layers(graph)}
    for name, axis in axes.items():
        weight = np.abs(numpy_helper.to_array(held[name]).astype(np.float32))
        others = tuple(a for a in range(weight.ndim) if a != axis)
        sums = weight.sum(others, keepdims=True)
        even = np.float32(1 / (weight.size / weight.shape[axis]))
        _put(held[name], np.where(sums > 0, weight / np.where(sums > 0, sums, 1), even))
    for node in twin.graph.node:
        fills: dict[int, float] = {}
        if node.op_type in WEIGHT_OPS:
            fills = {2: BIAS}
        elif node.op_type == "BatchNormalization":
            fills = NORM_INPUTS
        elif node.op_type in ("Add", "Mul"):
            fills = dict.fromkeys((0, 1), BIAS if node.op_type == "Add" else 1.0)
        for place, value in fills.items():
            name = node.input[place] if place < len(node.input) else ""
            if name in held and name not in axes and _is_float(held[name]):
                _put(held[name], np.full(tuple(held[name].dims), value, np.float32))
    return twin


def _is_float(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.FLOAT


def _put(tensor: onnx.TensorProto, values: npt.NDArray[np.floating]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
