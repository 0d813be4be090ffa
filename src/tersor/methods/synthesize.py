"""Inputs from nothing but the network: images whose statistics inside it are those that batch norms remember."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import ModelError
from tersor.methods.device import usable_precision

BATCH = 32  # images that share statistics
LEARNING_RATE = 0.1
STEPS = 60
CLASS_SHARE = 0.1  # of the loss: every class is asked for as often
SMOOTH_SHARE = 0.02  # neighbouring pixels of photographs are alike


def synthetic_inputs(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    count: int,
    *,
    steps: int = STEPS,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> npt.NDArray[np.float32]:
    """`count` inputs (N, *input_shape) float32, as the network sees them, made without any data.

    Noise is changed by gradient descent until the mean and variance of what every batch norm reads are those it
    remembers (Cai 2020, "ZeroQ", eq. 3; Yin 2020, "Dreaming to distill", eq. 4), with a class asked of
    each image and smoothness. `module` is untouched. Raises ModelError for a network without batch norms: nothing in it
    tells what its inputs were like.
    """
    twin = copy.deepcopy(module).cpu().float().eval().to(memory_format=torch.channels_last)
    norms = [
        part
        for part in twin.modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]
    if not norms:
        raise ModelError(
            f"{type(module).__name__} has no batch norms, which alone remember what inputs were like; give --data, "
            "a folder of some unlabelled inputs"
        )
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    bf16 = usable_precision("bf16", torch.device("cpu")) == "bf16"
    generator = torch.Generator().manual_seed(seed)
    found = []
    batches = -(-count // BATCH)
    for number in range(batches):
        size = min(BATCH, count - number * BATCH)

        def told(share: float, number: int = number) -> None:
            if on_progress:
                on_progress((number + share) / batches)

        # Statistics of a few images say little: a small last batch is made with others and cut.
        made = _batch(twin, norms, (max(size, 16), *input_shape), steps, generator, bf16, told)
        found.append(made[:size])
    return np.concatenate(found)


def _batch(
    twin: nn.Module,
    norms: list[_BatchNorm],
    shape: tuple[int, ...],
    steps: int,
    generator: torch.Generator,
    bf16: bool,
    told: Callable[[float], None],
) -> npt.NDArray[np.float32]:
    losses: list[Tensor] = []

    def watch(part: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(part, _BatchNorm)
        assert part.running_mean is not None and part.running_var is not None
        value = given[0].float()
        axes = [0, *range(2, value.ndim)]
        variance, mean = torch.var_mean(value, axes, correction=0)
        scale = part.running_var.clamp_min(part.eps)
        # Each channel by its own size, and a channel that never varied not without bound.
        off = ((mean - part.running_mean).square() / scale).clamp_max(100).mean()
        losses.append(off + (variance / scale).clamp(1e-6, 1e6).log().square().mean())

    hooks = [norm.register_forward_pre_hook(watch) for norm in norms]
    images = torch.randn(shape, generator=generator).requires_grad_()
    with torch.no_grad():
        classes = twin(images[:2]).shape[-1]
    target = torch.arange(shape[0]) % max(classes, 1)
    optimizer = torch.optim.Adam([images], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    try:
        for step in range(steps):
            losses.clear()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = twin(images.contiguous(memory_format=torch.channels_last))
            loss = torch.stack(losses).mean()
            loss = loss + CLASS_SHARE * nn.functional.cross_entropy(out.float(), target)
            loss = loss + SMOOTH_SHARE * _roughness(images)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            told((step + 1) / steps)
    finally:
        for hook in hooks:
            hook.remove()
    made: npt.NDArray[np.float32] = images.detach().contiguous().numpy()
    if not np.isfinite(made).all():
        raise ModelError("making inputs from batch norms diverged; give --data instead")
    return made


def _roughness(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels."""
    down = (images[..., 1:, :] - images[..., :-1, :]).square()
    right = (images[..., 1:] - images[..., :-1]).square()
    total = images.new_zeros(())
    return total + sum(part.mean() for part in (down, right) if part.numel())
