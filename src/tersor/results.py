"""What is measured: frozen values with units in their names, and the row that goes to `rows.jsonl`."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]


@dc.dataclass(frozen=True, eq=False)
class Score:
    """Top-1 accuracy (0 to 1) of one model on `num_samples` images.

    `per_sample` (num_samples,) bool: True where the prediction equals the label, in the order of the data
    set, so that two scores of one data set are compared as pairs.
    """

    per_sample: BoolArray
    seconds: float = 0.0

    @property
    def num_samples(self) -> int:
        """Number of images judged."""
        return int(self.per_sample.size)

    @property
    def accuracy(self) -> float:
        """Share of images classified rightly, 0 to 1."""
        return float(self.per_sample.mean())


@dc.dataclass(frozen=True)
class Interval:
    """A difference of two accuracies on the same images, with its two-sided confidence interval.

    All in points (percentage points, candidate minus original); `p_value` is McNemar's exact test.
    """

    difference_pt: float
    low_pt: float
    high_pt: float
    level: float
    p_value: float
    num_samples: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return dc.asdict(self)


@dc.dataclass(frozen=True)
class Timing:
    """Wall-clock time of one forward pass of `batch` images: median and percentiles of `repeats` runs."""

    engine: str
    batch: int
    threads: int
    median_ms: float
    p05_ms: float
    p95_ms: float
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return dc.asdict(self)
