"""A running network's convolutions and linear layers, whoever calls them: modules or functions."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tersor.graph.labels import named_tensors

_CONVOLUTIONS = {getattr(torch, f"conv{n}d"): f"conv{n}d" for n in (1, 2, 3)}
_TRANSPOSED = {getattr(torch, f"conv_transpose{n}d"): f"conv_transpose{n}d" for n in (1, 2, 3)}
_KINDS = {functional.linear: "linear", **_CONVOLUTIONS, **_TRANSPOSED}
_GEOMETRY = ("stride", "padding", "dilation", "groups")


@dc.dataclass(frozen=True)
class Product:
    """One run of a layer.

    `name` is that of its weight, `bias` that of its bias (None where there is none, "" where it is computed), `kind`
    the function ("linear", "conv2d", ...). `axis` is that of channels in its input and output; its weight reads and
    makes so many (of a grouped convolution those of one group). `geometry` holds stride, padding, dilation and groups
    as they were given.
    """

    name: str
    bias: str | None
    kind: str
    axis: int
    reads: int
    makes: int
    geometry: dict[str, Any]


class Products(TorchFunctionMode):
    """Sees every convolution and linear layer that runs: it computes with what `before(product, input)` gives, and
    `after(product, output)` is called."""

    def __init__(
        self,
        module: nn.Module,
        before: Callable[[Product, Tensor], Tensor],
        after: Callable[[Product, Tensor], None],
    ) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in named_tensors(module)}
        self.before, self.after = before, after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kind = _KINDS.get(func)
        if kind is None:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias", *_GEOMETRY), args, strict=False)) | kwargs
        weight, value = given["weight"], given.pop("input")
        name = self.names.get(id(weight))
        if name is None:
            return func(*args, **kwargs)
        makes, reads = weight.shape[:2][::-1] if func in _TRANSPOSED else weight.shape[:2]
        axis = value.ndim - (1 if kind == "linear" else weight.ndim - 1)
        held = given.get("bias")
        bias = None if held is None else self.names.get(id(held), "")
        geometry = {word: given[word] for word in _GEOMETRY if word in given}
        product = Product(name, bias, kind, axis, reads, makes, geometry)
        value = self.before(product, value)
        kwargs.pop("input", None)
        out = func(value, *args[1:], **kwargs)
        self.after(product, out)
        return out
