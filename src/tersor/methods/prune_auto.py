"""How much each layer loses, chosen from what its loss does to the outputs: no ratio is given by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from tersor.graph.groups import Coupling, Group
from tersor.graph.labels import Nodes
from tersor.graph.surgery import lines_of, removed
from tersor.methods.prune_trials import Trials
from tersor.search.allocate import Option, frontier

Units = dict[str, Nodes]  # group -> the units that go, rising
Pick = Callable[[Group, int], Nodes]  # at most so many units of a group, the lowest ones
Cost = Callable[[Mapping[str, Nodes]], int]
SHARES = (*(n / 8 for n in range(1, 8)), 15 / 16)  # removed in a trial of one group
STEPS = 24  # options of a group; harms between trials are interpolated
ROUNDS = 10  # of counting costs anew
KL_BOUND = 0.05  # nats


def group_harms(
    module: nn.Module,
    groups: Sequence[Group],
    found: Coupling,
    pick: Pick,
    trials: Trials,
    shares: Sequence[float] = SHARES,
) -> dict[str, tuple[list[int], list[float]]]:
    """For each group the numbers of units removed in the trials, rising from 0, and the harm of each (nats), rising.

    `shares` are those removed in a trial. One group alone loses its lowest units in a trial; a harm below that of
    fewer units is raised to it.
    """
    table = {}
    for group in groups:
        counts, harms = [0], [0.0]
        for share in shares:
            gone = pick(group, round(share * group.num_units))
            if len(gone) == counts[-1]:
                continue
            smaller = removed(module, lines_of(module, found.kept({group.name: gone})))
            harm = trials.harm_(smaller)
            if not np.isfinite(harm):
                break  # it overflows: so much is not offered
            counts.append(len(gone))
            harms.append(max(harm, harms[-1]))
        table[group.name] = (counts, harms)
    return table


def allocated(
    groups: Sequence[Group],
    harms: Mapping[str, tuple[list[int], list[float]]],
    pick: Pick,
    cost: Cost,
    limit: float,
    start: Units,
) -> Units:
    """The units that go with the least sum of harms at a cost of at most `limit`, which `start` keeps.

    What a group costs depends on what the others lose (a product has two sides). So its options are priced with the
    others as they are, `search.frontier` gives the allocations, the dearest whose true cost keeps the limit is taken,
    and all is priced anew from there, until nothing changes.
    """
    offered = {group.name: _offered(group, harms[group.name], pick) for group in groups}
    current, best, least = start, start, _total(groups, harms, start)
    seen: list[dict[str, int]] = []
    for _ in range(ROUNDS):
        options = {
            name: [Option(gone, cost({**current, name: gone}), harm) for gone, harm in held]
            for name, held in offered.items()
        }
        points = frontier(options)
        low, high = 0, len(points)  # the point before `high` is the dearest that fits, if any
        while low < high:
            middle = (low + high) // 2
            units = {name: option.choice for name, option in points[middle].choices.items()}
            if cost(units) <= limit:
                low, current = middle + 1, units
            else:
                high = middle
        harm = _total(groups, harms, current)
        if low and harm < least:
            best, least = current, harm
        sizes = {name: len(gone) for name, gone in current.items()}
        if not low or sizes in seen:
            break
        seen.append(sizes)
    return best


def _offered(
    group: Group, harms: tuple[list[int], list[float]], pick: Pick
) -> list[tuple[Nodes, float]]:
    """The choices of a group: the units that go, and their harm between those of two trials."""
    counts, values = harms
    found = {}
    for wanted in np.unique(np.linspace(0, counts[-1], STEPS + 1).round().astype(int)):
        gone = pick(group, int(wanted))
        found[len(gone)] = (gone, float(np.interp(len(gone), counts, values)))
    return list(found.values())


def _total(
    groups: Sequence[Group], harms: Mapping[str, tuple[list[int], list[float]]], units: Units
) -> float:
    return sum(float(np.interp(len(units[g.name]), *harms[g.name])) for g in groups)


def within_bound(
    allocate: Callable[[float], Units], harm: Callable[[Units], float], bound: float, least: float
) -> Units:
    """The strongest allocation whose harm, measured on the whole, is at most `bound`.

    `allocate` takes the share of the costs that may stay, from `least` to 1; seven halvings of the interval.
    """
    low, high = least, 1.0
    best = allocate(1.0)
    for _ in range(7):
        middle = (low * high) ** 0.5 if low > 0 else (low + high) / 2
        units = allocate(middle)
        if harm(units) <= bound:
            best, high = units, middle
        else:
            low = middle
    return best
