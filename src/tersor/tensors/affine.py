"""Affine codes of 2 to 8 bits: x = scale * (q - zero_point), scale > 0, zero_point an integer
inside the range.

The formula is pinned, because a file, a simulation and an engine must agree bit for bit: q =
clamp(rint(x / scale) + zero_point), with the division in float32 and halves rounded to even, which
is ONNX's QuantizeLinear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tersor.errors import ModelError, SpecError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

# A smaller scale would be denormal: its inverse overflows, and some engines flush it to zero.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
# Ranges end here: of a larger one, scale * (q - zero_point) may round to infinity.
LARGEST = 2.0**127


def choose_affine(
    low: float, high: float, bits: int = 8, symmetric: bool = False
) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 codes (0 to 2^bits - 1) that cover `low` to `high`, both
    finite; 2 to 8 bits.

    The range is widened to hold zero, which maps to a code exactly: padding and ReLU stay exact.
    Where `symmetric`, it is widened to reach as far to both sides of the middle code 2^(bits-1),
    which is the zero point; code 0 then lies one step beyond. A range that is only zero gets scale
    1. Raises ModelError for a range that is not finite or is upside down, SpecError for the bits.
    """
    if not 2 <= bits <= 8:
        raise SpecError(f"affine codes have 2 to 8 bits, got {bits}")
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ModelError(
            f"no codes cover the range {low} to {high}; it must be finite and in order"
        )
    low, high = max(min(float(low), 0.0), -LARGEST), min(max(float(high), 0.0), LARGEST)
    last, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        # LARGEST / middle: code 0 stands for -middle * scale, which must be finite too.
        widest = min(max(-low, high) / (last - middle), LARGEST / middle)
        scale = np.float32(max(widest, SMALLEST_SCALE) if widest else 1.0)
        return scale, np.uint8(middle)
    if low == high:
        return np.float32(1.0), np.uint8(0)
    scale = np.float32(max((high - low) / last, SMALLEST_SCALE))
    zero_point = np.clip(np.rint(-low / float(scale)), 0, last)
    return scale, np.uint8(zero_point)


def choose_symmetric(weight: Array, axis: int | None = None) -> FloatArray:
    """Scales of int8 codes -127 to 127 with zero point 0 by the largest magnitude of `weight`.

    Shape () where `axis` is None, else (weight.shape[axis],): one scale for every slice along the
    axis kept. A slice of zeros gets scale 1. Raises ModelError for NaN or infinity.
    """
    others = (
        None if axis is None else tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    )
    largest = np.abs(weight).max(axis=others, initial=0.0)
    if not np.isfinite(largest).all():
        raise ModelError("weights hold NaN or infinity; load finite weights before quantizing")
    steps = np.minimum(largest.astype(np.float64), LARGEST) / 127
    scale = np.maximum(steps, SMALLEST_SCALE).astype(np.float32)
    return np.asarray(np.where(largest == 0, np.float32(1), scale), np.float32)


def quantize(
    values: Array,
    scale: Array | np.float32,
    zero_point: Array | np.integer[Any] | int = 0,
    *,
    dtype: npt.DTypeLike = np.int8,
    axis: int | None = None,
) -> Array:
    """Codes of `values` (any shape, float32) by the pinned formula; same shape, `dtype` int8, uint8
    or int32.

    int8 is narrow, -127 to 127, so that a weight and its negative have codes of equal size. `scale`
    and `zero_point` are () or, with `axis`, (values.shape[axis],). Infinities take the outermost
    codes; NaN has no code and raises ModelError.
    """
    limits = np.iinfo(np.dtype(dtype))
    smallest = -limits.max if limits.min < 0 else 0
    steps = np.asarray(values, np.float32) / _along(scale, values.ndim, axis)
    if np.isnan(steps).any():
        raise ModelError("NaN has no integer code; clean the values before quantizing")
    # In float64 the sum with zero_point is exact, and so is the clamp at 2^31 - 1.
    codes = np.rint(steps).astype(np.float64) + _along(zero_point, values.ndim, axis)
    return np.clip(codes, smallest, limits.max).astype(dtype)


def dequantize(
    codes: Array,
    scale: Array | np.float32,
    zero_point: Array | np.integer[Any] | int = 0,
    *,
    axis: int | None = None,
) -> FloatArray:
    """Values scale * (q - zero_point) of `codes`, float32, same shape; the difference is exact in
    int64."""
    offset = codes.astype(np.int64) - _along(zero_point, codes.ndim, axis).astype(np.int64)
    return np.asarray(offset.astype(np.float32) * _along(scale, codes.ndim, axis), np.float32)


def _along(value: Any, ndim: int, axis: int | None) -> Array:
    """`value` with its one dimension, where it has one, put at `axis` of `ndim`."""
    array = np.asarray(value)
    if array.ndim == 0:
        return array
    assert axis is not None, "a scale per slice needs its axis"
    shape = [1] * ndim
    shape[axis] = array.size
    return array.reshape(shape)
