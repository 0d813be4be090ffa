"""Several steps in one go: remove, factorize, share, prune, train, quantize or squeeze, in the order of a recipe."""

from __future__ import annotations

import copy
import dataclasses as dc
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from torch import nn

from tersor.data.arrays import Splits
from tersor.errors import SpecError
from tersor.graph.constants import Array
from tersor.methods.checkpoint import read_state_, remove_checkpoints, state_bytes, write_state
from tersor.methods.dropout import fitted_dropout
from tersor.methods.finetune import Progress, finetune
from tersor.methods.restore import restructured, unheld
from tersor.methods.squeezing import squeeze
from tersor.pipeline import (
    Compressed,
    deployment_graph,
    factorize_model,
    prune_model,
    quantize_network,
    share_model,
)
from tersor.runs import Run
from tersor.runs.directory import CHECKPOINT
from tersor.specs import (
    Factorize,
    Finetune,
    Plan,
    Prune,
    Quantize,
    Recipe,
    Share,
    Spec,
    Squeeze,
    from_dict,
)
from tersor.specs.prune import MASKED

STATE = "state.pt"
Make = Callable[[pathlib.Path | None], tuple[nn.Module, Plan | None]]
STEPS = (Prune, Factorize, Share, Finetune, Quantize, Squeeze)


