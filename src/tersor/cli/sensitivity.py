"""The command that tells which layers a quantization to few bits would hurt."""

from __future__ import annotations

import pathlib
import time
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, say, show_table, watching
from tersor.cli.targets import picture

if TYPE_CHECKING:
    from tersor.methods.sensitivity import Sensitivity


def sensitivity(
    model: Positional[Model],
    /,
    *,
    data: Data,
    weights: Weights = None,
    num_classes: int | None = None,
    bits: tuple[int, ...] = (2, 3, 4, 6, 8),
    inputs: bool = False,
    num_images: int = 128,
    out: str | None = None,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Which layers hurt when quantized: change of the outputs by each layer alone, without labels.

    Args:
        data: calibration inputs (labels are not used)
        num_classes: outputs of the network (default: the network's own)
        bits: numbers of bits to try for the weights of each layer
        inputs: also try the input of each layer in 8 bits
        num_images: calibration images to run
        out: a figure to write (.svg), or a page with figure and tables (.html)
    """
    from tersor.data import load_data
    from tersor.methods.sensitivity import sensitivities
    from tersor.pipeline import calibration_batches, resolve
    from tersor.report.figures import require_matplotlib
    from tersor.report.sensitivity import conclusion

    target = None if out is None else picture(out)
    if target is not None:
        require_matplotlib()
    subject = resolve(model, weights=weights, num_classes=num_classes)
    splits = load_data(data, num_calibration=num_images)
    graph = subject.graph(splits.input_shape)
    started = time.perf_counter()
    with watching() as watch:
        found = sensitivities(
            graph,
            None,
            bits,
            calibration_batches(splits, num_images),
            num_images=num_images,
            inputs=inputs,
            on_progress=lambda share: watch(f"sensitivity {model}", share),
        )
    answer = {
        "model": model,
        "data": splits.name,
        "num_images": found.num_images,
        "seconds": round(time.perf_counter() - started, 1),
        "bits": sorted({row.bits for row in found.table}),
        "layers": _layers(found),
    }
    _show(output, answer, inputs)
    say(output, conclusion(answer))
    if target is not None:
        answer["out"] = str(target)
        say(output, f"wrote {target}, {_write(target, answer):,} bytes")
    return answer


def _layers(found: Sensitivity) -> list[dict[str, Any]]:
    """One JSON object a layer, harms by bits; rank 1 hurts most at the fewest bits."""
    total = max(sum({row.layer: row.macs for row in found.table}.values()), 1)
    layers: dict[str, dict[str, Any]] = {}
    for row in found.table:
        layer = layers.setdefault(
            row.layer,
            {
                "layer": row.layer,
                "num_weights": row.num_weights,
                "macs": row.macs,
                "macs_share": row.macs / total,
                "harm_kl_nats": {},
                "harm_mse": {},
                "harm_input_8bit_kl_nats": None,
                "rank": 0,
            },
        )
        layer["harm_kl_nats"][str(row.bits)] = row.harm_kl
        layer["harm_mse"][str(row.bits)] = row.harm_mse
    for row in found.inputs:
        layers[row.layer]["harm_input_8bit_kl_nats"] = row.harm_kl
    fewest = str(min(row.bits for row in found.table))
    ordered = sorted(layers.values(), key=lambda layer: -layer["harm_kl_nats"][fewest])
    for rank, layer in enumerate(ordered, 1):
        layer["rank"] = rank
    return list(layers.values())


def _show(output: Output, answer: dict[str, Any], inputs: bool) -> None:
    widths = [str(b) for b in answer["bits"]]
    columns = ["layer", "weights", "MACs %", *(f"{b} bits" for b in widths)]
    columns += ["input 8 bits"] if inputs else []
    rows = []
    for layer in answer["layers"]:
        cells = [layer["layer"], layer["num_weights"], 100 * layer["macs_share"]]
        cells += [layer["harm_kl_nats"][b] for b in widths]
        cells += [layer["harm_input_8bit_kl_nats"]] if inputs else []
        rows.append([*cells, layer["rank"]])
    title = (
        f"harm of quantizing each layer's weights alone: KL divergence in nats, mean over "
        f"{answer['num_images']} images; rank by {widths[0]} bits"
    )
    show_table(output, title, [*columns, "rank"], rows)


def _write(target: pathlib.Path, answer: dict[str, Any]) -> int:
    from tersor.artifact.storage import write_whole
    from tersor.report.sensitivity import sensitivity_page, sensitivity_svg

    make = sensitivity_svg if target.suffix == ".svg" else sensitivity_page
    content = make(answer).encode()
    write_whole(target, [content], len(content))
    return len(content)
