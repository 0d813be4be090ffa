"""Post-training quantization to 8 bits: static, dynamic and weight-only forms of an ONNX graph."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tersor.errors import ModelError, SpecError
from tersor.graph.layers import GraphLayer, graph_layers
from tersor.graph.qdq import (
    activations_to_quantize,
    dynamic_graph,
    static_graph,
    weight_only_graph,
)
from tersor.graph.select import excluded_layers
from tersor.methods.calibrate import observe_ranges
from tersor.registry import did_you_mean
from tersor.specs import LayerPlan, Plan, Quantize
from tersor.tensors.observers import OBSERVERS

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
    from; both are empty but for mode static.
    """

    graph: onnx.ModelProto
    plan: Plan
    coverage: Coverage
    ranges: dict[str, tuple[float, float]]
    num_calibration: int


def quantize(
    graph: onnx.ModelProto,
    spec: Quantize,
    calibration: Iterable[npt.NDArray[np.float32]] = (),
) -> Quantized:
    """`plan`, then `apply`."""
    return apply(graph, plan(graph, spec), calibration)


def plan(graph: onnx.ModelProto, spec: Quantize) -> Plan:
    """Decide for every convolutional and linear layer of the float `graph`, in the order of
    computing.

    A layer that is kept has its reason. Raises SpecError for a pattern in spec.exclude that matches
    no layer, UnknownNameError for the observer, ModelError for weights that are not finite or a
    graph that is quantized.
    """
    if spec.mode == "static":
        OBSERVERS[spec.observer]
    layers = graph_layers(graph)
    _refuse_quantized(graph, layers)
    patterns = [p if p.startswith("re:") else p.removesuffix(".weight") for p in spec.exclude]
    excluded = excluded_layers([layer.name for layer in layers], patterns)
    values = {i.name: i for i in graph.graph.initializer}
    decided = []
    for layer in layers:
        reason = "excluded by the request" if layer.name in excluded else layer.problem
        if not reason and spec.mode == "dynamic" and layer.op not in ("Gemm", "MatMul"):
            reason = "dynamic quantization covers linear layers only"
        if not reason and not np.isfinite(numpy_helper.to_array(values[layer.weight])).all():
            raise ModelError(f"layer {layer.name!r} holds NaN or infinity; load finite weights")
        action, bits = ("keep", 32) if reason else (ACTIONS[spec.mode], spec.bits)
        decided.append(LayerPlan(layer.name, action, 0.0, bits, reason))
    return Plan(spec, tuple(decided))


def apply(
    graph: onnx.ModelProto, plan: Plan, calibration: Iterable[npt.NDArray[np.float32]] = ()
) -> Quantized:
    """Do what `plan` says to a copy of the float `graph`.

    `calibration` gives batches (N, C, H, W) float32, without labels, as the model sees them; mode
    static takes the first request.num_calibration images, other modes none. Raises DataError for
    unusable calibration, SpecError for a plan of something else, ModelError where the plan and the
    graph disagree.
    """
    spec = plan.request
    if not isinstance(spec, Quantize):
        raise SpecError(f"this plan answers a request of kind {spec.kind!r}; expected quantize")
    layers = graph_layers(graph)
    chosen = _chosen(layers, plan, spec)
    ranges: dict[str, tuple[float, float]] = {}
    seen = 0
    if not chosen:
        quantized = onnx.ModelProto()
        quantized.CopyFrom(graph)
    elif spec.mode == "static":
        activations = activations_to_quantize(graph, chosen)
        ranges, seen = observe_ranges(
            graph,
            activations.observed,
            calibration,
            observer=spec.observer,
            num_images=spec.num_calibration,
        )
        quantized = static_graph(graph, chosen, activations, ranges, spec.granularity)
    else:
        build = dynamic_graph if spec.mode == "dynamic" else weight_only_graph
        quantized = build(graph, chosen, spec.granularity)
    return Quantized(quantized, plan, _coverage(layers, chosen, spec), ranges, seen)


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


def _coverage(layers: list[GraphLayer], chosen: list[GraphLayer], spec: Quantize) -> Coverage:
    """Shares by layer; with weight_only the multiplications stay in float."""
    macs = sum(layer.macs for layer in layers)
    weights = sum(layer.num_weights for layer in layers)
    covered = 0 if spec.mode == "weight_only" else sum(layer.macs for layer in chosen)
    return Coverage(
        covered / max(macs, 1), sum(layer.num_weights for layer in chosen) / max(weights, 1)
    )
