"""Several steps in one go: remove, factorize, share, prune, train, quantize, in the order of a recipe."""

from __future__ import annotations

import copy
import dataclasses as dc
import io
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from torch import nn

from tersor.artifact.storage import write_whole
from tersor.data.arrays import Splits
from tersor.errors import SpecError
from tersor.methods.finetune import Progress, finetune
from tersor.methods.restore import restructured
from tersor.pipeline import (
    Compressed,
    deployment_graph,
    factorize_model,
    prune_model,
    quantize_network,
    share_model,
)
from tersor.runs import Run
from tersor.specs import Factorize, Finetune, Plan, Prune, Quantize, Recipe, Share, Spec, from_dict
from tersor.specs.prune import MASKED

STATE, CHECKPOINT = "state.pt", "checkpoint"
Make = Callable[[pathlib.Path | None], tuple[nn.Module, Plan | None]]
STEPS = (Prune, Factorize, Share, Finetune, Quantize)


@dc.dataclass(frozen=True, eq=False)
class Made:
    """What a recipe made: the deployment graph, the network behind it (before it was quantized), and
    the plan of its last step, which holds those before; None for a recipe that trains alone."""

    graph: onnx.ModelProto
    module: nn.Module
    plan: Plan | None


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
    as it was given. What each step made is kept in `run`, where one is given: after a kill the same call goes on
    from there, within a training from its checkpoint. Raises SpecError for an order that cannot be, before any
    work.
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

        if isinstance(step, Quantize):
            place = None if run is None else _checkpoint(run, named, step)
            quantized = quantize_network(current, splits, step, checkpoint=place, on_progress=told)
            return Made(quantized.graph, current, quantized.plan.after(tuple(plans)))

        def make(
            checkpoint: pathlib.Path | None,
            step: Spec = step,
            current: nn.Module = current,
            masks: dict[str, torch.Tensor] = masks,
            told: Callable[[Progress], None] = told,
        ) -> tuple[nn.Module, Plan | None]:
            if not isinstance(step, Finetune):
                changed = _changed(current, splits, step, recipe.seed)
                return changed.module, changed.plan
            trained = finetune(
                current,
                splits,
                step,
                masks=masks or None,
                teacher=module if step.needs_teacher else None,
                checkpoint=checkpoint,
                on_progress=told,
            )
            return trained.module, None

        current, plan = make(None) if run is None else _kept(run, named, step, make, current)
        if plan is not None:
            plans.append(plan)
            masks = masks | _zeros(current, plan)
    graph = deployment_graph(current, splits.input_shape)
    return Made(graph, current, plans[-1].after(tuple(plans[:-1])) if plans else None)


def _kept(
    run: Run, named: str, step: Spec, make: Make, before: nn.Module
) -> tuple[nn.Module, Plan | None]:
    """What `make` makes of the network `before`, or made of it in an earlier call."""
    made: list[tuple[nn.Module, Plan | None]] = []
    request = {"step": step.to_dict()}

    def keep(place: pathlib.Path) -> dict[str, Any] | None:
        made.append(make(place / CHECKPOINT))
        network, plan = made[0]
        held = io.BytesIO()
        torch.save(network.state_dict(), held)
        write_whole(place / STATE, [held.getbuffer()], held.getbuffer().nbytes)
        (place / CHECKPOINT).unlink(missing_ok=True)
        return None if plan is None else plan.to_dict()

    told = run.step(_named(named), request, keep, together=isinstance(step, Finetune))
    if made:
        return made[0]
    plan = None if told is None else from_dict(told)
    network = copy.deepcopy(before)
    if isinstance(plan, Plan):
        network = restructured(network, plan)
    state = run.place(_named(named), request) / STATE
    network.load_state_dict(torch.load(state, weights_only=True))
    return network.eval(), plan if isinstance(plan, Plan) else None


def _checkpoint(run: Run, named: str, step: Spec) -> pathlib.Path:
    place = run.place(_named(named), {"step": step.to_dict()})
    place.mkdir(parents=True, exist_ok=True)
    return place / CHECKPOINT


def _named(step: str) -> str:
    return step.replace(", ", "_").replace(" ", "")


def _changed(module: nn.Module, splits: Splits, step: Spec, seed: int) -> Compressed:
    if isinstance(step, Prune):
        return prune_model(module, splits, step, seed=seed)
    if isinstance(step, Factorize):
        return factorize_model(module, splits, step)
    assert isinstance(step, Share), "the order was checked"
    return share_model(module, splits, step, seed=seed)


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
        if isinstance(step, Quantize) and number < len(steps):
            raise SpecError(
                f"step {number} quantizes, and step {number + 1} ({steps[number].kind}) follows: "
                "quantize last"
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
        if isinstance(step, Prune) and step.structure in MASKED:
            zeros = f"step {number}"
