"""From forms of a network, each with options for its layers, to the best model within limits.

A form is one way to build the network as a whole (so much of its channels, in integers or floats): it fixes
what a run costs. What its layers' options cost is bytes. There are few forms, so all are looked at, and within a
form the bytes are given to layers by `search.allocate`: for a limit on bytes the least harm, or, with the roles of
bytes and harm exchanged, for a limit on harm the fewest bytes.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.errors import BudgetError, SpecError
from tersor.search.allocate import Allocation, Option, allocate, frontier

SIZE, HARM = "size_bytes", "harm"
GOALS = (SIZE, "latency_ms")  # made small where no limit is given
Limits = Mapping[str, float]


@dc.dataclass(frozen=True, eq=False)
class Form:
    """One way to build the network, called `choice`.

    `costs` holds what it alone decides, by axis ("latency_ms", "macs", ...); `size_bytes` and `harm` (0 or
    more) come on top of those of the layers' `options` (cost in bytes).
    """

    choice: Any
    costs: Mapping[str, float]
    size_bytes: float
    harm: float
    options: Mapping[str, Sequence[Option]]

    def within(self, limits: Limits) -> bool:
        """Whether all that the form alone decides is within `limits`."""
        return all(value <= limits.get(axis, math.inf) for axis, value in self.costs.items())


@dc.dataclass(frozen=True, eq=False)
class Point:
    """A form with one option for each layer; `costs` are all, with size_bytes and harm.

    `bound_layer` is the layer whose next option would help most and does not fit; "" where none.
    """

    form: Form
    choices: Mapping[str, Option]
    costs: Mapping[str, float]
    bound_layer: str = ""

    @property
    def harm(self) -> float:
        """What is lost, in the unit of the forms' harms."""
        return self.costs[HARM]


def best(forms: Sequence[Form], limits: Limits, *, slack: float = 0.0) -> Point:
    """The best point whose costs are all within `limits` (axes, "size_bytes" and "harm"; any may be missing).

    Of size_bytes and latency_ms those that have no limit are made small: their product is. Without a limit on
    harm it is at most the least that the other limits allow plus `slack`. Where both have a limit the harm is made
    small. Within a form the allocation is that of `allocate`, so never worse than the best by more than one step of
    one layer. Raises SpecError for no forms or unknown axes, BudgetError where nothing fits.
    """
    _check(forms, limits)
    inside = [form for form in forms if form.within(limits)]
    least = min((p for f in inside if (p := _least_harm(f, limits))), key=_by_harm, default=None)
    most = limits.get(HARM, math.inf)
    if least is None or least.harm > most:
        raise BudgetError("no form of the network fits the budget")
    if HARM not in limits:
        most = least.harm + slack
    goals = [axis for axis in GOALS if axis not in limits]
    if not goals:
        return least
    cheapest = _fewest_bytes if SIZE in goals else _least_harm
    fitting = [
        point for form in inside if (point := cheapest(form, {**limits, HARM: most})) is not None
    ]
    fitting = [point for point in fitting if point.harm <= most] or [least]

    def product(point: Point) -> tuple[float, float]:
        logs = sum(math.log(max(point.costs[axis], 1e-12)) for axis in goals if axis in point.costs)
        return logs, point.harm

    return min(fitting, key=product)


def nearest(forms: Sequence[Form], limits: Limits) -> tuple[Point, str]:
    """Where nothing fits: the point that comes nearest, and the axis that is passed most.

    The nearest has the smallest of its largest ratios of cost to limit. Raises SpecError as `best`.
    """
    _check(forms, limits)

    def worst(point: Point) -> tuple[float, str]:
        return max(
            ((point.costs[axis] / limit if limit > 0 else math.inf), axis)
            for axis, limit in limits.items()
            if axis in point.costs
        )

    found = min(points(forms), key=lambda point: worst(point)[0])
    return found, worst(found)[1]


def points(forms: Sequence[Form]) -> list[Point]:
    """The allocations on the lower hulls of all forms."""
    return [_point(form, held) for form in forms for held in frontier(form.options)]


def pareto(found: Sequence[Point], axes: Sequence[str]) -> list[Point]:
    """Those of `found` that no other beats on all `axes`; by rising cost on the first one."""
    rows = [tuple(point.costs[axis] for axis in axes) for point in found]
    kept = nondominated(rows)
    return [found[i] for i in sorted(kept, key=lambda i: rows[i])]


def nondominated(rows: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the rows that no other row is at most equal to in all places, with one below; of
    equal rows the first."""
    return [
        i
        for i, row in enumerate(rows)
        if not any(
            all(a <= b for a, b in zip(other, row, strict=True))
            and (tuple(other) != tuple(row) or j < i)
            for j, other in enumerate(rows)
            if j != i
        )
    ]


def _by_harm(point: Point) -> tuple[float, float]:
    return point.harm, point.costs[SIZE]


def _least_harm(form: Form, limits: Limits) -> Point | None:
    """The least harm within the limit on bytes; None where even the fewest bytes are too many."""
    try:
        held = allocate(form.options, limits.get(SIZE, math.inf) - form.size_bytes)
    except BudgetError:
        return None
    return _point(form, held)


def _fewest_bytes(form: Form, limits: Limits) -> Point | None:
    """The fewest bytes within the limit on harm; None where even the least harm is too much."""
    swapped = {
        layer: [Option(option, max(option.harm, 0.0), option.cost) for option in held]
        for layer, held in form.options.items()
    }
    try:
        held = allocate(swapped, limits.get(HARM, math.inf) - form.harm)
    except BudgetError:
        return None
    chosen = {layer: option.choice for layer, option in held.choices.items()}
    return _point(form, Allocation(chosen, held.harm, held.cost, held.bound_layer))


def _point(form: Form, held: Allocation) -> Point:
    costs = {**form.costs, SIZE: form.size_bytes + held.cost, HARM: form.harm + held.harm}
    return Point(form, held.choices, costs, held.bound_layer)


def _check(forms: Sequence[Form], limits: Limits) -> None:
    if not forms:
        raise SpecError("there are no forms to choose from; give one at least")
    known = {SIZE, HARM}.union(*(form.costs for form in forms))
    if unknown := sorted(set(limits) - known):
        raise SpecError(f"limit on {unknown[0]!r}: the forms' costs are {', '.join(sorted(known))}")
