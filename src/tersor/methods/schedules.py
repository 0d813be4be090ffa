"""Pruning in rounds, with a recovery after each: one shot, iterative, gradual."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping

import torch
from torch import nn

from tersor.errors import BudgetError, ModelError
from tersor.methods.prune import NOTHING, Evidence, Masks, Pruned, prune
from tersor.specs import Prune

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


def _steps(spec: Prune) -> list[Prune]:
    """The request of each round."""
    numbers = range(1, spec.rounds + 1)
    if spec.distance:
        return [dc.replace(spec, distance=_share(spec, spec.distance, n)) for n in numbers]
    if spec.structure != "n_m":
        return [dc.replace(spec, sparsity=share) for share in shares(spec)]
    kept, of = spec.kept_of
    densities = [of - round(_share(spec, 1 - kept / of, n) * of) for n in numbers]
    return [dc.replace(spec, pattern=f"{n}:{of}") for n in densities if n < of]


def _share(spec: Prune, total: float, number: int) -> float:
    """What of `total` has gone after round `number`."""
    done = number / spec.rounds
    if done == 1 or spec.schedule == "one_shot":
        return total
    if spec.schedule == "gradual":
        return total * (1 - (1 - done) ** 3)
    if spec.distance:
        return total * done
    return float(1 - (1 - total) ** done)


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
