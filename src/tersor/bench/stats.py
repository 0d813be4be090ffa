"""Paired comparison of two models on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import binomtest, norm

from tersor.errors import DataError, SpecError
from tersor.results import Interval, Score


def paired_interval(candidate: Score, original: Score, level: float = 0.95) -> Interval:
    """Difference of two accuracies in points (candidate minus original), with its two-sided
    interval.

    Only the images on which the two disagree carry information. The interval is Tango's score
    interval for paired proportions (Tango 1998, Statistics in Medicine 17:891-908), which keeps its
    level where few images or none are in disagreement; `p_value` is McNemar's exact test. Nothing
    is random. Raises DataError for scores of different or no images, SpecError for a level outside
    (0, 1).
    """
    if not 0 < level < 1:
        raise SpecError(f"level must be between 0 and 1, exclusive, got {level}")
    if candidate.num_samples != original.num_samples:
        raise DataError(
            f"the candidate was judged on {candidate.num_samples} images and the original on "
            f"{original.num_samples}; a paired comparison needs the same images: evaluate both "
            "again"
        )
    if not candidate.num_samples:
        raise DataError("the scores hold no images; a comparison needs one at least")
    ours = np.asarray(candidate.per_sample, bool).reshape(-1)
    theirs = np.asarray(original.per_sample, bool).reshape(-1)
    won, lost, total = int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), ours.size
    low, high = tango_interval(won, lost, total, level)
    return Interval(
        difference_pt=100 * (won - lost) / total,
        low_pt=100 * low,
        high_pt=100 * high,
        level=level,
        p_value=mcnemar_p(won, lost),
        num_samples=total,
    )


def mcnemar_p(won: int, lost: int) -> float:
    """McNemar's exact two-sided p-value: without a difference each disagreement is a fair coin."""
    if won + lost == 0:
        return 1.0
    return float(binomtest(won, won + lost, 0.5).pvalue)


def tango_interval(won: int, lost: int, total: int, level: float) -> tuple[float, float]:
    """Tango's score interval (low, high), each in -1..1, for (won - lost) / total.

    A difference d is inside while (won - lost - total d)^2 <= z^2 total (2 q(d) + d (1 - d)), where
    q(d) is the maximum likelihood estimate of the share lost when the true difference is d.
    """
    z_squared = float(norm.ppf(0.5 + level / 2)) ** 2

    def inside(d: float) -> bool:
        b = (2 * total - won + lost) * d - won - lost
        root = math.sqrt(max(0.0, b * b + 8 * total * lost * d * (1 - d)))
        variance = max(0.0, 2 * (root - b) / (4 * total) + d * (1 - d))
        return (won - lost - total * d) ** 2 <= z_squared * total * variance

    estimate = (won - lost) / total
    return _last(inside, estimate, -1.0), _last(inside, estimate, 1.0)


def _last(inside: Callable[[float], bool], start: float, end: float) -> float:
    """The point nearest to `end` that is still inside, by bisection; `start` is inside."""
    near, far = start, end
    for _ in range(64):
        middle = (near + far) / 2
        near, far = (middle, far) if inside(middle) else (near, middle)
    return near
