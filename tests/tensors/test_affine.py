"""The pinned formula against a float64 oracle, and what must hold for any range and any value."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.errors import ModelError, SpecError
from tersor.tensors.affine import choose_affine, choose_symmetric, dequantize, quantize

TINY = float(np.finfo(np.float32).smallest_subnormal)
HUGE = 2.0**127
values = st.one_of(
    st.floats(-10, 10, width=32),
    st.floats(-HUGE, HUGE, width=32),
    st.sampled_from([0.0, -0.0, TINY, -TINY, 1e-38, HUGE, -HUGE]),
)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=values)


def oracle(x, scale, zero_point, low, high):
    """The formula in float64, where the division of two float32 is exact to 2^-53."""
    return np.clip(np.rint(x.astype(np.float64) / np.float64(scale)) + zero_point, low, high)


@settings(deadline=None, max_examples=60)
@given(arrays)
def test_uint8_codes_follow_the_formula(x):
    scale, zero_point = choose_affine(float(x.min()), float(x.max()))
    codes = quantize(x, scale, zero_point, dtype=np.uint8)
    assert codes.dtype == np.uint8 and codes.shape == x.shape
    exact = oracle(x, scale, int(zero_point), 0, 255)
    steps = x.astype(np.float64) / np.float64(scale)
    tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-4
    assert np.array_equal(codes[~tie], exact[~tie])
    assert np.abs(codes[tie].astype(int) - exact[tie]).max(initial=0) <= 1


@settings(deadline=None, max_examples=60)
@given(arrays)
def test_the_error_inside_the_range_is_at_most_one_step(x):
    scale, zero_point = choose_affine(float(x.min()), float(x.max()))
    assert scale > 0 and np.isfinite(1 / scale) and 0 <= zero_point <= 255
    back = dequantize(quantize(x, scale, zero_point, dtype=np.uint8), scale, zero_point)
    assert np.isfinite(back).all()
    error = np.abs(back.astype(np.float64) - x.astype(np.float64))
    assert (error <= 1.001 * float(scale)).all()


@settings(deadline=None, max_examples=100)
@given(values, values, st.integers(2, 8), st.booleans())
@example(HUGE, 0.0, 2, True)
@example(-HUGE, HUGE, 2, False)
def test_few_bits_cover_the_range_and_zero_exactly(a, b, bits, symmetric):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    scale, zero_point = choose_affine(low, high, bits, symmetric)
    assert scale.dtype == np.float32 and zero_point.dtype == np.uint8
    assert np.isfinite(scale) and scale > 0 and 0 <= zero_point <= 2**bits - 1
    codes = np.arange(2**bits, dtype=np.uint8)
    represented = dequantize(codes, scale, zero_point).astype(np.float64)
    assert np.isfinite(represented).all() and 0 in represented
    if symmetric:
        assert zero_point == 2 ** (bits - 1)
        assert np.array_equal(represented[1:], -represented[:0:-1])
    # Half a step is lost where the zero point was rounded, and 2^127 itself at 2 bits.
    reach = 0.501 * float(scale)
    assert represented[0] <= max(low, -HUGE) + reach
    assert represented[-1] >= min(high, HUGE / 2 if symmetric else HUGE) - reach


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_codes_reach_the_larger_end_to_both_sides(bits):
    steps = 2 ** (bits - 1) - 1
    assert choose_affine(-1.0, 6.0, bits, True) == (np.float32(6 / steps), steps + 1)
    assert choose_affine(-6.0, 1.0, bits, True) == (np.float32(6 / steps), steps + 1)
    assert choose_affine(0.0, 0.0, bits, True) == (1.0, steps + 1)
    assert choose_affine(0.0, 0.0, bits) == (1.0, 0)
    assert choose_affine(-1.0, 2.0, bits) == (
        np.float32(3 / (2**bits - 1)),
        round((2**bits - 1) / 3),
    )


@settings(deadline=None, max_examples=60)
@given(values, values)
def test_eight_bits_are_what_they_were(a, b):
    """The formula of the first release, typed again: files written then keep their meaning."""
    low, high = max(min(a, b, 0.0), -HUGE), min(max(a, b, 0.0), HUGE)
    scale = np.float32(max((high - low) / 255, float(np.finfo(np.float32).tiny)))
    expected = (scale, np.uint8(np.clip(np.rint(-low / float(scale)), 0, 255)))
    assert choose_affine(min(a, b), max(a, b)) == ((1.0, 0) if low == high else expected)


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(SpecError, match=f"2 to 8 bits, got {bits}"):
        choose_affine(0.0, 1.0, bits)


@settings(deadline=None, max_examples=60)
@given(values, values)
def test_zero_has_a_code_of_its_own(a, b):
    scale, zero_point = choose_affine(min(a, b), max(a, b))
    zero = np.zeros(1, np.float32)
    assert dequantize(quantize(zero, scale, zero_point, dtype=np.uint8), scale, zero_point) == 0


@settings(deadline=None, max_examples=60)
@given(arrays, st.booleans())
def test_symmetric_codes_are_narrow_odd_and_keep_zeros(x, per_channel):
    axis = 0 if per_channel else None
    scale = choose_symmetric(x, axis)
    codes = quantize(x, scale, axis=axis)
    assert codes.dtype == np.int8 and codes.min() >= -127
    assert np.array_equal(quantize(-x, scale, axis=axis), -codes)
    assert (codes[x == 0] == 0).all()
    assert scale.shape == ((x.shape[0],) if per_channel else ())
    error = np.abs(dequantize(codes, scale, axis=axis).astype(np.float64) - x)
    step = scale.reshape(-1, *[1] * (x.ndim - 1)) if per_channel else scale
    assert (error <= 0.5001 * step.astype(np.float64)).all()


@settings(deadline=None, max_examples=60)
@given(arrays)
def test_codes_are_fixed_points(x):
    scale = choose_symmetric(x)
    codes = quantize(x, scale)
    assert np.array_equal(quantize(dequantize(codes, scale), scale), codes)


def test_the_largest_floats_have_finite_codes():
    largest = np.finfo(np.float32).max
    x = np.array([largest, -largest, 1.0], np.float32)
    scale, zero_point = choose_affine(-float(largest), float(largest))
    affine = dequantize(quantize(x, scale, zero_point, dtype=np.uint8), scale, zero_point)
    symmetric = dequantize(quantize(x, choose_symmetric(x)), choose_symmetric(x))
    assert np.isfinite(affine).all() and np.isfinite(symmetric).all()


def test_halves_round_to_even():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    assert quantize(x, np.float32(1)).tolist() == [0, 2, 2, 0, -2]


def test_each_channel_has_its_scale():
    weight = np.array([[1.0, -2.0], [100.0, 0.0], [0.0, 0.0]], np.float32)
    scale = choose_symmetric(weight, 0)
    assert scale.tolist() == [np.float32(2 / 127), np.float32(100 / 127), 1.0]
    assert quantize(weight, scale, axis=0).tolist() == [[64, -127], [127, 0], [0, 0]]
    assert choose_symmetric(weight, 1).shape == choose_symmetric(weight, -1).shape == (2,)


def test_a_bias_takes_all_of_int32():
    bias = np.array([-1e30, 1e30, 3.0], np.float32)
    codes = quantize(bias, np.float32(1), dtype=np.int32)
    assert codes.tolist() == [-(2**31 - 1), 2**31 - 1, 3]


def test_infinity_is_clamped_and_nan_is_refused():
    x = np.array([np.inf, -np.inf], np.float32)
    assert quantize(x, np.float32(1), 3, dtype=np.uint8).tolist() == [255, 0]
    with pytest.raises(ModelError, match="NaN"):
        quantize(np.array([np.nan], np.float32), np.float32(1))
    with pytest.raises(ModelError, match="NaN or infinity"):
        choose_symmetric(np.array([np.nan], np.float32))


@pytest.mark.parametrize("low, high", [(np.nan, 1), (-1, np.inf), (2, 1)])
def test_a_senseless_range_is_refused(low, high):
    with pytest.raises(ModelError, match="range"):
        choose_affine(low, high)
