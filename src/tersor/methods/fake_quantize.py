"""Fake quantization with a learned step: LSQ (Esser, McKinstry, Bablani, Appuswamy, Modha 2020).

Values are put on the grid step * code while training goes on in float. The rounding passes the gradient straight
through, and the step has a gradient of its own. With v = value / step and whole codes from low to high:

    code(v)      = clamp(round(v), low, high)
    d out / d v  = step where low < v < high, else 0
    d out / ds   = code(v) - v where low < v < high, else code(v)        (LSQ, equation 3)

and the last is scaled by 1 / sqrt(n * largest code), n the number of values that share the step (section 2.2).
"""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any

import torch
from torch import nn

from tersor.errors import SpecError

# A step is the magnitude of its parameter and never smaller than this, so that no value is divided by zero.
SMALLEST_STEP = 2.0**-30
# Values computed at a time on a CPU: all of one chunk's intermediates stay in its cache, which takes half the
# time of whole tensors (measured).
CHUNK = 1 << 17
CODES = {"uniform": range(1, 9), "ternary": range(2, 3), "binary": range(1, 2)}


@dc.dataclass(frozen=True)
class Levels:
    """The whole codes from `low` to `high`, each `spacing` above the one before: 1, or 2 for odd numbers only."""

    low: int
    high: int
    spacing: int = 1

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return max(-self.low, self.high)

    def round_(self, steps: torch.Tensor) -> torch.Tensor:
        """Values in units of the step to codes, in place; halves go to even, and to the upper odd number."""
        if self.spacing == 2:
            steps.div_(2).floor_().mul_(2).add_(1)
        else:
            steps.round_()
        return steps.clamp_(self.low, self.high)


