"""How much each layer's quantization changes the network's outputs, without labels; and which bits
follow."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from scipy.special import log_softmax

from tersor.engines.load import available_cpus
from tersor.engines.onnxruntime import inference_session
from tersor.errors import BudgetError, DataError, ModelError, SpecError
from tersor.graph.cut import live_values, piece
from tersor.graph.layers import GraphLayer, graph_layers
from tersor.graph.qdq import as_matrix, on_grid
from tersor.methods.calibrate import CHUNK, checked_batches
from tersor.registry import did_you_mean
from tersor.search import Option, allocate
from tersor.tensors.affine import choose_affine, dequantize, quantize
from tersor.tensors.grids import fit_grid
from tersor.tensors.observers import OBSERVERS

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Fit = Callable[[GraphLayer, FloatArray, int], FloatArray]
Values = dict[str, Array]
INPUT_BITS = 8
TRIAL_INPUT = "tersor_trial_input"


@dc.dataclass(frozen=True)
class LayerHarm:
    """What it costs to quantize one tensor of one layer to `bits` and nothing else.

    `harm_kl` is the mean over images of KL(softmax(original) || softmax(quantized)), in nats, 0 or
    more; `harm_mse` the mean squared distance of the logits over the variance of the original's.
    `macs` counts multiplications for one image, `num_weights` the layer's weights.
    """

    layer: str
    bits: int
    harm_kl: float
    harm_mse: float
    num_weights: int
    macs: int


@dc.dataclass(frozen=True)
class Sensitivity:
    """Harms of weights, `table`, layer by layer in the order of computing and by rising bits; of
    inputs in 8 bits, `inputs`, where they were asked for; and the images they are means over."""

    table: tuple[LayerHarm, ...]
    num_images: int
    inputs: tuple[LayerHarm, ...] = ()


def fit_uniform(layer: GraphLayer, weight: FloatArray, bits: int) -> FloatArray:
    """`weight` through evenly spaced codes, symmetric, one scale of least squared error for each
    output channel; float32, same shape."""
    matrix = as_matrix(weight, layer.axis)
    grid = fit_grid(
        "uniform",
        matrix,
        bits,
        symmetric=True,
        granularity="per_channel",
        group_size=matrix.shape[1],
        search="mse",
    )
    return on_grid(weight, layer.axis, grid)


def sensitivities(
    graph: onnx.ModelProto,
    layers: Sequence[str] | None,
    bits: Sequence[int],
    calibration_batches: Iterable[FloatArray],
    *,
    num_images: int = 128,
    fit: Fit = fit_uniform,
    inputs: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> Sensitivity:
    """The harm of quantizing each of `layers` (None: all that can be) alone, at each of `bits`.

    Runs the first `num_images` images of `calibration_batches` (N, C, H, W) float32, as the model
    sees them, without labels. `fit` gives the dequantized form of a weight, same shape. With
    `inputs`, the harm of each layer's input in 8 bits (range by the histogram observer) is measured
    too. `on_progress` is told the share done (0 to 1).

    What comes before a layer is computed once, and only what follows runs in a trial; the values
    between the two are held for all images. Raises SpecError for a layer or bits that cannot be,
    ModelError for a graph without float layers or weights that are not finite, DataError for
    unusable images.
    """
    chosen, widths = _chosen(graph, layers), _checked_bits(bits)
    images = _images(graph, calibration_batches, num_images)
    (image,) = live_values(graph, 0)
    held: list[Values] = [{image: chunk} for chunk in images]
    original = _run(graph, held)
    if not np.isfinite(original).all():
        raise DataError(
            "the float model gives NaN or infinity for a calibration image; use other images"
        )
    weights = {i.name: i for i in graph.graph.initializer}
    found: list[LayerHarm] = []
    found_inputs: list[LayerHarm] = []
    reached = 0
    for number, layer in enumerate(chosen):
        held, reached = _advanced(graph, reached, layer.nodes[0], held), layer.nodes[0]
        trial = _Trial(graph, layer, numpy_helper.to_array(weights[layer.weight]), held, original)
        found += [trial.weight_harm(width, fit) for width in widths]
        if inputs and len(layer.nodes) == 1:
            found_inputs.append(trial.input_harm())
        if on_progress:
            on_progress((number + 1) / len(chosen))
    return Sensitivity(tuple(found), sum(len(chunk) for chunk in images), tuple(found_inputs))


def output_distance(original: Array, changed: Array) -> tuple[float, float]:
    """The distance of logits `changed` from `original`, both (N, classes).

    The mean over images of KL(softmax(original) || softmax(changed)) in nats, and the mean squared
    difference over the variance of `original` (over 1 where that is constant).
    """
    p = log_softmax(original.astype(np.float64), axis=1)
    q = log_softmax(changed.astype(np.float64), axis=1)
    divergence = np.mean(np.sum(np.exp(p) * (p - q), axis=1))
    squared = np.mean((changed.astype(np.float64) - original) ** 2)
    variance = float(np.var(original, dtype=np.float64)) or 1.0
    return max(float(divergence), 0.0), float(squared) / variance


def mixed_bits(
    sensitivity: Sensitivity,
    *,
    mean_bits: float | None = None,
    size_bytes: float | None = None,
    allowed: Sequence[int] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Bits for each layer of `sensitivity` with little harm (KL) in all, within a budget.

    The budget is `mean_bits`, the most bits a weight takes on average over all layers, or
    `size_bytes`, the most bytes of all codes (scales are not counted). `allowed` are the bits to
    choose from, by default all measured; `fixed` gives some layers their bits, which count. Harms
    of layers are added: judge the whole afterwards. Raises SpecError for contradicting or unknown
    values, BudgetError for a budget below the least that the allowed bits take.
    """
    if (mean_bits is None) == (size_bytes is None):
        raise SpecError("mixed bits need one budget: give mean_bits or size_bytes")
    sizes = {row.layer: row.num_weights for row in sensitivity.table}
    measured = {row.bits for row in sensitivity.table}
    fixed = fixed or {}
    if missing := [name for name in fixed if name not in sizes]:
        raise SpecError(
            f"fixed: {missing[0]!r} is not among the measured layers {', '.join(sizes)}."
            + did_you_mean(missing[0], sizes)
        )
    if allowed is not None and (unknown := sorted(set(allowed) - measured)):
        raise SpecError(
            f"allowed: {unknown[0]} bits were not measured; the table holds "
            f"{', '.join(str(b) for b in sorted(measured))}"
        )
    options = {name: [Option(fixed[name], float(sizes[name] * fixed[name]), 0.0)] for name in fixed}
    for row in sensitivity.table:
        if row.layer not in fixed and (allowed is None or row.bits in allowed):
            option = Option(row.bits, float(row.num_weights * row.bits), row.harm_kl)
            options.setdefault(row.layer, []).append(option)
    if bare := [name for name in sizes if name not in options]:
        raise SpecError(f"allowed: layer {bare[0]!r} is left without bits to choose from")
    weights = sum(sizes.values())
    limit = 8 * size_bytes if size_bytes is not None else weights * (mean_bits or 0.0)
    least = sum(min(option.cost for option in held) for held in options.values())
    if least > limit:
        asked = f"{mean_bits:g} bits a weight" if size_bytes is None else f"{size_bytes:,g} bytes"
        raise BudgetError(
            f"no choice of bits fits {asked}: the smallest possible is {least / weights:.4g} bits a "
            f"weight, {least / 8:,.0f} bytes; raise the budget or allow fewer bits"
        )
    found = allocate({name: options[name] for name in sizes}, limit)
    return {name: int(option.choice) for name, option in found.choices.items()}


