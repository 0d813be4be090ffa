"""Post-training quantization: static, dynamic and weight-only forms of an ONNX graph."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tersor.errors import ModelError, SpecError
from tersor.graph.equalize import equalize
from tersor.graph.layers import GraphLayer, graph_layers
from tersor.graph.marking import Activations, activations_to_quantize
from tersor.graph.qdq import (
    Affine,
    WeightCodes,
    as_matrix,
    dynamic_graph,
    on_grid,
    shifted_biases,
    smallest_weight_scale,
    static_graph,
    weight_only_graph,
)
from tersor.graph.select import excluded_layers
from tersor.methods.calibrate import observe_ranges
from tersor.methods.correct import bias_shift, output_gain
from tersor.methods.layer_inputs import InputMoments, input_moments
from tersor.methods.sensitivity import mixed_bits, sensitivities
from tersor.registry import did_you_mean
from tersor.specs import LayerPlan, Plan, Quantize
from tersor.tensors.affine import choose_affine
from tersor.tensors.grids import Grid, fit_grid
from tersor.tensors.observers import OBSERVERS
from tersor.tensors.rounding import NEEDS_HESSIAN, ROUNDINGS

if TYPE_CHECKING:
    from torch import nn

FloatArray = npt.NDArray[np.float32]

MIXED_BITS = (2, 3, 4, 5, 6, 8)
MIXED_IMAGES = 128  # enough to rank layers: harms of neighbouring bits differ fourfold
ACTIONS = {"static": "int8", "dynamic": "dynamic", "weight_only": "weight_only"}


@dc.dataclass(frozen=True)
class Coverage:
    """Shares (0 to 1) of the model's multiplications and of its layers' weight bytes that run or
    lie in int8."""

    macs_share: float
    bytes_share: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return dc.asdict(self)


@dc.dataclass(frozen=True, eq=False)
class Quantized:
    """The quantized graph, what was done to each layer, and how much of the model that is.

    `ranges` holds (low, high) of every quantized activation, `num_calibration` the images they come
    from; both are empty but for mode static. `module` is the network whose weights those of the graph
    are, where it was trained (mode qat).
    """

    graph: onnx.ModelProto
    plan: Plan
    coverage: Coverage
    ranges: dict[str, tuple[float, float]]
    num_calibration: int
    module: nn.Module | None = None


def quantize(
    graph: onnx.ModelProto, spec: Quantize, calibration: Iterable[FloatArray] = ()
) -> Quantized:
    """`plan`, then `apply`; where spec.is_mixed the bits are chosen by measured sensitivity first."""
    images = _first_images(calibration, spec)
    bits = mixed_precision(graph, spec, images) if spec.is_mixed else None
    return apply(graph, plan(graph, spec, bits), images)


def plan(graph: onnx.ModelProto, spec: Quantize, bits: Mapping[str, int] | None = None) -> Plan:
    """Decide for every convolutional and linear layer of the float `graph`, in the order of
    computing.

    `bits` gives those of single layers; else they are spec.bits, or spec.edge_bits in the first
    layer and in the last. A layer that is kept has its reason. Raises SpecError for a pattern in
    spec.exclude that matches no layer, UnknownNameError for the observer, ModelError for weights
    that are not finite or a graph that is quantized.
    """
    if spec.mode == "qat":
        raise SpecError(
            "mode qat trains the network, and a graph cannot be trained; use "
            "tersor.quantize_network(module, data, spec, training), or --train-epochs on the "
            "command line"
        )
    if spec.mode == "static":
        OBSERVERS[spec.observer]
    layers = graph_layers(graph)
    _refuse_quantized(graph, layers)
    patterns = [p if p.startswith("re:") else p.removesuffix(".weight") for p in spec.exclude]
    excluded = excluded_layers([layer.name for layer in layers], patterns)
    values = {i.name: i for i in graph.graph.initializer}
    chosen_bits = _edges(layers, spec) | dict(bits or {})
    decided = []
    for layer in layers:
        reason = "excluded by the request" if layer.name in excluded else layer.problem
        if not reason and spec.mode == "dynamic" and layer.op not in ("Gemm", "MatMul"):
            reason = "dynamic quantization covers linear layers only"
        if not reason and not np.isfinite(numpy_helper.to_array(values[layer.weight])).all():
            raise ModelError(f"layer {layer.name!r} holds NaN or infinity; load finite weights")
        action = "keep" if reason else ACTIONS[spec.mode]
        layer_bits = 32 if reason else chosen_bits.get(layer.name, spec.bits)
        decided.append(LayerPlan(layer.name, action, 0.0, layer_bits, reason))
    return Plan(spec, tuple(decided))


def _edges(layers: list[GraphLayer], spec: Quantize) -> dict[str, int]:
    """The first layer and the last, which hurt most, keep more bits."""
    if spec.edge_bits <= spec.bits:
        return {}
    return {layers[0].name: spec.edge_bits, layers[-1].name: spec.edge_bits}


def mixed_precision(
    graph: onnx.ModelProto, spec: Quantize, images: Iterable[FloatArray]
) -> dict[str, int]:
    """Bits of each layer that `plan` would quantize: least measured harm within spec.mean_bits or
    spec.code_bytes."""
    names = [d.layer for d in plan(graph, spec).layers if d.action != "keep"]

    def fit(layer: GraphLayer, weight: FloatArray, bits: int) -> FloatArray:
        return on_grid(weight, layer.axis, _grid(spec, as_matrix(weight, layer.axis), bits))

    measured = sensitivities(graph, names, MIXED_BITS, images, num_images=MIXED_IMAGES, fit=fit)
    if spec.code_bytes:
        return mixed_bits(measured, size_bytes=spec.code_bytes)
    return mixed_bits(measured, mean_bits=spec.mean_bits)


def apply(graph: onnx.ModelProto, plan: Plan, calibration: Iterable[FloatArray] = ()) -> Quantized:
    """Do what `plan` says to a copy of the float `graph`.

    `calibration` gives batches (N, C, H, W) float32, without labels, as the model sees them; the
    first request.num_calibration images are read where the request needs any. Raises DataError for
    unusable calibration, SpecError for a plan of something else, ModelError where the plan and the
    graph disagree.
    """
    spec = plan.request
    if not isinstance(spec, Quantize):
        raise SpecError(f"this plan answers a request of kind {spec.kind!r}; expected quantize")
    chosen = _chosen(graph_layers(graph), plan, spec)
    if not chosen:
        quantized = onnx.ModelProto()
        quantized.CopyFrom(graph)
        return Quantized(quantized, plan, coverage_of(graph_layers(graph), [], spec), {}, 0)
    images = _first_images(calibration, spec)
    if spec.equalize:
        graph, _ = equalize(graph)
        chosen = _chosen(graph_layers(graph), plan, spec)
    bits = {decision.layer: decision.bits for decision in plan.layers}
    state = _Inputs(graph, chosen, spec, images)
    weights = [state.coded(layer, bits[layer.name]) for layer in chosen]
    if spec.reestimate:
        weights = [state.rescaled(each) for each in weights]
    if spec.corrects:
        graph = state.corrected(weights)
    return Quantized(
        state.built(graph, weights),
        plan,
        coverage_of(graph_layers(graph), chosen, spec),
        state.ranges,
        state.num_images,
    )


class _Inputs:
    """What calibration told about a graph, and the codes that follow from it."""

    def __init__(
        self,
        graph: onnx.ModelProto,
        chosen: Sequence[GraphLayer],
        spec: Quantize,
        images: Sequence[FloatArray],
    ) -> None:
        self.graph, self.spec = graph, spec
        self.values = {i.name: i for i in graph.graph.initializer}
        self.ranges: dict[str, tuple[float, float]] = {}
        self.codes: dict[str, Affine] = {}
        self.num_images = 0
        self.activations = Activations({})
        if spec.mode == "static":
            self.activations = activations_to_quantize(graph, chosen)
            self.ranges, self.num_images = observe_ranges(
                graph,
                self.activations.observed,
                images,
                observer=spec.observer,
                num_images=spec.num_calibration,
                levels=2**spec.activation_bits,
            )
            symmetric = spec.activation_symmetry == "symmetric"
            self.codes = {
                root: choose_affine(*limits, bits=spec.activation_bits, symmetric=symmetric)
                for root, limits in self.ranges.items()
            }
        self.moments: dict[str, InputMoments] = {}
        if spec.rounding in NEEDS_HESSIAN or spec.corrects:
            self.moments = input_moments(graph, chosen, images, num_images=spec.num_calibration)
            self.num_images = self.num_images or sum(len(batch) for batch in images)

    def coded(self, layer: GraphLayer, bits: int) -> WeightCodes:
        """Codes of `bits` for the layer's weight, by the request's grid and rounding."""
        spec = self.spec
        weight = numpy_helper.to_array(self.values[layer.weight])
        matrix = as_matrix(weight, layer.axis)
        smallest: Any = 0.0
        if spec.mode == "static":
            inputs = [self.graph.graph.node[index].input[0] for index in layer.nodes]
            scales = [self.codes[self.activations.root[name]][0] for name in inputs]
            smallest = smallest_weight_scale(self.graph, layer, scales)
        grid = _grid(spec, matrix, bits, smallest)
        moments = self.moments.get(layer.name)
        second = None if moments is None else moments.second
        indexes = ROUNDINGS[spec.rounding](matrix, grid, second, seed=0)
        return WeightCodes(layer, grid, indexes, weight.shape)

    def rescaled(self, weight: WeightCodes) -> WeightCodes:
        """The same codes with scales that give every output channel its former variance."""
        gain = output_gain(*self._matrices(weight), self.moments[weight.layer.name])
        scale = np.asarray(weight.grid.scale * gain[:, None], np.float32)
        zero_point = np.broadcast_to(weight.grid.zero_point, scale.shape)
        return dc.replace(weight, grid=dc.replace(weight.grid, scale=scale, zero_point=zero_point))

    def _matrices(self, weight: WeightCodes) -> tuple[FloatArray, FloatArray]:
        """The weight (O, K) before and after rounding."""
        held = numpy_helper.to_array(self.values[weight.layer.weight])
        return as_matrix(held, weight.layer.axis), weight.grid.decode(weight.indexes)

    def corrected(self, weights: Sequence[WeightCodes]) -> onnx.ModelProto:
        """The graph whose biases take back the mean error of the coded weights."""
        shifts = {}
        for each in weights:
            name = each.layer.name
            shifts[name] = bias_shift(*self._matrices(each), self.moments[name])
        return shifted_biases(self.graph, [each.layer for each in weights], shifts)

    def built(self, graph: onnx.ModelProto, weights: Sequence[WeightCodes]) -> onnx.ModelProto:
        """The quantized graph."""
        if self.spec.mode == "static":
            return static_graph(
                graph, weights, self.activations, self.codes, self.spec.activation_bits
            )
        return (dynamic_graph if self.spec.mode == "dynamic" else weight_only_graph)(graph, weights)


def _grid(spec: Quantize, matrix: FloatArray, bits: int, smallest: Any = 0.0) -> Grid:
    """The grid that `spec` asks for a weight (O, K) at `bits`; other bits than spec.bits are uniform."""
    search = spec.weight_search
    if search == "auto":  # outliers cost little at 8 bits, and most of the codes at few
        search = "minmax" if bits == 8 else "mse"
    return fit_grid(
        spec.code if bits == spec.bits else "uniform",
        matrix,
        bits,
        symmetric=spec.symmetry == "symmetric",
        granularity=spec.granularity,
        group_size=spec.group_size,
        search=search,
        smallest=smallest,
    )


def _first_images(batches: Iterable[FloatArray], spec: Quantize) -> list[FloatArray]:
    """The batches of the first spec.num_calibration images, held for the passes that follow; none
    where the request reads none."""
    held: list[FloatArray] = []
    seen = 0
    if not spec.needs_inputs:
        return held
    for batch in batches:
        held.append(batch)
        seen += len(batch)
        if seen >= spec.num_calibration:
            break
    return held


def _refuse_quantized(graph: onnx.ModelProto, layers: list[GraphLayer]) -> None:
    ops = {node.op_type for node in graph.graph.node}
    if found := ops & {"QuantizeLinear", "DequantizeLinear", "MatMulInteger"}:
        raise ModelError(
            f"the graph is quantized already (it holds {min(found)}); give the float graph"
        )
    if not layers:
        raise ModelError(
            "the graph holds no convolution or linear layer with constant weights to quantize"
        )


def _chosen(layers: list[GraphLayer], plan: Plan, spec: Quantize) -> list[GraphLayer]:
    """The layers that the plan quantizes, checked against the graph."""
    by_name = {layer.name: layer for layer in layers}
    chosen = []
    for decision in plan.layers:
        if decision.layer not in by_name:
            raise ModelError(
                f"the plan names layer {decision.layer!r}, which the graph does not hold: it is "
                "the plan of another model." + did_you_mean(decision.layer, by_name)
            )
        if decision.action == "keep":
            continue
        layer = by_name[decision.layer]
        if decision.action != ACTIONS[spec.mode]:
            raise SpecError(
                f"plan: layer {layer.name!r} has action {decision.action!r}; mode {spec.mode} "
                f"allows keep and {ACTIONS[spec.mode]}"
            )
        if layer.problem or (spec.mode == "dynamic" and layer.op == "Conv"):
            raise SpecError(
                f"plan: layer {layer.name!r} ({layer.op}) cannot be {decision.action}: "
                + (layer.problem or "dynamic quantization covers linear layers only")
            )
        chosen.append(layer)
    return chosen


def coverage_of(layers: list[GraphLayer], chosen: list[GraphLayer], spec: Quantize) -> Coverage:
    """Shares by layer; with weight_only the multiplications stay in float."""
    macs = sum(layer.macs for layer in layers)
    weights = sum(layer.num_weights for layer in layers)
    covered = 0 if spec.mode == "weight_only" else sum(layer.macs for layer in chosen)
    return Coverage(
        covered / max(macs, 1), sum(layer.num_weights for layer in chosen) / max(weights, 1)
    )