def weight_levels(bits: int, code: str = "uniform") -> Levels:
    """The codes of a weight, as many below zero as above, so that a channel of either sign folds into them.

    uniform: of 3 to 8 bits -(2^(bits-1) - 1) to 2^(bits-1) - 1; of 2 bits -3, -1, 1, 3 and of 1 bit -1, 1, which
    use every code and have no zero. ternary (2 bits): -1, 0, 1. binary (1 bit): -1, 1. Raises SpecError.
    """
    if code not in CODES or bits not in CODES[code]:
        raise SpecError(
            f"trained quantization has no code {code!r} of {bits!r} bits; expected uniform of 1 to 8, ternary of 2 "
            "or binary of 1"
        )
    if code == "ternary":
        return Levels(-1, 1)
    if bits <= 2:
        return Levels(1 - 2**bits, 2**bits - 1, spacing=2)
    return Levels(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def input_levels(bits: int, zero_point: int) -> Levels:
    """The codes 0 to 2^bits - 1 of an activation, counted from its zero point. Raises SpecError."""
    if not (2 <= bits <= 8 and 0 <= zero_point < 2**bits):
        raise SpecError(
            f"an activation has 2 to 8 bits and a zero point among its codes, got {bits!r} bits and zero point "
            f"{zero_point!r}"
        )
    return Levels(-zero_point, 2**bits - 1 - zero_point)


def fake_quantize(values: torch.Tensor, step: torch.Tensor, levels: Levels) -> torch.Tensor:
    """`values` (N, ...) on the grid step * code, in their own dtype, with LSQ's gradients.

    `step` is positive float32, () for one grid or (N,) for one grid a row. Codes and products are computed in
    float32: float32 values come out exactly on the grid, bfloat16 ones rounded from it as autocast would round.
    The number of values that share a step is that of one row: weights of an output channel, features of an image.
    """
    return _FakeQuantize.apply(values, step, levels)  # type: ignore[no-any-return]


class _FakeQuantize(torch.autograd.Function):
    """Saves what the rounding did to each value (in the dtype of the values) and which lay inside the range."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, step: torch.Tensor, levels: Levels) -> torch.Tensor:
        output = torch.empty_like(values)
        slope = torch.empty_like(values)
        inside = torch.empty_like(values, dtype=torch.bool)
        for rows in _chunks(values):
            part = values[rows]
            size = step if step.ndim == 0 else _along(step[rows], part)
            steps = part.float() / size
            within = torch.gt(steps, levels.low, out=inside[rows])
            within &= steps < levels.high
            codes = levels.round_(steps.clone())
            slope[rows] = steps.mul_(within).neg_().add_(codes)
            output[rows] = codes.mul_(size)
        ctx.save_for_backward(slope, inside)
        ctx.scalar = step.ndim == 0
        shared = values.numel() // max(len(values), 1)
        ctx.scale = 1 / math.sqrt(max(shared, 1) * levels.largest)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, Any, None]:
        slope, inside = ctx.saved_tensors
        passed = torch.empty_like(gradient) if ctx.needs_input_grad[0] else None
        sums = []
        for rows in _chunks(gradient):
            part = gradient[rows]
            if passed is not None:
                torch.mul(part, inside[rows], out=passed[rows])
            if ctx.needs_input_grad[1]:
                product = (part * slope[rows]).flatten(1)
                sums.append(product.sum(1, dtype=torch.float32))
        of_step = None
        if sums:
            each = torch.cat(sums) * ctx.scale
            of_step = each.sum() if ctx.scalar else each
        return passed, of_step, None


def _chunks(values: torch.Tensor) -> list[slice]:
    """Slices of rows with about CHUNK values each; one for all of them on an accelerator."""
    rows = len(values)
    if values.device.type != "cpu" or rows == 0:
        return [slice(0, rows)]
    size = max(1, CHUNK * rows // max(values.numel(), 1))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _along(step: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return step.view(-1, *(1,) * (values.ndim - 1))


class LearnedStep(nn.Module):
    """Fake quantization to `levels` with a trained step: () for all values or (O,), one for each row.

    The parameter has one dimension at most, and so gets no weight decay. A state dict holds the levels too, and
    another one's are refused: a checkpoint of 2 bits is not gone on with at 4.
    """

    def __init__(self, start: torch.Tensor, levels: Levels) -> None:
        super().__init__()
        self.step = nn.Parameter(start.detach().clone().float())
        self.levels = levels

    @property
    def size(self) -> torch.Tensor:
        """The step in use: the parameter's magnitude, at least SMALLEST_STEP."""
        return self.step.abs().clamp_min(SMALLEST_STEP)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (N, ...) on the grid."""
        return fake_quantize(values, self.size, self.levels)

    @torch.no_grad()
    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """Whole codes, float32, of `values` (N, ...): forward gives size * codes."""
        size = self.size if self.step.ndim == 0 else _along(self.size, values)
        return self.levels.round_(values.float() / size)

    def get_extra_state(self) -> dict[str, int]:
        """The levels, for the state dict."""
        return dc.asdict(self.levels)

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Refuse the state of other levels with ValueError."""
        if state != dc.asdict(self.levels):
            raise ValueError(f"it holds steps for {state}, expected {dc.asdict(self.levels)}")


@torch.no_grad()
def fitted_steps(weight: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Steps (O,) float32 of least squared error for the rows of `weight` (O, ...), as found by a search.

    The best of 32 shares, evenly spaced in logarithm, of the step that reaches a row's largest magnitude; then
    twice the step of least squares for the codes at hand. A row of zeros gets SMALLEST_STEP. Against LSQ's own
    start, 2 * mean|w| / sqrt(largest code), digits_net of 2 uniform bits ended a quarter nearer its teacher;
    ternary ended alike, binary up to two fifths further (4 epochs on the digits, 4 seeds).
    """
    rows = weight.detach().flatten(1).float()
    return torch.cat([_fitted(rows[part], levels) for part in _chunks(rows)])


def _fitted(rows: torch.Tensor, levels: Levels) -> torch.Tensor:
    full = (rows.abs().amax(1) / levels.high).clamp_min(SMALLEST_STEP)
    best, least = full, torch.full_like(full, math.inf)
    for share in torch.logspace(math.log10(0.02), 0, 32).tolist():
        step = (full * share).clamp_min(SMALLEST_STEP)
        codes = levels.round_(rows / step[:, None])
        error = codes.mul_(step[:, None]).sub_(rows).square_().sum(1)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    for _ in range(2):
        codes = levels.round_(rows / best[:, None])
        fitted = (codes * rows).sum(1) / codes.square().sum(1).clamp_min(1)
        best = torch.where(fitted > SMALLEST_STEP, fitted, best)
    return best
