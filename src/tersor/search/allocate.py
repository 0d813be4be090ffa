"""One option for each layer: the least harm in all, within a limit on the costs in all.

Every layer offers options, each with a cost and a harm, and both add up over the layers. Of all
allocations, those on the lower convex hull of (cost, harm) minimise harm + multiplier * cost for
some multiplier, and for a given multiplier each layer chooses alone (Shoham and Gersho 1988,
"Efficient bit allocation for an arbitrary set of quantizers", theorem 1). What the limit leaves
after the last allocation of the hull is filled greedily.
"""

from __future__ import annotations

import bisect
import dataclasses as dc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tersor.errors import BudgetError, SpecError

LARGEST_TABLE = 100_000_000  # cells of the exact search, a byte each


@dc.dataclass(frozen=True)
class Option:
    """What one layer may be given: `choice` (for instance its bits), at a `cost` of at least 0, for
    a `harm`. Costs share a unit over all layers, and so do harms."""

    choice: Any
    cost: float
    harm: float


@dc.dataclass(frozen=True)
class Allocation:
    """One option for each layer, and the sums of their costs and harms.

    `bound_layer` is the layer at which the limit stops: its next option removes the most harm for
    its cost, and does not fit. It is empty where every layer has its least harm.
    """

    choices: dict[str, Option]
    cost: float
    harm: float
    bound_layer: str = ""


@dc.dataclass(frozen=True)
class _Step:
    """From one option of a layer's hull to the next: dearer, and less harmful."""

    layer: str
    option: Option
    gain: float  # harm removed for a unit of cost


def allocate(options: Mapping[str, Sequence[Option]], limit: float) -> Allocation:
    """The option for each layer that keeps the sum of costs at or below `limit` with little harm.

    The least harm possible where the limit is the cost of an allocation of `frontier`; elsewhere
    worse than it by less than the harm that the next step of `bound_layer` would remove, and never
    worse than any choice that all layers with several options share and that fits. Raises SpecError
    for options or a limit that mean nothing, BudgetError for a limit below the least cost.
    """
    tidy = _checked(options, limit)
    base, steps = _hull_steps(tidy)
    # The multiplier falls from step to step; the last one that fits is found by bisection.
    fitting = bisect.bisect_right(
        range(1, len(steps) + 1), limit, key=lambda count: _cost(_taken(base, steps[:count]))
    )
    best = _filled(_taken(base, steps[:fitting]), tidy, limit)
    for shared in _shared_choices(options):
        if _harm(shared) < _harm(best) and _cost(shared) <= limit:
            best = _filled(shared, tidy, limit)
    return _allocation(options, best, steps[fitting].layer if fitting < len(steps) else "")


def exact(
    options: Mapping[str, Sequence[Option]], limit: float, resolution: float = 1.0
) -> Allocation:
    """The allocation of least harm by dynamic programming over the cost spent.

    Each cost is rounded up to whole multiples of `resolution`: the limit always holds, and the
    answer is optimal where costs are such multiples. Time and memory grow with the number of layers
    times limit / resolution. Raises what `allocate` does, and SpecError for a table too large.
    """
    if not (math.isfinite(resolution) and resolution > 0):
        raise SpecError(f"resolution must be finite and above 0, got {resolution!r}")
    tidy = _checked(options, limit)
    units = {
        layer: [math.ceil(min(option.cost / resolution, LARGEST_TABLE)) for option in held]
        for layer, held in tidy.items()
    }
    most = min(limit / resolution, sum(costs[-1] for costs in units.values()))
    places = math.floor(most) + 1
    if places * len(tidy) > LARGEST_TABLE:
        raise SpecError(
            f"{len(tidy)} layers at {places:,} costs are {places * len(tidy):,} cells; at most "
            f"{LARGEST_TABLE:,} are searched: raise resolution (now {resolution:g}) or use allocate"
        )
    least = np.zeros(places)  # least harm of the layers so far that costs at most its index
    longest = max(len(held) for held in tidy.values())
    taken = np.zeros((len(tidy), places), np.min_scalar_type(longest))
    for row, (layer, held) in enumerate(tidy.items()):
        best = np.full(places, np.inf)
        for index, (option, cost) in enumerate(zip(held, units[layer], strict=True)):
            harm = least[: max(places - cost, 0)] + option.harm
            better = harm < best[cost:]
            best[cost:][better] = harm[better]
            taken[row, cost:][better] = index
        least = best
    if not np.isfinite(least[-1]):
        raise BudgetError(
            f"with costs rounded up to multiples of {resolution:g}, no choice costs {limit:g} or "
            "less; lower resolution or raise the limit"
        )
    chosen, place = {}, places - 1
    for row, (layer, held) in reversed(list(enumerate(tidy.items()))):
        index = int(taken[row, place])
        chosen[layer] = held[index]
        place -= units[layer][index]
    return _allocation(options, chosen, "")


