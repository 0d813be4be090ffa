"""From a request and a layer to the mask of what stays: criterion, structure, and how many."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping

import torch
from torch import nn

from tersor.errors import ModelError
from tersor.graph.weights import as_rows, from_rows
from tersor.specs import Prune
from tersor.tensors.criteria import CRITERIA, layer_adaptive
from tersor.tensors.statistics import LayerStatistics
from tersor.tensors.structures import STRUCTURES, n_m_mask, n_m_removed

NOTHING = LayerStatistics()


@dc.dataclass(frozen=True)
class Choice:
    """Which weights of one layer go: `num_removed` in all, by the criterion and structure of `spec`."""

    spec: Prune
    num_removed: int
    seed: int

    def __call__(
        self,
        rows: torch.Tensor,
        mask: torch.Tensor,
        statistics: LayerStatistics = NOTHING,
        share: float = 1.0,
    ) -> torch.Tensor:
        """The mask (O, I, *kernel) when `share` of the removal is done; what `mask` has removed is gone
        first. Of n_m, the pattern falls from M to N of every M."""
        saliency = CRITERIA[self.spec.criterion](rows, self.seed, statistics)
        saliency = saliency.masked_fill(~mask, -1.0)  # below every saliency
        if self.spec.structure == "n_m":
            kept, of = self.spec.kept_of
            return n_m_mask(saliency, of - round(share * (of - kept)), of)
        return STRUCTURES[self.spec.structure].mask(saliency, round(share * self.num_removed))


def ranking(
    spec: Prune,
    rows: torch.Tensor,
    mask: torch.Tensor,
    statistics: LayerStatistics,
    seed: int,
) -> torch.Tensor:
    """A value for each weight by which those of different layers are ranked: the mean saliency of its
    piece, relative to the layer's where the criterion says nothing across layers."""
    criterion = CRITERIA[spec.criterion]
    saliency = STRUCTURES[spec.structure].per_weight(criterion(rows, seed, statistics))
    if criterion.per_layer:
        saliency = layer_adaptive(saliency)
    return saliency.masked_fill(~mask, -1.0)


def removable(spec: Prune, shape: torch.Size) -> int:
    """How many weights of a weight (O, I, *kernel) go for a share `spec.sparsity`, whole pieces."""
    if spec.structure == "n_m":
        inputs = n_m_removed(shape[1], *spec.kept_of)
        return inputs * shape.numel() // shape[1]
    return whole_pieces(spec, shape, round(spec.sparsity * shape.numel()))


def whole_pieces(spec: Prune, shape: torch.Size, num_removed: int) -> int:
    """`num_removed` rounded down to whole pieces."""
    size = STRUCTURES[spec.structure].piece_size(shape)
    return num_removed // size * size


def problem(spec: Prune, shape: torch.Size) -> str:
    """Why a weight (O, I, *kernel) has nothing of the structure to remove, or nothing."""
    if spec.structure != "n_m":
        return STRUCTURES[spec.structure].problem(shape)
    if removable(spec, shape):
        return ""
    return f"its {shape[1]} inputs a group are too few for {spec.pattern}"


def rows_of(name: str, layer: nn.Module) -> torch.Tensor:
    """The weight of `layer` in the form (O, I, *kernel). Raises ModelError where it is not finite."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if not torch.isfinite(weight).all():
        raise ModelError(
            f"layer {name!r} holds NaN or infinite weights; train it again or mend the file"
        )
    return as_rows(layer, weight.detach())


def mask_before(
    name: str, layer: nn.Module, masks: Mapping[str, torch.Tensor] | None
) -> torch.Tensor:
    """What an earlier pruning kept of `layer`, (O, I, *kernel). Raises ModelError for another shape."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    held = (masks or {}).get(f"{name}.weight")
    if held is None:
        return torch.ones_like(as_rows(layer, weight), dtype=torch.bool)
    if held.shape != weight.shape:
        raise ModelError(
            f"the mask of {name!r} has shape {tuple(held.shape)}, its weight {tuple(weight.shape)}; "
            "the masks belong to another network"
        )
    return as_rows(layer, held)


def mask_layer_(
    name: str,
    layer: nn.Module,
    choice: Choice,
    before: torch.Tensor,
    statistics: LayerStatistics = NOTHING,
) -> torch.Tensor:
    """Set what `choice` removes to zero; the mask in the shape of the weight."""
    rows = rows_of(name, layer)
    mask = from_rows(layer, choice(rows, before, statistics) & before).contiguous()
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        weight.masked_fill_(~mask, 0.0)
    return mask
