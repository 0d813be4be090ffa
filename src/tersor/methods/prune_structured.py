"""Structured pruning: which channels go (`plan`), and the physically smaller network (`apply`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
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
from tersor.methods.prune_auto import KL_BOUND, Units, allocated, group_harms, within_bound
from tersor.methods.prune_blocks import plan_blocks
from tersor.methods.prune_trials import FloatArray, Trials, calibration_images, image_shape
from tersor.methods.refit import reconstructed
from tersor.methods.unit_statistics import (
    UnitStatistics,
    first_labels,
    norms_of,
    unit_statistics,
)
from tersor.specs import LayerPlan, Plan, Prune
from tersor.specs.prune import REMOVED
from tersor.tensors.unit_criteria import UNIT_CRITERIA, UnitValues

FloatArray64 = npt.NDArray[np.float64]
NUM_IMAGES = 256  # of the calibration inputs, to decide
NUM_RECONSTRUCTED = 1024  # to fit weights


def plan(
    module: nn.Module,
    spec: Prune,
    example: Any,
    *,
    inputs: Iterable[FloatArray] | None = None,
    labels: Iterable[Any] | None = None,
    found: Coupling | None = None,
    seed: int = 0,
) -> Plan:
    """Decide which channels every layer loses.

    `example` is a small input of a legal size (N, ...), or a tuple of inputs; with spec.macs the multiplications of one
    run on it are counted. `found` is the coupling, where it is known already. `inputs` are batches (N, C, H, W) float32
    as the network sees them, of which NUM_IMAGES are used, for scope "auto" and criteria that need them; `labels`
    (N,) of the same images, or batches of them, let a criterion see the task's loss; without them it sees the distance
    to the network's own answers.

    Scope "auto" measures what the loss of units of one group does to the outputs (KL, batch norms on the trial's own
    statistics), and allocates: at spec.macs above 0 the least sum of these harms within that share of the
    multiplications, else at spec.sparsity above 0 within that share of units. Where both are 0 it also chooses the
    total: the fewest multiplications at which the KL of the whole, measured, is at most KL_BOUND nats, or
    spec.distance where that is given. The equal shares
    of scope "layer" are measured too and taken where their KL is lower.

    Structure "block" makes identities of residual blocks: see methods.prune_blocks.

    Raises ModelError for a network that cannot run or that holds nothing to remove, SpecError for a pattern that
    matches no layer, a field that has no meaning here or inputs that are missing, DataError for inputs that cannot be
    used, BudgetError where spec.macs is below what the floors allow.
    """
    if spec.structure == "block":
        _refuse_unused(spec)
        require_finite(module)
        shape = image_shape(example, "prune.structure='block'")
        images = calibration_images(inputs, shape, NUM_IMAGES, "prune.structure='block'")
        return plan_blocks(module, spec, example, images)
    found = found if found is not None else coupled_groups(module, example)
    units = chosen_units(module, spec, example, found, inputs=inputs, labels=labels, seed=seed)
    return plan_of_units(module, spec, found, units)


def chosen_units(
    module: nn.Module,
    spec: Prune,
    example: Any,
    found: Coupling,
    *,
    inputs: Iterable[FloatArray] | None = None,
    labels: Iterable[Any] | None = None,
    original: nn.Module | None = None,
    seed: int = 0,
) -> Units:
    """The units of each group of `found` that go; as `plan`.

    Where `found` is of a network that has lost units before, spec.sparsity, macs, floor and multiple_of are of the
    network before: what has gone counts. `original` is the network whose outputs the whole is to keep, by default
    `module`.
    """
    _refuse_unused(spec)
    require_finite(module)
    groups = candidates(module, spec, found)
    needs, images = UNIT_CRITERIA[spec.criterion].needs, None
    if needs or spec.scope == "auto":
        reader = "prune.scope='auto'" if spec.scope == "auto" else f"criterion {spec.criterion!r}"
        images = calibration_images(inputs, image_shape(example, reader), NUM_IMAGES, reader)
    statistics = None
    if needs and images is not None:
        given = first_labels(labels, len(images))
        statistics = unit_statistics(module, images, given, gradients=needs == "effects", seed=seed)
    ranked = Ranked(spec, groups, scores_of(module, groups, spec, statistics, seed))
    if spec.scope == "auto":
        assert images is not None
        trials = Trials(module, images)
        judging = trials if original is None else Trials(original, images)
        return _automatic(module, spec, found, ranked, trials, judging)
    return _within_macs(found, spec.macs, ranked) if spec.macs > 0 else ranked.at(spec.sparsity)


def apply(
    module: nn.Module,
    decided: Plan,
    *,
    inputs: Iterable[FloatArray] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A smaller copy of `module` as the plan says, which was made for this network or another instance of its class.

    Nothing is traced. Where the request says `reconstruct`, what is left is fitted to the layers' former outputs on the
    first NUM_RECONSTRUCTED images of `inputs`, batches (N, C, H, W) float32 (see methods.refit); for an instance
    of the smaller shape that stored weights are put into, take `graph.surgery.removed(module, decided.layers)`.
    Raises ModelError where the plan does not fit, SpecError where inputs are wanted and missing, DataError for inputs
    that cannot be used.
    """
    smaller = removed(module, decided.layers)
    request = decided.request
    assert isinstance(request, Prune)
    if not request.reconstruct:
        return smaller
    images = calibration_images(inputs, (0, 0, 0), NUM_RECONSTRUCTED, "prune.reconstruct")
    return reconstructed(module, smaller, decided.layers, images, seed=seed)[0]


