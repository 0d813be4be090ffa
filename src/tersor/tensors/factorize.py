"""A weight as a product of thinner ones: truncated SVD, plain and aware of activations, and Tucker-2.

A weight is (O, I) of a matrix or (O, I, *kernel) of a convolution; all is computed in float64. A method
is made once for a weight; its `energies` tell what each rank keeps, `truncated` gives the factors.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from scipy.optimize import minimize_scalar

from tersor.errors import ModelError, SpecError
from tersor.registry import Registry

SWEEPS = 5  # of Tucker-2: on trained convolutions later ones change the error by less than 1e-4


@dc.dataclass(frozen=True, eq=False)
class OutputMoments:
    """Mean (O,) and covariance (O, O), float64, of a layer's outputs (its bias included) over
    `num_samples` positions of all images."""

    mean: torch.Tensor
    covariance: torch.Tensor
    num_samples: int


@dc.dataclass(frozen=True, eq=False)
class Factors:
    """Weights, float64, of the layers that stand in series for one, in the order they run.

    One rank r: (r, I, *kernel) and (O, r, 1...). Two ranks: (r_in, I, 1...), (r_out, r_in, *kernel)
    and (O, r_out, 1...). `bias` (O,) is that of the last layer; None: it has none.
    """

    weights: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None


class Factorization(Protocol):
    """One weight, ready to be truncated at any rank.

    `energies` holds for each rank the energies of its components, falling, each at least 0: what is
    lost by leaving out the last ones is their sum.
    """

    energies: tuple[torch.Tensor, ...]

    def truncated(self, ranks: Sequence[int]) -> Factors:
        """The factors at `ranks`, one for each of `energies`, from 1 to its length."""
        ...


Build = Callable[
    [torch.Tensor, "torch.Tensor | None", "OutputMoments | None"],
    Factorization,
]
FACTORIZATIONS: Registry[Build] = Registry("factorization")


@FACTORIZATIONS.register("svd")
class Svd:
    """The nearest weight of rank r in the Frobenius norm: the first r singular vectors (Eckart and
    Young 1936). A convolution is the matrix (O, I * kernel): r filters, then 1x1.

    The vectors are those of the smaller Gram matrix, and the weight is projected on them: no
    division, so that a weight without full rank is exact too.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        outputs: OutputMoments | None = None,
    ) -> None:
        self._weight, self._bias = weight.detach().double(), _doubled(bias)
        matrix = self._weight.flatten(1)
        self._by_outputs = matrix.shape[0] <= matrix.shape[1]
        gram = matrix @ matrix.T if self._by_outputs else matrix.T @ matrix
        energies, self._vectors = falling_eigenvectors(gram)
        self.energies: tuple[torch.Tensor, ...] = (energies,)

    def truncated(self, ranks: Sequence[int]) -> Factors:
        """The weight projected on the first `ranks[0]` singular vectors."""
        (rank,) = checked_ranks(ranks, self.energies)
        vectors, matrix = self._vectors[:, :rank], self._weight.flatten(1)
        if self._by_outputs:
            return _pair(self._weight, vectors, vectors.T @ matrix, self._bias)
        return _pair(self._weight, matrix @ vectors, vectors.T, self._bias)


