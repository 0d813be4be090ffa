"""Commands that look at a model and change nothing: evaluate, benchmark, inspect."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, say, show_table, watching
from tersor.errors import SpecError

if TYPE_CHECKING:  # slow to import, and only named here
    from tersor.data.arrays import FloatArray, Splits

AGREEMENT_IMAGES = 256  # to compare engines on


def evaluate(
    model: Positional[Model],
    /,
    *,
    data: Data,
    weights: Weights = None,
    num_classes: int | None = None,
    original: str | None = None,
    original_weights: Weights = None,
    part: str = "test",
    engine: str = "onnxruntime",
    threads: int | None = None,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Accuracy of a network or a .tersor file, with a paired interval against an original.

    Args:
        original: the model to compare with, on the same images
        part: test, validation or train
    """
    from tersor.bench.evaluate import evaluate as judge
    from tersor.bench.stats import paired_interval
    from tersor.data import load_data
    from tersor.pipeline import resolve

    if part not in ("test", "validation", "train"):
        raise SpecError(f"--part must be test, validation or train, got {part!r}")
    if original_weights is not None and original is None:
        raise SpecError("--original-weights does nothing without --original")
    subject = resolve(model, weights=weights, num_classes=num_classes)
    other = None if original is None else resolve(original, weights=original_weights)
    splits = load_data(data)
    scores = []
    with watching() as watch:
        for each in (subject, other):
            if each is None:
                continue
            session = each.session(splits.input_shape, engine=engine, threads=threads)
            label = f"evaluate {each.name}"
            scores.append(judge(session, splits, part, on_progress=lambda s, t=label: watch(t, s)))  # type: ignore[misc]
    size = _bytes_of(weights if subject.path is None else subject.path)
    answer: dict[str, Any] = {
        "model": model,
        "data": splits.name,
        "part": part,
        "accuracy": scores[0].accuracy,
        "num_samples": scores[0].num_samples,
        "size_bytes": size,
        "engine": session.engine,
        "threads": session.threads,
        "interval": None,
    }
    say(
        output,
        f"accuracy {scores[0].accuracy:.2%} (n = {scores[0].num_samples}, {splits.name}, {part})"
        + ("" if size is None else f", {size:,} bytes"),
    )
    if len(scores) == 2:
        interval = paired_interval(scores[0], scores[1])
        answer["interval"] = interval.to_dict()
        say(
            output,
            f"against {original}: {interval.difference_pt:+.2f} points "
            f"({interval.level:.0%} interval {interval.low_pt:+.2f} to {interval.high_pt:+.2f}, "
            f"McNemar p = {interval.p_value:.3g})",
        )
    return answer


def _bytes_of(path: pathlib.Path | str | None) -> int | None:
    return None if path is None else pathlib.Path(path).stat().st_size


def benchmark(
    model: Positional[Model],
    /,
    *,
    weights: Weights = None,
    num_classes: int | None = None,
    original: str | None = None,
    original_weights: Weights = None,
    batch: tuple[int, ...] = (1, 64),
    engine: tuple[str, ...] = ("onnxruntime",),
    threads: int | None = None,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    seconds: float = 10.0,
    data: Data | None = None,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Time a network or a .tersor file on this machine's engines, interleaved in one run.

    Args:
        original: another model timed in the same run, for a ratio (with engine auto: the float one)
        engine: onnxruntime, openvino, torch (a network only); auto: every engine that computes the right function
        input_shape: channels height width of one input (a .tersor file knows its own)
        seconds: time spent on each batch size
        data: engine auto: calibration inputs to compare the engines on (default: noise)
    """
    from tersor.bench.environment import environment
    from tersor.bench.timing import time_sessions
    from tersor.pipeline import input_shape_of, resolve

    if bad := [b for b in batch if b < 1]:
        raise SpecError(f"--batch must be 1 or more, got {bad[0]}")
    subjects = [resolve(model, weights=weights, num_classes=num_classes)]
    if original is not None:
        subjects.append(resolve(original, weights=original_weights))
    for subject in subjects:
        if subject.artifact is not None:
            input_shape = input_shape_of(subject.artifact.to_onnx())
    if "auto" in engine:
        if len(engine) > 1:
            raise SpecError(f"--engine auto tries every engine; leave out {_others(engine)}")
        return _benchmark_auto(subjects, input_shape, batch, threads, seconds, data, output)
    if data is not None:
        raise SpecError("--data does nothing without --engine auto: time does not depend on it")
    sessions = {}
    for subject in subjects:
        for name in engine:
            if name == "torch" and subject.module is None and len(subjects) > 1:
                continue  # a deployed file has no module; the original still runs there
            sessions[f"{subject.name} on {name}"] = subject.session(
                input_shape, engine=name, threads=threads
            )
    rows = []
    for size in batch:
        timings = time_sessions(sessions, input_shape, size, seconds=seconds)
        rows += [
            {"model": name.rpartition(" on ")[0], **t.to_dict()} for name, t in timings.items()
        ]
    around = environment()
    columns = ("model", "engine", "batch", "threads", "median_ms", "p05_ms", "p95_ms", "repeats")
    show_table(output, f"on {around['cpu']}", columns, [[r[c] for c in columns] for r in rows])
    return {"timings": rows, "environment": around, "choice": None}


def _others(engines: tuple[str, ...]) -> str:
    return ", ".join(name for name in engines if name != "auto")


def _benchmark_auto(
    subjects: list[Any],
    input_shape: tuple[int, int, int],
    batch: tuple[int, ...],
    threads: int | None,
    seconds: float,
    data: str | None,
    output: Output,
) -> dict[str, Any]:
    """The fastest right engine at each batch size; the second subject is the float model."""
    from tersor.bench.choice import FLOAT
    from tersor.bench.choose import choose_engine
    from tersor.bench.environment import environment

    graphs = [subject.graph(input_shape) for subject in subjects]
    names = {subjects[0].name: subjects[0].name, FLOAT: subjects[-1].name}
    around = environment()
    rows, choices = [], []
    for size in batch:
        inputs, what = _inputs(data, input_shape, size)
        choice = choose_engine(
            {subjects[0].name: graphs[0]},
            inputs,
            float_graph=graphs[1] if len(graphs) > 1 else None,
            batch=size,
            threads=threads,
            seconds=seconds,
            inputs_are=what,
        )
        choices.append(choice.to_dict())
        rows += [
            {"model": names[c.model], **c.timing.to_dict()}
            for c in choice.candidates
            if c.timing is not None
        ]
        title = f"batch {size}, agreement on {choice.inputs}, on {around['cpu']}"
        show_table(output, title, choice.COLUMNS, choice.rows())
        say(output, choice.verdict())
    return {"timings": rows, "environment": around, "choice": choices}


def _inputs(data: str | None, input_shape: tuple[int, int, int], batch: int) -> tuple[Any, str]:
    """Images to compare engines on, a batch at least where there are as many, and what they are."""
    import numpy as np

    if data is None:
        count = max(AGREEMENT_IMAGES, batch)
        noise = np.random.default_rng(0).standard_normal((count, *input_shape))
        return noise.astype(np.float32), "seeded noise images (give --data for real ones)"
    from tersor.data import load_data

    return images_to_compare(load_data(data), batch)


def images_to_compare(splits: Splits, batch: int) -> tuple[FloatArray, str]:
    """The calibration images that engines are compared on, a batch at least where there are as
    many, and what they are in words."""
    import numpy as np

    count = min(max(AGREEMENT_IMAGES, batch), len(splits.calibration))
    part = splits.calibration.take(np.arange(count))
    return splits.normalise(part.images), f"calibration inputs of {splits.name}"
