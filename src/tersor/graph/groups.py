"""From the ties of a trace to units, groups and what stays.

A unit is the smallest piece that can go: one output channel with its row of the weight, its entries in batch norms,
and the columns that read it everywhere. Units that lie in the same places form a group.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tersor.graph.labels import STAYS, Nodes, Ties
from tersor.graph.trace import Choices, Site, Tracer

Removed = Mapping[str, Sequence[int] | Nodes]  # group -> its units that go


@dc.dataclass(frozen=True, eq=False)
class Member:
    """Slices of one tensor along one axis: `index` (num_units, k) int64 holds the k indices of each unit.

    `role` is "output" where the slices make the unit's values, "input" where they read them, else "along".
    """

    name: str
    axis: int
    index: Nodes
    role: str


@dc.dataclass(frozen=True, eq=False)
class Group:
    """Units with slices in the same places. `name` is the layer (or parameter) that makes them; `num_gone` counts those
    that the network has lost since it was traced."""

    name: str
    num_units: int
    members: tuple[Member, ...]
    nodes: Nodes  # (num_units,): the component of each unit
    num_gone: int = 0


@dc.dataclass(frozen=True)
class Frozen:
    """Channels that stay: those of `name` along `axis`, how many, and why."""

    name: str
    axis: int
    count: int
    reason: str


@dc.dataclass(frozen=True, eq=False)
class Coupling:
    """All groups of a network in the order of its parameters, and the channels that stay."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    ties: Ties
    component: Nodes
    sites: tuple[Site, ...] = ()
    choices: Choices = dc.field(default_factory=dict)
    trained: bool = False  # whether a run in training mode was labelled too
    gone: npt.NDArray[np.bool_] | None = None  # (num_nodes,): what the network has lost since

    def __getitem__(self, name: str) -> Group:
        """The group of that name. Raises KeyError."""
        return next(group for group in self.groups if group.name == name)

    def kept(self, removed: Removed) -> dict[tuple[str, int], Nodes]:
        """(tensor, axis) -> indices that stay, for the units `removed` of each group by its name."""
        gone: dict[tuple[str, int], list[Nodes]] = {}
        for group in self.groups:
            units = np.asarray(removed.get(group.name, ()), np.int64)
            for member in group.members if len(units) else ():
                gone.setdefault((member.name, member.axis), []).append(member.index[units].ravel())
        return {
            place: np.setdiff1d(np.arange(self._left(place).sum()), np.concatenate(indices))
            for place, indices in gone.items()
        }

    def nodes_of(self, removed: Removed) -> npt.NDArray[np.bool_]:
        """(num_nodes,) bool: which nodes go, or have gone before."""
        gone = np.zeros(self.ties.num_nodes, bool)  # by component
        for group in self.groups:
            gone[group.nodes[np.asarray(removed.get(group.name, ()), np.int64)]] = True
        return gone[self.component] if self.gone is None else gone[self.component] | self.gone

    def without(self, removed: Removed) -> Coupling:
        """The coupling of the network that is left when the units `removed` have gone: the same groups with the units
        that stay, at the indices which they have there. Nothing is traced anew; of the network that was traced only."""
        assert self.gone is None, "units are counted in the network that was traced"
        left = dc.replace(self, gone=self.nodes_of(removed))
        return dc.replace(left, groups=tuple(left._of(group, removed) for group in self.groups))

    def _of(self, group: Group, removed: Removed) -> Group:
        """What is left of a group, in its new indices."""
        units = np.setdiff1d(np.arange(group.num_units), np.asarray(removed.get(group.name, ())))
        members = tuple(
            dc.replace(m, index=(np.cumsum(self._left((m.name, m.axis))) - 1)[m.index[units]])
            for m in group.members
        )
        gone = group.num_units - len(units)
        return Group(group.name, len(units), members, group.nodes[units], gone)

    def _left(self, place: tuple[str, int]) -> npt.NDArray[np.bool_]:
        """Which indices of (tensor, axis), as traced, the network still has."""
        start, size = self.ties.starts[self.ties.places.index(place)], self.ties.size(place)
        if self.gone is None:
            return np.ones(size, bool)
        return ~self.gone[start : start + size]

    @property
    def whole_macs(self) -> int:
        """Multiplications of the network that was traced, before anything went."""
        return dc.replace(self, gone=None).macs()

    def macs(self, removed: Removed | None = None) -> int:
        """Multiplications of the products of one run on the example, without the units `removed`."""
        left = ~self.nodes_of(removed or {})
        total = 0
        for product in self.ties.products:
            count = product.constant
            for nodes in product.axes:
                count *= int(left[nodes].sum())
            total += count
        return total


def grouped(tracer: Tracer) -> Coupling:
    """The groups that a trace found; not yet proven."""
    ties = tracer.ties
    component, reasons = ties.components()
    source = np.zeros(ties.num_nodes, bool)
    for nodes in ties.sources:
        source[nodes] = True
    source[STAYS] = False
    live = np.zeros(ties.num_nodes, bool)  # by component
    live[component[source]] = True
    stays = np.zeros(ties.num_nodes, bool)
    stays[list(reasons)] = True
    return Coupling(
        _groups(ties, component, source, live & ~stays),
        _frozen(ties, component, source, reasons),
        ties,
        component,
        tuple(tracer.sites),
        dict(tracer.choices),
    )


def _groups(
    ties: Ties, component: Nodes, source: npt.NDArray[np.bool_], free: npt.NDArray[np.bool_]
) -> tuple[Group, ...]:
    nodes = np.flatnonzero(free[component])
    nodes = nodes[nodes != STAYS]
    places = np.searchsorted(np.asarray(ties.starts), nodes, side="right") - 1
    held: dict[int, list[tuple[int, int]]] = {}
    for node, place in zip(nodes.tolist(), places.tolist(), strict=True):
        held.setdefault(int(component[node]), []).append((place, node - ties.starts[place]))
    by_places: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for unit, slices in held.items():
        counts: dict[int, int] = {}
        for place, _ in slices:
            counts[place] = counts.get(place, 0) + 1
        by_places.setdefault(tuple(sorted(counts.items())), []).append(unit)
    made = set(np.searchsorted(np.asarray(ties.starts), np.flatnonzero(source), side="right") - 1)
    groups: list[Group] = []
    taken: set[str] = set()
    for signature, units in by_places.items():
        members = []
        for place, _ in signature:
            index = np.array([[i for p, i in held[unit] if p == place] for unit in units], np.int64)
            name, axis = ties.places[place]
            siblings = [
                p for p, (other, _) in enumerate(ties.places) if other == name and p != place
            ]
            role = "output" if place in made else "input" if made & set(siblings) else "along"
            members.append(Member(name, axis, index, role))
        name = next(m.name for m in members if m.role == "output").removesuffix(".weight")
        while name in taken:
            name += "+"
        taken.add(name)
        groups.append(Group(name, len(units), tuple(members), np.asarray(units, np.int64)))
    return tuple(groups)


def _frozen(
    ties: Ties, component: Nodes, source: npt.NDArray[np.bool_], reasons: dict[int, list[str]]
) -> tuple[Frozen, ...]:
    found: dict[tuple[int, str], int] = {}
    for node in np.flatnonzero(source).tolist():
        if int(component[node]) in reasons:
            place = int(np.searchsorted(np.asarray(ties.starts), node, side="right")) - 1
            key = (place, reasons[int(component[node])][0])
            found[key] = found.get(key, 0) + 1
    return tuple(Frozen(*ties.places[place], count, why) for (place, why), count in found.items())
