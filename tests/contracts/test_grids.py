"""What every registered weight code must do, at every number of bits and granularity it takes."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.errors import ModelError, SpecError, UnknownNameError
from tersor.tensors.grids import GRIDS, fit_grid

GRANULARITIES = ("per_tensor", "per_channel", "per_group")
SEARCHES = ("minmax", "mse")
GROUP = 5  # divides no number of columns below: the last group is shorter
SMALLEST = float(np.finfo(np.float32).tiny)
DENORMAL = float(np.finfo(np.float32).smallest_subnormal)
LARGEST = float(np.finfo(np.float32).max)


def weight_of(seed=0, shape=(6, 23)):
    return np.random.default_rng(seed).laplace(size=shape).astype(np.float32)


def fit(code, weight, bits, symmetric=True, granularity="per_channel", search="minmax", **more):
    return fit_grid(
        code,
        weight,
        bits,
        symmetric=symmetric,
        granularity=granularity,
        group_size=more.pop("group_size", GROUP),
        search=search,
        **more,
    )


def is_allowed(code, bits, symmetric):
    try:
        fit(code, weight_of(), bits, symmetric)
    except SpecError:
        return False
    return True


KINDS = [
    (code, bits, symmetric)
    for code in GRIDS
    for bits in range(1, 9)
    for symmetric in (True, False)
    if is_allowed(code, bits, symmetric)
]
EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k[0]}{k[1]}{'' if k[2] else 'a'}")
EACH = pytest.mark.parametrize("granularity", GRANULARITIES)
numbers = st.one_of(
    st.floats(-10, 10, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, DENORMAL, -3 * DENORMAL, SMALLEST, 1.0, LARGEST, -LARGEST]),
)
weights = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=numbers)


def values_of(grid, shape):
    """Every value of the grid at every place: (n, O, K) float64."""
    indexes = (np.full(shape, i, np.uint8) for i in range(grid.levels.size))
    return np.stack([grid.decode(i) for i in indexes]).astype(np.float64)


def squared_error(grid, weight):
    return float(((grid.decode(grid.encode(weight)).astype(np.float64) - weight) ** 2).sum())


def assert_well_formed(grid, weight, bits):
    assert grid.bits == bits and grid.levels.dtype == np.float32
    assert 2 <= grid.levels.size <= 2**bits and (grid.levels[1:] > grid.levels[:-1]).all()
    assert grid.scale.dtype == grid.zero_point.dtype == np.float32
    assert grid.scale.shape == grid.zero_point.shape
    assert (grid.scale >= SMALLEST).all() and np.isfinite(grid.scale).all()
    assert np.array_equal(grid.zero_point, np.rint(grid.zero_point))
    values = values_of(grid, weight.shape)
    assert np.isfinite(values).all()
    assert grid.integers == bool(np.isin(grid.levels, np.arange(-128, 128)).all())


def assert_round_trip(grid, shape):
    for index in range(grid.levels.size):
        codes = np.full(shape, index, np.uint8)
        assert np.array_equal(grid.encode(grid.decode(codes)), codes)


def assert_nearest(grid, weight):
    """No other level is closer, but for the roundings of the float32 quotient and product."""
    chosen = np.abs(grid.decode(grid.encode(weight)) - weight.astype(np.float64))
    values = values_of(grid, weight.shape)
    best = np.abs(values - weight.astype(np.float64)).min(axis=0)
    rounding = 2.0**-22 * np.maximum(np.abs(weight), np.abs(values).max(axis=0))
    assert (chosen <= best + rounding + 2 * DENORMAL).all()


@EVERY
@EACH
@pytest.mark.parametrize("search", SEARCHES)
def test_codes_are_well_formed_fixed_points_and_nearest(kind, granularity, search):
    code, bits, symmetric = kind
    weight = weight_of(bits)
    before = weight.copy()
    weight.flags.writeable = False
    grid = fit(code, weight, bits, symmetric, granularity, search)
    assert np.array_equal(weight, before)
    groups = {"per_tensor": (1, 1), "per_channel": (6, 1), "per_group": (6, 5)}[granularity]
    assert grid.scale.shape == groups
    assert grid.group_size == (GROUP if granularity == "per_group" else 23)
    codes = grid.encode(weight)
    assert codes.dtype == np.uint8 and codes.shape == weight.shape
    assert grid.decode(codes).dtype == np.float32
    assert_well_formed(grid, weight, bits)
    assert_round_trip(grid, weight.shape)
    assert_nearest(grid, weight)
    again = fit(code, weight, bits, symmetric, granularity, search)
    assert np.array_equal(again.levels, grid.levels) and np.array_equal(again.scale, grid.scale)


OPPOSITE_ENDS = np.array([[1, -1]], np.float32) * np.finfo(np.float32).max


@EVERY
@settings(deadline=None, max_examples=15)
@given(weight=weights, granularity=st.sampled_from(GRANULARITIES), search=st.sampled_from(SEARCHES))
@example(weight=OPPOSITE_ENDS, granularity="per_tensor", search="minmax")
@example(weight=OPPOSITE_ENDS, granularity="per_channel", search="mse")
def test_any_finite_weight_has_a_grid(kind, weight, granularity, search):
    code, bits, symmetric = kind
    grid = fit(code, weight, bits, symmetric, granularity, search)
    assert_well_formed(grid, weight, bits)
    assert_round_trip(grid, weight.shape)
    assert_nearest(grid, weight)


@EVERY
@EACH
def test_zero_runs_decode_to_zero_or_nearly(kind, granularity):
    code, bits, symmetric = kind
    weight = weight_of()
    weight[[0, 3]] = 0
    for values in (weight, np.zeros_like(weight)):
        grid = fit(code, values, bits, symmetric, granularity)
        back = grid.decode(grid.encode(values))
        if 0 in grid.levels:
            assert (back[values == 0] == 0).all()
        elif granularity != "per_tensor" or not values.any():
            assert np.abs(back[[0, 3]]).max() <= np.abs(grid.levels).max() * SMALLEST


@EVERY
@EACH
def test_the_search_finds_no_larger_error(kind, granularity):
    code, bits, symmetric = kind
    for seed in range(4):
        weight = weight_of(seed) ** 3
        by_extremes, by_error = (
            squared_error(fit(code, weight, bits, symmetric, granularity, search), weight)
            for search in SEARCHES
        )
        assert by_error <= by_extremes * (1 + 1e-9)


@EVERY
@EACH
def test_a_weight_times_a_power_of_two_has_the_same_codes(kind, granularity):
    code, bits, symmetric = kind
    weight = weight_of(2)
    for search in SEARCHES:
        grid, larger = (
            fit(code, w, bits, symmetric, granularity, search) for w in (weight, 64 * weight)
        )
        assert np.array_equal(grid.encode(weight), larger.encode(64 * weight))
        back = grid.decode(grid.encode(weight))
        assert np.array_equal(larger.decode(larger.encode(64 * weight)), 64 * back)


@EVERY
def test_columns_alone_have_the_codes_of_the_whole(kind):
    code, bits, symmetric = kind
    weight = weight_of(3)
    for granularity in GRANULARITIES:
        grid = fit(code, weight, bits, symmetric, granularity)
        codes = grid.encode(weight)
        for columns in ([22], [3, 4, 5, 21], [20, 0, 7]):
            chosen = np.array(columns)
            assert np.array_equal(grid.encode(weight[:, chosen], chosen), codes[:, chosen])
            back = grid.decode(codes[:, chosen], chosen)
            assert np.array_equal(back, grid.decode(codes)[:, chosen])


@EVERY
@EACH
@pytest.mark.parametrize("search", SEARCHES)
def test_scales_keep_to_their_lower_bound(kind, granularity, search):
    code, bits, symmetric = kind
    weight = weight_of(4)
    weight[2] = 0
    bound = np.array([0, 0.5, 0.25, 0, 20, 0], np.float32)
    grid = fit(code, weight, bits, symmetric, granularity, search, smallest=bound)
    assert (grid.scale >= (bound[:, None] if granularity != "per_tensor" else 20)).all()
    assert_round_trip(grid, weight.shape)
    assert_nearest(grid, weight)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(kind, bad):
    code, bits, symmetric = kind
    weight = weight_of()
    weight[1, 2] = bad
    with pytest.raises(ModelError, match="NaN or infinity"):
        fit(code, weight, bits, symmetric)


@EVERY
def test_infinity_takes_the_outermost_level_and_nan_has_none(kind):
    code, bits, symmetric = kind
    grid = fit(code, weight_of(), bits, symmetric)
    ends = np.tile(np.array([-np.inf, np.inf], np.float32), (6, 1))
    assert grid.encode(ends).tolist() == [[0, grid.levels.size - 1]] * 6
    with pytest.raises(ModelError, match="NaN"):
        grid.encode(np.full((6, 1), np.nan, np.float32))


@pytest.mark.parametrize("code", list(GRIDS))
@pytest.mark.parametrize("bits", [0, 9, -1])
def test_impossible_bits_are_refused(code, bits):
    with pytest.raises(SpecError, match=f"{code} has .* bits, got {bits}"):
        fit(code, weight_of(), bits)


def test_an_unknown_code_is_named():
    with pytest.raises(UnknownNameError, match="Did you mean 'ternary'"):
        fit("ternery", weight_of(), 2)
