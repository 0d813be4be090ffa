"""Shared filters: which convolutions store a part of their filters (`plan`), and a copy of the network
in which they do (`apply`)."""

from __future__ import annotations

import copy
import dataclasses as dc

import torch
from torch import nn

from tersor.errors import ModelError
from tersor.graph.exchange import fixed_layers, replace_
from tersor.graph.layers import weight_layers
from tersor.graph.shared import SharedConv2d
from tersor.specs import LayerPlan, Plan, Share
from tersor.tensors.orbits import fit_orbits, num_images


@dc.dataclass(frozen=True)
class Shared:
    """A copy with shared filters, and the plan behind it. `errors` holds for each changed layer the
    squared error of its fitted filters over their squared norm, 0 to 1."""

    module: nn.Module
    plan: Plan
    errors: dict[str, float]


def plan(module: nn.Module, spec: Share) -> Plan:
    """Decide which convolutions share filters, and say why others do not.

    Raises ModelError for a network without layers, SpecError for a pattern that matches none.
    """
    layers = weight_layers(module)
    if not layers:
        raise ModelError(
            f"{type(module).__name__} has no convolutional or linear layer, so no filters to share"
        )
    reasons = _reasons(module, spec)
    decisions = (
        LayerPlan(name, "keep", reason=reasons[name])
        if name in reasons
        else LayerPlan(name, "share")
        for name, _ in layers
    )
    return Plan(spec, tuple(decisions))


def apply(module: nn.Module, decided: Plan, *, seed: int = 0) -> Shared:
    """A copy of `module` whose convolutions share filters as `decided` says, fitted to its own in
    least squares; pairs are sought from `seed`. Its accuracy has to be learned again.

    Raises ModelError where the plan belongs to another network or weights are not finite.
    """
    changed = restructured(module, decided)
    layers = dict(weight_layers(module))
    errors = {}
    for decision in decided.layers:
        if decision.action != "share":
            continue
        weight, shared = layers[decision.layer].weight, changed.get_submodule(decision.layer)
        assert isinstance(weight, torch.Tensor) and isinstance(shared, SharedConv2d)
        try:
            fitted = fit_orbits(weight.detach().cpu(), shared.transform, seed=seed)
        except ModelError as error:
            raise ModelError(f"layer {decision.layer!r}: {error}") from None
        shared.fill_(fitted)
        bias = layers[decision.layer].bias
        if shared.bias is not None and isinstance(bias, torch.Tensor):
            with torch.no_grad():
                shared.bias.copy_(bias)
        held = weight.detach().cpu().double()
        lost = (fitted.filters() - held).square().sum()
        errors[decision.layer] = float(lost / held.square().sum().clamp(min=1e-300))
    return Shared(changed, decided, errors)


def share(module: nn.Module, spec: Share, *, seed: int = 0) -> Shared:
    """`plan`, then `apply`."""
    return apply(module, plan(module, spec), seed=seed)


def restructured(module: nn.Module, decided: Plan) -> nn.Module:
    """A copy of `module` with the layers that `decided` asks for, their filters zero: ready for the
    state dict of a network that shares by the same plan. Raises ModelError for another network's."""
    request = decided.request
    if not isinstance(request, Share):
        raise ModelError(f"the plan answers a request of kind {request.kind!r}; expected share")
    changed = copy.deepcopy(module)
    layers = dict(weight_layers(changed))
    reasons = _reasons(changed, Share(request.transform))
    for decision in decided.layers:
        if decision.action != "share":
            continue
        layer = layers.get(decision.layer)
        if not isinstance(layer, nn.Conv2d) or decision.layer in reasons:
            raise ModelError(
                f"the plan shares filters of layer {decision.layer!r}, and in {type(module).__name__} "
                f"{reasons.get(decision.layer, 'there is no such layer')}; the plan belongs to another "
                "network"
            )
        replace_(changed, layer, SharedConv2d(layer, request.transform))
    return changed


def plain(module: nn.Module) -> nn.Module:
    """A copy of `module` in which shared filters are ordinary convolutions: the same function and the
    user's own class, every filter stored."""
    changed = copy.deepcopy(module)
    for part in list(changed.modules()):
        if isinstance(part, SharedConv2d):
            replace_(changed, part, part.plain())
    return changed


def _reasons(module: nn.Module, spec: Share) -> dict[str, str]:
    """Why the filters of layers are not shared, by name."""
    reasons = fixed_layers(module, (nn.Conv2d,), spec.exclude)
    images = num_images(spec.transform)
    for name, layer in weight_layers(module):
        if name in reasons or not isinstance(layer, nn.Conv2d):
            continue
        height, width = layer.kernel_size
        if layer.out_channels % images:
            reasons[name] = f"its {layer.out_channels} filters are no multiple of {images}"
        elif spec.transform != "negate" and width == 1:
            reasons[name] = "its kernel is 1 wide: a mirror image is the same filter"
        elif spec.transform == "mirror4" and height == 1:
            reasons[name] = "its kernel is 1 high: a mirror image is the same filter"
    return reasons
