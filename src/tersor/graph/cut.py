"""Pieces of an ONNX graph: what runs before a node, and what runs from there on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

Array = npt.NDArray[Any]


def live_values(graph: onnx.ModelProto, index: int) -> list[str]:
    """Names of the values that exist before node `index` runs and are read by it, by a later node or
    as an output of the graph; initializers are not among them."""
    held = {i.name for i in graph.graph.initializer}
    known = [i.name for i in graph.graph.input if i.name not in held]
    known += [name for node in graph.graph.node[:index] for name in node.output if name]
    wanted = {name for node in graph.graph.node[index:] for name in node.input}
    wanted |= {output.name for output in graph.graph.output}
    return [name for name in known if name in wanted]


def piece(
    graph: onnx.ModelProto, start: int, stop: int, given: Mapping[str, Array]
) -> onnx.ModelProto:
    """The nodes `start` to `stop` (exclusive) as a graph of their own.

    Its inputs are `given`, by name with an example of each: their dtypes and shapes are kept, and
    the first dimension of values is free. An initializer among `given` becomes an input of fixed
    shape. The outputs are what the piece makes and the rest of `graph` reads.
    """
    nodes = graph.graph.node[start:stop]
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in node.input}
    held = {i.name for i in graph.graph.initializer}
    cut = onnx.ModelProto()
    cut.ir_version = graph.ir_version
    cut.opset_import.extend(graph.opset_import)
    cut.graph.name = graph.graph.name
    cut.graph.node.extend(nodes)
    cut.graph.initializer.extend(
        i for i in graph.graph.initializer if i.name in read and i.name not in given
    )
    for name, example in given.items():
        if name not in read:
            continue
        shape = list(example.shape) if name in held else ["batch", *example.shape[1:]]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(example.dtype))
        cut.graph.input.append(
            helper.make_tensor_value_info(name, kind, shape if example.ndim else [])
        )
    cut.graph.value_info.extend(v for v in graph.graph.value_info if v.name in made)
    # Types are left to the engine: a value between the nodes may be of any.
    cut.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in live_values(graph, stop) if name in made
    )
    return cut
