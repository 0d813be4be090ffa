"""Quantized forms of an ONNX graph: QuantizeLinear/DequantizeLinear pairs, integer products,
coded weights.

All functions build a new graph and leave the given one untouched. The codes of a weight are called
`NAME_quantized`, beside `NAME_scale`, `NAME_zero_point` and, where the levels are no whole numbers,
`NAME_levels`; they have the shape and order of the original weight.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

from tersor.graph.layers import GraphLayer
from tersor.graph.marking import Activations
from tersor.tensors.affine import SMALLEST_SCALE, quantize
from tersor.tensors.grids import Grid

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
# Scale and zero point of the codes of an activation.
Affine = tuple[np.float32, np.uint8]


@dc.dataclass(frozen=True, eq=False)
class WeightCodes:
    """The codes of one layer's weight: `indexes` (O, K) uint8 into the levels of `grid`, K the
    weights of one output channel in C order."""

    layer: GraphLayer
    grid: Grid
    indexes: Array
    shape: tuple[int, ...]

    def values(self) -> FloatArray:
        """The weight that these codes stand for, in its own shape, float32."""
        return self.shaped(self.grid.decode(self.indexes))

    def shaped(self, matrix: Array) -> Array:
        """`matrix` (O, K) in the weight's own shape and order."""
        return as_weight(matrix, self.shape, self.layer.axis)


def as_matrix(weight: Array, axis: int) -> Array:
    """A copy of `weight`, any shape, as (O, K): the output channels of `axis` first, the rest in C
    order."""
    first = np.moveaxis(weight, axis, 0)
    return np.array(first.reshape(first.shape[0], -1), order="C")


def as_weight(matrix: Array, shape: tuple[int, ...], axis: int) -> Array:
    """The inverse of `as_matrix` for a weight of `shape`."""
    axis %= len(shape)
    first = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.ascontiguousarray(np.moveaxis(matrix.reshape(first), 0, axis))


def on_grid(weight: Array, axis: int, grid: Grid) -> FloatArray:
    """`weight` with every element at the nearest value of `grid`, float32, same shape."""
    matrix = grid.decode(grid.encode(as_matrix(weight, axis)))
    return np.asarray(as_weight(matrix, weight.shape, axis), np.float32)


def smallest_weight_scale(
    graph: onnx.ModelProto, layer: GraphLayer, input_scales: Sequence[np.float32]
) -> Array:
    """The least weight scale, () or (O,), at which the layer's bias, stored at input scale * weight
    scale, fits int32. `input_scales` has one entry a node of the layer."""
    held = {i.name: i for i in graph.graph.initializer}
    least: Array = np.zeros(1, np.float64)
    for index, input_scale in zip(layer.nodes, input_scales, strict=True):
        node = graph.graph.node[index]
        found = held.get(node.input[2]) if len(node.input) > 2 else None
        bias = np.zeros(1, np.float32) if found is None else numpy_helper.to_array(found)
        needed = (np.abs(bias) / 2.0**30 + SMALLEST_SCALE) / float(input_scale)
        # one weight for several inputs and biases
        least = np.maximum(least, needed if len(layer.nodes) == 1 else needed.max())
    return np.asarray(least if least.size > 1 else least[0], np.float32)


def shifted_biases(
    graph: onnx.ModelProto, layers: Sequence[GraphLayer], shifts: Mapping[str, Array]
) -> onnx.ModelProto:
    """The graph with `shifts` (layer name -> (O,)) taken from the biases of `layers`; a convolution
    or Gemm without a bias gets one. A MatMul has no place for one and stays as it is."""
    build, nodes = _Rewriting(graph), graph.graph.node
    chosen = {index: layer for layer in layers for index in layer.nodes}
    for index, original in enumerate(nodes):
        node = build.copy(original)
        if index in chosen and node.op_type != "MatMul":
            layer = chosen[index]
            held = build.originals.get(node.input[2]) if len(node.input) > 2 else None
            bias = 0.0 if held is None else numpy_helper.to_array(held)
            name = f"{layer.name}.bias" if held is None else held.name
            if len({other.name for i, other in chosen.items() if name in nodes[i].input}) > 1:
                name = f"{layer.name}.shifted_bias"
            shift = np.asarray(shifts[layer.name], np.float64)
            build.add(name, (bias - shift).astype(np.float32))
            node.input[:] = [*node.input[:2], name]
        build.nodes.append(node)
    return build.finish(set())


