"""Sparsities that nobody chose: how much each layer's pruning changes the network's outputs, without labels,
and which share of each layer follows for a total; and the total itself for a distance of the outputs.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tersor.errors import BudgetError
from tersor.graph.layers import weight_layers
from tersor.graph.weights import from_rows
from tersor.methods.choose import NOTHING, Choice, rows_of, whole_pieces
from tersor.methods.device import on_device
from tersor.methods.judging import BatchStatistics, logits_of
from tersor.methods.layer_statistics import FloatArray
from tersor.methods.paired_moments import input_chunks
from tersor.methods.reconstruct import fitted_paths
from tersor.methods.sensitivity import output_distance
from tersor.search import Option, allocate
from tersor.specs import Prune
from tersor.tensors.statistics import LayerStatistics

SHARES = (0.5, 0.7, 0.85, 0.93, 0.97, 0.99)  # of a layer, at which its harm is measured
IMAGES = 128  # run once for every layer and share
FINER = 5  # options between two measured ones
TRIALS = 6  # of the whole network, for a distance
CLOSE = 0.85  # of the distance asked for: near enough
SMALLEST_HARM = 1e-7
RISE = 3.0  # the harm of a layer grows like this power of its share, below the first measured one


@dc.dataclass(frozen=True)
class PruningHarm:
    """The distance KL(original || pruned), in nats, when `num_removed` of `num_weights` weights of one
    layer are zero and nothing else is changed."""

    layer: str
    num_removed: int
    num_weights: int
    harm_kl: float


def pruning_harms(
    module: nn.Module,
    spec: Prune,
    before: Mapping[str, torch.Tensor],
    statistics: Mapping[str, LayerStatistics],
    inputs: Iterable[FloatArray],
    *,
    seed: int = 0,
    shares: Sequence[float] = SHARES,
    num_images: int = IMAGES,
) -> list[PruningHarm]:
    """The harm of pruning each layer of `before` alone, at each of `shares` that its floor allows.

    `before` is what has been kept so far, by layer, in the form (O, I, *kernel); the first row of a layer
    is that state, of harm 0. With spec.reconstruct the rest of the layer is fitted, as it will be. Batch
    norms use the batch's statistics in all runs, as a re-estimation would. The first `num_images` inputs
    judge, all of them fit.
    """
    chunks = input_chunks(inputs)
    judged = torch.cat(chunks)[:num_images]
    trial = on_device(copy.deepcopy(module).eval(), judged.device)
    layers = dict(weight_layers(trial))
    counts = {name: _counts(spec, mask, shares) for name, mask in before.items()}
    found: dict[str, list[PruningHarm]] = {}

    with BatchStatistics(trial):
        original = logits_of(trial, judged)

        def judge(name: str, versions: Iterable[torch.Tensor]) -> None:
            """Versions of the weight of layer `name`, (O, I, *kernel), by rising number removed."""
            layer, size = layers[name], before[name].numel()
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            held = weight.detach().clone()
            rows = [PruningHarm(name, size - int(before[name].sum()), size, 0.0)]
            for count, version in zip(counts[name], versions, strict=True):
                with torch.no_grad():
                    weight.copy_(from_rows(layer, version))
                harm, _ = output_distance(original, logits_of(trial, judged))
                rows.append(PruningHarm(name, count, size, harm))
            with torch.no_grad():
                weight.copy_(held)
            found[name] = rows

        choices = {
            name: [Choice(spec, count, seed) for count in held] for name, held in counts.items()
        }
        if spec.reconstruct:
            fitted_paths(module, choices, chunks, judge, before=before, statistics=statistics)
        for name in [name for name in before if name not in found]:
            rows, mask = rows_of(name, layers[name]).clone(), before[name]
            told = statistics.get(name, NOTHING)
            judge(name, [rows * choice(rows, mask, told) * mask for choice in choices[name]])
    return [row for name in before for row in found[name]]


def allocated(harms: Sequence[PruningHarm], spec: Prune, sparsity: float) -> dict[str, int]:
    """How many weights each layer loses when `sparsity` of all go with the least sum of harms.

    Between measured shares harms are interpolated, log-linearly. Raises BudgetError where the floors
    of the layers do not allow so many.
    """
    by_layer = _by_layer(harms)
    options = {name: _options(rows) for name, rows in by_layer.items()}
    total = sum(rows[0].num_weights for rows in by_layer.values())
    most = sum(rows[-1].num_removed for rows in by_layer.values())
    wanted = round(sparsity * total)
    if wanted > most:
        raise BudgetError(
            f"a sparsity of {sparsity:g} asks for {wanted:,} zeros, and the floors of the layers allow "
            f"{most:,} of {total:,} weights ({most / total:.4f}); lower prune.floor or the sparsity"
        )
    found = allocate(options, total - wanted)
    removed = {name: int(option.choice) for name, option in found.choices.items()}
    surplus = sum(removed.values()) - wanted  # the layer that binds gets it back, then the largest
    for name in sorted(removed, key=lambda n: (n != found.bound_layer, -removed[n])):
        spared = min(max(surplus, 0), removed[name] - by_layer[name][0].num_removed)
        removed[name] -= spared
        surplus -= spared
    return removed


def removed_by_sensitivity(
    spec: Prune,
    harms: Sequence[PruningHarm],
    distance_at: Callable[[dict[str, int]], float],
) -> dict[str, int]:
    """How many weights each layer loses: `allocated` for spec.sparsity or, with spec.distance, for the
    largest total found whose `distance_at`, measured on the whole network, is at most that.

    Harms of layers add up only roughly: their sum proposes a total, measured distances correct it.
    Raises BudgetError where no total tried stays within the distance.
    """
    if not spec.distance:
        return allocated(harms, spec, spec.sparsity)
    tried: list[tuple[float, float]] = []  # (total sparsity, measured distance)
    best: dict[str, int] | None = None
    foreseen = 1.0
    for _ in range(TRIALS):
        total = _next_total(harms, spec, tried, foreseen)
        removed = allocated(harms, spec, total)
        foreseen = _sum_at(harms, removed)
        measured = distance_at(removed)
        if measured <= spec.distance and total >= max(
            (t for t, d in tried if d <= spec.distance), default=0.0
        ):
            best = removed
        tried.append((total, measured))
        if CLOSE * spec.distance <= measured <= spec.distance:
            break
    if best is None:
        raise BudgetError(
            f"no sparsity that was tried keeps the outputs within a distance of {spec.distance:g}; the "
            f"last, {tried[-1][0]:.4f}, gave {tried[-1][1]:.4g}: raise prune.distance"
        )
    return best


def _next_total(
    harms: Sequence[PruningHarm],
    spec: Prune,
    tried: Sequence[tuple[float, float]],
    foreseen: float,
) -> float:
    """The next total sparsity to try: where the logarithm of the distance, between the nearest two tried,
    meets what was asked; before there are two, where the sum of harms, scaled by what was measured last,
    does."""
    within = max(((t, d) for t, d in tried if d <= spec.distance), default=None)
    beyond = min(((t, d) for t, d in tried if d > spec.distance), default=None)
    aim = (1 + CLOSE) / 2 * spec.distance
    if within and beyond and within[1] > 0:
        rise = math.log(beyond[1]) - math.log(within[1])
        share = (math.log(aim) - math.log(within[1])) / rise
        return within[0] + min(max(share, 0.1), 0.9) * (beyond[0] - within[0])
    low, high = within[0] if within else 0.0, beyond[0] if beyond else 1.0
    scale = tried[-1][1] / max(foreseen, 1e-9) if tried else 1.0
    return _total_of(harms, spec, aim / max(scale, 1e-9), low, high)


def _counts(spec: Prune, mask: torch.Tensor, shares: Sequence[float]) -> list[int]:
    """Numbers of removed weights at which a layer is measured, rising."""
    size, gone = mask.numel(), mask.numel() - int(mask.sum())
    most = size - max(1, math.ceil(spec.floor * size))
    counts = {whole_pieces(spec, mask.shape, min(round(s * size), most)) for s in shares}
    return sorted(count for count in counts if count > gone)


def _curve(rows: Sequence[PruningHarm]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Numbers removed and the logarithms of their harms, made to rise."""
    counts = np.array([row.num_removed for row in rows], np.float64)
    harms = np.maximum.accumulate([max(row.harm_kl, 0.0) for row in rows])
    return counts, np.asarray(np.log(harms + SMALLEST_HARM))


