"""Quantization-aware training: weights, their steps and those of layer inputs are learned together (LSQ, Esser 2020).

The loss is that of the one training loop, `methods.finetune`: with distill=1 the distance from the float network's
outputs, which needs no labels. Batch normalisation stays live while training and folds into the codes' scales when
the graph is made.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from tersor.data.arrays import Splits
from tersor.errors import ModelError
from tersor.graph.export import export_onnx
from tersor.graph.fold import FoldedCopies, fold_copies_, unfold_copies_
from tersor.graph.layers import GraphLayer, graph_layers
from tersor.graph.marking import activations_to_quantize
from tersor.graph.select import excluded_layers
from tersor.methods.calibrate import observe_ranges
from tersor.methods.fake_quantize import (
    CODES,
    LearnedStep,
    fitted_steps,
    input_levels,
    weight_levels,
)
from tersor.methods.finetune import Progress, Trained, finetune
from tersor.methods.learned import InputGrid, LayerBits, LearnedLayer
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.registry import did_you_mean
from tersor.specs import Finetune
from tersor.tensors.affine import choose_affine

FloatArray = npt.NDArray[np.float32]
REESTIMATE_BATCH = 128
TRAINABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dc.dataclass(frozen=True, eq=False)
class QatResult:
    """The trained plain module, whose weights are exactly scale * codes, what was learned by layer, and how it
    went (`trained.module` still holds the fake quantization)."""

    module: nn.Module
    learned: dict[str, LearnedLayer]
    trained: Trained


def train_quantized(
    module: nn.Module,
    splits: Splits,
    *,
    weight_bits: int | Mapping[str, int],
    training: Finetune,
    activation_bits: int = 8,
    edge_bits: int = 8,
    code: str = "uniform",
    symmetric_inputs: bool = False,
    exclude: Sequence[str] = (),
    observer: str = "histogram",
    num_calibration: int = 512,
    teacher: nn.Module | None = None,
    checkpoint: pathlib.Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_progress: Callable[[Progress], None] | None = None,
) -> QatResult:
    """Train a copy of `module` as if weights and layer inputs had few bits already; `module` stays as it is.

    `weight_bits` is for all layers, of which the first and the last get `edge_bits` where that is more; or by
    layer name, for those layers alone. A layer whose bits `code` does not have takes code uniform. `exclude`
    names layers left in float, as for quantize. Input ranges start from `num_calibration` unlabelled
    calibration inputs by the registered `observer`. `teacher` (default: `module`) gives the logits for
    training.distill. Dropout is off: it scales up the inputs of a layer, beyond the range that evaluation
    needs. At the end batch norm is re-estimated from the calibration inputs, augmented as in the training.
    Raises as `finetune` does, SpecError for bits or patterns, ModelError for layers that cannot be trained.
    """
    prepared = copy.deepcopy(module).cpu().eval()
    # Before the weights get steps: the folded layer's codes are those of every copy.
    folded, _ = fold_copies_(prepared, torch.zeros(2, *splits.input_shape))
    graph = export_onnx(prepared, splits.input_shape)
    layers = trainable_layers(prepared, graph, exclude)
    every = [layer.name for layer in graph_layers(graph)]
    edges = {every[0]: edge_bits, every[-1]: edge_bits}
    decisions = _decisions(layers, weight_bits, activation_bits, edges, code)
    sources = input_sources(graph, [layer for layer in layers if layer.name in decisions])
    ranges, _ = observe_ranges(
        graph,
        list(dict.fromkeys(itertools.chain(*sources.values()))),
        splits.batches(splits.calibration, 64),
        observer=observer,
        num_images=num_calibration,
        levels=2**activation_bits,
    )
    prepare_(prepared, decisions, sources, ranges, symmetric_inputs=symmetric_inputs)
    set_dropout_(prepared)
    trained = finetune(
        prepared,
        splits,
        dc.replace(training, compile="off"),
        teacher=module if teacher is None else teacher,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        on_progress=on_progress,
    )
    # Means of weights and means of statistics do not belong together: 9 steps of ResNet-18 at 2 bits ended ten
    # times nearer the teacher with this.
    calibration = splits.batches(splits.calibration, REESTIMATE_BATCH)
    settled = reestimate_batch_norm(
        trained.module,
        calibration,
        augment=training.augment,
        precision=training.precision,
        seed=training.seed,
    )
    trained = dc.replace(trained, module=settled)
    plain, learned = strip(settled)
    _unfold_(plain, learned, folded)
    set_dropout_(plain, module)
    return QatResult(plain, learned, trained)


def trainable_layers(
    module: nn.Module, graph: onnx.ModelProto, exclude: Sequence[str]
) -> list[GraphLayer]:
    """The graph's layers, in the order of computing, that are layers of `module` and may be quantized."""
    layers = graph_layers(graph)
    names = [layer.name for layer in layers]
    patterns = [p if p.startswith("re:") else p.removesuffix(".weight") for p in exclude]
    excluded = excluded_layers(names, patterns)
    held = dict(module.named_modules())
    found = [
        layer
        for layer in layers
        if layer.name not in excluded
        and not layer.problem
        and isinstance(held.get(layer.name), TRAINABLE)
    ]
    if not found:
        raise ModelError(
            f"{type(module).__name__} has no convolutional or linear layer left to train at few bits"
        )
    return found


