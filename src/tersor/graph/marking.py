"""Which values of a graph get codes, so that layers, and what lies between them, run on integers."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Collection

import onnx
from onnx import NodeProto

from tersor.graph.layers import GraphLayer

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
