"""Which slices of which parameters can only be removed together, in any network that runs: found, then proven.

What the trace says is checked on a twin of the network with random weights in float64: with half the units of a group
removed it must compute what the masked network computes. Masked means that the values of a removed channel are
multiplied by zero just before each product or sum that reads them. A group that fails, for instance because a size
stands as a number in the user's forward, stays, with the error as its reason.
"""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from tersor.errors import ModelError
from tersor.graph import movement, products, rules  # noqa: F401  they register what operations do
from tersor.graph.attention import headed_
from tersor.graph.groups import Coupling, Frozen, Group, Removed, grouped
from tersor.graph.surgery import lines_of, removed
from tersor.graph.trace import Choices, Tracer, run, watching

PROVEN = 1e-10  # largest relative distance of outputs, in float64


def coupled_groups(module: nn.Module, example: Any) -> Coupling:
    """The groups of `module` and the channels that stay, each with its reason.

    `example` is an input tensor, or a tuple of inputs, small and of a legal size; the module runs on it as it is, in
    eval mode, so control flow is followed as this input goes. Parameters that are read in training only are labelled
    by a second run. Raises ModelError where the module does not run on the example.
    """
    found = label(module, example)
    twin, inputs = random_twin(module), tree_map(_double, example)
    bad = _Proof(twin, inputs, found).failing() or {}
    tried: dict[str, int] = {}
    while bad:
        # Another answer at a place where labels could lie on one of several axes may do.
        nodes = np.isin(found.component, np.concatenate([found[name].nodes for name in bad]))
        open_sites = {
            site.place: site
            for site in found.sites
            if nodes[site.nodes].any() and tried.get(site.place, 0) + 1 < site.answers
        }
        if not open_sites:
            break
        tried.update({place: tried.get(place, 0) + 1 for place in open_sites})
        other = label(module, example, {**found.choices, **tried})
        failing = _Proof(twin, inputs, other).failing(bad, _weight(found, bad))
        if failing is not None:
            found, bad = other, failing
    return _without(found, bad)


def label(module: nn.Module, example: Any, choices: Choices | None = None) -> Coupling:
    """The groups that one trace of a copy of `module` says there are; not proven."""
    twin = copy.deepcopy(module).eval()
    headed_(twin)
    tracer = Tracer(twin, choices or {})
    try:
        tracer.run(example)
    except Exception as error:
        within = f" (in {tracer.within[-1]!r})" if tracer.within[-1] else ""
        raise ModelError(
            f"{type(module).__name__} does not run on the example{within}: {_words(error)}; give an example input of "
            "a legal size"
        ) from error
    trained = _label_training(tracer, twin, example) if tracer.unseen else False
    return dc.replace(grouped(tracer), trained=trained)


def _label_training(tracer: Tracer, twin: nn.Module, example: Any) -> bool:
    """A second run, in training mode, for what evaluation does not read (auxiliary heads)."""
    counted, tracer.within[:], tracer.counts[:] = list(tracer.ties.products), [""], [0]
    try:
        tracer.module = twin.train()
        tracer.run(tree_map(_twice, example))
    except Exception:  # what training alone reads cannot be coupled then: it is not touched
        return False
    finally:
        tracer.ties.products = counted
    return True


def masked(module: nn.Module, example: Any, found: Coupling, units: Removed) -> Any:
    """What `module` gives in eval mode when the values of the removed units are multiplied by zero just before each
    product or sum that reads them."""
    if any(p.training or type(p) is nn.MultiheadAttention for p in module.modules()):
        module = copy.deepcopy(module).eval()
        headed_(module)
    return Tracer(module, found.choices, found.nodes_of(units)).run(example)


def random_twin(module: nn.Module, seed: int = 0) -> nn.Module:
    """A float64 copy in eval mode with random parameters and batch-norm statistics of ordinary size: no trained zero
    hides a fault."""
    twin = copy.deepcopy(module).double().eval()
    headed_(twin)
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, scale: float, mean: float, uniform: bool = False) -> None:
        draw = torch.rand if uniform else torch.randn
        noise = draw(tensor.shape, generator=generator, dtype=tensor.dtype)
        tensor.copy_((noise * scale + mean).to(tensor.device))

    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim > 1:
                fill(parameter, 1 / max(parameter[0].numel(), 1) ** 0.5, 0.0)
            else:
                fill(parameter, 0.3, 0.5)
        for part in twin.modules():
            if isinstance(part, _NormBase) and part.running_mean is not None:
                fill(part.running_mean, 0.3, 0.0)
                if part.running_var is not None:
                    fill(part.running_var, 1.0, 0.5, uniform=True)
    return twin


