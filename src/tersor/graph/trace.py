"""Run a module once and label every value on the way: index tracing.

The module's own forward runs, under a mode that sees each elementary operation of torch. So functional calls,
control flow, shared modules and whatever else Python does need no second form of the program.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tersor.graph.labels import Labels, Nodes, Ties, named_tensors

Rule = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any]], Any]
# Where labels could lie on one of several axes: (kind of the place) -> number of the answer to take.
Choices = Mapping[str, int]


@dc.dataclass(frozen=True)
class Site:
    """A place where the trace had to choose: `place` names it for all instances of a class, `answers` counts the
    possible answers, `nodes` are those that the answer ties."""

    place: str
    answers: int
    nodes: Nodes


class Tracer(TorchDispatchMode):
    """Sees every operation, runs it, and keeps the labels of its results.

    With `removed` (num_nodes,) bool each value is multiplied by zero at the removed nodes just before a product or
    a sum over that axis reads it: the masked network.
    """

    def __init__(
        self, module: nn.Module, choices: Choices, removed: np.ndarray[Any, Any] | None = None
    ) -> None:
        super().__init__()
        self.ties = Ties()
        self.choices = choices
        self.removed = removed
        self.sites: list[Site] = []
        self.within: list[str] = [""]  # names of the modules that are running
        self.counts: list[int] = [0]  # choices made so far in each of them
        self.module = module
        self.labels: Any = WeakTensorKeyDictionary()
        for name, tensor in named_tensors(module):
            self.labels[tensor] = self.ties.add_tensor(name, tensor.shape)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        from tersor.graph.rules import rule_of

        return rule_of(func)(self, func, args, kwargs or {})

    def of(self, value: Any) -> Labels:
        """The labels of a value; none for what was never labelled."""
        found = self.labels.get(value) if isinstance(value, Tensor) else None
        return found if found is not None else Labels()

    def put(self, value: Tensor, axes: Mapping[int, Nodes], parameter: bool = False) -> None:
        """Label a result."""
        for axis, nodes in axes.items():
            assert value.shape[axis] == len(nodes), (value.shape, axis, len(nodes))
        self.labels[value] = Labels(dict(axes), parameter)

    def freeze(self, nodes: Nodes | None, reason: str) -> None:
        """The nodes stay; the module that is running is added to the reason."""
        if nodes is not None and len(nodes):
            where = f" in {self.within[-1]!r}" if self.within[-1] else ""
            self.ties.freeze(nodes, reason + where)

    def choose(self, kind: str, answers: int, nodes: Nodes) -> int:
        """The answer for this place: 0 unless `choices` says another."""
        owner = self.module.get_submodule(self.within[-1])
        place = f"{type(owner).__qualname__}:{self.counts[-1]}:{kind}"
        self.counts[-1] += 1
        self.sites.append(Site(place, answers, nodes))
        return min(self.choices.get(place, 0), answers - 1)

    def masked(self, value: Tensor, axis: int) -> Tensor:
        """`value` with zeros at the removed nodes along `axis`."""
        nodes = self.of(value).axes.get(axis)
        if self.removed is None or nodes is None or not self.removed[nodes].any():
            return value
        shape = [-1 if a == axis else 1 for a in range(value.ndim)]
        keep = torch.from_numpy(~self.removed[nodes]).to(value.dtype).view(shape)
        return value * keep

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow which module is running."""
        handles = []

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: (self.within.append(name), self.counts.append(0)) and None

        def leave(*_: Any) -> None:
            self.within.pop()
            self.counts.pop()

        for name, part in self.module.named_modules():
            handles.append(part.register_forward_pre_hook(enter(name)))
            handles.append(part.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def run(module: nn.Module, example: Any) -> Any:
    """`module(example)`, or `module(*example)` for a tuple, with every operation visible one by one."""
    inputs = example if isinstance(example, tuple) else (example,)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def trace(
    module: nn.Module,
    example: Any,
    choices: Choices | None = None,
    removed: np.ndarray[Any, Any] | None = None,
) -> tuple[Tracer, Any]:
    """The labels of one run of `module` on `example`, and what it returned."""
    tracer = Tracer(module, choices or {}, removed)
    with tracer.watching():
        with tracer:
            output = run(module, example)
        tracer.within[:] = [""]
        for value in tree_leaves(output):
            for nodes in tracer.of(value).axes.values():
                tracer.freeze(nodes, "it is an output of the network")
    return tracer, output


def tensors_in(args: Any) -> Sequence[Tensor]:
    """All tensors among the arguments of an operation."""
    return [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]