class _Trial:
    """The network from one layer on, with this layer's weight, and its input, as inputs.

    All other weights stay constants, which the engine packs once: with all as inputs a run of
    ResNet-18 took 1.5 times as long, with one it took no longer.
    """

    def __init__(
        self,
        graph: onnx.ModelProto,
        layer: GraphLayer,
        weight: FloatArray,
        held: Sequence[Values],
        original: Array,
    ) -> None:
        if not np.isfinite(weight).all():
            raise ModelError(f"layer {layer.name!r} holds NaN or infinity; load finite weights")
        self.layer, self.weight, self.held, self.original = layer, weight, held, original
        first, end = layer.nodes[0], len(graph.graph.node)
        self.source = graph.graph.node[first].input[0]
        rest = piece(graph, first, end, {**held[0], layer.weight: weight})
        if len(layer.nodes) == 1:  # others may read the layer's input too, and must not see a trial
            rest.graph.node[0].input[0] = TRIAL_INPUT
            (value,) = (v for v in rest.graph.input if v.name == self.source)
            rest.graph.input.add().CopyFrom(value)
            rest.graph.input[-1].name = TRIAL_INPUT
        self.session = inference_session(rest, available_cpus())
        self.names = [value.name for value in self.session.get_inputs()]

    def weight_harm(self, bits: int, fit: Fit) -> LayerHarm:
        """The harm of the weight that `fit` gives for `bits`."""
        fitted = np.asarray(fit(self.layer, self.weight, bits), np.float32)
        if fitted.shape != self.weight.shape or not np.isfinite(fitted).all():
            raise ModelError(
                f"layer {self.layer.name!r} at {bits} bits: fit gave shape {fitted.shape} or values "
                f"that are not finite; expected finite values of shape {self.weight.shape}"
            )
        return self._harm(bits, fitted, lambda values: values)

    def input_harm(self) -> LayerHarm:
        """The harm of the layer's input in 8 bits, asymmetric, its range by the histogram
        observer."""
        observer = OBSERVERS["histogram"]()
        for values in self.held:
            observer.observe(values[self.source])
        scale, zero_point = choose_affine(*observer.range())

        def coded(values: Array) -> Array:
            codes = quantize(values, scale, zero_point, dtype=np.uint8)
            return dequantize(codes, scale, zero_point)

        return self._harm(INPUT_BITS, self.weight, coded)

    def _harm(self, bits: int, weight: FloatArray, coded: Callable[[Array], Array]) -> LayerHarm:
        fed = (
            {**values, self.layer.weight: weight, TRIAL_INPUT: coded(values[self.source])}
            for values in self.held
        )
        logits = _logits(self.session, fed, self.names)
        if not np.isfinite(logits).all():
            raise ModelError(
                f"layer {self.layer.name!r} at {bits} bits: the network gives NaN or infinity"
            )
        layer = self.layer
        kl, mse = output_distance(self.original, logits)
        return LayerHarm(layer.name, bits, kl, mse, layer.num_weights, layer.macs)


