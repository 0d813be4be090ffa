"""The commands that change a network before it is exported: prune, factorize, and any recipe."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, Watch, say, say_interrupted, training_watch, watching
from tersor.cli.targets import coverage, told, writable
from tersor.specs import Factorize, Finetune, Plan, Prune, Recipe

if TYPE_CHECKING:  # slow to import, and only named here
    from torch import nn

    from tersor.data.arrays import Splits
    from tersor.methods.finetune import Progress
    from tersor.pipeline import Compressed
    from tersor.recipe import Made

    Make = Callable[[nn.Module, Splits, Watch], Made]


@dc.dataclass(frozen=True)
class Recovery:
    """What follows the change.

    Attributes:
        reestimate: re-estimate batch norm from unlabelled calibration inputs
        finetune_epochs: train on (0: not); weights that were set to zero stay zero
        finetune_learning_rate: peak of the learning rate
        distill: share of the training's loss that comes from the original network; 1 uses no labels
    """

    reestimate: bool = True
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
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Prune a network and write it as a .tersor file.

    Args:
        out: the file to write (.tersor)
        save_weights: also write the pruned network's weights (.safetensors), to train on
    """
    from tersor.pipeline import prune_model

    def change(module: Any, splits: Any, **options: Any) -> Compressed:
        return prune_model(module, splits, request, seed=seed, **options)

    task = _Task(model, data, out, weights, num_classes, save_weights, seed, output)
    return task.run(_recovering(change, recovery, seed))


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
    return task.run(_recovering(change, recovery, seed))


def compress(
    model: Positional[Model],
    /,
    *,
    data: Data,
    recipe: str,
    out: str,
    weights: Weights = None,
    num_classes: int | None = None,
    save_weights: str | None = None,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Apply the steps of a recipe to a network and write it as a .tersor file.

    Args:
        recipe: a JSON file: {"steps": [{"kind": "prune", ...}, {"kind": "finetune", ...}, {"kind": "quantize", ...}]}
        out: the file to write (.tersor); what a killed call made is kept in OUT.steps, and gone on from
        save_weights: also write the network's weights before it is quantized (.safetensors)
    """
    import importlib.metadata
    import shutil

    from tersor.methods.together import digest
    from tersor.recipe import read_recipe, run_recipe
    from tersor.runs import Run

    asked = read_recipe(recipe)
    steps = writable(out, ".tersor").with_suffix(".steps")

    def make(module: nn.Module, splits: Splits, watch: Watch) -> Made:
        def told_of(named: str, progress: Progress) -> None:
            training_watch(watch, named)(progress)

        with Run(steps, tell=say_interrupted) as run:
            run.begin(
                model=model,
                weights=digest(module),
                data=splits.name,
                data_fingerprint=splits.fingerprint(),
                recipe=asked.to_dict(),
                tersor=importlib.metadata.version("tersor"),
            )
            return run_recipe(module, splits, asked, run=run, on_progress=told_of)

    task = _Task(model, data, out, weights, num_classes, save_weights, asked.seed, output)
    answer = task.run(make)
    shutil.rmtree(steps)
    return answer


def _recovering(change: Callable[..., Compressed], recovery: Recovery, seed: int) -> Make:
    """`change`, with what follows it."""

    def make(module: nn.Module, splits: Splits, watch: Watch) -> Made:
        from tersor.pipeline import deployment_graph
        from tersor.recipe import Made

        found = change(
            module,
            splits,
            reestimate=recovery.reestimate,
            recovery=recovery.training(seed),
            on_progress=training_watch(watch, "fine-tune"),
        )
        return Made(deployment_graph(found.module, splits.input_shape), found.module, found.plan)

    return make


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

    def run(self, make: Make) -> dict[str, Any]:
        """Check the targets, load network and data, `make`, write, and tell layer by layer."""
        from tersor.data import load_data
        from tersor.models import save_weights
        from tersor.pipeline import resolve, write

        target = writable(self.out, ".tersor")
        kept = None if self.save_weights is None else writable(self.save_weights, ".safetensors")
        subject = resolve(
            self.model, weights=self.weights, num_classes=self.num_classes, seed=self.seed
        )
        module = subject.need_module("changing a network")
        splits = load_data(self.data)
        with watching() as watch:
            made = make(module, splits, watch)
        provenance = {"data": splits.name, "model": self.model}
        size = write(made.graph, target, plan=made.plan, provenance=provenance)
        if kept is not None:
            save_weights(made.module, kept)
        plan = made.plan or Plan(Recipe(()))  # a recipe that trains alone has decided nothing
        for earlier in plan.earlier:
            coverage(self.output, earlier)
        answer = told(self.output, target, size, plan)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (module, made.module))
        say(self.output, f"{after:,} parameters of {before:,}")
        return {**answer, "parameters": after, "parameters_before": before}
