"""Pruning criteria: how much each weight matters (saliency, higher = keep).

A weight is (O, I) or (O, I, *kernel): outputs, inputs of one group, positions of the kernel. A saliency
has its shape, is 0 or more, and adds up over the weights that go as one piece. Squares are float64:
those of float32 weights neither overflow nor vanish there.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterable

import torch

from tersor.errors import SpecError
from tersor.registry import Registry
from tersor.tensors.statistics import STATISTICS, LayerStatistics

Saliency = Callable[[torch.Tensor, int, LayerStatistics], torch.Tensor]


@dc.dataclass(frozen=True)
class Criterion:
    """Call it with a weight and a seed, and with `statistics` that hold what it `needs`.

    `per_layer` says that its saliencies mean nothing across layers: a global ranking takes them
    through `layer_adaptive`. Raises SpecError where a needed statistic is missing.
    """

    name: str
    function: Saliency
    needs: frozenset[str] = frozenset()
    per_layer: bool = False

    def __call__(
        self, weight: torch.Tensor, seed: int = 0, statistics: LayerStatistics | None = None
    ) -> torch.Tensor:
        """Saliency of the shape of `weight`, float32 or float64; `weight` is left alone."""
        held = statistics or LayerStatistics()
        if missing := held.missing(self.needs):
            raise SpecError(
                f"criterion {self.name!r} needs {' and '.join(missing)} of the layer; give inputs that "
                "reach it, exclude the layer, or use a criterion of the weights alone"
            )
        return self.function(weight.detach(), seed, held)


CRITERIA: Registry[Criterion] = Registry("criterion")


def criterion(
    name: str, *, needs: Iterable[str] = (), per_layer: bool = False
) -> Callable[[Saliency], Criterion]:
    """Decorator: register a function of (weight, seed, statistics) as the criterion `name`."""
    asked = frozenset(needs)
    assert asked <= set(STATISTICS), f"{name}: unknown statistics {asked - set(STATISTICS)}"

    def add(function: Saliency) -> Criterion:
        return CRITERIA.register(name)(Criterion(name, function, asked, per_layer))

    return add


@criterion("l1")
def l1(weight: torch.Tensor, seed: int, statistics: LayerStatistics) -> torch.Tensor:
    """Magnitude |w|: the study's criterion. Float32."""
    return weight.float().abs()


@criterion("l2")
def l2(weight: torch.Tensor, seed: int, statistics: LayerStatistics) -> torch.Tensor:
    """w^2: orders single weights as `l1` does, and pieces of several by their squared norm."""
    return weight.double().square()


@criterion("lamp")
def lamp(weight: torch.Tensor, seed: int, statistics: LayerStatistics) -> torch.Tensor:
    """Layer-adaptive magnitude (Lee 2021, eq. 4): `layer_adaptive` of w^2."""
    return layer_adaptive(weight.double().square())


@criterion("random")
def random(weight: torch.Tensor, seed: int, statistics: LayerStatistics) -> torch.Tensor:
    """Uniform noise from `seed`: the control that every criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator)


@criterion("taylor", needs=("gradient",))
def taylor(weight: torch.Tensor, seed: int, statistics: LayerStatistics) -> torch.Tensor:
    """The square of the first-order term (Molchanov 2019, "Importance estimation for neural network
    pruning"): the mean over batches of (g w)^2, g the gradient of the batch's loss. Of the two ways
    given there to judge a piece this is the sum over its weights, not the square of their sum."""
    assert statistics.gradient is not None
    return weight.double().square() * statistics.gradient.double()


@criterion("fisher", needs=("sample_gradient",))
def fisher(weight: torch.Tensor, seed: int, statistics: LayerStatistics) -> torch.Tensor:
    """Diagonal Fisher information (Theis 2018, eq. 7): w^2 / 2 times the mean over samples of g^2, the
    rise of the loss that the second order foresees when w alone goes."""
    assert statistics.sample_gradient is not None
    return weight.double().square() * statistics.sample_gradient.double() / 2


@criterion("wanda", needs=("input_sq_norm",), per_layer=True)
def wanda(weight: torch.Tensor, seed: int, statistics: LayerStatistics) -> torch.Tensor:
    """Weights and activations (Sun 2023, eq. 1): |w| ||x||_2, the norm a root mean square here."""
    assert statistics.input_sq_norm is not None
    norms = statistics.input_sq_norm.double().sqrt()
    return weight.double().abs() * by_row(norms, weight)


@criterion("obc", needs=("hessian",), per_layer=True)
def obc(weight: torch.Tensor, seed: int, statistics: LayerStatistics) -> torch.Tensor:
    """Second order (Hassibi 1993, eq. 5; Frantar 2022, eq. 4): w^2 / [H^-1]_qq, the rise of the layer's
    squared error when w goes and the rest of its row makes up for it.

    H is damped by 1 % of its mean diagonal. A weight whose input is always 0 has saliency 0.
    """
    assert statistics.hessian is not None
    return weight.double().square() * by_row(statistics.inverse_diagonal.reciprocal(), weight)


def layer_adaptive(saliency: torch.Tensor) -> torch.Tensor:
    """Each saliency over the sum of all of its layer that are at least as large (Lee 2021, eq. 4).

    Within a layer the order stays; across layers the largest has 1 everywhere, so no thin layer dies.
    All-zero layers get zeros. Any shape; float64.
    """
    values = saliency.double().flatten()
    order = torch.argsort(values, stable=True)
    ascending = values[order]
    at_least = ascending.flip(0).cumsum(0).flip(0)
    adapted = torch.empty_like(values)
    adapted[order] = ascending / at_least.clamp(min=1e-300)  # 0 / 0 is 0, NaN stays
    return adapted.view(saliency.shape)


def by_row(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`values` (groups, K), one for each input of a row, in the shape of `weight` (O, I, *kernel)."""
    groups = len(values)
    rows = values.view(groups, 1, *weight.shape[1:])
    return rows.expand(groups, len(weight) // groups, *weight.shape[1:]).flatten(0, 1)