def _harm_at(rows: Sequence[PruningHarm], removed: float) -> float:
    """The interpolated harm of one layer."""
    counts, logs = _curve(rows)
    if removed <= counts[0] or len(counts) == 1:
        return 0.0
    if removed < counts[1]:
        share = (removed - counts[0]) / (counts[1] - counts[0])
        return float(np.exp(logs[1]) * share**RISE)
    return float(np.exp(np.interp(removed, counts, logs)))


def _options(rows: Sequence[PruningHarm]) -> list[Option]:
    counts = np.array([row.num_removed for row in rows])
    finer = {
        int(count)
        for low, high in itertools.pairwise(counts)
        for count in np.linspace(low, high, FINER + 1)
    } | {int(counts[0])}
    size = rows[0].num_weights
    return [Option(c, float(size - c), _harm_at(rows, c)) for c in sorted(finer)]


def _sum_at(harms: Sequence[PruningHarm], removed: Mapping[str, int]) -> float:
    rows = _by_layer(harms)
    return math.fsum(_harm_at(rows[name], count) for name, count in removed.items())


def _by_layer(harms: Sequence[PruningHarm]) -> dict[str, list[PruningHarm]]:
    found: dict[str, list[PruningHarm]] = {}
    for row in harms:
        found.setdefault(row.layer, []).append(row)
    return found


def _most(harms: Sequence[PruningHarm]) -> float:
    """The largest total sparsity that the floors allow."""
    rows = _by_layer(harms).values()
    return sum(r[-1].num_removed for r in rows) / sum(r[0].num_weights for r in rows)


def _total_of(
    harms: Sequence[PruningHarm], spec: Prune, harm: float, low: float, high: float
) -> float:
    """The total sparsity between `low` and `high` whose allocation has the sum of harms `harm`."""
    rows = _by_layer(harms).values()
    size = sum(held[0].num_weights for held in rows)
    high = min(high, _most(harms))
    low = max(low, sum(held[0].num_removed for held in rows) / size)
    for _ in range(12):
        middle = (low + high) / 2
        over = _sum_at(harms, allocated(harms, spec, middle)) > harm
        low, high = (low, middle) if over else (middle, high)
    return (low + high) / 2