@FACTORIZATIONS.register("activation_aware_svd")
class ActivationAwareSvd:
    """The weight of rank r, and the bias, whose outputs are nearest to the layer's on its inputs.

    For outputs y = W x + b of mean m and covariance C = W Cov(x) W^T, let U hold the first r
    eigenvectors of C. W' = U U^T W and b' = m + U U^T (b - m) minimise E ||y - y'||^2 over all W' of
    rank r and all b'. Proof: the best b' for a W' makes the mean error 0, which leaves
    ||(W - W') L||_F^2 with L L^T = Cov(x); the best W' L of rank r is U U^T W L (Eckart and Young
    1936, as U are the left singular vectors of W L), which W' = U U^T W attains. It is the minimiser
    of SVD-LLM (Wang 2024, section 3.1: truncation after whitening with the Cholesky factor L), here
    with the mean taken out, and without L: outputs tell enough, no inverse is taken, and inputs that
    are linearly dependent do no harm (as Zhang 2015 reconstruct the responses of one layer). What is lost is the
    sum of the eigenvalues left out.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        outputs: OutputMoments | None = None,
    ) -> None:
        if outputs is None:
            raise SpecError(
                "activation_aware_svd needs the moments of the layer's outputs; give unlabelled "
                "inputs, or use svd"
            )
        if outputs.covariance.shape != (len(weight), len(weight)):
            raise SpecError(
                f"a weight of shape {tuple(weight.shape)} needs a covariance of its {len(weight)} "
                f"outputs, got {tuple(outputs.covariance.shape)}"
            )
        if not torch.isfinite(outputs.covariance).all():
            raise ModelError("the covariance of a layer's outputs holds NaN or infinity")
        self._weight, self._bias = weight.detach().double(), _doubled(bias)
        self._mean = outputs.mean.double()
        energies, self._vectors = falling_eigenvectors(outputs.covariance.double())
        most = min(self._weight.flatten(1).shape)  # later outputs follow from those before
        self.energies: tuple[torch.Tensor, ...] = (energies[:most],)

    def truncated(self, ranks: Sequence[int]) -> Factors:
        """The weight projected on the first `ranks[0]` principal components of the outputs."""
        (rank,) = checked_ranks(ranks, self.energies)
        vectors = self._vectors[:, :rank]
        offset = -self._mean if self._bias is None else self._bias - self._mean
        bias = self._mean + vectors @ (vectors.T @ offset)
        return _pair(self._weight, vectors, vectors.T @ self._weight.flatten(1), bias)


@FACTORIZATIONS.register("tucker2")
class Tucker2:
    """A convolution through r_in input and r_out output channels: 1x1, kernel, 1x1 (Tucker 1966; Kim
    2016). Ranks are (r_out, r_in). A matrix or a 1x1 convolution has one rank, by SVD.

    `energies` are the squared singular values of the two unfoldings; keeping the first of each loses
    at most the sum of what both leave out (De Lathauwer 2000a, property 10). Both bases are then
    improved in turns, each the best for the other (higher-order orthogonal iteration, De Lathauwer
    2000b), which never loses more.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        outputs: OutputMoments | None = None,
    ) -> None:
        self._weight, self._bias = weight.detach().double(), _doubled(bias)
        self._matrix = Svd(weight, bias) if self._weight[0, 0].numel() == 1 else None
        if self._matrix is not None:
            self.energies = self._matrix.energies
            return
        by_output, _ = falling_eigenvectors(_gram(self._weight))
        by_input, self._first = falling_eigenvectors(_gram(self._weight.transpose(0, 1)))
        most = [min(size, self._weight.numel() // size) for size in self._weight.shape[:2]]
        self.energies = (by_output[: most[0]], by_input[: most[1]])

    def truncated(self, ranks: Sequence[int]) -> Factors:
        """The Tucker-2 factors at (r_out, r_in), or those of `Svd` at one rank."""
        if self._matrix is not None:
            return self._matrix.truncated(ranks)
        rank_out, rank_in = checked_ranks(ranks, self.energies)
        weight, inputs = self._weight, self._first[:, :rank_in]
        for _ in range(SWEEPS):
            narrowed = torch.einsum("oi...,ir->or...", weight, inputs)
            outputs = falling_eigenvectors(_gram(narrowed))[1][:, :rank_out]
            narrowed = torch.einsum("oi...,os->is...", weight, outputs)
            inputs = falling_eigenvectors(_gram(narrowed))[1][:, :rank_in]
        middle = torch.einsum("oi...,os,ir->sr...", weight, outputs, inputs)
        ones = (1,) * (weight.ndim - 2)
        first, last = inputs.T, outputs
        # Equal norms on both sides of each channel, as of `_pair`.
        first, middle = balanced(first, middle.transpose(0, 1))
        middle, last = balanced(middle.transpose(0, 1), last.T)
        return Factors(
            (
                first.reshape(rank_in, -1, *ones),
                middle,
                last.T.reshape(-1, rank_out, *ones),
            ),
            self._bias,
        )


def falling_eigenvectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (n,), falling, those below 0 by rounding as 0, and eigenvectors (n, n) as columns
    of a symmetric positive semidefinite float64 `matrix` (n, n).

    Raises ModelError where it is not finite.
    """
    if not torch.isfinite(matrix).all():
        raise ModelError("a weight holds NaN or infinity; train it again or mend the file")
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def rank_of_energy(energies: torch.Tensor, share: float) -> int:
    """The least rank, at least 1, whose components hold `share` of the sum of `energies` (n,)."""
    held = energies.cumsum(0)
    # A share of 1 must not ask for components that hold nothing but rounding.
    enough = held >= share * held[-1] * (1 - 1e-12)
    return int(enough.int().argmax()) + 1


def vbmf_rank(energies: torch.Tensor, rows: int, columns: int) -> int:
    """How many components of a (rows, columns) matrix stand out of noise, at least 1.

    `energies` (min(rows, columns),) are its squared singular values, falling. Empirical variational
    Bayes matrix factorization of a fully observed matrix: the noise's variance is that which
    minimises the free energy, and a component counts where its singular value passes the threshold
    that belongs to it (Nakajima 2013, "Global analytic solution of fully-observed variational
    Bayesian matrix factorization"). Raises SpecError for another number of `energies`.
    """
    short, long = min(rows, columns), max(rows, columns)
    if len(energies) != short:
        raise SpecError(
            f"a matrix of {rows} by {columns} has {short} singular values, got {len(energies)}"
        )
    if not float(energies.sum()) > 0:
        return 1
    alpha = short / long
    tau = 2.5129 * math.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    scaled = energies.double() / long

    def free_energy(log_variance: float) -> float:
        ratio = scaled / math.exp(log_variance)
        signal = ratio[ratio > threshold]
        noise = ratio[ratio <= threshold].clamp(min=1e-300)
        middle = signal - (1 + alpha)
        kept = (middle + (middle.square() - 4 * alpha).clamp(min=0).sqrt()) / 2
        parts = (noise - noise.log()).sum() + (signal - kept).sum()
        parts += ((kept + 1) / signal).log().sum() + alpha * (kept / alpha + 1).log().sum()
        return float(parts)

    most = min(math.ceil(short / (1 + alpha)) - 1, short - 1)
    high = float(scaled.mean())
    low = max(float(scaled[most]) / threshold, float(scaled[most:].mean()), high * 1e-12)
    low, high = min(low, high * (1 - 1e-9)), high
    found = minimize_scalar(free_energy, bounds=(math.log(low), math.log(high)), method="bounded")
    return max(1, int((scaled > math.exp(found.x) * threshold).sum()))


def checked_ranks(ranks: Sequence[int], energies: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """`ranks`, one for each of `energies` and from 1 to its length. Raises SpecError."""
    most = [len(held) for held in energies]
    fits = len(ranks) == len(most) and all(
        1 <= rank <= limit for rank, limit in zip(ranks, most, strict=True)
    )
    if not fits:
        raise SpecError(
            f"ranks {tuple(ranks)} do not fit: expected {len(most)}, from 1 to {tuple(most)}"
        )
    return tuple(int(rank) for rank in ranks)


def balanced(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`first` and `second`, both (r, ...), each pair of slices scaled to equal norms with the same
    product. Pairs that are zero stay."""
    norms = [part.flatten(1).norm(dim=1) for part in (first, second)]
    scale = torch.where(norms[0] * norms[1] > 0, (norms[1] / norms[0]).sqrt(), 1.0)
    shape = (-1, *(1,) * (first.ndim - 1))
    other = (-1, *(1,) * (second.ndim - 1))
    return first * scale.view(shape), second / scale.view(other)


def _pair(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None
) -> Factors:
    """`left` (O, r) and `right` (r, I * kernel) as weights of two layers.

    Both sides of a component get the same norm: then decay while training on acts as on the sum of
    the singular values, and quantized factors use their range alike.
    """
    right, columns = balanced(right, left.T)
    rank, ones = len(right), (1,) * (weight.ndim - 2)
    first = right.reshape(rank, *weight.shape[1:])
    return Factors((first, columns.T.reshape(-1, rank, *ones)), bias)


def _gram(weight: torch.Tensor) -> torch.Tensor:
    matrix = weight.flatten(1)
    return matrix @ matrix.T


def _doubled(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().double()
