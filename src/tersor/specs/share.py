"""Which filters follow from others."""

from __future__ import annotations

import dataclasses as dc

from tersor.specs.spec import Spec, one_of

TRANSFORMS = ("negate", "mirror", "mirror4")


@dc.dataclass(frozen=True)
class Share(Spec, kind="share"):
    """Store a part of a convolution's filters and make the others from it (transferred filters).

    transform    negate: half is stored, each filter has a partner that is a multiple of it, of any
                 sign (as CReLU has negations, Shang 2016): half the multiplications too. mirror: the
                 partner is its mirror image, left to right, times a number. mirror4: a quarter is
                 stored, each with its mirror images in both directions (orbits of filters, Cohen and
                 Welling 2016). Both leave the multiplications as they are.
    exclude      layers left alone: exact names, or `re:PATTERN` (a full match).
    """

    transform: str = "negate"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("share.transform", self.transform, TRANSFORMS)
