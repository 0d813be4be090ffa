"""Top-1 accuracy of a session, image by image."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tersor.data.arrays import ArraySet, Splits
from tersor.errors import DataError, EngineError, SpecError, UnknownNameError
from tersor.registry import did_you_mean
from tersor.results import Score

if TYPE_CHECKING:  # a session is handed in: judging it needs no engine imported
    from tersor.engines import Session

PARTS = ("train", "calibration", "validation", "test")


def evaluate(
    session: Session,
    splits: Splits,
    part: str = "test",
    batch_size: int = 250,
    on_progress: Callable[[float], None] | None = None,
) -> Score:
    """Run `part` of the data through `session`; the Score holds one bool per image, in the data's
    order.

    `on_progress` is told the share done (0 to 1) after every batch. Score.seconds is the wall-clock
    time. Raises UnknownNameError for another part, SpecError for a batch size below 1, DataError
    for a part that is empty, has no labels or labels that the model cannot answer, EngineError for
    outputs that are not (N, classes) numbers.
    """
    chosen, labels = _labelled(splits, part)
    if batch_size < 1:
        raise SpecError(f"batch_size must be 1 or more, got {batch_size}")
    started = time.perf_counter()
    right = np.zeros(len(chosen), np.bool_)
    classes = 0
    for number, inputs in enumerate(splits.batches(chosen, batch_size)):
        start = number * batch_size
        output = session.run(inputs)
        classes = _checked(output, len(inputs), number, classes)
        if not number:
            _check_labels(splits, part, labels, classes)
        right[start : start + len(inputs)] = output.argmax(1) == labels[start : start + len(inputs)]
        if on_progress:
            on_progress((start + len(inputs)) / len(chosen))
    return Score(right, time.perf_counter() - started)


def _labelled(splits: Splits, part: str) -> tuple[ArraySet, npt.NDArray[np.int64]]:
    if part not in PARTS:
        raise UnknownNameError(
            f"unknown part {part!r} of the data; expected one of {', '.join(PARTS)}."
            + did_you_mean(part, PARTS)
        )
    chosen: ArraySet = getattr(splits, part)
    if not len(chosen):
        raise DataError(
            f"{splits.name}: the {part} part is empty; accuracy needs one image at least"
        )
    if chosen.labels is None:
        raise DataError(
            f"{splits.name}: the {part} part has no labels, so no accuracy can be told; use a part "
            "that has some"
        )
    if len(chosen.labels) != len(chosen):
        raise DataError(
            f"{splits.name}: the {part} part has {len(chosen)} images but {len(chosen.labels)} "
            "labels"
        )
    return chosen, chosen.labels


def _checked(output: object, count: int, number: int, classes: int) -> int:
    """The number of classes of one batch's outputs; must be `classes` where that is not 0."""
    wanted = f"({count}, {classes or 'classes'})"
    if not isinstance(output, np.ndarray) or output.dtype.kind not in "fiu":
        kind = getattr(output, "dtype", type(output).__name__)
        raise EngineError(f"batch {number}: the session returned {kind}; expected numbers {wanted}")
    if output.ndim != 2 or output.shape[0] != count or output.shape[1] < 1:
        raise EngineError(
            f"batch {number}: the session returned shape {output.shape}; expected {wanted}: is "
            "this a classifier?"
        )
    if classes and output.shape[1] != classes:
        raise EngineError(
            f"batch {number}: the session returned shape {output.shape}, earlier batches had "
            f"{classes} classes"
        )
    if np.isnan(output).any():
        image = int(np.argwhere(np.isnan(output))[0, 0])
        raise EngineError(
            f"batch {number}: the session returned NaN, first for image {image} of the batch; "
            "check the model's weights and the input's range"
        )
    return int(output.shape[1])


def _check_labels(splits: Splits, part: str, labels: npt.NDArray[np.int64], classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"{splits.name}: label {labels[wrong[0]]} of {part} image {wrong[0]} is outside the "
            f"model's {classes} outputs (0 to {classes - 1}); give the model --num-classes "
            f"{splits.num_classes}"
        )
