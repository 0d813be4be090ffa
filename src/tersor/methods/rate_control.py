"""Training with the file's expected bits: codes that are chosen by rate and distortion in every step, at a
price that keeps the file on its way to the size asked for.

A weight is scale * code(v / scale), v trained straight through the rounding. A code is 0 unless what it saves
is worth its bits: with u = v / scale and n the whole number nearest to |u|, where

    worth * (u^2 - (|u| - n)^2) > price * (bits(n) - bits(0)),

worth = importance of the output * curvature of the input * scale^2: the model of rate and distortion by which
the codes were chosen before the training (`tensors.rate_distortion`), with the other columns left as they
are. So each weight has a dead zone of its own, |u| < dead, made anew every REFRESH steps or sooner from
the bits that the present codes make likely, and as wide as the size demands. The rate follows Oktay 2020 and
Girish 2023 in being part of what is trained; the dead zones, and a price found by the size, are ours.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.artifact.rates import coded_bytes
from tersor.methods.fake_quantize import SMALLEST_STEP
from tersor.tensors.rates import LARGEST_CODE, Rates, fit_rates

FloatArray = npt.NDArray[np.float32]
REFRESH, LEAST_LOOKS = 25, 60  # steps between two looks at the codes; looks in a short training
RATIO_EVERY = 20  # looks, of which one codes all layers to see what the rates leave out
TRIES = 4  # of a price in one look
ELASTICITY = 0.4  # the size falls about as price^-0.4 (measured from 3 bits a weight to 0.1)
LARGEST_CHANGE = 1.5  # of the logarithm of the price at a time
CLOSE = 0.005  # of the size: near enough
WIDEST = 1e4  # a dead zone that nothing leaves: a pruned weight
CHUNK = 1 << 17  # values computed at a time, so that they stay in the cache


class _Rounded(torch.autograd.Function):
    """Straight through: the gradient of what comes out is that of what went in."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, scale: torch.Tensor, dead: torch.Tensor
    ) -> torch.Tensor:
        found = torch.empty_like(values)
        size = max(1, CHUNK * len(values) // max(values.numel(), 1))
        for start in range(0, len(values), size):
            rows = slice(start, start + size)
            part = codes_of(values[rows], scale[rows], dead[rows])
            torch.mul(part, _along(scale[rows], part), out=found[rows])
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


def codes_of(values: torch.Tensor, scale: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Whole codes, float32, of `values` (O, ...): 0 within `dead` (O, ...) steps of `scale` (O,)."""
    steps = values / _along(scale, values)
    size = steps.abs()
    codes = size.round().clamp_(1, LARGEST_CODE)
    return codes.masked_fill_(size < dead, 0).copysign_(steps)


def _along(scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, *(1,) * (values.ndim - 1))


class CodedWeight(nn.Module):
    """A weight's codes while it is trained: `scale` (O,) float32 fixed, `dead` zones in the shape of the
    weight, `outputs` (O,) and `inputs` (K,) whose product, times scale^2, is what an error of 1 is worth."""

    def __init__(
        self, scale: torch.Tensor, dead: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor
    ) -> None:
        super().__init__()
        for name, held in (
            ("scale", scale),
            ("dead", dead),
            ("outputs", outputs),
            ("inputs", inputs),
        ):
            self.register_buffer(name, held.detach().clone().float())

    scale: torch.Tensor
    dead: torch.Tensor
    outputs: torch.Tensor
    inputs: torch.Tensor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """scale * codes of `values`."""
        return _Rounded.apply(values, self.scale, self.dead)  # type: ignore[no-any-return]

    @property
    def size(self) -> torch.Tensor:
        """The steps (O,)."""
        return self.scale.clamp_min(SMALLEST_STEP)

    @torch.no_grad()
    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """Whole codes, float32: forward gives size * codes."""
        return codes_of(values.float(), self.scale, self.dead)


@dc.dataclass(eq=False)
class _Look:
    """A layer as one look sees it: u = |v| / scale (O, K), the rates of its codes, and the bits that a first
    code above 0 takes more than 0 does, over what an error of one step is worth: dead zones at price 1."""

    layer: CodedWeight
    size: FloatArray
    rates: Rates
    ratio: FloatArray
    pruned: npt.NDArray[np.bool_]

    def dead(self, price: float) -> FloatArray:
        """Dead zones (O, K) at `price`."""
        ratio = self.ratio * np.float32(price)
        found = np.where(ratio <= 1, (1 + ratio) / 2, np.sqrt(ratio))
        found[self.pruned] = WIDEST
        return np.asarray(found, np.float32)

    def bits(self, price: float) -> float:
        """Bits of the codes at `price`, under the rates at hand."""
        live = self.size >= self.dead(price)
        magnitude = np.rint(self.size[live]).clip(1, LARGEST_CODE).astype(np.int64)
        row = np.broadcast_to(self.rates.row_class[:, None], live.shape)[live]
        more = self.rates.some[live] - self.rates.zero[live] + self.rates.sizes[row, magnitude]
        return float(self.rates.zero.sum(dtype=np.float64) + more.sum(dtype=np.float64))


class SizeControl(nn.Module):
    """Holds the codes of all `CodedWeight` layers of `module` on the way from `start_bytes` to `end_bytes`
    (of codes in the file), which they reach after the share `ramp` of the steps; `price` is where it starts.

    `bytes_by_step` tells how it went. The state is `price` and `ratio` (bytes in the file over those the rates
    tell), beside what the layers hold.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        start_bytes: float,
        end_bytes: float,
        price: float,
        ramp: float = 0.6,
        ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self._layers = dict(coded_layers(module))  # no children: their state is the module's
        self.start_bytes, self.end_bytes, self.ramp = start_bytes, end_bytes, ramp
        self.price, self.ratio, self.looks = price, ratio, 0
        self.bytes_by_step: list[tuple[int, float]] = []

    def begin(self, step: int, num_steps: int) -> None:
        """Be told that `step` (from 0) begins."""
        if step % max(1, min(REFRESH, num_steps // LEAST_LOOKS)) == 0:
            done = min(1.0, step / max(1.0, self.ramp * num_steps))
            wanted = self.start_bytes * (self.end_bytes / self.start_bytes) ** done
            if self.looks % RATIO_EVERY == 0 and self.looks:
                self.measure_ratio()
            self.look(wanted)
            self.looks += 1
            self.bytes_by_step.append((step, wanted))

    @torch.no_grad()
    def look(self, wanted_bytes: float) -> float:
        """Make dead zones anew, at the price at which the codes take `wanted_bytes`; returns the bytes."""
        looks = [_look(layer, part) for layer, part in self._layers.values()]
        target = 8 * wanted_bytes / self.ratio
        price, bits = self.price, sum(each.bits(self.price) for each in looks)
        tried = [(math.log(price), math.log(max(bits, 1.0)))]
        while abs(bits - target) > CLOSE * target and len(tried) < TRIES:
            price = math.exp(_next(tried, math.log(target)))
            bits = sum(each.bits(price) for each in looks)
            tried.append((math.log(price), math.log(max(bits, 1.0))))
        self.price = price
        for each in looks:
            dead = torch.from_numpy(each.dead(price)).view(each.layer.dead.shape)
            each.layer.dead.copy_(dead)
        return bits / 8 * self.ratio

    @torch.no_grad()
    def measure_ratio(self) -> int:
        """Code all layers as the file does; returns their bytes."""
        told = found = 0.0
        for layer, part in self._layers.values():
            codes = part.codes(weight_behind(layer)).contiguous().cpu().numpy().astype(np.int8)
            rows = codes.reshape(len(codes), -1)
            told += fit_rates(rows, positions_of(codes)).bits(rows).sum(dtype=np.float64) / 8
            found += coded_bytes(codes)
        self.ratio = float(found / max(told, 1.0))
        return int(found)

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"price": float(self.price), "ratio": float(self.ratio), "looks": self.looks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_extra_state`."""
        self.price, self.ratio, self.looks = state["price"], state["ratio"], state["looks"]


def coded_layers(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, CodedWeight]]]:
    """The layers of `module` whose weight is a `CodedWeight`'s, by name."""
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            part = layer.parametrizations["weight"][0]
            if isinstance(part, CodedWeight):
                yield name, (layer, part)


def weight_behind(layer: nn.Module) -> torch.Tensor:
    """What is trained of a layer of `coded_layers`."""
    held: Any = layer.parametrizations["weight"]  # type: ignore[index]
    return held.original  # type: ignore[no-any-return]


def positions_of(codes: npt.NDArray[Any]) -> int:
    """Positions of the kernel of a weight (O, I, *kernel)."""
    return math.prod(codes.shape[2:])


def _look(layer: nn.Module, part: CodedWeight) -> _Look:
    values = weight_behind(layer).detach().cpu().contiguous()
    dead = part.dead.cpu().contiguous()
    scale = part.scale.cpu()
    codes = codes_of(values, scale, dead).numpy().astype(np.int8)
    rows = codes.reshape(len(codes), -1)
    rates = fit_rates(rows, positions_of(codes))
    size = (values.flatten(1).abs() / scale[:, None]).numpy()
    first = rates.sizes[rates.row_class, 1]
    more = np.maximum(rates.some - rates.zero + first[:, None], 0)
    outputs = (part.outputs.cpu() * scale.square()).numpy()
    worth = np.maximum(np.outer(outputs, part.inputs.cpu().numpy()), np.float32(1e-30))
    return _Look(part, size, rates, more / worth, (dead >= WIDEST).flatten(1).numpy())


def _next(tried: list[tuple[float, float]], wanted: float) -> float:
    """The next logarithm of a price: along the line through the last two, or by ELASTICITY."""
    price, size = tried[-1]
    slope = -ELASTICITY
    if len(tried) > 1 and abs(tried[-2][0] - price) > 1e-9:
        slope = min((tried[-2][1] - size) / (tried[-2][0] - price), -0.05)
    change = (wanted - size) / slope
    return price + min(max(change, -LARGEST_CHANGE), LARGEST_CHANGE)
