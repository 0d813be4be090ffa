"""The price of a bit at which a file has the size asked for, or the network loses what it may."""

from __future__ import annotations

import dataclasses as dc
import functools
import math
from collections.abc import Callable, Mapping

import torch

from tersor.errors import BudgetError
from tersor.methods.paired_moments import weight_of
from tersor.methods.squeeze import Calibration, CodedLayer, CodedNetwork, code_network

# Bits a weight fall about as price^-ELASTICITY, from 3 to 0.1 of them (measured on ResNet-18, where
# FIRST_SHARE of the worth of a weight's outputs is the price at one bit a weight).
ELASTICITY = 0.4
FIRST_SHARE = 3e-3
CLOSE_TRIAL = 0.1  # how near to its size a trial must come
LEAST_FILLED, AIM = 0.96, 0.99  # of the bytes allowed
TRIALS, RUNS = 5, 4
MOST_STEERING = 1.25  # how far a price may go from the one found, so that the size comes out
TRIAL_IMAGES = 256

Told = Callable[[str, float], None]  # what is done, and how much of it (0 to 1)


@dc.dataclass(frozen=True, eq=False)
class Priced:
    """A coded network and the price in nats a bit that it came from."""

    coded: CodedNetwork
    price: float


class Steering:
    """The price of each layer: `price`, at which all would take `aim` bytes in proportion to `planned`,
    corrected a little by what the layers before took."""

    def __init__(self, price: float, planned: Mapping[str, int], aim: float) -> None:
        self.price, self.aim, self.spent = price, aim, 0.0
        share = aim / max(sum(planned.values()), 1)
        self.planned = {name: share * size for name, size in planned.items()}
        self.left = float(aim)

    def __call__(self, name: str) -> float:
        """The price for the layer `name`, whose turn it is."""
        left = max(self.aim - self.spent, 0.01 * self.aim)
        factor = (self.left / left) ** (1 / ELASTICITY) if self.left > 0 else 1.0
        return self.price * min(max(factor, 1 / MOST_STEERING), MOST_STEERING)

    def hear(self, name: str, layer: CodedLayer) -> None:
        """The layer is done."""
        self.spent += layer.size_bytes
        self.left -= self.planned.get(name, 0.0)


