"""Bias correction: what rounding a weight shifts its layer's outputs by, on average."""

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
    groups, columns = moments.mean.shape
    rows = len(weight)
    shapes = {weight.shape, quantized_weight.shape}
    if shapes != {(rows, columns)} or rows % groups:
        raise ModelError(
            f"weights of shapes {weight.shape} and {quantized_weight.shape} do not fit the means "
            f"of {groups} groups of {columns} inputs: these are moments of another layer"
        )
    change = quantized_weight.astype(np.float64) - weight.astype(np.float64)
    blocks = change.reshape(groups, rows // groups, columns)
    shift = blocks @ moments.mean.astype(np.float64)[:, :, None]
    return np.asarray(shift.reshape(-1), np.float32)
