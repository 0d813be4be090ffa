"""Hints: a student's features are drawn to its teacher's, inside the network (FitNets, Romero 2015).

No labels are needed. Where the two have different widths, a 1x1 regressor stands between them while
training and is thrown away afterwards.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence

import torch
from torch import nn

from tersor.errors import ModelError
from tersor.graph.layers import WEIGHT_LAYERS
from tersor.registry import did_you_mean

Features = list[torch.Tensor]
RIDGE = 1e-3  # of the mean square of the features, when a regressor is fitted


@dc.dataclass(frozen=True)
class Place:
    """One tensor inside a network: what the `call`-th call of a layer reads, or gives."""

    layer: str
    call: int = 0
    reads: bool = True


class Tapped(nn.Module):
    """A network that also gives the features at `places`: (outputs, features in that order).

    The hooks stay on the network: give one that nothing else uses.
    """

    def __init__(self, network: nn.Module, places: Sequence[Place]) -> None:
        super().__init__()
        self.network, self.places = network, tuple(places)
        self._seen: dict[tuple[str, bool], Features] = {
            (place.layer, place.reads): [] for place in places
        }
        for key, seen in self._seen.items():
            _tap(network.get_submodule(key[0]), key[1], seen)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, Features]:
        """Outputs of the network and the features."""
        for seen in self._seen.values():
            seen.clear()
        outputs = self.network(inputs)
        features = [self._seen[p.layer, p.reads][p.call] for p in self.places]
        for seen in self._seen.values():
            seen.clear()
        return outputs, features


def _tap(layer: nn.Module, reads: bool, seen: Features) -> None:
    if reads:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        layer.register_forward_hook(lambda _, __, output: seen.append(output))


def strided_inputs(module: nn.Module, example: torch.Tensor) -> dict[tuple[int, int], Place]:
    """What the first layer reads that makes maps of a size smaller, by that size (H, W), largest first.

    These are the ends of a network's stages. Reductions that are no layer, such as a call of
    functional.max_pool2d, are not seen; the images themselves do not count.
    """
    found: dict[tuple[int, int], Place] = {}
    calls: dict[str, int] = {}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            given = inputs[0] if inputs else None
            if not (isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor)):
                return
            if given is example or given.ndim != 4 or output.ndim != 4:
                return
            before, after = given.shape[2:], output.shape[2:]
            if after.numel() < before.numel():
                found.setdefault((before[0], before[1]), Place(name, call))

        return layer.register_forward_hook(look)

    handles = [
        watch(name, part)
        for name, part in module.named_modules()
        if isinstance(part, WEIGHT_LAYERS) or not any(part.children())
    ]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return dict(sorted(found.items(), reverse=True))


def hint_places(
    student: nn.Module, teacher: nn.Module, names: Sequence[str], example: torch.Tensor
) -> tuple[list[Place], list[Place]]:
    """Where student and teacher are compared: at the layers `names` (NAME or STUDENT=TEACHER), or with
    none at the inputs of strided stages of the same size of map.

    Both modules are in eval mode. Raises ModelError for an unknown name, and where there is no such
    stage.
    """
    if names:
        pairs = [(name.partition("=")[0], name.partition("=")[2] or name) for name in names]
        ours = [_named(student, own, "student") for own, _ in pairs]
        return ours, [_named(teacher, other, "teacher") for _, other in pairs]
    mine, theirs = strided_inputs(student, example), strided_inputs(teacher, example)
    sizes = [size for size in mine if size in theirs]
    if not sizes:
        raise ModelError(
            f"hints: {type(student).__name__} and {type(teacher).__name__} have no strided stage in common "
            f"(maps of {_sizes(mine)} and {_sizes(theirs)}); name layers in hint_layers, each NAME or "
            "STUDENT=TEACHER"
        )
    return [mine[size] for size in sizes], [theirs[size] for size in sizes]


def _named(module: nn.Module, name: str, role: str) -> Place:
    known = [key for key, _ in module.named_modules() if key]
    if name not in known:
        raise ModelError(
            f"hint_layers: the {role} {type(module).__name__} has no layer {name!r}; its layers are listed "
            f"by named_modules().{did_you_mean(name, known)}"
        )
    return Place(name, -1, reads=False)


def _sizes(found: dict[tuple[int, int], Place]) -> str:
    return ", ".join(f"{high}x{wide}" for high, wide in found) or "no size"


class Regressors(nn.Module):
    """One 1x1 linear map a place from the student's channels to the teacher's, or nothing where they are as many.

    It starts as the least-squares fit (ridge) over the features of one batch, so that the first steps do
    not pull the student to noise.
    """

    def __init__(self, ours: Features, theirs: Features, places: Sequence[Place]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_fitted(*pair) for pair in zip(places, ours, theirs, strict=True))

    def distance(
        self,
        ours: Features,
        theirs: Features,
        whole: Callable[[torch.Tensor], torch.Tensor] = lambda squares: squares,
    ) -> torch.Tensor:
        """Mean over places of |map(ours) - theirs|^2 / |theirs|^2, a float32 scalar. `whole` makes of |theirs|^2 of
        the images given (places,) that of the batch they stand for."""
        sizes = whole(torch.stack([target.detach().float().square().sum() for target in theirs]))
        parts = []
        for regressor, own, target, size in zip(self.maps, ours, theirs, sizes, strict=True):
            wanted = target.detach().float()
            guess = _channels_last(own.float())
            error = (regressor(guess) - _channels_last(wanted)).square().sum()
            parts.append(error / size.clamp_min(1e-12))
        return torch.stack(parts).mean()


def _channels_last(features: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, ...) as (N, ..., C); features (N, C) and tokens (N, T, C) as they are."""
    return features.movedim(1, -1) if features.ndim > 3 else features


def _fitted(place: Place, own: object, target: object) -> nn.Module:
    if not (isinstance(own, torch.Tensor) and isinstance(target, torch.Tensor)):
        raise ModelError(f"hints: layer {place.layer!r} gives no single tensor; name another layer")
    ours, theirs = _channels_last(own.float()), _channels_last(target.float())
    if ours.shape[:-1] != theirs.shape[:-1]:
        raise ModelError(
            f"hints: at {place.layer!r} the student's features are {tuple(own.shape)}, the teacher's "
            f"{tuple(target.shape)}; only their channels may differ: name another pair of layers"
        )
    if ours.shape[-1] == theirs.shape[-1]:
        return nn.Identity()
    x, y = ours.flatten(0, -2).double(), theirs.flatten(0, -2).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, x.T @ y).float()
    regressor = nn.Linear(
        ours.shape[-1], theirs.shape[-1], device="meta"
    )  # draws nothing at random
    regressor.weight = nn.Parameter(solved[:-1].T.contiguous())
    regressor.bias = nn.Parameter(solved[-1].clone())
    return regressor
