"""Pruning that leaves zeros: which weights go (`plan`), and a copy of the network without them (`apply`).

Structures: single weights, N of every M inputs, stripes. Criteria that need statistics, scope "auto" and
`reconstruct` read unlabelled inputs, batches (N, ...) float32 that can be gone through more than once.
"""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tersor.errors import ModelError, SpecError
from tersor.graph.layers import weight_layers
from tersor.graph.select import excluded_layers
from tersor.graph.weights import from_rows
from tersor.methods import choose
from tersor.methods.judging import logits_of
from tersor.methods.layer_statistics import layer_statistics
from tersor.methods.mask_auto import pruning_harms, removed_by_sensitivity
from tersor.methods.paired_moments import CHUNK, input_chunks
from tersor.methods.reconstruct import reconstruct
from tersor.methods.reestimate import augmentation_of, reestimate_batch_norm
from tersor.methods.sensitivity import output_distance
from tersor.specs import LayerPlan, Plan, Prune
from tersor.specs.prune import MASKED
from tersor.tensors.criteria import CRITERIA
from tersor.tensors.masks import removed_by_layer
from tersor.tensors.statistics import LayerStatistics

Masks = Mapping[str, torch.Tensor]
UNREACHED = "the inputs never reach it"
OF_INPUTS = frozenset({"input_sq_norm", "hessian"})


@dc.dataclass(frozen=True, eq=False)
class Evidence:
    """What a pruning may look at besides the weights.

    `inputs` are batches (N, ...) float32 without labels; `labels` (N,) int64 for each batch change what
    gradients are of: the task's loss instead of the distance to the original's outputs. `original` is
    the network whose outputs are to be kept, by default the one that is pruned. `augment` is for
    batch-norm re-estimation (see there).
    """

    inputs: Sequence[npt.NDArray[np.float32]] = ()
    labels: Sequence[npt.NDArray[np.int64]] | None = None
    original: nn.Module | None = None
    augment: str = "auto"


NOTHING = Evidence()


@dc.dataclass(frozen=True)
class Pruned:
    """A pruned copy, the mask of each weight (parameter name -> bool, True = keep), and the plan behind
    it. `errors` are those of `reconstruct`, by layer: the squared error of its outputs as a share of
    their variance."""

    module: nn.Module
    masks: dict[str, torch.Tensor]
    plan: Plan
    errors: dict[str, float] = dc.field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of zeros among all weights of the pruned layers."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / max(total, 1)


def plan(
    module: nn.Module,
    spec: Prune,
    *,
    seed: int = 0,
    evidence: Evidence = NOTHING,
    masks: Masks | None = None,
) -> Plan:
    """Decide the sparsity of every convolutional and linear layer.

    `masks` (parameter name -> bool) are what earlier prunings kept; it counts as removed and stays so.
    Raises ModelError for a network without such layers or with weights that are not finite, SpecError for
    a pattern in spec.exclude that matches no layer, or a request that needs inputs and gets none.
    """
    _refuse_removal(spec)
    layers = dict(weight_layers(module))
    if not layers:
        raise ModelError(
            f"{type(module).__name__} has no convolutional or linear layer, so nothing to prune"
        )
    kept = dict.fromkeys(excluded_layers(list(layers), spec.exclude), "excluded by name")
    rows = {name: choose.rows_of(name, layer) for name, layer in layers.items() if name not in kept}
    for name, weight in rows.items():
        if reason := choose.problem(spec, weight.shape):
            kept[name] = reason
    statistics = {}
    if spec.scope != "layer":
        statistics = _statistics(module, spec, seed, evidence)
        if CRITERIA[spec.criterion].needs:
            kept |= {name: UNREACHED for name in rows if name not in {*kept, *statistics}}
    before = {
        name: choose.mask_before(name, layers[name], masks) for name in rows if name not in kept
    }
    rows = {name: rows[name] for name in before}
    if spec.scope == "auto":
        need_inputs("prune.scope auto", evidence)
        removed = _by_sensitivity(module, spec, before, statistics, evidence, seed)
    elif spec.scope == "global":
        removed = _ranked(spec, rows, before, statistics, seed)
    else:
        removed = {name: _share(spec, weight.shape) for name, weight in rows.items()}
    gone = {name: mask.numel() - int(mask.sum()) for name, mask in before.items()}
    decisions = tuple(
        LayerPlan(name, "keep", reason=kept[name])
        if name in kept
        else LayerPlan(name, "prune", sparsity=max(removed[name], gone[name]) / rows[name].numel())
        for name in layers
    )
    return Plan(spec, decisions)


