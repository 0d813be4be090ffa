"""Which methods suit a network, in words: from its redundancy, its sensitivity, this machine and the use, all
measured."""

from __future__ import annotations

import dataclasses as dc
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
from onnx import numpy_helper
from torch import nn

from tersor.bench.environment import environment
from tersor.graph.layers import graph_layers
from tersor.graph.qdq import as_matrix
from tersor.ondemand.effort import EFFORTS, Clock, Watch
from tersor.ondemand.facts import Facts, facts
from tersor.ondemand.kept import Kept
from tersor.ondemand.original import Original, given, measured_original
from tersor.ondemand.predict import Predictor
from tersor.specs import Budget

HALF = 0.5
LITTLE_PT, MUCH_PT = 0.3, 1.5  # points lost that matter little, and much
FAST = 1.3  # times faster that is worth a change
LINEAR = 0.5  # share of the weights in linear layers from which their rank is worth a look
ENERGY = 0.99
YES, NO, TRY = "yes", "no", "try"


@dc.dataclass(frozen=True)
class Advice:
    """One method: `verdict` is yes, no, or try (it depends on more than was measured), with its reason in figures."""

    method: str
    verdict: str
    reason: str


@dc.dataclass(frozen=True)
class Advised:
    """Facts that were measured, by name; what follows from them; and the command to go on with."""

    facts: dict[str, Any]
    advice: tuple[Advice, ...]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return dc.asdict(self)


def advise(
    model: nn.Module | str,
    data: Any = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    batch: int = 1,
    threads: int = 0,
    use_labels: bool = True,
    seed: int = 0,
    on_progress: Watch | None = None,
) -> Advised:
    """What suits `model` on inputs like `data` (see `ondemand.compress`), run in batches of `batch` here.

    Nothing is trained and nothing kept. Raises as `compress`.
    """
    watch: Watch = on_progress or (lambda text, share: None)
    effort = EFFORTS["quick"]
    asked = Budget(drop=0.5, batch=batch, threads=threads)
    loaded = given(
        model, data, weights=weights, num_classes=num_classes, input_shape=input_shape, seed=seed
    )
    with tempfile.TemporaryDirectory() as place:
        kept = Kept(pathlib.Path(place), Clock(effort.minutes))
        original = measured_original(
            loaded, asked, effort, kept, use_labels=use_labels, seed=seed, watch=watch
        )
        known = facts(original, effort, kept, seed=seed, watch=watch)
    predictor = Predictor(original, known.family, known.bits, known.first)
    told = _facts(original, known, predictor)
    advice = (
        _integers(told),
        _few_bits(told),
        _channels(told, known),
        _zeros(told),
        _low_rank(told),
        _training(told, original),
        _folding(told, original),
    )
    name = model if isinstance(model, str) else "MODEL"
    source = f"--data {data}" if isinstance(data, str) else "--data DATA"
    weighed = "" if weights is None else f" --weights {weights}"
    return Advised(told, advice, f"tersor compress {name}{weighed} {source} --drop 0.5 --out DIR")


def _facts(original: Original, known: Facts, predictor: Predictor) -> dict[str, Any]:
    costs, first = original.costs, known.first
    layers = graph_layers(original.graph)
    weights = max(sum(layer.num_weights for layer in layers), 1)
    linear = sum(layer.num_weights for layer in layers if layer.op != "Conv")
    held = {i.name: i for i in original.graph.graph.initializer}
    zeros = sum(int((numpy_helper.to_array(held[layer.weight]) == 0).sum()) for layer in layers)

    def lost(bits: int) -> float:
        harm = sum(b.harm_kl[bits] for b in known.bits.values())
        return predictor.drop_of(harm)

    worst = max(known.bits.values(), key=lambda b: b.harm_kl[3])
    told: dict[str, Any] = {
        "weights": weights,
        "size, MB of float32": costs["size_bytes"] / 1e6,
        "multiplications of an input, M": costs["macs"] / 1e6,
        "share of the weights in linear layers": linear / weights,
        "weights that are zero, share": zeros / weights,
        "batch": original.batch,
        "threads": original.threads,
        "ms, PyTorch eager float32": costs["latency_ms"],
        "ms, ONNX Runtime float32": original.engine_ms,
        f"ms, 8 bits on {first.engine}": first.costs["latency_ms"],
        "MB, 8 bits": first.costs["size_bytes"] / 1e6,
        "points lost, 8 bits (measured)": first.drop.judged_pt,
        "points lost, 4 bits (predicted, plain rounding)": lost(4),
        "points lost, 3 bits (predicted, plain rounding)": lost(3),
        "layer that 3 bits hurt most": worst.layer,
        "integer instructions": ", ".join(
            f
            for f in environment()["flags"]
            if f in ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
        )
        or "none",
        "rank for 99 % of linear layers' energy, share": _rank_share(original),
        "inputs": original.data,
    }
    if known.family is not None and known.family.least_share < HALF:
        _, harm = predictor.units(HALF)
        told["points lost, half of the layers' time (predicted, fitted)"] = predictor.drop_of(
            harm * predictor.factors.channels
        )
    return told


