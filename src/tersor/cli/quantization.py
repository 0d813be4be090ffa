"""The command that quantizes: post-training in every kind, or with training."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, say, training_watch, watching
from tersor.cli.targets import told, writable
from tersor.errors import SpecError
from tersor.specs import Finetune, Quantize


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
    """
    from tersor.data import load_data
    from tersor.pipeline import needing_inputs, quantize_graph, quantize_network, resolve, write

    training = _training(request, train_epochs, train_learning_rate, use_labels)
    target = writable(out, ".tersor")
    subject = resolve(model, weights=weights, num_classes=num_classes)
    if data is None and request.needs_inputs:
        raise SpecError(f"{needing_inputs(request)} needs calibration inputs; give --data")
    splits = None if data is None else load_data(data, num_calibration=request.num_calibration)
    float_size = 0
    if training is not None:
        assert splits is not None
        module = subject.need_module("mode qat")
        with watching() as watch:
            quantized = quantize_network(
                module,
                splits,
                request,
                training,
                fold_copies=fold_copies,
                on_progress=training_watch(watch, f"quantize {model}"),
            )
    else:
        graph = subject.graph(
            _shape(subject.artifact is not None, splits, input_shape), fold_copies=fold_copies
        )
        quantized = quantize_graph(graph, splits, request)
        float_size = graph.ByteSize()
    provenance = {"model": model, "data": None if splits is None else splits.name}
    size = write(quantized.graph, target, plan=quantized.plan, provenance=provenance)
    answer = told(output, target, size, quantized.plan)
    shares = quantized.coverage.to_dict()
    macs, weights_covered = shares["macs_share"], shares["bytes_share"]
    say(
        output,
        f"covered: {macs:.1%} of the multiplications, {weights_covered:.1%} of the weight bytes",
    )
    if training is None and size >= float_size:
        say(output, f"not smaller: the float graph has {float_size:,} bytes")
    return {**answer, **shares}


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
