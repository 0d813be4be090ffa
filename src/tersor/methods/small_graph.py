"""The graph of a network of codes, with everything beside the codes made small too: scales and biases."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from torch import nn

from tersor.errors import SpecError
from tersor.graph.layers import graph_layers
from tersor.graph.qdq import weight_only_graph
from tersor.methods.learned import LearnedGraph, LearnedLayer, export_quantized, weight_codes

FloatArray = npt.NDArray[np.float32]
# Bits of the significand, the leading one counted: a scale is right to 0.4 %, a bias to 0.1 %. With 5 and 6 bits a
# narrow network lost 0.6 points by them alone (VGG-16 of 240,000 weights in 128 KiB).
SCALE_BITS, BIAS_BITS = 8, 10


def small_graph(
    module: nn.Module,
    learned: Mapping[str, LearnedLayer],
    input_shape: tuple[int, int, int],
    *,
    scale_bits: int = SCALE_BITS,
    bias_bits: int = BIAS_BITS,
) -> onnx.ModelProto:
    """The graph of `module`, whose weights are scale * codes as `learned` says: int8 codes that become floats
    where they are used, batch norm folded into scales and biases, and these rounded to few bits, so that the
    file's coder finds little in them. Rows of nothing but 0 share a scale of another row. `bits` 24 rounds
    nothing. Raises as `export_quantized` does.
    """
    held = export_quantized(module, learned, input_shape)
    layers = {name: _rounded(layer, scale_bits) for name, layer in held.layers.items()}
    small = LearnedGraph(held.graph, layers, held.inputs)
    _round_vectors_(small.graph, bias_bits)
    chosen = [layer for layer in graph_layers(small.graph) if layer.name in layers]
    return weight_only_graph(small.graph, [weight_codes(layer, small) for layer in chosen])


def round_significand(values: npt.ArrayLike, bits: int) -> FloatArray:
    """`values` float32 rounded to `bits` (1 to 24) bits of their significand, halves to even. Raises
    SpecError."""
    if not 1 <= bits <= 24:
        raise SpecError(f"a float32 has 1 to 24 bits of significand, got {bits!r}")
    fraction, exponent = np.frexp(np.asarray(values, np.float32))
    scaled: Any = np.ldexp(fraction, bits)
    return np.asarray(np.ldexp(np.rint(scaled), exponent - bits), np.float32)


def _rounded(layer: LearnedLayer, bits: int) -> LearnedLayer:
    scale = round_significand(layer.scale, bits)
    live = layer.codes.any(axis=1)
    scale[~live] = np.sort(scale[live])[live.sum() // 2] if live.any() else 1.0
    return dc.replace(layer, scale=scale)


def _round_vectors_(graph: onnx.ModelProto, bits: int) -> None:
    """Biases and whatever else stands once for each channel."""
    for held in graph.graph.initializer:
        values = numpy_helper.to_array(held)
        if values.dtype == np.float32 and values.size > 1 and values.squeeze().ndim == 1:
            rounded = round_significand(values, bits).reshape(values.shape)
            held.CopyFrom(numpy_helper.from_array(rounded, held.name))