def _decisions(
    layers: Sequence[GraphLayer],
    weight_bits: int | Mapping[str, int],
    activation_bits: int,
    edges: Mapping[str, int],
    code: str,
) -> dict[str, LayerBits]:
    names = [layer.name for layer in layers]
    if isinstance(weight_bits, Mapping):
        bits = dict(weight_bits)
        if unknown := [name for name in bits if name not in names]:
            raise ModelError(
                f"weight_bits names {unknown[0]!r}, which is no layer that can be trained at few bits; those "
                f"are {', '.join(names)}." + did_you_mean(unknown[0], names)
            )
    else:
        weight_levels(weight_bits, code)
        bits = {name: max(weight_bits, edges.get(name, 0)) for name in names}
    own = CODES.get(code, ())
    return {
        name: LayerBits(count, activation_bits, code if count in own else "uniform")
        for name, count in bits.items()
    }


def input_sources(
    graph: onnx.ModelProto, layers: Sequence[GraphLayer]
) -> dict[str, tuple[str, ...]]:
    """Layer name -> the values of `graph` whose range its input shares, as `ranges` of `prepare_` names them.

    Layers whose inputs must have the same codes have the same tuple: of one value, or of more where a layer is
    used more than once.
    """
    root = activations_to_quantize(graph, layers).root
    reads = {
        layer.name: [root[graph.graph.node[index].input[0]] for index in layer.nodes]
        for layer in layers
    }
    groups: list[tuple[str, ...]] = []
    for values in reads.values():
        joined = [group for group in groups if not set(values).isdisjoint(group)]
        merged = tuple(dict.fromkeys(itertools.chain(*joined, values)))
        groups = [*(group for group in groups if group not in joined), merged]
    return {
        name: next(group for group in groups if values[0] in group)
        for name, values in reads.items()
    }


def prepare_(
    module: nn.Module,
    decisions: Mapping[str, LayerBits],
    sources: Mapping[str, tuple[str, ...]],
    ranges: Mapping[str, tuple[float, float]],
    *,
    symmetric_inputs: bool = False,
) -> None:
    """Put learned fake quantization into the layers that `decisions` names, in place; `strip` takes it out.

    A weight gets one step for each output channel, of least squared error at the start. A layer's input gets the
    codes that cover the `ranges` of all of sources[layer] (see `input_sources`): their scale is learned, their
    zero point stays; layers with the same source share them. The input of a layer without a source stays in
    float. Raises ModelError for a name that is no convolutional or linear layer, or whose weight is computed,
    shared or not finite; SpecError for the bits.
    """
    steps: dict[tuple[str, ...], LearnedStep] = {}
    for name, bits in decisions.items():
        layer = _layer(module, name)
        levels = weight_levels(bits.bits, bits.code)
        weight: Any = layer.weight
        start = fitted_steps(weight, levels)
        parametrize.register_parametrization(layer, "weight", LearnedStep(start, levels))
        layer.layer_bits = bits  # type: ignore[assignment]
        if name not in sources:
            continue
        source = sources[name]
        if source not in steps:
            low = min(ranges[value][0] for value in source)
            high = max(ranges[value][1] for value in source)
            scale, zero_point = choose_affine(
                low, high, bits=bits.activation_bits, symmetric=symmetric_inputs
            )
            steps[source] = LearnedStep(
                torch.tensor(float(scale)), input_levels(bits.activation_bits, int(zero_point))
            )
        layer.input_step = steps[source]
        layer.input_hook = layer.register_forward_pre_hook(_quantize_input)  # type: ignore[assignment]


