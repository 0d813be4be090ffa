"""Batch-norm re-estimation: the cheapest help after any change of the weights; it needs no labels."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import DataError
from tersor.methods.device import off_device, on_device, training_device, usable_precision


def reestimate_batch_norm(
    module: nn.Module, batches: Iterable[npt.NDArray[np.float32]], *, precision: str = "bf16"
) -> nn.Module:
    """A copy whose batch-norm means and variances are the plain average over `batches` (N, C, H, W) float32.

    All other layers (dropout too) run as in evaluation. A network without batch norm comes back unchanged.
    Raises DataError when there are no batches.
    """
    fresh = copy.deepcopy(module)
    norms = [layer for layer in fresh.modules() if isinstance(layer, _BatchNorm)]
    if not norms:
        return fresh.eval()
    device = training_device()
    fresh = on_device(fresh.eval(), device)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average over all batches
        norm.train()
    use_bf16 = usable_precision(precision, device) == "bf16"
    seen = 0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
        for batch in batches:
            fresh(torch.from_numpy(batch).to(device, memory_format=torch.channels_last))
            seen += len(batch)
    if not seen:
        raise DataError("batch-norm re-estimation needs calibration inputs, and got none")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return off_device(fresh).eval()
