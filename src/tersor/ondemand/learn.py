"""Networks of a search learn: from the original's answers, or where they may from labels."""

from __future__ import annotations

import copy
import dataclasses as dc
import functools
import pathlib
import time

import torch
from torch import nn

from tersor.engines import open_session
from tersor.methods.batches import Batches
from tersor.methods.device import on_device, training_device
from tersor.methods.dropout import fitted_dropout
from tersor.methods.finetune import finetune
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.methods.teachers import EngineTeacher
from tersor.methods.training import ANSWER_DTYPE
from tersor.ondemand.effort import Watch
from tersor.ondemand.kept import Kept
from tersor.ondemand.network import Network, Wanted, batches_of, example_of, judged
from tersor.ondemand.original import Original
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
# Where labels may be learnt from, networks are not held to the original's answers alone: trained for long they pass it.
LABELLED = dc.replace(TRAINING, learning_rate=0.1, weight_decay=5e-4, distill=0.0, eval_mode=False)
# The original, dearer than a small student, answers each of so many epochs once, where that takes at most this share
# of the time and no more memory; its answers then have this share of the loss.
VIEWS, FEWEST_VIEWS, ANSWERING, ANSWERS_BYTES, TAUGHT = 24, 4, 0.15, 2 << 30, 0.7
# In trainings of so many epochs each image is without a square, its side this share of the image's. VGG-16 at 5 % of
# its MACs on CIFAR-10: 20 epochs become 0.5 points worse by it (labels alone), 60 epochs of a third of the images, of
# which it knows 96.4 % without and 94.1 % with it, 0.6 points better.
CUTOUT, CUTOUT_EPOCHS = 0.375, 50
# A second training from what the network itself knew (born again: Furlanello 2018) made ResNet-18 at 2 % of its MACs,
# 64 epochs old, no better in 41 more.
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
    """`made` after the time to learn that is `wanted`; itself where the original's answers made it no better. The
    training goes on from `checkpoint`."""
    recipe = LABELLED if wanted.labelled else TRAINING if made.harm_kl < NEAR_KL else FAR
    narrow = fitted_dropout(made.module, original.module, example_of(original))
    training = _Training(original, wanted, recipe, watch, kept)
    module, epochs = training.trained(dc.replace(made, module=narrow), checkpoint)
    found = judged(original, wanted, module, epochs)
    # Of labels much is learnt that the original does not answer; of the original nothing that it does not.
    return found if wanted.labelled or found.harm_kl < made.harm_kl else made


