"""Networks of a search learn: from the original's answers, or where they may from labels and then from themselves."""

from __future__ import annotations

import copy
import dataclasses as dc
import pathlib

import onnx
from torch import nn

from tersor.engines import open_session
from tersor.methods.checkpoint import read_state_, remove_checkpoints, state_bytes, write_state
from tersor.methods.device import training_device
from tersor.methods.finetune import finetune
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.methods.teachers import EngineTeacher
from tersor.ondemand.effort import Watch
from tersor.ondemand.kept import Kept
from tersor.ondemand.network import Network, Wanted, batches_of, judged, rounded
from tersor.ondemand.original import Original
from tersor.runs.directory import CHECKPOINT
from tersor.specs import Finetune

# Of ResNet-18 at 65 % of its MACs, fitted, after 100 steps: KL 0.0166 to 0.0114 nats at rate 0.01, 0.0117 at 0.003, but
# 0.13 at 0.02; 0.0125 at temperature 2; and 0.0143 with batch norms on the batches' own statistics. What rate is too
# high differs from network to network, and is tried.
TRAINING = Finetune(
    learning_rate=0.02,
    batch_size=128,
    weight_decay=1e-4,
    label_smoothing=0.0,
    distill=1.0,
    temperature=4.0,
    ema_decay=0.995,
    compile="off",
    eval_mode=True,
)
NEAR_KL = 0.05  # nats from the original after the fit: such networks learn with what they normalise by held still
FAR = dc.replace(TRAINING, learning_rate=0.05, weight_decay=5e-4, eval_mode=False)
# Where labels may be learnt from, networks are not held to answers of an original that could know more: trained
# for long they pass it. The teacher, dearer than a small student, is spared.
LABELLED = dc.replace(TRAINING, learning_rate=0.1, weight_decay=5e-4, distill=0.0, eval_mode=False)
# Then again from the labels and what it knows by then (born-again networks: Furlanello 2018, section 3.1): the same
# network in integers answers at a tenth of what a step takes.
AGAIN = dc.replace(LABELLED, distill=0.7)
FULL_RATE_EPOCHS = 10  # shorter labelled trainings step more lightly
STATE = "state.pt"
SPEED_STEPS = 6  # of training, to learn how many a second there are
# Rates are halved until after so many steps a network is not more than so many times as far from the original as
# before (too high a rate takes it away faster and faster); half of that one is then as safe as fast.
TRIAL_STEPS, TRIALS, TRIAL_HARM = 20, 6, 2.0


def learned(
    original: Original,
    wanted: Wanted,
    made: Network,
    checkpoint: pathlib.Path,
    kept: Kept,
    watch: Watch,
) -> Network:
    """`made` after the time to learn that is `wanted`; itself where that made it no better.

    From labels, where these are wanted, half of a long time goes by; the other half learns besides from what the
    network answers by then. Trainings go on from `checkpoint`, and from what `kept` holds.
    """
    if wanted.labelled:
        return _from_labels(original, wanted, made, checkpoint, kept, watch)
    recipe = TRAINING if made.harm_kl < NEAR_KL else FAR
    training = _Training(original, wanted, recipe, wanted.teacher, original.eager, watch, kept)
    module, epochs = training.trained(made, checkpoint, training.chosen(made))
    found = judged(original, wanted, module, epochs)
    # Of labels much is learnt that the original does not answer; of the original nothing that it does not.
    return found if found.harm_kl < made.harm_kl else made


def _from_labels(
    original: Original,
    wanted: Wanted,
    made: Network,
    checkpoint: pathlib.Path,
    kept: Kept,
    watch: Watch,
) -> Network:
    training = _Training(original, wanted, LABELLED, None, None, watch, kept)
    epochs, rate = training.chosen(made)
    if epochs < 2 * FULL_RATE_EPOCHS:
        return judged(original, wanted, *training.trained(made, checkpoint, (epochs, rate)))

    def first(place: pathlib.Path) -> float:
        module, spent = training.trained(made, place / CHECKPOINT, (epochs / 2, rate))
        write_state(place / STATE, state_bytes(module))
        remove_checkpoints(place)
        return spent

    spent, place = kept.piece("first_half", wanted.request, first)
    module = copy.deepcopy(made.module)
    read_state_(place / STATE, module)
    half = judged(original, wanted, module, spent)
    teacher, _ = rounded(original, half, {}, watch)
    wanted = dc.replace(wanted, train_seconds=wanted.train_seconds / 2)
    again = _Training(original, wanted, AGAIN, teacher, module, watch, kept)
    module, more = again.trained(half, checkpoint, again.chosen(half))
    found = judged(original, wanted, module, spent + more)
    assert found.drop is not None and half.drop is not None, (
        "labels are there where they are wanted"
    )
    return found if found.drop.judged_pt < half.drop.judged_pt else half


