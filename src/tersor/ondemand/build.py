"""From a choice of the search to a network and its graph: remove, fit, train, round."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping

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
from tersor.methods.finetune import finetune
from tersor.methods.prune_auto import Units
from tersor.methods.prune_family import ChannelFamily
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.ondemand.effort import Effort, Watch
from tersor.ondemand.original import Original
from tersor.pipeline import CALIBRATION_BATCH, deployment_graph
from tersor.specs import Finetune, Plan, Quantize

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
    *,
    train_seconds: float = 0.0,
    seed: int = 0,
    watch: Watch,
) -> Network:
    """The network with `units` gone, what is left fitted to the original's outputs, batch norms re-estimated, and
    with `train_seconds` trained to answer as the original does; no labels."""
    module, plan, epochs = original.module, None, 0.0
    inputs = batches_of(original.inputs)
    if family is not None and any(len(held) for held in units.values()):
        watch(f"{share:.0%} of the channels' time: removing, fitting", 0.0)
        plan = family.plan(units)
        module = structured.apply(original.module, plan, inputs=inputs, seed=seed)
        module = reestimate_batch_norm(module, inputs, original=original.module)
        if effort.trains and train_seconds > 0:
            module, epochs = _trained(original, module, train_seconds, seed, watch)
            module = reestimate_batch_norm(module, inputs, original=original.module)
    graph = original.graph
    harm = 0.0
    if plan is not None:
        graph = deployment_graph(module, original.input_shape)
        session = open_session(graph, threads=original.threads)
        logits = logits_of(session, original.held[:JUDGED])
        harm = measured_drop(original.logits[:JUDGED], logits).harm_kl
    return Network(share, module, graph, plan, harm, epochs)


def _trained(
    original: Original, module: nn.Module, seconds: float, seed: int, watch: Watch
) -> tuple[nn.Module, float]:
    """Distilled for about `seconds`; the epochs that these were. The shortest training is timed first."""
    count = len(original.splits.train)
    batch = min(TRAINING.batch_size, max(2, count // 4))
    per_epoch = max(1, count // batch)
    short = dc.replace(TRAINING, epochs=SPEED_STEPS / per_epoch, batch_size=batch, seed=seed)
    timed = finetune(module, original.splits, short, teacher=original.module)
    each = max(timed.seconds / SPEED_STEPS, 1e-4)
    epochs = seconds / each / per_epoch
    if epochs * per_epoch < SPEED_STEPS:
        return module, 0.0
    rate = TRAINING.learning_rate * min(
        1.0, epochs * per_epoch / 200
    )  # short trainings step lightly
    spec = dc.replace(short, epochs=epochs, learning_rate=max(rate, 1e-3))
    found = finetune(
        module,
        original.splits,
        spec,
        teacher=original.module,
        on_progress=lambda p: watch(f"learning from the original: {p}", p.step / p.num_steps),
    )
    return found.module, epochs


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
