"""The one training loop: training, fine-tuning with kept masks, and distillation (a loss)."""

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
from torch.nn import functional
from torch.nn.utils import parametrize

from tersor.data.arrays import ArraySet, Splits
from tersor.errors import DataError, ModelError, RunError
from tersor.graph.fold import fold_copies_, unfold_copies_
from tersor.methods.steps import augmented, learning_rate, moving_average
from tersor.specs import Finetune

Masks = Mapping[str, torch.Tensor]
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


@dc.dataclass(frozen=True)
class Trained:
    """The trained module and how it went. `history` holds one dict per epoch (epoch, loss, images_per_s)."""

    module: nn.Module
    history: tuple[dict[str, float], ...]
    precision: str
    compiled: bool
    device: str
    seconds: float


@dc.dataclass
class _State:
    """Everything a resumed training needs besides the modules."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = dc.field(default_factory=list)


def finetune(
    module: nn.Module,
    splits: Splits,
    spec: Finetune,
    *,
    masks: Masks | None = None,
    teacher: nn.Module | None = None,
    checkpoint: pathlib.Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train a copy of `module` on splits.train and return its exponential moving average, in eval mode.

    `masks` (parameter name -> bool, True = keep) stay as they are: a pruned weight never comes back.
    `teacher` gives the logits for spec.distill. `checkpoint` names a file written at most
    `checkpoint_seconds` apart; when it exists the training goes on from it, and it is removed by the caller.
    The order of images and their augmentation depend on the seed and the step alone, so a resumed run sees
    the same batches. Raises DataError for missing labels, ModelError for a loss that is not finite.
    """
    if spec.distill < 1 and splits.train.labels is None:
        raise DataError("training with labels asked for, but the data has none; use distill=1.0")
    if spec.distill > 0 and teacher is None:
        raise ModelError(f"distill={spec.distill} needs a teacher, and none was given")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = copy.deepcopy(module)
    example = torch.zeros(2, *splits.input_shape)
    _check_fit(student, splits, example, masks or {})
    # Trained with equal copies folded: VGG-16's first linear layer is 49 times cheaper and stays exact.
    # A weight that is computed, as fake quantization does, cannot be replaced: its caller folds before.
    computed = any(map(parametrize.is_parametrized, student.modules()))
    folded, small_masks = ([], masks or {}) if computed else fold_copies_(student, example, masks)
    student = on_device(student, device).train()
    loop = _Loop(student, splits, spec, small_masks, teacher, device)
    if checkpoint is not None and checkpoint.exists():
        loop.restore(checkpoint)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loop.run(checkpoint, checkpoint_seconds, on_progress)
    averaged = off_device(loop.averaged.module).eval()
    unfold_copies_(averaged, folded, masks)
    for parameter in averaged.parameters():
        parameter.grad = None
    return Trained(
        averaged,
        tuple(loop.state.history),
        loop.precision,
        loop.compiled,
        device.type,
        loop.state.seconds,
    )


def _check_fit(module: nn.Module, splits: Splits, example: torch.Tensor, masks: Masks) -> None:
    """Refuse data and masks that belong to another network; leaves `module` in eval mode."""
    try:
        with torch.no_grad():
            shape = tuple(module.eval()(example).shape)
    except RuntimeError as error:
        raise ModelError(
            f"{type(module).__name__} cannot take inputs of {splits.input_shape}: {error}"
        ) from None
    if len(shape) != 2:
        raise ModelError(
            f"{type(module).__name__} gives outputs of shape {shape}; expected (N, classes)"
        )
    labels = splits.train.labels
    if labels is not None and not 0 <= labels.min() <= labels.max() < shape[1]:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(
            f"{splits.name}: label {wrong} is outside the network's {shape[1]} outputs; give "
            f"num_classes={splits.num_classes}"
        )
    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ModelError(
                f"the mask {name!r} of shape {tuple(mask.shape)} fits no parameter of "
                f"{type(module).__name__}; it belongs to another network"
            )


