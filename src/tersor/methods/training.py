"""The loop behind `finetune`: its state, one step, and the run over all steps."""

from __future__ import annotations

import copy
import dataclasses as dc
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tersor.data.arrays import Splits
from tersor.errors import LostProcessError, ModelError, RunError
from tersor.graph.fold import fold_copies_
from tersor.methods.batches import Batches
from tersor.methods.checkpoint import ANEW, found_bytes, read_checkpoint, write_checkpoint
from tersor.methods.compiling import Forward
from tersor.methods.device import on_device, usable_precision
from tersor.methods.gradients import LargestGradients, add_subgradient_, slimmed_gammas
from tersor.methods.hints import Features, Place, Regressors, Tapped, hint_places
from tersor.methods.losses import training_loss
from tersor.methods.progress import Control, Progress
from tersor.methods.skeletons import Skeletons
from tersor.methods.steps import learning_rate, moving_average
from tersor.specs import Finetune

Masks = Mapping[str, torch.Tensor]
KEEP_EVERY = 50  # steps between copies of the state that a loss of NaN goes back to
MOST_FALLS = 3
RATE_AFTER_FALL = 0.25
ANSWER_DTYPE = torch.bfloat16  # of a teacher's answers that are kept


@dc.dataclass
class _State:
    """Everything a resumed training needs besides the modules."""

    step: int = 0
    seconds: float = 0.0
    rate_scale: float = 1.0
    falls: int = 0
    notes: list[str] = dc.field(default_factory=list)
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
        control: Callable[[nn.Module], Control] | None = None,
    ) -> None:
        self.student, self.spec, self.device = student, spec, device
        self.control = None if control is None else control(student)
        self.batches = Batches(splits, spec, device)
        self.num_steps = max(1, round(spec.epochs * self.batches.steps_per_epoch))
        self.together = self.batches.together
        usable = usable_precision(spec.precision, device)
        asked = self.together.all_can(usable == spec.precision)
        self.precision = spec.precision if asked else "float32"
        self.averaged = _average(student, spec)
        # Hooks come after the copy for the average: what is handed back has none.
        ours: list[Place] = []
        self.teacher: Tapped | None = None
        self.regressors: Regressors | None = None
        # The teacher's answers, by the step whose batch comes again.
        self._answers: dict[int, torch.Tensor] = {}
        if teacher is not None and spec.needs_teacher:
            ours = self._set_teacher(teacher, torch.zeros(2, *splits.input_shape))
        alone = self.together.processes.alone
        compiling = spec.compile if alone else "off"
        self.forward = Forward(Tapped(student, ours), compiling, type(student).__name__)
        if not alone and spec.compile == "on":
            self.forward.notes.append("of several processes each ran eagerly, not compiled")
        self.skeletons = Skeletons(student, spec.stripes) if spec.stripes else None
        self.averaged_skeletons = None
        if self.skeletons is not None:
            self.averaged_skeletons = _average(self.skeletons.skeletons, spec)
        self.gammas = slimmed_gammas(student) if spec.slimming else []
        trained = self._trained()
        self.masked = [(trained[name], mask.to(device)) for name, mask in masks.items()]
        decayed = [p for p in trained.values() if p.ndim > 1]
        self.largest = None
        if spec.gradient_topk:
            self.largest = LargestGradients(decayed, spec.gradient_topk, spec.momentum)
        self.optimizer = self._optimizer(decayed, [p for p in trained.values() if p.ndim <= 1])
        self.state = _State()
        self.stop = False
        self._interrupted: Callable[[], bool] = lambda: False
        self._kept: dict[str, Any] | None = None

    def _set_teacher(self, teacher: nn.Module, example: torch.Tensor) -> list[Place]:
        """Make the teacher ready, and with hints the regressors; returns where the student gives features."""
        teacher = copy.deepcopy(teacher)
        fold_copies_(teacher, example)
        teacher = on_device(teacher, self.device).eval()
        if not self.spec.hints:
            self.teacher = Tapped(teacher, [])
            return []
        network = copy.deepcopy(self.student).eval()  # its hooks go with it
        example = self.batches.at(0, whole=True)[0]
        ours, theirs = hint_places(network, teacher, self.spec.hint_layers, example)
        self.teacher = Tapped(teacher, theirs)
        with torch.no_grad():
            wanted, found = self.teacher(example)[1], Tapped(network, ours)(example)[1]
            self.regressors = Regressors(found, wanted, ours)
        return ours

    def _trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves in the student, by the names of the student's parameters."""
        parameters = dict(self.student.named_parameters())
        if self.skeletons is None:
            return parameters
        bare = {
            id(p): w for p, w in zip(self.skeletons.products, self.skeletons.weights, strict=True)
        }
        return {name: bare.get(id(p), p) for name, p in parameters.items()}

    def _optimizer(
        self, decayed: list[nn.Parameter], others: list[nn.Parameter]
    ) -> torch.optim.SGD:
        """SGD with Nesterov's momentum; weights decay, biases, norms and skeletons do not."""
        spec = self.spec
        if self.skeletons is not None:
            others = [*others, *self.skeletons.skeletons]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": spec.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        if self.regressors is not None and (maps := list(self.regressors.parameters())):
            groups.append({"params": maps, "weight_decay": spec.weight_decay})
        if self.largest is not None:
            groups[0]["momentum"] = 0.0  # it has its own
        return torch.optim.SGD(
            groups, lr=spec.learning_rate, momentum=spec.momentum, nesterov=spec.momentum > 0
        )

    def run(
        self,
        checkpoint: pathlib.Path | None,
        checkpoint_seconds: float,
        on_progress: Callable[[Progress], None] | None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Step until the end; checkpoints and progress on the way.

        Once `interrupted` says so the step is finished, the checkpoint written and KeyboardInterrupt raised.
        """
        self._interrupted, leads = interrupted, self.together.processes.leads
        saved = shown = started = time.perf_counter()
        losses: list[float] = []
        before, done, per_epoch = self.state.seconds, 0, self.batches.steps_per_epoch
        while self.state.step < self.num_steps:
            begun = time.perf_counter()
            loss = self.guarded_step()
            now = time.perf_counter()
            self.state.seconds = before + now - started
            if loss is None:
                continue
            step, done = self.state.step, done + 1
            self.forward.took(now - begun, self.num_steps - step)
            ends = step % per_epoch == 0
            if now - shown > 1 or step == self.num_steps or ends:
                losses.append(float(loss))
                shown = now
                rate = done * self.batches.size / (now - started)
                left = (self.num_steps - step) * self.batches.size / rate
                epoch = step / per_epoch
                if on_progress and leads:
                    on_progress(Progress(step, self.num_steps, epoch, losses[-1], rate, left))
                if ends:
                    mean = sum(losses) / len(losses)
                    self.state.history.append({"epoch": epoch, "loss": mean, "images_per_s": rate})
                    losses = []
            # All processes stop after the same step: the one they were told of it in.
            stop = interrupted() if self.together.processes.alone else self.stop
            due = stop or step == self.num_steps or now - saved > checkpoint_seconds
            if checkpoint is not None and leads and due:
                if self._sound(loss):
                    self.save(checkpoint)
                saved = time.perf_counter()
            if stop:
                raise KeyboardInterrupt

    def guarded_step(self) -> torch.Tensor | None:
        """One step and its loss; None where the loss was not finite and the state is an earlier one again.

        Every KEEP_EVERY steps the state is kept, once the loss of the step from it is finite. Then the rate
        is a quarter of what it was. Raises ModelError for a loss that is not finite from the start, or again
        and again.
        """
        step = self.state.step
        due = self._kept is None or step % KEEP_EVERY == 0
        candidate = copy.deepcopy(self.parts()) if due else None
        try:
            loss = self.step(step)
        except LostProcessError as error:
            raise LostProcessError(
                f"step {step + 1} of {self.num_steps}: {error} from the last checkpoint, which is good"
            ) from None
        # Elsewhere than on the CPU, reading the loss waits for it.
        read = due or self.device.type == "cpu" or step % 10 == 9 or step + 1 == self.num_steps
        if read and not math.isfinite(loss):
            self._go_back(float(loss))
            return None
        if candidate is not None and self._parameters_finite(candidate["student"].values()):
            self._kept = candidate
        self.state.step = step + 1
        return loss

    def _go_back(self, loss: float) -> None:
        step, state = self.state.step, self.state
        rate = state.rate_scale * learning_rate(self.spec, step, self.num_steps)
        said = f"the loss became {loss} at step {step + 1} of {self.num_steps} (learning rate {rate:.4g})"
        if self._kept is None:
            raise ModelError(
                f"{said}, before any step was made: the weights or the images are not finite, or too large"
            )
        if state.falls == MOST_FALLS:
            raise ModelError(
                f"{said}, though it went back {MOST_FALLS} times to the last finite state and on at a lower "
                "rate; lower the learning rate; the last checkpoint, where one is kept, is still good"
            )
        falls, notes = state.falls + 1, state.notes
        for name, put in self._restoring().items():
            put(copy.deepcopy(self._kept[name]))
        scale = RATE_AFTER_FALL**falls
        notes.append(
            f"{said}: back to step {self.state.step}, and from there {scale:.3g} of the recipe's rate"
        )
        self.state.falls, self.state.rate_scale, self.state.notes = falls, scale, notes

    def step(self, step: int) -> torch.Tensor:
        """One step of the optimizer; returns the loss before it, ()."""
        if self.control is not None:
            self.control.begin(step, self.num_steps)
        rate = self.state.rate_scale * learning_rate(self.spec, step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, labels = self.batches.at(step)
        # Dropout, as all else, depends on the seed and the step alone.
        torch.manual_seed(self.spec.seed * 15_485_863 + step)
        with self._autocast(), self.together.whole_batch():
            outputs, ours = self.forward(inputs)
        target, theirs = self._taught(step, inputs)
        read = labels if self.spec.needs_labels else None
        loss = training_loss(self.spec, outputs.float(), read, target)
        if self.regressors is not None:
            hints = self.regressors.distance(ours, theirs, self._of_whole)
            loss = (1 - self.spec.hints) * loss + self.spec.hints * hints
        self.optimizer.zero_grad(set_to_none=True)
        if not self.together.processes.alone:
            loss = (
                loss * self.together.share
            )  # a mean over this part: the sum of all is that of the batch
        loss.backward()  # type: ignore[no-untyped-call]
        loss, self.stop = self.together.exchange_(self._moved(), loss, self._interrupted())
        self._change_gradients()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, mask in self.masked:
                parameter.mul_(mask)
        if self.skeletons is not None and self.averaged_skeletons is not None:
            self.skeletons.fold_()
            self.averaged_skeletons.update_parameters(self.skeletons.skeletons)
        self.averaged.update_parameters(self.student)
        return loss.detach()

    def _taught(self, step: int, inputs: torch.Tensor) -> tuple[torch.Tensor | None, Features]:
        """The teacher's logits (N, classes) float32, where there is one, and features for the batch of `step`; the
        logits of a batch that comes again are kept."""
        number = self.batches.number(step)
        if self.teacher is None:
            return None, []
        if number in self._answers:
            return self._answers[number].float(), []
        with torch.no_grad(), self._autocast():
            target, theirs = self.teacher(inputs)
        if self.spec.views:  # as they are when they come again
            target = self._answers[number] = target.to(ANSWER_DTYPE)
        return target.float(), theirs

    def _moved(self) -> list[nn.Parameter]:
        """The parameters that backward gives gradients."""
        maps = [] if self.regressors is None else list(self.regressors.parameters())
        return [*self.student.parameters(), *maps]

    def _of_whole(self, squares: torch.Tensor) -> torch.Tensor:
        """Sums over this process's images to those of the batch, by this process's share."""
        return self.together.processes.sum_(squares) * self.together.share

    def _change_gradients(self) -> None:
        if self.skeletons is not None:
            self.skeletons.split_gradients_()
        add_subgradient_(self.gammas, self.spec.slimming)
        if self.largest is not None:
            for parameter, mask in self.masked:
                if parameter.grad is not None:
                    parameter.grad.mul_(mask)  # what is masked must not be chosen
            self.largest.compress_()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _sound(self, loss: torch.Tensor) -> bool:
        """False where a checkpoint would keep what the next finite check refuses."""
        return math.isfinite(loss) and self._parameters_finite(self.student.parameters())

    @staticmethod
    def _parameters_finite(tensors: Any) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in tensors if isinstance(t, torch.Tensor))

    @property
    def compiled(self) -> bool:
        """Whether steps run compiled."""
        return self.forward.compiled

    @property
    def notes(self) -> tuple[str, ...]:
        """What went otherwise than asked, in sentences."""
        return (*self.state.notes, *self.forward.notes)

    def importance(self) -> dict[str, torch.Tensor]:
        """|I| (O, kh, kw) of the moving average, float32 on the CPU, by the name of the convolution."""
        if self.skeletons is None or self.averaged_skeletons is None:
            return {}
        held = self.averaged_skeletons.module
        return {
            name: skeleton.detach().abs().cpu()
            for name, skeleton in zip(self.skeletons.names, held, strict=True)
        }

    def _modules(self) -> Iterator[tuple[str, nn.Module | Control]]:
        """All that has a state, besides the optimizer."""
        for name in (
            "student",
            "averaged",
            "regressors",
            "skeletons",
            "averaged_skeletons",
            "largest",
            "control",
        ):
            module = getattr(self, name)
            if module is not None:
                yield name, module

    def parts(self) -> dict[str, Any]:
        """The state of everything, by name; tensors are not copied."""
        parts: dict[str, Any] = {name: module.state_dict() for name, module in self._modules()}
        return {**parts, "optimizer": self.optimizer.state_dict(), "state": dc.asdict(self.state)}

    def _restoring(self) -> dict[str, Callable[[Any], object]]:
        """How each of `parts` is put back."""
        puts: dict[str, Callable[[Any], object]] = {
            name: module.load_state_dict for name, module in self._modules()
        }
        return {**puts, "optimizer": self.optimizer.load_state_dict, "state": self._put_state}

    def _put_state(self, held: dict[str, Any]) -> None:
        self.state = _State(**held)

    def save(self, path: pathlib.Path) -> None:
        """Write the checkpoint."""
        write_checkpoint(path, self.spec, self.parts())

    def restore(self, path: pathlib.Path) -> None:
        """Go on from a checkpoint, where there is one; one of another recipe, network or pruning is refused.

        Of several processes the leader reads it, and the others have it from there.
        """
        among = self.together.processes
        content = among.agreed(found_bytes(path) if among.leads else None)
        if content is None:
            return
        read_checkpoint(path, self.spec, self.device, self._restoring(), content)
        if any(bool(parameter[~mask].any()) for parameter, mask in self.masked):
            raise RunError(
                f"checkpoint {path} belongs to another pruning: weights that the masks remove are not "
                f"zero in it; {ANEW}"
            )


def _average(module: nn.Module, spec: Finetune) -> Any:
    """The moving average of a module's parameters and buffers."""
    return torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=moving_average(spec.ema_decay), use_buffers=True
    )
