"""The command that tells how much of a network's work multiplies by zero, and what an engine makes of it."""

from __future__ import annotations

import dataclasses as dc
import functools
import pathlib
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, Watch, say, show_table, watching
from tersor.cli.targets import picture

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from tersor.data.arrays import Splits
    from tersor.engines import Session
    from tersor.results import Timing

FloatArray = npt.NDArray[np.float32]
NUM_CALIBRATION = 64


def activity(
    model: Positional[Model],
    /,
    *,
    data: Data,
    weights: Weights = None,
    num_classes: int | None = None,
    labels: bool = False,
    num_images: int = 128,
    batch: int = 64,
    engine: str = "onnxruntime",
    threads: int | None = None,
    sparsities: tuple[float, ...] = (),
    method: Literal["top_k", "threshold"] = "top_k",
    out: str | None = None,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """How sparse activations and gradients are, the speed-up that would allow, and the one obtained.

    Args:
        data: training inputs to run
        num_classes: outputs of the network (default: the network's own)
        labels: gradients of the loss with the data's labels (default: with the network's own answers)
        num_images: training images to run
        batch: images a run, where the engine is timed
        engine: the engine to time on real activations and on dense ones
        threads: CPU threads (default: all)
        sparsities: also judge the network on the test part with this share of each layer's inputs set to zero
        method: which inputs stay, with sparsities: the largest of each image, or those above a number
        out: a figure to write (.svg), or a page with figure and tables (.html)
    """
    from tersor.data import load_data
    from tersor.methods.activity import measure_activity
    from tersor.pipeline import resolve
    from tersor.report.activity import conclusion
    from tersor.report.figures import require_matplotlib

    target = None if out is None else picture(out)
    if target is not None:
        require_matplotlib()
    subject = resolve(model, weights=weights, num_classes=num_classes)
    module = subject.need_module("activity")
    splits = load_data(data)
    part = splits.train.take(np.arange(min(num_images, len(splits.train))))
    started = time.perf_counter()
    found = measure_activity(
        module,
        splits.batches(part, 32),
        part.labels if labels else None,
        num_images=num_images,
    )
    answer: dict[str, Any] = {
        "model": model,
        "data": splits.name,
        "num_images": found.num_images,
        "num_gradient_images": found.num_gradient_images,
        "gradients_from": "labels" if labels else "own answers",
        "layers": [layer.to_dict() for layer in found.layers],
        "unreached": list(found.unreached),
        "macs_zero": found.macs_zero,
        "potential_speedup": found.potential_speedup,
    }
    graph = subject.graph(splits.input_shape)
    answer["obtained"] = obtained(graph, splits, batch=batch, engine=engine, threads=threads)
    with watching() as watch:
        answer["pruned"] = _judged(module, graph, splits, sparsities, method, watch)
    answer["seconds"] = round(time.perf_counter() - started, 1)
    _show(output, answer)
    say(output, conclusion(answer))
    if target is not None:
        answer["out"] = str(target)
        say(output, f"wrote {target}, {_write(target, answer):,} bytes")
    return answer


@dc.dataclass
class _Fed:
    """A session that runs its own images, whatever it is given: real ones must be timed as they are."""

    session: Session
    images: FloatArray

    def __post_init__(self) -> None:
        self.engine, self.threads = self.session.engine, self.session.threads

    def run(self, batch: FloatArray) -> FloatArray:
        """Logits of the own images."""
        return self.session.run(self.images)


def obtained(
    graph: onnx.ModelProto,
    splits: Splits,
    *,
    batch: int,
    engine: str,
    threads: int | None,
    seconds: float = 20.0,
) -> dict[str, Any]:
    """Times of the float `graph` on real images and of its dense twin on positive ones, interleaved, and the
    share of zeros that each one's layers read."""
    from tersor.bench.timing import time_sessions
    from tersor.engines import open_session
    from tersor.graph.dense import dense_twin
    from tersor.methods.activity import zeros_read

    count = min(batch, len(splits.train))
    real = splits.normalise(splits.train.images[:count])
    positive = np.abs(real) + np.float32(1)
    twin = dense_twin(graph)
    sessions = {
        "real": _Fed(open_session(graph, engine=engine, threads=threads), real),
        "dense": _Fed(open_session(twin, engine=engine, threads=threads), positive),
    }
    timings: dict[str, Timing] = time_sessions(
        sessions, splits.input_shape, count, repeats=100, seconds=seconds
    )
    return {
        "real": timings["real"].to_dict(),
        "dense": timings["dense"].to_dict(),
        "zeros_real": zeros_read(graph, real[:32]),
        "zeros_dense": zeros_read(twin, positive[:32]),
        "speedup": timings["dense"].median_ms / timings["real"].median_ms,
    }


def _judged(
    module: nn.Module,
    graph: onnx.ModelProto,
    splits: Splits,
    sparsities: tuple[float, ...],
    method: str,
    watch: Watch,
) -> list[dict[str, Any]]:
    """Test accuracy, paired with the original's, for each sparsity of activations."""
    if not sparsities:
        return []
    from tersor.bench import evaluate, paired_interval
    from tersor.engines import open_session
    from tersor.graph.export import export_onnx
    from tersor.methods.activation_pruning import prune_activations

    images = None
    if method == "threshold":
        images = splits.normalise(splits.calibration.images[:NUM_CALIBRATION])
    small = [prune_activations(module, share, method=method, images=images) for share in sparsities]
    original = evaluate(open_session(graph), splits)
    rows = []
    for share, pruned in zip(sparsities, small, strict=True):
        session = open_session(export_onnx(pruned, splits.input_shape))
        told = functools.partial(watch, f"activations {share:.0%} pruned")
        score = evaluate(session, splits, on_progress=told)
        interval = paired_interval(score, original)
        rows.append(
            {
                "sparsity": share,
                "method": method,
                "accuracy": score.accuracy,
                "original_accuracy": original.accuracy,
                "num_samples": score.num_samples,
                "interval": interval.to_dict(),
            }
        )
    return rows


def _show(output: Output, answer: dict[str, Any]) -> None:
    columns = ["layer", "MACs", "inputs 0", "over 0.1 rms", "MACs by 0"]
    columns += ["gradients 0", "training", "top 1 % holds"]
    total = max(sum(layer["macs"] for layer in answer["layers"]), 1)
    rows = [
        [
            layer["layer"],
            100 * layer["macs"] / total,
            100 * layer["input_zeros"],
            100 * layer["input_density"]["0.1"],
            100 * layer["macs_zero"],
            100 * layer["gradient_zeros"],
            100 * layer["gradient_zeros_training"],
            100 * layer["gradient_top"],
        ]
        for layer in answer["layers"]
    ]
    title = (
        f"shares in %; exact zeros over {answer['num_images']} images; gradients over "
        f"{answer['num_gradient_images']}, from {answer['gradients_from']}, as evaluated and in training"
    )
    show_table(output, title, columns, rows)
    if answer["unreached"]:
        say(
            output,
            f"not called as layers, so not counted: {', '.join(answer['unreached'])}",
        )
    if answer["pruned"]:
        cells = [
            [
                100 * row["sparsity"],
                100 * row["accuracy"],
                row["interval"]["difference_pt"],
                f"{row['interval']['low_pt']:+.2f} to {row['interval']['high_pt']:+.2f}",
                row["num_samples"],
            ]
            for row in answer["pruned"]
        ]
        heads = ["inputs set to 0 %", "accuracy %", "difference pt", "95 % interval", "n"]
        show_table(output, f"activations pruned by {answer['pruned'][0]['method']}", heads, cells)


def _write(target: pathlib.Path, answer: dict[str, Any]) -> int:
    from tersor.artifact.storage import write_whole
    from tersor.report.activity import activity_page, activity_svg

    make = activity_svg if target.suffix == ".svg" else activity_page
    content = make(answer).encode()
    write_whole(target, [content], len(content))
    return len(content)
