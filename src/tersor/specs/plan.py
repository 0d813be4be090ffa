"""Steps in their order, and what a method decided layer by layer."""

from __future__ import annotations

import dataclasses as dc

from tersor.specs.finetune import AUGMENTATIONS
from tersor.specs.spec import Spec, one_of


@dc.dataclass(frozen=True)
class Recipe(Spec, kind="recipe"):
    """Steps in the order they are applied, and the seed that makes them reproducible.

    augment   of the images that batch norms are re-estimated on after a step: none, crop, flip_crop,
              or auto, as the network's own statistics tell that its training did.
    """

    steps: tuple[Spec, ...]
    seed: int = 0
    augment: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("recipe.augment", self.augment, ("auto", *AUGMENTATIONS))


@dc.dataclass(frozen=True)
class LayerPlan(Spec, kind="layer_plan"):
    """What happens to one layer.

    action    keep, prune (weights become zero), remove (whole slices go), bypass (an identity
              stands in the place of the whole module), factorize, share (filters follow from
              others), int8 (integer kernels), dynamic or weight_only; `reason` says why a layer is
              kept.
    outputs   of remove: the indices of the output channels that stay, rising; empty: all. `inputs`
              likewise (of a grouped convolution those of one group, as in its weight). Both are
              given, so that a plan is applied without tracing the network.
    axis      of remove, where `layer` names a parameter or buffer itself: the axis of `outputs`.
    ranks     of factorize: one for a matrix, (outputs, inputs) for a convolution.
    """

    layer: str
    action: str
    sparsity: float = 0.0
    bits: int = 32
    reason: str = ""
    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    axis: int = 0
    ranks: tuple[int, ...] = ()


@dc.dataclass(frozen=True)
class Plan(Spec, kind="plan"):
    """The answer to a request: one decision per layer, in the order of the model.

    `earlier` holds the plans that were applied to the network before this one, in their order.
    """

    request: Spec
    layers: tuple[LayerPlan, ...] = ()
    earlier: tuple[Plan, ...] = ()

    def after(self, plans: tuple[Plan, ...]) -> Plan:
        """This plan, applied after `plans`."""
        flat = tuple(each for plan in plans for each in (*plan.earlier, plan))
        return dc.replace(self, earlier=tuple(dc.replace(each, earlier=()) for each in flat))
