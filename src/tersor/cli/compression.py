"""The commands that change a network before it is exported: prune, factorize, and any recipe."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, say, training_watch, watching
from tersor.cli.targets import told, writable
from tersor.specs import Factorize, Finetune, Prune

if TYPE_CHECKING:  # slow to import, and only named here
    from tersor.pipeline import Compressed


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

    where = (model, data, out, weights, num_classes, save_weights)
    return _changed(where, change, recovery, seed, output)


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

    where = (model, data, out, weights, num_classes, save_weights)
    return _changed(where, change, recovery, seed, output)


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
        out: the file to write (.tersor); trainings resume from OUT.steps after a kill
        save_weights: also write the network's weights before it is quantized (.safetensors)
    """
    import shutil

    from tersor.data import load_data
    from tersor.models import save_weights as save_state
    from tersor.pipeline import resolve, write
    from tersor.recipe import read_recipe, run_recipe
    from tersor.specs import Plan

    asked = read_recipe(recipe)
    target = writable(out, ".tersor")
    kept = None if save_weights is None else writable(save_weights, ".safetensors")
    subject = resolve(model, weights=weights, num_classes=num_classes, seed=asked.seed)
    module = subject.need_module("a recipe")
    splits = load_data(data)
    steps = target.with_suffix(".steps")
    steps.mkdir(exist_ok=True)
    with watching() as watch:
        made = run_recipe(
            module,
            splits,
            asked,
            checkpoints=steps,
            on_progress=lambda named, progress: training_watch(watch, named)(progress),
        )
    size = write(
        made.graph, target, plan=made.plan, provenance={"data": splits.name, "model": model}
    )
    if kept is not None:
        save_state(made.module, kept)
    shutil.rmtree(steps)
    plans = () if made.plan is None else (*made.plan.earlier, made.plan)
    for plan in plans[:-1]:
        told(output, None, 0, plan)
    return told(output, target, size, plans[-1] if plans else Plan(asked))


def _changed(
    where: tuple[str, str, str, str | None, int | None, str | None],
    change: Callable[..., Compressed],
    recovery: Recovery,
    seed: int,
    output: Output,
) -> dict[str, Any]:
    """Load, change, recover, write and tell. `where`: model, data, out, weights, number of classes,
    file for the weights."""
    from tersor.data import load_data
    from tersor.models import save_weights
    from tersor.pipeline import resolve, write

    model, data, out, weights, num_classes, weights_out = where
    target = writable(out, ".tersor")
    kept = None if weights_out is None else writable(weights_out, ".safetensors")
    subject = resolve(model, weights=weights, num_classes=num_classes, seed=seed)
    module = subject.need_module("changing a network")
    splits = load_data(data)
    with watching() as watch:
        found = change(
            module,
            splits,
            reestimate=recovery.reestimate,
            recovery=recovery.training(seed),
            on_progress=training_watch(watch, "fine-tune"),
        )
    graph = dc.replace(subject, module=found.module).graph(splits.input_shape)
    size = write(graph, target, plan=found.plan, provenance={"data": splits.name, "model": model})
    if kept is not None:
        save_weights(found.module, kept)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (module, found.module))
    answer = told(output, target, size, found.plan)
    say(output, f"{after:,} parameters of {before:,}")
    return {**answer, "parameters": after, "parameters_before": before}
