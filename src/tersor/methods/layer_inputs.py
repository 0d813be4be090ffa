"""One pass of calibration inputs through the float graph: second moments of what its layers read.

The rounding of a layer's weights needs E[x x^T] of the columns x that a row of the weight is
multiplied with; the correction of its bias needs E[x].
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx

from tersor.engines.load import available_cpus
from tersor.engines.onnxruntime import inference_session
from tersor.errors import DataError, ModelError
from tersor.graph.layers import GraphLayer, attribute, value_shapes
from tersor.methods.calibrate import CHUNK, checked_batches, with_outputs

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
LARGEST_INPUTS = 8192  # a second moment of this side takes 268 MB
LARGEST_VALUE = 2.0**50  # the sums of its squares fit float32
HELD_VALUES = 2**26  # of the layers' inputs at a time: 268 MB
GATHERED_VALUES = 2**24  # of the columns at a time: 67 MB


@dc.dataclass(frozen=True, eq=False)
class InputMoments:
    """Moments of the columns x (K,) that a layer's weight rows (O, K) are multiplied with.

    K counts the inputs of one group times the kernel's positions, in the order of the flattened
    weight row. Of a layer with several nodes they are over the columns of all of them.
    """

    second: FloatArray  # (groups, K, K): mean of x x^T over positions and images
    mean: FloatArray  # (groups, K): mean of x
    num_samples: int  # columns seen in each group


def input_moments(
    graph: onnx.ModelProto,
    layers: Sequence[GraphLayer],
    batches: Iterable[FloatArray],
    *,
    num_images: int,
    positions_per_image: int = 64,
    seed: int = 0,
) -> dict[str, InputMoments]:
    """Moments, by layer name, of the inputs of `layers` over the first `num_images` images of
    `batches` (N, C, H, W) float32.

    Of a larger map, `positions_per_image` positions are drawn by `seed` for each image, without
    repetition. Raises DataError for no images, another shape, NaN or infinity, naming the batch;
    ModelError for a layer without such columns or with more than LARGEST_INPUTS inputs.
    """
    sums = {layer.name: _node_sums(graph, layer) for layer in layers}
    nodes = [node for held in sums.values() for node in held]
    constants = {c.name for c in graph.graph.initializer}
    (image,) = [i for i in graph.graph.input if i.name not in constants]
    shapes = value_shapes(graph)
    inner = sorted({node.source for node in nodes} - {image.name})
    session = inference_session(with_outputs(graph, inner), available_cpus())
    values_per_image = sum(int(np.prod(shapes.get(name, [0])[1:])) for name in inner)
    chunk_size = max(1, min(CHUNK, HELD_VALUES // max(values_per_image, 1)))
    rng = np.random.default_rng(seed)
    seen = 0
    for number, batch in checked_batches(batches, shapes[image.name][1:], num_images):
        for start in range(0, len(batch), chunk_size):
            chunk = batch[start : start + chunk_size]
            found = session.run(inner, {image.name: chunk}) if inner else []
            values = {image.name: chunk, **dict(zip(inner, found, strict=True))}
            _require_finite(values, number)
            for node in nodes:
                node.add(values[node.source], len(chunk), positions_per_image, rng)
        seen += len(batch)
    if seen == 0:
        raise DataError(
            "no calibration images were given; the moments of layer inputs need one at least"
        )
    return {name: _combined(held) for name, held in sums.items()}


def _require_finite(values: Mapping[str, FloatArray], number: int) -> None:
    for name, held in values.items():
        if held.size and not np.abs(held).max() <= LARGEST_VALUE:  # NaN is not either
            raise DataError(
                f"calibration batch {number}: the value {name!r} inside the model holds NaN, "
                f"infinity or magnitudes above {LARGEST_VALUE:.1g}; the float model overflows on "
                "this input"
            )


class _NodeSums:
    """Sums over the sampled columns of one node."""

    def __init__(self, node: onnx.NodeProto, dims: Sequence[int], layer: GraphLayer) -> None:
        self.source = str(node.input[0])
        self.node = node
        self.kernel = tuple(dims[2:]) if node.op_type == "Conv" else ()
        self.groups = int(attribute(node, "group", 1))
        out_channels = dims[layer.axis]
        self.width = layer.num_weights // out_channels
        if self.width > LARGEST_INPUTS:
            raise ModelError(
                f"layer {layer.name!r} reads {self.width} inputs; their second moments need "
                f"{self.width**2 * 4 / 2**30:.1f} GiB, and {LARGEST_INPUTS} inputs are the most. "
                "Sum its equal inputs first (--fold-copies) or exclude the layer"
            )
        self.second = np.zeros((self.groups, self.width, self.width), np.float32)
        self.total = np.zeros((self.groups, self.width), np.float64)
        self.num_samples = 0
        self.num_positions = 0  # those that were not drawn too

    def add(
        self,
        values: FloatArray,
        num_images: int,
        positions_per_image: int,
        rng: np.random.Generator,
    ) -> None:
        """See the node's input `values` of `num_images` images."""
        windows = self._windows(values, num_images)
        sizes = windows.shape[1 : 1 + max(len(self.kernel), 1)]
        available = int(np.prod(sizes))
        drawn = _draw(num_images, available, positions_per_image, rng)
        self.num_positions += num_images * available
        self.num_samples += drawn.size
        image = np.repeat(np.arange(num_images), drawn.shape[1])
        place = np.unravel_index(drawn.reshape(-1), sizes)
        step = max(1, GATHERED_VALUES // (self.groups * self.width))
        for start in range(0, drawn.size, step):
            part = slice(start, start + step)
            columns = windows[(image[part], *(along[part] for along in place))]
            columns = columns.reshape(-1, self.groups, self.width).transpose(1, 0, 2)
            # numpy multiplies an array by its own transpose with half the work
            self.second += columns.transpose(0, 2, 1) @ columns
            self.total += columns.sum(axis=1, dtype=np.float64)

    def _windows(self, values: FloatArray, num_images: int) -> FloatArray:
        """What each position of each image reads, as a view: (N, positions.., inputs, kernel..)."""
        if not self.kernel:
            return values.reshape(num_images, -1, self.width)
        rank = len(self.kernel)
        dilations = self._integers("dilations", [1] * rank)
        strides = self._integers("strides", [1] * rank)
        pads = self._integers("pads", [0] * 2 * rank)
        padded = np.pad(values, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
        reach = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, dilations, strict=True))
        spatial = tuple(range(2, 2 + rank))
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, spatial)
        steps = (1, 1, *strides, *dilations)
        windows = windows[tuple(slice(None, None, step) for step in steps)]
        return np.moveaxis(windows, 1, 1 + rank)

    def _integers(self, name: str, default: list[int]) -> list[int]:
        return next((list(a.ints) for a in self.node.attribute if a.name == name), default)