@dc.dataclass(frozen=True, eq=False)
class _Training:
    """As `wanted` says, for about its seconds: of the recipe the epochs and the rate are chosen here.

    The teacher, where the recipe needs one, answers on an engine (`answers`) where the processor trains: the student
    has the time that is saved. Elsewhere `teacher` does.
    """

    original: Original
    wanted: Wanted
    recipe: Finetune
    answers: onnx.ModelProto | None
    teacher: nn.Module | None
    watch: Watch
    kept: Kept

    def trained(
        self, fitted: Network, checkpoint: pathlib.Path, chosen: tuple[float, float]
    ) -> tuple[nn.Module, float]:
        """The network trained for the epochs and at the rate that were `chosen`, and the epochs that these were."""
        recipe, per_epoch = self._sized()
        epochs, rate = chosen
        if epochs * per_epoch < SPEED_STEPS:
            return fitted.module, 0.0
        module = finetune(
            fitted.module,
            self.original.splits,
            dc.replace(recipe, epochs=epochs, learning_rate=rate),
            teacher=self._teacher(),
            checkpoint=checkpoint,
            on_progress=lambda p: self.watch(f"learning: {p}", p.step / p.num_steps),
        ).module
        if not recipe.eval_mode:
            inputs = batches_of(self.original.inputs)
            module = reestimate_batch_norm(module, inputs, original=self.original.module)
        return module, epochs

    def chosen(self, fitted: Network) -> tuple[float, float]:
        """Epochs that there is time for, and the rate."""
        asked = {"share": fitted.share, "learnt": fitted.epochs > 0}
        (epochs, rate), _ = self.kept.piece("epochs", asked, lambda _: self._tried(fitted))
        return epochs, rate

    def _sized(self) -> tuple[Finetune, int]:
        """The recipe for these data, and the steps of one of its epochs."""
        splits = self.original.splits
        batch = min(self.recipe.batch_size, max(2, len(splits.train) // 4))
        recipe = dc.replace(self.recipe, batch_size=batch, seed=self.wanted.seed)
        return recipe, max(1, len(splits.train) // batch)

    def _tried(self, fitted: Network) -> tuple[float, float]:
        """By trainings of a few steps."""
        recipe, per_epoch = self._sized()
        teacher, spent = self._teacher(), 0.0
        trials, steps = (TRIALS, TRIAL_STEPS) if recipe.eval_mode else (1, SPEED_STEPS)
        short = dc.replace(recipe, epochs=steps / per_epoch)
        for halvings in range(trials):
            rate = recipe.learning_rate / 2**halvings
            self.watch(f"which rate learns: {rate:.2g}", halvings / trials)
            found = finetune(
                fitted.module,
                self.original.splits,
                dc.replace(short, learning_rate=rate),
                teacher=teacher,
            )
            spent += found.seconds
            epochs = max(self.wanted.train_seconds - spent, 0.0) / per_epoch
            epochs *= steps / max(found.seconds, 1e-3)
            if not recipe.eval_mode:
                return epochs, _rate(recipe, epochs, per_epoch)
            harm = judged(self.original, self.wanted, found.module).harm_kl
            if harm < TRIAL_HARM * fitted.harm_kl:
                return epochs, rate / 2
            if spent > self.wanted.train_seconds:
                break
        return 0.0, recipe.learning_rate  # whatever is learnt takes it away

    def _teacher(self) -> nn.Module | None:
        if not self.recipe.needs_teacher:
            return None
        if self.answers is None or training_device().type != "cpu":
            return self.teacher
        return EngineTeacher([open_session(self.answers, threads=self.original.threads)])


def _rate(recipe: Finetune, epochs: float, per_epoch: int) -> float:
    """Short trainings of what is far step lightly."""
    share = min(1.0, epochs * per_epoch / 200) * min(1.0, epochs / FULL_RATE_EPOCHS)
    return max(recipe.learning_rate * share, 1e-3)
