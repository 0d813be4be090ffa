"""How weights and what layers read are spread, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tersor.engines.load import available_cpus, first_line
from tersor.engines.onnxruntime import inference_session
from tersor.errors import EngineError
from tersor.graph.constants import constant_values
from tersor.graph.layers import graph_layers, read_by_layers
from tersor.methods.calibrate import with_outputs

FloatArray = npt.NDArray[np.float32]
BINS = 48
IMAGES, CHUNK = 16, 8
SAMPLED = 2**16  # values of a layer's inputs in a chunk
MOST_LAYERS = 128  # whose histograms are kept


def histograms(
    before: onnx.ModelProto, after: onnx.ModelProto, images: FloatArray
) -> list[dict[str, Any]]:
    """A row for each layer that both graphs have: of its weights, and of its inputs on the first IMAGES of `images`
    (N, C, H, W) float32, `low` and `high` of all values before, and how many before and after lie in each of BINS
    equal parts between (what is outside of it afterwards counts at the ends).

    The weights are those of the float graph, where batch norms are folded into them, and the decoded ones. What a
    coded layer reads has been rounded to its codes.
    """
    read = read_by_layers(before), read_by_layers(after)
    names = [layer.name for layer in graph_layers(before) if layer.name in read[1]][:MOST_LAYERS]
    old, new = constant_values(before), constant_values(after)
    values = [
        _Values(graph, {name: held[name][0] for name in names}, images)
        for graph, held in zip((before, after), read, strict=True)
    ]
    found = {layer.name: layer.weight for layer in graph_layers(before)}
    rows = []
    for name in names:
        row: dict[str, Any] = {"layer": name}
        weight = found[name]
        if weight in new:
            row["weights"] = _pair(old[weight], new[weight])
        row["inputs"] = _pair(values[0].of(name), values[1].of(name))
        rows.append(row)
    return rows


class _Values:
    """What layers of a graph read, chunk by chunk; run as the graph says, without an engine's merging."""

    def __init__(
        self, graph: onnx.ModelProto, names: Mapping[str, str], images: FloatArray
    ) -> None:
        constants = {i.name for i in graph.graph.initializer}
        (self.image,) = [i.name for i in graph.graph.input if i.name not in constants]
        self.names = names
        self.inner = sorted(set(names.values()) - {self.image})
        self.images = images[:IMAGES]
        self.session = inference_session(
            with_outputs(graph, self.inner), available_cpus(), optimize=False
        )
        self.held: dict[str, list[FloatArray]] = {name: [] for name in names}
        self._ran = False

    def of(self, layer: str) -> FloatArray:
        """All values of all images, flat."""
        if not self._ran:
            self._run()
        return np.concatenate(self.held[layer])

    def _run(self) -> None:
        for start in range(0, len(self.images), CHUNK):
            chunk = np.ascontiguousarray(self.images[start : start + CHUNK])
            try:
                made = self.session.run(self.inner, {self.image: chunk}) if self.inner else []
            except Exception as error:  # the library's exceptions have no common class
                raise EngineError(f"values inside of the graph: {first_line(error)}") from None
            found = {self.image: chunk, **dict(zip(self.inner, made, strict=True))}
            for layer, name in self.names.items():
                # A part of a large map tells its spread as well; an odd step meets every column.
                flat = found[name].reshape(-1)
                self.held[layer].append(flat[:: flat.size // SAMPLED | 1].copy())
        self._ran = True


def _pair(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> dict[str, Any]:
    """Counts of both in the same bins."""
    low, high = float(before.min()), float(before.max())
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)

    def counted(values: npt.NDArray[Any]) -> list[int]:
        inside = np.clip(values.reshape(-1), low, high)
        return [int(n) for n in np.histogram(inside, edges)[0]]

    return {"low": low, "high": high, "before": counted(before), "after": counted(after)}