@dc.dataclass(frozen=True, eq=False)
class Coder:
    """Codes the layers `names` of one network at any price; `told` hears of every layer."""

    calibration: Calibration
    names: tuple[str, ...]
    masks: Mapping[str, torch.Tensor] | None = None
    told: Told | None = None

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Weights by layer."""
        layers = dict(self.calibration.original.named_modules())
        return {name: weight_of(layers[name]).numel() for name in self.names}

    def __call__(self, price: float | Steering, what: str, *, quick: bool = False) -> CodedNetwork:
        """Code at `price`; `quick`: with few images, one step and one round, to see the size."""
        calibration = self.calibration.part(TRIAL_IMAGES) if quick else self.calibration
        done = 0

        def hear(name: str, layer: CodedLayer) -> None:
            nonlocal done
            done += self.sizes[name]
            if isinstance(price, Steering):
                price.hear(name, layer)
            if self.told is not None:
                words = f"{what}: {name} {layer.size_bytes:,} bytes"
                self.told(words, done / sum(self.sizes.values()))

        return code_network(
            calibration,
            price,
            names=self.names,
            masks=self.masks,
            told=hear,
            quick=quick,
        )

    def first_price(self, bits: float) -> float:
        """A guess of the price at which a weight takes so many bits."""
        worth = FIRST_SHARE * self.calibration.worth_of_a_weight(self.names)
        price: float = max(worth, 1e-30) * bits ** (-1 / ELASTICITY)
        return price


def code_to_size(coder: Coder, code_bytes: int, *, near: Priced | None = None) -> Priced:
    """The network coded so that its codes take at most `code_bytes` and hardly less.

    Trials with few images find the price, unless one is known from a network `near`; the run that counts
    corrects it from layer to layer by what is spent. Raises BudgetError where no price does it.
    """
    if code_bytes < 1:
        raise BudgetError(f"no bytes are left for codes ({code_bytes:,}); ask for a larger file")
    if near is None:
        price = coder.first_price(8 * code_bytes / sum(coder.sizes.values()))
        price, planned = _tried(coder, code_bytes, price)
    else:
        price, planned = near.price, _sizes(near.coded)
    aim, best = AIM * code_bytes, None
    tried: list[tuple[float, float]] = []
    for number in range(RUNS):
        if number == 0:
            price *= (sum(planned.values()) / aim) ** (1 / ELASTICITY)
        else:
            price = math.exp(next_logarithm(tried, math.log(aim), -ELASTICITY))
        found = coder(Steering(price, planned, aim), f"coding {number + 1}")
        tried.append((math.log(price), math.log(max(found.code_bytes, 1))))
        fits = found.code_bytes <= code_bytes
        if fits and (best is None or found.code_bytes > best.coded.code_bytes):
            best = Priced(found, price)
        if fits and found.code_bytes >= LEAST_FILLED * code_bytes:
            break
        planned = _sizes(found)
        if not fits:
            aim *= AIM
    if best is None:
        raise BudgetError(
            f"no price of a bit gives codes of at most {code_bytes:,} bytes: the last of {RUNS} runs took "
            f"{found.code_bytes:,}; ask for a larger file, or remove channels first"
        )
    return best


def _sizes(coded: CodedNetwork) -> dict[str, int]:
    return {name: layer.size_bytes for name, layer in coded.layers.items()}


def _tried(coder: Coder, code_bytes: int, price: float) -> tuple[float, dict[str, int]]:
    """A price at which a trial comes near `code_bytes`, and what its layers took."""
    tried: list[tuple[float, float]] = []
    for number in range(TRIALS):
        found = coder(price, f"trial {number + 1}", quick=True)
        tried.append((math.log(price), math.log(max(found.code_bytes, 1))))
        planned = _sizes(found)
        if abs(tried[-1][1] - math.log(code_bytes)) < CLOSE_TRIAL:
            break
        if number < TRIALS - 1:
            price = math.exp(next_logarithm(tried, math.log(code_bytes), -ELASTICITY))
    return price, planned


def next_logarithm(tried: list[tuple[float, float]], wanted: float, slope: float) -> float:
    """The next place to try where `tried` holds (place, value) and values fall: along the line through the
    two tries nearest to `wanted`, or along `slope` from the only one."""
    near = sorted(tried, key=lambda each: abs(each[1] - wanted))[:2]
    place, value = near[0]
    if len(near) > 1 and abs(near[1][0] - place) > 1e-6:
        measured = (near[1][1] - value) / (near[1][0] - place)
        slope = min(measured, slope / 8)
    return place + min(max((wanted - value) / slope, -5.0), 5.0)


def code_to_drop(
    coder: Coder,
    drop: float,
    judge: Callable[[CodedNetwork], float],
    *,
    tries: int = 5,
) -> Priced:
    """The smallest network found whose `judge` (points lost) is at most `drop`.

    The price goes up or down by what a network lost against what it may, in up to `tries` runs. Raises
    BudgetError where each loses more.
    """
    price, best, least = coder.first_price(1.0), None, math.inf
    high = math.inf  # the least price that lost too much
    low = 0.0
    for number in range(tries):
        coded = coder(price, f"try {number + 1} of {tries}")
        lost = judge(coded)
        least = min(least, lost)
        if lost <= drop:
            low = price
            best = Priced(coded, price)
        else:
            high = price
        if high == math.inf:
            price *= 4 if lost > drop / 2 else 16
        elif low == 0.0:
            price /= 4 if lost < 2 * drop else 16
        elif high < 1.3 * low:
            break
        else:
            price = math.sqrt(low * high)
    if best is None:
        raise BudgetError(
            f"each of {tries} codings lost more than {drop:g} points, the best one {least:.2f}; allow more, or "
            "give more calibration images (num_calibration)"
        )
    return best