def static_graph(
    graph: onnx.ModelProto,
    weights: Sequence[WeightCodes],
    activations: Activations,
    codes: Mapping[str, Affine],
    activation_bits: int = 8,
) -> onnx.ModelProto:
    """The graph with uint8 codes for `activations` (by `codes` of their roots), int8 for `weights`
    and int32 for their biases."""
    build = _Rewriting(graph, activation_bits)
    chosen = {index: each for each in weights for index in each.layer.nodes}
    outputs = {o.name for o in graph.graph.output}
    for name in activations.root:
        if name in {i.name for i in graph.graph.input}:
            build.pair(name, name, activations.root[name], codes)
    for index, original in enumerate(graph.graph.node):
        node = build.copy(original)
        if index in chosen:
            root = activations.root[original.input[0]]
            build.quantized_layer(node, chosen[index], codes[root][0])
        root = activations.root.get(original.output[0], "")
        if original.output[0] not in outputs and root and build.codes_clamp(original, codes[root]):
            build.pair(original.output[0], node.input[0], root, codes)
            continue
        for place, name in enumerate(node.output):
            if name in outputs and name in activations.root:
                node.output[place] = f"{name}_float"
        build.nodes.append(node)
        for name in original.output:
            if name in activations.root:
                source = f"{name}_float" if name in outputs else name
                build.pair(name, source, activations.root[name], codes)
    return build.finish(outputs)


def dynamic_graph(graph: onnx.ModelProto, weights: Sequence[WeightCodes]) -> onnx.ModelProto:
    """The graph with int8 `weights` in its matrix products; their inputs are quantized at run
    time."""
    build = _Rewriting(graph)
    chosen = {index: each for each in weights for index in each.layer.nodes}
    for index, original in enumerate(graph.graph.node):
        node = build.copy(original)
        if index in chosen:
            build.dynamic_product(node, chosen[index])
        else:
            build.nodes.append(node)
    return build.finish(set())


def weight_only_graph(graph: onnx.ModelProto, weights: Sequence[WeightCodes]) -> onnx.ModelProto:
    """The graph with coded `weights`, turned into floats where they are used."""
    build = _Rewriting(graph)
    chosen = {index: each for each in weights for index in each.layer.nodes}
    for index, original in enumerate(graph.graph.node):
        node = build.copy(original)
        if index in chosen:
            node.input[1] = build.floats(chosen[index])
        build.nodes.append(node)
    return build.finish(set())


