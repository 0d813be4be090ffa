"""Roundings: GPTQ against the greedy algorithm it is a fast form of, and what each must hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import ModelError, SpecError
from tersor.tensors.grids import Grid, fit_grid
from tersor.tensors.rounding import DAMPING, NEEDS_HESSIAN, ROUNDINGS, adaround, quadratic_loss

gptq, nearest = ROUNDINGS["gptq"], ROUNDINGS["nearest"]
EVERY = pytest.mark.parametrize("name", list(ROUNDINGS))
LEARNED = pytest.mark.parametrize("name", sorted(NEEDS_HESSIAN))
seeds = st.integers(0, 2**31)


def grid_of(weight, bits=4, code="uniform", granularity="per_channel", group_size=16, **options):
    return fit_grid(
        code, weight, bits, granularity=granularity, group_size=group_size,
        **{"symmetric": True, "search": "mse"} | options,
    )  # fmt: skip


def random_layer(rows, columns, seed=0, samples=None):
    """A weight, and the second moment of inputs that depend on each other."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    mixing = rng.standard_normal((columns, columns)) / np.sqrt(columns) + 0.5
    inputs = rng.standard_normal((samples or 4 * columns, columns)) @ mixing
    return weight, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def greedy(weight, grid, hessian):
    """Optimal brain quantization in a fixed order: quantize a column, change all that are left by
    the closed form of their least loss, and remove the column from the inverse."""
    damped = hessian.astype(np.float64) + np.eye(len(hessian)) * DAMPING * np.diag(hessian).mean()
    inverse = np.linalg.inv(damped)
    left = weight.astype(np.float64)
    codes = np.zeros(weight.shape, np.uint8)
    for j in np.argsort(-np.diag(hessian), kind="stable"):
        column = np.array([j])
        codes[:, column] = grid.encode(left[:, column], column)
        change = left[:, j] - grid.decode(codes[:, column], column)[:, 0]
        left -= np.outer(change / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def row_losses(weight, grid, codes, hessian):
    errors = weight.astype(np.float64) - grid.decode(codes)
    return np.einsum("ri,ij,rj->r", errors, hessian.astype(np.float64), errors)


@pytest.mark.parametrize(
    "bits, options",
    [
        (2, {}),
        (3, {}),
        (4, {}),
        (8, {}),
        (4, {"granularity": "per_tensor"}),
        (3, {"granularity": "per_group"}),
        (4, {"symmetric": False, "granularity": "per_group"}),
        (3, {"code": "codebook"}),
        (4, {"code": "power_of_two"}),
        (2, {"code": "ternary"}),
        (1, {"code": "binary"}),
    ],
)
@pytest.mark.parametrize("columns", [7, 150])
def test_gptq_gives_the_codes_of_the_greedy_algorithm(bits, options, columns):
    weight, hessian = random_layer(12, columns, seed=bits)
    grid = grid_of(weight, bits, **options)
    codes, expected, plain = (
        gptq(weight, grid, hessian), greedy(weight, grid, hessian), grid.encode(weight)
    )  # fmt: skip
    better = row_losses(weight, grid, expected, hessian) < row_losses(weight, grid, plain, hessian)
    assert better.sum() >= 6
    assert np.array_equal(codes[better], expected[better])
    assert np.array_equal(codes[~better], plain[~better])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_gptq_halves_the_loss_where_inputs_depend_on_each_other(bits, seed):
    weight, hessian = random_layer(16, 40, seed)
    grid = grid_of(weight, bits)
    plain = quadratic_loss(weight, grid.decode(nearest(weight, grid)), hessian)
    assert quadratic_loss(weight, grid.decode(gptq(weight, grid, hessian)), hessian) < plain / 2


@LEARNED
@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 5), st.integers(1, 20), st.integers(2, 8), st.integers(1, 30))
def test_no_row_ends_worse_than_by_nearest(name, seed, rows, columns, bits, samples):
    weight, hessian = random_layer(rows, columns, seed, samples)
    grid = grid_of(weight, bits)
    few = {"steps": 20} if name == "adaround" else {}
    codes = ROUNDINGS[name](weight, grid, hessian, **few)
    losses = row_losses(weight, grid, codes, hessian)
    plain = row_losses(weight, grid, nearest(weight, grid), hessian)
    assert (losses <= plain * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_independent_inputs_of_one_size_leave_nothing_to_shift(bits):
    weight, _ = random_layer(9, 140)
    grid = grid_of(weight, bits)
    identity = np.eye(140, dtype=np.float32)
    assert np.array_equal(gptq(weight, grid, identity), grid.encode(weight))
    assert np.array_equal(adaround(weight, grid, identity), grid.encode(weight))


def test_dead_inputs_are_rounded_to_nearest_and_change_nothing_else():
    weight, hessian = random_layer(6, 30)
    dead = np.arange(30) % 3 == 1
    hessian[dead] = hessian[:, dead] = 0
    grid = grid_of(weight)
    codes = gptq(weight, grid, hessian)
    assert np.array_equal(codes[:, dead], grid.encode(weight)[:, dead])
    alive = gptq(weight[:, ~dead], grid, hessian[~dead][:, ~dead])
    assert np.array_equal(codes[:, ~dead], alive)


@LEARNED
def test_no_input_at_all_is_nearest(name):
    weight, hessian = random_layer(6, 10)
    grid = grid_of(weight)
    assert np.array_equal(ROUNDINGS[name](weight, grid, hessian * 0), grid.encode(weight))


@LEARNED
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_fewer_samples_than_inputs_are_enough(name, samples, size):
    weight, hessian = random_layer(6, 40, samples=samples)
    grid = grid_of(weight)
    codes = ROUNDINGS[name](weight, grid, hessian * np.float32(size))
    plain = quadratic_loss(weight, grid.decode(nearest(weight, grid)), hessian)
    assert quadratic_loss(weight, grid.decode(codes), hessian) < plain / 2


def test_a_moment_that_rounding_made_indefinite_is_damped_more():
    weight = np.array([[0.3, -0.9], [1.0, 0.2]], np.float32)
    slightly = np.array([[1, 1.05], [1.05, 1]], np.float32)  # smallest eigenvalue -0.05
    assert gptq(weight, grid_of(weight), slightly).shape == (2, 2)


@EVERY
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (4, 129)])
def test_codes_are_levels_of_the_grid_and_nothing_given_is_changed(name, shape):
    weight, hessian = random_layer(*shape)
    weight[0, 0] = 1e4  # far from the others, and clipped below
    grid = grid_of(np.clip(weight, -1, 1), 3)
    before = weight.copy(), hessian.copy()
    weight.flags.writeable = hessian.flags.writeable = False
    codes = ROUNDINGS[name](weight, grid, hessian, seed=1)
    assert codes.shape == shape and codes.dtype == np.uint8
    assert codes.max() < len(grid.levels)
    assert np.array_equal(before[0], weight) and np.array_equal(before[1], hessian)


