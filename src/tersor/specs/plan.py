"""Steps in their order, and what a method decided layer by layer."""

from __future__ import annotations

import dataclasses as dc

from tersor.specs.spec import Spec


@dc.dataclass(frozen=True)
class Recipe(Spec, kind="recipe"):
    """Steps in the order they are applied, and the seed that makes them reproducible."""

    steps: tuple[Spec, ...]
    seed: int = 0


@dc.dataclass(frozen=True)
class LayerPlan(Spec, kind="layer_plan"):
    """What happens to one layer.

    action    keep, prune (weights become zero), remove (whole slices go), factorize, share (filters
              follow from others), int8 (integer kernels), dynamic or weight_only; `reason` says why a
              layer is kept.
    outputs   of remove: the indices of the output channels that stay, rising; empty: all. `inputs`
              likewise. Both are given, so that a plan is applied without tracing the network.
    ranks     of factorize: one for a matrix, (outputs, inputs) for a convolution.
    """

    layer: str
    action: str
    sparsity: float = 0.0
    bits: int = 32
    reason: str = ""
    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()


@dc.dataclass(frozen=True)
class Plan(Spec, kind="plan"):
    """The answer to a request: one decision per layer, in the order of the model."""

    request: Spec
    layers: tuple[LayerPlan, ...] = ()
