"""Low rank: which layers become thinner ones in series (`plan`), and a copy of the network in which
they do (`apply`)."""

from __future__ import annotations

import copy
import dataclasses as dc
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tersor.errors import BudgetError, ModelError
from tersor.graph.exchange import fixed_layers, replace_
from tersor.graph.layers import weight_layers
from tersor.graph.series import FACTORIZED, fill_, ranks_fit, series_cost, series_of
from tersor.methods.layer_outputs import LayerOutputs, observe_outputs
from tersor.search import Option, allocate
from tersor.specs import Factorize, LayerPlan, Plan
from tersor.tensors.factorize import FACTORIZATIONS, rank_of_energy, vbmf_rank

FloatArray = npt.NDArray[np.float32]
Outputs = Mapping[str, LayerOutputs]
RANKS_TRIED = 64  # of each layer, for a budget
PAIRS_TRIED = 16  # of Tucker-2's output ranks, and of its input ranks


@dc.dataclass(frozen=True)
class Factorized:
    """A factorized copy, and the plan behind it. `size_share` and `macs_share` are the shares of the
    weights and multiplications of all convolutional and linear layers that are left."""

    module: nn.Module
    plan: Plan
    size_share: float
    macs_share: float


def observe(
    module: nn.Module, spec: Factorize, batches: Iterable[FloatArray]
) -> dict[str, LayerOutputs]:
    """What `plan` and `apply` need of unlabelled `batches` (N, C, H, W) float32, in one pass: one
    image tells the layers' sizes; moments of their outputs are taken where `spec` asks for them.

    Raises what `observe_outputs` does, and ModelError for a network without layers.
    """
    names = [name for name, _ in _layers(module)]
    reasons = fixed_layers(module, FACTORIZED, spec.exclude)
    close = [name for name in names if name not in reasons] if spec.needs_outputs else []
    return observe_outputs(module, batches, names, with_moments=close)


def plan(module: nn.Module, spec: Factorize, outputs: Outputs) -> Plan:
    """Decide the rank of every convolutional and linear layer, or why it is kept.

    `outputs` are those of `observe`. A layer whose factors would take as many weights or
    multiplications as itself is kept. Raises ModelError for a network without such layers or with
    weights that are not finite, SpecError for a pattern that matches no layer, BudgetError for a
    budget that the lowest ranks do not meet.
    """
    layers = _layers(module)
    reasons = fixed_layers(module, FACTORIZED, spec.exclude)
    for name, _ in layers:
        if name not in reasons and not outputs[name].calls:
            reasons[name] = "it is never called: something else reads its weight, or nothing does"
    candidates = {
        name: _Candidate(name, layer, spec, outputs[name])
        for name, layer in layers
        if name not in reasons
    }
    if spec.has_budget:
        ranks = _ranks_within(spec, layers, outputs, candidates)
        reasons |= {name: "the budget leaves it whole" for name in ranks if not ranks[name]}
    else:
        ranks = {name: candidate.ranks_by(spec) for name, candidate in candidates.items()}
        worse = {name: candidates[name].why_not(held) for name, held in ranks.items()}
        reasons |= {name: reason for name, reason in worse.items() if reason}
    decisions = tuple(
        LayerPlan(name, "keep", reason=reasons[name])
        if name in reasons
        else LayerPlan(name, "factorize", ranks=ranks[name])
        for name, _ in layers
    )
    return Plan(spec, decisions)


def apply(module: nn.Module, decided: Plan, outputs: Outputs) -> nn.Module:
    """A copy of `module` in which each layer that `decided` factorizes is an `nn.Sequential` of the
    layers in series; its other parts and its class stay.

    `outputs` are those of `observe`. Raises ModelError where the plan belongs to another network.
    """
    request = _request(decided)
    changed = restructured(module, decided)
    layers = dict(_layers(module))
    for decision in decided.layers:
        if decision.action == "factorize":
            weight, bias = _tensors(decision.layer, layers[decision.layer])
            moments = outputs[decision.layer].moments
            factorization = FACTORIZATIONS[request.method](weight, bias, moments)
            fill_(changed.get_submodule(decision.layer), factorization.truncated(decision.ranks))
    return changed


def restructured(module: nn.Module, decided: Plan) -> nn.Module:
    """A copy of `module` with the layers that `decided` asks for, their weights zero: ready for the
    state dict of a network that was factorized by the same plan.

    Raises ModelError where the plan names a layer that this module lacks, or ranks that do not fit.
    """
    request = _request(decided)
    changed = copy.deepcopy(module)
    layers = dict(weight_layers(changed))
    for decision in decided.layers:
        if decision.action != "factorize":
            continue
        layer = layers.get(decision.layer)
        if layer is None or type(layer) not in FACTORIZED or not ranks_fit(layer, decision.ranks):
            raise ModelError(
                f"the plan factorizes layer {decision.layer!r} at ranks {decision.ranks}, and "
                f"{type(module).__name__} has {layer or 'no such layer'} there; the plan belongs to "
                "another network"
            )
        # The best bias is part of what is fitted to outputs, so there is one in any case.
        with_bias = request.needs_outputs or layer.bias is not None
        replace_(changed, layer, series_of(layer, decision.ranks, with_bias=with_bias))
    return changed


