"""Distillation: a smaller student learns to answer as the teacher does; labels are not needed."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from tersor.data.arrays import ArraySet, Splits
from tersor.errors import ModelError, SpecError
from tersor.methods.finetune import Progress, Trained, finetune
from tersor.specs import Finetune


def distill(
    teacher: nn.Module,
    student: nn.Module,
    splits: Splits,
    spec: Finetune,
    *,
    checkpoint: pathlib.Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train a copy of `student` on splits.train to give the logits that `teacher` gives (Hinton
    2015), and labels for the share 1 - spec.distill of the loss: with distill 1 no labels are read.

    Both take the images of `splits` and give (N, classes). It is `finetune` with a teacher: it
    resumes from `checkpoint`, and the teacher is untouched. Raises SpecError for a spec that uses
    no teacher, ModelError where the two give outputs of different shapes, and what `finetune` does.
    """
    if not spec.needs_teacher:
        raise SpecError(
            "distill 0 learns from labels alone and no teacher; give a share above 0, hints, or train"
        )
    shapes = [_output_shape(module, splits) for module in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"the teacher {type(teacher).__name__} gives outputs of shape {shapes[0]} for two images, "
            f"the student {type(student).__name__} {shapes[1]}; give the student as many outputs"
        )
    return finetune(
        student, splits, spec, teacher=teacher, checkpoint=checkpoint, on_progress=on_progress
    )


def labelled_by(
    teacher: nn.Module, splits: Splits, part: ArraySet, batch_size: int = 250
) -> ArraySet:
    """The images of `part` with the teacher's answers as labels: accuracy on them is agreement."""
    training = [(module, module.training) for module in teacher.modules()]
    try:
        with torch.inference_mode():
            answers = [
                teacher.eval()(torch.from_numpy(inputs)).argmax(1).numpy()
                for inputs in splits.batches(part, batch_size)
            ]
    finally:
        for module, was_training in training:
            module.training = was_training
    return ArraySet(part.images, np.concatenate(answers).astype(np.int64))


def _output_shape(module: nn.Module, splits: Splits) -> tuple[int, ...]:
    training = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad():
            return tuple(module.eval()(torch.zeros(2, *splits.input_shape)).shape)
    except RuntimeError as error:
        raise ModelError(
            f"{type(module).__name__} cannot take inputs of {splits.input_shape}: {error}"
        ) from None
    finally:
        for part, was_training in training:
            part.training = was_training