def half_of(group: Group, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Half of the units, at random; one stays at least."""
    rng = np.random.default_rng([seed, group.num_units])
    return np.sort(rng.permutation(group.num_units)[: group.num_units // 2])


@dc.dataclass(frozen=True)
class _Problem:
    """Why groups cannot go together, and the modules that were running then, the innermost last."""

    reason: str
    within: tuple[str, ...] = ()


class _Proof:
    """Tests of groups on the twin: all at once, then those that touch the module that failed, or by halves."""

    def __init__(self, twin: nn.Module, example: Any, found: Coupling) -> None:
        self.twin, self.example, self.found = twin, example, found

    def failing(
        self, suspects: Mapping[str, str] | None = None, more_than: int = -1
    ) -> dict[str, str] | None:
        """The groups that cannot be removed, and why; `suspects` are tested first.

        None as soon as it is clear that the others could remove no more than `more_than` elements.
        """
        proven: list[Group] = []
        bad: dict[str, str] = {}
        groups, feared = list(self.found.groups), set(suspects or ())
        pending = [[g for g in groups if g.name not in feared]]
        pending.append([g for g in groups if g.name in feared])
        while pending:
            if _weight(self.found, bad) <= more_than:
                return None
            batch = [group for group in pending.pop() if group.name not in bad]
            if not batch:
                continue
            problem = self.problem([*proven, *batch])
            if problem is None:
                proven += batch
            elif len(batch) == 1:
                bad[batch[0].name] = problem.reason
                peers = [g for g in self._peers(batch[0]) if g.name not in bad and g not in proven]
                if peers and (again := self.problem([*proven, *peers])) is not None:
                    bad.update({peer.name: again.reason for peer in peers})
            else:
                first, rest = _touching(batch, problem.within)
                pending += [rest, first]
        return bad

    def _peers(self, group: Group) -> list[Group]:
        """Groups at the same place in other instances of the class of module that holds the layer."""
        owner, _, own = group.name.rpartition(".")
        if not owner:
            return []
        kind = type(self.twin.get_submodule(owner))
        if kind.__module__ == nn.Sequential.__module__:
            return []  # containers say nothing of what their parts are for
        return [
            other
            for other in self.found.groups
            if other is not group
            and other.name.rpartition(".")[2] == own
            and type(self.twin.get_submodule(other.name.rpartition(".")[0])) is kind
        ]

    def problem(self, groups: list[Group]) -> _Problem | None:
        """Why half of these groups cannot go together, or None where they can."""
        units = {group.name: half_of(group) for group in groups if group.num_units > 1}
        smaller = removed(self.twin, lines_of(self.twin, self.found.kept(units)))
        within: list[str] = []

        def leave() -> None:  # a hook that returns something would replace the output
            within.pop()

        try:
            with watching(smaller, within.append, leave):
                outputs = tree_leaves(run(smaller, self.example))
            if self.found.trained:
                run(copy.deepcopy(smaller).train(), tree_map(_twice, self.example))
        except Exception as error:
            return _Problem(f"without it the network does not run: {_words(error)}", tuple(within))
        del smaller  # networks of a billion weights fit twice, not three times
        expected = tree_leaves(masked(self.twin, self.example, self.found, units))
        for one, other in zip(outputs, expected, strict=True):
            if isinstance(one, Tensor) and not _same(one, other):
                return _Problem("without it the network computes something else")
        return None


def _touching(batch: list[Group], within: Sequence[str]) -> tuple[list[Group], list[Group]]:
    """The groups of `batch` with slices in the innermost module that some of them touch, and the others; halves where
    that tells none apart."""
    for name in reversed(within):
        inside = [g for g in batch if any(m.name.startswith(f"{name}.") for m in g.members)]
        if name and 0 < len(inside) < len(batch):
            return inside, [group for group in batch if group not in inside]
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    size = float(other.abs().max()) if other.numel() else 0.0
    return bool(torch.isfinite(one).all()) and bool((one - other).abs().max() <= PROVEN * size)


def _weight(found: Coupling, bad: Mapping[str, str]) -> int:
    """Elements that the good groups could remove, to compare two answers."""
    total = 0
    for group in found.groups:
        if group.name not in bad:
            total += sum(member.index.size for member in group.members)
    return total


def _without(found: Coupling, bad: dict[str, str]) -> Coupling:
    """Move the groups that failed to what stays."""
    frozen = list(found.frozen)
    for group in found.groups:
        if group.name in bad:
            frozen += [
                Frozen(member.name, member.axis, member.index.size, bad[group.name])
                for member in group.members
                if member.role == "output"
            ]
    return dc.replace(
        found, groups=tuple(g for g in found.groups if g.name not in bad), frozen=tuple(frozen)
    )


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _twice(value: Any) -> Any:
    """A batch of two where there was one: batch norm in training needs more than one value."""
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1:
        return torch.cat([value, value.roll(1, -1)])
    return value


def _words(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text.strip()[:200]}"