class _Loop:
    """The state of one training: modules, optimizer, position."""

    def __init__(
        self,
        student: nn.Module,
        splits: Splits,
        spec: Finetune,
        masks: Masks,
        teacher: nn.Module | None,
        device: torch.device,
    ) -> None:
        self.student, self.spec, self.device, self.splits = student, spec, device, splits
        self.teacher = None
        if teacher is not None and spec.distill > 0:
            self.teacher = copy.deepcopy(teacher)
            fold_copies_(self.teacher, torch.zeros(2, *splits.input_shape))
            self.teacher = on_device(self.teacher, device).eval()
        parameters = dict(student.named_parameters())
        self.masked = [(parameters[name], mask.to(device)) for name, mask in masks.items()]
        decayed = [p for p in parameters.values() if p.ndim > 1]
        others = [p for p in parameters.values() if p.ndim <= 1]
        self.optimizer = torch.optim.SGD(
            [
                {"params": decayed, "weight_decay": spec.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=spec.learning_rate,
            momentum=spec.momentum,
            nesterov=spec.momentum > 0,
        )
        self.averaged = torch.optim.swa_utils.AveragedModel(
            student,
            multi_avg_fn=moving_average(spec.ema_decay),
            use_buffers=True,
        )
        self.precision = usable_precision(spec.precision, device)
        self.compiled = False
        self.state = _State()
        self.size = len(splits.train)
        self.batch = min(spec.batch_size, self.size)
        self.steps_per_epoch = self.size // self.batch
        self.num_steps = max(1, round(spec.epochs * self.steps_per_epoch))
        self.images = torch.from_numpy(splits.train.images)
        labels = splits.train.labels
        self.labels = None if labels is None else torch.from_numpy(labels)

    def run(
        self,
        checkpoint: pathlib.Path | None,
        checkpoint_seconds: float,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        """Step until the end; checkpoints and progress on the way."""
        forward: Callable[[torch.Tensor], torch.Tensor] = self.student
        saved = shown = started = time.perf_counter()
        first, losses = self.state.step, [0.0]
        before = self.state.seconds
        for step in range(first, self.num_steps):
            if step == first + 3 and self._compiling_pays(time.perf_counter() - started, 3):
                forward, self.compiled = torch.compile(self.student), True
            loss = self._step(step, forward)
            now = time.perf_counter()
            self.state.step = step + 1
            self.state.seconds = before + now - started
            if (
                now - shown > 1
                or step + 1 == self.num_steps
                or (step + 1) % self.steps_per_epoch == 0
            ):
                losses.append(self._finite(loss, step))
                shown = now
                rate = (step + 1 - first) * self.batch / (now - started)
                left = (self.num_steps - step - 1) * self.batch / rate
                epoch = (step + 1) / self.steps_per_epoch
                if on_progress:
                    on_progress(Progress(step + 1, self.num_steps, epoch, losses[-1], rate, left))
                if (step + 1) % self.steps_per_epoch == 0:
                    mean = sum(losses[1:]) / len(losses[1:])
                    self.state.history.append({"epoch": epoch, "loss": mean, "images_per_s": rate})
                    losses = [0.0]
            if checkpoint is not None and now - saved > checkpoint_seconds and self._sound(loss):
                self.save(checkpoint)
                saved = time.perf_counter()

    def _step(self, step: int, forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, step, self.num_steps)
        inputs, labels = self._batch(step)
        # Dropout, as all else, depends on the seed and the step alone.
        torch.manual_seed(self.spec.seed * 15_485_863 + step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = forward(inputs).float()
        loss = self._loss(logits, inputs, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for parameter, mask in self.masked:
                parameter.mul_(mask)
        self.averaged.update_parameters(self.student)
        return loss.detach()

    def _loss(
        self, logits: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        spec = self.spec
        loss = torch.zeros((), device=self.device)
        if labels is not None and spec.distill < 1:
            task = functional.cross_entropy(logits, labels, label_smoothing=spec.label_smoothing)
            loss = loss + (1 - spec.distill) * task
        if self.teacher is not None:
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
            ):
                target = self.teacher(inputs).float()
            # Hinton 2015: soft targets at temperature T, scaled by T^2 to keep the gradient's size.
            soft = functional.kl_div(
                functional.log_softmax(logits / spec.temperature, 1),
                functional.log_softmax(target / spec.temperature, 1),
                reduction="batchmean",
                log_target=True,
            )
            loss = loss + spec.distill * spec.temperature**2 * soft
        return loss

    def _batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = torch.randperm(
            self.size, generator=torch.Generator().manual_seed(self.spec.seed * 1_000_003 + epoch)
        )
        index = order[position * self.batch : (position + 1) * self.batch]
        pixels = torch.from_numpy(self.splits.normalise(self.images[index].numpy()))
        generator = torch.Generator().manual_seed(self.spec.seed * 7_368_787 + step)
        pixels = augmented(pixels, self.spec.augment, generator)
        if self.spec.small_size and step < self.spec.small_epochs * self.steps_per_epoch:
            size = (self.spec.small_size, self.spec.small_size)
            pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        inputs = pixels.to(self.device, memory_format=torch.channels_last)
        labels = None if self.labels is None else self.labels[index].to(self.device)
        return inputs, labels

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
        """Write the checkpoint beside its place and rename it."""
        temporary = path.with_name(f".{path.name}.part")
        content = {
            "spec": repr(self.spec),
            "student": self.student.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": dc.asdict(self.state),
        }
        try:
            try:
                torch.save(content, temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            raise RunError(f"checkpoint {path} cannot be written: {error}") from None

    def restore(self, path: pathlib.Path) -> None:
        """Go on from a checkpoint; one of another recipe, network or pruning is refused."""
        try:
            content: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise RunError(
                f"checkpoint {path} cannot be read ({error}); remove it to start anew"
            ) from None
        parts = {"spec", "student", "averaged", "optimizer", "state"}
        if not isinstance(content, dict) or parts - set(content):
            raise RunError(f"{path} is not a checkpoint of a training; remove it to start anew")
        if content["spec"] != repr(self.spec):
            raise RunError(
                f"checkpoint {path} belongs to another recipe: {content['spec']}, asked for {self.spec!r}; "
                "remove it to start anew"
            )
        try:
            self.student.load_state_dict(content["student"])
            self.averaged.load_state_dict(content["averaged"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.state = _State(**content["state"])
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"checkpoint {path} belongs to another network ({error}); remove it to start anew"
            ) from None
        if any(bool(parameter[~mask].any()) for parameter, mask in self.masked):
            raise RunError(
                f"checkpoint {path} belongs to another pruning: weights that the masks remove are not "
                "zero in it; remove it to start anew"
            )


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` moved to `device` in channels_last, the layout in which CPU convolutions are fastest."""
    return module.to(device).to(memory_format=torch.channels_last)


def off_device(module: nn.Module) -> nn.Module:
    """`module` moved to the CPU in the ordinary layout."""
    return module.to("cpu").to(memory_format=torch.contiguous_format)


def usable_precision(asked: str, device: torch.device) -> str:
    """`asked`, or float32 where this processor has no instructions for bfloat16."""
    if asked == "bf16" and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return "float32"
    return asked


def training_accuracy(
    module: nn.Module, splits: Splits, part: ArraySet, batch_size: int = 500
) -> float:
    """Top-1 accuracy in training's precision, for watching only: published figures come from an engine."""
    device = next(module.parameters()).device
    precision = usable_precision("bf16", device)
    right = 0
    assert part.labels is not None
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for start, inputs in zip(
            range(0, len(part), batch_size), splits.batches(part, batch_size), strict=True
        ):
            batch = torch.from_numpy(inputs).to(device, memory_format=torch.channels_last)
            guess = module(batch).argmax(1).cpu().numpy()
            right += int((guess == part.labels[start : start + batch_size]).sum())
    return right / len(part)
