"""Where 16-bit sums of integer kernels can overflow: computed from a graph, nothing is run.

x86 without VNNI multiplies uint8 activations by int8 weights with the instruction maddubs, which
adds two neighbouring products in 16 bits and cuts the sum off at 32767 and -32768 (Intel,
Architectures Software Developer's Manual, PMADDUBSW). A processor with VNNI or AMX adds in 32 bits
and never shows it, so a file that is right there may be wrong elsewhere.

Which products are neighbours differs by kernel. Those of ONNX Runtime (MLAS) and of oneDNN, which
OpenVINO runs, go along the input channels of one kernel position, then to the next position: the
pairs (2k, 2k + 1) of that order are `worst_pair_sum` and `share_of_pairs`. oneDNN fills an odd
number of channels up with zeros, and kernels for depthwise convolutions pair in other ways or not
at all; `worst_any_pair_sum`, over any two products of one output, holds for every kernel.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

Array = npt.NDArray[Any]
CODES = ".weight_quantized"  # how an initializer with the codes of layer NAME ends
LOWEST, HIGHEST = np.iinfo(np.int16).min, np.iinfo(np.int16).max
LARGEST_CODE = 255


@dc.dataclass(frozen=True)
class LayerSaturation:
    """What 16-bit sums of two products can reach in one layer.

    Attributes:
        layer: the layer's name ("features.0")
        worst_pair_sum: the sum of two neighbouring products that is farthest from zero, signed
        saturates: whether neighbouring products can exceed 16 bits
        share_of_pairs: share (0 to 1) of the pairs of neighbouring weights that can
        worst_any_pair_sum: the same over any two products of one output channel
        may_saturate: whether some pairing can exceed 16 bits
    """

    layer: str
    worst_pair_sum: int
    saturates: bool
    share_of_pairs: float
    worst_any_pair_sum: int
    may_saturate: bool


def saturation(graph: onnx.ModelProto) -> list[LayerSaturation]:
    """Every layer of a quantized `graph` whose codes an integer kernel multiplies, in the order of
    computing.

    Activations are taken to be any codes from 0 to 255, or to the largest that the graph lets
    through. A layer computed in float (weights alone quantized, or excluded) is not listed.
    """
    return [_judged(*product) for product in _products(graph)]


def quantized_layers(graph: onnx.ModelProto) -> list[str]:
    """Names of the layers whose codes an integer kernel multiplies, in the order of computing."""
    return [name for name, _, _ in _products(graph)]


def pair_sums(first: Array, second: Array) -> tuple[Array, Array]:
    """The least (at most 0) and the greatest (at least 0) sum of two products of the weights `first`
    and `second`, int8, with activations from 0 to 1: int16. Each activation is free, so that the
    weights of one sign count and the others do not."""
    wide, other = first.astype(np.int16), second.astype(np.int16)
    low = np.minimum(wide, 0) + np.minimum(other, 0)
    return low, np.maximum(wide, 0) + np.maximum(other, 0)


def _judged(name: str, rows: Array, largest_code: int) -> LayerSaturation:
    """`rows` (O, K) int8 holds the codes of each output channel in the order they are added."""
    if rows.shape[1] % 2:  # the last one has no neighbour
        rows = np.pad(rows, ((0, 0), (0, 1)))
    low, high = pair_sums(rows[:, 0::2], rows[:, 1::2])
    over = (low < -(-LOWEST // largest_code)) | (high > HIGHEST // largest_code)
    ends = np.partition(rows, sorted({0, 1, rows.shape[1] - 2, rows.shape[1] - 1}), axis=1)
    any_low, _ = pair_sums(ends[:, 0], ends[:, 1])
    _, any_high = pair_sums(ends[:, -1], ends[:, -2])
    worst = _farthest(any_low, any_high, largest_code)
    return LayerSaturation(
        layer=name,
        worst_pair_sum=_farthest(low, high, largest_code),
        saturates=bool(over.any()),
        share_of_pairs=float(over.mean()),
        worst_any_pair_sum=worst,
        may_saturate=not LOWEST <= worst <= HIGHEST,
    )


def _farthest(low: Array, high: Array, largest_code: int) -> int:
    """The sum farthest from zero; of two as far the positive one, whose limit is nearer."""
    least, most = int(low.min()) * largest_code, int(high.max()) * largest_code
    return least if -least > most else most


def _products(graph: onnx.ModelProto) -> Iterator[tuple[str, Array, int]]:
    """Layer name, codes (O, K) and largest activation code of every layer, a shared one once."""
    nodes, seen = _Nodes(graph), set()
    for node in graph.graph.node:
        product = nodes.product(node)
        if product is not None and product[0] not in seen:
            seen.add(product[0])
            yield product


class _Nodes:
    """A graph with ways back from a product to its weight's codes and its activation's."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        self.held = {i.name: i for i in graph.graph.initializer}
        self.made_by = {name: node for node in graph.graph.node for name in node.output}

    def product(self, node: NodeProto) -> tuple[str, Array, int] | None:
        """Layer name, codes (O, K) in the order of adding, and largest activation code of a product
        of integers; None for any other node."""
        if node.op_type == "MatMulInteger":
            source, turned = node.input[1], False
            made = self.made_by.get(source)
            if made is not None and made.op_type == "Transpose":
                source, turned = made.input[0], True
            return self._found(source, 0 if turned else -1, LARGEST_CODE)
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            return None
        weight = self._dequantized(node.input[1])
        activation = self._dequantized(node.input[0])
        if weight is None or activation is None:
            return None  # computed in float
        attributes: Mapping[str, Any] = {
            a.name: helper.get_attribute_value(a) for a in node.attribute
        }
        turned = node.op_type == "Conv" or bool(attributes.get("transB", 0))
        return self._found(weight, 0 if turned else -1, self._largest(activation))

    def _found(self, source: str, axis: int, largest: int) -> tuple[str, Array, int] | None:
        if not source.endswith(CODES) or source not in self.held:
            return None
        codes = np.moveaxis(numpy_helper.to_array(self.held[source]), axis, 0)
        if codes.ndim > 2:  # (O, I, kh, kw): input channels are added innermost
            codes = np.moveaxis(codes, 1, -1)
        return source.removesuffix(CODES), codes.reshape(len(codes), -1), largest

    def _dequantized(self, name: str) -> str | None:
        """The codes that `name` is dequantized from."""
        made = self.made_by.get(name)
        is_pair = made is not None and made.op_type == "DequantizeLinear"
        return str(made.input[0]) if made is not None and is_pair else None

    def _largest(self, codes: str) -> int:
        """Codes of fewer than 8 bits are clipped between quantizing and dequantizing."""
        made = self.made_by.get(codes)
        if made is None or made.op_type != "Clip" or len(made.input) < 3:
            return LARGEST_CODE
        limit = self.held.get(made.input[2])
        return LARGEST_CODE if limit is None else int(numpy_helper.to_array(limit))
