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
# Of ResNet-18 at 65 % of its MACs, fitted, after 100 steps: KL 0.0165 to 0.0143 nats at this rate and temperature and
# 0.0141 at half the rate, but 0.0173 at rate 0.02 and temperature 2.
TRAINING = Finetune(
    learning_rate=0.01,
    batch_size=128,
    weight_decay=1e-4,
    label_smoothing=0.0,
    distill=1.0,
    temperature=4.0,
    ema_decay=0.995,
    compile="off",
)
# Where labels may be learnt from, networks are not held to answers of an original that could know more: trained
# for long they pass it. The teacher, dearer than a small student, is spared.
LABELLED = dc.replace(TRAINING, learning_rate=0.1, weight_decay=5e-4, distill=0.0)
FULL_RATE_EPOCHS = 10  # shorter labelled trainings step more lightly
NETWORK, STATE = "network", "state.pt"
SPEED_STEPS = 6  # of training, to learn how many a second there are


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
    module, epochs = original.module, 0.0
    inputs = batches_of(original.inputs)
    if plan is not None:
        watch(f"{share:.0%} of the channels' time: removing, fitting", 0.0)
        module = structured.apply(original.module, plan, inputs=inputs, seed=seed)
        module = reestimate_batch_norm(module, inputs, original=original.module)
        if wanted.train_seconds > 0:
            training = _Training(original, wanted, watch, kept)
            module, epochs = training.trained(module, share, checkpoint)
            module = reestimate_batch_norm(module, inputs, original=original.module)
    graph = original.graph
    harm = 0.0
    if plan is not None:
        graph = deployment_graph(module, original.input_shape)
        session = open_session(graph, threads=original.threads)
        logits = logits_of(session, original.held[:JUDGED])
        harm = measured_drop(original.logits[:JUDGED], logits).harm_kl
    return Network(share, module, graph, plan, harm, epochs)


@dc.dataclass(frozen=True, eq=False)
class _Training:
    """As `wanted` says, for about its seconds."""

    original: Original
    wanted: Wanted
    watch: Watch
    kept: Kept

    def trained(
        self, module: nn.Module, share: float, checkpoint: pathlib.Path
    ) -> tuple[nn.Module, float]:
        """The network trained, and the epochs that these were."""
        splits, seconds = self.original.splits, self.wanted.train_seconds
        recipe = LABELLED if self.wanted.labelled else TRAINING
        teacher = self._teacher() if recipe.needs_teacher else None
        batch = min(recipe.batch_size, max(2, len(splits.train) // 4))
        per_epoch = max(1, len(splits.train) // batch)
        short = dc.replace(
            recipe, epochs=SPEED_STEPS / per_epoch, batch_size=batch, seed=self.wanted.seed
        )

        def timed(_: pathlib.Path) -> float:
            """Epochs that there is time for. The shortest training is timed first."""
            found = finetune(module, splits, short, teacher=teacher)
            return seconds / max(found.seconds / SPEED_STEPS, 1e-4) / per_epoch

        epochs, _ = self.kept.piece("epochs", {"share": share}, timed)
        if epochs * per_epoch < SPEED_STEPS:
            return module, 0.0
        trained = finetune(
            module,
            splits,
            dc.replace(short, epochs=epochs, learning_rate=_rate(recipe, epochs, per_epoch)),
            teacher=teacher,
            checkpoint=checkpoint,
            on_progress=lambda p: self.watch(f"learning: {p}", p.step / p.num_steps),
        )
        return trained.module, epochs

    def _teacher(self) -> nn.Module:
        """The original; where the processor trains, in integers: the student then has the time that is saved."""
        answers = self.wanted.teacher
        if answers is None or training_device().type != "cpu":
            return self.original.module
        return EngineTeacher([open_session(answers, threads=self.original.threads)])


def _rate(recipe: Finetune, epochs: float, per_epoch: int) -> float:
    """Short trainings step lightly."""
    share = min(1.0, epochs * per_epoch / 200)
    if not recipe.needs_teacher:
        share *= min(1.0, epochs / FULL_RATE_EPOCHS)
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
