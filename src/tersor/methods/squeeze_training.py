"""Fine-tuning of a coded network with the file's expected bits, from the float network's outputs."""

from __future__ import annotations

import copy
import dataclasses as dc
import functools
import pathlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.artifact.rates import coded_bytes
from tersor.data.arrays import Splits
from tersor.methods.finetune import Progress, Trained, finetune
from tersor.methods.learned import LayerBits
from tersor.methods.paired_moments import weight_of
from tersor.methods.qat import set_dropout_, strip
from tersor.methods.rate_control import CodedWeight, SizeControl, coded_layers, weight_behind
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.methods.squeeze import Calibration, CodedLayer, CodedNetwork
from tersor.methods.squeeze_search import Priced
from tersor.specs import Finetune

INSIDE = 0.45  # of a step: how far a weight of code 0 may lie from 0 at the start
FIRST_DEAD = 0.5
LAST_TRIES = 5
LEAST_FILLED = 0.985  # of the bytes allowed


def train_coded(
    original: nn.Module,
    start: Priced,
    splits: Splits,
    training: Finetune,
    *,
    code_bytes: int,
    checkpoint: pathlib.Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Fine-tune a copy of start.coded.module until its codes take about `code_bytes` in a file; `finished`
    makes a network of what comes back, whose module still trains.

    The size goes from that of `start` to the one asked for in the first part of the steps. The original is
    the teacher where `training` distils. Dropout is off, as in mode qat. Raises as `finetune` does.
    """
    coded = start.coded
    told = sum(each.bits for each in coded.layers.values()) / 8
    control = functools.partial(
        SizeControl,
        start_bytes=float(max(coded.code_bytes, code_bytes)),
        end_bytes=float(code_bytes),
        price=start.price,
        ratio=coded.code_bytes / max(told, 1.0),
    )
    return finetune(
        prepare_coded(original, coded),
        splits,
        dc.replace(training, compile="off"),
        teacher=original if training.needs_teacher else None,
        control=control,
        checkpoint=checkpoint,
        on_progress=on_progress,
    )


def finished(
    trained: nn.Module, original: nn.Module, calibration: Calibration, code_bytes: int, price: float
) -> CodedNetwork:
    """The network that a training of `train_coded` came to, its codes at most `code_bytes` in a file; batch
    norms re-estimated from the calibration's inputs. `price` is about what a bit costs."""
    module = copy.deepcopy(trained)
    fit_to_size_(module, code_bytes, price)
    inputs = [chunk.numpy() for chunk in calibration.inputs]
    settled = reestimate_batch_norm(module, inputs, precision=calibration.precision)
    plain, learned = strip(settled)
    set_dropout_(plain, original)
    layers = {}
    for name, (layer, part) in coded_layers(settled):
        codes = part.codes(weight_behind(layer)).contiguous().numpy().astype(np.int8)
        size = coded_bytes(codes)
        layers[name] = CodedLayer(
            size, 8.0 * size, np.nan, part.outputs.numpy(), part.inputs.numpy()
        )
    return CodedNetwork(plain, learned, layers, {})


def prepare_coded(original: nn.Module, coded: CodedNetwork) -> nn.Module:
    """A copy of coded.module whose weights are trained under their codes; those of code 0 start where the
    original has them, as far as they stay 0."""
    prepared = copy.deepcopy(coded.module).cpu().eval()
    layers, before = dict(prepared.named_modules()), dict(original.named_modules())
    for name, learned in coded.learned.items():
        layer = layers[name]
        weight = weight_of(layer)
        scale = torch.from_numpy(learned.scale)
        steps = scale.view(-1, *[1] * (weight.dim() - 1))
        with torch.no_grad():
            own = weight_of(before[name]).detach().cpu()
            inside = torch.minimum(torch.maximum(own, -INSIDE * steps), INSIDE * steps)
            weight.copy_(torch.where(weight == 0, inside, weight))
        told = coded.layers[name]
        part = CodedWeight(
            scale,
            torch.full_like(weight.detach(), FIRST_DEAD),
            torch.from_numpy(told.outputs),
            torch.from_numpy(told.inputs),
        )
        parametrize.register_parametrization(layer, "weight", part)
        layer.layer_bits = LayerBits(8)
    set_dropout_(prepared)
    return prepared


def fit_to_size_(module: nn.Module, code_bytes: int, price: float) -> int:
    """Make the last dead zones of a trained network so that its codes take at most `code_bytes` in the file,
    in place; returns what they take."""
    control = SizeControl(module, start_bytes=1.0, end_bytes=1.0, price=price)
    found = control.measure_ratio()
    wanted = float(code_bytes)
    for number in range(LAST_TRIES):
        if LEAST_FILLED * code_bytes <= found <= code_bytes:
            break
        if found < code_bytes and number and wanted < 1.001 * code_bytes:
            break  # nothing is left to spend bytes on
        control.look(wanted)
        found = control.measure_ratio()
        if found > code_bytes:
            wanted *= 0.998 * code_bytes / found
    return found
