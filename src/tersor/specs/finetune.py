"""How a network is trained."""

from __future__ import annotations

import dataclasses as dc
import math

from tersor.specs.spec import Spec, one_of, require

LEARNING_SCHEDULES = ("one_cycle", "rewind", "cosine", "constant")
AUGMENTATIONS = ("none", "crop", "flip_crop")
DEFAULT_WARMUP = 0.2


@dc.dataclass(frozen=True)
class Finetune(Spec, kind="finetune"):
    """One training loop for training, fine-tuning and distillation.

    `learning_rate` is the peak of `schedule`. one_cycle: it rises over the share `warmup` of the steps
    and falls to zero by a half cosine; rewind: the last `epochs` of a one-cycle training of
    `original_epochs` once more (learning-rate rewinding, Renda 2020); cosine: from the peak to zero;
    constant. `small_epochs` epochs at the start run on images of `small_size` pixels (0: none), which
    costs less.
    `cutout` is the side of a square, as a share of the image's, that each image is without, anywhere (DeVries 2017).
    `distill` is the share of the loss that comes from a teacher's logits, at `temperature`; at 1 no
    labels are used. `hints` is the share that comes from matching the teacher's features inside
    (FitNets, Romero 2015), and distill and labels share the rest; at `hint_layers`, each NAME or
    STUDENT=TEACHER, by default at the inputs of strided stages.
    `slimming` times the sum of |gamma| of batch norms is added to the loss (Liu 2017), `stripes` times
    the sum of |I| of filter skeletons (Meng 2020). `gradient_topk` is the share of each weight's gradient
    that a step applies, the largest; the rest waits (Lin 2018); 0: all of it.
    `eval_mode`: layers run as they will be used, batch norms by the statistics they have and nothing
    dropped. For a network that is near its goal, to which the batches' own statistics are only noise.
    `views`: the batches of the first so many epochs, images and augmentation, come again and again, and a teacher
    answers each of them once (0: every epoch is new). A teacher then costs little however long the training
    (Shen 2022, "A fast knowledge distillation framework"); its answers, kept in bfloat16, take 2 bytes times images,
    classes and views.
    `precision` "bf16" is autocast where the processor has it, else float32, and is reported.
    `compile` "auto" times both forms when the run is long enough to repay compiling.
    """

    epochs: float = 10.0
    learning_rate: float = 0.1
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    warmup: float = DEFAULT_WARMUP
    ema_decay: float = 0.99
    small_size: int = 0
    small_epochs: float = 0.0
    augment: str = "flip_crop"
    cutout: float = 0.0
    distill: float = 0.0
    temperature: float = 2.0
    precision: str = "bf16"
    compile: str = "auto"
    seed: int = 0
    schedule: str = "one_cycle"
    original_epochs: float = 0.0
    hints: float = 0.0
    hint_layers: tuple[str, ...] = ()
    slimming: float = 0.0
    stripes: float = 0.0
    gradient_topk: float = 0.0
    eval_mode: bool = False
    views: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "learning_rate", "temperature"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value > 0,
                f"finetune.{name} must be finite and positive, got {value!r}",
            )
        require(
            self.batch_size >= 2, f"finetune.batch_size must be 2 or more, got {self.batch_size}"
        )
        for name in (
            "momentum",
            "label_smoothing",
            "warmup",
            "ema_decay",
            "cutout",
            "gradient_topk",
        ):
            value = getattr(self, name)
            require(0 <= value < 1, f"finetune.{name} must be in [0, 1), got {value!r}")
        for name in ("distill", "hints"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"finetune.{name} must be in [0, 1], got {value!r}")
        require(
            0 <= self.small_epochs <= self.epochs,
            f"finetune.small_epochs must be between 0 and epochs ({self.epochs}), got "
            f"{self.small_epochs!r}",
        )
        require(
            isinstance(self.views, int) and self.views >= 0,
            f"finetune.views must be 0 (every epoch is new) or more, got {self.views!r}",
        )
        require(
            self.small_size >= 0,
            f"finetune.small_size must be 0 (none) or more, got {self.small_size!r}",
        )
        for name in ("weight_decay", "original_epochs", "slimming", "stripes"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= 0,
                f"finetune.{name} must be finite and 0 or more, got {value!r}",
            )
        one_of("finetune.augment", self.augment, AUGMENTATIONS)
        one_of("finetune.precision", self.precision, ("bf16", "float32"))
        one_of("finetune.compile", self.compile, ("auto", "on", "off"))
        one_of("finetune.schedule", self.schedule, LEARNING_SCHEDULES)
        require(
            isinstance(self.eval_mode, bool),
            f"finetune.eval_mode must be true or false, got {self.eval_mode!r}",
        )
        require(
            isinstance(self.hint_layers, tuple)
            and all(isinstance(name, str) and name for name in self.hint_layers),
            f"finetune.hint_layers must be names of layers, got {self.hint_layers!r}",
        )
        _refuse_contradictions(self)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is run."""
        return self.distill > 0 or self.hints > 0

    @property
    def needs_labels(self) -> bool:
        """Whether labels are read."""
        return self.distill < 1 and self.hints < 1


def _refuse_contradictions(spec: Finetune) -> None:
    """Combinations in which an option would be ignored or cannot mean anything, each with its reason."""
    if spec.schedule == "rewind":
        require(
            spec.original_epochs >= spec.epochs,
            "finetune.schedule rewind replays the last epochs of another training: give its length as "
            f"original_epochs, at least epochs ({spec.epochs}), got {spec.original_epochs!r}",
        )
    else:
        require(
            spec.original_epochs == 0,
            f"finetune.original_epochs is for schedule rewind, got {spec.original_epochs!r} with "
            f"{spec.schedule}",
        )
    require(
        spec.schedule in ("one_cycle", "rewind") or spec.warmup in (0.0, DEFAULT_WARMUP),
        f"finetune.warmup is for schedule one_cycle or rewind; {spec.schedule} starts at its peak, got "
        f"warmup={spec.warmup!r}",
    )
    require(
        spec.views == 0 or (spec.hints == 0 and spec.small_epochs == 0),
        "finetune.views keeps a teacher's answers for whole images, not its features for hints nor answers for "
        f"small_epochs, got views={spec.views!r} with hints={spec.hints!r}, small_epochs={spec.small_epochs!r}",
    )
    require(
        not spec.hint_layers or spec.hints > 0,
        f"finetune.hint_layers {spec.hint_layers!r} without hints: give the share of the loss they have",
    )
    require(
        spec.hints < 1 or spec.distill == 0,
        f"finetune.hints 1 leaves no share of the loss for distill, got distill={spec.distill!r}; lower "
        "hints",
    )
