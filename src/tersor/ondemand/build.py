"""From a choice of the search to a network and its graph: remove, fit, train, round."""

from __future__ import annotations

import copy
import dataclasses as dc
import pathlib
from collections.abc import Mapping
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
from tersor.methods.checkpoint import read_state_, write_state
from tersor.methods.finetune import finetune
from tersor.methods.prune_auto import Units
from tersor.methods.prune_family import ChannelFamily
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.methods.restore import restructured
from tersor.ondemand.effort import Effort, Watch
from tersor.ondemand.kept import Kept
from tersor.ondemand.original import Original
from tersor.pipeline import CALIBRATION_BATCH, deployment_graph
from tersor.runs.directory import CHECKPOINT
from tersor.specs import Finetune, Plan, Quantize, from_dict

FloatArray = npt.NDArray[np.float32]
LEARNED_BITS = (
    5  # at so many bits or fewer rounding looks at the layer's outputs, and repays its time
)
JUDGED = 512  # held-out inputs on which a network is judged before it gets its bits
TRAINING = Finetune(
    learning_rate=0.02,
    batch_size=128,
    weight_decay=1e-4,
    label_smoothing=0.0,
    distill=1.0,
    ema_decay=0.995,
    compile="off",
)
STATE = "state.pt"
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


def network(
    original: Original,
    family: ChannelFamily | None,
    share: float,
    units: Units,
    effort: Effort,
    kept: Kept,
    *,
    train_seconds: float = 0.0,
    seed: int = 0,
    watch: Watch,
) -> Network:
    """The network with `units` gone, what is left fitted to the original's outputs, batch norms re-estimated, and
    with `train_seconds` trained to answer as the original does; no labels. A training goes on from its checkpoint."""
    made: list[Network] = []

    def make(place: pathlib.Path) -> dict[str, Any]:
        training = _Training(original, train_seconds if effort.trains else 0.0, seed, watch, kept)
        found = _network(original, family, share, units, training, place / CHECKPOINT)
        made.append(found)
        write_state(place / STATE, found.module)
        (place / CHECKPOINT).unlink(missing_ok=True)
        plan = None if found.plan is None else found.plan.to_dict()
        return {"plan": plan, "harm_kl": found.harm_kl, "epochs": found.epochs}

    asked = {"share": share, "units": {name: held.tolist() for name, held in units.items()}}
    told, place = kept.piece("network", asked, make)
    if made:
        return made[0]
    plan = None if told["plan"] is None else from_dict(told["plan"])
    assert plan is None or isinstance(plan, Plan), "as it was written"
    module = copy.deepcopy(original.module)
    if plan is not None:
        module = restructured(module, plan)
    read_state_(place / STATE, module)
    graph = original.graph if plan is None else deployment_graph(module, original.input_shape)
    return Network(share, module.eval(), graph, plan, told["harm_kl"], told["epochs"])


def _network(
    original: Original,
    family: ChannelFamily | None,
    share: float,
    units: Units,
    training: _Training,
    checkpoint: pathlib.Path,
) -> Network:
    seed, watch = training.seed, training.watch
    module, plan, epochs = original.module, None, 0.0
    inputs = batches_of(original.inputs)
    if family is not None and any(len(held) for held in units.values()):
        watch(f"{share:.0%} of the channels' time: removing, fitting", 0.0)
        plan = family.plan(units)
        module = structured.apply(original.module, plan, inputs=inputs, seed=seed)
        module = reestimate_batch_norm(module, inputs, original=original.module)
        if training.seconds > 0:
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
    """To answer as the original does, for about `seconds`."""

    original: Original
    seconds: float
    seed: int
    watch: Watch
    kept: Kept

    def trained(
        self, module: nn.Module, share: float, checkpoint: pathlib.Path
    ) -> tuple[nn.Module, float]:
        """The network trained, and the epochs that these were."""
        splits = self.original.splits
        batch = min(TRAINING.batch_size, max(2, len(splits.train) // 4))
        per_epoch = max(1, len(splits.train) // batch)
        short = dc.replace(
            TRAINING, epochs=SPEED_STEPS / per_epoch, batch_size=batch, seed=self.seed
        )

        def timed(_: pathlib.Path) -> float:
            """Epochs that there is time for. The shortest training is timed first."""
            found = finetune(module, splits, short, teacher=self.original.module)
            return self.seconds / max(found.seconds / SPEED_STEPS, 1e-4) / per_epoch

        epochs, _ = self.kept.piece("epochs", {"share": share}, timed)
        if epochs * per_epoch < SPEED_STEPS:
            return module, 0.0
        # Short trainings step lightly.
        rate = TRAINING.learning_rate * min(1.0, epochs * per_epoch / 200)
        trained = finetune(
            module,
            splits,
            dc.replace(short, epochs=epochs, learning_rate=max(rate, 1e-3)),
            teacher=self.original.module,
            checkpoint=checkpoint,
            on_progress=lambda p: self.watch(
                f"learning from the original: {p}", p.step / p.num_steps
            ),
        )
        return trained.module, epochs


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
