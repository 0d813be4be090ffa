"""What is particular to one weight code; what all must do is in tests/contracts/test_grids.py."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.errors import ModelError, SpecError
from tersor.tensors import scale_search
from tersor.tensors.affine import choose_affine, choose_symmetric, dequantize, quantize
from tersor.tensors.codebook import fine_tune_centroids
from tersor.tensors.grids import Grid, fit_grid

# The worked example of Han, Mao, Dally 2016, figure 3.
EXAMPLE = np.array(
    [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0, -1.03], [1.87, 0, 1.53, 1.49]],
    np.float32,
)  # fmt: skip
EXAMPLE_GRADIENT = np.array(
    [[-0.03, -0.01, 0.03, 0.02], [-0.01, 0.01, -0.02, 0.12], [-0.01, 0.02, 0.04, 0.01], [-0.07, -0.02, 0.01, -0.02]],
    np.float32,
)  # fmt: skip


def fit(code, weight, bits, granularity="per_channel", *, symmetric=True, group_size=8, **more):
    return fit_grid(
        code,
        weight,
        bits,
        symmetric=symmetric,
        granularity=granularity,
        group_size=group_size,
        **more,
    )


def integers(zero_point, scale, bits=8):
    """A grid of whole numbers, given its scales and zero points (rows,)."""
    half = 2 ** (bits - 1)
    return Grid(
        np.arange(-half, half, dtype=np.float32),
        np.asarray(scale, np.float32).reshape(-1, 1),
        np.asarray(zero_point, np.float32).reshape(-1, 1),
        10**9,
        bits,
    )


def squared_error(weight, back):
    return float(((back.astype(np.float64) - weight) ** 2).sum())


def error_of(grid, weight):
    return squared_error(weight, grid.decode(grid.encode(weight)))


def row_errors(grid, weight):
    return ((grid.decode(grid.encode(weight)).astype(np.float64) - weight) ** 2).sum(axis=1)


def laplace(shape, seed=0):
    return np.random.default_rng(seed).laplace(size=shape).astype(np.float32)


def test_the_codebook_of_the_papers_example():
    grid = fit("codebook", EXAMPLE, 2, "per_tensor")
    codes = grid.encode(EXAMPLE)
    assert np.round(grid.levels, 2).tolist() == [-1.0, 0.0, 1.5, 2.0]
    assert codes.tolist() == [[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]]
    tuned = fine_tune_centroids(grid.levels, codes, EXAMPLE_GRADIENT, 1.0)
    assert np.round(tuned, 2).tolist() == np.float32([-0.97, -0.04, 1.48, 1.96]).tolist()


def test_the_linear_codes_of_the_same_example():
    grid = fit("uniform", EXAMPLE, 2, "per_tensor", symmetric=False)
    assert grid.levels.tolist() == [-2, -1, 0, 1]
    assert round(float(grid.scale[0, 0]), 2) == 1.07 and grid.zero_point.tolist() == [[-1]]
    assert grid.levels[grid.encode(EXAMPLE)].tolist() == [
        [1, -2, 0, -1],
        [-1, -1, -2, 1],
        [-2, 1, -1, -2],
        [1, -1, 0, 0],
    ]


@pytest.mark.parametrize("granularity, axis", [("per_tensor", None), ("per_channel", 0)])
@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 9)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_eight_symmetric_bits_are_the_codes_of_affine(granularity, axis, weight):
    grid = fit("uniform", weight, 8, granularity)
    scale = choose_symmetric(weight, axis)
    assert np.array_equal(grid.scale.reshape(-1), np.atleast_1d(scale))
    # quantize() warns where a quotient passes the largest float; its code is right
    with np.errstate(over="ignore"):
        codes = quantize(weight, scale, axis=axis)
    assert np.array_equal(grid.levels[grid.encode(weight)], codes)
    assert np.array_equal(grid.decode(grid.encode(weight)), dequantize(codes, scale, axis=axis))


@pytest.mark.parametrize("seed", range(5))
def test_eight_asymmetric_bits_are_the_codes_of_affine_less_128(seed):
    weight = laplace((5, 40), seed) + np.float32(seed - 2)
    grid = fit("uniform", weight, 8, "per_tensor", symmetric=False)
    scale, zero_point = choose_affine(float(weight.min()), float(weight.max()))
    assert (grid.scale[0, 0], grid.zero_point[0, 0]) == (scale, float(zero_point) - 128)
    codes = quantize(weight, scale, zero_point, dtype=np.uint8)
    assert np.array_equal(grid.levels[grid.encode(weight)] + 128, codes)


def dequantize_linear(codes, scale, zero_point, **attributes):
    """The engine's own DequantizeLinear."""
    tensors = [
        onnx.numpy_helper.from_array(array, name)
        for array, name in ((codes, "codes"), (scale, "scale"), (zero_point, "zero_point"))
    ]
    node = onnx.helper.make_node("DequantizeLinear", [t.name for t in tensors], ["y"], **attributes)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, list(codes.shape))
    graph = onnx.helper.make_graph([node], "dequantize", [], [output], tensors)
    opset = onnx.helper.make_opsetid("", 21)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {})[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_decoding_is_the_engines_dequantize_linear_bit_for_bit(bits, symmetric):
    weight = laplace((6, 64))
    for granularity in ("per_tensor", "per_channel", "per_group"):
        grid = fit("uniform", weight, bits, granularity, symmetric=symmetric, group_size=16)
        scale, zero_point = grid.scale, grid.zero_point.astype(np.int8)
        along = {"axis": 1, "block_size": 16} if granularity == "per_group" else {"axis": 0}
        if granularity != "per_group":
            scale, zero_point = scale[:, 0], zero_point[:, 0]
        if granularity == "per_tensor":
            scale, zero_point, along = scale[0], zero_point[0], {}
        codes = grid.levels[grid.encode(weight)].astype(np.int8)
        engine = dequantize_linear(codes, scale, zero_point, **along)
        assert engine.tobytes() == grid.decode(grid.encode(weight)).tobytes()


def test_ten_million_values_are_those_of_torch_with_its_ties():
    """torch multiplies by 1 / scale where the pinned formula divides; with powers of two both are
    exact, so that every value and every tie must agree."""
    rng = np.random.default_rng(0)
    num_rows, num_columns, num_ties = 20, 50_000, 0
    for chunk in range(10):
        scale = np.exp2(rng.integers(-12, 5, num_rows)).astype(np.float32)
        zero_point = rng.integers(-128, 128, num_rows)
        if chunk < 5:
            scale, zero_point = np.repeat(scale[:1], num_rows), np.repeat(zero_point[:1], num_rows)
        steps = 150 * rng.standard_normal((num_rows, num_columns), np.float32)
        steps[:, ::5] = rng.integers(-300, 300, steps[:, ::5].shape) + 0.5
        num_ties += steps[:, ::5].size
        values = steps * scale[:, None]
        grid = integers(zero_point, scale)
        if chunk < 5:
            theirs = torch.fake_quantize_per_tensor_affine(
                torch.from_numpy(values), float(scale[0]), int(zero_point[0]), -128, 127
            )
        else:
            theirs = torch.fake_quantize_per_channel_affine(
                torch.from_numpy(values),
                torch.from_numpy(scale),
                torch.from_numpy(zero_point.astype(np.int32)),
                0,
                -128,
                127,
            )
        ours = grid.decode(grid.encode(values))
        assert np.array_equal(ours, theirs.numpy())
    assert num_ties >= 10**6


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_any_scale_gives_the_rounded_quotient_of_an_oracle(bits):
    """The quotient of two float32 in float64, rounded to float32, is the float32 quotient: 53 >= 2
    * 24 + 2 digits. torch's product with the inverse differs by one step at most, near ties."""
    rng = np.random.default_rng(bits)
    half = 2 ** (bits - 1)
    for _ in range(10):
        scale = np.float32(rng.lognormal(0, 3))
        zero_point = int(rng.integers(-half, half))
        values = (rng.normal(size=(1, 100_000)) * half * scale).astype(np.float32)
        values[0, ::3] = (rng.integers(-half, half, values[0, ::3].shape) + 0.5) * scale
        steps = (values.astype(np.float64) / np.float64(scale)).astype(np.float32)
        expected = np.clip(np.rint(steps) + zero_point, -half, half - 1)
        grid = integers([zero_point], [scale], bits)
        assert np.array_equal(grid.levels[grid.encode(values)], expected)
        theirs = torch.fake_quantize_per_tensor_affine(
            torch.from_numpy(values), float(scale), zero_point, -half, half - 1
        )
        apart = np.abs(grid.decode(grid.encode(values)) - theirs.numpy())
        assert apart.max() <= 1.0001 * scale
        is_tie = np.abs(steps - np.floor(steps) - 0.5) < 2.0**-20 * np.maximum(np.abs(steps), 1)
        assert (apart[~is_tie] <= 1e-6 * half * scale).all()


@pytest.mark.parametrize(
    "levels", [[-3, -1, 1, 3], [-1, 1], [-4, -2, -1, 0, 1, 2, 4], [-0.5, 0.25]]
)
def test_ties_of_other_levels_go_towards_zero_and_at_zero_up(levels):
    ladder = np.array(levels, np.float32)
    grid = Grid(ladder, np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32), 9, 3)
    middles = (ladder[:-1] + ladder[1:]) / 2
    chosen = ladder[grid.encode(middles[None, :])[0]]
    nearer = np.where(middles > 0, ladder[:-1], ladder[1:])
    assert np.array_equal(chosen, nearer)
    for direction, expected in ((-np.inf, ladder[:-1]), (np.inf, ladder[1:])):
        beside = np.nextafter(middles, np.float32(direction))
        assert np.array_equal(ladder[grid.encode(beside[None, :])[0]], expected)


