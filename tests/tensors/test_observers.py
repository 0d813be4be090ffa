"""What is particular to one observer; what all must do is in tests/contracts/test_observers.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.tensors.affine import choose_affine, dequantize, quantize
from tersor.tensors.observers import Histogram, MinMax, Percentile


def squared_error(values, low, high):
    scale, zero_point = choose_affine(low, high)
    back = dequantize(quantize(values, scale, zero_point, dtype=np.uint8), scale, zero_point)
    return float(((back.astype(np.float64) - values) ** 2).mean())


def watch(observer, *batches):
    for batch in batches:
        observer.observe(batch)
    return observer.range()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_growing_loses_no_count_and_covers_every_value(values):
    observer = Histogram(num_bins=16)
    for value in values:
        observer.observe(np.array([value], np.float32))
    assert observer.count == len(values)
    if observer.width:
        assert observer.origin <= observer.low
        assert observer.high <= observer.origin + 16 * observer.width * (1 + 1e-9)


def test_merging_moves_no_value_out_of_its_bin():
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=1000).astype(np.float32) * size for size in (0.1, 1, 7)]
    observer = Histogram()
    watch(observer, *batches)
    edges = observer.origin + np.arange(observer.bins.size + 1) * observer.width
    whole, _ = np.histogram(np.concatenate(batches).astype(np.float64), edges)
    assert np.abs(whole - observer.bins).sum() <= 4  # a value on an edge may fall on either side
    assert observer.bins.sum() == whole.sum()


def test_the_histogram_cuts_an_outlier_that_costs_more_than_it_is_worth():
    rng = np.random.default_rng(0)
    values = rng.laplace(size=200_000).astype(np.float32)
    low, high = watch(Histogram(), *np.split(values, 10))
    assert (low, high) != watch(MinMax(), values)
    assert squared_error(values, low, high) < 0.9 * squared_error(
        values, float(values.min()), float(values.max())
    )


@pytest.mark.parametrize("shape", ["laplace", "normal", "uniform", "relu", "one_sided"])
def test_the_histogram_is_close_to_the_best_of_all_ranges(shape):
    rng = np.random.default_rng(1)
    values = {
        "laplace": rng.laplace(size=50_000),
        "normal": rng.normal(2, 1, size=50_000),
        "uniform": rng.uniform(-1, 3, size=50_000),
        "relu": np.maximum(rng.normal(size=50_000), 0),
        "one_sided": -rng.exponential(size=50_000),
    }[shape].astype(np.float32)
    low, high = watch(Histogram(), values)
    best = min(
        squared_error(values, float(values.min()) * a, float(values.max()) * b)
        for a in np.linspace(0.2, 1, 17)
        for b in np.linspace(0.2, 1, 17)
        if values.min() * a <= values.max() * b
    )
    assert squared_error(values, low, high) <= 1.05 * best


def test_zeros_of_a_relu_do_not_pull_the_range():
    rng = np.random.default_rng(0)
    values = rng.exponential(size=10_000).astype(np.float32)
    alone = watch(Histogram(), values)
    assert watch(Histogram(), values, np.zeros(10**6, np.float32)) == alone
    assert alone[0] == 0


def test_the_percentile_leaves_a_ten_thousandth_at_each_end():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1_000_000).astype(np.float32)
    low, high = watch(Percentile(), *np.split(values, 4))
    assert high == pytest.approx(np.quantile(values, 1 - 1e-4), abs=0.02)
    assert low == pytest.approx(np.quantile(values, 1e-4), abs=0.02)
