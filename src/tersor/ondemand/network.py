"""A network of a search, before and while its weights get their bits."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from tersor.bench.drop import Drop, measured_drop
from tersor.engines import open_session
from tersor.engines.load import logits_of
from tersor.methods import quantize as quantization
from tersor.ondemand.effort import Watch
from tersor.ondemand.original import Original
from tersor.pipeline import CALIBRATION_BATCH, deployment_graph
from tersor.specs import Plan, Quantize

FloatArray = npt.NDArray[np.float32]
LEARNED_BITS = (
    5  # at so many bits or fewer rounding looks at the layer's outputs, and repays its time
)
JUDGED = 512  # held-out inputs on which a network is judged before it gets its bits


@dc.dataclass(frozen=True, eq=False)
class Network:
    """A network with a share of its channels, before its weights get their bits.

    `harm_kl` is its distance from the original on held-out inputs; `epochs` it was trained for. `drop` is what one
    lost that learnt from labels: the distance does not tell.
    """

    share: float
    module: nn.Module
    graph: onnx.ModelProto
    plan: Plan | None
    harm_kl: float
    epochs: float = 0.0
    drop: Drop | None = None


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


def judged(original: Original, wanted: Wanted, module: nn.Module, epochs: float = 0.0) -> Network:
    """`module` with its graph and its distance from the original; trained from labels also with what it lost."""
    graph = deployment_graph(module, original.input_shape)
    session = open_session(graph, threads=original.threads)
    by_labels = wanted.labelled and epochs > 0
    count = len(original.held) if by_labels else JUDGED
    labels = original.labels if by_labels else None
    logits = logits_of(session, original.held[:count])
    found = measured_drop(original.logits[:count], logits, labels)
    drop = found if found.labelled else None
    return Network(wanted.share, module, graph, wanted.plan, found.harm_kl, epochs, drop)


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
