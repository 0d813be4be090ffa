"""The command that quantizes: post-training in every kind, or with training."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.measure import images_to_compare
from tersor.cli.output import Output, say, show_table, training_watch, watching
from tersor.cli.targets import keeping, provenance, told, writable
from tersor.errors import EngineError, SpecError
from tersor.specs import Finetune, Quantize

if TYPE_CHECKING:  # slow to import, and only named here
    import onnx

    from tersor.data.arrays import Splits
    from tersor.methods.quantize import Quantized


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
    fold_copies: bool = True,
    train_epochs: float | None = None,
    train_learning_rate: float | None = None,
    use_labels: bool = False,
    engine: str | None = None,
    batch: int = 1,
    threads: int | None = None,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Quantize a network or a .tersor file to codes of few bits and write it as a .tersor file.

    Args:
        out: the file to write (.tersor)
        data: calibration inputs (labels are not used)
        input_shape: channels height width, where there is no data to tell
        fold_copies: fold a linear layer that reads equal copies of each value (the same function)
        train_epochs: mode qat: epochs of training (default: 1)
        train_learning_rate: mode qat: peak of the learning rate (default: 0.01)
        use_labels: mode qat: learn from labels too, not from the float network alone
        engine: auto: compare every engine with the simulation and time those that are right; a layer that an engine
            gets wrong is left in float where that makes the engine the fastest. Or one engine's name, to check it
        batch: with --engine: the batch size to check and to time at
        threads: with --engine: threads to time on
    """
    from tersor.data import load_data
    from tersor.pipeline import needing_inputs, quantize_graph, quantize_network, resolve, write

    training = _training(request, train_epochs, train_learning_rate, use_labels)
    target = writable(out, ".tersor")
    subject = resolve(model, weights=weights, num_classes=num_classes)
    if data is None and request.needs_inputs:
        raise SpecError(f"{needing_inputs(request)} needs calibration inputs; give --data")
    splits = None if data is None else load_data(data, num_calibration=request.num_calibration)
    if engine is not None and splits is None:
        raise SpecError("--engine compares engines on calibration inputs; give --data")
    if engine is None and (batch != 1 or threads is not None):
        raise SpecError("--batch and --threads do nothing without --engine")
    float_size, graph, choice = 0, None, None
    with contextlib.ExitStack() as trained:
        if training is not None:
            assert splits is not None
            module = subject.need_module("mode qat")
            asked = {"quantize": request.to_dict(), "training": training.to_dict()}
            run = trained.enter_context(
                keeping(
                    target, model, splits, {"weights": module}, fold_copies=fold_copies, **asked
                )
            )
            with watching() as watch:
                quantized = quantize_network(
                    module,
                    splits,
                    request,
                    training,
                    fold_copies=fold_copies,
                    checkpoint=run.checkpoint("training", {}),
                    on_progress=training_watch(watch, f"quantize {model}"),
                )
        else:
            graph = subject.graph(
                _shape(subject.artifact is not None, splits, input_shape), fold_copies=fold_copies
            )
            quantized = quantize_graph(graph, splits, request)
            float_size = graph.ByteSize()
        if engine is not None:
            assert splits is not None  # checked above
            where = (engine, batch, threads)
            quantized, choice = _chosen(quantized, graph, splits, request, where, output)
        whence = provenance(model, None if splits is None else splits.name)
        held = dc.replace(subject, module=quantized.module or subject.module)
        size = write(
            quantized.graph,
            target,
            plan=quantized.plan.after(() if subject.plan is None else (subject.plan,)),
            provenance=whence,
            state=held.state(quantized.graph),
        )
    answer = told(output, target, size, quantized.plan)
    shares = quantized.coverage.to_dict()
    macs, weights_covered = shares["macs_share"], shares["bytes_share"]
    say(
        output,
        f"covered: {macs:.1%} of the multiplications, {weights_covered:.1%} of the weight bytes",
    )
    if training is None and size >= float_size:
        say(output, f"not smaller: the float graph has {float_size:,} bytes")
    return {**answer, **shares, "choice": choice}


def _chosen(
    quantized: Quantized,
    graph: onnx.ModelProto | None,
    splits: Splits,
    request: Quantize,
    where: tuple[str, int, int | None],
    output: Output,
) -> tuple[Quantized, dict[str, Any]]:
    """The quantized form that the fastest right engine runs, and what was measured; the one given
    where no layer has to stay in float. `where` is engine, batch, threads."""
    from tersor.bench.choose import choose_engine
    from tersor.pipeline import quantize_graph

    engine, batch, threads = where
    built: dict[frozenset[str], Quantized] = {frozenset(): quantized}

    def requantize(_: str, left_float: frozenset[str]) -> onnx.ModelProto:
        if left_float not in built:
            wider = dc.replace(request, exclude=(*request.exclude, *sorted(left_float)))
            assert graph is not None, "only called where the float graph is at hand"
            built[left_float] = quantize_graph(graph, splits, wider)
        return built[left_float].graph

    inputs, what = images_to_compare(splits, batch)
    choice = choose_engine(
        {"quantized": quantized.graph},
        inputs,
        float_graph=graph,
        batch=batch,
        threads=threads,
        engines=None if engine == "auto" else (engine,),
        requantize=None if graph is None else requantize,
        inputs_are=what,
    )
    show_table(output, f"engines at batch {batch}", choice.COLUMNS, choice.rows())
    say(output, choice.verdict())
    if choice.chosen is None:
        raise EngineError(
            f"no engine tried computes what was quantized ({engine}); nothing was written: use other "
            "bits, or leave layers out with --exclude"
        )
    return built[frozenset(choice.chosen.left_float)], choice.to_dict()


def _training(
    request: Quantize, epochs: float | None, learning_rate: float | None, use_labels: bool
) -> Finetune | None:
    """The training of mode qat; no other mode takes its options."""
    if request.mode != "qat":
        given = {
            "--train-epochs": epochs is not None,
            "--train-learning-rate": learning_rate is not None,
            "--use-labels": use_labels,
        }
        if wrong := [flag for flag, is_given in given.items() if is_given]:
            raise SpecError(f"{wrong[0]} does nothing in mode {request.mode}; give --mode qat")
        return None
    from tersor.pipeline import QAT_TRAINING

    return dc.replace(
        QAT_TRAINING,
        epochs=QAT_TRAINING.epochs if epochs is None else epochs,
        learning_rate=QAT_TRAINING.learning_rate if learning_rate is None else learning_rate,
        distill=0.5 if use_labels else 1.0,
    )


def _shape(
    is_file: bool, splits: Any, input_shape: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    if input_shape is not None or splits is not None:
        return input_shape or splits.input_shape
    if is_file:
        return (0, 0, 0)  # the file's graph knows its own shape
    raise SpecError("the input's shape is not known; give --data, or --input-shape C H W")