def _advanced(graph: onnx.ModelProto, start: int, stop: int, held: list[Values]) -> list[Values]:
    """The values that live before node `stop`, from those before node `start`; chunk by chunk."""
    if start == stop:
        return held
    session = inference_session(piece(graph, start, stop, held[0]), available_cpus())
    taken = [value.name for value in session.get_inputs()]
    made = [value.name for value in session.get_outputs()]
    living = live_values(graph, stop)
    advanced = []
    for values in held:
        fresh = dict(zip(made, session.run(made, {n: values[n] for n in taken}), strict=True))
        advanced.append({name: {**values, **fresh}[name] for name in living})
    return advanced


def _run(graph: onnx.ModelProto, held: Sequence[Values]) -> Array:
    """The logits of the whole graph for all chunks."""
    session = inference_session(graph, available_cpus())
    return _logits(session, held, [value.name for value in session.get_inputs()])


def _logits(session: Any, chunks: Iterable[Values], names: Sequence[str]) -> Array:
    parts = [session.run(None, {name: values[name] for name in names})[0] for values in chunks]
    return np.concatenate(parts)


def _images(
    graph: onnx.ModelProto, batches: Iterable[FloatArray], num_images: int
) -> list[FloatArray]:
    """The calibration images in chunks that fit the memory of one run."""
    if num_images < 1:
        raise SpecError(f"num_images must be 1 or more, got {num_images}")
    (name,) = live_values(graph, 0)
    (image,) = (value for value in graph.graph.input if value.name == name)
    shape = [d.dim_value for d in image.type.tensor_type.shape.dim]
    chunks = [
        batch[start : start + CHUNK]
        for _, batch in checked_batches(batches, shape[1:], num_images)
        for start in range(0, len(batch), CHUNK)
    ]
    if not chunks:
        raise DataError("no calibration images were given; sensitivity needs one at least")
    return chunks


def _chosen(graph: onnx.ModelProto, names: Sequence[str] | None) -> list[GraphLayer]:
    """The layers to try, in the order of computing."""
    layers = {layer.name: layer for layer in graph_layers(graph)}
    able = [layer for layer in layers.values() if not layer.problem]
    if not able:
        raise ModelError(
            "the graph holds no convolution or linear layer with float weights that could be "
            "quantized; give the float network"
        )
    if names is None:
        return able
    wanted = {name.removesuffix(".weight") for name in names}
    for name in sorted(wanted):
        if name not in layers:
            raise SpecError(
                f"layers: {name!r} is not a layer; the layers are {', '.join(layers)}."
                + did_you_mean(name, layers)
            )
        if problem := layers[name].problem:
            raise SpecError(f"layers: {name!r} cannot be quantized: {problem}")
    return [layer for layer in able if layer.name in wanted]


def _checked_bits(bits: Sequence[int]) -> list[int]:
    if not bits:
        raise SpecError("bits: give at least one number of bits, for instance 2 4 8")
    for value in bits:
        if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= 8:
            raise SpecError(f"bits must be whole numbers from 1 to 8, got {value!r}")
    return sorted({int(value) for value in bits})
