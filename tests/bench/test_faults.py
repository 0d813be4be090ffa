"""The search for wrong layers, on faults that are made up."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from tersor.bench.faults import layers_at_fault

NAMES = [f"layer{i}" for i in range(24)]
SETS = st.frozensets(st.sampled_from(NAMES), max_size=5)


class Engine:
    """Right where `judge` says so; counts what it is asked."""

    def __init__(self, judge):
        self.judge, self.asked = judge, []

    def __call__(self, left_float):
        self.asked.append(left_float)
        return self.judge(left_float)


@given(SETS)
def test_faulty_layers_are_found_exactly_and_in_order(faulty):
    found = layers_at_fault(NAMES, Engine(lambda left: faulty <= left))
    assert found == tuple(name for name in NAMES if name in faulty)


@given(st.lists(SETS, min_size=1, max_size=3))
def test_of_several_remedies_one_is_found_and_nothing_of_it_is_spare(remedies):
    engine = Engine(lambda left: any(remedy <= left for remedy in remedies))
    found = layers_at_fault(NAMES, engine)
    assert found is not None
    assert frozenset(found) in remedies


@given(st.integers(), st.lists(st.sampled_from(NAMES), unique=True))
def test_an_answer_is_right_even_where_more_float_does_harm(seed, names):
    def judge(left):
        text = f"{seed} {sorted(left)}"
        return hashlib.sha256(text.encode()).digest()[0] % 3 == 0

    found = layers_at_fault(names, Engine(judge))
    if found is None:
        assert not judge(frozenset(names))
        assert not judge(frozenset())
    else:
        assert judge(frozenset(found))
        assert list(found) == [name for name in names if name in found]


@given(SETS.filter(bool))
def test_an_engine_that_float_does_not_mend_has_no_answer(faulty):
    engine = Engine(lambda left: False)
    assert layers_at_fault(NAMES, engine) is None
    assert engine.asked == [frozenset(), frozenset(NAMES)]


@given(st.sampled_from(NAMES))
def test_one_fault_is_found_by_bisection(name):
    engine = Engine(lambda left: name in left)
    assert layers_at_fault(NAMES, engine) == (name,)
    # Twice log2(24), the two ends, the runs between and the answer once more.
    assert len(engine.asked) <= 16
    assert engine.asked[-1] == {name}


@given(SETS)
def test_nothing_but_the_answer_is_asked_twice(faulty):
    engine = Engine(lambda left: faulty <= left)
    answer = frozenset(layers_at_fault(NAMES, engine))
    earlier = engine.asked[:-1]
    assert engine.asked[-1] == answer
    assert len(set(earlier)) == len(earlier)


def test_an_answer_that_was_right_by_chance_gives_way_to_all_layers():
    asked = []

    def judge(left):
        again = left in asked
        asked.append(left)
        return "layer3" in left and (not again or left == frozenset(NAMES))

    assert layers_at_fault(NAMES, judge) == tuple(NAMES)
    assert asked[-2:] == [{"layer3"}, frozenset(NAMES)]


def test_a_network_without_layers_is_right_or_not():
    assert layers_at_fault([], Engine(lambda left: True)) == ()
    assert layers_at_fault([], Engine(lambda left: False)) is None
