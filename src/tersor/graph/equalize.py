"""Cross-layer equalization: the same function by weights whose channels have like ranges.

A channel can be divided by s > 0 on its way out of one layer and multiplied by s on its way into
the next, where what lies between is positively homogeneous (Nagel 2019, section 4.1).
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tersor.graph.layers import GraphLayer, attribute, graph_layers

FloatArray = npt.NDArray[np.float32]
Factors = npt.NDArray[np.float64]
MATRIX_OPS = ("Gemm", "MatMul")
# Operators f with f(s x) = s f(x) for s > 0: of values, and of a map's channels. Clip is none.
OF_VALUES = ("Relu", "LeakyRelu")
OF_MAPS = (*OF_VALUES, "MaxPool", "AveragePool")
MOST_ROUNDS = 200
TOLERANCE = 1e-4  # of a factor: far below a code of 8 bits
# Of the layer's largest range. A channel below does nothing; to raise it would raise its bias, and
# with it the range of all activations.
NEGLIGIBLE = 1e-4
Pair = tuple[GraphLayer, GraphLayer]


def equalize(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """A graph that computes the same up to rounding, and the pairs of layers (names) equalized.

    A pair is a layer and the only one that reads its output, with nothing but ReLU or a pool of a
    map between. Each channel i gets s_i = sqrt(r1_i / r2_i) (Nagel 2019, eq. 11), r its largest
    magnitude in the two weights, in turns until the ranges of every pair are equal. A channel of
    (nearly) zeros on one side keeps s = 1. The given graph is untouched.
    """
    pairs = _pairs(graph)
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    held = {i.name: i for i in result.graph.initializer}
    firsts, seconds = ({pair[place].name for pair in pairs} for place in (0, 1))
    weights = {
        layer.name: _Weight(layer, result, layer.name in firsts, layer.name in seconds)
        for pair in pairs
        for layer in pair
    }
    for chain in _chains(pairs):
        _converge([(weights[first.name], weights[second.name]) for first, second in chain])
    for weight in weights.values():
        weight.write(held)
    return result, [(first.name, second.name) for first, second in pairs]


def _pairs(graph: onnx.ModelProto) -> list[Pair]:
    """First and second layers, in the order of computing."""
    nodes = graph.graph.node
    reads = Counter(name for node in nodes for name in node.input)
    reads.update(output.name for output in graph.graph.output)
    reader = {name: index for index, node in enumerate(nodes) for name in node.input}
    layers = [x for x in graph_layers(graph) if not x.problem and reads[x.weight] == 1]
    owner = {layer.nodes[0]: layer for layer in layers}
    dims = {i.name: list(i.dims) for i in graph.graph.initializer}
    found = []
    for first in layers:
        node = nodes[first.nodes[0]]
        bias = node.input[2] if len(node.input) > 2 else ""
        channels = dims[first.weight][first.axis]
        if bias and (reads[bias] > 1 or dims.get(bias) not in ([channels], [1, channels])):
            continue
        of_values = first.op in MATRIX_OPS
        value = node.output[0]
        while reads[value] == 1 and value in reader:
            index = reader[value]
            second = owner.get(index) if nodes[index].input[0] == value else None
            if second is not None and (second.op in MATRIX_OPS) == of_values:
                found.append((first, second))
            if nodes[index].op_type not in (OF_VALUES if of_values else OF_MAPS):
                break
            value = nodes[index].output[0]
    return found


def _chains(pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs by chains: a pair's second layer is the first of the next."""
    begin = {first.name: (first, second) for first, second in pairs}
    seconds = {second.name for _, second in pairs}
    chains = []
    for pair in pairs:
        if pair[0].name not in seconds:
            chain = [pair]
            while (following := begin.get(chain[-1][1].name)) is not None:
                chain.append(following)
            chains.append(chain)
    return chains


def _converge(chain: list[tuple[_Weight, _Weight]]) -> None:
    """Give the channels between the layers of each pair equal ranges, pair after pair, till it
    holds."""
    alive = [_alive(first.out_ranges()) & _alive(second.in_ranges()) for first, second in chain]
    for _ in range(MOST_ROUNDS):
        largest = 0.0
        for (first, second), channels in zip(chain, alive, strict=True):
            ratios = first.out_ranges()[channels] / second.in_ranges()[channels]
            first.out_factors[channels] /= np.sqrt(ratios)
            second.in_factors[channels] *= np.sqrt(ratios)
            largest = max(largest, float(np.abs(np.sqrt(ratios) - 1).max(initial=0.0)))
        if largest < TOLERANCE:
            return


def _alive(ranges: Factors) -> npt.NDArray[np.bool_]:
    return np.asarray(ranges > NEGLIGIBLE * ranges.max())


class _Weight:
    """A weight as blocks (groups, outputs, inputs, kernel) of a group each, with factors of its
    channels.

    Of the blocks only the magnitudes that matter are kept: of every row where it is a pair's
    first, of every input where it is a pair's second.
    """

    def __init__(
        self, layer: GraphLayer, graph: onnx.ModelProto, is_first: bool, is_second: bool
    ) -> None:
        node = graph.graph.node[layer.nodes[0]]
        (held,) = [i for i in graph.graph.initializer if i.name == layer.weight]
        self.layer = layer
        self.bias = node.input[2] if is_first and len(node.input) > 2 else ""
        self.groups = int(attribute(node, "group", 1))
        magnitudes = np.abs(self._blocks(numpy_helper.to_array(held))).max(axis=3)
        if not is_first:
            magnitudes = magnitudes.max(axis=1, keepdims=True)
        if not is_second:
            magnitudes = magnitudes.max(axis=2, keepdims=True)
        self.magnitudes = magnitudes
        self.out_factors: Factors = np.ones(self.groups * magnitudes.shape[1])
        self.in_factors: Factors = np.ones(self.groups * magnitudes.shape[2])

    def out_ranges(self) -> Factors:
        """Largest magnitude of every output channel, with the factors so far."""
        scaled = self.magnitudes * self.in_factors.reshape(self.groups, 1, -1)
        return np.asarray(scaled.max(axis=2).reshape(-1) * self.out_factors)

    def in_ranges(self) -> Factors:
        """Largest magnitude of every input channel, with the factors so far."""
        scaled = self.magnitudes * self.out_factors.reshape(self.groups, -1, 1)
        return np.asarray(scaled.max(axis=1).reshape(-1) * self.in_factors)

    def write(self, held: dict[str, onnx.TensorProto]) -> None:
        """Put the weight and the bias, times their factors, in the place of the old ones."""
        values = numpy_helper.to_array(held[self.layer.weight])
        factors = self.out_factors.astype(np.float32)
        blocks = self._blocks(values) * factors.reshape(self.groups, -1, 1, 1)
        blocks *= self.in_factors.astype(np.float32).reshape(self.groups, 1, -1, 1)
        moved = blocks.reshape(np.moveaxis(values, self.layer.axis, 0).shape)
        _replace_(held[self.layer.weight], np.moveaxis(moved, 0, self.layer.axis))
        if self.bias:
            _replace_(held[self.bias], numpy_helper.to_array(held[self.bias]) * factors)

    def _blocks(self, values: FloatArray) -> FloatArray:
        first = np.moveaxis(values, self.layer.axis, 0)
        return first.reshape(self.groups, len(first) // self.groups, first.shape[1], -1)


def _replace_(held: onnx.TensorProto, values: FloatArray) -> None:
    held.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), held.name))
