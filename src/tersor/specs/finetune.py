"""How a network is trained."""

from __future__ import annotations

import dataclasses as dc
import math

from tersor.specs.spec import Spec, one_of, require


@dc.dataclass(frozen=True)
class Finetune(Spec, kind="finetune"):
    """One training loop for training, fine-tuning and distillation.

    `learning_rate` is the peak of a one-cycle schedule: it rises over the share `warmup` of the
    steps and falls to zero by a half cosine. `small_epochs` epochs at the start run on images of
    `small_size` pixels (0: none), which costs less. `distill` is the share of the loss that comes from a
    teacher's logits, at `temperature`; at 1 no labels are used.
    `precision` "bf16" is autocast where the processor has it, else float32, and is reported.
    `compile` "auto" times both forms when the run is long enough to repay compiling.
    """

    epochs: float = 10.0
    learning_rate: float = 0.1
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    warmup: float = 0.2
    ema_decay: float = 0.99
    small_size: int = 0
    small_epochs: float = 0.0
    augment: str = "flip_crop"
    distill: float = 0.0
    temperature: float = 2.0
    precision: str = "bf16"
    compile: str = "auto"
    seed: int = 0

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
        for name in ("momentum", "label_smoothing", "warmup", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"finetune.{name} must be in [0, 1), got {value!r}")
        require(0 <= self.distill <= 1, f"finetune.distill must be in [0, 1], got {self.distill!r}")
        require(
            0 <= self.small_epochs <= self.epochs,
            f"finetune.small_epochs must be between 0 and epochs ({self.epochs}), got "
            f"{self.small_epochs!r}",
        )
        require(
            self.small_size >= 0,
            f"finetune.small_size must be 0 (none) or more, got {self.small_size!r}",
        )
        require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            f"finetune.weight_decay must be finite and 0 or more, got {self.weight_decay!r}",
        )
        one_of("finetune.augment", self.augment, ("none", "flip_crop", "crop"))
        one_of("finetune.precision", self.precision, ("bf16", "float32"))
        one_of("finetune.compile", self.compile, ("auto", "on", "off"))
