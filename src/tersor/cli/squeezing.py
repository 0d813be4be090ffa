"""The command that makes the smallest file: codes chosen for what they cost and what they change."""

from __future__ import annotations

from typing import Any, Literal

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, say, training_watch, watching
from tersor.cli.targets import keeping, provenance, told, writable
from tersor.specs import Squeeze


def squeeze(
    model: Positional[Model],
    /,
    *,
    data: Data,
    out: str,
    weights: Weights = None,
    num_classes: int | None = None,
    size: str = "",
    drop: float = 0.0,
    price: float = 0.0,
    epochs: float = 0.0,
    learning_rate: float = 0.02,
    start: float = 1.5,
    use_labels: bool = False,
    num_calibration: int = 1024,
    augment: Literal["none", "crop", "flip_crop"] = "flip_crop",
    exclude: tuple[str, ...] = (),
    seed: int = 0,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Make the smallest file of a network: to a size, or as far as its accuracy may fall.

    Without --epochs nothing is trained and no label is read. Give one of --size, --drop and --price.

    Args:
        out: the file to write (.tersor); a killed training goes on from OUT.steps
        size: of the whole file at most: 500kB, 1.5MB, 192KiB
        drop: points of accuracy on the validation images that may be lost
        price: what a bit may cost, in nats of KL from the original's answers
        epochs: then train with the size in it, from the network's own outputs (needs --size)
        learning_rate: of that training, at its peak
        start: it starts from the network coded to so many times the size
        use_labels: it learns from labels too, not from the network alone
        num_calibration: unlabelled images that codes are chosen by
        augment: how these, and those of the training, are changed: as the network was trained
        exclude: layers left in float: names, or re:PATTERN
    """
    from tersor.data import load_data
    from tersor.methods.squeezing import squeeze as squeeze_network
    from tersor.pipeline import resolve, write

    target = writable(out, ".tersor")
    request = Squeeze(
        size=size,
        drop=drop,
        price=price,
        epochs=epochs,
        learning_rate=learning_rate,
        start=start,
        distill=0.5 if use_labels else 1.0,
        num_calibration=num_calibration,
        augment=augment,
        exclude=exclude,
        seed=seed,
    )
    subject = resolve(model, weights=weights, num_classes=num_classes)
    module = subject.need_module("squeezing")
    splits = load_data(data, num_calibration=request.num_calibration)
    whence = provenance(model, splits.name)
    with keeping(target, model, splits, {"weights": module}, squeeze=request.to_dict()) as run:
        with watching() as watch:
            found = squeeze_network(
                module,
                splits,
                request,
                provenance=whence,
                checkpoint=run.checkpoint("training", {}),
                told=watch,
                on_progress=training_watch(watch, f"squeeze {model}"),
            )
        size_bytes = write(found.graph, target, plan=found.plan, provenance=whence)
    answer = told(output, target, size_bytes, found.plan)
    weights_held = sum(each.outputs.size * each.inputs.size for each in found.layers.values())
    code_bytes = sum(each.size_bytes for each in found.layers.values())
    bits = 8 * code_bytes / max(weights_held, 1)
    say(output, f"{bits:.3f} bits a weight; {size_bytes - code_bytes:,} bytes are no codes")
    return {**answer, "price": found.price, "bits_per_weight": bits, "code_bytes": code_bytes}
