"""From a network to an integer graph by training: what was learned becomes codes, scales and ranges."""

from __future__ import annotations

import copy
import dataclasses as dc
import pathlib
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tersor.data.arrays import Splits
from tersor.errors import SpecError
from tersor.graph.fold import fold_copies_
from tersor.graph.layers import GraphLayer, graph_layers
from tersor.graph.marking import activations_to_quantize
from tersor.graph.qdq import Affine, smallest_weight_scale, static_graph
from tersor.methods.calibrate import observe_ranges
from tersor.methods.finetune import Progress
from tersor.methods.learned import LearnedGraph, export_quantized, weight_codes
from tersor.methods.qat import train_quantized
from tersor.methods.quantize import Quantized, coverage_of
from tersor.specs import Finetune, LayerPlan, Plan, Quantize
from tersor.tensors.affine import choose_affine

FloatArray = npt.NDArray[np.float32]
CALIBRATION_BATCH = 64


def quantize_aware(
    module: nn.Module,
    splits: Splits,
    spec: Quantize,
    training: Finetune,
    *,
    fold_copies: bool = False,
    checkpoint: pathlib.Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Quantized:
    """Train a copy of `module` with the codes of `spec` (mode qat) and give its integer graph.

    With training.distill = 1 the float network is the teacher and no labels are read. With
    `fold_copies` equal copies before a linear layer are folded first. Raises SpecError for another
    mode, and as `train_quantized` does.
    """
    if spec.mode != "qat":
        raise SpecError(f"training is for mode qat, got mode {spec.mode}")
    network = copy.deepcopy(module)
    if fold_copies:
        fold_copies_(network, torch.zeros(2, *splits.input_shape))
    result = train_quantized(
        network,
        splits,
        weight_bits=spec.bits,
        training=training,
        activation_bits=spec.activation_bits,
        edge_bits=spec.edge_bits,
        code=spec.code,
        symmetric_inputs=spec.activation_symmetry == "symmetric",
        exclude=spec.exclude,
        observer=spec.observer,
        num_calibration=spec.num_calibration,
        checkpoint=checkpoint,
        on_progress=on_progress,
    )
    learned = export_quantized(result.module, result.learned, splits.input_shape)
    batches = splits.batches(splits.calibration, CALIBRATION_BATCH)
    return dc.replace(integer_graph(learned, batches, spec), module=result.module)


def integer_graph(
    learned: LearnedGraph, batches: Iterable[FloatArray], spec: Quantize
) -> Quantized:
    """The static graph of codes that are chosen already; where no grid was learned, the layers' inputs and
    what lies between them get ranges from spec.num_calibration of the inputs in `batches` (N, C, H, W) float32,
    observed and coded as `spec` says. Raises as `observe_ranges`.
    """
    graph = learned.graph
    layers = graph_layers(graph)
    chosen = [layer for layer in layers if layer.name in learned.layers]
    activations = activations_to_quantize(graph, chosen)
    ranges, seen = observe_ranges(
        graph,
        activations.observed,
        batches,
        observer=spec.observer,
        num_images=spec.num_calibration,
        levels=2**spec.activation_bits,
    )
    symmetric = spec.activation_symmetry == "symmetric"
    codes: dict[str, Affine] = {}
    for root, limits in ranges.items():
        grid = learned.inputs.get(root)
        if grid is None:
            codes[root] = choose_affine(*limits, bits=spec.activation_bits, symmetric=symmetric)
        else:
            codes[root] = np.float32(grid.scale), np.uint8(grid.zero_point)
            ranges[root] = grid.range
    weights = []
    for layer in chosen:
        inputs = [activations.root[graph.graph.node[index].input[0]] for index in layer.nodes]
        smallest = smallest_weight_scale(graph, layer, [codes[root][0] for root in inputs])
        weights.append(weight_codes(layer, learned, smallest))
    decided = tuple(_decision(layer, learned) for layer in layers)
    return Quantized(
        static_graph(graph, weights, activations, codes, spec.activation_bits),
        Plan(spec, decided),
        coverage_of(layers, chosen, spec),
        ranges,
        seen,
    )


def _decision(layer: GraphLayer, learned: LearnedGraph) -> LayerPlan:
    held = learned.layers.get(layer.name)
    if held is None:
        return LayerPlan(layer.name, "keep", reason=layer.problem or "not trained: excluded")
    return LayerPlan(layer.name, "int8", bits=held.bits.bits)
