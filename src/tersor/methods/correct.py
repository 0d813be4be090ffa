"""What rounding a weight does to the mean and the variance of its layer's outputs, to be taken back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tersor.errors import ModelError
from tersor.methods.layer_inputs import InputMoments

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]


def bias_shift(weight: Array, quantized_weight: Array, moments: InputMoments) -> FloatArray:
    """E[(W_q - W) x] (O,) float32 of the weights (O, K), to be subtracted from the bias (Nagel
    2019, section 4.2).

    The rows are those of the groups of `moments` in order. Raises ModelError for moments of another
    layer.
    """
    change = quantized_weight.astype(np.float64) - weight.astype(np.float64)
    blocks = _in_groups(change, weight, quantized_weight, moments)
    shift = blocks @ moments.mean.astype(np.float64)[:, :, None]
    return np.asarray(shift.reshape(-1), np.float32)


def output_gain(weight: Array, quantized_weight: Array, moments: InputMoments) -> FloatArray:
    """sqrt(Var[W x] / Var[W_q x]) (O,) float32 of the weights (O, K): what the scale of each output
    channel is multiplied by so that its variance is that of the float layer.

    With the shift of the bias it is batch-norm re-estimation, done where the batch norm has been
    folded into the weights (Nagel 2019, section 4.2, corrects the mean alone). At least a half, at
    most two; 1 for a channel that is constant.
    """
    centred = moments.second.astype(np.float64) - np.einsum(
        "gi,gj->gij", moments.mean.astype(np.float64), moments.mean
    )
    before, after = (
        np.einsum("gri,gij,grj->gr", blocks, centred, blocks, optimize=True).reshape(-1)
        for blocks in (
            _in_groups(each.astype(np.float64), weight, quantized_weight, moments)
            for each in (weight, quantized_weight)
        )
    )
    usable = (before > 0) & (after > 0)
    ratio = np.divide(before, after, out=np.ones_like(before), where=usable)
    return np.asarray(np.sqrt(ratio).clip(0.5, 2.0), np.float32)


def _in_groups(
    values: Array, weight: Array, quantized_weight: Array, moments: InputMoments
) -> Array:
    """`values` (O, K) as (groups, O / groups, K), after checking that all belong together."""
    groups, columns = moments.mean.shape
    rows = len(weight)
    shapes = {weight.shape, quantized_weight.shape}
    if shapes != {(rows, columns)} or rows % groups:
        raise ModelError(
            f"weights of shapes {weight.shape} and {quantized_weight.shape} do not fit the means "
            f"of {groups} groups of {columns} inputs: these are moments of another layer"
        )
    return values.reshape(groups, rows // groups, columns)