def test_levels_one_float_apart_are_told_apart():
    """Their middle is no float32, whichever way it would round."""
    ulps = 1 + np.arange(4) * 2.0**-23
    levels = np.concatenate([-ulps[::-1], ulps]).astype(np.float32)
    grid = Grid(levels, np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32), 9, 3)
    assert grid.encode(levels[None, :]).tolist() == [list(range(8))]


def test_symmetric_uniform_takes_the_levels_with_the_smaller_error():
    steps = np.random.default_rng(0).integers(-8, 8, (4, 50)).astype(np.float32)
    assert fit("uniform", steps, 4).levels.tolist() == list(range(-8, 8))
    assert error_of(fit("uniform", steps, 4), steps) == 0
    narrow = np.clip(steps, -7, 7)
    assert fit("uniform", narrow, 4).levels.tolist() == list(range(-7, 8))
    assert fit("uniform", steps, 8).levels.tolist() == list(range(-127, 128))
    odd = np.array([[-3, -1, 1, 3]], np.float32)
    assert fit("uniform", odd, 2).levels.tolist() == [-3, -1, 1, 3]
    even = np.array([[-2, -1, 0, 1]], np.float32)
    assert fit("uniform", even, 2).levels.tolist() == [-2, -1, 0, 1]
    assert error_of(fit("uniform", odd, 2), odd) == error_of(fit("uniform", even, 2), even) == 0