@dc.dataclass(frozen=True, eq=False)
class Made:
    """What a recipe made: the deployment graph, the network behind it (before it was quantized), the
    plan of its last step, which holds those before (None for a recipe that trains alone), and what
    the graph does not hold of the network, by name."""

    graph: onnx.ModelProto
    module: nn.Module
    plan: Plan | None
    state: dict[str, Array]


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a JSON file. Raises SpecError for a file that holds anything else."""
    place = pathlib.Path(path)
    try:
        data = json.loads(place.read_text())
    except (OSError, ValueError) as error:
        raise SpecError(f"{place} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise SpecError(f'{place} must hold one object with "kind": "recipe" and "steps"')
    recipe = from_dict({"kind": "recipe", **data})
    if not isinstance(recipe, Recipe):
        raise SpecError(f"{place} holds a {recipe.kind}; expected a recipe")
    return recipe


def run_recipe(
    module: nn.Module,
    splits: Splits,
    recipe: Recipe,
    *,
    run: Run | None = None,
    on_progress: Callable[[str, Progress], None] | None = None,
) -> Made:
    """Apply the steps of `recipe` to a copy of `module`, in their order.

    Batch norm is re-estimated from calibration inputs after each step that changes weights; weights
    that were set to zero stay zero in later trainings; a training that distils learns from `module`
    as it was given. A training that follows a pruning of several rounds is done after each of them.
    What each step made is kept in `run`, where one is given: after a kill the same call goes on from
    there, within a training from its checkpoint. Raises SpecError for an order that cannot be, before
    any work.
    """
    _check_order(recipe.steps)
    plans: list[Plan] = []
    current: nn.Module = module
    masks: dict[str, torch.Tensor] = {}
    for number, step in enumerate(recipe.steps):
        named = f"step {number + 1}, {step.kind}"

        def told(progress: Progress, named: str = named) -> None:
            if on_progress:
                on_progress(named, progress)

        if number and _between(recipe.steps, number - 1) is step:
            continue  # done, after each round
        between = _between(recipe.steps, number)
        if isinstance(step, Quantize):
            place = None if run is None else _checkpoint(run, named, step)
            quantized = quantize_network(current, splits, step, checkpoint=place, on_progress=told)
            state = unheld(quantized.module or current, quantized.graph)
            return Made(quantized.graph, current, quantized.plan.after(tuple(plans)), state)
        if isinstance(step, Squeeze):
            small = squeeze(
                current,
                splits,
                step,
                earlier=tuple(plans),
                masks=masks,
                checkpoint=None if run is None else _checkpoint(run, named, step),
                on_progress=told,
            )
            return Made(small.graph, current, small.plan, unheld(small.module, small.graph))

        def make(
            checkpoint: pathlib.Path | None,
            step: Spec = step,
            current: nn.Module = current,
            masks: dict[str, torch.Tensor] = masks,
            between: Finetune | None = between,
            told: Callable[[Progress], None] = told,
        ) -> tuple[nn.Module, Plan | None]:
            if between is not None:
                changed = _in_rounds(
                    current, splits, step, between, recipe, module, checkpoint, told
                )
                return changed.module, changed.plan
            if not isinstance(step, Finetune):
                changed = _changed(current, splits, step, recipe)
                return changed.module, changed.plan
            example = torch.zeros(1, *splits.input_shape)
            trained = finetune(
                fitted_dropout(current, module, example),
                splits,
                step,
                masks=masks or None,
                teacher=module if step.needs_teacher else None,
                checkpoint=checkpoint,
                on_progress=told,
            )
            return trained.module, None

        asked = [step] if between is None else [step, between]
        current, plan = make(None) if run is None else _kept(run, named, asked, make, current)
        if plan is not None:
            plans.append(plan)
            masks = masks | _zeros(current, plan)
    graph = deployment_graph(current, splits.input_shape)
    plan = plans[-1].after(tuple(plans[:-1])) if plans else None
    return Made(graph, current, plan, unheld(current, graph))


def _between(steps: Sequence[Spec], number: int) -> Finetune | None:
    """The training after each round of step `number`: the step that follows a pruning of several."""
    step, following = steps[number], steps[number + 1 : number + 2]
    if isinstance(step, Prune) and step.rounds > 1 and following:
        return following[0] if isinstance(following[0], Finetune) else None
    return None


def _kept(
    run: Run, named: str, steps: list[Spec], make: Make, before: nn.Module
) -> tuple[nn.Module, Plan | None]:
    """What `make` makes of the network `before`, or made of it in an earlier call."""
    made: list[tuple[nn.Module, Plan | None]] = []
    request = {"step": steps[0].to_dict(), "between": [s.to_dict() for s in steps[1:]]}

    def keep(place: pathlib.Path) -> dict[str, Any] | None:
        made.append(make(place / CHECKPOINT))
        network, plan = made[0]
        write_state(place / STATE, state_bytes(network))
        remove_checkpoints(place)
        return None if plan is None else plan.to_dict()

    together = isinstance(steps[-1], Finetune)
    told = run.step(_named(named), request, keep, together=together)
    if made:
        return made[0]
    plan = None if told is None else from_dict(told)
    network = copy.deepcopy(before)
    if isinstance(plan, Plan):
        network = restructured(network, plan)
    read_state_(run.place(_named(named), request) / STATE, network)
    return network.eval(), plan if isinstance(plan, Plan) else None


def _checkpoint(run: Run, named: str, step: Spec) -> pathlib.Path:
    return run.checkpoint(_named(named), {"step": step.to_dict()})


def _named(step: str) -> str:
    return step.replace(", ", "_").replace(" ", "")


def _in_rounds(
    module: nn.Module,
    splits: Splits,
    step: Spec,
    between: Finetune,
    recipe: Recipe,
    teacher: nn.Module,
    checkpoint: pathlib.Path | None,
    on_progress: Callable[[Progress], None],
) -> Compressed:
    """A pruning of several rounds, with a training after each."""
    assert isinstance(step, Prune), "what has rounds"
    return prune_model(
        module,
        splits,
        step,
        augment=recipe.augment,
        recovery=between,
        teacher=teacher,
        checkpoint=checkpoint,
        on_progress=on_progress,
        seed=recipe.seed,
    )


def _changed(module: nn.Module, splits: Splits, step: Spec, recipe: Recipe) -> Compressed:
    seed, augment = recipe.seed, recipe.augment
    if isinstance(step, Prune):
        return prune_model(module, splits, step, augment=augment, seed=seed)
    if isinstance(step, Factorize):
        return factorize_model(module, splits, step, augment=augment)
    assert isinstance(step, Share), "the order was checked"
    return share_model(module, splits, step, augment=augment, seed=seed)


def _zeros(module: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """Masks (True = keep) of the weights that a plan pruned."""
    names = [f"{line.layer}.weight" for line in plan.layers if line.action == "prune"]
    return {name: module.get_parameter(name).detach() != 0 for name in names}


def _check_order(steps: Sequence[Any]) -> None:
    if not steps:
        raise SpecError("the recipe holds no steps; give one at least")
    zeros = ""
    for number, step in enumerate(steps, 1):
        if not isinstance(step, STEPS):
            kinds = ", ".join(kind.kind for kind in STEPS)
            raise SpecError(f"step {number} is a {step.kind}; a recipe's steps are {kinds}")
        if isinstance(step, Quantize | Squeeze) and number < len(steps):
            raise SpecError(
                f"step {number} ({step.kind}) chooses codes, and step {number + 1} "
                f"({steps[number].kind}) follows: {step.kind} last"
            )
        moves = isinstance(step, Factorize | Share) or (
            isinstance(step, Prune) and step.structure not in MASKED
        )
        if zeros and moves:
            raise SpecError(
                f"step {number} ({step.kind}) makes other weights of those that {zeros} set to zero: "
                "put it before"
            )
        if zeros and isinstance(step, Quantize) and step.mode == "qat":
            raise SpecError(
                f"step {number}: mode qat trains all weights, also those that {zeros} set to zero; "
                "use mode static, or prune a structure that is removed"
            )
        if zeros and isinstance(step, Squeeze) and step.epochs:
            raise SpecError(
                f"step {number}: squeeze with epochs trains all weights, also those that {zeros} set to zero; "
                "squeeze without training, or prune a structure that is removed"
            )
        if isinstance(step, Prune) and step.structure in MASKED:
            zeros = f"step {number}"
