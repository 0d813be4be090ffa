"""Structured pruning: which channels go (`plan`), and the physically smaller network (`apply`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tersor.errors import BudgetError, ModelError, SpecError
from tersor.graph.coupling import coupled_groups
from tersor.graph.groups import Coupling, Group
from tersor.graph.labels import Nodes, named_tensors
from tersor.graph.layers import weight_layers
from tersor.graph.select import excluded_layers
from tersor.graph.surgery import lines_of, removed
from tersor.specs import LayerPlan, Plan, Prune
from tersor.specs.prune import REMOVED
from tersor.tensors.unit_criteria import UNIT_CRITERIA, UnitValues

Units = dict[str, Nodes]  # group -> the units that go, rising


def plan(
    module: nn.Module, spec: Prune, example: Any, *, found: Coupling | None = None, seed: int = 0
) -> Plan:
    """Decide which channels every layer loses.

    `example` is a small input of a legal size (N, ...), or a tuple of inputs; with spec.macs the multiplications of one
    run on it are counted. `found` is the coupling, where it is known already. Raises ModelError for a network that
    cannot run or that holds nothing to remove, SpecError for a pattern that matches no layer or a field that has no
    meaning here, BudgetError where spec.macs is below what the floors allow.
    """
    found = found if found is not None else coupled_groups(module, example)
    return _written(module, spec, found, chosen_units(module, spec, found, seed=seed))


def chosen_units(module: nn.Module, spec: Prune, found: Coupling, *, seed: int = 0) -> Units:
    """The units of each group of `found` that go; raises what `plan` does."""
    _refuse_unused(spec)
    _require_finite(module)
    groups = _candidates(module, spec, found)
    scores = {group.name: _scores(module, group, spec, seed) for group in groups}
    order = _order(groups, scores, spec)
    return _within_macs(found, spec, order) if spec.macs > 0 else order(spec.sparsity)


def apply(module: nn.Module, decided: Plan) -> nn.Module:
    """A smaller copy of `module` as the plan says, which was made for this network or another instance of its class.

    Nothing is traced. Raises ModelError where the plan does not fit.
    """
    return removed(module, decided.layers)


def _refuse_unused(spec: Prune) -> None:
    """A field that would be ignored is an error."""
    if spec.structure not in REMOVED:
        raise SpecError(
            f"structure {spec.structure!r} leaves zeros; expected one that is removed: {', '.join(REMOVED)}"
        )
    unused = {
        "structure": spec.structure == "block",
        "scope": spec.scope == "auto",
        "reconstruct": spec.reconstruct,
        "schedule": spec.schedule != "one_shot",
    }
    for name, given in unused.items():
        if given:
            raise SpecError(
                f"prune.{name}={getattr(spec, name)!r} is not known to structured pruning yet; leave it out"
            )


def _require_finite(module: nn.Module) -> None:
    """A NaN would rank anywhere."""
    bad = [
        name
        for name, tensor in named_tensors(module)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise ModelError(
            f"{', '.join(map(repr, bad[:5]))}{' and more' if len(bad) > 5 else ''}: NaN or infinite values; train "
            "the network again or mend its file"
        )


def _skipped(module: nn.Module, spec: Prune) -> set[str]:
    return excluded_layers([name for name, _ in weight_layers(module)], spec.exclude)


def _candidates(module: nn.Module, spec: Prune, found: Coupling) -> list[Group]:
    """The groups that may lose units."""
    skipped, tensors = _skipped(module, spec), dict(module.named_parameters())
    groups = []
    for group in found.groups:
        made = [m.name for m in group.members if m.role == "output"]
        dims = {tensors[name].ndim > 2 for name in made if name in tensors}
        wanted = {"channel": True, "filter": dims == {True}, "neuron": dims == {False}}
        if wanted[spec.structure] and not any(n.rpartition(".")[0] in skipped for n in made):
            groups.append(group)
    if not groups:
        raise ModelError(
            f"{type(module).__name__} has no {spec.structure} that can be removed; {_first_reason(found)}"
        )
    return groups


def _first_reason(found: Coupling) -> str:
    return (
        f"{found.frozen[0].name!r} stays because {found.frozen[0].reason}"
        if found.frozen
        else "it has no layers"
    )


def _scores(module: nn.Module, group: Group, spec: Prune, seed: int) -> torch.Tensor:
    """Saliency of each unit, float64, mean 1."""
    saliency = UNIT_CRITERIA[spec.criterion](_values(module, group), seed).double()
    return saliency / max(float(saliency.mean()), 1e-300)


def _values(module: nn.Module, group: Group) -> UnitValues:
    tensors = dict(module.named_parameters())
    held: dict[str, list[torch.Tensor]] = {"output": [], "input": [], "scale": []}
    for member in group.members:
        if member.name not in tensors:
            continue
        owner, _, own = member.name.rpartition(".")
        normed = isinstance(module.get_submodule(owner), _NormBase)
        role = "scale" if normed and own == "weight" else member.role
        if role in held and (tensors[member.name].ndim > 1 or role == "scale"):
            rows = (
                tensors[member.name]
                .detach()
                .movedim(member.axis, 0)[torch.from_numpy(member.index)]
            )
            held[role].append(rows.flatten(1).float())
    return UnitValues(group.num_units, held["output"], held["input"], held["scale"])


def _least(group: Group, spec: Prune) -> int:
    return _rounded(group, spec, max(1, int(np.ceil(spec.floor * group.num_units))))


def _rounded(group: Group, spec: Prune, kept: int) -> int:
    """`kept` units, or as many more as make the layer's channels a multiple."""
    width = next(m for m in group.members if m.role == "output").index.shape[1]
    while kept < group.num_units and (kept * width) % spec.multiple_of:
        kept += 1
    return kept