@pytest.mark.parametrize("code, bits", [("uniform", 2), ("uniform", 5), ("power_of_two", 4)])
def test_the_scale_search_is_close_to_the_best_of_all_scales(code, bits):
    weight = laplace((3, 400), bits)
    grid = fit(code, weight, bits, search="mse")
    for factor in np.linspace(0.05, 4, 1000):
        scale = (grid.scale * factor).astype(np.float32)
        other = Grid(grid.levels, scale, grid.zero_point, grid.group_size, bits)
        assert (row_errors(grid, weight) <= 1.01 * row_errors(other, weight)).all()


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_the_asymmetric_search_is_close_to_the_best_of_all_scales_and_zero_points(bits):
    weight = laplace((3, 200), bits) + np.float32(0.5)
    grid = fit("uniform", weight, bits, symmetric=False, search="mse")
    for zero_point in grid.levels:
        for factor in np.linspace(0.3, 3, 90):
            scale = (grid.scale * factor).astype(np.float32)
            other = Grid(grid.levels, scale, np.full_like(scale, zero_point), 200, bits)
            assert (row_errors(grid, weight) <= 1.06 * row_errors(other, weight)).all()


def test_the_blocks_of_the_search_do_not_show(monkeypatch):
    weight = laplace((9, 23))
    for granularity in ("per_tensor", "per_channel", "per_group"):
        whole = fit("uniform", weight, 4, granularity, search="mse")
        monkeypatch.setattr(scale_search, "BLOCK", 7)
        monkeypatch.setattr(scale_search, "SOME_RUNS", 2)
        cut = fit("uniform", weight, 4, granularity, search="mse")
        monkeypatch.undo()
        assert np.array_equal(whole.scale, cut.scale)
        assert np.array_equal(whole.levels, cut.levels)


def test_powers_of_two():
    weight = laplace((4, 30))
    expected = [0.0] + [sign * 2.0**e for e in range(7) for sign in (-1, 1)]
    grid = fit("power_of_two", weight, 4)
    assert grid.levels.tolist() == sorted(expected) and grid.integers
    assert fit("power_of_two", weight, 2).levels.tolist() == [-1, 0, 1]
    assert not fit("power_of_two", weight, 5).integers
    assert np.array_equal(
        fit("power_of_two", weight, 8).levels, fit("power_of_two", weight, 6).levels
    )
    assert np.allclose(grid.scale[:, 0] * 64, np.abs(weight).max(axis=1))


def test_the_ternary_scale_of_the_paper_and_the_best_one():
    weight = laplace((5, 31))
    magnitude = np.abs(weight.astype(np.float64))
    paper = [row[row > 0.7 * row.mean()].mean() for row in magnitude]
    assert np.allclose(fit("ternary", weight, 2).scale[:, 0], paper, rtol=1e-6)
    best = fit("ternary", weight, 2, search="mse")
    for factor in np.linspace(0.3, 3, 500):
        scale = (best.scale * factor).astype(np.float32)
        other = Grid(best.levels, scale, best.zero_point, best.group_size, 2)
        assert error_of(best, weight) <= error_of(other, weight) * (1 + 1e-6)


