"""What inputs told about one layer: the numbers that pruning criteria may ask for by name."""

from __future__ import annotations

import dataclasses as dc
import functools

import torch

from tersor.errors import ModelError

DAMPING = 0.01  # of the mean diagonal, added to the diagonal before it is inverted
MOST_DAMPING = 100.0

STATISTICS = ("input_sq_norm", "hessian", "gradient", "sample_gradient")


@dc.dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Statistics of a layer with weight (O, I, *kernel); None where they were not collected.

    K = I * positions counts the inputs x of a row of the flattened weight, in its order. The rows of
    a grouped layer are those of its groups in order.

    input_sq_norm    (groups, K): mean of x^2.
    hessian          (groups, K, K): mean of x x^T, half the Hessian of the layer's squared error.
    gradient         shape of the weight: mean over batches of the squared gradient of a batch's loss.
    sample_gradient  shape of the weight: mean over samples of the squared gradient of a sample's loss.
    """

    input_sq_norm: torch.Tensor | None = None
    hessian: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    sample_gradient: torch.Tensor | None = None

    def missing(self, needs: frozenset[str]) -> list[str]:
        """The names among `needs` that were not collected, in order."""
        return [name for name in STATISTICS if name in needs and getattr(self, name) is None]

    @functools.cached_property
    def inverse_diagonal(self) -> torch.Tensor:
        """(groups, K) float64: the diagonal of the inverse of the damped `hessian`, infinite for inputs that
        are always 0. Raises ModelError where it has no Cholesky factor."""
        assert self.hessian is not None
        return torch.stack([_inverse_diagonal(held) for held in self.hessian])


def _inverse_diagonal(hessian: torch.Tensor) -> torch.Tensor:
    """The diagonal (K,) float64 of the inverse of a damped `hessian` (K, K); infinite for dead inputs."""
    inverse = torch.full((len(hessian),), torch.inf, dtype=torch.float64)
    alive = hessian.diagonal() > 0
    if not alive.any():
        return inverse
    damped = hessian[alive][:, alive].double()
    mean = float(damped.diagonal().mean())
    share, added = DAMPING, 0.0
    while share <= MOST_DAMPING:
        damped.diagonal().add_((share - added) * mean)
        added = share
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse[alive.cpu()] = torch.cholesky_inverse(factor).diagonal().cpu()
            return inverse
        share *= 10
    raise ModelError(
        "the second moment of a layer's inputs is not positive semidefinite: its Cholesky "
        f"factorisation fails with {MOST_DAMPING:g} times the mean diagonal added; collect it anew"
    )
