"""A candidate's weights coded by rate and distortion: fewer bytes for the same answers than bits by layer."""

from __future__ import annotations

import dataclasses as dc

import numpy as np
import numpy.typing as npt
import onnx
import torch

from tersor.graph.layers import graph_layers
from tersor.methods.bit_options import WHOLE_SCALE
from tersor.methods.learned import LearnedLayer, export_quantized
from tersor.methods.paired_moments import weight_of
from tersor.methods.qat import trainable_layers
from tersor.methods.quantize_aware import integer_graph
from tersor.methods.reestimate import augmentation_of
from tersor.methods.small_graph import small_graph
from tersor.methods.squeeze import Calibration, CodedNetwork
from tersor.methods.squeeze_search import Coder, Priced, code_to_size
from tersor.methods.steps import augmented
from tersor.ondemand.effort import Watch
from tersor.ondemand.network import Network, batches_of
from tersor.ondemand.original import Original
from tersor.specs import LayerPlan, Plan, Quantize

FloatArray = npt.NDArray[np.float32]
PRECISION = "bf16"
# Weights that one pass over a layer codes in a second on one core, the slowest seen with ample inputs; a
# search of the price takes about PASSES of them.
WEIGHTS_PER_SECOND, PASSES = 1.5e5, 4


def seconds_to_code(num_weights: int) -> float:
    """About what `coded` takes for so many weights."""
    return PASSES * num_weights / WEIGHTS_PER_SECOND


def bytes_of_scales(made: Network) -> int:
    """About what the scales of all output channels take in the file."""
    layers = trainable_layers(made.module, made.graph, ())
    parts = dict(made.module.named_modules())
    return round(WHOLE_SCALE * sum(len(weight_of(parts[layer.name])) for layer in layers))


def coded(
    original: Original,
    made: Network,
    code_bytes: int,
    spec: Quantize,
    watch: Watch,
    *,
    near: Priced | None = None,
    seed: int = 0,
) -> tuple[onnx.ModelProto, Plan, Priced]:
    """The graph of `made` whose codes take at most `code_bytes` in a file and hardly less, chosen for what they
    change of made's own answers; in integers, or in mode weight_only in float. And the plan, and what it came from.

    `near`: the same network coded before. Raises BudgetError where no price of a bit comes so low.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = batches_of(original.inputs)
    augment = augmentation_of(original.module, batches, precision=PRECISION, seed=seed)
    changed = [augmented(torch.from_numpy(b), augment, generator).numpy() for b in batches]
    calibration = Calibration(made.module, changed, precision=PRECISION, seed=seed)
    layers = trainable_layers(made.module, made.graph, ())
    coder = Coder(calibration, tuple(layer.name for layer in layers), None, watch)
    priced = code_to_size(coder, code_bytes, near=near)
    network, shape = priced.coded, original.input_shape
    if spec.mode == "weight_only":
        graph = small_graph(network.module, network.learned, shape)
    else:
        learned = export_quantized(network.module, network.learned, shape)
        graph = integer_graph(learned, batches, spec).graph
    lines = tuple(
        _line(layer.name, layer.problem, network, spec) for layer in graph_layers(made.graph)
    )
    earlier = () if made.plan is None else (made.plan,)
    return graph, Plan(dc.replace(spec, rounding="nearest"), lines).after(earlier), priced


def _line(name: str, problem: str, network: CodedNetwork, spec: Quantize) -> LayerPlan:
    learned = network.learned.get(name)
    if learned is None:
        return LayerPlan(name, "keep", reason=network.kept.get(name) or problem or "not trainable")
    action = "int8" if spec.mode == "static" else "weight_only"
    return LayerPlan(name, action, _zeros(learned), _bits(learned))


def _zeros(learned: LearnedLayer) -> float:
    return round(float(1 - np.count_nonzero(learned.codes) / learned.codes.size), 3)


def _bits(learned: LearnedLayer) -> int:
    return int(np.abs(learned.codes).max(initial=1)).bit_length() + 1