def _node_sums(graph: onnx.ModelProto, layer: GraphLayer) -> list[_NodeSums]:
    """Empty sums for every node of `layer`."""
    if layer.problem:
        raise ModelError(f"layer {layer.name!r} has no moments of inputs: {layer.problem}")
    (dims,) = [list(i.dims) for i in graph.graph.initializer if i.name == layer.weight]
    nodes = [graph.graph.node[index] for index in layer.nodes]
    for node in nodes:
        padding = next((a.s.decode() for a in node.attribute if a.name == "auto_pad"), "NOTSET")
        if padding.startswith("SAME"):
            raise ModelError(
                f"layer {layer.name!r} leaves its padding to the engine (auto_pad={padding}); "
                "write the pads as numbers, or exclude the layer"
            )
    return [_NodeSums(node, dims, layer) for node in nodes]


def _draw(num_images: int, available: int, wanted: int, rng: np.random.Generator) -> IntArray:
    """Positions (num_images, min(wanted, available)), for each image its own, none twice."""
    if wanted >= available:
        return np.tile(np.arange(available), (num_images, 1))
    noise = rng.random((num_images, available))
    return np.sort(np.argpartition(noise, wanted, axis=1)[:, :wanted], axis=1)


def _combined(nodes: Sequence[_NodeSums]) -> InputMoments:
    """Moments over all positions of all nodes, in the place of the sums: a node weighs by its
    positions, drawn or not."""
    positions = sum(node.num_positions for node in nodes)
    for node in nodes:
        share = node.num_positions / positions / node.num_samples
        node.second *= np.float32(share)
        node.total *= share
    first, *others = nodes
    for node in others:
        first.second += node.second
        first.total += node.total
    num_samples = sum(node.num_samples for node in nodes)
    return InputMoments(first.second, first.total.astype(np.float32), num_samples)