class _Rewriting:
    """A graph under construction: nodes in order, initializers by name."""

    def __init__(self, graph: onnx.ModelProto, activation_bits: int = 8) -> None:
        self.source = graph
        self.activation_bits = activation_bits
        self.originals = {i.name: i for i in graph.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.added: dict[str, onnx.TensorProto] = {}
        self.renamed: dict[str, str] = {}

    def copy(self, node: NodeProto) -> NodeProto:
        """A copy of `node` that reads the values that replaced its inputs."""
        copied = NodeProto()
        copied.CopyFrom(node)
        for place, name in enumerate(copied.input):
            copied.input[place] = self.renamed.get(name, name)
        return copied

    def add(self, name: str, values: Any) -> str:
        """Put an initializer in, once."""
        if name not in self.added:
            self.added[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node with one output, named after it."""
        self.nodes.append(
            helper.make_node(op, inputs, [output], name=f"{output}_{op}", **attributes)
        )
        return output

    def pair(self, name: str, source: str, root: str, codes: Mapping[str, Affine]) -> None:
        """Quantize and dequantize the value `source`; later readers of `name` get the dequantized
        one."""
        scale = self.add(f"{root}_scale", codes[root][0])
        zero_point = self.add(f"{root}_zero_point", codes[root][1])
        coded = self.node("QuantizeLinear", [source, scale, zero_point], f"{name}_quantized")
        if self.activation_bits < 8:  # the operator's own codes end at 255
            limits = [
                self.add(f"{side}_code", np.uint8(value))
                for side, value in (("lowest", 0), ("highest", 2**self.activation_bits - 1))
            ]
            coded = self.node("Clip", [coded, *limits], f"{name}_limited")
        target = name if source != name else f"{name}_dequantized"
        self.node("DequantizeLinear", [coded, scale, zero_point], target)
        self.renamed[name] = target

    def codes_clamp(self, node: NodeProto, code: Affine) -> bool:
        """Whether `node` is a Relu or Clip whose limits lie at the ends of the codes of its output:
        without it every value gets the same code, and engines merge what comes before."""
        limits = {"Relu": [0.0, np.inf]}.get(node.op_type)
        if node.op_type == "Clip":
            held = [self.originals[name] for name in node.input[1:] if name in self.originals]
            if len(held) == 2:
                limits = [float(numpy_helper.to_array(each)) for each in held]
        if limits is None:
            return False
        lowest, highest = quantize(np.array(limits, np.float32), *code, dtype=np.uint8)
        return bool(lowest == 0 and highest >= 2**self.activation_bits - 1)

    def integers(self, weight: WeightCodes) -> Array:
        """Put whole-number codes in, once, and return their scale, () or (O,)."""
        grid, name = weight.grid, weight.layer.weight
        assert grid.integers and grid.scale.shape[1] == 1, "integer kernels take no groups"
        scale = grid.scale.reshape(-1) if len(grid.scale) > 1 else grid.scale.reshape(())
        self.add(f"{name}_quantized", weight.shaped(grid.levels.astype(np.int8)[weight.indexes]))
        self.add(f"{name}_scale", scale)
        self.add(f"{name}_zero_point", grid.zero_point.astype(np.int8).reshape(scale.shape))
        return np.asarray(scale, np.float32)

    def dequantized(self, weight: WeightCodes, scale: Array) -> str:
        """The name of a weight of whole-number codes as float again."""
        held = weight.layer.weight
        name = f"{held}_dequantized"
        if not any(name in node.output for node in self.nodes):
            inputs = [f"{held}_{part}" for part in ("quantized", "scale", "zero_point")]
            axis = {"axis": weight.layer.axis} if scale.ndim else {}
            self.node("DequantizeLinear", inputs, name, **axis)
        return name

    def floats(self, weight: WeightCodes) -> str:
        """The name of any coded weight as float again; an engine computes it once, when it loads."""
        grid, held = weight.grid, weight.layer.weight
        if grid.integers and grid.scale.shape[1] == 1:
            return self.dequantized(weight, self.integers(weight))
        name = f"{held}_dequantized"
        if any(name in node.output for node in self.nodes):
            return name
        coded = grid.levels.astype(np.int8)[weight.indexes] if grid.integers else weight.indexes
        value = self.add(f"{held}_quantized", coded)
        if grid.integers:
            value = self.node("Cast", [value], f"{held}_level", to=onnx.TensorProto.FLOAT)
        else:
            value = self.node("Cast", [value], f"{held}_index", to=onnx.TensorProto.INT32)
            levels = self.add(f"{held}_levels", grid.levels)
            value = self.node("Gather", [levels, value], f"{held}_level")
        groups = np.arange(weight.indexes.shape[1]) // grid.group_size
        for part, op in (("zero_point", "Sub"), ("scale", "Mul")):
            if part == "zero_point" and not grid.zero_point.any():
                continue
            spread = self.add(f"{held}_{part}", np.asarray(getattr(grid, part), np.float32))
            if grid.scale.shape[1] > 1:
                columns = self.add(f"{held}_groups", groups.astype(np.int32))
                spread = self.node("Gather", [spread, columns], f"{held}_{part}_spread", axis=1)
            value = self.node(op, [value, spread], f"{held}_{part}_applied")
        return self._reshaped(value, weight, name)

    def _reshaped(self, value: str, weight: WeightCodes, name: str) -> str:
        """The matrix (O, K) called `value` in the weight's own shape and order, called `name`."""
        axis = weight.layer.axis % len(weight.shape)
        rest = [i for i in range(len(weight.shape)) if i != axis]
        first = np.array([weight.shape[i] for i in (axis, *rest)], np.int64)
        shape = self.add(f"{weight.layer.weight}_shape", first)
        if axis == 0:
            return self.node("Reshape", [value, shape], name)
        value = self.node("Reshape", [value, shape], f"{name}_first")
        order = [(axis, *rest).index(i) for i in range(len(weight.shape))]
        return self.node("Transpose", [value], name, perm=order)

    def quantized_layer(
        self, node: NodeProto, weight: WeightCodes, input_scale: np.float32
    ) -> None:
        """Give `node` an int8 weight and an int32 bias of scale: input scale * weight scale."""
        scale = self.integers(weight)
        node.input[1] = self.dequantized(weight, scale)
        held = self.originals.get(node.input[2]) if len(node.input) > 2 else None
        if held is None:
            return
        bias = numpy_helper.to_array(held)
        bias_scale = np.asarray(scale * input_scale, np.float32)
        name = held.name if len(weight.layer.nodes) == 1 else f"{node.output[0]}_bias"
        along = {"axis": 0} if bias_scale.ndim else {}
        self.add(f"{name}_quantized", quantize(bias, bias_scale, dtype=np.int32, **along))
        self.add(f"{name}_scale", bias_scale)
        inputs = [f"{name}_quantized", f"{name}_scale"]
        node.input[2] = self.node("DequantizeLinear", inputs, f"{name}_dequantized", **along)

    def dynamic_product(self, node: NodeProto, weight: WeightCodes) -> None:
        """Replace a matrix product by DynamicQuantizeLinear and MatMulInteger, in the order the
        engine merges."""
        layer, scale = weight.layer, self.integers(weight)
        end, name = node.output[0], node.output[0]
        parts = [f"{name}_input_{part}" for part in ("quantized", "scale", "zero_point")]
        self.nodes.append(
            helper.make_node(
                "DynamicQuantizeLinear", [node.input[0]], parts, name=f"{name}_quantize"
            )
        )
        codes = f"{layer.weight}_quantized"
        if node.op_type == "Gemm" and layer.axis == 0:  # the engine turns it once, when it loads
            codes = self.node("Transpose", [codes], f"{name}_weight", perm=[1, 0])
        zero_points = [parts[2], f"{layer.weight}_zero_point"]
        product = self.node("MatMulInteger", [parts[0], codes, *zero_points], f"{name}_integer")
        product = self.node("Cast", [product], f"{name}_cast", to=onnx.TensorProto.FLOAT)
        both = self.node("Mul", [parts[1], f"{layer.weight}_scale"], f"{name}_scales")
        assert scale.ndim <= 1
        has_bias = len(node.input) > 2 and bool(node.input[2])
        product = self.node("Mul", [product, both], f"{name}_product" if has_bias else end)
        if has_bias:
            self.node("Add", [product, node.input[2]], end)

    def finish(self, renamed_outputs: set[str]) -> onnx.ModelProto:
        """The new model, without initializers that nothing reads, with the old recorded shapes."""
        model = onnx.ModelProto()
        model.ir_version = self.source.ir_version
        model.producer_name, model.producer_version = "tersor", ""
        model.opset_import.extend(self.source.opset_import)
        graph, old = model.graph, self.source.graph
        graph.name = old.name
        graph.input.extend(old.input)
        graph.output.extend(old.output)
        graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        kept = read - set(self.added)
        graph.initializer.extend(i for n, i in self.originals.items() if n in kept)
        graph.initializer.extend(self.added.values())
        written = {name for node in self.nodes for name in node.output} - renamed_outputs
        graph.value_info.extend(v for v in old.value_info if v.name in written)
        return model
