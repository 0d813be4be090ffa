"""Unstructured pruning: which weights go (`plan`), and a copy of the network without them (`apply`)."""

from __future__ import annotations

import copy
import dataclasses as dc

import torch
from torch import nn

from tersor.errors import ModelError
from tersor.graph.layers import weight_layers
from tersor.graph.select import excluded_layers
from tersor.specs import LayerPlan, Plan, Prune
from tersor.tensors.criteria import CRITERIA
from tersor.tensors.masks import keep_top, removed_by_layer


@dc.dataclass(frozen=True)
class Pruned:
    """A pruned copy, the mask of each weight (parameter name -> bool, True = keep), and the plan behind it."""

    module: nn.Module
    masks: dict[str, torch.Tensor]
    plan: Plan

    @property
    def sparsity(self) -> float:
        """Share of zeros among all weights of the pruned layers."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / max(total, 1)


def plan(module: nn.Module, spec: Prune, *, seed: int = 0) -> Plan:
    """Decide the sparsity of every convolutional and linear layer.

    Raises ModelError for a network without such layers or with weights that are not finite, SpecError for a
    pattern in spec.exclude that matches no layer.
    """
    layers = weight_layers(module)
    if not layers:
        raise ModelError(
            f"{type(module).__name__} has no convolutional or linear layer, so nothing to prune"
        )
    skipped = excluded_layers([name for name, _ in layers], spec.exclude)
    chosen = [(name, layer) for name, layer in layers if name not in skipped]
    saliency = CRITERIA[spec.criterion]
    scores = [saliency(_finite(name, layer), seed) for name, layer in chosen]
    if spec.scope == "global" and scores:
        removed = removed_by_layer(scores, spec.sparsity, spec.floor)
    else:
        removed = [removed_by_layer([score], spec.sparsity, spec.floor)[0] for score in scores]
    sparsity = {
        name: count / score.numel()
        for (name, _), count, score in zip(chosen, removed, scores, strict=True)
    }
    decisions = tuple(
        LayerPlan(name, "keep", reason="excluded by name")
        if name in skipped
        else LayerPlan(name, "prune", sparsity=sparsity[name])
        for name, _ in layers
    )
    return Plan(spec, decisions)


def apply(module: nn.Module, decided: Plan, *, seed: int = 0) -> Pruned:
    """Set the weights of lowest saliency to zero in a copy of `module`, as `decided` says layer by layer.

    Raises ModelError where the plan names a layer that this module does not have.
    """
    request = decided.request
    assert isinstance(request, Prune)
    saliency = CRITERIA[request.criterion]
    pruned = copy.deepcopy(module)
    layers = dict(weight_layers(pruned))
    masks = {}
    for decision in decided.layers:
        if decision.action != "prune":
            continue
        if decision.layer not in layers:
            raise ModelError(
                f"the plan prunes layer {decision.layer!r}, which {type(module).__name__} does not have; "
                "the plan belongs to another network"
            )
        weight = _finite(decision.layer, layers[decision.layer])
        mask = keep_top(saliency(weight, seed), round(decision.sparsity * weight.numel()))
        with torch.no_grad():
            weight.masked_fill_(~mask, 0.0)
        masks[f"{decision.layer}.weight"] = mask
    return Pruned(pruned, masks, decided)


def prune(module: nn.Module, spec: Prune, *, seed: int = 0) -> Pruned:
    """`plan`, then `apply`."""
    return apply(module, plan(module, spec, seed=seed), seed=seed)


def _finite(name: str, layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if not torch.isfinite(weight).all():
        raise ModelError(
            f"layer {name!r} holds NaN or infinite weights; train it again or mend the file"
        )
    return weight
