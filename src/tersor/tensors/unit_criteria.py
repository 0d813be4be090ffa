"""Criteria for units that are removed as one piece: one saliency for each unit of a group (higher = keep).

A unit of a residual stream is made by several layers and read by several: a criterion sees all of them. Each layer's
part is divided by its mean over the units first, so that a layer of large weights does not speak for all; saliencies
of different groups are compared after each is divided by the mean of its group.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tersor.registry import Registry


@dc.dataclass(frozen=True, eq=False)
class UnitValues:
    """What is known of the units of one group; every tensor is float.

    `outputs`: rows (num_units, n) of the weights that make a unit's values; `inputs`: columns (num_units, k, n) of
    those that read them, k columns each; `input_norms`, for each of `inputs`: the Euclidean norm (num_units, k) of what
    each column reads; `scales`: batch norm's gamma (num_units, n). `effects` (num_images, num_units): the derivative of
    each image's loss by a factor on all that the unit's values go into, at 1.
    """

    num_units: int
    outputs: Sequence[Tensor] = ()
    inputs: Sequence[Tensor] = ()
    scales: Sequence[Tensor] = ()
    input_norms: Sequence[Tensor] = ()
    effects: Tensor | None = None


@dc.dataclass(frozen=True)
class UnitCriterion:
    """A criterion and what it `needs` beyond weights: "input_norms", "effects" or nothing.

    The saliencies of a `comparable` one are changes of the loss: those of different groups are compared as they are.
    """

    saliency: Callable[[UnitValues, int], Tensor]
    needs: str = ""
    comparable: bool = False

    def __call__(self, units: UnitValues, seed: int) -> Tensor:
        """(num_units,) saliency, 0 or more."""
        return self.saliency(units, seed)


UNIT_CRITERIA: Registry[UnitCriterion] = Registry("criterion of units")


def criterion(
    name: str, needs: str = "", comparable: bool = False
) -> Callable[[Callable[[UnitValues, int], Tensor]], UnitCriterion]:
    """Decorator: register a function of (units, seed) under `name`."""

    def add(saliency: Callable[[UnitValues, int], Tensor]) -> UnitCriterion:
        return UNIT_CRITERIA.register(name)(UnitCriterion(saliency, needs, comparable))

    return add


def mean_of_parts(parts: Sequence[Tensor], num_units: int) -> Tensor:
    """The mean of parts (num_units,), each divided by its own mean over units; ones where there is none."""
    scaled = [part / part.mean() for part in parts if float(part.mean()) > 0]
    return torch.stack(scaled).mean(0) if scaled else torch.ones(num_units)


@criterion("l1")
def l1(units: UnitValues, seed: int) -> Tensor:
    """Sum of |w| over the weights that make the unit (Li 2017, "Pruning filters for efficient convnets", 3.1)."""
    return mean_of_parts([w.abs().sum(1) for w in units.outputs], units.num_units)


@criterion("l2")
def l2(units: UnitValues, seed: int) -> Tensor:
    """Euclidean norm of the weights that make the unit."""
    return mean_of_parts([w.norm(dim=1) for w in units.outputs], units.num_units)


@criterion("fpgm")
def fpgm(units: UnitValues, seed: int) -> Tensor:
    """Sum of the distances to all other units (He 2019, eq. 6): near the geometric median means replaceable."""
    return mean_of_parts([torch.cdist(w, w).sum(1) for w in units.outputs], units.num_units)


@criterion("bn_gamma")
def bn_gamma(units: UnitValues, seed: int) -> Tensor:
    """|gamma| of the batch norms of the unit (network slimming, Liu 2017); L1 where there is no batch norm."""
    if not units.scales:
        return l1(units, seed)
    return mean_of_parts([g.abs().sum(1) for g in units.scales], units.num_units)


@criterion("random")
def random(units: UnitValues, seed: int) -> Tensor:
    """Uniform noise from `seed`: the control that every criterion must beat."""
    return torch.rand(units.num_units, generator=torch.Generator().manual_seed(seed))


@criterion("taylor", needs="effects", comparable=True)
def taylor(units: UnitValues, seed: int) -> Tensor:
    """Mean over images of |sum over positions of activation * dL/d activation|, the first-order change of an image's
    loss when a unit goes (Molchanov 2017, "Pruning convolutional neural networks for resource efficient inference",
    eq. 8, of each image by itself and then averaged, as there).

    Two things differ: the sum is not divided by the number of positions, nor by the norm over the layer (section 2.3),
    since changes of the loss compare between layers as they are. For the squares of "Importance estimation for neural
    network pruning" (Molchanov 2019) see `fisher`.
    """
    assert units.effects is not None
    return units.effects.abs().mean(0)


@criterion("fisher", needs="effects", comparable=True)
def fisher(units: UnitValues, seed: int) -> Tensor:
    """Half the mean over images of (sum over positions of activation * dL/d activation)^2, the second-order change of
    the loss (Theis 2018, "Faster gaze prediction with dense networks and Fisher pruning", feature maps).

    It orders units as the squared first-order term of a gate on the unit does (Molchanov 2019, "Importance estimation
    for neural network pruning"), taken image by image; there a gradient is that of a batch.
    """
    assert units.effects is not None
    return units.effects.square().mean(0) / 2


@criterion("wanda", needs="input_norms")
def wanda(units: UnitValues, seed: int) -> Tensor:
    """Sum of |w| * ||x|| over the weights that read the unit (after Sun 2024, "A simple and effective pruning approach
    for large language models", eq. 1, summed over the columns that go together); L1 where no layer reads it."""
    parts = [
        (w.abs().sum(2) * norm).sum(1)
        for w, norm in zip(units.inputs, units.input_norms, strict=True)
    ]
    return mean_of_parts(parts, units.num_units) if parts else l1(units, seed)
