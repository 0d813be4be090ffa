"""A budget in words: every spelling that is offered, and every one that means nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import SpecError
from tersor.specs import Budget, from_dict
from tersor.specs.budget import AXES

ORIGINAL = {"size_bytes": 4e7, "latency_ms": 8.0, "macs": 5e8, "energy_mj": 3.0}


@pytest.mark.parametrize(
    ("words", "axis", "value"),
    [
        ({"size": "500kB"}, "size_bytes", 500_000),
        ({"size": "500 KB"}, "size_bytes", 500_000),
        ({"size": "1.5MiB"}, "size_bytes", 1.5 * 2**20),
        ({"size": "10x smaller"}, "size_bytes", 4e6),
        ({"size": "10x"}, "size_bytes", 4e6),
        ({"size": "25%"}, "size_bytes", 1e7),
        ({"latency": "2ms"}, "latency_ms", 2),
        ({"latency": "500us"}, "latency_ms", 0.5),
        ({"latency": "4× faster"}, "latency_ms", 2),
        ({"macs": "50M"}, "macs", 5e7),
        ({"macs": "4x fewer"}, "macs", 1.25e8),
        ({"energy": "0.5mJ"}, "energy_mj", 0.5),
        ({"energy": "3x less"}, "energy_mj", 1.0),
        ({"drop": 0.5}, "drop_pt", 0.5),
    ],
)
def test_words_become_limits(words, axis, value):
    assert Budget(**words).limits(ORIGINAL) == {axis: pytest.approx(value)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "empty"),
        ({"size": "500"}, "500kB"),
        ({"size": "500 apples"}, "not understood.*kB"),
        ({"size": "10x faster"}, "10x smaller"),
        ({"latency": "2 MB"}, "not understood.*ms"),
        ({"latency": "0ms"}, "above 0"),
        ({"size": "1x smaller"}, "above 1"),
        ({"size": "100%"}, "between 0"),
        ({"size": "-3kB"}, "not understood"),
        ({"size": "1e3kB"}, "not understood"),
        ({"drop": 0}, "above 0"),
        ({"drop": "half"}, "points of accuracy"),
        ({"drop": float("nan")}, "points of accuracy"),
        ({"drop": 1, "batch": 0}, "batch"),
        ({"drop": 1, "threads": -1}, "threads"),
        ({"size": 500}, "must be text"),
    ],
)
def test_what_means_nothing_is_refused_with_a_remedy(words, said):
    with pytest.raises(SpecError, match=f"(?s){said}"):
        Budget(**words)


@given(
    st.sampled_from(sorted(AXES)),
    st.floats(0.001, 1e6).map(lambda x: f"{x:.3f}"),
    st.data(),
)
def test_every_unit_of_every_axis_is_read_as_it_says(name, number, data):
    unit = data.draw(st.sampled_from(sorted(AXES[name].units)))
    if float(number) > 0:
        limit = Budget(**{name: number + unit}).limits(ORIGINAL)[AXES[name].name]
        assert limit == pytest.approx(float(number) * AXES[name].units[unit])


def test_a_budget_goes_through_json():
    asked = Budget(size="500kB", latency="6x faster", drop=0.5, batch=8)
    assert from_dict(asked.to_dict()) == asked
