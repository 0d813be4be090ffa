"""Pruning in rounds, with a recovery after each: one shot, iterative, gradual."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tersor.errors import BudgetError, ModelError, SpecError
from tersor.graph.coupling import coupled_groups
from tersor.graph.groups import Coupling
from tersor.methods import prune_structured as structured
from tersor.methods.prune import NOTHING, Evidence, Masks, Pruned, prune
from tersor.methods.prune_auto import KL_BOUND
from tersor.specs import Plan, Prune
from tersor.specs.prune import REMOVED

Recover = Callable[[nn.Module, Mapping[str, torch.Tensor], int], nn.Module]


def shares(spec: Prune) -> list[float]:
    """The sparsity after each round, rising to spec.sparsity.

    one_shot: at once. iterative: every round removes the same share of what is left (Han 2015; Renda
    2020 removes a fifth), density^(r / rounds) stays. gradual: cubic, s (1 - (1 - r / rounds)^3)
    (Zhu and Gupta 2017, eq. 1, from 0), fast while there is much to spare.
    """
    return [_share(spec, spec.sparsity, number) for number in range(1, spec.rounds + 1)]


def prune_gradually(
    module: nn.Module,
    spec: Prune,
    *,
    recover: Recover,
    seed: int = 0,
    evidence: Evidence = NOTHING,
    masks: Masks | None = None,
    on_round: Callable[[int, Pruned], None] | None = None,
) -> Pruned:
    """Plan and apply in spec.rounds rounds, and `recover` after each; masks only grow.

    recover(module, masks, number) gets the pruned network, the masks by parameter name (True = keep) and
    the number of the round, from 1, and returns the network trained on, whose pruned weights are still
    zero: for instance `lambda m, masks, n: finetune(m, splits, recipe, masks=masks).module`. With a recipe
    whose learning rate follows the last epochs of the original training this is learning-rate rewinding
    (Renda 2020, algorithm 2). `on_round` sees each round before its recovery.

    Of n_m the pattern falls from M:M to N:M; with spec.distance each round may go as far as its share of it,
    and the rounds end where no more weights can go within it. The original whose outputs are kept is
    evidence.original or `module`. Raises what `prune` does, and ModelError where a recovery brings pruned
    weights back.
    """
    held = dc.replace(evidence, original=evidence.original or module)
    kept = dict(masks or {})
    last: Pruned | None = None
    for number, step in enumerate(_steps(spec), 1):
        try:
            pruned = prune(module, step, seed=seed, evidence=held, masks=kept)
        except BudgetError:
            if last is None or not spec.distance:
                raise
            break
        kept |= pruned.masks
        if on_round:
            on_round(number, pruned)
        module = recover(pruned.module, kept, number)
        _check_kept(module, kept, number)
        last = dc.replace(pruned, module=module, masks=dict(kept))
    assert last is not None, "a request has one round at least"
    return dc.replace(last, plan=dc.replace(last.plan, request=spec))


@dc.dataclass(frozen=True, eq=False)
class Smaller:
    """The network that rounds of removal left, recovered, and the plan of all of them together, for the first one."""

    module: nn.Module
    plan: Plan


def remove_gradually(
    module: nn.Module,
    spec: Prune,
    example: Any,
    *,
    recover: Recover,
    inputs: Sequence[npt.NDArray[np.float32]] | None = None,
    labels: Sequence[Any] | None = None,
    found: Coupling | None = None,
    seed: int = 0,
    on_round: Callable[[int, nn.Module], None] | None = None,
) -> Smaller:
    """Remove channels, filters or neurons in spec.rounds rounds, and `recover` after each.

    `example`, `inputs`, `labels` and `found` as for methods.prune_structured.plan; inputs are gone through in every
    round. spec.macs, sparsity, distance and floor are of the whole: what is removed after a round follows the formula
    of `shares`, and the last round ends where one shot would. Criteria look at the network as it is then, recovered;
    a distance is that from `module`. Its channels are coupled once, at the start: what goes together does not change
    by training. recover(module, {}, number) is that of `prune_gradually`, without masks: it returns the network it was
    given, trained on. Raises what the plan of one shot does, BudgetError before any work, and ModelError where a
    recovery returns another network.
    """
    if spec.structure == "block":
        raise SpecError(
            f"prune.schedule={spec.schedule!r} is for channels, filters, neurons and masks; whole blocks go in one "
            "shot, each by its measured harm"
        )
    found = found if found is not None else coupled_groups(module, example)
    structured.require_reachable(module, spec, found)
    staying = {group.name: np.arange(group.num_units) for group in found.groups}
    gone: dict[str, npt.NDArray[np.int64]] = {}
    current = module
    for number, step in enumerate(_steps(spec), 1):
        left = found.without(gone)
        units = structured.chosen_units(
            current, step, example, left, inputs=inputs, labels=labels, original=module, seed=seed
        )
        decided = structured.plan_of_units(current, step, left, units)
        smaller = structured.apply(current, decided, inputs=inputs, seed=seed)
        for group in found.groups:
            staying[group.name] = np.delete(staying[group.name], units.get(group.name, ()))
            gone[group.name] = np.setdiff1d(np.arange(group.num_units), staying[group.name])
        if on_round:
            on_round(number, smaller)
        current = recover(smaller, {}, number)
        _check_same(smaller, current, number)
    return Smaller(current, structured.plan_of_units(module, spec, found, gone))


def _steps(spec: Prune) -> list[Prune]:
    """The request of each round, as one shot."""
    numbers = range(1, spec.rounds + 1)
    spec, rounds = dc.replace(spec, schedule="one_shot", rounds=1), spec
    if spec.macs:
        shares_left = [1 - _share(rounds, 1 - spec.macs, n) for n in numbers[:-1]]
        return [dc.replace(spec, macs=share) for share in (*shares_left, spec.macs)]
    without_total = spec.structure in REMOVED and spec.scope == "auto" and not spec.sparsity
    if distance := spec.distance or without_total * KL_BOUND:
        parts = [_share(rounds, distance, n, of_parts=False) for n in numbers]
        return [dc.replace(spec, distance=part) for part in parts]
    if spec.structure != "n_m":
        return [dc.replace(spec, sparsity=share) for share in shares(rounds)]
    kept, of = spec.kept_of
    densities = [of - round(_share(rounds, 1 - kept / of, n) * of) for n in numbers]
    return [dc.replace(spec, pattern=f"{n}:{of}") for n in densities if n < of]


def _share(spec: Prune, total: float, number: int, *, of_parts: bool = True) -> float:
    """What of `total` has gone after round `number`; a distance is no share `of_parts`."""
    done = number / spec.rounds
    if done == 1 or spec.schedule == "one_shot":
        return total
    if spec.schedule == "gradual":
        return total * (1 - (1 - done) ** 3)
    if not of_parts:
        return total * done
    return float(1 - (1 - total) ** done)


def _check_same(given: nn.Module, module: nn.Module, number: int) -> None:
    parameters = dict(module.named_parameters())
    for name, parameter in given.named_parameters():
        if name not in parameters or parameters[name].shape != parameter.shape:
            raise ModelError(
                f"the recovery of round {number} gave a network without the parameter {name!r} of shape "
                f"{tuple(parameter.shape)}; it must return the network it was given, trained on"
            )


def _check_kept(module: nn.Module, masks: Masks, number: int) -> None:
    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ModelError(
                f"the recovery of round {number} gave a network without the parameter {name!r} of shape "
                f"{tuple(mask.shape)}; it must return the network it was given, trained on"
            )
        if (back := int((parameters[name].detach()[~mask] != 0).sum())) > 0:
            raise ModelError(
                f"the recovery of round {number} brought {back} pruned weights of {name!r} back; keep "
                "them at zero (finetune(..., masks=masks))"
            )
