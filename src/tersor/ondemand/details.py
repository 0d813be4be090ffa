"""What the page of an answer shows beside its costs: layer by layer, values before and after, answers that changed."""

from __future__ import annotations

import dataclasses as dc
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from tersor.artifact import Artifact, load
from tersor.bench import energy
from tersor.engines import open_session
from tersor.engines.load import logits_of
from tersor.errors import TersorError
from tersor.graph.constants import codes_activations, constant_values
from tersor.graph.layers import GraphLayer, graph_layers, num_weights
from tersor.methods.bit_options import TRIED_BITS
from tersor.ondemand.candidate import Measured
from tersor.ondemand.changed import changed
from tersor.ondemand.effort import Effort
from tersor.ondemand.facts import Facts
from tersor.ondemand.histograms import histograms
from tersor.ondemand.latency import LatencyTable, LayerShape, layer_shapes
from tersor.ondemand.original import Original
from tersor.specs import LayerPlan, Plan

Array = np.ndarray[Any, Any]
ENERGY_SECONDS = 1.0


def details(
    original: Original,
    known: Facts,
    best: Measured,
    path: pathlib.Path,
    effort: Effort,
    *,
    model: str,
    seed: int,
    examples: bool = True,
) -> tuple[dict[str, Any], dict[int, bytes]]:
    """What is to be told of the file at `path`, as a JSON object, and pictures (PNG) of inputs whose answer changed,
    by their number among the held-out ones.

    Keys: layers (one a row), rest_bytes (of the file, outside of all layers), histograms, changed, energy, conditions;
    units in the names, None where something was not measured. No input is in it, and without `examples` no answer
    to a single input either.
    """
    held = load(path)
    graph = held.to_onnx()
    layers, rest = _layers(original, known, best, held, graph)
    session = open_session(graph, engine=best.engine, threads=original.threads)
    answers, pictures = changed(original, logits_of(session, original.held), examples=examples)
    told = {
        "layers": layers,
        "rest_bytes": path.stat().st_size - rest,
        "histograms": histograms(original.graph, graph, original.held),
        "changed": answers,
        "energy": _energy(original, graph, session, best),
        "conditions": _conditions(original, effort, model, seed),
    }
    return told, pictures


def _conditions(original: Original, effort: Effort, model: str, seed: int) -> dict[str, Any]:
    return {
        "model": model,
        "data_name": original.splits.name,
        "num_held": len(original.held),
        "num_calibration": len(original.inputs),
        "labelled": original.labels is not None,
        "synthetic": original.synthetic,
        "by_estimate": original.by_estimate,
        "batch": original.batch,
        "threads": original.threads,
        "seed": seed,
        "effort": dc.asdict(effort),
        "timing_seconds": effort.timing_seconds,
        "float_engine_ms": original.engine_ms,
        "folded": list(original.folded),
    }


def _layers(
    original: Original, known: Facts, best: Measured, held: Artifact, graph: onnx.ModelProto
) -> tuple[list[dict[str, Any]], int]:
    """A row for each layer of the original in the order of computing, and the bytes of all in the file."""
    weights = constant_values(graph)
    sizes = _sizes(held, [layer.name for layer in graph_layers(original.graph)])
    times = _Times(original, codes_activations(graph))
    before = constant_values(original.graph)
    plans = _decisions(best.plan)
    rows = []
    for layer in graph_layers(original.graph):
        old, new = before[layer.weight], weights.get(layer.weight)
        plan = plans.get(layer.name) or _block_of(layer.name, best.plan)
        options = known.bits.get(layer.name)
        gone = plan is not None and plan.action == "bypass"
        bits = plan.bits if plan is not None and plan.action != "keep" else 32
        kept = None if new is None else _widths(new, layer)
        row = {
            "layer": layer.name,
            "op": layer.op,
            "action": plan.action if plan is not None else "keep",
            "reason": _reason(layer.name, plan),
            "bits": None if gone else bits,
            "inputs": None if kept is None else kept[0],
            "inputs_before": _widths(old, layer)[0],
            "outputs": None if kept is None else kept[1],
            "outputs_before": _widths(old, layer)[1],
            "weights": None if new is None else new.size,
            "weights_before": old.size,
            "density": None if new is None else np.count_nonzero(new) / max(new.size, 1),
            "macs": None if new is None else layer.macs * new.size / old.size,
            "macs_before": layer.macs,
            "size_bytes": sizes[layer.name],
            "time_ms": None if kept is None else times.of(layer.weight, *kept),
            "time_before_ms": times.of(layer.weight, *_widths(old, layer)),
            "harm_kl": None if options is None else options.harm_kl.get(bits),
            "harm_tried_kl": None if options is None else options.harm_kl.get(TRIED_BITS),
            "tried_bits": TRIED_BITS,
        }
        rows.append(row)
    return rows, sum(sizes.values())


