"""PyTorch eager: float32, what the study's times are measured against, and bfloat16, for judging
many modules."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from tersor.engines.load import ENGINES, FloatArray, checked_batch
from tersor.errors import EngineError


@ENGINES.register("torch")
class TorchSession:
    """A session of a float32 copy of an nn.Module in eval mode."""

    engine = "torch"
    bf16 = False

    def __init__(self, model: Any, threads: int) -> None:
        import torch  # here alone: deployment of a graph needs no torch

        if not isinstance(model, torch.nn.Module):
            raise EngineError(
                f"torch runs a torch.nn.Module, got {type(model).__name__}; a graph or a .tersor "
                "file holds no module: use engine 'onnxruntime'"
            )
        self.threads = threads
        self._module = copy.deepcopy(model).cpu().float().eval()
        if self.bf16:
            self._module = self._module.to(memory_format=torch.channels_last)

    def run(self, batch: FloatArray) -> FloatArray:
        """Logits (N, classes) float32 of images (N, C, H, W) float32."""
        import torch

        inputs = checked_batch(batch, (None, None, None, None), self.engine)
        if not inputs.flags.writeable:  # torch shares the memory and warns of such
            inputs = inputs.copy()
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                logits = self._module(torch.from_numpy(inputs))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise EngineError(
                f"torch: the module cannot run a batch of shape {inputs.shape}: {reason}"
            ) from None
        if not isinstance(logits, torch.Tensor):
            raise EngineError(
                f"torch: the module returned {type(logits).__name__}; expected a tensor of logits"
            )
        return np.asarray(logits.float().numpy(), np.float32)


@ENGINES.register("torch_bf16")
class TorchBf16Session(TorchSession):
    """The same in bfloat16 autocast and channels_last: about twice as fast where the processor has
    bfloat16."""

    engine = "torch_bf16"
    bf16 = True