def _order(
    groups: list[Group], scores: Mapping[str, torch.Tensor], spec: Prune
) -> Callable[[float], Units]:
    """From a share of all units to the units that go: the lowest of each layer, or the lowest of all layers."""
    ranks = {g.name: np.argsort(scores[g.name].numpy(), kind="stable") for g in groups}
    pooled = np.sort(torch.cat([scores[g.name] for g in groups]).numpy(), kind="stable")

    def units(share: float) -> Units:
        gone = {}
        count = min(round(share * len(pooled)), len(pooled))
        threshold = pooled[count - 1] if count else -1.0
        for group in groups:
            if spec.scope == "global":
                wanted = int((scores[group.name].numpy() <= threshold).sum())
            else:
                wanted = round(share * group.num_units)
            kept = max(_least(group, spec), _rounded(group, spec, group.num_units - wanted))
            gone[group.name] = np.sort(ranks[group.name][: group.num_units - kept])
        return gone

    return units


def _within_macs(found: Coupling, spec: Prune, order: Callable[[float], Units]) -> Units:
    """The smallest share of units whose removal leaves at most spec.macs of the multiplications."""
    whole = found.macs()
    limit = spec.macs * whole
    least = found.macs(order(1.0))
    if least > limit:
        raise BudgetError(
            f"macs={spec.macs:g} cannot be met: with all removed that may go, {least / whole:.4f} of the "
            "multiplications stay; raise macs, lower floor, or exclude fewer layers"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if found.macs(order(middle)) <= limit else (middle, high)
    return order(high)


def _written(module: nn.Module, spec: Prune, found: Coupling, units: Units) -> Plan:
    """What goes, and of every other layer why it keeps its outputs."""
    lines, skipped = list(lines_of(module, found.kept(units))), _skipped(module, spec)
    changed = {line.layer: line for line in lines}
    reasons = {f.name.removesuffix(".weight"): f.reason for f in found.frozen}
    for name, _ in weight_layers(module):
        if name in changed and changed[name].outputs:
            continue
        reason = (
            "excluded by name" if name in skipped else reasons.get(name, "nothing of it was chosen")
        )
        if name in changed:
            lines[lines.index(changed[name])] = LayerPlan(
                name, "remove", inputs=changed[name].inputs, reason=f"its outputs stay: {reason}"
            )
        else:
            lines.append(LayerPlan(name, "keep", reason=reason))
    return Plan(spec, tuple(lines))
