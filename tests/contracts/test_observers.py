"""What every registered observer must do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.errors import DataError, UnknownNameError
from tersor.tensors.observers import OBSERVERS

EVERY = pytest.mark.parametrize("name", list(OBSERVERS))
batches = st.lists(
    hnp.arrays(np.float32, (2, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    min_size=1,
    max_size=4,
)


# It forgets: its order is its meaning.
IN_ORDER = {"moving_average"}


def watch(name, data, **options):
    observer = OBSERVERS[name](**options)
    for batch in data:
        observer.observe(batch)
    return observer.range()


@EVERY
@settings(deadline=None, max_examples=50)
@given(batches, st.sampled_from([4, 16, 256]))
def test_the_range_is_finite_holds_zero_and_stays_inside_what_was_seen(name, data, levels):
    low, high = watch(name, data, levels=levels)
    assert np.isfinite(low) and np.isfinite(high)
    assert min(0.0, float(np.min(data))) <= low <= 0 <= high <= max(0.0, float(np.max(data)))


@EVERY
def test_the_default_is_eight_bits(name):
    data = [np.random.default_rng(0).laplace(size=5000).astype(np.float32)]
    assert watch(name, data) == watch(name, data, levels=256)


@pytest.mark.parametrize("name", [n for n in OBSERVERS if n not in IN_ORDER])
def test_the_order_of_batches_matters_little(name):
    rng = np.random.default_rng(0)
    data = [rng.normal(size=5000).astype(np.float32) * size for size in (1, 3, 0.2)]
    # A divergence hardly changes along many ranges: their noise decides.
    allowed = 0.1 if name == "entropy" else 0.05
    assert watch(name, data) == pytest.approx(watch(name, data[::-1]), rel=allowed)


@EVERY
@pytest.mark.parametrize("levels", [16, 256])
@pytest.mark.parametrize("value, expected", [(0.0, (0, 0)), (2.5, (0, 2.5)), (-1.0, (-1, 0))])
def test_constant_values_have_their_range(name, value, expected, levels):
    data = [np.full((4, 5), value, np.float32)] * 2
    assert watch(name, data, levels=levels) == pytest.approx(expected, rel=0.01)


@EVERY
def test_the_values_are_not_changed(name):
    data = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    before = data.copy()
    data.flags.writeable = False
    watch(name, [data])
    assert np.array_equal(data, before)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(name, bad):
    with pytest.raises(DataError, match="NaN or infinity"):
        watch(name, [np.array([1.0, bad], np.float32)])


@EVERY
def test_nothing_observed_has_no_range(name):
    with pytest.raises(DataError, match="no values"):
        OBSERVERS[name]().range()
    with pytest.raises(DataError, match="no values"):
        watch(name, [np.zeros((0, 3), np.float32)])


def test_an_unknown_observer_is_named():
    with pytest.raises(UnknownNameError, match="Did you mean 'histogram'"):
        OBSERVERS["histogramm"]
