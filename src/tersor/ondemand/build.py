"""From a choice of the search to a network: remove, fit, train; here or where workers are."""

from __future__ import annotations

import copy
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.bench.drop import Drop
from tersor.methods import prune_structured as structured
from tersor.methods.checkpoint import read_state_, remove_checkpoints, state_bytes, write_state
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.methods.restore import restructured
from tersor.ondemand.effort import Clock, Watch
from tersor.ondemand.kept import Kept
from tersor.ondemand.learn import STATE, learned
from tersor.ondemand.network import Network, Wanted, batches_of, judged
from tersor.ondemand.original import Original
from tersor.pipeline import deployment_graph
from tersor.runs.directory import CHECKPOINT
from tersor.runs.executors import Executor

NETWORK = "network"


def network(original: Original, wanted: Wanted, kept: Kept, watch: Watch) -> Network:
    """The network without what the plan removes, what is left fitted to the original's outputs, batch norms
    re-estimated, and where there is time for it trained: to answer as the original does, or where `wanted.labelled`
    as the labels say. A training goes on from its checkpoint."""
    made: list[Network] = []

    def make(place: pathlib.Path) -> dict[str, Any]:
        made.append(_network(original, wanted, place / CHECKPOINT, kept, watch))
        write_state(place / STATE, state_bytes(made[0].module))
        remove_checkpoints(place)
        return told_of(made[0])

    told, place = kept.piece(NETWORK, wanted.request, make)
    if made:
        return made[0]
    module = copy.deepcopy(original.module)
    if wanted.plan is not None:
        module = restructured(module, wanted.plan)
    read_state_(place / STATE, module)
    graph = original.graph
    if wanted.plan is not None:
        graph = deployment_graph(module, original.input_shape)
    harm, drop = told["harm_kl"], drop_told(told)
    return Network(wanted.share, module.eval(), graph, wanted.plan, harm, told["epochs"], drop)


def drop_told(told: Mapping[str, Any]) -> Drop | None:
    """What a network was told to have lost that learnt from labels."""
    return None if told["drop"] is None else Drop.from_dict(told["drop"])


def networks_elsewhere(
    original: Original, wanted: Sequence[Wanted], kept: Kept, workers: Executor, watch: Watch
) -> tuple[dict[float, dict[str, Any]], list[str]]:
    """Make those that are not kept already where `workers` are, all at once, for `network` to find: what is told of
    each (harm_kl, epochs, drop) by its share, and in words what became of the others."""
    missing = {f"network {w.share:g}": w for w in wanted if not kept.held(NETWORK, w.request)}
    problems = []
    for outcome in workers.run(_elsewhere, original, missing, watch=watch, check=kept.check):
        if outcome.error is not None:
            problems.append(f"{outcome.name} was not made: {outcome.error}")
            continue
        told, state = outcome.value

        def keep(place: pathlib.Path, told: Any = told, state: bytes = state) -> Any:
            write_state(place / STATE, state)
            return told

        kept.piece(NETWORK, missing[outcome.name].request, keep)
    found = {}
    for each in wanted:
        if kept.held(NETWORK, each.request):
            found[each.share] = kept.piece(NETWORK, each.request, _told_before)[0]
    return found, problems


def _elsewhere(original: Original, wanted: Wanted, watch: Watch) -> tuple[dict[str, Any], bytes]:
    """A worker's part: what is told of the network, and its state."""
    with tempfile.TemporaryDirectory() as name:
        place = pathlib.Path(name)
        kept = Kept(place, Clock(1.0))
        made = _network(original, wanted, place / CHECKPOINT, kept, watch)
    return told_of(made), state_bytes(made.module)


def told_of(made: Network) -> dict[str, Any]:
    """What of a network outlives it as JSON."""
    drop = None if made.drop is None else made.drop.to_dict()
    return {"harm_kl": made.harm_kl, "epochs": made.epochs, "drop": drop}


def _told_before(_: pathlib.Path) -> Any:
    raise AssertionError("a piece that is kept is not made")


def _network(
    original: Original, wanted: Wanted, checkpoint: pathlib.Path, kept: Kept, watch: Watch
) -> Network:
    share, plan, seed = wanted.share, wanted.plan, wanted.seed
    if plan is None:
        return Network(share, original.module, original.graph, None, 0.0)
    inputs = batches_of(original.inputs)
    watch(f"{share:.0%} of the channels' time: removing, fitting", 0.0)
    fitted = structured.apply(original.module, plan, inputs=inputs, seed=seed)
    fitted = reestimate_batch_norm(fitted, inputs, original=original.module)
    made = judged(original, wanted, fitted)
    if wanted.train_seconds <= 0:
        return made
    return learned(original, wanted, made, checkpoint, kept, watch)
