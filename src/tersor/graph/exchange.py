"""Putting another module in the place of a layer: where that can be done, and doing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from tersor.graph.layers import weight_layers
from tersor.graph.select import excluded_layers


def fixed_layers(
    module: nn.Module, kinds: Sequence[type[nn.Module]], exclude: Sequence[str]
) -> dict[str, str]:
    """The convolutional and linear layers that must stay as they are, by name, each with the reason.

    Another may take the place of a layer of exactly one of `kinds` (a subclass may compute something
    else), without groups, that is not covered by `exclude`, tied, watched by hooks, or the whole
    network. Raises SpecError for a pattern in `exclude` that matches no layer.
    """
    layers = weight_layers(module)
    skipped = excluded_layers([name for name, _ in layers], exclude)
    owners = Counter(
        id(parameter) for part in module.modules() for parameter in part._parameters.values()
    )
    reasons = {}
    for name, layer in layers:
        if name in skipped:
            reasons[name] = "excluded by name"
        elif type(layer) not in kinds:
            allowed = ", ".join(kind.__name__ for kind in kinds)
            reasons[name] = (
                f"{type(layer).__name__} is not {'one of ' if kinds[1:] else ''}{allowed}"
            )
        elif getattr(layer, "groups", 1) != 1:
            reasons[name] = f"its {layer.groups} groups read different inputs"
        elif owners[id(layer.weight)] > 1:
            reasons[name] = "its weight is tied to another layer's"
        elif layer._forward_hooks or layer._forward_pre_hooks:
            reasons[name] = "it has hooks, which would be lost"
        elif layer is module:
            reasons[name] = "it is the whole network, whose class must stay"
    return reasons


def replace_(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in `module`: a shared layer has several places."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
