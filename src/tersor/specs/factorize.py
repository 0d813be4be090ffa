"""Which layers become products of thinner ones."""

from __future__ import annotations

import dataclasses as dc

from tersor.specs.spec import Spec, one_of, require

FACTORIZATIONS = ("svd", "activation_aware_svd", "tucker2")
RANK_CHOICES = ("energy", "vbmf")


@dc.dataclass(frozen=True)
class Factorize(Spec, kind="factorize"):
    """Replace a layer by two or three thinner ones in series, where that takes fewer parameters and
    fewer multiplications.

    method       svd: the nearest weight of that rank. activation_aware_svd: the weight of that rank
                 whose outputs are nearest on unlabelled inputs. tucker2: a convolution through fewer
                 input and fewer output channels (1x1, kxk, 1x1); a matrix by svd.
    rank         energy: the least rank that keeps the share `energy`; vbmf: what stands out of noise
                 by variational Bayes, with no number to give.
    energy       share kept of the squared singular values of the weight (svd, tucker2: of each of its
                 two ways to become a matrix), or of the variance of the layer's outputs.
    size         above 0, in place of `rank`: the share of the weights of all convolutional and linear
                 layers that may stay, spent where it hurts least; `macs` likewise of multiplications.
    multiple_of  ranks are rounded up to multiples.
    exclude      layers left alone: exact names, or `re:PATTERN` (a full match).
    """

    method: str = "activation_aware_svd"
    rank: str = "energy"
    energy: float = 0.99
    size: float = 0.0
    macs: float = 0.0
    multiple_of: int = 1
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("factorize.method", self.method, FACTORIZATIONS)
        one_of("factorize.rank", self.rank, RANK_CHOICES)
        require(
            0 < self.energy <= 1,
            f"factorize.energy is a share above 0, at most 1, got {self.energy!r}",
        )
        for name, what in (("size", "weights"), ("macs", "multiplications")):
            value = getattr(self, name)
            require(
                0 <= value < 1,
                f"factorize.{name} is the share of the {what} that may stay, 0 (no budget) to 1 "
                f"(exclusive), got {value!r}",
            )
        require(
            self.multiple_of >= 1,
            f"factorize.multiple_of must be at least 1, got {self.multiple_of}",
        )
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        require(
            self.size == 0 or self.macs == 0,
            f"factorize takes one budget, got size={self.size!r} and macs={self.macs!r}",
        )
        require(
            self.rank == "energy" or not self.has_budget,
            f"factorize.rank {self.rank} chooses ranks by itself, and size or macs would too: give "
            "one of them",
        )
        require(
            self.rank == "energy" or self.method != "activation_aware_svd",
            "factorize.rank vbmf looks for noise in a weight, and activation_aware_svd truncates "
            "outputs: use method svd or tucker2, or rank energy",
        )

    @property
    def has_budget(self) -> bool:
        """Whether ranks follow from a budget."""
        return self.size > 0 or self.macs > 0

    @property
    def needs_outputs(self) -> bool:
        """Whether the layers' outputs on unlabelled inputs decide."""
        return self.method == "activation_aware_svd"
