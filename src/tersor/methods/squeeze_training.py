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

from tersor.data.arrays import Splits
from tersor.methods.finetune import Progress, Trained, finetune
from tersor.methods.learned import LayerBits, LearnedLayer
from tersor.methods.paired_moments import weight_of
from tersor.methods.qat import set_dropout_, strip
from tersor.methods.rate_control import CodedWeight, SizeControl
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.methods.squeeze import Calibration, CodedNetwork
from tersor.specs import Finetune

INSIDE = 0.45  # of a step: how far a weight of code 0 may lie from 0 at the start
FIRST_DEAD = 0.5
LAST_TRIES = 5
LEAST_FILLED = 0.985  # of the bytes allowed


@dc.dataclass(frozen=True, eq=False)
class TrainedCodes:
    """The trained network, its weights exactly scale * codes, by layer name in `learned`; the bytes of its
    codes in a file, and how the training went."""

    module: nn.Module
    learned: dict[str, LearnedLayer]
    code_bytes: int
    trained: Trained


def train_coded(
    original: nn.Module,
    coded: CodedNetwork,
    splits: Splits,
    training: Finetune,
    calibration: Calibration,
    *,
    code_bytes: int,
    price: float,
    checkpoint: pathlib.Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainedCodes:
    """Fine-tune a copy of coded.module until its codes take at most `code_bytes` in a file.

    `coded` is where `price` (nats a bit) led; the size goes from its to the one asked for in the first 60 % of
    the steps. The original is the teacher where `training` distils. Dropout is off, as in mode qat. At the end
    batch norm is re-estimated from the calibration's inputs. Raises as `finetune` does.
    """
    prepared = prepare_coded(original, coded)
    control = functools.partial(
        SizeControl,
        start_bytes=float(max(coded.code_bytes, code_bytes)),
        end_bytes=float(code_bytes),
        price=price,
        ratio=coded.code_bytes / max(sum(each.bits for each in coded.layers.values()) / 8, 1.0),
    )
    trained = finetune(
        prepared,
        splits,
        dc.replace(training, compile="off"),
        teacher=original if training.needs_teacher else None,
        control=control,
        checkpoint=checkpoint,
        on_progress=on_progress,
    )
    found = fit_to_size_(trained.module, code_bytes, price)
    settled = reestimate_batch_norm(
        trained.module,
        [chunk.numpy() for chunk in calibration.inputs],
        precision=calibration.precision,
    )
    plain, learned = strip(settled)
    set_dropout_(plain, original)
    return TrainedCodes(plain, learned, found, dc.replace(trained, module=settled))


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
        layer.layer_bits = LayerBits(8)  # type: ignore[assignment]
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


def density(learned: dict[str, LearnedLayer]) -> float:
    """The share of codes that are not 0."""
    size = sum(each.codes.size for each in learned.values())
    return sum(int(np.count_nonzero(each.codes)) for each in learned.values()) / max(size, 1)
