"""Depth: where channels alone do not reach a budget, whole residual blocks go before them."""

from __future__ import annotations

import dataclasses as dc
import pathlib

from tersor.engines import open_session
from tersor.engines.load import logits_of
from tersor.graph.branches import residual_blocks
from tersor.methods.restore import restructured
from tersor.ondemand.facts import facts
from tersor.ondemand.network import example_of
from tersor.ondemand.original import Original, macs_of
from tersor.ondemand.predict import LEARNT_MACS
from tersor.ondemand.probe import probed
from tersor.ondemand.search import Search
from tersor.pipeline import deployment_graph
from tersor.specs import LayerPlan, Plan, Prune

BY_CHANNELS = ("latency_ms", "macs", "energy_mj")
PROBE_SECONDS = 1.0  # of one network's timing; a block's time is a tenth of it and more
LEFT = 0.6  # of an effort's time, for the network that is then taught


def shallower(search: Search) -> Search:
    """`search` itself; or where no share of the channels reaches its bounds on time, multiplications or energy, or one
    reaches that on time with so few multiplications that it would lose much, one that starts from the network without
    residual blocks: as few as reach them, and more while the network that is then within them has more multiplications
    than before.

    The block goes without which the narrowest network is the fastest, by measurement (or has the fewest
    multiplications, where the budget is not of time). What such a network answers at first says nothing of what it
    can learn, so this is done only where labels are learnt from, and while most of the time is left for it.
    """
    if not search.labelled:
        return search
    macs, axis = search.reached()
    narrow = "latency_ms" in search.asked and macs < LEARNT_MACS * search.original.macs
    if axis not in BY_CHANNELS and not narrow:
        return search
    while search.clock.left > LEFT * search.clock.limit:
        gone = _one_more(search)
        if gone is None:
            break
        why = f"no share of the channels reached the bound on {axis}"
        if axis not in BY_CHANNELS:
            why = "the others have more multiplications so"
        deeper = _without(search, gone, why)
        found, passed = deeper.reached()
        if axis not in BY_CHANNELS and (passed in BY_CHANNELS or found <= macs):
            break
        search, macs, axis = deeper, found, passed
    return search


def _without(search: Search, gone: Plan, why: str) -> Search:
    """The search from the network without the blocks that `gone` removes; `why` the last of them went."""
    original = search.original.without(gone)
    names = [line.layer for line in gone.layers]
    kept = search.kept.of(without=names)
    search.watch(f"without {names[-1]}", 0.0)
    # What channels and bits harm is measured against what this network answers, taught or not.
    answers = logits_of(open_session(original.graph, threads=original.threads), original.held)
    own = dc.replace(original, logits=answers, labels=None)
    by_macs = search.known.by_macs
    known = facts(own, search.effort, kept, by_macs=by_macs, seed=search.seed, watch=search.watch)
    return search.from_(original, known, kept, f"without the block {names[-1]}: {why}")


def _one_more(search: Search) -> Plan | None:
    """The plan of all blocks that go, one more than now; None where no more can."""
    original, family = search.original, search.known.family
    example = example_of(original)
    blocks = residual_blocks(original.module, example)
    if not blocks or family is None:
        return None
    narrowest = family.plan(family.ranked.at(1.0))
    by_time = "latency_ms" in search.asked

    def costs(_: pathlib.Path) -> dict[str, float]:
        found = {}
        for number, block in enumerate(blocks):
            search.watch(f"what {block} takes", number / len(blocks))
            lines = (*narrowest.layers, LayerPlan(block, "bypass"))
            plan = dc.replace(narrowest, layers=lines)
            found[block] = _ms(search, plan) if by_time else _macs(original, plan)
        return found

    told, _ = search.kept.piece("blocks", {}, costs)
    before = () if original.gone is None else original.gone.layers
    lines = (*before, LayerPlan(min(blocks, key=told.__getitem__), "bypass"))
    plan = Plan(Prune(structure="block"), lines)
    left = _macs(original, dc.replace(plan, layers=lines[-1:])) / original.macs
    return dc.replace(plan, request=Prune(structure="block", macs=left))


def _ms(search: Search, plan: Plan) -> float:
    return probed(search.original, plan, search.engines(), seconds=PROBE_SECONDS)[0]


def _macs(original: Original, plan: Plan) -> float:
    return macs_of(deployment_graph(restructured(original.module, plan), original.input_shape))
