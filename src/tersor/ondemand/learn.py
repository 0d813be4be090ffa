"""Networks of a search learn: from the original's answers, or where they may from labels."""

from __future__ import annotations

import dataclasses as dc
import pathlib

from torch import nn

from tersor.engines import open_session
from tersor.methods.device import training_device
from tersor.methods.finetune import finetune
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.methods.teachers import EngineTeacher
from tersor.ondemand.effort import Watch
from tersor.ondemand.kept import Kept
from tersor.ondemand.network import Network, Wanted, batches_of, judged
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
# Where labels may be learnt from, networks are not held to answers of an original that could know more: trained
# for long they pass it. The teacher, dearer than a small student, is spared.
LABELLED = dc.replace(TRAINING, learning_rate=0.1, weight_decay=5e-4, distill=0.0, eval_mode=False)
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
    module, epochs = _Training(original, wanted, recipe, watch, kept).trained(made, checkpoint)
    found = judged(original, wanted, module, epochs)
    # Of labels much is learnt that the original does not answer; of the original nothing that it does not.
    return found if wanted.labelled or found.harm_kl < made.harm_kl else made


@dc.dataclass(frozen=True, eq=False)
class _Training:
    """As `wanted` says, for about its seconds: of the recipe the epochs and the rate are chosen here."""

    original: Original
    wanted: Wanted
    recipe: Finetune
    watch: Watch
    kept: Kept

    def trained(self, fitted: Network, checkpoint: pathlib.Path) -> tuple[nn.Module, float]:
        """The network trained, and the epochs that these were."""
        recipe, per_epoch = self._sized()
        asked = {"share": fitted.share}
        (epochs, rate), _ = self.kept.piece("epochs", asked, lambda _: self._tried(fitted))
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
        """The original; where the processor trains, in integers: the student then has the time that is saved."""
        if not self.recipe.needs_teacher:
            return None
        answers = self.wanted.teacher
        if answers is None or training_device().type != "cpu":
            return self.original.eager
        return EngineTeacher([open_session(answers, threads=self.original.threads)])


def _rate(recipe: Finetune, epochs: float, per_epoch: int) -> float:
    """Short trainings of what is far step lightly."""
    share = min(1.0, epochs * per_epoch / 200) * min(1.0, epochs / FULL_RATE_EPOCHS)
    return max(recipe.learning_rate * share, 1e-3)
