"""A narrower network of the same family: every width of a network times one number."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersor.errors import ModelError, SpecError
from tersor.models.load import example_input, load_model

STARTS = ("random", "teacher")


def narrowed(
    network: str | nn.Module,
    width: float,
    input_shape: tuple[int, int, int],
    *,
    multiple_of: int = 1,
    start: str = "random",
    seed: int = 0,
) -> nn.Module:
    """A copy of `network` (a name, or a module) whose layers have `width` times their outputs, in
    eval mode; its class, its kernels and its last layer's outputs stay.

    `width` is above 0 and below 1; outputs are rounded to whole numbers, at least 1, and up to a
    multiple of `multiple_of` where the layer has that many; groups that do not divide the inputs
    become fewer. A layer takes as many inputs as reach it when inputs of `input_shape`
    (C, H, W) are run, so concatenations and flattening need no rule. `start` "random": weights from
    `seed` (He 2015 for convolutions); "teacher": the first channels of each layer's own weights.
    Raises SpecError for values that mean nothing, ModelError for a network that this cannot narrow:
    one that holds parameters of its own, or whose code counts on its widths.
    """
    _check(width, multiple_of, start)
    module = load_model(network, seed=seed) if isinstance(network, str) else network
    example = example_input(input_shape)
    student = copy.deepcopy(module).cpu().float().eval()
    strange = _strange_parts(student)
    if strange:
        raise ModelError(_refusal(module, f"{strange[0]} holds parameters of a kind unknown to it"))
    expected, last = _last_layer(module, student, example)
    narrowing = _Narrowing(width, multiple_of, last)
    with _hooked(student, narrowing.fit_):
        try:
            with torch.no_grad():
                found = student(example)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(_refusal(module, f"it does not run then ({reason})")) from None
    idle = [
        n
        for n, part in student.named_modules()
        if _is_sized(part) and id(part) not in narrowing.done
    ]
    if idle:
        raise ModelError(
            _refusal(module, f"its layer {idle[0]!r} never runs, so its inputs are unknown")
        )
    if not isinstance(found, torch.Tensor) or found.shape != expected:
        raise ModelError(_refusal(module, "its outputs change their shape"))
    if start == "random":
        _draw_(student, seed)
    return student.requires_grad_(True)


class _Narrowing:
    """What each layer becomes when inputs first reach it: a pre-hook of every layer."""

    def __init__(self, width: float, multiple_of: int, last: nn.Module) -> None:
        self.width, self.multiple_of, self.last = width, multiple_of, last
        self.done: set[int] = set()

    def fit_(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Give `layer` the sizes that its inputs ask for, once."""
        if id(layer) in self.done:
            return
        self.done.add(id(layer))
        if isinstance(layer, _ConvNd):
            self._convolution_(layer, inputs[0].shape[1])
        elif isinstance(layer, nn.Linear):
            read = inputs[0].shape[-1]
            layer.out_features = self._scaled(layer, layer.out_features, 1)
            layer.in_features = read
            _cut_(layer, weight=(layer.out_features, read), bias=(layer.out_features,))
        elif isinstance(layer, _NormBase):
            size = layer.num_features = inputs[0].shape[1]
            _cut_(
                layer, **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (size,))
            )
        elif isinstance(layer, nn.GroupNorm):
            size = layer.num_channels = inputs[0].shape[1]
            layer.num_groups = math.gcd(layer.num_groups, size)
            _cut_(layer, weight=(size,), bias=(size,))
        elif isinstance(layer, nn.LayerNorm):
            size = inputs[0].shape[-1]
            layer.normalized_shape = (size,)
            _cut_(layer, weight=(size,), bias=(size,))
        elif isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
            size = layer.num_parameters = inputs[0].shape[1]
            _cut_(layer, weight=(size,))

    def _convolution_(self, layer: _ConvNd, read: int) -> None:
        depthwise = layer.groups == layer.in_channels > 1
        if depthwise:
            ratio = layer.out_channels // layer.in_channels
            layer.groups, layer.out_channels = read, ratio * read
        else:
            each, wanted = layer.in_channels // layer.groups, round(layer.out_channels * self.width)
            layer.groups = _groups(layer.groups, each, read, wanted)
            layer.out_channels = self._scaled(layer, layer.out_channels, layer.groups)
        layer.in_channels = read
        outer, inner = layer.out_channels, read
        if isinstance(layer, _ConvTransposeNd):
            outer, inner = read, layer.out_channels
        shape = (outer, inner // layer.groups, *layer.kernel_size)
        _cut_(layer, weight=shape, bias=(layer.out_channels,))

    def _scaled(self, layer: nn.Module, size: int, groups: int) -> int:
        if layer is self.last:
            return size
        step = math.lcm(self.multiple_of, groups)
        return min(size, max(1, math.ceil(round(size * self.width) / step)) * step)


def _groups(groups: int, inputs_each: int, read: int, written: int) -> int:
    """The most groups, no more than before, that divide `read` inputs into as many each, or fewer;
    where it can be, a number that divides the `written` outputs too."""
    fitting = [n for n in range(groups, 0, -1) if read % n == 0 and read // n <= inputs_each]
    if not fitting:
        raise ValueError(
            f"{read} channels do not fit {groups} groups of {inputs_each}: try multiple_of "
            f"{inputs_each}"
        )
    return next((n for n in fitting if written % n == 0), fitting[0])


def _cut_(layer: nn.Module, **shapes: tuple[int, ...]) -> None:
    """Keep the first entries of each tensor of `layer` along each axis."""
    for name, shape in shapes.items():
        held = getattr(layer, name)
        if held is not None:
            kept = held.detach()[tuple(slice(size) for size in shape)].clone()
            setattr(layer, name, nn.Parameter(kept) if isinstance(held, nn.Parameter) else kept)


def _draw_(module: nn.Module, seed: int) -> None:
    """Random weights and untouched statistics, by `seed`, leaving other random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in module.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
            if isinstance(part, _ConvNd):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)


def _last_layer(
    module: nn.Module, student: nn.Module, example: torch.Tensor
) -> tuple[torch.Size, nn.Module]:
    """The shape of the outputs, and the layer of `student`, not narrowed yet, that runs last."""
    ran: list[nn.Module] = []
    with _hooked(student, lambda layer, _: ran.append(layer), nn.Linear, _ConvNd):
        try:
            with torch.no_grad():
                outputs = student(example)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{type(module).__name__} cannot take inputs of {tuple(example.shape[1:])}: {reason}"
            ) from None
    if not ran or not isinstance(outputs, torch.Tensor):
        raise ModelError(_refusal(module, "it has no layer with weights, or no tensor as output"))
    return outputs.shape, ran[-1]


@contextlib.contextmanager
def _hooked(
    module: nn.Module, hook: Callable[..., None], *kinds: type[nn.Module]
) -> Iterator[None]:
    handles = [
        part.register_forward_pre_hook(hook)
        for part in module.modules()
        if (isinstance(part, kinds) if kinds else _is_sized(part))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_sized(part: nn.Module) -> bool:
    """Whether narrowing knows the sizes of this kind of layer."""
    if isinstance(part, nn.LayerNorm):
        return len(part.normalized_shape) == 1
    return isinstance(part, _ConvNd | nn.Linear | _NormBase | nn.GroupNorm | nn.PReLU)


def _strange_parts(module: nn.Module) -> list[str]:
    return [
        f"{name or 'the network'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if next(part.parameters(recurse=False), None) is not None and not _is_sized(part)
    ]


def _refusal(module: nn.Module, reason: str) -> str:
    return (
        f"{type(module).__name__} cannot be narrowed by this: {reason}; give a student of your own "
        "(FILE.py:FUNCTION, or a module)"
    )


def _check(width: float, multiple_of: int, start: str) -> None:
    if not 0 < width < 1:
        raise SpecError(f"width is above 0 and below 1, got {width!r}")
    if multiple_of < 1:
        raise SpecError(f"multiple_of must be at least 1, got {multiple_of!r}")
    if start not in STARTS:
        raise SpecError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
