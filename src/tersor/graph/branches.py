"""Residual blocks: modules that give back what they read once their branches are taken away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tersor.graph.coupling import random_twin
from tersor.graph.trace import run

ADDITIONS = ("add", "add_")


def residual_blocks(module: nn.Module, example: Any) -> tuple[str, ...]:
    """The names of the smallest modules that are sums of their input and branches: without what the branches add they
    return exactly what they read, so an identity can stand in their place.

    Found by running a twin with random weights in float64 on `example` (an input, or a tuple of inputs) and on one ten
    times as large: whenever a module with parameters is called with one tensor and returns one of that shape, it runs
    again without the other term of each sum with its input, or with such a sum. A rectifier at its end changes nothing
    where its input comes from a rectifier.
    """
    twin = random_twin(module)
    found: set[str] | None = None
    for scale in (1.0, 10.0):
        inputs = tree_map(lambda value, scale=scale: _scaled(value, scale), example)
        held = _bypassable(twin, inputs)
        found = held if found is None else found & held
    assert found is not None
    names = [name for name, _ in module.named_modules() if name in found]
    return tuple(n for n in names if not any(other.startswith(f"{n}.") for other in found))


def _bypassable(twin: nn.Module, inputs: Any) -> set[str]:
    found: set[str] = set()
    failed: set[str] = set()
    reads: dict[str, list[Tensor]] = {}
    testing = False

    def before(name: str, args: tuple[Any, ...]) -> None:
        if not testing:
            reads.setdefault(name, []).append(args[0].clone())

    def after(name: str, part: nn.Module, out: Any) -> None:
        nonlocal testing
        if testing:
            return
        value = reads[name].pop()
        if not isinstance(out, Tensor) or out.shape != value.shape or name in failed:
            failed.add(name)
            return
        testing = True
        try:
            with _WithoutBranches(value) as mode:
                kept = part(value)
            same = mode.sums > 0 and isinstance(kept, Tensor) and torch.equal(kept, mode.original)
        finally:
            testing = False
        (found if same else failed).add(name)

    handles = []
    for name, part in twin.named_modules():
        if name and not isinstance(part, nn.Sequential) and any(True for _ in part.parameters()):
            handles.append(
                part.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: before(name, _single(args, kwargs)),
                    with_kwargs=True,
                )
            )
            handles.append(
                part.register_forward_hook(lambda part, _, out, name=name: after(name, part, out))
            )
    try:
        run(twin, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found - failed


def _single(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The one tensor that a module is called with; an empty one where it is called otherwise."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return args
    return (torch.empty(0),)


class _WithoutBranches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A sum of the stream and something else gives the stream."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.streams = [stream]
        self.original = stream.clone()
        self.sums = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ADDITIONS and len(args) == 2 and kwargs.get("alpha", 1) == 1:
            one, other = (self._is_stream(value) for value in args)
            shapes = {value.shape for value in args if isinstance(value, Tensor)}
            if one != other and len(shapes) == 1 and all(isinstance(v, Tensor) for v in args):
                self.sums += 1
                kept = args[0] if one else args[1]
                out = args[0].copy_(kept) if name == "add_" else kept.clone()
                self.streams.append(out)
                return out
        return func(*args, **kwargs)

    def _is_stream(self, value: Any) -> bool:
        return any(value is stream for stream in self.streams)


def _scaled(value: Any, scale: float) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        return (noise * scale).to(value.device, torch.float64)
    return value
