"""The one training loop: training, fine-tuning with kept masks, and distillation (a loss)."""

from __future__ import annotations

import copy
import dataclasses as dc
import pathlib
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.data.arrays import ArraySet, Splits
from tersor.errors import DataError, ModelError
from tersor.graph.fold import fold_copies_, unfold_copies_
from tersor.methods.device import off_device, on_device, training_device, usable_precision
from tersor.methods.progress import Control, Progress
from tersor.methods.together import digest, digest_of
from tersor.methods.training import Loop, Masks
from tersor.runs.interrupts import noted_interrupts
from tersor.specs import Finetune

__all__ = ["Progress", "Trained", "finetune", "training_accuracy"]


@dc.dataclass(frozen=True)
class Trained:
    """The trained module and how it went.

    `history` holds one dict per epoch (epoch, loss, images_per_s), `notes` what went otherwise than asked.
    `stripes` is the learned importance of every stripe where spec.stripes asked for it: |I| (O, kh, kw)
    float32 by the name of the convolution; the weights of `module` hold it already.
    """

    module: nn.Module
    history: tuple[dict[str, float], ...]
    precision: str
    compiled: bool
    device: str
    seconds: float
    notes: tuple[str, ...] = ()
    stripes: Mapping[str, torch.Tensor] = dc.field(default_factory=dict)


def finetune(
    module: nn.Module,
    splits: Splits,
    spec: Finetune,
    *,
    masks: Masks | None = None,
    teacher: nn.Module | None = None,
    control: Callable[[nn.Module], Control] | None = None,
    checkpoint: pathlib.Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train a copy of `module` on splits.train and return its exponential moving average, in eval mode.

    `masks` (parameter name -> bool, True = keep) stay as they are: a pruned weight never comes back.
    `teacher` gives the logits for spec.distill and the features for spec.hints. `control` makes, of the
    network that is trained, what is told of every step before it. `checkpoint` names a file
    written at most `checkpoint_seconds` apart; when it exists the training goes on from it, and it is removed
    by the caller. The order of images and their augmentation depend on the seed and the step alone, so a
    resumed run sees the same batches. Ctrl-C finishes the step and writes the checkpoint before
    KeyboardInterrupt is raised; a second one is raised at once. A loss that is not finite brings the last
    finite state back, from which the rate is a quarter, and is told in Trained.notes. Raises DataError for
    missing labels, ModelError for a loss that is not finite again and again, and for options that do not
    fit the network.

    Under torchrun or accelerate launch, where each process calls this alike, every process takes a part of each
    batch, and together they make the steps of one (`methods.together`): the result is the same in all, and that
    of one process but for the order of sums. The leader (rank 0) alone writes the checkpoint, which any number
    of processes goes on from, and is told of the progress. Raises RunError where a process is lost or was given
    something else.
    """
    if spec.needs_labels and splits.train.labels is None:
        raise DataError("training with labels asked for, but the data has none; use distill=1.0")
    if spec.needs_teacher and teacher is None:
        asked = f"distill={spec.distill}" if spec.distill else f"hints={spec.hints}"
        raise ModelError(f"{asked} needs a teacher, and none was given")
    device = training_device()
    student = copy.deepcopy(module)
    example = torch.zeros(2, *splits.input_shape)
    _check_fit(student, splits, example, masks or {})
    # Trained with equal copies folded: VGG-16's first linear layer is 49 times cheaper and stays exact.
    # A weight that is computed, as fake quantization does, cannot be replaced: its caller folds before.
    computed = any(map(parametrize.is_parametrized, student.modules()))
    folded, small_masks = ([], masks or {}) if computed else fold_copies_(student, example, masks)
    student = on_device(student, device).train(not spec.eval_mode)
    loop = Loop(student, splits, spec, small_masks, teacher, device, control)
    if not loop.together.processes.alone:
        loop.together.require_same(
            {
                "recipe": repr(spec),
                "network": digest(student),
                "mask": digest_of(small_masks),
                "teacher": digest(loop.teacher),
                "data set": splits.fingerprint(),
                "control": "" if loop.control is None else repr(loop.control.state_dict()),
            }
        )
    if checkpoint is not None:
        loop.restore(checkpoint)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        noted_interrupts() as interrupted,
    ):
        loop.run(checkpoint, checkpoint_seconds, on_progress, interrupted)
    averaged = off_device(loop.averaged.module).eval()
    unfold_copies_(averaged, folded, masks)
    for parameter in averaged.parameters():
        parameter.grad = None
    return Trained(
        averaged,
        tuple(loop.state.history),
        loop.precision,
        loop.compiled,
        device.type,
        loop.state.seconds,
        loop.notes,
        loop.importance(),
    )


def _check_fit(module: nn.Module, splits: Splits, example: torch.Tensor, masks: Masks) -> None:
    """Refuse data and masks that belong to another network; leaves `module` in eval mode."""
    try:
        with torch.no_grad():
            shape = tuple(module.eval()(example).shape)
    except RuntimeError as error:
        raise ModelError(
            f"{type(module).__name__} cannot take inputs of {splits.input_shape}: {error}"
        ) from None
    if len(shape) != 2:
        raise ModelError(
            f"{type(module).__name__} gives outputs of shape {shape}; expected (N, classes)"
        )
    labels = splits.train.labels
    if labels is not None and not 0 <= labels.min() <= labels.max() < shape[1]:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(
            f"{splits.name}: label {wrong} is outside the network's {shape[1]} outputs; give "
            f"num_classes={splits.num_classes}"
        )
    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ModelError(
                f"the mask {name!r} of shape {tuple(mask.shape)} fits no parameter of "
                f"{type(module).__name__}; it belongs to another network"
            )


def training_accuracy(
    module: nn.Module, splits: Splits, part: ArraySet, batch_size: int = 500
) -> float:
    """Top-1 accuracy in training's precision, for watching only: published figures come from an engine."""
    device = next(module.parameters()).device
    precision = usable_precision("bf16", device)
    right = 0
    assert part.labels is not None
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for start, inputs in zip(
            range(0, len(part), batch_size), splits.batches(part, batch_size), strict=True
        ):
            batch = torch.from_numpy(inputs).to(device, memory_format=torch.channels_last)
            guess = module(batch).argmax(1).cpu().numpy()
            right += int((guess == part.labels[start : start + batch_size]).sum())
    return right / len(part)