def _widths(weight: Array, layer: GraphLayer) -> tuple[int, int]:
    """(inputs of one group, outputs) of a weight."""
    axis = layer.axis % weight.ndim
    return int(weight.shape[1 - axis]) if weight.ndim > 1 else 1, int(weight.shape[axis])


def _decisions(plan: Plan) -> dict[str, Any]:
    """The last decision on each layer: that of the codes."""
    return {each.layer: each for each in plan.layers}


def _block_of(layer: str, plan: Plan) -> LayerPlan | None:
    """The decision by which the block went that `layer` was in; None where none did."""
    lines = (line for held in plan.earlier for line in held.layers if line.action == "bypass")
    return next((line for line in lines if layer.startswith(f"{line.layer}.")), None)


def _reason(layer: str, decision: LayerPlan | None) -> str:
    if decision is None:
        return "the plan does not name it"
    return f"its block {decision.layer} went" if decision.action == "bypass" else decision.reason


def _sizes(held: Artifact, names: list[str]) -> dict[str, int]:
    """Bytes of the sections that belong to each layer: its weight, scales and bias."""
    found = dict.fromkeys(names, 0)
    for key in held.tensors:
        # The longest name counts: "a.b.weight" is of "a.b" where both "a" and "a.b" are layers.
        own = [name for name in names if key.startswith(f"{name}.")]
        if own:
            found[max(own, key=len)] += held.size_of(key)
    return found


class _Times:
    """Milliseconds of single layers as integer kernels, None where they run otherwise or cannot be timed alone."""

    def __init__(self, original: Original, integers: bool) -> None:
        self.table = LatencyTable(original.batch, original.threads)
        self.shapes: Mapping[str, list[LayerShape]] = {}
        if integers:
            self.shapes = layer_shapes(original.module, original.input_shape)

    def of(self, weight: str, inputs: int, outputs: int) -> float | None:
        """All runs of the layer whose weight is called so, at these channels."""
        spent = []
        for shape in self.shapes.get(weight, ()):
            try:
                if shape.groups > 1:  # inputs and outputs go together
                    spent.append(self.table.time_ms(shape) * outputs / shape.outputs)
                else:
                    spent.append(self.table.time_ms(shape.narrowed(inputs, outputs)))
            except TersorError:
                return None
        self.table.keep()
        return sum(spent) if spent else None


def _energy(
    original: Original, graph: onnx.ModelProto, session: Any, best: Measured
) -> dict[str, Any]:
    """Counted energy in its two parts, before and after, and what was measured."""
    integers = any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    weights = float(num_weights(graph))
    parts = {
        "original": energy.counted_parts_mj(
            original.costs["macs"],
            original.costs["size_bytes"],
            integers=False,
            batch=original.batch,
        ),
        "compressed": energy.counted_parts_mj(
            best.costs["macs"],
            weights * (1 if integers else 4),
            integers=integers,
            batch=original.batch,
        ),
    }
    images = np.zeros((original.batch, *original.input_shape), np.float32)
    eager = open_session(original.as_given, engine="torch", threads=original.threads)
    measured = {
        name: energy.measured_energy(
            functools.partial(run, images), original.batch, seconds=ENERGY_SECONDS
        )
        for name, run in (("original", eager.run), ("compressed", session.run))
    }
    return {
        **{f"{name}_compute_mj": held[0] for name, held in parts.items()},
        **{f"{name}_memory_mj": held[1] for name, held in parts.items()},
        **{f"{name}_measured_mj": held.mj for name, held in measured.items()},
        "not_measured": measured["compressed"].reason,
        "integers": integers,
        "float32_mac_pj": energy.FLOAT32_MAC_PJ,
        "int8_mac_pj": energy.INT8_MAC_PJ,
        "dram_byte_pj": energy.DRAM_BYTE_PJ,
    }
