"""The best model within limits: against every combination there is, and its promises on any problem."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import BudgetError, SpecError
from tersor.search import Option
from tersor.search.tradeoff import Form, best, nearest, nondominated, pareto, points

whole = st.integers(0, 40).map(float)
layer = st.lists(st.tuples(whole, whole), min_size=1, max_size=4).map(
    lambda pairs: [Option(i, cost, harm) for i, (cost, harm) in enumerate(pairs)]
)
form = st.builds(
    lambda latency, size, harm, layers: Form(
        latency, {"latency_ms": latency}, size, harm, {str(i): o for i, o in enumerate(layers)}
    ),
    st.integers(1, 20).map(float),
    whole,
    whole,
    st.lists(layer, min_size=1, max_size=3),
)
forms = st.lists(form, min_size=1, max_size=4)
limits = st.fixed_dictionaries(
    {},
    optional={
        "size_bytes": st.integers(0, 120).map(float),
        "latency_ms": st.integers(0, 20).map(float),
        "harm": whole,
    },
)


def everything(held):
    """Costs of every combination: size_bytes, latency_ms, harm."""
    for each in held:
        for chosen in itertools.product(*each.options.values()):
            yield {
                "size_bytes": each.size_bytes + sum(o.cost for o in chosen),
                "latency_ms": each.costs["latency_ms"],
                "harm": each.harm + sum(o.harm for o in chosen),
            }


def fits(costs, limits):
    return all(costs[axis] <= limit for axis, limit in limits.items())


@settings(max_examples=300, deadline=None)
@given(forms, limits)
def test_it_fits_whenever_a_form_at_the_hulls_fits_and_never_lies(held, limits):
    possible = [costs for costs in everything(held) if fits(costs, limits)]
    try:
        found = best(held, limits)
    except BudgetError:
        # The filled hull may miss a combination where bytes and harm are both tight, never where one of them is free.
        assert not possible or {"size_bytes", "harm"} <= set(limits)
        return
    assert fits(found.costs, limits)
    chosen = found.choices.values()
    assert found.costs["size_bytes"] == found.form.size_bytes + sum(o.cost for o in chosen)
    assert found.harm == found.form.harm + sum(o.harm for o in chosen)
    if {"harm", "size_bytes"} & set(limits) == {"harm"}:
        # Fewest bytes for the harm, by one step of one layer at most.
        for latency in {c["latency_ms"] for c in possible}:
            least = min(c["size_bytes"] for c in possible if c["latency_ms"] == latency)
            if latency == found.costs["latency_ms"]:
                step = max(
                    max(o.cost for o in offered) - min(o.cost for o in offered)
                    for offered in found.form.options.values()
                )
                assert found.costs["size_bytes"] <= least + step
    if not limits:
        assert found.harm == min(c["harm"] for c in everything(held))


def test_small_problem_equals_brute_force():
    options = {
        f"layer{i}": [Option(bits, bits * w, h * 4.0 ** (2 - bits)) for bits in (2, 3, 4, 8)]
        for i, (w, h) in enumerate([(10, 8.0), (40, 2.0), (5, 64.0)])
    }
    held = [
        Form("whole", {"latency_ms": 4.0}, 20.0, 0.0, options),
        Form("half", {"latency_ms": 2.0}, 15.0, 1.0, options),
        Form("tenth", {"latency_ms": 1.0}, 5.0, 30.0, options),
    ]
    for point in points(held):  # at its own size no combination of its form is less harmful
        limits = {"size_bytes": point.costs["size_bytes"], "latency_ms": point.costs["latency_ms"]}
        truth = min(c["harm"] for c in everything(held) if fits(c, limits))
        assert best(held, limits).harm == pytest.approx(truth)
    found = best(held, {"harm": 4.0})
    truth = min(
        (c for c in everything(held) if c["harm"] <= 4.0),
        key=lambda c: math.log(c["size_bytes"]) + math.log(c["latency_ms"]),
    )
    assert found.costs["latency_ms"] == truth["latency_ms"] == 2.0
    assert found.costs["size_bytes"] == truth["size_bytes"]
    assert best(held, {"size_bytes": 1000.0}).form.choice == "whole"
    assert best(held, {"size_bytes": 1000.0}, slack=2.0).form.choice == "half"


def test_nothing_fits_names_the_bound_and_the_nearest():
    options = {"a": [Option(2, 10.0, 5.0), Option(8, 40.0, 0.0)]}
    held = [
        Form("slow", {"latency_ms": 4.0}, 0.0, 0.0, options),
        Form("fast", {"latency_ms": 2.0}, 0.0, 9.0, options),
    ]
    with pytest.raises(BudgetError):
        best(held, {"latency_ms": 1.0, "size_bytes": 50.0})
    point, axis = nearest(held, {"latency_ms": 1.0, "size_bytes": 50.0})
    assert axis == "latency_ms" and point.form.choice == "fast"
    point, axis = nearest(held, {"size_bytes": 1.0})
    assert axis == "size_bytes" and point.costs["size_bytes"] == 10.0


@given(st.lists(st.tuples(whole, whole, whole), min_size=1, max_size=12))
def test_nondominated_rows_cover_all_and_beat_no_other(rows):
    kept = nondominated(rows)
    for row in rows:
        assert any(all(a <= b for a, b in zip(rows[i], row, strict=True)) for i in kept)
    for i, j in itertools.permutations(kept, 2):
        assert not all(a <= b for a, b in zip(rows[i], rows[j], strict=True))


@settings(max_examples=50, deadline=None)
@given(forms)
def test_the_front_holds_no_dominated_point(held):
    axes = ("size_bytes", "latency_ms", "harm")
    front = pareto(points(held), axes)
    rows = [tuple(p.costs[a] for a in axes) for p in front]
    assert rows == sorted(rows) and len(nondominated(rows)) == len(rows)


def test_requests_that_mean_nothing_are_refused():
    with pytest.raises(SpecError, match="no forms"):
        best([], {})
    only = Form("a", {"latency_ms": 1.0}, 0.0, 0.0, {"x": [Option(1, 1.0, 1.0)]})
    with pytest.raises(SpecError, match=r"'latency'.*latency_ms"):
        best([only], {"latency": 1.0})
