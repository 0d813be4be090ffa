"""Smaller networks of one family: for any share of the costs the channels that are missed least."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from tersor.errors import ModelError
from tersor.graph.coupling import coupled_groups
from tersor.graph.groups import Coupling, Removed
from tersor.graph.labels import named_tensors
from tersor.graph.surgery import lines_of, removed
from tersor.methods.layer_outputs import observe_outputs
from tersor.methods.prune_auto import Units, allocated, group_harms
from tersor.methods.prune_structured import (
    Ranked,
    candidates,
    plan_of_units,
    require_finite,
    scores_of,
)
from tersor.methods.prune_trials import Trials
from tersor.methods.unit_statistics import unit_statistics
from tersor.specs import Plan, Prune
from tersor.tensors.unit_criteria import UNIT_CRITERIA

FloatArray = npt.NDArray[np.float32]
TRIED = (0.25, 0.5, 0.75)  # shares of a group removed in its trials
UNSEEN_SHARE = 0.25  # of what the images' own statistics change
WIDER = 1.5  # times the equal width a group has at most where multiplications choose
EQUAL = 0.8  # of the cost beyond the narrowest's has a network of equal widths, the rest goes where it buys most
WIDEST_MULTIPLE = 16  # channels that integer kernels take at a time
# By group: numbers of units that were removed in trials, and the harm of each.
Harms = Mapping[str, tuple[list[int], list[float]]]
CountedCost = Callable[[Removed], int]


class ChannelFamily:
    """The channels of a network, ranked and priced once, and what is left of it at any share of the cost.

    `module` is asked on `images` (N, C, H, W) float32, unlabelled; `example` is a small input. `cost_of` makes of
    the coupling a function from removed units to a cost (whole numbers, less for more removed); by default the
    multiplications of one run. `harms` are those of an earlier family of the same network and images, which are not
    measured again. Raises as `prune_structured.plan`; ModelError where nothing can be removed.
    """

    def __init__(
        self,
        module: nn.Module,
        images: FloatArray,
        example: Any,
        *,
        cost_of: Callable[[Coupling], CountedCost] | None = None,
        criterion: str = "fisher",
        tried: Sequence[float] = TRIED,
        harms: Harms | None = None,
        on_progress: Callable[[float], None] | None = None,
        seed: int = 0,
    ) -> None:
        require_finite(module)
        self.module = module
        self.found = coupled_groups(module, example)
        multiple = _multiple(self.found)
        self.spec = Prune(
            structure="channel",
            scope="auto",
            sparsity=0.0,
            criterion=criterion,
            reconstruct=True,
            multiple_of=multiple,
        )
        groups = candidates(module, self.spec, self.found)
        statistics = None
        if needs := UNIT_CRITERIA[criterion].needs:
            statistics = unit_statistics(
                module, images, None, gradients=needs == "effects", seed=seed
            )
        self._told(on_progress, 0.2)
        self.ranked = Ranked(
            self.spec, groups, scores_of(module, groups, self.spec, statistics, seed)
        )
        self.trials = Trials(module, images)
        self.harms: dict[str, tuple[list[int], list[float]]] = dict(harms or {})
        for number, group in enumerate(groups, 1):
            if group.name in self.harms:
                continue
            self.harms |= group_harms(
                module, [group], self.found, self.ranked.lowest, self.trials, tried
            )
            self._told(on_progress, 0.2 + 0.8 * number / len(groups))
        self.cost = self.found.macs if cost_of is None else cost_of(self.found)
        self.whole = self.cost({})

    @staticmethod
    def _told(on_progress: Callable[[float], None] | None, share: float) -> None:
        if on_progress:
            on_progress(share)

    @property
    def least_share(self) -> float:
        """The share of the cost that is left when all that may go is removed."""
        return self._narrowest / self.whole

    @functools.cached_property
    def _narrowest(self) -> int:
        """The cost when all that may go is removed."""
        return self.cost(self.ranked.at(1.0))

    def units(self, share: float) -> Units:
        """The units of each group that go so that at most `share` of the cost (0 to 1) is left, with the least sum
        of measured harms. Raises ModelError where that is too little to be left."""
        if share >= 1:
            return self._none()
        limit = self._limit(share)
        start = self._equal(limit)
        return allocated(
            self.ranked.groups, self.harms, self.ranked.lowest, self.cost, limit, start
        )

    def busiest(self, share: float) -> Units:
        """The units of each group that go so that at most `share` of the cost (0 to 1) is left, and with it as many
        multiplications as near equal widths allow: each group keeps the same share of its units, for a little less
        than the cost, and is then widened step by step, to WIDER times that (by one step at least), where most
        multiplications come for the cost first. Fully connected layers of one vector an input are held to be no
        wider than what they read: their weights take the time of being read, and do one multiplication each.

        For networks that are trained anew, to which widths matter more than which units these are (Liu 2019,
        "Rethinking the value of network pruning"). Raises ModelError where that is too little to be left.
        """
        if share >= 1:
            return self._none()
        limit = self._limit(share)
        most = self._narrowest + EQUAL * (limit - self._narrowest)
        equal = current = self._equal(most, self._bounded)
        while True:
            cost, macs = self.cost(current), self.macs(current)
            wider = self._wider(current, equal)
            tried = [(units, self.cost(units), self.macs(units)) for units in wider]
            fitting = [each for each in tried if each[1] <= limit]
            if not fitting:
                return current
            current = max(fitting, key=lambda each: (each[2] - macs) / max(each[1] - cost, 1))[0]

    def _wider(self, units: Units, equal: Units) -> Iterator[Units]:
        """`units` with one group a step wider, where that is at most WIDER times what `equal` leaves, or one step."""
        read = self._read(units)
        for group in self.ranked.groups:
            gone = len(units[group.name])
            if not gone:
                continue
            fewer = self.ranked.lowest(group, gone - 1)
            first = group.num_units - len(equal[group.name])
            width, step = group.num_units - len(fewer), gone - len(fewer)
            most = min(max(WIDER * first, first + step), read.get(group.name, group.num_units))
            if width <= most:
                yield {**units, group.name: fewer}

    def _bounded(self, units: Units) -> Units:
        """`units`, and of fully connected groups as many more as make them no wider than what they read."""
        bounded = dict(units)
        for name in self._of_vectors:  # in the order of the layers: each may bound the next
            group, most = self.found[name], self._read(bounded)[name]
            if group.num_units - len(bounded[name]) > most:
                bounded[name] = self.ranked.lowest(group, group.num_units - most)
        return bounded

    def _read(self, units: Units) -> dict[str, int]:
        """How many values the layers of each fully connected group read, without `units`."""
        if not self._of_vectors:
            return {}
        kept: Mapping[tuple[str, int], Any] = self.found.kept(units)

        def columns(layer: str) -> int:
            weight = f"{layer}.weight"
            return len(kept.get((weight, 1), range(self.module.get_parameter(weight).shape[1])))

        return {group: min(map(columns, layers)) for group, layers in self._of_vectors.items()}

    @functools.cached_property
    def _of_vectors(self) -> dict[str, list[str]]:
        """The layers of each group that only linear layers make, of one vector an input (not of many, as tokens), which
        reads channels that may go (not the network's own inputs)."""
        linear = {n for n, m in self.module.named_modules() if isinstance(m, nn.Linear)}
        members = [(g.name, m) for g in self.ranked.groups for m in g.members]
        read = {
            m.name.removesuffix(".weight") for _, m in members if m.role == "input" and m.axis == 1
        }
        made: dict[str, list[str]] = {}
        for group, m in members:
            if m.role == "output" and m.axis == 0 and m.name.endswith(".weight"):
                made.setdefault(group, []).append(m.name.removesuffix(".weight"))
        found = {group: layers for group, layers in made.items() if linear & read >= {*layers}}
        if not found:
            return {}
        names = [name for layers in found.values() for name in layers]
        seen = observe_outputs(self.module, [self.trials.images[0][:1].numpy()], names)
        many = {name for name, ran in seen.items() if ran.positions > ran.calls}
        return {group: layers for group, layers in found.items() if many.isdisjoint(layers)}

    def _none(self) -> Units:
        return {group.name: np.zeros(0, np.int64) for group in self.ranked.groups}

    def _limit(self, share: float) -> float:
        limit = share * self.whole
        if self._narrowest > limit:
            raise ModelError(
                f"no removal leaves {share:.4f} of the cost; at least {self.least_share:.4f} stays"
            )
        return limit

    def _equal(self, limit: float, more: Callable[[Units], Units] = dict) -> Units:
        """The smallest share of units, the same of every group, that keeps the limit, with what `more` adds to it."""
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            cost = self.cost(more(self.ranked.at(middle)))
            low, high = (low, middle) if cost <= limit else (middle, high)
        return more(self.ranked.at(high))

    def harm(self, units: Units) -> float:
        """The KL divergence (nats) of the network without `units` from the original, batch norms on the images' own
        statistics, nothing fitted."""
        if not any(len(held) for held in units.values()):
            return 0.0
        return self.trials.harm_(
            removed(self.module, lines_of(self.module, self.found.kept(units)))
        )

    @property
    def unseen(self) -> float:
        """Harms (nats) below this are not told from none: batch norms on the images' own statistics change more."""
        return UNSEEN_SHARE * self.trials.offset

    def macs(self, units: Units) -> int:
        """Multiplications of one run on the example."""
        return self.found.macs(units)

    def sizes(self, units: Units) -> dict[str, int]:
        """Elements of each parameter that are left."""
        kept: Mapping[tuple[str, int], Any] = self.found.kept(units)
        return {
            name: int(
                np.prod(
                    [
                        len(kept.get((name, axis), range(size)))
                        for axis, size in enumerate(tensor.shape)
                    ]
                )
            )
            for name, tensor in named_tensors(self.module)
        }

    def plan(self, units: Units) -> Plan:
        """The removal as a plan, for `prune_structured.apply`."""
        return plan_of_units(self.module, self.spec, self.found, units)


def _multiple(found: Coupling) -> int:
    """Widths are kept to multiples that integer kernels take at a time, and to a quarter of the narrowest group."""
    narrowest = min((group.num_units for group in found.groups), default=1)
    multiple = WIDEST_MULTIPLE
    while multiple > 1 and multiple * 4 > narrowest:
        multiple //= 2
    return multiple