def _rank_share(original: Original) -> float | None:
    """Of the linear layers with most weights: the share of singular values that hold ENERGY of the squared size."""
    held = {i.name: i for i in original.graph.graph.initializer}
    found, total = 0.0, 0
    for layer in graph_layers(original.graph):
        if layer.op == "Conv" or layer.num_weights > 2**24:
            continue
        matrix = as_matrix(numpy_helper.to_array(held[layer.weight]), layer.axis)
        spectrum = np.linalg.svd(matrix.astype(np.float32), compute_uv=False) ** 2
        rank = int(np.searchsorted(np.cumsum(spectrum), ENERGY * spectrum.sum())) + 1
        found += rank * sum(matrix.shape)  # weights of the two factors
        total += layer.num_weights
    return found / total if total else None


def _integers(told: dict[str, Any]) -> Advice:
    times = [told["ms, PyTorch eager float32"], told["ms, ONNX Runtime float32"]]
    (name,) = (key for key in told if key.startswith("ms, 8 bits"))
    faster, lost = min(times) / told[name], told["points lost, 8 bits (measured)"]
    figures = (
        f"{times[0] / told[name]:.1f}x faster than eager and {faster:.1f}x than the faster float engine here, "
        f"{lost:.2f} points lost"
    )
    if lost > MUCH_PT:
        return Advice(
            "8-bit integers",
            NO,
            f"{figures}: exclude the layers that tersor sensitivity --inputs names, or train (mode qat)",
        )
    if faster < 1:
        return Advice(
            "8-bit integers", TRY, f"{figures}: smaller, but slower here than float on ONNX Runtime"
        )
    return Advice("8-bit integers", YES, figures)


def _few_bits(told: dict[str, Any]) -> Advice:
    four = told["points lost, 4 bits (predicted, plain rounding)"]
    three = told["points lost, 3 bits (predicted, plain rounding)"]
    worst = told["layer that 3 bits hurt most"]
    figures = (
        f"plain rounding would lose {four:.2f} points at 4 bits and {three:.2f} at 3, most at {worst!r}; "
        "rounding by the layers' outputs (gptq) loses a fraction of that"
    )
    if four <= MUCH_PT:
        return Advice(
            "weights of 4 bits or fewer",
            YES,
            f"{figures}. It makes the file small, not the run fast",
        )
    return Advice(
        "weights of 4 bits or fewer", TRY, f"{figures}; give sensitive layers more bits (mean_bits)"
    )


def _channels(told: dict[str, Any], known: Facts) -> Advice:
    key = "points lost, half of the layers' time (predicted, fitted)"
    if known.family is None:
        return Advice("removing channels", NO, "; ".join(known.notes))
    if key not in told:
        return Advice(
            "removing channels",
            NO,
            f"at least {known.family.least_share:.0%} of the layers' time stays when all that may go is gone",
        )
    figures = (
        f"half of the layers' time gone would lose about {told[key]:.2f} points without training"
    )
    if told[key] <= LITTLE_PT:
        return Advice(
            "removing channels", YES, f"{figures}: the network is far too wide for its task"
        )
    if told[key] <= 20 * MUCH_PT:
        return Advice(
            "removing channels",
            TRY,
            f"{figures}; a training from the original's answers (--effort standard) recovers most",
        )
    return Advice(
        "removing channels", NO, f"{figures}: train a narrower one instead (tersor distill)"
    )


def _zeros(told: dict[str, Any]) -> Advice:
    share = told["weights that are zero, share"]
    if share > HALF:
        return Advice(
            "zeros in weights",
            YES,
            f"{share:.0%} of the weights are zero already; the file stores them for little",
        )
    return Advice(
        "zeros in weights",
        TRY,
        f"{share:.0%} are zero now. More make the file smaller, but dense kernels, which engines here have, not faster",
    )


def _low_rank(told: dict[str, Any]) -> Advice:
    share, rank = (
        told["share of the weights in linear layers"],
        told["rank for 99 % of linear layers' energy, share"],
    )
    if rank is None or share < LINEAR:
        return Advice(
            "low rank",
            TRY,
            f"{share:.0%} of the weights are in linear layers; of convolutions see tersor factorize --method tucker2",
        )
    if rank < 0.7:
        return Advice(
            "low rank",
            YES,
            f"linear layers hold {share:.0%} of the weights, and {rank:.0%} of these keep 99 % of their energy",
        )
    return Advice(
        "low rank",
        NO,
        f"linear layers hold {share:.0%} of the weights, but 99 % of their energy takes {rank:.0%} of these",
    )


def _training(told: dict[str, Any], original: Original) -> Advice:
    count = len(original.splits.train)
    if original.synthetic:
        return Advice(
            "learning from the original",
            NO,
            "there are no inputs; give a folder of some, without labels",
        )
    if count < 1000:
        return Advice(
            "learning from the original",
            TRY,
            f"{count} inputs are few; more, unlabelled, are worth having",
        )
    return Advice(
        "learning from the original", YES, f"{count:,} inputs are there, and labels are not needed"
    )


def _folding(told: dict[str, Any], original: Original) -> Advice:
    if original.folded:
        return Advice(
            "exact folding",
            YES,
            f"equal inputs of {', '.join(original.folded)} are summed: fewer weights, the same function",
        )
    return Advice("exact folding", YES, "batch norms go into the weights before them: always done")