def factorize(module: nn.Module, spec: Factorize, batches: Iterable[FloatArray]) -> Factorized:
    """`observe`, `plan`, then `apply`.

    What comes out is run once: a module whose own code reads the weight of a replaced layer is
    refused, by ModelError.
    """
    kept: list[FloatArray] = []

    def keeping_first() -> Iterator[FloatArray]:
        for batch in batches:
            if not kept:
                kept.append(batch)
            yield batch

    outputs = observe(module, spec, keeping_first())
    decided = plan(module, spec, outputs)
    changed = apply(module, decided, outputs)
    _check_runs(changed, torch.from_numpy(kept[0][:2]))
    held = [
        (_cost(layer, decision.ranks, outputs[name]), _cost(layer, (), outputs[name]))
        for (name, layer), decision in zip(_layers(module), decided.layers, strict=True)
    ]
    size, macs = (
        sum(left[unit] for left, _ in held) / max(sum(full[unit] for _, full in held), 1)
        for unit in (0, 1)
    )
    return Factorized(changed, decided, size, macs)


class _Candidate:
    """A layer that may be factorized: what each rank loses and costs."""

    def __init__(self, name: str, layer: nn.Module, spec: Factorize, seen: LayerOutputs) -> None:
        weight, bias = _tensors(name, layer)
        self.energies = FACTORIZATIONS[spec.method](weight, bias, seen.moments).energies
        self.layer, self.seen = layer, seen
        self.shape, self.step = tuple(weight.shape), spec.multiple_of

    def ranks_by(self, spec: Factorize) -> tuple[int, ...]:
        """The ranks that the layer's own energies ask for."""
        count = math.prod(self.shape)
        return tuple(
            self._stepped(
                rank_of_energy(held, spec.energy)
                if spec.rank == "energy"
                else vbmf_rank(held, size, count // size),
                len(held),
            )
            for held, size in zip(self.energies, self.shape, strict=False)
        )

    def options(self, unit: int) -> list[Option]:
        """The layer as it is, then at ranks that save, of each the weights (unit 0) or
        multiplications (unit 1) as costs; harms are shares of energy lost (of Tucker-2 a bound)."""
        options = [Option((), float(_cost(self.layer, (), self.seen)[unit]), 0.0)]
        lost = [
            (1 - held.cumsum(0) / max(float(held.sum()), 1e-300)).clamp(min=0).tolist()
            for held in self.energies
        ]
        for ranks in itertools.product(*map(self._tried, map(len, self.energies))):
            if not self.why_not(ranks):
                cost = float(_cost(self.layer, ranks, self.seen)[unit])
                harm = sum(held[rank - 1] for held, rank in zip(lost, ranks, strict=True))
                options.append(Option(ranks, cost, harm))
        return options

    def why_not(self, ranks: Sequence[int]) -> str:
        """Why these ranks would not pay, or nothing."""
        needed, held = (_cost(self.layer, r, self.seen) for r in (ranks, ()))
        for what, more, less in zip(("weights", "multiplications"), needed, held, strict=True):
            if more >= less:
                shown = " x ".join(map(str, ranks))
                return f"rank {shown} would take {more:,} {what}, the layer has {less:,}"
        return ""

    def _tried(self, most: int) -> list[int]:
        """Ranks to offer of a component count `most`, evenly spaced."""
        steps = math.ceil(most / self.step)
        wanted = min(RANKS_TRIED if len(self.energies) == 1 else PAIRS_TRIED, steps)
        spaced = sorted({round(place) for place in np.linspace(1, steps, wanted)})
        return [self._stepped(place * self.step, most) for place in spaced]

    def _stepped(self, rank: int, most: int) -> int:
        return min(math.ceil(rank / self.step) * self.step, most)


def _ranks_within(
    spec: Factorize,
    layers: Sequence[tuple[str, nn.Module]],
    outputs: Outputs,
    candidates: Mapping[str, _Candidate],
) -> dict[str, tuple[int, ...]]:
    """The ranks of each candidate, () to leave it whole, that lose least within the budget."""
    unit, share = (0, spec.size) if spec.size > 0 else (1, spec.macs)
    options = {
        name: candidates[name].options(unit)
        if name in candidates
        else [Option((), float(_cost(layer, (), outputs[name])[unit]), 0.0)]
        for name, layer in layers
    }
    total = sum(held[0].cost for held in options.values())
    least = {name: min(option.cost for option in held) for name, held in options.items()}
    if sum(least.values()) > share * total:
        raise BudgetError(
            f"factorize.{'macs' if unit else 'size'} {share:.3g} cannot be met: the least possible "
            f"share is {sum(least.values()) / max(total, 1):.3g}, most of it in layer "
            f"{max(least, key=lambda name: least[name])!r}; raise the budget or exclude fewer layers"
        )
    found = allocate(options, share * total).choices
    return {name: found[name].choice for name in candidates}


def _layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    layers = weight_layers(module)
    if not layers:
        raise ModelError(
            f"{type(module).__name__} has no convolutional or linear layer, so nothing to factorize"
        )
    return layers


def _request(decided: Plan) -> Factorize:
    if not isinstance(decided.request, Factorize):
        raise ModelError(
            f"the plan answers a request of kind {decided.request.kind!r}; expected factorize"
        )
    return decided.request


def _tensors(name: str, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor))
    if not torch.isfinite(weight).all():
        raise ModelError(
            f"layer {name!r} holds NaN or infinite weights; train it again or mend the file"
        )
    return weight.detach().cpu(), None if bias is None else bias.detach().cpu()


def _cost(layer: nn.Module, ranks: Sequence[int], seen: LayerOutputs) -> tuple[int, int]:
    return series_cost(layer, ranks, seen.positions, seen.positions_in)


def _check_runs(module: nn.Module, images: torch.Tensor) -> None:
    trial = copy.deepcopy(module).eval()
    try:
        with torch.no_grad():
            trial(images.to(next(trial.parameters())))
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(module).__name__} does not run with its layers factorized ({reason}): its own "
            "code reads the weight of a layer; exclude that layer"
        ) from None
