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
    """What is known of the units of one group; every tensor is (num_units, n) float.

    `outputs`: rows of the weights that make a unit's values; `inputs`: columns of those that read them; `scales`:
    batch norm's gamma.
    """

    num_units: int
    outputs: Sequence[Tensor] = ()
    inputs: Sequence[Tensor] = ()
    scales: Sequence[Tensor] = ()


UNIT_CRITERIA: Registry[Callable[[UnitValues, int], Tensor]] = Registry("criterion of units")


def mean_of_parts(parts: Sequence[Tensor], num_units: int) -> Tensor:
    """The mean of parts (num_units,), each divided by its own mean over units; ones where there is none."""
    scaled = [part / part.mean() for part in parts if float(part.mean()) > 0]
    return torch.stack(scaled).mean(0) if scaled else torch.ones(num_units)


@UNIT_CRITERIA.register("l1")
def l1(units: UnitValues, seed: int) -> Tensor:
    """Sum of |w| over the weights that make the unit (Li 2017, "Pruning filters for efficient convnets", 3.1)."""
    return mean_of_parts([w.abs().sum(1) for w in units.outputs], units.num_units)


@UNIT_CRITERIA.register("l2")
def l2(units: UnitValues, seed: int) -> Tensor:
    """Euclidean norm of the weights that make the unit."""
    return mean_of_parts([w.norm(dim=1) for w in units.outputs], units.num_units)


@UNIT_CRITERIA.register("fpgm")
def fpgm(units: UnitValues, seed: int) -> Tensor:
    """Sum of the distances to all other units (He 2019, eq. 6): near the geometric median means replaceable."""
    return mean_of_parts([torch.cdist(w, w).sum(1) for w in units.outputs], units.num_units)


@UNIT_CRITERIA.register("bn_gamma")
def bn_gamma(units: UnitValues, seed: int) -> Tensor:
    """|gamma| of the batch norms of the unit (network slimming, Liu 2017); L1 where there is no batch norm."""
    if not units.scales:
        return l1(units, seed)
    return mean_of_parts([g.abs().sum(1) for g in units.scales], units.num_units)


@UNIT_CRITERIA.register("random")
def random(units: UnitValues, seed: int) -> Tensor:
    """Uniform noise from `seed`: the control that every criterion must beat."""
    return torch.rand(units.num_units, generator=torch.Generator().manual_seed(seed))
