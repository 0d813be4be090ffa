"""From a choice of the search to a network and its graph: remove, fit, train, round."""

from __future__ import annotations

import copy
import dataclasses as dc
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from tersor.bench.drop import measured_drop
from tersor.engines import open_session
from tersor.engines.load import logits_of
from tersor.methods import prune_structured as structured
from tersor.methods import quantize as quantization
from tersor.methods.checkpoint import read_state_, remove_checkpoints, state_bytes, write_state
from tersor.methods.device import training_device
from tersor.methods.finetune import finetune
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.methods.restore import restructured
from tersor.methods.teachers import EngineTeacher
from tersor.ondemand.effort import Clock, Watch
from tersor.ondemand.kept import Kept
from tersor.ondemand.original import Original
from tersor.pipeline import CALIBRATION_BATCH, deployment_graph
from tersor.runs.directory import CHECKPOINT
from tersor.runs.executors import Executor
from tersor.specs import Finetune, Plan, Quantize

FloatArray = npt.NDArray[np.float32]
LEARNED_BITS = (
    5  # at so many bits or fewer rounding looks at the layer's outputs, and repays its time
)
JUDGED = 512  # held-out inputs on which a network is judged before it gets its bits
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
FULL_RATE_EPOCHS = 10  # shorter labelled trainings step more lightly
NETWORK, STATE = "network", "state.pt"
SPEED_STEPS = 6  # of training, to learn how many a second there are
# Rates are halved until after so many steps a network is not more than so many times as far from the original as
# before (too high a rate takes it away faster and faster); half of that one is then as safe as fast.
TRIAL_STEPS, TRIALS, TRIAL_HARM = 20, 6, 2.0


@dc.dataclass(frozen=True, eq=False)
class Network:
    """A network with a share of its channels, before its weights get their bits.

    `harm_kl` is its distance from the original on held-out inputs; `epochs` it was trained for.
    """

    share: float
    module: nn.Module
    graph: onnx.ModelProto
    plan: Plan | None
    harm_kl: float
    epochs: float = 0.0


@dc.dataclass(frozen=True, eq=False)
class Wanted:
    """A network to be made: the share of its channels' cost that stays, the plan of what goes (None: nothing), for how
    long it may learn, and whether from labels, else from the original or from `teacher`, the same in integers, which
    answers sooner."""

    share: float
    plan: Plan | None
    train_seconds: float = 0.0
    seed: int = 0
    labelled: bool = False
    teacher: onnx.ModelProto | None = None

    @property
    def request(self) -> dict[str, Any]:
        """What it is known by: not the time, which is another one when it is asked again."""
        return {"share": self.share, "plan": None if self.plan is None else self.plan.to_dict()}


def network(original: Original, wanted: Wanted, kept: Kept, watch: Watch) -> Network:
    """The network without what the plan removes, what is left fitted to the original's outputs, batch norms
    re-estimated, and where there is time for it trained: to answer as the original does, or where `wanted.labelled`
    as the labels say. A training goes on from its checkpoint."""
    made: list[Network] = []

    def make(place: pathlib.Path) -> dict[str, float]:
        made.append(_network(original, wanted, place / CHECKPOINT, kept, watch))
        write_state(place / STATE, state_bytes(made[0].module))
        remove_checkpoints(place)
        return _told(made[0])

    told, place = kept.piece(NETWORK, wanted.request, make)
    if made:
        return made[0]
    module = copy.deepcopy(original.module)
    if wanted.plan is not None:
        module = restructured(module, wanted.plan)
    read_state_(place / STATE, module)
    graph = original.graph
    if wanted.plan is not None:
        graph = deployment_graph(module, original.input_shape)
    return Network(wanted.share, module.eval(), graph, wanted.plan, told["harm_kl"], told["epochs"])


def networks_elsewhere(
    original: Original, wanted: Sequence[Wanted], kept: Kept, workers: Executor, watch: Watch
) -> tuple[dict[float, float], list[str]]:
    """Make those that are not kept already where `workers` are, all at once, for `network` to find: the harm of each
    by its share, and in words what became of the others."""
    missing = {f"network {w.share:g}": w for w in wanted if not kept.held(NETWORK, w.request)}
    problems = []
    for outcome in workers.run(_elsewhere, original, missing, watch=watch, check=kept.check):
        if outcome.error is not None:
            problems.append(f"{outcome.name} was not made: {outcome.error}")
            continue
        told, state = outcome.value

        def keep(place: pathlib.Path, told: Any = told, state: bytes = state) -> Any:
            write_state(place / STATE, state)
            return told

        kept.piece(NETWORK, missing[outcome.name].request, keep)
    harms = {}
    for each in wanted:
        if kept.held(NETWORK, each.request):
            harms[each.share] = kept.piece(NETWORK, each.request, _told_before)[0]["harm_kl"]
    return harms, problems


def _elsewhere(original: Original, wanted: Wanted, watch: Watch) -> tuple[dict[str, float], bytes]:
    """A worker's part: what is told of the network, and its state."""
    with tempfile.TemporaryDirectory() as name:
        place = pathlib.Path(name)
        kept = Kept(place, Clock(1.0))
        made = _network(original, wanted, place / CHECKPOINT, kept, watch)
    return _told(made), state_bytes(made.module)


def _told(made: Network) -> dict[str, float]:
    return {"harm_kl": made.harm_kl, "epochs": made.epochs}


