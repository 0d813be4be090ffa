"""The limit always holds, and what is chosen is as good as the proofs say."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import BudgetError, SpecError
from tersor.search import Option, allocate, exact, frontier

BITS = (2, 3, 4, 6, 8)
# Whole numbers: sums are exact, so that claims hold to the last bit.
COSTS, HARMS = st.integers(0, 40), st.integers(-20, 1000)


@st.composite
def free_options(draw):
    """Layers with any number of options of any cost and harm."""
    return {
        f"layer{i}": [Option(k, draw(COSTS), draw(HARMS)) for k in range(draw(st.integers(1, 5)))]
        for i in range(draw(st.integers(1, 5)))
    }


@st.composite
def bit_options(draw):
    """Layers as quantization meets them: the same bits for all, each with its number of weights."""
    return {
        f"layer{i}": [Option(b, size * b, draw(st.integers(0, 10_000))) for b in BITS]
        for i, size in enumerate(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    }


ANY = st.one_of(free_options(), bit_options())


def least_cost(options):
    return sum(min(o.cost for o in held) for held in options.values())


def by_hand(options, limit):
    """The least harm within the limit, by trying everything."""
    return min(
        sum(o.harm for o in chosen)
        for chosen in itertools.product(*options.values())
        if sum(o.cost for o in chosen) <= limit
    )


@given(ANY, st.integers(0, 120))
def test_the_limit_holds_and_the_sums_are_those_of_the_choices(options, spare):
    limit = least_cost(options) + spare
    found = allocate(options, limit)
    assert list(found.choices) == list(options)
    assert all(option in options[layer] for layer, option in found.choices.items())
    assert found.cost == sum(o.cost for o in found.choices.values()) <= limit
    assert found.harm == sum(o.harm for o in found.choices.values())


@given(bit_options(), st.integers(0, 120))
def test_never_worse_than_the_same_bits_everywhere(options, spare):
    limit = least_cost(options) + spare
    found = allocate(options, limit)
    for place in range(len(BITS)):
        same = [held[place] for held in options.values()]
        if sum(o.cost for o in same) <= limit:
            assert found.harm <= sum(o.harm for o in same)


@settings(deadline=None)
@given(ANY, st.integers(0, 120))
def test_exact_search_finds_what_trying_everything_finds(options, spare):
    limit = least_cost(options) + spare
    found = exact(options, limit)
    assert found.harm == by_hand(options, limit)
    assert found.cost <= limit


@settings(deadline=None)
@given(ANY, st.integers(0, 120))
def test_worse_than_the_optimum_by_less_than_the_step_that_did_not_fit(options, spare):
    limit = least_cost(options) + spare
    found, best = allocate(options, limit), exact(options, limit)
    assert found.harm >= best.harm
    points = frontier(options)
    reached = max(i for i, point in enumerate(points) if point.cost <= limit)
    if reached == len(points) - 1:
        assert found.harm == best.harm
        assert found.bound_layer == ""
        return
    assert found.harm - best.harm <= points[reached].harm - points[reached + 1].harm
    before, after = points[reached].choices, points[reached + 1].choices
    assert [layer for layer in options if before[layer] != after[layer]] == [found.bound_layer]


@settings(deadline=None)
@given(ANY)
def test_frontier_is_convex_and_optimal_at_every_point(options):
    points = frontier(options)
    assert points[0].cost == least_cost(options)
    assert points[-1].harm == sum(min(o.harm for o in held) for held in options.values())
    for point in points:
        assert point.harm == exact(options, point.cost).harm
        assert allocate(options, point.cost).harm == point.harm
    steps = [(a.harm - b.harm) / (b.cost - a.cost) for a, b in itertools.pairwise(points)]
    assert all(gain > 0 for gain in steps)
    assert steps == sorted(steps, reverse=True)


@given(ANY, st.integers(1, 50))
def test_a_limit_below_the_least_cost_names_that_cost(options, missing):
    least = least_cost(options)
    for search in (allocate, exact):
        with pytest.raises(BudgetError, match=f"smallest possible cost is {least}"):
            search(options, least - missing)


def test_the_slack_is_filled_with_options_off_the_hull():
    # Of layer "a", (5, 6) lies above the line from (0, 10) to (10, 0): no multiplier chooses it.
    options = {"a": [Option("low", 0, 10), Option("mid", 5, 6), Option("high", 10, 0)]}
    assert [point.cost for point in frontier(options)] == [0, 10]
    found = allocate(options, 9)
    assert found.choices["a"].choice == "mid"
    assert found.bound_layer == "a"


def test_a_shared_choice_wins_where_the_hull_and_its_filling_are_worse():
    # The hull gives "x" its dear option first; then nothing is left for the even choice's gain.
    options = {
        "x": [Option(2, 0, 100), Option(4, 6, 41), Option(8, 10, 0)],
        "y": [Option(2, 0, 100), Option(4, 6, 41), Option(8, 10, 0)],
    }
    even = sum(held[1].harm for held in options.values())
    assert allocate(options, 12).harm == even == exact(options, 12).harm


def test_exact_rounds_costs_up_to_its_resolution():
    options = {"a": [Option(0, 0, 9), Option(1, 1.5, 1)], "b": [Option(0, 0, 9), Option(1, 1.5, 2)]}
    assert exact(options, 3.0, 0.5).harm == 3
    coarse = exact(options, 3.0, 1.0)
    assert (coarse.harm, coarse.cost) == (10, 1.5)
    tight = {"a": [Option(0, 1.5, 0)], "b": [Option(0, 1.5, 0)]}
    with pytest.raises(BudgetError, match="multiples of 1"):
        exact(tight, 3.0, 1.0)


def test_no_limit_gives_every_layer_its_least_harm():
    options = {"a": [Option(0, 1, 5), Option(1, 9, 2)], "b": [Option(0, 1e-300, 1)]}
    found = allocate(options, math.inf)
    assert (found.harm, found.bound_layer) == (3, "")
    assert exact(options, math.inf).harm == 3


REFUSALS = {
    "no layers": ({}, 1, "no layers"),
    "no option": ({"conv": []}, 1, "'conv' offers no option"),
    "not a number": ({"conv": [Option(4, 1, math.nan)]}, 1, "'conv', choice 4: .*nan"),
    "negative cost": ({"conv": [Option(4, -1, 0)]}, 1, "0 or more"),
    "limit": ({"conv": [Option(4, 1, 0)]}, math.nan, "limit must be a number"),
}


@pytest.mark.parametrize("options, limit, said", REFUSALS.values(), ids=REFUSALS)
def test_what_means_nothing_is_refused(options, limit, said):
    for search in (allocate, exact):
        with pytest.raises(SpecError, match=said):
            search(options, limit)


def test_exact_refuses_a_table_too_large_and_a_resolution_of_nothing():
    options = {"a": [Option(0, 1, 1), Option(1, 1e12, 0)]}
    with pytest.raises(SpecError, match="raise resolution"):
        exact(options, 1e13)
    with pytest.raises(SpecError, match="resolution must be"):
        exact(options, 1e13, 0)
