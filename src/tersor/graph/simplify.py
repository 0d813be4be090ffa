"""Exact rewriting of pools that the exporter spells out, into operators that engines run fast."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from tersor.graph.layers import attribute, value_shapes


def simplify_pools_(graph: onnx.ModelProto) -> None:
    """In place: a mean over all of a map becomes GlobalAveragePool, and an adaptive pool that
    enlarges a 1x1 map (Transpose, GatherND, Transpose, ReduceMean) becomes Expand: copies of one
    value."""
    shapes = value_shapes(graph)
    constants = {i.name: i for i in graph.graph.initializer}
    for node in list(graph.graph.node):
        if node.op_type != "ReduceMean":
            continue
        source = _enlarged(graph, node, shapes)
        if source is not None:
            height, width = shapes[node.output[0]][2:]
            target = f"{node.output[0]}_shape"
            graph.graph.initializer.append(
                numpy_helper.from_array(np.array([1, 1, height, width], np.int64), target)
            )
            _replace_(node, "Expand", [source, target])
        elif _is_global(node, shapes, constants):
            _pool_globally_(graph, node)
    _remove_unused_(graph)


def _is_global(
    node: onnx.NodeProto, shapes: dict[str, list[int]], constants: dict[str, onnx.TensorProto]
) -> bool:
    if len(node.input) < 2 or node.input[1] not in constants:
        return False
    shape = shapes.get(node.input[0], [])
    axes = sorted(int(a) % 4 for a in numpy_helper.to_array(constants[node.input[1]]))
    return len(shape) == 4 and axes == [2, 3]


def _pool_globally_(graph: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """GlobalAveragePool, which keeps the 1x1 map, and Flatten where the mean dropped it."""
    source = node.input[0]
    if attribute(node, "keepdims", 1):
        _replace_(node, "GlobalAveragePool", [source])
        return
    pooled = f"{node.output[0]}_map"
    place = list(graph.graph.node).index(node)
    _replace_(node, "Flatten", [pooled])
    pool = onnx.helper.make_node("GlobalAveragePool", [source], [pooled], name=f"{pooled}_pool")
    graph.graph.node.insert(place, pool)


def _enlarged(
    graph: onnx.ModelProto, mean: onnx.NodeProto, shapes: dict[str, list[int]]
) -> str | None:
    """The 1x1 map whose copies `mean` ends in, or None where the chain is any other.

    Gathering from one position gives that position whatever the indices are, and so does the mean.
    """
    made_by = {name: node for node in graph.graph.node for name in node.output}
    chain = [mean]
    for _ in range(3):
        before = made_by.get(chain[-1].input[0])
        if before is None:
            return None
        chain.append(before)
    _, after, gather, first = chain
    if [n.op_type for n in chain[1:]] != ["Transpose", "GatherND", "Transpose"]:
        return None
    if _perm(first) != [2, 3, 0, 1] or _perm(after) != [4, 5, 0, 1, 2, 3]:
        return None
    assert gather.op_type == "GatherND"
    before_shape, after_shape = shapes.get(first.input[0], []), shapes.get(mean.output[0], [])
    if before_shape[2:] != [1, 1] or len(after_shape) != 4 or 0 in after_shape[1:]:
        return None
    return str(first.input[0])


def _perm(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])


def _replace_(node: onnx.NodeProto, op: str, inputs: list[str]) -> None:
    del node.input[:], node.attribute[:]
    node.op_type = op
    node.input.extend(inputs)


def _remove_unused_(graph: onnx.ModelProto) -> None:
    """Drop nodes and initializers that nothing reads any more."""
    outputs = {o.name for o in graph.graph.output}
    while True:
        read = {name for node in graph.graph.node for name in node.input} | outputs
        unused = [n for n in graph.graph.node if not read & set(n.output)]
        if not unused:
            break
        for node in unused:
            graph.graph.node.remove(node)
    for constant in [i for i in graph.graph.initializer if i.name not in read]:
        graph.graph.initializer.remove(constant)
    written = read | {name for node in graph.graph.node for name in node.output}
    for info in [v for v in graph.graph.value_info if v.name not in written]:
        graph.graph.value_info.remove(info)
