"""How much accuracy a changed network loses: with labels by pairs, without by the original's own word."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax
from scipy.stats import norm

from tersor.bench.stats import paired_interval
from tersor.errors import DataError
from tersor.results import Interval, Score

FloatArray = npt.NDArray[np.float32]
LEVEL = 0.95
UNSEEN = 0.5  # the loss of one image more than were seen: an agreement on few images proves little


@dc.dataclass(frozen=True)
class Drop:
    """What `num_samples` inputs say of the accuracy lost, in points; more is worse.

    `estimate_pt` and its upper limit `high_pt` (one-sided, 95 %) come from labels where `labelled`, else from the
    original's answers. `agreement` is the share (0 to 1) of the inputs that get the original's class: accuracy
    can never fall by more than 100 * (1 - agreement) on them. `harm_kl` is the mean KL divergence of the answers
    from the original's, in nats. `interval` is that of the labelled comparison.
    """

    estimate_pt: float
    high_pt: float
    agreement: float
    harm_kl: float
    num_samples: int
    labelled: bool
    interval: Interval | None = None

    @property
    def judged_pt(self) -> float:
        """What a budget is held against: without labels the upper limit, with them the measured difference."""
        return self.estimate_pt if self.labelled else self.high_pt

    def __str__(self) -> str:
        if self.interval is not None:
            low, high = -self.interval.high_pt, -self.interval.low_pt
            return (
                f"{self.estimate_pt:+.2f} points lost ({low:+.2f} to {high:+.2f}, "
                f"n = {self.num_samples}, by labels)"
            )
        return (
            f"{self.estimate_pt:.2f} points expected to be lost, at most {self.high_pt:.2f} (95 %, "
            f"n = {self.num_samples}, "
            f"no labels: by the original's answers; {self.agreement:.2%} the same)"
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {**dc.asdict(self), "judged_pt": self.judged_pt}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Drop:
        """The drop that `to_dict` told."""
        held = {field.name: told[field.name] for field in dc.fields(cls)}
        found = held["interval"]
        return cls(**{**held, "interval": None if found is None else Interval(**found)})


def measured_drop(
    original: FloatArray, changed: FloatArray, labels: npt.NDArray[np.int64] | None = None
) -> Drop:
    """The drop from logits `original` to logits `changed`, both (N, classes), of the same inputs.

    Without `labels` (N,) an input on which both agree loses nothing, and one on which they do not loses
    p(original's class) - p(changed class), p the original's softmax: what a network that knows how sure it may be
    would expect. Trained networks are surer than they may be (Guo 2017), so this is rather too much than too
    little; the upper limit is that of a mean, with one more input taken to have lost UNSEEN. With labels the drop
    is the difference of accuracies, with Tango's interval. Raises DataError for other shapes, no inputs, or values
    that are not finite.
    """
    if original.shape != changed.shape or original.ndim != 2 or not len(original):
        raise DataError(
            f"logits of shapes {original.shape} and {changed.shape} cannot be compared; both must be "
            "(N, classes) of the same inputs, one at least"
        )
    if not (np.isfinite(original).all() and np.isfinite(changed).all()):
        raise DataError("logits hold NaN or infinity: one of the networks overflows on an input")
    p = log_softmax(original.astype(np.float64), axis=1)
    q = log_softmax(changed.astype(np.float64), axis=1)
    harm = max(float(np.mean(np.sum(np.exp(p) * (p - q), axis=1))), 0.0)
    ours, theirs = changed.argmax(1), original.argmax(1)
    agreement = float((ours == theirs).mean())
    rows = np.arange(len(p))
    lost = np.exp(p[rows, theirs]) - np.exp(p[rows, ours])
    if labels is None:
        more = np.append(lost, UNSEEN)
        error = float(more.std(ddof=1)) / np.sqrt(len(more))
        high = float(more.mean()) + float(norm.ppf(LEVEL)) * error
        return Drop(100 * float(lost.mean()), 100 * high, agreement, harm, len(p), False)
    found = paired_interval(Score(ours == labels), Score(theirs == labels))
    one_sided = paired_interval(Score(ours == labels), Score(theirs == labels), 2 * LEVEL - 1)
    return Drop(
        0.0 - found.difference_pt, 0.0 - one_sided.low_pt, agreement, harm, len(p), True, found
    )
