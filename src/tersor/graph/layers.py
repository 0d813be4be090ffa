"""Layers that hold weights, by name: of a module, and of an ONNX graph."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence

import onnx
from torch import nn

WEIGHT_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
WEIGHT_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What a weight that is stored as codes adds to its name: the codes, and the floats made of them.
CODES, DECODED = "_quantized", "_dequantized"


def weight_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Convolutional and linear layers by qualified name, in the order of the module; a shared one
    once."""
    return [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, WEIGHT_LAYERS)
    ]


@dc.dataclass(frozen=True)
class GraphLayer:
    """One weight of a graph and the nodes that multiply by it (more than one where it is shared).

    `name` is the module's qualified name ("features.0"), `weight` the initializer's
    ("features.0.weight"). `macs` counts multiplications for one image, `num_weights` the elements.
    `axis` is the axis of the output channels in the stored weight.
    """

    name: str
    weight: str
    op: str
    nodes: tuple[int, ...]
    num_weights: int
    macs: int
    axis: int
    problem: str = ""


def graph_layers(graph: onnx.ModelProto) -> list[GraphLayer]:
    """The layers of `graph` in the order they are computed.

    `problem` says why a layer cannot be quantized, where it cannot.
    """
    sizes = {i.name: list(i.dims) for i in graph.graph.initializer}
    shapes = value_shapes(graph)
    found: dict[str, GraphLayer] = {}
    for index, node in enumerate(graph.graph.node):
        if node.op_type not in WEIGHT_OPS or len(node.input) < 2 or node.input[1] not in sizes:
            continue
        weight = node.input[1]
        dims = sizes[weight]
        macs = _macs(node, dims, shapes.get(node.output[0]))
        if weight in found:
            first = found[weight]
            found[weight] = dc.replace(first, nodes=(*first.nodes, index), macs=first.macs + macs)
            continue
        name = weight.removesuffix(".weight")
        problem = _problem(node, dims)
        axis = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else len(dims) - 1
        found[weight] = GraphLayer(
            name, weight, node.op_type, (index,), math.prod(dims), macs, axis, problem
        )
    return list(found.values())


def read_by_layers(graph: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """Of each layer of `graph`, coded or not, by its name: the value that it reads first and the initializer that
    holds its weight, or the codes of it."""
    held = {i.name for i in graph.graph.initializer}
    found: dict[str, tuple[str, str]] = {}
    for node in graph.graph.node:
        if node.op_type not in WEIGHT_OPS or len(node.input) < 2:
            continue
        weight = node.input[1].removesuffix(DECODED)
        stored = weight if weight in held else f"{weight}{CODES}"
        if stored in held:
            found.setdefault(weight.removesuffix(".weight"), (str(node.input[0]), stored))
    return found


def num_weights(graph: onnx.ModelProto) -> int:
    """Elements of the weights of all layers of `graph`, coded or not."""
    sizes = {i.name: math.prod(i.dims) for i in graph.graph.initializer}
    return sum(sizes[stored] for stored in {name for _, name in read_by_layers(graph).values()})


def attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    """A number among the attributes of `node`, or ONNX's default for it."""
    for held in node.attribute:
        if held.name == name:
            return float(onnx.helper.get_attribute_value(held))
    return default


def value_shapes(graph: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of the graph's values as recorded; a dimension without a fixed size is 0."""
    values = [*graph.graph.input, *graph.graph.value_info, *graph.graph.output]
    return {
        v.name: [int(d.dim_value) for d in v.type.tensor_type.shape.dim]
        for v in values
        if v.type.tensor_type.HasField("shape")
    }


def _macs(node: onnx.NodeProto, dims: Sequence[int], shape: Sequence[int] | None) -> int:
    """Multiplications of one image. Without a recorded shape each weight counts once."""
    positions = 1
    if shape is not None:
        spatial = shape[2:] if node.op_type in ("Conv", "ConvTranspose") else shape[1:-1]
        positions = math.prod(max(size, 1) for size in spatial)
    return positions * math.prod(dims)


def _problem(node: onnx.NodeProto, dims: Sequence[int]) -> str:
    if node.op_type == "ConvTranspose":
        return "transposed convolutions have no integer kernel in the engine"
    if node.op_type == "MatMul" and len(dims) != 2:
        return f"its weight has {len(dims)} dimensions; a matrix is expected"
    if node.op_type == "Gemm" and (
        attribute(node, "transA", 0)
        or attribute(node, "alpha", 1) != 1
        or attribute(node, "beta", 1) != 1
    ):
        return "its product is scaled or transposed (Gemm with transA, alpha or beta)"
    return ""
