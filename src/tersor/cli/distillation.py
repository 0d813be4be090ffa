"""The command that trains a smaller student on what a network answers."""

from __future__ import annotations

import dataclasses as dc
import pathlib
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, say, show_table, training_watch, watching
from tersor.cli.targets import keeping, provenance, writable
from tersor.errors import SpecError
from tersor.specs import Finetune

if TYPE_CHECKING:  # slow to import, and only named here
    from torch import nn

    from tersor.data.arrays import Splits

# From the teacher's outputs alone: no labels.
RECIPE = Finetune(epochs=30.0, distill=1.0, label_smoothing=0.0, ema_decay=0.995)
WIDTH = 0.5


@dc.dataclass(frozen=True)
class Student:
    """Who learns: the network itself, narrowed, or another.

    Attributes:
        student: NAME | torchvision:NAME | FILE.py:FUNCTION (default: the network itself, narrowed)
        student_weights: weights for the student to start from
        width: narrow the network: outputs of each layer times this (default: 0.5)
        multiple_of: narrowed: outputs are rounded up to multiples (default: 8)
        start: narrowed: weights to start from, random or teacher, the first channels of its own (default: random)
    """

    student: str | None = None
    student_weights: Weights = None
    width: float | None = None
    multiple_of: int | None = None
    start: str | None = None


STUDENT = Student()


def distill(
    model: Positional[Model],
    /,
    *,
    data: Data,
    out: str,
    weights: Weights = None,
    num_classes: int | None = None,
    learner: Student = STUDENT,
    recipe: Finetune = RECIPE,
    save_weights: str | None = None,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Train a smaller student to answer as a network does, without labels; a killed training goes on from OUT.steps.

    Args:
        out: the file to write (.tersor)
        num_classes: outputs of the network, and of a student by name (default: their own)
        save_weights: also write the student's weights (.safetensors), to train on
    """
    from tersor.data import load_data
    from tersor.methods.distill import distill as train_student
    from tersor.methods.distill import labelled_by
    from tersor.methods.finetune import training_accuracy
    from tersor.methods.restore import unheld
    from tersor.models import save_weights as save_state
    from tersor.pipeline import deployment_graph, resolve, write

    target = writable(out, ".tersor")
    kept = None if save_weights is None else writable(save_weights, ".safetensors")
    subject = resolve(model, weights=weights, num_classes=num_classes, seed=recipe.seed)
    teacher = subject.need_module("distillation")
    splits = load_data(data)
    name, student = _student(model, teacher, splits, learner, num_classes, recipe.seed)
    networks = {"weights": teacher, "student": student}
    with keeping(target, model, splits, networks, distill=recipe.to_dict()) as run:
        with watching() as watch:
            trained = train_student(
                teacher,
                student,
                splits,
                recipe,
                checkpoint=run.checkpoint("training", {}),
                on_progress=training_watch(watch, f"distill {model}"),
            )
        graph = deployment_graph(trained.module, splits.input_shape)
        whence = provenance(name, splits.name, teacher=model)
        size = write(graph, target, provenance=whence, state=unheld(trained.module, graph))
        if kept is not None:
            save_state(trained.module, kept)
    held, labels = splits.validation, splits.validation.labels
    answer = {
        "teacher": model,
        "student": name,
        "data": splits.name,
        "recipe": recipe.to_dict(),
        "teacher_parameters": _parameters(teacher),
        "student_parameters": _parameters(trained.module),
        "agreement": training_accuracy(trained.module, splits, labelled_by(teacher, splits, held)),
        "teacher_accuracy": None if labels is None else training_accuracy(teacher, splits, held),
        "student_accuracy": None
        if labels is None
        else training_accuracy(trained.module, splits, held),
        "num_samples": len(held),
        "seconds": round(trained.seconds, 1),
        "precision": trained.precision,
        "compiled": trained.compiled,
        "device": trained.device,
        "size_bytes": size,
        "out": str(target),
    }
    _show(output, answer)
    return answer


def _student(
    model: str,
    teacher: nn.Module,
    splits: Splits,
    asked: Student,
    num_classes: int | None,
    seed: int,
) -> tuple[str, nn.Module]:
    """The name of the student, and itself before it learns."""
    from tersor.models import load_model, load_weights_
    from tersor.models.narrow import narrowed

    if asked.student is not None:
        for flag in ("width", "multiple_of", "start"):
            if getattr(asked, flag) is not None:
                raise SpecError(
                    f"--{flag.replace('_', '-')} narrows the network itself; leave it out with --student"
                )
        weights = asked.student_weights
        student = load_model(asked.student, weights=weights, num_classes=num_classes, seed=seed)
        return asked.student, student
    width = WIDTH if asked.width is None else asked.width
    student = narrowed(
        teacher,
        width,
        splits.input_shape,
        multiple_of=8 if asked.multiple_of is None else asked.multiple_of,
        start=asked.start or "random",
        seed=seed,
    )
    if asked.student_weights is not None:
        load_weights_(student, asked.student_weights)
    return f"{model} narrowed to {width:g}", student


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _show(output: Output, answer: dict[str, Any]) -> None:
    percent = {
        key: None if answer[key] is None else 100 * answer[key]
        for key in ("teacher_accuracy", "student_accuracy")
    }
    show_table(
        output,
        f"validation, n = {answer['num_samples']}, {answer['data']}",
        ["network", "parameters", "accuracy %"],
        [
            [answer["teacher"], answer["teacher_parameters"], percent["teacher_accuracy"]],
            [answer["student"], answer["student_parameters"], percent["student_accuracy"]],
        ],
    )
    say(
        output,
        f"the student answers as the teacher does on {answer['agreement']:.2%}; wrote "
        f"{pathlib.Path(answer['out'])}, {answer['size_bytes']:,} bytes",
    )