def frontier(options: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """The allocations on the lower convex hull of (cost, harm), from the cheapest to the least
    harmful.

    Each has the least harm of all that cost as much or less. Raises SpecError as `allocate` does.
    """
    base, steps = _hull_steps(_checked(options, math.inf))
    layers = [step.layer for step in steps] + [""]
    return [
        _allocation(options, _taken(base, steps[:count]), layers[count])
        for count in range(len(steps) + 1)
    ]


def _checked(options: Mapping[str, Sequence[Option]], limit: float) -> dict[str, list[Option]]:
    """Each layer's options without those that another beats, by rising cost and falling harm."""
    if not options:
        raise SpecError("there are no layers to allocate to; give at least one with its options")
    if math.isnan(limit):
        raise SpecError(f"limit must be a number, got {limit!r}")
    tidy = {}
    for layer, offered in options.items():
        if not offered:
            raise SpecError(f"layer {layer!r} offers no option; give it one at least")
        for option in offered:
            if not (math.isfinite(option.cost) and option.cost >= 0 and math.isfinite(option.harm)):
                raise SpecError(
                    f"layer {layer!r}, choice {option.choice!r}: cost {option.cost!r} and harm "
                    f"{option.harm!r} must be finite, and the cost 0 or more"
                )
        kept: list[Option] = []
        for option in sorted(offered, key=lambda o: (o.cost, o.harm)):
            if not kept or option.harm < kept[-1].harm:
                kept.append(option)
        tidy[layer] = kept
    if (least := _cost({layer: held[0] for layer, held in tidy.items()})) > limit:
        raise BudgetError(
            f"no choice of options costs {limit:,.15g} or less: the smallest possible cost is "
            f"{least:,.15g}; raise the limit or offer cheaper options"
        )
    return tidy


def _hull_steps(tidy: Mapping[str, Sequence[Option]]) -> tuple[dict[str, Option], list[_Step]]:
    """The cheapest option of each layer, and the steps of all hulls by falling gain."""
    steps = []
    for layer, held in tidy.items():
        hull: list[_Step] = [_Step(layer, held[0], math.inf)]
        for option in held[1:]:
            # A step that gains more than the one before it makes the point between them useless.
            while (gain := _gain(hull[-1].option, option)) > hull[-1].gain:
                hull.pop()
            hull.append(_Step(layer, option, gain))
        steps += hull[1:]
    # Stable: steps of one layer with equal gain stay in their order.
    steps.sort(key=lambda step: -step.gain)
    return {layer: held[0] for layer, held in tidy.items()}, steps


def _gain(held: Option, dearer: Option) -> float:
    return (held.harm - dearer.harm) / (dearer.cost - held.cost)


def _taken(base: Mapping[str, Option], steps: Sequence[_Step]) -> dict[str, Option]:
    return {**base, **{step.layer: step.option for step in steps}}


def _shared_choices(options: Mapping[str, Sequence[Option]]) -> list[dict[str, Option]]:
    """The allocations that give one choice to every layer that has several options."""
    single = {layer: held[0] for layer, held in options.items() if len(held) == 1}
    several = {layer: held for layer, held in options.items() if len(held) > 1}
    found = []
    for choice in [option.choice for held in [*several.values()][:1] for option in held]:
        same = {
            layer: min((o for o in held if o.choice == choice), key=lambda o: o.harm, default=None)
            for layer, held in several.items()
        }
        chosen = {layer: option for layer, option in same.items() if option is not None}
        if len(chosen) == len(several):
            found.append({**single, **chosen})
    return found


def _filled(
    start: Mapping[str, Option], tidy: Mapping[str, Sequence[Option]], limit: float
) -> dict[str, Option]:
    """`start` with the exchange that gains the most, of those that fit, again and again."""
    chosen = dict(start)
    while True:
        best: tuple[float, str, Option] | None = None
        for layer, held in tidy.items():
            for option in held:
                if option.harm >= chosen[layer].harm:
                    continue
                if _cost({**chosen, layer: option}) > limit:
                    break  # options are sorted by cost
                more = option.cost - chosen[layer].cost
                gain = (chosen[layer].harm - option.harm) / more if more > 0 else math.inf
                if best is None or gain > best[0]:
                    best = (gain, layer, option)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]


def _allocation(
    options: Mapping[str, Sequence[Option]], chosen: Mapping[str, Option], bound_layer: str
) -> Allocation:
    in_order = {layer: chosen[layer] for layer in options}
    return Allocation(in_order, _cost(in_order), _harm(in_order), bound_layer)


def _cost(chosen: Mapping[str, Option]) -> float:
    # Rounded once, whatever the order: equal allocations cost the same to the last bit.
    return math.fsum(option.cost for option in chosen.values())


def _harm(chosen: Mapping[str, Option]) -> float:
    return math.fsum(option.harm for option in chosen.values())