def test_the_binary_scale_is_the_mean_magnitude():
    weight = laplace((4, 30))
    grid = fit("binary", weight, 1)
    assert np.allclose(grid.scale[:, 0], np.abs(weight).mean(axis=1), rtol=1e-6)
    assert np.array_equal(grid.levels[grid.encode(weight)], np.where(weight >= 0, 1, -1))
    assert grid.encode(np.zeros((4, 1), np.float32)).tolist() == [[1]] * 4


def test_few_distinct_values_are_kept_without_error():
    values = np.random.default_rng(0).normal(size=16).astype(np.float32)
    weight = np.random.default_rng(1).choice(values, (20, 30))
    grid = fit("codebook", weight, 4, "per_tensor")
    assert np.array_equal(grid.decode(grid.encode(weight)), weight)
    assert fit("codebook", np.full((2, 3), -2.5), 3, "per_tensor").levels.tolist() == [-2.5, 0]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_zeros_of_a_pruned_weight_stay_zero_in_a_codebook(bits, granularity):
    weight = laplace((8, 100))
    weight[np.abs(weight) < 1.5] = 0
    weight[3] = 0
    grid = fit("codebook", weight, bits, granularity)
    assert 0 in grid.levels
    assert (grid.decode(grid.encode(weight))[weight == 0] == 0).all()


def test_each_group_is_fitted_by_itself_the_short_last_one_too():
    weight = laplace((3, 21)) * np.linspace(0.1, 4, 21, dtype=np.float32)
    for search in ("minmax", "mse"):
        grid = fit("uniform", weight, 5, "per_group", group_size=8, symmetric=False, search=search)
        assert grid.scale.shape == (3, 3)
        for group in range(3):
            columns = np.arange(8 * group, min(8 * group + 8, 21))
            alone = fit("uniform", weight[:, columns], 5, symmetric=False, search=search)
            assert np.array_equal(grid.scale[:, [group]], alone.scale)
            assert np.array_equal(grid.zero_point[:, [group]], alone.zero_point)
    assert fit("uniform", weight, 4, "per_group", group_size=100).group_size == 21


@pytest.mark.parametrize(
    "code, bits, change, message",
    [
        ("uniform", 1, {}, "use code binary"),
        ("power_of_two", 1, {}, "use code binary"),
        ("binary", 2, {}, "binary has 1 bits, got 2"),
        ("ternary", 3, {}, "ternary has 2 bits, got 3"),
        ("codebook", 4, {"symmetric": False}, "codebook has its own"),
        ("power_of_two", 4, {"symmetric": False}, "belong to weight code uniform"),
        ("ternary", 2, {"symmetric": False}, "ternary has its own"),
        ("binary", 1, {"symmetric": False}, "binary has its own"),
        ("uniform", 4, {"group_size": 0}, "group_size must be at least 1 column, got 0"),
        ("uniform", 4, {"granularity": "per_row"}, "per_channel, per_group, got 'per_row'"),
        ("uniform", 4, {"search": "l1"}, "minmax, mse, got 'l1'"),
    ],
)
def test_a_request_without_sense_is_refused(code, bits, change, message):
    with pytest.raises(SpecError, match=message):
        fit(code, laplace((2, 8)), bits, **{"granularity": "per_group", **change})


@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0), (2, 2, 2)])
def test_only_a_matrix_with_values_has_a_grid(shape):
    with pytest.raises(ModelError, match="give a matrix"):
        fit("uniform", np.zeros(shape, np.float32), 8)


def test_a_grid_that_contradicts_itself_is_refused():
    levels, scale, zeros = (
        np.arange(4, dtype=np.float32),
        np.ones((2, 1), np.float32),
        np.zeros((2, 1), np.float32),
    )
    for arrays, message in [
        ((levels[::-1], scale, zeros), "ascending"),
        ((np.arange(5, dtype=np.float32), scale, zeros), "2 to 4 ascending"),
        ((levels, scale, zeros[:1]), "one shape"),
        ((levels, 0 * scale, zeros), "above zero"),
        ((levels, np.nan * scale, zeros), "finite"),
        ((levels, scale.astype(np.float64), zeros), "float32, got float32, float64, float32"),
        ((2 * levels, scale, zeros + 1), "one apart take a zero point"),
    ]:
        with pytest.raises(ModelError, match=message):
            Grid(*arrays, 3, 2)
    grid = Grid(levels, np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32), 3, 2)
    with pytest.raises(ModelError, match="scales for 2 rows"):
        grid.encode(np.zeros((3, 6)))
    with pytest.raises(ModelError, match="no column 6"):
        grid.encode(np.zeros((2, 7)))
    with pytest.raises(ModelError, match="no column 9"):
        grid.decode(np.zeros((2, 1), np.uint8), np.array([9]))