@dc.dataclass(frozen=True, eq=False)
class _Training:
    """As `wanted` says, for about its seconds: what else of the recipe the time decides is chosen here."""

    original: Original
    wanted: Wanted
    recipe: Finetune
    watch: Watch
    kept: Kept

    def trained(self, fitted: Network, checkpoint: pathlib.Path) -> tuple[nn.Module, float]:
        """The network trained, and the epochs that these were."""
        recipe, per_epoch = self._sized()
        asked = {"share": fitted.share}
        (epochs, rate, views), _ = self.kept.piece("training", asked, lambda _: self._tried(fitted))
        if epochs * per_epoch < SPEED_STEPS:
            return fitted.module, 0.0
        if views:
            recipe = dc.replace(recipe, views=views, distill=TAUGHT)
        if self.wanted.labelled and epochs >= CUTOUT_EPOCHS:
            recipe = dc.replace(recipe, cutout=CUTOUT)
        module = finetune(
            fitted.module,
            self.original.splits,
            dc.replace(recipe, epochs=epochs, learning_rate=rate),
            teacher=self._teacher if recipe.needs_teacher else None,
            checkpoint=checkpoint,
            on_progress=lambda p: self.watch(f"learning: {p}", p.step / p.num_steps),
        ).module
        if not recipe.eval_mode:
            inputs = batches_of(self.original.inputs)
            module = reestimate_batch_norm(module, inputs, original=self.original.module)
        return module, epochs

    def _sized(self) -> tuple[Finetune, int]:
        """The recipe for these data, and the steps of one of its epochs."""
        splits = self.original.splits
        batch = min(self.recipe.batch_size, max(2, len(splits.train) // 4))
        recipe = dc.replace(self.recipe, batch_size=batch, seed=self.wanted.seed)
        return recipe, max(1, len(splits.train) // batch)

    def _tried(self, fitted: Network) -> tuple[float, float, int]:
        """Epochs, rate and views, by trainings of a few steps."""
        if self.recipe.eval_mode:
            return *self._gentlest(fitted), 0
        recipe, per_epoch = self._sized()
        _, epoch, spent = self._stepped(fitted, recipe.learning_rate, SPEED_STEPS)
        left = max(self.wanted.train_seconds - spent, 0.0)
        answering, views = self._answering(left) if self.wanted.labelled else (0.0, 0)
        epochs = (left - views * answering) / epoch
        return epochs, _rate(recipe, epochs, per_epoch), views

    def _gentlest(self, fitted: Network) -> tuple[float, float]:
        """Epochs, and the highest rate that is safe for what is near the original; 0 epochs where none is."""
        rate, spent = self.recipe.learning_rate, 0.0
        for halvings in range(TRIALS):
            self.watch(f"which rate learns: {rate:.2g}", halvings / TRIALS)
            module, epoch, seconds = self._stepped(fitted, rate, TRIAL_STEPS)
            spent += seconds
            rate /= 2
            if judged(self.original, self.wanted, module).harm_kl < TRIAL_HARM * fitted.harm_kl:
                return max(self.wanted.train_seconds - spent, 0.0) / epoch, rate
            if spent > self.wanted.train_seconds:
                break
        return 0.0, rate  # whatever is learnt takes it away

    def _stepped(self, fitted: Network, rate: float, steps: int) -> tuple[nn.Module, float, float]:
        """`fitted` after so many steps, the seconds that an epoch takes, and those that were spent."""
        recipe, per_epoch = self._sized()
        found = finetune(
            fitted.module,
            self.original.splits,
            dc.replace(recipe, epochs=steps / per_epoch, learning_rate=rate),
            teacher=self._teacher if recipe.needs_teacher else None,
        )
        return found.module, per_epoch * max(found.seconds, 1e-3) / steps, found.seconds

    def _answering(self, seconds: float) -> tuple[float, int]:
        """Seconds in which the teacher answers an epoch, and how many epochs it answers of a training of `seconds`."""
        recipe, per_epoch = self._sized()
        device, started = training_device(), 0.0
        teacher = on_device(copy.deepcopy(self._teacher), device).eval()
        batches = Batches(self.original.splits, recipe, device)
        with torch.inference_mode():
            for step in range(1 + SPEED_STEPS):  # the first one is not timed
                answers = teacher(batches.at(step)[0])
                answers.sum().item()
                started = started or time.perf_counter()
        epoch = per_epoch * (time.perf_counter() - started) / SPEED_STEPS
        memory = ANSWERS_BYTES // (per_epoch * answers.nelement() * ANSWER_DTYPE.itemsize)
        views = int(min(VIEWS, ANSWERING * seconds / epoch, memory))
        return epoch, views if views >= FEWEST_VIEWS else 0

    @functools.cached_property
    def _teacher(self) -> nn.Module:
        """The original; where the processor trains, in integers: the student then has the time that is saved."""
        answers = self.wanted.teacher
        if answers is None or training_device().type != "cpu":
            return self.original.whole
        return EngineTeacher([open_session(answers, threads=self.original.threads)])


def _rate(recipe: Finetune, epochs: float, per_epoch: int) -> float:
    """Short trainings of what is far step lightly."""
    share = min(1.0, epochs * per_epoch / 200) * min(1.0, epochs / FULL_RATE_EPOCHS)
    return max(recipe.learning_rate * share, 1e-3)
