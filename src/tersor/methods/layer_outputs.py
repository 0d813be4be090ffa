"""One pass of unlabelled inputs through a module: what its layers put out, and how often they run."""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tersor.errors import DataError, ModelError
from tersor.methods.calibrate import CHUNK, checked_batches
from tersor.methods.device import on_device
from tersor.tensors.factorize import OutputMoments

FloatArray = npt.NDArray[np.float32]


@dc.dataclass(frozen=True, eq=False)
class LayerOutputs:
    """How a layer runs for one image: `calls`, and over all of them the positions it reads
    (`positions_in`) and writes (`positions`), 1 each for a vector; `moments` of its outputs, where
    they were asked for. A layer that never runs has 0 calls."""

    calls: int
    positions_in: int
    positions: int
    moments: OutputMoments | None = None


def observe_outputs(
    module: nn.Module,
    batches: Iterable[FloatArray],
    layers: Sequence[str],
    *,
    with_moments: Sequence[str] = (),
) -> dict[str, LayerOutputs]:
    """Run `batches` (N, C, H, W) float32 through a copy of `module` in evaluation, and watch its
    `layers` (convolutional or linear, by name), those `with_moments` closely.

    Where no moments are asked for, one image is enough and no more is read. Raises DataError for no
    images, another shape, NaN or infinity; ModelError where the module cannot run them or a layer's
    outputs overflow.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = on_device(copy.deepcopy(module).float(), device).eval()
    parts = dict(run.named_modules())
    sums = {name: _Sums(parts[name], name in with_moments) for name in layers}
    for name, held in sums.items():
        parts[name].register_forward_hook(held.add)
    seen = chunks = 0
    for number, batch in checked_batches(batches, (0, 0, 0), 2**62 if with_moments else 1):
        for start in range(0, len(batch), CHUNK):
            _run(run, torch.from_numpy(batch[start : start + CHUNK]).to(device), number)
            chunks += 1
        seen += len(batch)
    if seen == 0:
        raise DataError("no unlabelled inputs were given; one image at least is needed")
    return {name: held.outputs(name, seen, chunks) for name, held in sums.items()}


def _run(module: nn.Module, chunk: torch.Tensor, number: int) -> None:
    try:
        with torch.no_grad():
            module(chunk.to(memory_format=torch.channels_last))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(module).__name__} cannot run calibration batch {number} of shape "
            f"{tuple(chunk.shape)}: {reason}"
        ) from None


class _Sums:
    """Sums over the outputs of one layer, relative to the mean of its first chunk: sums of squares
    of values far from zero would cancel."""

    def __init__(self, layer: nn.Module, moments: bool) -> None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        self.axis = -1 if weight.ndim == 2 else 1
        self.moments = moments
        self.calls = self.read = self.written = 0
        self.shift: torch.Tensor | None = None
        self.total: torch.Tensor | float = 0.0
        self.second: torch.Tensor | float = 0.0

    def add(self, layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """See one call: the signature of a forward hook."""
        self.calls += 1
        self.read += inputs[0].numel() // inputs[0].shape[self.axis]
        self.written += output.numel() // output.shape[self.axis]
        if not self.moments:
            return
        rows = output.movedim(self.axis, 0).flatten(1)
        if self.shift is None:
            self.shift = rows.mean(dim=1, keepdim=True)
        rows = rows - self.shift
        self.total = self.total + rows.sum(dim=1, dtype=torch.float64)
        self.second = self.second + (rows @ rows.T).double()

    def outputs(self, name: str, num_images: int, chunks: int) -> LayerOutputs:
        """What was seen, for one image."""
        per_image = (self.calls // chunks, self.read // num_images, self.written // num_images)
        if self.shift is None:
            return LayerOutputs(*per_image)
        assert isinstance(self.total, torch.Tensor)
        offset = self.total / self.written
        covariance = self.second / self.written - offset[:, None] * offset
        if not torch.isfinite(covariance).all():
            raise ModelError(
                f"the outputs of layer {name!r} hold NaN or infinity; the model overflows on these "
                "inputs"
            )
        mean = self.shift[:, 0].double() + offset
        return LayerOutputs(*per_image, OutputMoments(mean.cpu(), covariance.cpu(), self.written))