def _quantize_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Finds the step through the layer, so that a deep copy uses its own."""
    assert isinstance(layer.input_step, LearnedStep)
    return layer.input_step(inputs[0]), *inputs[1:]


def _layer(module: nn.Module, name: str) -> nn.Module:
    """The layer `name`, whose weight is a parameter of its own."""
    layer = dict(module.named_modules()).get(name)
    if not isinstance(layer, TRAINABLE):
        found = "missing" if layer is None else f"a {type(layer).__name__}"
        raise ModelError(
            f"{name!r} is {found}; convolutional and linear layers can be trained at few bits"
        )
    readers = [
        key for key, p in module.named_parameters(remove_duplicate=False) if p is layer.weight
    ]
    if parametrize.is_parametrized(layer, "weight") or readers != [f"{name}.weight"]:
        raise ModelError(
            f"the weight of layer {name!r} is computed from others or shared with another layer, so it has no "
            "codes of its own; exclude the layer"
        )
    if not torch.isfinite(layer.weight).all():
        raise ModelError(f"layer {name!r} holds NaN or infinity; load finite weights")
    return layer


def set_dropout_(module: nn.Module, like: nn.Module | None = None) -> None:
    """The shares that dropout drops: none, or as in the module `like`."""
    for name, part in module.named_modules():
        if isinstance(part, _DropoutNd):
            held = None if like is None else like.get_submodule(name)
            part.p = held.p if isinstance(held, _DropoutNd) else 0.0


def strip(prepared: nn.Module) -> tuple[nn.Module, dict[str, LearnedLayer]]:
    """A plain copy of a prepared module, on the CPU, and what was learned, by layer name.

    Every layer is of its own class again, its weight exactly scale * codes; inputs are in float again.
    """
    plain = copy.deepcopy(prepared).cpu()
    learned = {}
    for name, layer in plain.named_modules():
        if not isinstance(getattr(layer, "layer_bits", None), LayerBits):
            continue
        bits: Any = layer.layer_bits
        grid = None
        if isinstance(step := getattr(layer, "input_step", None), LearnedStep):
            layer.input_hook.remove()
            grid = InputGrid(step.size.item(), -step.levels.low, bits.activation_bits)
            del layer.input_step, layer.input_hook
        codes, scale = _own_weight_(layer)
        learned[name] = LearnedLayer(bits, codes, scale, grid)
        del layer.layer_bits
        _write_weight_(layer, learned[name])
    return plain, learned


def _own_weight_(layer: nn.Module) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Give the layer its class and its weight back; returns the learned codes (O, K) and scales (O,).

    torch's remove_parametrizations takes the weight out of a class that deep copies of the layer share, and so
    breaks them.
    """
    held: Any = layer.parametrizations["weight"]  # type: ignore[index]
    step, weight = held[0], held.original
    codes = step.codes(weight).flatten(1).to(torch.int8).numpy()
    scale = step.size.detach().numpy().astype(np.float32)
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    others = dict(layer.named_parameters(recurse=False))
    for name in others:
        delattr(layer, name)
    for name, parameter in {"weight": weight, **others}.items():  # in the order of a fresh layer
        layer.register_parameter(name, parameter)
    return codes, scale


@torch.no_grad()
def _write_weight_(layer: nn.Module, learned: LearnedLayer) -> None:
    weight: Any = layer.weight
    weight.copy_(torch.from_numpy(learned.weight()).view(weight.shape))


def _unfold_(
    module: nn.Module, learned: dict[str, LearnedLayer], folded: list[FoldedCopies]
) -> None:
    """Undo the folding of equal copies, in place: each copy has the folded codes and its share of the scale."""
    unfold_copies_(module, folded)
    for fold in folded:
        if fold.linear in learned:
            held = learned[fold.linear]
            learned[fold.linear] = dc.replace(
                held,
                codes=np.repeat(held.codes, fold.copies, 1),
                scale=held.scale / np.float32(fold.copies),
            )
            _write_weight_(module.get_submodule(fold.linear), learned[fold.linear])