def apply(
    module: nn.Module,
    decided: Plan,
    *,
    seed: int = 0,
    evidence: Evidence = NOTHING,
    masks: Masks | None = None,
) -> Pruned:
    """Set the weights of lowest saliency to zero in a copy of `module`, as `decided` says layer by layer.

    With `reconstruct` in the request the weights that stay are fitted to the outputs of the original.
    Seed, evidence and masks as for `plan`. Raises ModelError where the plan names a layer that this module
    does not have, SpecError where the request needs inputs and gets none.
    """
    request = decided.request
    assert isinstance(request, Prune)
    _refuse_removal(request)
    layers = dict(weight_layers(module))
    choices: dict[str, choose.Choice] = {}
    for decision in decided.layers:
        if decision.action != "prune":
            continue
        if decision.layer not in layers:
            raise ModelError(
                f"the plan prunes layer {decision.layer!r}, which {type(module).__name__} does not have; "
                "the plan belongs to another network"
            )
        rows = choose.rows_of(decision.layer, layers[decision.layer])
        count = round(decision.sparsity * rows.numel())
        choices[decision.layer] = choose.Choice(request, count, seed)
    statistics = _statistics(module, request, seed, evidence, walking=request.reconstruct)
    before = {name: choose.mask_before(name, layers[name], masks) for name in choices}
    if request.reconstruct and choices:
        need_inputs("prune.reconstruct", evidence)
        found = reconstruct(
            evidence.original or module,
            module,
            choices,
            evidence.inputs,
            before=before,
            statistics=statistics,
            augment=evidence.augment,
            seed=seed,
        )
        kept = {f"{name}.weight": mask for name, mask in found.masks.items()}
        return Pruned(found.module, kept, decided, found.errors)
    pruned = copy.deepcopy(module)
    kept = {}
    for name, layer in weight_layers(pruned):
        if name in choices:
            kept[f"{name}.weight"] = choose.mask_layer_(
                name, layer, choices[name], before[name], statistics.get(name, choose.NOTHING)
            )
    return Pruned(pruned, kept, decided)


def prune(
    module: nn.Module,
    spec: Prune,
    *,
    seed: int = 0,
    evidence: Evidence = NOTHING,
    masks: Masks | None = None,
) -> Pruned:
    """`plan`, then `apply`."""
    decided = plan(module, spec, seed=seed, evidence=evidence, masks=masks)
    return apply(module, decided, seed=seed, evidence=evidence, masks=masks)


def need_inputs(asking: str, evidence: Evidence) -> None:
    """Raise SpecError where there are no inputs for what `asking` names."""
    if not len(evidence.inputs):
        raise SpecError(
            f"{asking} needs unlabelled inputs, and none were given; give evidence.inputs"
        )


def _refuse_removal(spec: Prune) -> None:
    if spec.structure not in MASKED:
        raise SpecError(
            f"prune.structure {spec.structure} removes parts of the network; this method leaves zeros: "
            f"{', '.join(MASKED)}"
        )


def _statistics(
    module: nn.Module, spec: Prune, seed: int, evidence: Evidence, *, walking: bool = False
) -> dict[str, LayerStatistics]:
    """What the criterion needs of each layer; `walking`: without what a reconstruction finds itself."""
    needs = CRITERIA[spec.criterion].needs - (OF_INPUTS if walking else frozenset())
    if not needs:
        return {}
    need_inputs(f"prune.criterion {spec.criterion}", evidence)
    skipped = excluded_layers([name for name, _ in weight_layers(module)], spec.exclude)
    return layer_statistics(
        module,
        needs,
        evidence.inputs,
        labels=evidence.labels,
        original=evidence.original,
        layers=[name for name, _ in weight_layers(module) if name not in skipped],
        seed=seed,
    )


def _share(spec: Prune, shape: torch.Size) -> int:
    """How many weights a layer loses by itself."""
    if spec.structure == "n_m":
        return choose.removable(spec, shape)
    most = shape.numel() - max(1, int(np.ceil(spec.floor * shape.numel())))
    return choose.whole_pieces(spec, shape, min(choose.removable(spec, shape), most))


def _ranked(
    spec: Prune,
    rows: Mapping[str, torch.Tensor],
    before: Masks,
    statistics: Mapping[str, LayerStatistics],
    seed: int,
) -> dict[str, int]:
    """How many weights each layer loses when all are ranked together."""
    if not rows:
        return {}
    ranks = [
        choose.ranking(spec, weight, before[name], statistics.get(name, choose.NOTHING), seed)
        for name, weight in rows.items()
    ]
    removed = removed_by_layer(ranks, spec.sparsity, spec.floor)
    return {
        name: choose.whole_pieces(spec, weight.shape, count)
        for (name, weight), count in zip(rows.items(), removed, strict=True)
    }


def _by_sensitivity(
    module: nn.Module,
    spec: Prune,
    before: Masks,
    statistics: Mapping[str, LayerStatistics],
    evidence: Evidence,
    seed: int,
) -> dict[str, int]:
    """How many weights each layer loses by its measured harm. For a distance the last quarter of the inputs
    judges and the others fit."""
    if not before:
        return {}
    whole = torch.cat(input_chunks(evidence.inputs))
    held_out = len(whole) // 4 if spec.distance else 0
    fitting, judging = whole[: len(whole) - held_out], whole[len(whole) - held_out :]
    inputs = [part.numpy() for part in torch.split(fitting, CHUNK)]
    harms = pruning_harms(module, spec, before, statistics, inputs, seed=seed)
    original = evidence.original or module
    augment = evidence.augment
    if augment == "auto" and spec.distance:
        augment = augmentation_of(original, inputs, seed=seed)
    masks = {
        f"{name}.weight": from_rows(module.get_submodule(name), m) for name, m in before.items()
    }

    def distance_at(removed: Mapping[str, int]) -> float:
        decided = tuple(
            LayerPlan(name, "prune", sparsity=count / before[name].numel())
            for name, count in removed.items()
        )
        seen = dc.replace(evidence, inputs=inputs, original=original, augment=augment)
        pruned = apply(module, Plan(spec, decided), seed=seed, evidence=seen, masks=masks)
        renewed = reestimate_batch_norm(pruned.module, inputs, augment=augment, seed=seed)
        kept, changed = (logits_of(m.eval(), judging) for m in (copy.deepcopy(original), renewed))
        return output_distance(kept, changed)[0]

    removed = removed_by_sensitivity(spec, harms, distance_at)
    return {
        name: choose.whole_pieces(spec, before[name].shape, count)
        for name, count in removed.items()
    }