def _refuse_unused(spec: Prune) -> None:
    """A field that would be ignored is an error."""
    if spec.structure not in REMOVED:
        raise SpecError(
            f"structure {spec.structure!r} leaves zeros; expected one that is removed: {', '.join(REMOVED)}"
        )
    if spec.distance and spec.macs:
        raise SpecError(
            f"prune.distance={spec.distance:g} and prune.macs={spec.macs:g} each choose the total; give one"
        )
    if spec.schedule != "one_shot":
        raise SpecError(
            f"prune.schedule={spec.schedule!r} needs a recovery between its rounds, and a plan is one shot: take "
            "methods.schedules.remove_gradually, a recipe or the command"
        )


def require_finite(module: nn.Module) -> None:
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


def candidates(module: nn.Module, spec: Prune, found: Coupling) -> list[Group]:
    """The groups that may lose units."""
    skipped, tensors = _skipped(module, spec), dict(module.named_parameters())
    groups = []
    for group in found.groups:
        made = [m.name for m in group.members if m.role == "output"]
        dims = {tensors[name].ndim > 2 for name in made if name in tensors}
        wanted = {"channel": True, "filter": dims == {True}, "neuron": dims == {False}}
        owners = {name.rpartition(".")[0] for name in made}
        owners |= {f"{owner}.out_proj" for owner in owners}  # the layer that an attention goes by
        if wanted[spec.structure] and not owners & skipped:
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


def scores_of(
    module: nn.Module,
    groups: Sequence[Group],
    spec: Prune,
    statistics: UnitStatistics | None,
    seed: int,
) -> dict[str, FloatArray64]:
    """Saliency of each unit by group, float64; of mean 1 unless the criterion's values compare between groups."""
    criterion = UNIT_CRITERIA[spec.criterion]
    scores = {}
    for group in groups:
        values = _values(module, group, statistics)
        if criterion.needs == "effects" and values.effects is None:
            raise ModelError(
                f"criterion {spec.criterion!r}: no layer was seen to make or read the units of {group.name!r}; exclude "
                "it or take a criterion of weights"
            )
        saliency = criterion(values, seed).double().numpy()
        scores[group.name] = (
            saliency if criterion.comparable else saliency / max(saliency.mean(), 1e-300)
        )
    return scores


def _values(
    module: nn.Module, group: Group, statistics: UnitStatistics | None = None
) -> UnitValues:
    tensors = dict(module.named_parameters())
    outputs, inputs, scales, norms = [], [], [], []
    for member in group.members:
        if member.name not in tensors:
            continue
        owner, _, own = member.name.rpartition(".")
        tensor = tensors[member.name].detach().float()
        columns = tensor.movedim(member.axis, 0)[torch.from_numpy(member.index)]
        if isinstance(module.get_submodule(owner), _NormBase) and own == "weight":
            scales.append(columns.flatten(1))
        elif tensor.ndim > 1 and member.role == "output":
            outputs.append(columns.flatten(1))
        elif tensor.ndim > 1 and member.role == "input":
            inputs.append(columns.flatten(2))
            if statistics is not None:
                norms.append(norms_of(statistics, member.name, member.index))
    effects = statistics.effects(group) if statistics is not None else None
    return UnitValues(group.num_units, outputs, inputs, scales, norms, effects)