@EVERY
@pytest.mark.parametrize("bits", [2, 4])
def test_pruned_weights_stay_zero_where_the_grid_has_zero(name, bits):
    weight, hessian = random_layer(8, 40)
    weight[np.random.default_rng(1).random(weight.shape) < 0.7] = 0
    weight[3] = 0
    grid = grid_of(weight, bits, code="uniform" if bits > 2 else "ternary")
    assert (grid.decode(ROUNDINGS[name](weight, grid, hessian))[weight == 0] == 0).all()


@LEARNED
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_groups_are_layers_of_their_own(name, granularity):
    weight, _ = random_layer(9, 20)
    hessians = np.stack([random_layer(1, 20, seed)[1] for seed in range(3)])
    grid = grid_of(weight, granularity=granularity, group_size=8)
    codes = ROUNDINGS[name](weight, grid, hessians)
    for group in range(3):
        rows = slice(3 * group, 3 * group + 3)
        own = rows if len(grid.scale) > 1 else slice(None)
        part = Grid(grid.levels, grid.scale[own], grid.zero_point[own], grid.group_size, grid.bits)
        assert np.array_equal(codes[rows], ROUNDINGS[name](weight[rows], part, hessians[group]))


def test_the_loss_is_the_mean_squared_change_of_the_outputs():
    rng = np.random.default_rng(0)
    weight, quantized = rng.standard_normal((2, 6, 10)).astype(np.float32)
    inputs = rng.standard_normal((2, 50, 10))
    hessians = inputs.transpose(0, 2, 1) @ inputs / 50
    error = weight - quantized
    change = [(inputs[g] @ error[3 * g : 3 * g + 3].T) ** 2 for g in range(2)]
    expected = sum(part.sum(1).mean() for part in change)
    assert quadratic_loss(weight, quantized, hessians) == pytest.approx(expected, rel=1e-5)
    assert quadratic_loss(weight, weight, hessians[0]) == 0


def test_adaround_is_better_than_gptq_at_few_bits_and_repeatable():
    weight, hessian = random_layer(16, 60)
    grid = grid_of(weight, 2)
    codes = adaround(weight, grid, hessian, seed=0)
    start = quadratic_loss(weight, grid.decode(gptq(weight, grid, hessian)), hessian)
    assert quadratic_loss(weight, grid.decode(codes), hessian) < 0.95 * start
    assert np.array_equal(codes, adaround(weight, grid, hessian, seed=0))


@pytest.mark.parametrize("code", ["codebook", "power_of_two"])
def test_adaround_refuses_levels_that_are_not_evenly_spaced(code):
    weight, hessian = random_layer(4, 10)
    with pytest.raises(SpecError, match=r"one even step.*use 'gptq' or 'nearest'"):
        adaround(weight, grid_of(weight, 4, code=code), hessian)


@LEARNED
def test_unusable_moments_are_refused(name):
    weight, hessian = random_layer(4, 10)
    grid, rounding = grid_of(weight), ROUNDINGS[name]
    with pytest.raises(SpecError, match=f"'{name}' needs the second moment"):
        rounding(weight, grid)
    with pytest.raises(SpecError, match=r"\(4, 10\) needs .*\(groups, 10, 10\).*got \(9, 9\)"):
        rounding(weight, grid, hessian[:9, :9])
    with pytest.raises(SpecError, match="divided among the groups"):
        rounding(weight, grid, np.stack([hessian] * 3))
    with pytest.raises(ModelError, match="NaN"):
        rounding(weight, grid, hessian * np.nan)
    indefinite = np.full((10, 10), 1e4, np.float32)
    np.fill_diagonal(indefinite, 1)
    with pytest.raises(ModelError, match="not positive semidefinite"):
        rounding(weight, grid, indefinite)


def test_what_needs_inputs_says_so():
    weight, _ = random_layer(4, 10)
    for name in set(ROUNDINGS) - NEEDS_HESSIAN:
        assert ROUNDINGS[name](weight, grid_of(weight)).shape == weight.shape
