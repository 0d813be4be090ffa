"""The commands. Each takes what a person types and returns the JSON object of its answer."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

from tyro.conf import Positional

from tersor.cli.activity import activity
from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.compression import compress, factorize, prune
from tersor.cli.distillation import distill
from tersor.cli.measure import benchmark, evaluate, inspect
from tersor.cli.output import Output, say, training_watch, watching
from tersor.cli.quantization import quantize
from tersor.cli.sensitivity import sensitivity
from tersor.cli.studies import demo, report, study
from tersor.cli.targets import writable
from tersor.errors import SpecError
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
    """Train a network, or go on from weights; resumes after a kill.

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
    checkpoint = target.with_suffix(".checkpoint")
    with watching() as watch:
        trained = finetune(
            module,
            splits,
            recipe,
            checkpoint=checkpoint,
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
    checkpoint.unlink(missing_ok=True)
    say(
        output,
        f"validation accuracy {answer['validation_accuracy']:.2%} (n = {len(splits.validation)}, "
        f"{splits.name}) after {trained.seconds:.0f} s; weights in {target}",
    )
    return answer


def export(
    model: Positional[Model],
    /,
    *,
    out: str,
    to: str = "onnx",
    weights: Weights = None,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Write a network or a .tersor file as an ONNX graph with a free batch size.

    Args:
        out: the file to write
        to: onnx or tersor
        input_shape: channels height width of one input (a .tersor file knows its own)
    """
    from tersor.artifact.storage import write_whole
    from tersor.pipeline import resolve, write

    if to not in ("onnx", "tersor"):
        raise SpecError(f"--to must be onnx or tersor, got {to!r}")
    target = writable(out, f".{to}")
    subject = resolve(model, weights=weights, num_classes=num_classes)
    graph = subject.graph(input_shape)
    if to == "tersor":
        size = write(graph, target, plan=subject.plan, provenance={"model": model})
    else:
        data = graph.SerializeToString()
        write_whole(target, [data], len(data))
        size = len(data)
    say(output, f"wrote {target}, {size:,} bytes")
    return {"out": str(target), "size_bytes": size, "to": to}


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "demo": demo,
    "train": train,
    "distill": distill,
    "evaluate": evaluate,
    "compress": compress,
    "prune": prune,
    "factorize": factorize,
    "quantize": quantize,
    "sensitivity": sensitivity,
    "activity": activity,
    "benchmark": benchmark,
    "inspect": inspect,
    "export": export,
    "study": study,
    "report": report,
}
