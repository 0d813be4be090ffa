"""The commands. Each takes what a person types and returns the JSON object of its answer."""

from __future__ import annotations

import dataclasses as dc
import json
import pathlib
from collections.abc import Callable
from typing import Any

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.measure import benchmark, evaluate, inspect
from tersor.cli.output import Output, say, show_table, training_watch, watching
from tersor.cli.studies import demo, report, study
from tersor.errors import RunError, SpecError
from tersor.specs import Finetune, Plan, Prune, Quantize


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

    target = _writable(out, ".safetensors")
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
        "size_bytes": size,
        "out": str(target),
    }
    target.with_suffix(".json").write_text(json.dumps(answer, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    say(
        output,
        f"validation accuracy {answer['validation_accuracy']:.2%} (n = {len(splits.validation)}, "
        f"{splits.name}) after {trained.seconds:.0f} s; weights in {target}",
    )
    return answer


def prune(
    model: Positional[Model],
    /,
    *,
    data: Data,
    out: str,
    weights: Weights = None,
    num_classes: int | None = None,
    request: Prune = Prune(),  # noqa: B008
    reestimate: bool = True,
    finetune_epochs: float = 0.0,
    finetune_learning_rate: float = 0.03,
    save_weights: str | None = None,
    seed: int = 0,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Prune a network and write it as a .tersor file.

    Args:
        out: the file to write (.tersor)
        reestimate: re-estimate batch norm from unlabelled calibration inputs
        finetune_epochs: train on with the pruned weights kept at zero (0: not)
        save_weights: also write the pruned network's weights (.safetensors), to train on
    """
    from tersor.data import load_data
    from tersor.models import save_weights as save_state
    from tersor.pipeline import prune_model, resolve, write

    target = _writable(out, ".tersor")
    kept = None if save_weights is None else _writable(save_weights, ".safetensors")
    subject = resolve(model, weights=weights, num_classes=num_classes, seed=seed)
    module = subject.need_module("pruning")
    splits = load_data(data)
    recovery = None
    if finetune_epochs > 0:
        recovery = Finetune(epochs=finetune_epochs, learning_rate=finetune_learning_rate, seed=seed)
    with watching() as watch:
        pruned = prune_model(
            module,
            splits,
            request,
            reestimate=reestimate,
            recovery=recovery,
            on_progress=training_watch(watch, "fine-tune"),
            seed=seed,
        )
    graph = dc.replace(subject, module=pruned.module).graph(splits.input_shape)
    size = write(graph, target, plan=pruned.plan, provenance={"data": splits.name, "model": model})
    if kept is not None:
        save_state(pruned.module, kept)
    return _told(output, target, size, pruned.plan)


def quantize(
    model: Positional[Model],
    /,
    *,
    out: str,
    data: Data | None = None,
    weights: Weights = None,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    request: Quantize = Quantize(),  # noqa: B008
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Quantize a network or a .tersor file to 8-bit integers and write it as a .tersor file.

    Args:
        out: the file to write (.tersor)
        data: calibration inputs (labels are not used); static quantization needs them
        input_shape: channels height width, where there is no data to tell
    """
    from tersor.data import load_data
    from tersor.pipeline import quantize_graph, resolve, write

    target = _writable(out, ".tersor")
    subject = resolve(model, weights=weights, num_classes=num_classes)
    if data is None and request.mode == "static":
        raise SpecError("static quantization needs calibration inputs; give --data")
    splits = None if data is None else load_data(data, num_calibration=request.num_calibration)
    graph = subject.graph(_shape(subject.artifact is not None, splits, input_shape))
    quantized = quantize_graph(graph, splits, request)
    told = {"model": model, "data": None if splits is None else splits.name}
    size = write(quantized.graph, target, plan=quantized.plan, provenance=told)
    answer = _told(output, target, size, quantized.plan)
    shares = quantized.coverage.to_dict()
    macs, weights_covered = shares["macs_share"], shares["bytes_share"]
    say(
        output,
        f"covered: {macs:.1%} of the multiplications, {weights_covered:.1%} of the weight bytes",
    )
    if size >= graph.ByteSize():
        say(output, f"not smaller: the float graph has {graph.ByteSize():,} bytes")
    return {**answer, **shares}


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
    target = _writable(out, f".{to}")
    graph = resolve(model, weights=weights, num_classes=num_classes).graph(input_shape)
    if to == "tersor":
        size = write(graph, target, provenance={"model": model})
    else:
        data = graph.SerializeToString()
        write_whole(target, [data], len(data))
        size = len(data)
    say(output, f"wrote {target}, {size:,} bytes")
    return {"out": str(target), "size_bytes": size, "to": to}


def _told(output: Output, target: pathlib.Path, size: int, plan: Plan) -> dict[str, Any]:
    """Print the coverage table and the file; return both."""
    layers = [{k: v for k, v in d.to_dict().items() if k != "kind"} for d in plan.layers]
    columns = ("layer", "action", "bits", "sparsity", "reason")
    show_table(output, "coverage", columns, [[layer[c] for c in columns] for layer in layers])
    say(output, f"wrote {target}, {size:,} bytes")
    return {"out": str(target), "size_bytes": size, "layers": layers}


def _shape(
    is_file: bool, splits: Any, input_shape: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    if input_shape is not None or splits is not None:
        return input_shape or splits.input_shape
    if is_file:
        return (0, 0, 0)  # the file's graph knows its own shape
    raise SpecError("the input's shape is not known; give --data, or --input-shape C H W")


def _writable(path: str, suffix: str) -> pathlib.Path:
    """The target, checked before any work is done: its ending, its directory, and that it can be written."""
    target = pathlib.Path(path)
    if target.suffix != suffix:
        raise SpecError(f"--out {path}: expected a name that ends in {suffix}")
    if target.is_dir():
        raise RunError(f"{target} is a directory; name a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror or error}") from None
    return target


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "prune": prune,
    "quantize": quantize,
    "benchmark": benchmark,
    "inspect": inspect,
    "export": export,
    "study": study,
    "report": report,
}