def _told_before(_: pathlib.Path) -> Any:
    raise AssertionError("a piece that is kept is not made")


def _network(
    original: Original, wanted: Wanted, checkpoint: pathlib.Path, kept: Kept, watch: Watch
) -> Network:
    share, plan, seed = wanted.share, wanted.plan, wanted.seed
    if plan is None:
        return Network(share, original.module, original.graph, None, 0.0)
    inputs = batches_of(original.inputs)
    watch(f"{share:.0%} of the channels' time: removing, fitting", 0.0)
    fitted = structured.apply(original.module, plan, inputs=inputs, seed=seed)
    fitted = reestimate_batch_norm(fitted, inputs, original=original.module)
    made = _judged(original, wanted, fitted, 0.0)
    if wanted.train_seconds <= 0:
        return made
    recipe = LABELLED if wanted.labelled else TRAINING if made.harm_kl < NEAR_KL else FAR
    training = _Training(original, wanted, recipe, watch, kept)
    module, epochs = training.trained(made, checkpoint)
    if epochs and not recipe.eval_mode:
        module = reestimate_batch_norm(module, inputs, original=original.module)
    learned = _judged(original, wanted, module, epochs)
    # Of labels much is learnt that the original does not answer; of the original nothing that it does not.
    return learned if wanted.labelled or learned.harm_kl < made.harm_kl else made


def _judged(original: Original, wanted: Wanted, module: nn.Module, epochs: float) -> Network:
    """`module` with its graph and its distance from the original."""
    graph = deployment_graph(module, original.input_shape)
    session = open_session(graph, threads=original.threads)
    logits = logits_of(session, original.held[:JUDGED])
    harm = measured_drop(original.logits[:JUDGED], logits).harm_kl
    return Network(wanted.share, module, graph, wanted.plan, harm, epochs)


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
        splits = self.original.splits
        teacher = self._teacher() if self.recipe.needs_teacher else None
        batch = min(self.recipe.batch_size, max(2, len(splits.train) // 4))
        per_epoch = max(1, len(splits.train) // batch)
        recipe = dc.replace(self.recipe, batch_size=batch, seed=self.wanted.seed)

        def tried(_: pathlib.Path) -> tuple[float, float]:
            return self._tried(fitted, recipe, per_epoch, teacher)

        (epochs, rate), _ = self.kept.piece("epochs", {"share": fitted.share}, tried)
        if epochs * per_epoch < SPEED_STEPS:
            return fitted.module, 0.0
        trained = finetune(
            fitted.module,
            splits,
            dc.replace(recipe, epochs=epochs, learning_rate=rate),
            teacher=teacher,
            checkpoint=checkpoint,
            on_progress=lambda p: self.watch(f"learning: {p}", p.step / p.num_steps),
        )
        return trained.module, epochs

    def _tried(
        self, fitted: Network, recipe: Finetune, per_epoch: int, teacher: nn.Module | None
    ) -> tuple[float, float]:
        """Epochs that there is time for, and the rate, by trainings of a few steps."""
        spent = 0.0
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
            harm = _judged(self.original, self.wanted, found.module, 0.0).harm_kl
            if harm < TRIAL_HARM * fitted.harm_kl:
                return epochs, rate / 2
            if spent > self.wanted.train_seconds:
                break
        return 0.0, recipe.learning_rate  # whatever is learnt takes it away

    def _teacher(self) -> nn.Module:
        """The original; where the processor trains, in integers: the student then has the time that is saved."""
        answers = self.wanted.teacher
        if answers is None or training_device().type != "cpu":
            return self.original.module
        return EngineTeacher([open_session(answers, threads=self.original.threads)])


def _rate(recipe: Finetune, epochs: float, per_epoch: int) -> float:
    """Short trainings of what is far step lightly."""
    share = min(1.0, epochs * per_epoch / 200) * min(1.0, epochs / FULL_RATE_EPOCHS)
    return max(recipe.learning_rate * share, 1e-3)


def rounded(
    original: Original,
    made: Network,
    bits: Mapping[str, int],
    watch: Watch,
    *,
    mode: str = "static",
) -> tuple[onnx.ModelProto, Plan]:
    """The quantized graph of `made` with `bits` for its layers' weights (8 where none are given), and all plans."""
    spec = request_of(original, mode, few_bits(bits))
    watch(f"rounding, {spec.rounding}", 0.0)
    plan = quantization.plan(made.graph, spec, bits)
    found = quantization.apply(made.graph, plan, batches_of(original.inputs))
    return found.graph, found.plan.after(() if made.plan is None else (made.plan,))


def few_bits(bits: Mapping[str, int]) -> bool:
    """Whether rounding has to look at the layers' outputs."""
    return min(bits.values(), default=8) <= LEARNED_BITS


def request_of(original: Original, mode: str, few: bool) -> Quantize:
    """What is asked of the rounding."""
    return Quantize(
        mode=mode,
        bits=8,
        edge_bits=0,
        rounding="gptq" if few else "nearest",
        num_calibration=len(original.inputs),
    )


def batches_of(images: FloatArray) -> list[FloatArray]:
    """`images` (N, C, H, W) in batches for calibration."""
    starts = range(0, len(images), CALIBRATION_BATCH)
    return [images[start : start + CALIBRATION_BATCH] for start in starts]


def example_of(original: Original) -> torch.Tensor:
    """One input of the right size."""
    return torch.zeros(1, *original.input_shape)
