"""Whole residual branches go: which (`plan_blocks`), judged by what the network then answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from tersor.errors import BudgetError, ModelError, SpecError
from tersor.graph.branches import residual_blocks
from tersor.graph.coupling import label
from tersor.graph.layers import weight_layers
from tersor.graph.select import excluded_layers
from tersor.graph.surgery import removed
from tersor.methods.prune_auto import KL_BOUND
from tersor.methods.prune_trials import FloatArray, Trials
from tersor.specs import LayerPlan, Plan, Prune

TRIED_AGAIN = 8  # blocks that are measured anew after each that went: those of the least harm


def plan_blocks(module: nn.Module, spec: Prune, example: Any, images: FloatArray) -> Plan:
    """Decide which residual blocks become identities.

    One after the other goes: the block whose absence adds the least KL of the outputs on `images` (N, C, H, W), with
    spec.macs above 0 for the multiplications it saves. Harms are measured anew on the network without those that went,
    for the TRIED_AGAIN least of the last time. It ends at spec.macs of the multiplications of one run on `example`, or
    at the share spec.sparsity of all blocks, or, where both are 0, before the KL exceeds KL_BOUND nats. Raises
    ModelError for a network without residual blocks, BudgetError where all together do not reach spec.macs.
    """
    _refuse_meaningless(spec)
    layers = [name for name, _ in weight_layers(module)]
    skipped = excluded_layers(layers, spec.exclude)
    blocks = residual_blocks(module, example)
    free = [b for b in blocks if not any(n == b or n.startswith(f"{b}.") for n in skipped)]
    if not free:
        raise ModelError(
            f"{type(module).__name__} has no residual block that may go: no module that is a sum of its input and "
            "branches" + (", but for those excluded" if blocks else "")
        )

    def without(gone: Iterable[str]) -> nn.Module:
        return removed(module, [LayerPlan(block, "bypass") for block in gone])

    trials = Trials(module, images)
    saved = dict.fromkeys(free, 1)
    wanted = min(round(spec.sparsity * len(blocks)), len(free))
    if spec.macs > 0:
        whole = label(module, example).macs()
        saved = {b: whole - label(without([b]), example).macs() for b in free}
        wanted = math.ceil((1 - spec.macs) * whole)
        if (most := sum(saved.values())) < wanted:
            raise BudgetError(
                f"macs={spec.macs:g} cannot be met: without all {len(free)} blocks that may go, "
                f"{1 - most / whole:.4f} of the multiplications stay; raise macs, or remove channels too"
            )
    told = spec.macs > 0 or (spec.sparsity > 0 and not spec.distance)
    bound = float("inf") if told else spec.distance or KL_BOUND
    wanted = wanted if told else sum(saved.values())
    gone = _lowest(saved, lambda blocks: trials.harm_(without(blocks)), wanted, bound)
    lines = [LayerPlan(block, "bypass") for block in blocks if block in gone]
    inside = tuple(f"{block}." for block in gone)
    for name in layers:
        if not name.startswith(inside) and name not in gone:
            reason = "excluded by name" if name in skipped else "its block stays, or it is in none"
            lines.append(LayerPlan(name, "keep", reason=reason))
    return Plan(spec, tuple(lines))


def _lowest(
    saved: Mapping[str, int], harm: Callable[[list[str]], float], wanted: int, bound: float
) -> list[str]:
    """Blocks that together save `wanted` or more, or as many as stay within the `bound` on their harm."""
    gone: list[str] = []
    harms, now = dict.fromkeys(saved, 0.0), 0.0
    again = list(saved)
    while harms and sum(saved[block] for block in gone) < wanted:
        for block in again:
            harms[block] = harm([*gone, block])
        best = min(again, key=lambda b: ((harms[b] - now) / max(saved[b], 1), harms[b]))
        now = harms.pop(best)
        if now > bound:
            break
        gone.append(best)
        again = sorted(harms, key=lambda b: (harms[b] - now) / max(saved[b], 1))[:TRIED_AGAIN]
    return gone


def _refuse_meaningless(spec: Prune) -> None:
    """Fields that say how channels are chosen."""
    plain = Prune(structure="block")
    for name in ("criterion", "scope", "multiple_of", "floor", "reconstruct"):
        if getattr(spec, name) != getattr(plain, name):
            raise SpecError(
                f"prune.{name}={getattr(spec, name)!r} has no meaning for blocks, which go whole, by their measured "
                "harm; leave it out"
            )
