"""What is particular to one observer; what all must do is in tests/contracts/test_observers.py."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.tensors.affine import choose_affine, dequantize, quantize
from tersor.tensors.observers import (
    MOST_VALUES,
    OBSERVERS,
    Entropy,
    Histogram,
    MinMax,
    MovingAverage,
    Percentile,
    SquaredError,
    thinned,
)

SHAPES = ("laplace", "normal", "uniform", "relu", "one_sided")


def samples(shape):
    rng = np.random.default_rng(1)
    return {
        "laplace": rng.laplace(size=50_000),
        "normal": rng.normal(2, 1, size=50_000),
        "uniform": rng.uniform(-1, 3, size=50_000),
        "relu": np.maximum(rng.normal(size=50_000), 0),
        "one_sided": -rng.exponential(size=50_000),
    }[shape].astype(np.float32)


def squared_error(values, low, high, bits=8):
    scale, zero_point = choose_affine(low, high, bits)
    codes = np.minimum(quantize(values, scale, zero_point, dtype=np.uint8), 2**bits - 1)
    back = dequantize(codes, scale, zero_point)
    return float(((back.astype(np.float64) - values) ** 2).mean())


def least_error(values, bits=8):
    """Of the codes of many ranges on the values themselves."""
    return min(
        squared_error(values, float(values.min()) * a, float(values.max()) * b, bits)
        for a in np.linspace(0.1, 1, 19)
        for b in np.linspace(0.1, 1, 19)
        if min(values.min() * a, 0) < max(values.max() * b, 0)
    )


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


@pytest.mark.parametrize("shape", SHAPES)
def test_the_histogram_is_close_to_the_best_of_all_ranges(shape):
    values = samples(shape)
    low, high = watch(Histogram(), values)
    assert squared_error(values, low, high) <= 1.05 * least_error(values)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_error_is_close_to_the_best_of_all_ranges_at_any_bits(shape, bits):
    values = samples(shape)
    low, high = watch(SquaredError(levels=2**bits), *np.split(values, 5))
    assert squared_error(values, low, high, bits) <= 1.05 * least_error(values, bits)


@pytest.mark.parametrize("observer", [Histogram, SquaredError, Entropy])
def test_fewer_levels_cover_a_smaller_range(observer):
    values = samples("laplace")
    widths = []
    for bits in (2, 4, 8):
        low, high = watch(observer(levels=2**bits), values)
        widths.append(high - low)
    assert widths == sorted(widths) and widths[0] < 0.7 * widths[2]


def divergence(histogram, low, high, levels):
    """The definition, bin by bin; the sum itself is SciPy's."""
    step = (high - low) / (levels - 1)
    zero_point = round(-low / step)
    inside, shared = {}, {}
    below = above = 0
    for centre, count in zip(histogram.centres.tolist(), histogram.bins.tolist(), strict=True):
        if not count:
            continue
        if centre < low:
            below += count
        elif centre > high:
            above += count
        else:
            code = min(max(round(centre / step) + zero_point, 0), levels - 1)
            inside[centre] = (count, code)
            shared.setdefault(code, []).append(count)
    if not inside:
        return np.inf
    p = [count for count, _ in inside.values()]
    p[0] += below
    p[-1] += above
    q = [np.mean(shared[code]) for _, code in inside.values()]
    return float(scipy.stats.entropy(p, q))


@pytest.mark.parametrize("levels", [16, 256])
@pytest.mark.parametrize("shape", ["laplace", "relu", "normal"])
def test_the_entropy_observer_minimises_the_divergence(shape, levels):
    observer = Entropy(levels=levels)
    low, high = watch(observer, samples(shape))
    seen = observer.histogram
    found = divergence(seen, low, high, levels)
    assert found <= divergence(seen, seen.low, seen.high, levels)
    for share in np.arange(10, 129, 13) / 128:
        common = divergence(seen, seen.low * share, seen.high * share, levels)
        one_end = divergence(seen, low, seen.high * share, levels)
        assert found <= min(common, one_end) * (1 + 1e-9)


def test_the_moving_average_follows_its_formula():
    batches = [np.array([-i, 2.0 * i], np.float32) for i in (1, 5, 2)]
    low, high = watch(MovingAverage(), *batches)
    assert high == pytest.approx(0.9 * (0.9 * 2 + 0.1 * 10) + 0.1 * 4)
    assert low == pytest.approx(-high / 2)
    assert watch(MovingAverage(), *batches[::-1]) != (low, high)


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


@pytest.mark.parametrize("observer", ["histogram", "percentile", "entropy", "mse"])
def test_of_a_large_batch_a_part_is_counted_and_the_extremes_are_exact(observer):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((16, 64, 32, 32)).astype(np.float32)
    values[3, 5, 7, 11] = 9.5  # alone, and not among the evenly spaced
    whole, part = OBSERVERS[observer](), OBSERVERS[observer]()
    for piece in values.reshape(64, -1):  # below the limit: every value is counted
        whole.observe(piece)
    part.observe(values)
    errors = [squared_error(values, *each.range()) for each in (part, whole)]
    assert errors[0] <= 1.1 * errors[1]
    minmax = OBSERVERS["minmax"]()
    minmax.observe(values)
    histogram = getattr(part, "histogram", part)
    assert (histogram.low, histogram.high) == minmax.range()
    assert thinned(values.reshape(-1)).size < values.size / 6
    assert thinned(values.reshape(-1)[:MOST_VALUES]).size == MOST_VALUES
