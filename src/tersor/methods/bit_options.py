"""What each layer's weight costs in the file, and how much it hurts, at every number of bits; without labels."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tersor.artifact.encoding import smallest
from tersor.graph.layers import graph_layers
from tersor.graph.qdq import as_matrix
from tersor.methods.sensitivity import fit_uniform, sensitivities
from tersor.search import Option
from tersor.tensors.grids import fit_grid

FloatArray = npt.NDArray[np.float32]
BITS = (2, 3, 4, 5, 6, 8)
TRIED_BITS = 3  # in the one trial of each layer
SAMPLE = 2**16  # weights of a layer that are coded to learn what it takes
WHOLE_SCALE = 4.0  # bytes of a scale, one for each output channel


@dc.dataclass(frozen=True)
class BitOptions:
    """Of one layer, by bits: `bytes_each`, what the file takes for a weight, and `harm_kl`, in nats, of rounding its
    weight alone. `num_weights` and `num_outputs` are those of the layer that was asked."""

    layer: str
    num_weights: int
    num_outputs: int
    bytes_each: Mapping[int, float]
    harm_kl: Mapping[int, float]

    def options(self, num_weights: int, *, harm_factor: float = 1.0) -> list[Option]:
        """The choices for the same layer with `num_weights` left of it: cost in bytes of the file."""
        rows = WHOLE_SCALE * self.num_outputs * num_weights / self.num_weights
        return [
            Option(bits, num_weights * each + rows, self.harm_kl[bits] * harm_factor)
            for bits, each in self.bytes_each.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {f.name: getattr(self, f.name) for f in dc.fields(self)} | {
            name: {str(bits): value for bits, value in getattr(self, name).items()}
            for name in ("bytes_each", "harm_kl")
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> BitOptions:
        """What `to_dict` told."""
        by_bits = {
            name: {int(bits): value for bits, value in told[name].items()}
            for name in ("bytes_each", "harm_kl")
        }
        return cls(told["layer"], told["num_weights"], told["num_outputs"], **by_bits)


def bit_options(
    graph: onnx.ModelProto,
    images: FloatArray,
    *,
    bits: Sequence[int] = BITS,
    num_images: int = 64,
    on_progress: Callable[[float], None] | None = None,
    seed: int = 0,
) -> dict[str, BitOptions]:
    """The options of every layer of the float `graph` that can be quantized, in the order of computing.

    One trial a layer: the change of the network's outputs (KL, on the first `num_images` of `images` (N, C, H, W)
    float32) with its weight alone at TRIED_BITS. Other bits are taken to hurt in proportion to the squared error of
    the weight: for small errors the divergence is a quadratic form of them. The bytes are those of the file's own
    coder on the layer's own codes, of at most SAMPLE weights of it, rows drawn by `seed`. Raises as
    `sensitivities`.
    """
    found = sensitivities(
        graph,
        None,
        [TRIED_BITS],
        [images[:num_images]],
        num_images=num_images,
        fit=fit_uniform,
        on_progress=on_progress,
    )
    harms = {row.layer: row.harm_kl for row in found.table}
    weights = {i.name: i for i in graph.graph.initializer}
    answer = {}
    for layer in graph_layers(graph):
        if layer.name not in harms:
            continue
        matrix = as_matrix(numpy_helper.to_array(weights[layer.weight]), layer.axis)
        rows = max(1, SAMPLE // matrix.shape[1])
        sample = matrix
        if rows < len(matrix):
            drawn = np.random.default_rng(seed).permutation(len(matrix))[:rows]
            sample = matrix[np.sort(drawn)]
        each, errors = {}, {}
        for width in bits:
            each[width], errors[width] = _coded(sample, width)
        unit = harms[layer.name] / max(_coded(sample, TRIED_BITS)[1], 1e-30)
        answer[layer.name] = BitOptions(
            layer.name,
            matrix.size,
            len(matrix),
            each,
            {width: unit * error for width, error in errors.items()},
        )
    return answer


def _coded(matrix: FloatArray, bits: int) -> tuple[float, float]:
    """Bytes that the file takes for a weight of `matrix` (O, K) at `bits`, and the squared error."""
    grid = fit_grid(
        "uniform",
        matrix,
        bits,
        symmetric=True,
        granularity="per_channel",
        group_size=matrix.shape[1],
        search="minmax" if bits == 8 else "mse",
    )
    indexes = grid.encode(matrix)
    levels = grid.levels[indexes].astype(np.int8)
    _, section = smallest(np.ascontiguousarray(levels), True)
    error = float(((grid.decode(indexes) - matrix).astype(np.float64) ** 2).sum())
    return len(section) / matrix.size, error
