"""Where and in which precision training runs."""

from __future__ import annotations

import os

import torch
from torch import nn


def training_device() -> torch.device:
    """The accelerator where there is one, else the CPU; of several accelerators that of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return torch.device("cuda", number)


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` moved to `device` in channels_last, the layout in which CPU convolutions are fastest."""
    return module.to(device).to(memory_format=torch.channels_last)


def off_device(module: nn.Module) -> nn.Module:
    """`module` moved to the CPU in the ordinary layout."""
    return module.to("cpu").to(memory_format=torch.contiguous_format)


def usable_precision(asked: str, device: torch.device) -> str:
    """`asked`, or float32 where this processor has no instructions for bfloat16."""
    if asked == "bf16" and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return "float32"
    return asked
