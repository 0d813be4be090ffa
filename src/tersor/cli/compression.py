"""The commands that change a network before it is exported: prune, factorize, and a recipe's steps."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, Watch, say, training_watch, watching
from tersor.cli.targets import coverage, keeping, provenance, told, writable
from tersor.specs import Factorize, Finetune, Plan, Prune, Quantize, Recipe

if TYPE_CHECKING:  # slow to import, and only named here
    from torch import nn

    from tersor.data.arrays import Splits
    from tersor.methods.finetune import Progress
    from tersor.pipeline import Compressed
    from tersor.recipe import Made
    from tersor.runs import Run

    # the last keeps what a killed call made
    Make = Callable[[nn.Module, Splits, Watch, Run], Made]


@dc.dataclass(frozen=True)
class Recovery:
    """What follows the change.

    Attributes:
        reestimate: re-estimate batch norm from unlabelled calibration inputs
        augment: those inputs, augmented: none, crop, flip_crop, or auto: as the network's statistics tell that its
            training did
        finetune_epochs: train on (0: not), after each round where there are several; weights that were set to zero
            stay zero; resumes from OUT.steps after a kill
        finetune_learning_rate: peak of the learning rate
        distill: share of the training's loss that comes from the original network; 1 uses no labels
    """

    reestimate: bool = True
    augment: Literal["auto", "none", "crop", "flip_crop"] = "auto"
    finetune_epochs: float = 0.0
    finetune_learning_rate: float = 0.03
    distill: float = 0.0

    def training(self, seed: int) -> Finetune | None:
        """The fine-tuning, where one was asked for."""
        if self.finetune_epochs <= 0:
            return None
        return Finetune(
            epochs=self.finetune_epochs,
            learning_rate=self.finetune_learning_rate,
            distill=self.distill,
            seed=seed,
        )


def prune(
    model: Positional[Model],
    /,
    *,
    data: Data,
    out: str,
    weights: Weights = None,
    num_classes: int | None = None,
    request: Prune = Prune(),  # noqa: B008
    recovery: Recovery = Recovery(),
    save_weights: str | None = None,
    seed: int = 0,
    measure: bool = True,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Prune a network and write it as a .tersor file.

    Args:
        out: the file to write (.tersor)
        save_weights: also write the pruned network's weights (.safetensors), to train on
        measure: structure stripe: time each layer here, and leave empty stripes out of the products where that is
            faster; they take no room in the file in any case
    """
    from tersor.pipeline import prune_model

    def change(module: Any, splits: Any, **options: Any) -> Compressed:
        return prune_model(module, splits, request, seed=seed, **options)

    task = _Task(model, data, out, weights, num_classes, save_weights, seed, output)
    following = _recovering(change, recovery, seed)
    return task.run(Recipe((request,)), following, measure, **dc.asdict(recovery))


