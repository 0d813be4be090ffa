"""Pruned networks judged without labels: their logits, with batch norms as a re-estimation would leave them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import ModelError
from tersor.methods.device import usable_precision


class BatchStatistics:
    """Batch norms of `module` use each batch's own mean and variance and leave theirs alone: pruned layers
    before them have changed what they see, and they are re-estimated at the end anyway."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]

    def __enter__(self) -> None:
        self.momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
            norm.train()

    def __exit__(self, *_: object) -> None:
        for norm, momentum in zip(self.norms, self.momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def logits_of(module: nn.Module, inputs: torch.Tensor) -> npt.NDArray[np.float32]:
    """What `module` gives for `inputs`, as it is, in bfloat16 where the processor has it. Raises ModelError
    for anything but (N, classes)."""
    bf16 = usable_precision("bf16", inputs.device) == "bf16"
    with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        outputs = module(inputs)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() != 2:
        kind = getattr(outputs, "shape", type(outputs).__name__)
        raise ModelError(
            f"{type(module).__name__} returns no logits (N, classes) but {kind}, and pruned networks are "
            "compared by them: wrap it in a module that returns them, or take prune.scope layer or global"
        )
    return np.asarray(outputs.float().cpu().numpy())
