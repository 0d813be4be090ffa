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
import numpy.typing as npt
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


RULES: dict[str, Rule] = {}
ELEMENTWISE, UNKNOWN = "elementwise", "unknown"  # two rules for many operations


def for_ops(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule of the operations `names` (aten names, in place or not)."""

    def add(rule: Rule) -> Rule:
        assert not RULES.keys() & set(names), names
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def rule_of(func: Any) -> Rule:
    """The rule of an operation; elementwise ones are known by torch's own tag."""
    name = func.overloadpacket.__name__.removesuffix("_")
    if name in RULES:
        return RULES[name]
    return RULES[ELEMENTWISE if torch.Tag.pointwise in func.tags else UNKNOWN]


@dc.dataclass(frozen=True)
class Site:
    """A place where the trace had to choose: `place` names it for all instances of a class, `answers` counts the
    possible answers, `nodes` are those that the answer ties."""

    place: str
    answers: int
    nodes: Nodes


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, runs it, and keeps the labels of its results.

    With `removed` (num_nodes,) bool each value is multiplied by zero at the removed nodes just before a product or
    a sum over that axis reads it: the masked network.
    """

    def __init__(
        self,
        module: nn.Module,
        choices: Choices,
        removed: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ties = Ties()
        self.choices = choices
        self.removed = removed
        self.sites: list[Site] = []
        self.within: list[str] = [""]  # names of the modules that are running
        self.counts: list[int] = [0]  # choices made so far in each of them
        self.module = module
        self.labels: Any = WeakTensorKeyDictionary()
        self.unseen: Any = WeakTensorKeyDictionary()  # parameters that nothing has read
        for name, tensor in named_tensors(module):
            self.labels[tensor] = self.ties.add_tensor(name, tensor.shape)
            if isinstance(tensor, nn.Parameter):
                self.unseen[tensor] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in tensors_in((args, kwargs)) if len(self.unseen) else ():
            self.unseen.pop(tensor, None)
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

    def run(self, example: Any) -> Any:
        """Run the module and label everything on the way; what it returns stays."""
        with watching(self.module, self.enter, self.leave), self:
            output = run(self.module, example)
        for value in tree_leaves(output):
            for nodes in self.of(value).axes.values():
                self.freeze(nodes, "it is an output of the network")
        return output

    def enter(self, name: str) -> None:
        """A module begins."""
        self.within.append(name)
        self.counts.append(0)

    def leave(self) -> None:
        """A module ends."""
        self.within.pop()
        self.counts.pop()


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


@contextlib.contextmanager
def watching(
    module: nn.Module, enter: Callable[[str], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Tell which part of `module` begins, by its first name, and when it ends."""
    handles = []
    for name, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        handles.append(part.register_forward_hook(lambda *_: leave()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(args: Any) -> Sequence[Tensor]:
    """All tensors among the arguments of an operation."""
    return [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]
