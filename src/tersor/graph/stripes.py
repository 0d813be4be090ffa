"""Convolutions of a graph whose kernels have empty positions, as smaller ones: the same function but for the order of
sums.

Positions that are empty in all filters leave a smaller kernel (`shrink_kernels_`). Where filters lack different ones
(stripes, Meng 2020) a sum of shifted 1x1 convolutions multiplies by those alone that are there (`split_stripes_`).
Names and attributes tell where each position was: `whole_kernels` puts the kernels together again.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from torch import nn

from tersor.graph.layers import DECODED, GraphLayer, graph_layers, value_shapes, weight_layers

Array = npt.NDArray[Any]
DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dc.dataclass(frozen=True)
class KernelChange:
    """What became of one convolution: its kernel before and after; `reason` says why it was left alone.

    `macs_share` is the share of its multiplications that is left.
    """

    layer: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    macs_share: float = 1.0
    reason: str = ""


def shrink_kernels_(graph: onnx.ModelProto) -> list[KernelChange]:
    """In place: every convolution that has rows, columns or planes of its kernel empty in all filters gets a smaller
    kernel, dilated where a regular part is empty, and other padding.

    Returns all convolutions with kernels of several positions, those left alone with the reason.
    """
    weights = {i.name: i for i in graph.graph.initializer}
    changes = []
    for layer in _convolutions(graph):
        held = weights[layer.weight]
        kernel = tuple(held.dims[2:])
        nodes = [graph.graph.node[index] for index in layer.nodes]
        if reason := _obstacle(graph, layer, nodes):
            changes.append(KernelChange(layer.name, kernel, kernel, reason=reason))
            continue
        weight = numpy_helper.to_array(held)
        boxes = [_box(weight, axis, nodes) for axis in range(len(kernel))]
        after = tuple(len(box) for box in boxes)
        if after == kernel:
            reason = "no row or column of the kernel is empty in all filters and can go"
            changes.append(KernelChange(layer.name, kernel, kernel, reason=reason))
            continue
        smaller = weight[np.ix_(*map(range, weight.shape[:2]), *boxes)]
        held.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(smaller), held.name))
        for node in nodes:
            _fit_(node, boxes, kernel)
        changes.append(
            KernelChange(layer.name, kernel, after, math.prod(after) / math.prod(kernel))
        )
    return changes


def split_stripes_(graph: onnx.ModelProto, names: Collection[str]) -> list[KernelChange]:
    """In place: the convolutions `names` become sums of shifted 1x1 convolutions, one for each position of the kernel,
    of the filters that have a stripe there. Those of `striped_layers` can.

    Whether that is faster is a matter of the engine, the size of the map and the share of empty stripes: measure it
    (`forms_of_stripes`, bench.forms).
    """
    changes = []
    weights = {i.name: i for i in graph.graph.initializer}
    for layer in reversed(striped_layers(graph)):  # the places of those before stay
        if layer.name not in names:
            continue
        (index,) = layer.nodes
        node, weight = graph.graph.node[index], numpy_helper.to_array(weights[layer.weight])
        added, stripes = _Split(graph, layer.name, node, weight).nodes()
        # the graph's nodes stand in an order of computing
        after = list(graph.graph.node)[index + 1 :]
        del graph.graph.node[index:]
        graph.graph.node.extend([*added, *after])
        graph.graph.initializer.remove(weights[layer.weight])
        kernel = weight.shape[2:]
        share = stripes / (len(weight) * math.prod(kernel))
        changes.append(KernelChange(layer.name, kernel, (1,) * len(kernel), share))
    return changes[::-1]


def striped_layers(graph: onnx.ModelProto) -> list[GraphLayer]:
    """The convolutions with empty stripes that could be sums of shifted ones, in the order of computing."""
    weights = {i.name: i for i in graph.graph.initializer}
    shapes = value_shapes(graph)
    found = []
    for layer in _convolutions(graph):
        nodes = [graph.graph.node[index] for index in layer.nodes]
        if len(nodes) > 1 or _obstacle(graph, layer, nodes) or _ints(nodes[0], "group", [1]) != [1]:
            continue
        weight = numpy_helper.to_array(weights[layer.weight])
        sizes = shapes.get(nodes[0].output[0], [0])[2:]
        if len(sizes) == weight.ndim - 2 and all(sizes) and not (weight != 0).any(1).all():
            found.append(layer)
    return found


def forms_of_stripes(
    graph: onnx.ModelProto,
) -> dict[str, tuple[onnx.ModelProto, onnx.ModelProto]]:
    """Each of `striped_layers` alone, as it is and split: graphs of "input" to "output" for measurements."""
    pairs = {}
    for layer in striped_layers(graph):
        whole = _alone(graph, layer)
        split = copy.deepcopy(whole)
        split_stripes_(split, [layer.name])
        pairs[layer.name] = (whole, split)
    return pairs


def _alone(graph: onnx.ModelProto, layer: GraphLayer) -> onnx.ModelProto:
    """The graph of one convolution."""
    (index,) = layer.nodes
    node = copy.deepcopy(graph.graph.node[index])
    shapes = value_shapes(graph)
    values = {"input": shapes[node.input[0]][1:], "output": shapes[node.output[0]][1:]}
    held = [i for i in graph.graph.initializer if i.name in node.input]
    node.input[0], node.output[0] = values
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *sizes])
        for name, sizes in values.items()
    ]
    part = onnx.helper.make_graph([node], layer.name, infos[:1], infos[1:], initializer=held)
    return onnx.helper.make_model(
        part, opset_imports=list(graph.opset_import), ir_version=graph.ir_version
    )


def whole_kernels(
    graph: onnx.ModelProto, module: nn.Module, values: Mapping[str, Array]
) -> dict[str, Array]:
    """`values` (constants of `graph` by name) with the kernels of `module`'s convolutions that were made smaller put
    together again, zeros where they had none."""
    filters = {
        i.name: numpy_helper.to_array(i)
        for i in graph.graph.initializer
        if i.name.endswith(".filters")
    }
    nodes = {
        node.input[1].removesuffix(DECODED): node
        for node in graph.graph.node
        if node.op_type == "Conv"
    }
    found = dict(values)
    for name, layer in weight_layers(module):
        weight = f"{name}.weight"
        if not isinstance(layer, DENSE):
            continue
        if weight not in values:
            _put_together_(found, layer, name, filters)
        elif weight in nodes and values[weight].shape != tuple(layer.weight.shape):
            whole = _in_place(layer, values[weight], nodes[weight])
            found[weight] = values[weight] if whole is None else whole
    return found


def _convolutions(graph: onnx.ModelProto) -> list[GraphLayer]:
    """Those with kernels of several positions."""
    sizes = {i.name: list(i.dims) for i in graph.graph.initializer}
    return [
        layer
        for layer in graph_layers(graph)
        if layer.op == "Conv" and math.prod(sizes[layer.weight][2:]) > 1
    ]


def _obstacle(graph: onnx.ModelProto, layer: GraphLayer, nodes: Sequence[onnx.NodeProto]) -> str:
    if sum(list(n.input).count(layer.weight) for n in graph.graph.node) > len(nodes):
        return "its weight is read by another operation too"
    if any(
        a.name == "auto_pad" and a.s not in (b"", b"NOTSET") for n in nodes for a in n.attribute
    ):
        return "its padding is left to the engine"
    return ""


def _box(weight: Array, axis: int, nodes: Sequence[onnx.NodeProto]) -> range:
    """The indexes of the kernel along `axis` that a smaller, evenly dilated kernel must have: all of them where
    padding would become negative."""
    size = weight.shape[2 + axis]
    used = np.flatnonzero((weight != 0).any(tuple(a for a in range(weight.ndim) if a != 2 + axis)))
    rank = weight.ndim - 2
    pads = [_ints(node, "pads", [0] * 2 * rank) for node in nodes]
    dilations = [_ints(node, "dilations", [1] * rank)[axis] for node in nodes]
    # how many at the start and at the end the padding can make up for
    before = min(p[axis] // d for p, d in zip(pads, dilations, strict=True))
    after = min(p[axis + rank] // d for p, d in zip(pads, dilations, strict=True))
    first = min(int(used[0]) if len(used) else size - 1, before)
    last = max(int(used[-1]) if len(used) else first, size - 1 - after)
    step = functools.reduce(math.gcd, (int(i) - first for i in (*used, last)), 0) or 1
    return range(first, last + 1, step)


def _fit_(node: onnx.NodeProto, boxes: Sequence[range], kernel: Sequence[int]) -> None:
    rank = len(kernel)
    dilations = _ints(node, "dilations", [1] * rank)
    pads = _ints(node, "pads", [0] * 2 * rank)
    for axis, box in enumerate(boxes):
        pads[axis] -= dilations[axis] * box[0]
        pads[axis + rank] -= dilations[axis] * (kernel[axis] - 1 - box[-1])
    steps = [d * box.step for d, box in zip(dilations, boxes, strict=True)]
    kept = [a for a in node.attribute if a.name not in ("kernel_shape", "pads", "dilations")]
    del node.attribute[:]
    node.attribute.extend(kept)
    told = (("kernel_shape", [len(b) for b in boxes]), ("pads", pads), ("dilations", steps))
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in told)


def _ints(node: onnx.NodeProto, name: str, default: list[int]) -> list[int]:
    for held in node.attribute:
        if held.name == name:
            return list(held.ints) or [held.i]
    return list(default)


class _Split:
    """The nodes that stand in the place of one convolution; constants go into the graph."""

    def __init__(
        self, graph: onnx.ModelProto, name: str, node: onnx.NodeProto, weight: Array
    ) -> None:
        self.graph, self.name, self.node, self.weight = graph, name, node, weight
        self.rank = weight.ndim - 2
        self.batch = value_dim(graph, node.output[0])
        self.sizes = value_shapes(graph)[node.output[0]][2:]
        self.strides = _ints(node, "strides", [1] * self.rank)
        self.dilations = _ints(node, "dilations", [1] * self.rank)
        self.made: list[onnx.NodeProto] = []

    def nodes(self) -> tuple[list[onnx.NodeProto], int]:
        """The nodes, and the number of filters in all of their convolutions."""
        stripes = (self.weight != 0).any(1).reshape(len(self.weight), -1)
        present = np.flatnonzero(stripes.any(0)).tolist() or [stripes.shape[1] // 2]
        # One position has all filters, and the bias: nothing is to be spread there.
        full = max(present, key=lambda place: int(stripes[:, place].sum()))
        source = self._padded()
        parts = [self._part(source, full, None)]
        parts += [self._part(source, p, stripes[:, p]) for p in present if p != full]
        self.add("Sum", parts, self.node.output[0], [])
        return self.made, len(self.weight) + int(stripes.sum() - stripes[:, full].sum())

    def add(
        self, op: str, inputs: Sequence[str], output: str, shape: list[int], **told: Any
    ) -> str:
        """A node; `shape` of its output behind the batch, where that is to be recorded."""
        self.made.append(onnx.helper.make_node(op, inputs, [output], name=f"{output}.{op}", **told))
        if shape:
            info = onnx.helper.make_tensor_value_info(
                output, onnx.TensorProto.FLOAT, [self.batch, *shape]
            )
            self.graph.graph.value_info.append(info)
        return output

    def constant(self, name: str, values: Any, dtype: Any = np.int64) -> str:
        """An initializer."""
        held = np.ascontiguousarray(np.asarray(values, dtype))
        self.graph.graph.initializer.append(numpy_helper.from_array(held, name))
        return name

    def _padded(self) -> str:
        pads = _ints(self.node, "pads", [0] * 2 * self.rank)
        if not any(pads):
            return str(self.node.input[0])
        half = self.rank
        around = [0, 0, *pads[:half], 0, 0, *pads[half:]]
        name = f"{self.name}.padded"
        return self.add(
            "Pad", [self.node.input[0], self.constant(f"{name}.pads", around)], name, []
        )

    def _part(self, source: str, flat: int, filters: Array | None) -> str:
        """What one position adds; `filters` (O,) bool tells which have a stripe there, None: all."""
        place = np.unravel_index(flat, self.weight.shape[2:])
        name = f"{self.name}.at_{'_'.join(str(int(at)) for at in place)}"
        starts = [int(at) * d for at, d in zip(place, self.dilations, strict=True)]
        ends = [
            start + (size - 1) * step + 1
            for start, size, step in zip(starts, self.sizes, self.strides, strict=True)
        ]
        axes = list(range(2, 2 + self.rank))
        told = [("starts", starts), ("ends", ends), ("axes", axes), ("steps", self.strides)]
        bounds = [self.constant(f"{name}.{word}", values) for word, values in told]
        seen = self.add("Slice", [source, *bounds], f"{name}.seen", [])
        weight = self.weight.reshape(*self.weight.shape[:2], -1)[..., flat]
        bias: list[str] = []
        if filters is None:
            bias = list(self.node.input[2:3])
        else:  # one more filter, of zeros: those without a stripe read it
            weight = np.concatenate([weight[filters], np.zeros_like(weight[:1])])
        shaped = weight.reshape(*weight.shape, *[1] * self.rank)
        inputs = [seen, self.constant(f"{name}.weight", shaped, np.float32), *bias]
        out = self.add("Conv", inputs, f"{name}.product", [len(weight), *self.sizes])
        if filters is None:
            return out
        index = np.where(filters, np.cumsum(filters) - 1, len(weight) - 1)
        spread = [out, self.constant(f"{name}.filters", index)]
        return self.add("Gather", spread, f"{name}.spread", [len(index), *self.sizes], axis=1)


def value_dim(graph: onnx.ModelProto, name: str) -> str | int:
    """The first dimension of a recorded value: its name, or its size."""
    for value in (*graph.graph.value_info, *graph.graph.output):
        if value.name == name:
            dim = value.type.tensor_type.shape.dim[0]
            return dim.dim_param or int(dim.dim_value)
    return "batch"


def _in_place(layer: nn.Module, held: Array, node: onnx.NodeProto) -> Array | None:
    """A smaller kernel at its place in the whole one; None where the node is none of that layer."""
    assert isinstance(layer, DENSE)
    shape, rank = tuple(layer.weight.shape), len(layer.kernel_size)
    if held.ndim != len(shape) or held.shape[:2] != shape[:2]:
        return None
    pads, dilations = _ints(node, "pads", [0] * 2 * rank), _ints(node, "dilations", [1] * rank)
    around = list(layer._reversed_padding_repeated_twice)
    boxes = []
    for axis in range(rank):
        before, step = around[-2 * axis - 2], dilations[axis] // layer.dilation[axis]
        first = (before - pads[axis]) // layer.dilation[axis]
        box = range(first, first + step * held.shape[2 + axis], step)
        if not 0 <= box[0] <= box[-1] < shape[2 + axis]:
            return None
        boxes.append(box)
    whole = np.zeros(shape, held.dtype)
    whole[np.ix_(*map(range, shape[:2]), *boxes)] = held
    return whole


def _put_together_(
    values: dict[str, Array], layer: nn.Module, name: str, filters: Mapping[str, Array]
) -> None:
    """The kernel of a convolution that was split."""
    assert isinstance(layer, DENSE)
    shape = tuple(layer.weight.shape)
    pattern = re.compile(rf"{re.escape(name)}\.at_(\d+(?:_\d+){{{len(shape) - 3}}})\.weight")
    whole = np.zeros(shape, np.float32)
    parts = {held: match for held in values if (match := pattern.fullmatch(held))}
    for held, match in parts.items():
        place = tuple(int(at) for at in match.group(1).split("_"))
        rows = values[held].reshape(len(values[held]), -1)
        index = filters.get(f"{held.removesuffix('.weight')}.filters", np.arange(len(rows)))
        if (
            rows.shape[1] != shape[1]
            or len(index) != shape[0]
            or np.any(place >= np.array(shape[2:]))
        ):
            return  # of another network: told as missing
        whole.reshape(*shape[:2], -1)[..., np.ravel_multi_index(place, shape[2:])] = rows[index]
    if parts:
        values[f"{name}.weight"] = whole
