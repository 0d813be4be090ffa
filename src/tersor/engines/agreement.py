"""How near an engine's logits are to those of the function it should compute.

An engine is right when both hold:

- the root mean square of its differences is at most RELATIVE_BOUND (3 %) of that of the reference;
- on at least SHARE_BOUND (98 %) of the images it chooses the class of the reference, or one that
  the reference holds to be nearer to its own than that bound, so that rounding may decide.

A right engine is not equal to the simulation: a value between two codes is rounded the other way
and the difference of one step goes on, and some engines leave out the rounding before a sum. The
bound was set by measuring ResNet-18 and VGG-16 on CIFAR-10 and on noise, static, activations of 8
bits, weights of 3 to 8 bits: ONNX Runtime's integer kernels differ by 0.2 to 0.4 % and OpenVINO's,
which leave roundings out, by 0.4 to 1.3 %, whatever the bits of the weights. OpenVINO held to
processors without VNNI, whose 16-bit sums are cut off, differs by 21 % (on noise by 7 %). With
activations of 6 bits the roundings that OpenVINO leaves out make 7 %: another function.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import numpy as np

from tersor.engines.load import FloatArray, Session, logits_of
from tersor.errors import EngineError

RELATIVE_BOUND = 0.03
SHARE_BOUND = 0.98


@dc.dataclass(frozen=True)
class Agreement:
    """Logits of an engine against those of the reference, on `num_samples` images.

    Attributes:
        top1_share: share (0 to 1) of the images whose largest logit is the same
        same_or_tied_share: the same, with those that rounding may decide
        max_difference: largest absolute difference of a logit
        mean_difference: mean absolute difference
        relative: root mean square of the differences over that of the reference
    """

    top1_share: float
    same_or_tied_share: float
    max_difference: float
    mean_difference: float
    relative: float
    num_samples: int

    @property
    def right(self) -> bool:
        """Whether the engine computes the function of the reference, up to rounding."""
        return self.relative <= RELATIVE_BOUND and self.same_or_tied_share >= SHARE_BOUND

    def __str__(self) -> str:
        return f"top-1 {self.top1_share:.1%}, off {self.relative:.2%}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {**dc.asdict(self), "right": self.right}


def agreement(reference_logits: FloatArray, logits: FloatArray) -> Agreement:
    """Compare two arrays of logits (N, classes), N >= 1.

    Raises EngineError for arrays of other shapes and for NaN or infinity, naming the image.
    """
    reference = _checked(reference_logits, "the reference")
    found = _checked(logits, "the engine")
    if reference.shape != found.shape:
        raise EngineError(
            f"the engine returned logits of shape {found.shape}, the reference {reference.shape}; "
            "both must run the same images"
        )
    difference = np.abs(found - reference)
    size = max(_rms(reference), float(np.finfo(np.float32).tiny))
    rows = np.arange(len(reference))
    chosen = found.argmax(1)
    behind = reference.max(1) - reference[rows, chosen]
    return Agreement(
        top1_share=float((chosen == reference.argmax(1)).mean()),
        same_or_tied_share=float((behind <= RELATIVE_BOUND * size).mean()),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        relative=_rms(difference) / size,
        num_samples=len(reference),
    )


def check_engine(
    session: Session, reference: Session, inputs: FloatArray, *, batch: int = 64
) -> Agreement:
    """The agreement of `session`, run in batches of `batch`, with `reference` on `inputs` (N, C, H,
    W) float32. Kernels may differ by batch size: give the one that is meant.

    Raises EngineError where one of the two cannot run or returns no finite logits.
    """
    return agreement(logits_of(reference, inputs), logits_of(session, inputs, batch))


def _checked(logits: FloatArray, whose: str) -> Any:
    """Logits in float64, in which a square cannot overflow."""
    if logits.ndim != 2 or not logits.size:
        raise EngineError(
            f"{whose} returned logits of shape {logits.shape}; expected (images, classes)"
        )
    if not np.isfinite(logits).all():
        image = int(np.argwhere(~np.isfinite(logits))[0, 0])
        raise EngineError(f"{whose} returned NaN or infinity, first for image {image}")
    return np.asarray(logits, np.float64)


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
