"""The commands. Each takes what a person types and returns the JSON object of its answer."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

from tyro.conf import Positional

from tersor.cli.activity import activity
from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.compression import factorize, prune
from tersor.cli.contents import export, inspect
from tersor.cli.distillation import distill
from tersor.cli.measure import benchmark, evaluate
from tersor.cli.ondemand import advise, compress
from tersor.cli.output import Output, say, training_watch, watching
from tersor.cli.quantization import quantize
from tersor.cli.sensitivity import sensitivity
from tersor.cli.squeezing import squeeze
from tersor.cli.studies import demo, report, study
from tersor.cli.targets import keeping, writable
from tersor.specs import Finetune


def train(
    model: Positional[Model],
    /,
    *,
    data: Data,
    out: str,
    weights: Weights = None,
    num_classes: int | None = None,
    recipe: Finetune = Finetune(),  # noqa: B008
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Train a network, or go on from weights; a killed training goes on from OUT.steps.

    Args:
        out: file for the weights (.safetensors); a .json with recipe and accuracy is written beside it
        num_classes: outputs of the network (default: the network's own)
    """
    from tersor.data import load_data
    from tersor.methods.finetune import finetune, training_accuracy
    from tersor.models import load_model, save_weights

    target = writable(out, ".safetensors")
    module = load_model(model, weights=weights, num_classes=num_classes, seed=recipe.seed)
    splits = load_data(data)
    asked = {"train": recipe.to_dict()}
    with keeping(target, model, splits, {"weights": module}, **asked) as run, watching() as watch:
        trained = finetune(
            module,
            splits,
            recipe,
            checkpoint=run.checkpoint("training", {}),
            on_progress=training_watch(watch, f"train {model}"),
        )
        size = save_weights(trained.module, target)
    answer = {
        "model": model,
        "data": splits.name,
        "recipe": recipe.to_dict(),
        "started_from": pathlib.Path(weights).name if weights else "random weights",
        "validation_accuracy": training_accuracy(trained.module, splits, splits.validation),
        "num_samples": len(splits.validation),
        "seconds": round(trained.seconds, 1),
        "images_per_s": round(trained.history[-1]["images_per_s"], 1) if trained.history else None,
        "precision": trained.precision,
        "compiled": trained.compiled,
        "device": trained.device,
        "notes": list(trained.notes),
        "size_bytes": size,
        "out": str(target),
    }
    for note in trained.notes:
        say(output, note)
    target.with_suffix(".json").write_text(json.dumps(answer, indent=1) + "\n")
    say(
        output,
        f"validation accuracy {answer['validation_accuracy']:.2%} (n = {len(splits.validation)}, "
        f"{splits.name}) after {trained.seconds:.0f} s; weights in {target}",
    )
    return answer


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "demo": demo,
    "train": train,
    "distill": distill,
    "evaluate": evaluate,
    "compress": compress,
    "advise": advise,
    "prune": prune,
    "factorize": factorize,
    "quantize": quantize,
    "squeeze": squeeze,
    "sensitivity": sensitivity,
    "activity": activity,
    "benchmark": benchmark,
    "inspect": inspect,
    "export": export,
    "study": study,
    "report": report,
}