class Ranked:
    """Units of every group from the lowest saliency up, within what the request leaves of each."""

    def __init__(
        self, spec: Prune, groups: Sequence[Group], scores: Mapping[str, FloatArray64]
    ) -> None:
        self.spec, self.groups, self.scores = spec, groups, scores
        self.ranks = {g.name: np.argsort(scores[g.name], kind="stable") for g in groups}
        self.pooled = np.sort(np.concatenate([scores[g.name] for g in groups]), kind="stable")

    def lowest(self, group: Group, wanted: int) -> Nodes:
        """At most `wanted` units, rising: fewer where the floor or the multiple demands it."""
        least = max(1, int(np.ceil(self.spec.floor * (group.num_units + group.num_gone))))
        kept = max(self._rounded(group, least), self._rounded(group, group.num_units - wanted))
        return np.sort(self.ranks[group.name][: group.num_units - kept])

    def at(self, share: float) -> Units:
        """That share of all units: of each layer, or with scope "global" the lowest of all. What has gone before
        counts."""
        before = sum(group.num_gone for group in self.groups)
        count = max(round(share * (len(self.pooled) + before)) - before, 0)
        threshold = self.pooled[count - 1] if count else -1.0
        gone = {}
        for group in self.groups:
            wanted = round(share * (group.num_units + group.num_gone)) - group.num_gone
            if self.spec.scope == "global":
                wanted = int((self.scores[group.name] <= threshold).sum())
            gone[group.name] = self.lowest(group, max(wanted, 0))
        return gone

    def _rounded(self, group: Group, kept: int) -> int:
        """`kept` units, or as many more as make the layer's channels a multiple."""
        width = next(m for m in group.members if m.role == "output").index.shape[1]
        while kept < group.num_units and (kept * width) % self.spec.multiple_of:
            kept += 1
        return kept


def _within_macs(found: Coupling, macs: float, ranked: Ranked) -> Units:
    """The smallest share of units whose removal leaves at most the share `macs` of the multiplications."""
    _require_reachable(found, macs, ranked)
    limit = macs * found.whole_macs
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if found.macs(ranked.at(middle)) <= limit else (middle, high)
    return ranked.at(high)


def require_reachable(module: nn.Module, spec: Prune, found: Coupling) -> None:
    """Raise BudgetError where spec.macs is below what the floors allow, whatever is chosen."""
    if spec.macs > 0:
        groups = candidates(module, spec, found)
        none = {group.name: np.zeros(group.num_units) for group in groups}
        _require_reachable(found, spec.macs, Ranked(spec, groups, none))


def _require_reachable(found: Coupling, macs: float, ranked: Ranked) -> None:
    whole, least = found.whole_macs, found.macs(ranked.at(1.0))
    if least > macs * whole:
        raise BudgetError(
            f"macs={macs:g} cannot be met: with all removed that may go, {least / whole:.4f} of the "
            "multiplications stay; raise macs, lower floor, or exclude fewer layers"
        )


def _automatic(
    module: nn.Module,
    spec: Prune,
    found: Coupling,
    ranked: Ranked,
    trials: Trials,
    judging: Trials,
) -> Units:
    """Scope "auto": see `plan`. `trials` compare with this network, for the groups; `judging` with the first one."""
    harms = group_harms(module, ranked.groups, found, ranked.lowest, trials)

    def measured(units: Units) -> float:
        return judging.harm_(removed(module, lines_of(module, found.kept(units))))

    def by_macs(macs: float) -> Units:
        equal = _within_macs(found, macs, ranked)
        limit = macs * found.whole_macs
        chosen = allocated(ranked.groups, harms, ranked.lowest, found.macs, limit, equal)
        return min(chosen, equal, key=measured)

    if spec.macs > 0:
        return by_macs(spec.macs)
    if spec.sparsity > 0 and not spec.distance:
        equal = ranked.at(spec.sparsity)

        def left(units: Mapping[str, Nodes]) -> int:
            return sum(g.num_units - len(units[g.name]) for g in ranked.groups)

        chosen = allocated(ranked.groups, harms, ranked.lowest, left, left(equal), equal)
        return min(chosen, equal, key=measured)
    least = found.macs(ranked.at(1.0)) / found.whole_macs
    return within_bound(by_macs, measured, spec.distance or KL_BOUND, least)


def plan_of_units(module: nn.Module, spec: Prune, found: Coupling, units: Units) -> Plan:
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
