"""The loop behind `finetune`: its state, one step, and the run over all steps."""

from __future__ import annotations

import copy
import dataclasses as dc
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tersor.data.arrays import Splits
from tersor.errors import ModelError, RunError
from tersor.graph.fold import fold_copies_
from tersor.methods.batches import Batches
from tersor.methods.checkpoint import ANEW, read_checkpoint, write_checkpoint
from tersor.methods.device import on_device, usable_precision
from tersor.methods.losses import training_loss
from tersor.methods.steps import learning_rate, moving_average
from tersor.specs import Finetune

Masks = Mapping[str, torch.Tensor]
Forward = Callable[[torch.Tensor], torch.Tensor]
COMPILE_PAYS_AFTER_S = (
    900.0  # a compiled step is at most a seventh faster; compiling takes about a minute
)


@dc.dataclass(frozen=True)
class Progress:
    """Where a training stands; handed to the caller about once a second."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    images_per_s: float
    left_s: float

    def __str__(self) -> str:
        rate = f"{self.images_per_s:.0f} images/s, {self.left_s:.0f} s left"
        return f"epoch {self.epoch:.1f}, loss {self.loss:.3f}, {rate}"


@dc.dataclass
class _State:
    """Everything a resumed training needs besides the modules."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = dc.field(default_factory=list)


class Loop:
    """One training: modules, optimizer, position."""

    def __init__(
        self,
        student: nn.Module,
        splits: Splits,
        spec: Finetune,
        masks: Masks,
        teacher: nn.Module | None,
        device: torch.device,
    ) -> None:
        self.student, self.spec, self.device = student, spec, device
        self.batches = Batches(splits, spec, device)
        self.num_steps = max(1, round(spec.epochs * self.batches.steps_per_epoch))
        self.teacher = None
        if teacher is not None and spec.distill > 0:
            self.teacher = copy.deepcopy(teacher)
            fold_copies_(self.teacher, torch.zeros(2, *splits.input_shape))
            self.teacher = on_device(self.teacher, device).eval()
        parameters = dict(student.named_parameters())
        self.masked = [(parameters[name], mask.to(device)) for name, mask in masks.items()]
        self.optimizer = _optimizer(student, spec)
        self.averaged = torch.optim.swa_utils.AveragedModel(
            student,
            multi_avg_fn=moving_average(spec.ema_decay),
            use_buffers=True,
        )
        self.precision = usable_precision(spec.precision, device)
        self.compiled = False
        self.state = _State()

    def run(
        self,
        checkpoint: pathlib.Path | None,
        checkpoint_seconds: float,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        """Step until the end; checkpoints and progress on the way."""
        forward: Forward = self.student
        saved = shown = started = time.perf_counter()
        first, losses = self.state.step, [0.0]
        before = self.state.seconds
        per_epoch = self.batches.steps_per_epoch
        for step in range(first, self.num_steps):
            if step == first + 3 and self._compiling_pays(time.perf_counter() - started, 3):
                forward, self.compiled = torch.compile(self.student), True
            loss = self.step(step, forward)
            now = time.perf_counter()
            self.state.step = step + 1
            self.state.seconds = before + now - started
            ends = (step + 1) % per_epoch == 0
            if now - shown > 1 or step + 1 == self.num_steps or ends:
                losses.append(self._finite(loss, step))
                shown = now
                rate = (step + 1 - first) * self.batches.size / (now - started)
                left = (self.num_steps - step - 1) * self.batches.size / rate
                epoch = (step + 1) / per_epoch
                if on_progress:
                    on_progress(Progress(step + 1, self.num_steps, epoch, losses[-1], rate, left))
                if ends:
                    mean = sum(losses[1:]) / len(losses[1:])
                    self.state.history.append({"epoch": epoch, "loss": mean, "images_per_s": rate})
                    losses = [0.0]
            if checkpoint is not None and now - saved > checkpoint_seconds and self._sound(loss):
                self.save(checkpoint)
                saved = time.perf_counter()

    def step(self, step: int, forward: Forward) -> torch.Tensor:
        """One step of the optimizer; returns the loss before it, ()."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, step, self.num_steps)
        inputs, labels = self.batches.at(step)
        # Dropout, as all else, depends on the seed and the step alone.
        torch.manual_seed(self.spec.seed * 15_485_863 + step)
        with self._autocast():
            logits = forward(inputs).float()
        target = None
        if self.teacher is not None:
            with torch.no_grad(), self._autocast():
                target = self.teacher(inputs).float()
        loss = training_loss(self.spec, logits, labels, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for parameter, mask in self.masked:
                parameter.mul_(mask)
        self.averaged.update_parameters(self.student)
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _compiling_pays(self, seconds: float, steps: int) -> bool:
        if self.spec.compile != "auto":
            return self.spec.compile == "on"
        # Compiled linear layers as large as VGG-16's were slower than eager ones on CPUs (measured).
        heavy = any(p.numel() > 4_000_000 for p in self.student.parameters() if p.ndim == 2)
        return not heavy and seconds / steps * self.num_steps > COMPILE_PAYS_AFTER_S

    def _finite(self, loss: torch.Tensor, step: int) -> float:
        value = float(loss)
        if not math.isfinite(value):
            rate = learning_rate(self.spec, step, self.num_steps)
            raise ModelError(
                f"the loss became {value} at step {step + 1} of {self.num_steps} (learning rate {rate:.4g}); "
                "lower the learning rate; the last checkpoint, where one is kept, is still good"
            )
        return value

    def _sound(self, loss: torch.Tensor) -> bool:
        """False where a checkpoint would keep what the next finite check refuses."""
        parameters = self.student.parameters()
        return math.isfinite(loss) and all(bool(torch.isfinite(p).all()) for p in parameters)

    def save(self, path: pathlib.Path) -> None:
        """Write the checkpoint."""
        parts = {
            "student": self.student.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": dc.asdict(self.state),
        }
        write_checkpoint(path, self.spec, parts)

    def restore(self, path: pathlib.Path) -> None:
        """Go on from a checkpoint; one of another recipe, network or pruning is refused."""
        restore: dict[str, Callable[[Any], object]] = {
            "student": self.student.load_state_dict,
            "averaged": self.averaged.load_state_dict,
            "optimizer": self.optimizer.load_state_dict,
            "state": self._put_state,
        }
        read_checkpoint(path, self.spec, self.device, restore)
        if any(bool(parameter[~mask].any()) for parameter, mask in self.masked):
            raise RunError(
                f"checkpoint {path} belongs to another pruning: weights that the masks remove are not "
                f"zero in it; {ANEW}"
            )

    def _put_state(self, held: dict[str, Any]) -> None:
        self.state = _State(**held)


def _optimizer(student: nn.Module, spec: Finetune) -> torch.optim.SGD:
    """SGD with Nesterov's momentum; weights decay, biases and norms do not."""
    parameters = list(student.parameters())
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": spec.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups, lr=spec.learning_rate, momentum=spec.momentum, nesterov=spec.momentum > 0
    )
