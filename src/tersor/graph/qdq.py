"""Quantized forms of an ONNX graph: QuantizeLinear/DequantizeLinear pairs, integer products,
integer weights.

All functions build a new graph and leave the given one untouched. The codes of a weight are called
`NAME_quantized`, beside `NAME_scale` and `NAME_zero_point`, in the shape and order of the original.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

from tersor.graph.layers import GraphLayer
from tersor.tensors.affine import SMALLEST_SCALE, choose_affine, choose_symmetric, quantize

Array = npt.NDArray[Any]
# Operators that compute on codes where their inputs are codes, with a range of their own.
ARITHMETIC = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool")
# Operators that only move values: input and output share one range.
MOVING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Expand", "Squeeze", "Unsqueeze")
# Operators that the engine merges into the layer before them.
MERGED = ("Relu", "Clip")


@dc.dataclass(frozen=True)
class Activations:
    """Values of a graph that get codes. `root` maps each to the value whose range it shares."""

    root: dict[str, str]

    @property
    def observed(self) -> list[str]:
        """The values whose ranges must be known, in the order of the graph."""
        return list(dict.fromkeys(self.root.values()))


def activations_to_quantize(graph: onnx.ModelProto, layers: Collection[GraphLayer]) -> Activations:
    """Which values get codes, so that the nodes of `layers`, and what lies between them, run on
    integers."""
    return _Marking(graph, layers).run()


class _Marking:
    """One walk over the nodes in order; a value is marked with all that share its range."""

    def __init__(self, graph: onnx.ModelProto, layers: Collection[GraphLayer]) -> None:
        self.nodes = list(graph.graph.node)
        self.chosen = {index for layer in layers for index in layer.nodes}
        self.constants = {i.name for i in graph.graph.initializer}
        self.outputs = {o.name for o in graph.graph.output}
        self.made_by = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.root: dict[str, str] = {}
        self.integer: set[str] = set()

    def run(self) -> Activations:
        for index, node in enumerate(self.nodes):
            if index in self.chosen:
                self._mark(node.input[0])
                end = self._after_merging(node)
                self.integer.add(end)
                if (
                    node.op_type == "Conv"
                ):  # a matrix product may end in float, a convolution may not
                    self._mark(end)
            elif node.op_type in ARITHMETIC and self._on_integers(node):
                for name in node.input:
                    self._mark(name)
                end = self._after_merging(node)
                self.integer.add(end)
                self._mark(end)
            elif node.op_type in MOVING and node.input[0] in self.integer:
                self.integer.add(node.output[0])
                if node.input[0] in self.root:
                    self._mark(node.output[0])
        order = dict.fromkeys(n for node in self.nodes for n in (*node.input, *node.output))
        return Activations({name: self.root[name] for name in order if name in self.root})

    def _on_integers(self, node: NodeProto) -> bool:
        no_constant = not self.constants.intersection(node.input)
        return no_constant and any(name in self.integer for name in node.input)

    def _after_merging(self, node: NodeProto) -> str:
        name = str(node.output[0])
        readers = self.readers.get(name, [])
        alone = len(readers) == 1 and name not in self.outputs
        return str(readers[0].output[0] if alone and readers[0].op_type in MERGED else name)

    def _mark(self, name: str) -> str:
        if name not in self.root:
            node = self.made_by.get(name)
            moved = node is not None and node.op_type in MOVING
            self.root[name] = self._mark(node.input[0]) if node is not None and moved else name
        return self.root[name]


def static_graph(
    graph: onnx.ModelProto,
    layers: Collection[GraphLayer],
    activations: Activations,
    ranges: Mapping[str, tuple[float, float]],
    granularity: str,
) -> onnx.ModelProto:
    """The graph with uint8 codes for `activations` (by `ranges` of their roots), int8 for the
    weights of `layers` and int32 for their biases."""
    build = _Rewriting(graph)
    codes = {root: choose_affine(*ranges[root]) for root in activations.observed}
    chosen = {index: layer for layer in layers for index in layer.nodes}
    outputs = {o.name for o in graph.graph.output}
    for name in activations.root:
        if name in {i.name for i in graph.graph.input}:
            build.pair(name, name, activations.root[name], codes)
    for index, original in enumerate(graph.graph.node):
        node = build.copy(original)
        if index in chosen:
            root = activations.root[original.input[0]]
            build.quantized_layer(node, chosen[index], codes[root][0], granularity)
        for place, name in enumerate(node.output):
            if name in outputs and name in activations.root:
                node.output[place] = f"{name}_float"
        build.nodes.append(node)
        for name in original.output:
            if name in activations.root:
                source = f"{name}_float" if name in outputs else name
                build.pair(name, source, activations.root[name], codes)
    return build.finish(outputs)


def dynamic_graph(
    graph: onnx.ModelProto, layers: Collection[GraphLayer], granularity: str
) -> onnx.ModelProto:
    """The graph with int8 weights for the matrix products of `layers`; their inputs are quantized
    at run time."""
    build = _Rewriting(graph)
    chosen = {index: layer for layer in layers for index in layer.nodes}
    for index, original in enumerate(graph.graph.node):
        node = build.copy(original)
        if index in chosen:
            build.dynamic_product(node, chosen[index], granularity)
        else:
            build.nodes.append(node)
    return build.finish(set())


def weight_only_graph(
    graph: onnx.ModelProto, layers: Collection[GraphLayer], granularity: str
) -> onnx.ModelProto:
    """The graph with int8 weights for `layers`, dequantized where they are used."""
    build = _Rewriting(graph)
    chosen = {index: layer for layer in layers for index in layer.nodes}
    for index, original in enumerate(graph.graph.node):
        node = build.copy(original)
        if index in chosen:
            scale = build.weight(chosen[index], granularity)
            node.input[1] = build.dequantized(chosen[index], scale)
        build.nodes.append(node)
    return build.finish(set())


class _Rewriting:
    """A graph under construction: nodes in order, initializers by name."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        self.source = graph
        self.originals = {i.name: i for i in graph.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.added: dict[str, onnx.TensorProto] = {}
        self.renamed: dict[str, str] = {}
        self.scales: dict[str, Array] = {}

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

    def pair(self, name: str, source: str, root: str, codes: Mapping[str, tuple[Any, Any]]) -> None:
        """Quantize and dequantize the value `source`; later readers of `name` get the dequantized
        one."""
        scale = self.add(f"{root}_scale", codes[root][0])
        zero_point = self.add(f"{root}_zero_point", codes[root][1])
        coded = self.node("QuantizeLinear", [source, scale, zero_point], f"{name}_quantized")
        target = name if source != name else f"{name}_dequantized"
        self.node("DequantizeLinear", [coded, scale, zero_point], target)
        self.renamed[name] = target

    def weight(self, layer: GraphLayer, granularity: str, smallest: Array | float = 0.0) -> Array:
        """Put the codes of the layer's weight in, once, and return its scale.

        `smallest` bounds the scale from below, so that the bias at input scale * weight scale fits
        int32.
        """
        if layer.weight not in self.scales:
            values = numpy_helper.to_array(self.originals[layer.weight])
            axis = layer.axis if granularity == "per_channel" else None
            scale = np.maximum(choose_symmetric(values, axis), np.asarray(smallest, np.float32))
            scale = scale if axis is not None else scale.max()
            self.scales[layer.weight] = np.asarray(scale, np.float32)
            self.add(f"{layer.weight}_quantized", quantize(values, scale, axis=axis))
            self.add(f"{layer.weight}_scale", self.scales[layer.weight])
            self.add(f"{layer.weight}_zero_point", np.zeros(np.shape(scale), np.int8))
        return self.scales[layer.weight]

    def dequantized(self, layer: GraphLayer, scale: Array) -> str:
        """The name of the layer's weight as float again."""
        name = f"{layer.weight}_dequantized"
        if not any(name in node.output for node in self.nodes):
            inputs = [f"{layer.weight}_{part}" for part in ("quantized", "scale", "zero_point")]
            self.node(
                "DequantizeLinear", inputs, name, **({"axis": layer.axis} if scale.ndim else {})
            )
        return name

    def quantized_layer(
        self, node: NodeProto, layer: GraphLayer, input_scale: np.float32, granularity: str
    ) -> None:
        """Give `node` an int8 weight and an int32 bias of scale: input scale * weight scale."""
        held = self.originals.get(node.input[2]) if len(node.input) > 2 else None
        bias = np.zeros(1, np.float32) if held is None else numpy_helper.to_array(held)
        smallest = (np.abs(bias) / 2.0**30 + SMALLEST_SCALE) / float(input_scale)
        if len(layer.nodes) > 1:  # one weight for several inputs and biases
            smallest = smallest.max()
        scale = self.weight(layer, granularity, smallest)
        node.input[1] = self.dequantized(layer, scale)
        if held is None:
            return
        bias_scale = np.asarray(scale * input_scale, np.float32)
        name = held.name if len(layer.nodes) == 1 else f"{node.output[0]}_bias"
        along = {"axis": 0} if bias_scale.ndim else {}
        self.add(f"{name}_quantized", quantize(bias, bias_scale, dtype=np.int32, **along))
        self.add(f"{name}_scale", bias_scale)
        inputs = [f"{name}_quantized", f"{name}_scale"]
        node.input[2] = self.node("DequantizeLinear", inputs, f"{name}_dequantized", **along)

    def dynamic_product(self, node: NodeProto, layer: GraphLayer, granularity: str) -> None:
        """Replace a matrix product by DynamicQuantizeLinear and MatMulInteger, in the order the
        engine merges."""
        scale = self.weight(layer, granularity)
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
        graph.initializer.extend(i for n, i in self.originals.items() if n in read)
        graph.initializer.extend(self.added.values())
        written = {name for node in self.nodes for name in node.output} - renamed_outputs
        graph.value_info.extend(v for v in old.value_info if v.name in written)
        return model
