"""What quantization-aware training learned of a network, and the graph that carries it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from torch import nn

from tersor.errors import ModelError
from tersor.graph.export import export_onnx
from tersor.graph.layers import GraphLayer, graph_layers
from tersor.graph.marking import activations_to_quantize
from tersor.graph.qdq import WeightCodes, as_matrix, as_weight
from tersor.tensors.affine import SMALLEST_SCALE
from tersor.tensors.grids import Grid

FloatArray = npt.NDArray[np.float32]
FOLDING_ERROR = 1e-5  # relative; folding rounds a product of float32 a few times


@dc.dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's weight (1 to 8, in `code` uniform, ternary or binary) and of its input (2 to 8)."""

    bits: int
    activation_bits: int = 8
    code: str = "uniform"


@dc.dataclass(frozen=True)
class InputGrid:
    """Codes q, 0 to 2^bits - 1, of a layer's input: value = scale * (q - zero_point). `scale` is a float32."""

    scale: float
    zero_point: int
    bits: int = 8

    @property
    def range(self) -> tuple[float, float]:
        """(low, high): the values of the first and of the last code, exact in float64."""
        return -self.zero_point * self.scale, (2**self.bits - 1 - self.zero_point) * self.scale


@dc.dataclass(frozen=True, eq=False)
class LearnedLayer:
    """What was learned of a layer: its weight is `scale` (O,) float32 times `codes` (O, K) int8, row by row, its
    input lies on `input` (None: in float)."""

    bits: LayerBits
    codes: npt.NDArray[np.int8]
    scale: FloatArray
    input: InputGrid | None

    def weight(self) -> FloatArray:
        """(O, K) float32: one rounded product an element, as DequantizeLinear computes it."""
        return self.codes.astype(np.float32) * self.scale[:, None]


@dc.dataclass(frozen=True, eq=False)
class LearnedGraph:
    """A float graph whose weights lie exactly on what was learned, batch normalisation folded in.

    `layers` are by name as in the graph; their codes and scales are those of the graph's weights as (O, K).
    `inputs` holds the grids of the layers' inputs by the name of the graph's value, or of the one whose range it
    shares (`graph.marking`).
    """

    graph: onnx.ModelProto
    layers: dict[str, LearnedLayer]
    inputs: dict[str, InputGrid]


def export_quantized(
    module: nn.Module, learned: Mapping[str, LearnedLayer], input_shape: tuple[int, int, int]
) -> LearnedGraph:
    """The graph of a stripped `module` with what was `learned` carried through the folding of batch norm.

    Folding multiplies row o by some c[o]: its codes get the sign of c[o], its scale the magnitude. Where c[o] is
    zero, or too small for a float32 scale, the codes are zeros. The graph's weights are set to exactly
    scale * codes. Raises ModelError where a weight of the graph is not the learned one in this sense.
    """
    graph = export_onnx(module, input_shape)
    found = {layer.name: layer for layer in graph_layers(graph)}
    if missing := [name for name in learned if name not in found]:
        raise ModelError(
            f"the graph holds no layer {missing[0]!r}; was it learned for another network?"
        )
    constants = {i.name: i for i in graph.graph.initializer}
    chosen = {name: found[name] for name in learned}
    layers = {}
    for name, layer in chosen.items():
        held = constants[layer.weight]
        weight = numpy_helper.to_array(held)
        layers[name] = _rescaled(name, as_matrix(weight, layer.axis), learned[name])
        exact = as_weight(layers[name].weight(), weight.shape, layer.axis)
        held.CopyFrom(numpy_helper.from_array(exact, layer.weight))
    inputs: dict[str, InputGrid] = {}
    root = activations_to_quantize(graph, list(chosen.values())).root
    for name, layer in chosen.items():
        for value in (root[graph.graph.node[index].input[0]] for index in layer.nodes):
            grid = learned[name].input
            if grid is not None and inputs.setdefault(value, grid) != grid:
                raise ModelError(
                    f"the input of layer {name!r} shares codes with another, learned apart"
                )
    return LearnedGraph(graph, layers, inputs)


def _rescaled(name: str, rows: FloatArray, learned: LearnedLayer) -> LearnedLayer:
    """`learned` with the codes and scales of `rows` (O, K), which are its own rows times a number each."""
    if rows.shape != learned.codes.shape:
        raise ModelError(
            f"layer {name!r} has weights {rows.shape} in the graph, learned were {learned.codes.shape}"
        )
    codes = learned.codes.astype(np.float64)
    factor = (rows * codes).sum(1) / np.maximum((codes**2).sum(1), 1)
    live = np.abs(factor) >= SMALLEST_SCALE
    signs = np.where(live, np.sign(factor), 0)
    scale = np.where(live, np.abs(factor), learned.scale).astype(np.float32)
    result = dc.replace(learned, codes=(codes * signs[:, None]).astype(np.int8), scale=scale)
    error = np.abs(result.weight().astype(np.float64) - rows).max(1, initial=0)
    allowed = FOLDING_ERROR * np.abs(rows).max(1, initial=0) + 256 * SMALLEST_SCALE
    if (wrong := error > allowed).any():
        row = int(np.argmax(wrong))
        raise ModelError(
            f"layer {name!r}: channel {row} of the graph is no multiple of the learned codes (error "
            f"{error[row]:.3g}); the module was changed after `strip`"
        )
    return result


def weight_codes(
    layer: GraphLayer, learned: LearnedGraph, smallest: npt.ArrayLike = 0.0
) -> WeightCodes:
    """The learned codes of a layer for a coded graph. A row whose scale is under `smallest`, () or (O,), gets
    that scale and the nearest codes to it, so that its bias fits int32; such a row is tiny beside its bias."""
    held = learned.layers[layer.name]
    scale = np.maximum(held.scale, smallest).astype(np.float32)
    shrunk = held.codes * (held.scale.astype(np.float64) / scale)[:, None]
    codes = np.where((scale > held.scale)[:, None], np.rint(shrunk), held.codes).astype(np.int8)
    levels = np.unique(codes)
    if levels.size < 2:  # a grid has two at least
        levels = np.unique(np.append(levels, 0 if levels[0] else 1)).astype(np.int8)
    bits = max(held.bits.bits, int(levels.size - 1).bit_length())
    zero_point = np.zeros_like(scale)[:, None]
    grid = Grid(levels.astype(np.float32), scale[:, None], zero_point, codes.shape[1], bits)
    (weight,) = [i for i in learned.graph.graph.initializer if i.name == layer.weight]
    indexes = np.searchsorted(levels, codes).astype(np.uint8)
    return WeightCodes(layer, grid, indexes, tuple(weight.dims))