def factorize(
    model: Positional[Model],
    /,
    *,
    data: Data,
    out: str,
    weights: Weights = None,
    num_classes: int | None = None,
    request: Factorize = Factorize(),  # noqa: B008
    recovery: Recovery = Recovery(),
    save_weights: str | None = None,
    seed: int = 0,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Replace layers of a network by thinner ones of low rank and write it as a .tersor file.

    Args:
        out: the file to write (.tersor)
        save_weights: also write the network's weights (.safetensors), to train on
    """
    from tersor.pipeline import factorize_model

    def change(module: Any, splits: Any, **options: Any) -> Compressed:
        return factorize_model(module, splits, request, **options)

    task = _Task(model, data, out, weights, num_classes, save_weights, seed, output)
    return task.run(Recipe((request,)), _recovering(change, recovery, seed), **dc.asdict(recovery))


def by_recipe(
    model: str,
    data: str,
    recipe: str,
    out: str,
    weights: str | None,
    num_classes: int | None,
    save_weights: str | None,
    measure: bool,
    output: Output,
) -> dict[str, Any]:
    """Apply the steps of a recipe to a network and write it as a .tersor file; what a killed call made is kept in
    OUT.steps, and gone on from."""
    from tersor.recipe import read_recipe, run_recipe

    asked = read_recipe(recipe)

    def make(module: nn.Module, splits: Splits, watch: Watch, run: Run) -> Made:
        def told_of(named: str, progress: Progress) -> None:
            training_watch(watch, named)(progress)

        return run_recipe(module, splits, asked, run=run, on_progress=told_of)

    task = _Task(model, data, out, weights, num_classes, save_weights, asked.seed, output)
    return task.run(asked, make, measure)


def _recovering(change: Callable[..., Compressed], recovery: Recovery, seed: int) -> Make:
    """`change`, with what follows it."""

    def make(module: nn.Module, splits: Splits, watch: Watch, run: Run) -> Made:
        from tersor.methods.restore import unheld
        from tersor.pipeline import deployment_graph
        from tersor.recipe import Made

        found = change(
            module,
            splits,
            reestimate=recovery.reestimate,
            augment=recovery.augment,
            recovery=recovery.training(seed),
            checkpoint=run.checkpoint("training", {}),
            on_progress=training_watch(watch, "fine-tune"),
        )
        graph = deployment_graph(found.module, splits.input_shape)
        return Made(graph, found.module, found.plan, unheld(found.module, graph))

    return make


CALIBRATION_IMAGES = 512  # where no step wants more


@dc.dataclass(frozen=True)
class _Task:
    """What all commands here do around the change itself: load, and write and tell what came of it."""

    model: str
    data: str
    out: str
    weights: str | None
    num_classes: int | None
    save_weights: str | None
    seed: int
    output: Output

    def run(
        self, request: Recipe, make: Make, measure: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Check the targets, load network and data, `make`, write, and tell layer by layer. `request` and its other
        `options` tell a training that goes on from another one."""
        from tersor.data import load_data
        from tersor.models import save_weights
        from tersor.pipeline import resolve, write

        target = writable(self.out, ".tersor")
        kept = None if self.save_weights is None else writable(self.save_weights, ".safetensors")
        subject = resolve(
            self.model, weights=self.weights, num_classes=self.num_classes, seed=self.seed
        )
        module = subject.need_module("changing a network")
        wanted = max([0, *(getattr(step, "num_calibration", 0) for step in request.steps)])
        splits = load_data(self.data, num_calibration=max(CALIBRATION_IMAGES, wanted))
        asked = {"recipe": request.to_dict(), "options": options, "seed": self.seed}
        with keeping(target, self.model, splits, {"weights": module}, **asked) as run:
            with watching() as watch:
                made = make(module, splits, watch, run)
            split = _split_where_faster(made.graph, request) if measure else []
            whence = provenance(self.model, splits.name)
            size = write(made.graph, target, plan=made.plan, provenance=whence, state=made.state)
            if kept is not None:
                save_weights(made.module, kept)
        plan = made.plan or Plan(Recipe(()))  # a recipe that trains alone has decided nothing
        for earlier in plan.earlier:
            coverage(self.output, earlier)
        answer = told(self.output, target, size, plan)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (module, made.module))
        say(self.output, f"{after:,} parameters of {before:,}")
        if split:
            say(self.output, f"faster without their empty stripes: {', '.join(split)}")
        return {**answer, "parameters": after, "parameters_before": before, "split": split}


def _split_where_faster(graph: Any, request: Recipe) -> list[str]:
    """Leave empty stripes out of the products of a float graph where that is faster here; returns the layers."""
    from tersor.bench.forms import faster_forms
    from tersor.graph.stripes import forms_of_stripes, split_stripes_

    striped = any(isinstance(step, Prune) and step.structure == "stripe" for step in request.steps)
    if not striped or isinstance(request.steps[-1], Quantize):
        return []
    return [change.layer for change in split_stripes_(graph, faster_forms(forms_of_stripes(graph)))]
