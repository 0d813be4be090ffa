"""Rounding of weights to a grid: to the nearest value, or so that the layer's outputs change least.

A weight is a matrix W (O, K), H = E[x x^T] (K, K) the second moment of the inputs that its rows are
multiplied with. With E = W - W_q, the layer's outputs change by E x, and the mean of the squared
change is tr(E H E^T). The scales stay those of the grid. The rows of a grouped layer are those of
its groups in order, and H is (groups, K, K).
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from tersor.errors import ModelError, SpecError
from tersor.registry import Registry

if TYPE_CHECKING:
    from tersor.tensors.grids import Grid

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

DAMPING = 0.01  # of the mean diagonal, added to the diagonal
MOST_DAMPING = 100.0
BLOCK = 128  # columns between two matrix products

# AdaRound. In a few hundred steps instead of the paper's ten thousand a weight must still be able
# to change sides: rate and regulariser are larger (chosen on layers of ResNet-18, 2 and 4 bits).
STRETCH = (-0.1, 1.1)
FIRST_BETA, LAST_BETA = 20.0, 2.0
FREE_SHARE = 0.2  # of the steps, before the regulariser sets in
LEARNING_RATE = 0.3
REGULARISER = 30.0  # in units of the loss of one weight whose error is a uniform half step
STEPS = 500
FIRST_SHARE = 0.15  # of a step, from the code that GPTQ chose


class Rounding(Protocol):
    """Index of a level of `grid` for each element of `weight` (O, K) float32: (O, K) uint8.

    `hessian` is (K, K) or (groups, K, K), None where the rounding does not need it.
    """

    def __call__(
        self, weight: FloatArray, grid: Grid, hessian: Array | None = None, *, seed: int = 0
    ) -> Codes:
        """Round."""
        ...


ROUNDINGS: Registry[Rounding] = Registry("rounding")
NEEDS_HESSIAN = frozenset({"gptq", "adaround"})


def quadratic_loss(weight: Array, quantized: Array, hessian: Array) -> float:
    """tr(E H E^T) with E = `weight` - `quantized` (O, K): the mean squared change of the layer's
    outputs, summed over the O outputs. `hessian` (K, K) or (groups, K, K). Computed in float64."""
    return float(_row_losses(weight, quantized, _grouped(weight, hessian)).sum())


@ROUNDINGS.register("nearest")
def nearest(
    weight: FloatArray, grid: Grid, hessian: Array | None = None, *, seed: int = 0
) -> Codes:
    """The nearest level of each weight by itself."""
    return np.asarray(grid.encode(weight), np.uint8)


@ROUNDINGS.register("gptq")
def gptq(weight: FloatArray, grid: Grid, hessian: Array | None = None, *, seed: int = 0) -> Codes:
    """Column by column, each to the nearest level after it has taken over the error of those before
    (Frantar 2022, algorithm 1), by decreasing diagonal of H, damped by 1 % of its mean.

    A weight of exactly 0 keeps the level 0, where the grid has it: pruned layers stay pruned. A row
    that would end with a larger quadratic loss than by `nearest` (where clipped weights pile up
    errors) is rounded to nearest. Raises SpecError without `hessian` or for one of another shape,
    ModelError where it is not finite or not positive semidefinite.
    """
    hessians = _checked("gptq", weight, hessian)
    parts = zip(np.split(weight, len(hessians)), _grids(grid, len(hessians)), hessians, strict=True)
    swept = np.concatenate([_sweep(rows, grid, held) for rows, grid, held in parts])
    return _best_rows(weight, grid, hessians, [nearest(weight, grid), swept])


@ROUNDINGS.register("adaround")
def adaround(
    weight: FloatArray,
    grid: Grid,
    hessian: Array | None = None,
    *,
    seed: int = 0,
    steps: int = STEPS,
) -> Codes:
    """Whether each weight goes up or down, learned (Nagel 2020, section 3.2: a rectified sigmoid,
    a regulariser that is annealed), from the codes of `gptq` on.

    Each weight has two levels: GPTQ's, and its neighbour on the side to which the loss falls. Every
    step sees the loss over all inputs, tr(E H E^T), so nothing is random. Each row gets the codes
    with the least loss of these, `gptq`'s and `nearest`'s. Errors as of `gptq`, and SpecError for a
    grid whose levels are not evenly spaced.
    """
    gaps = np.diff(grid.levels)
    if not np.allclose(gaps, gaps[0], rtol=1e-5):
        raise SpecError(
            "rounding 'adaround' moves weights up or down one even step, and the levels of this "
            f"grid lie {gaps.min():g} to {gaps.max():g} apart; use 'gptq' or 'nearest'"
        )
    hessians = _checked("adaround", weight, hessian)
    first = gptq(weight, grid, hessian)
    learned = _learn(weight, grid, hessians, first, steps)
    return _best_rows(weight, grid, hessians, [nearest(weight, grid), first, learned])


def _learn(weight: FloatArray, grid: Grid, hessians: Array, first: Codes, steps: int) -> Codes:
    """AdaRound's codes: W_q = low + h(v) step, h a rectified sigmoid, v by Adam."""
    held = torch.from_numpy(hessians.astype(np.float32))
    diagonal = held.diagonal(dim1=1, dim2=2)
    diagonal += DAMPING * diagonal.mean(dim=1, keepdim=True)
    shape = (len(held), -1, weight.shape[1])

    def by_group(values: Array) -> torch.Tensor:
        return torch.from_numpy(np.array(values, np.float32)).view(shape)

    taken = grid.decode(first)
    falls = (by_group(taken - weight) @ held).view(weight.shape).numpy() > 0
    lower = np.clip(first.astype(np.int16) - falls, 0, len(grid.levels) - 2)
    fixed = _pruned(weight, grid)
    low = by_group(np.where(fixed, taken, grid.decode(lower)))
    step = by_group(np.where(fixed, 0, grid.decode(lower + 1) - grid.decode(lower)))
    target = by_group(weight)
    unit = (step.square() * diagonal[:, None]).mean(dim=2, keepdim=True) / 12 + 1e-30
    bottom, top = STRETCH
    share = by_group(np.where(first > lower, 1 - FIRST_SHARE, FIRST_SHARE))
    logits = torch.logit((share - bottom) / (top - bottom)).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=LEARNING_RATE)
    with torch.no_grad():
        for number in range(steps):
            sigmoid = torch.sigmoid(logits)
            stretched = sigmoid * (top - bottom) + bottom
            share = stretched.clamp(0, 1)
            slope = 2 * step * ((low + share * step - target) @ held) / unit
            slope += _regulariser_slope(share, number / steps)
            inside = (stretched > 0) & (stretched < 1)
            logits.grad = slope * inside * (top - bottom) * sigmoid * (1 - sigmoid)
            optimiser.step()
    up = (logits.detach() > 0).view(weight.shape).numpy()
    return np.where(fixed, first, lower + up).astype(np.uint8)


def _regulariser_slope(share: torch.Tensor, progress: float) -> torch.Tensor | float:
    """Slope of REGULARISER * (1 - |2 h - 1|^beta), which drives h to 0 or 1; `progress` 0 to 1."""
    if progress < FREE_SHARE:
        return 0.0
    left = (1 - progress) / (1 - FREE_SHARE)
    beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * left
    signed = 2 * share - 1
    distance = signed.abs().clamp(min=0.02)  # smaller ones give slow denormals
    return -2 * REGULARISER * beta * distance.pow(beta - 1) * signed.sign()


def _sweep(weight: FloatArray, grid: Grid, hessian: Array) -> Codes:
    """GPTQ of the rows of one group.

    With H = R R^T, R upper triangular, the loss is the sum over columns j of |(E R)_j|^2, and
    (E R)_j = R_jj (E_j + sum over i < j of E_i R_ij / R_jj): the columns before j are done, so the
    best code of j is that of W_j + sum E_i R_ij / R_jj. As R^-1 is the Cholesky factor of H^-1 that
    the paper works with, these are its codes, without an inverse.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    root = upper_root(hessian, order)
    if root is None:
        return nearest(weight, grid)
    num_columns, num_rows = len(order), len(weight)
    ratios = (root / root.diagonal()).float()
    columns = np.ascontiguousarray(weight.T[order])
    pruned = _pruned(weight, grid).T[order]
    errors = torch.zeros(num_columns, num_rows)
    codes = np.empty((num_rows, num_columns), np.uint8)
    for start in range(0, num_columns, BLOCK):
        stop = min(start + BLOCK, num_columns)
        shift = ratios[:start, start:stop].T @ errors[:start]
        within = ratios[start:stop, start:stop].T.contiguous()
        for column in range(start, stop):
            place = column - start
            shift[place].addmv_(errors[start:column].T, within[place, :place])
            asked = np.where(pruned[column], 0, columns[column] + shift[place].numpy())
            original = order[column : column + 1]
            found = grid.encode(asked[:, None], original)
            codes[:, original] = found
            taken = grid.decode(found, original)[:, 0]
            errors[column] = torch.from_numpy(columns[column] - taken)
    return codes


def upper_root(hessian: Array, order: npt.NDArray[np.intp]) -> torch.Tensor | None:
    """Upper triangular float64 R (K, K) with R R^T = H in `order`, damped. None where H is zero."""
    damped = torch.from_numpy(hessian[np.ix_(order, order)].astype(np.float64))
    diagonal = damped.diagonal()
    alive = diagonal > 0
    if not alive.any():
        return None
    damped[~alive] = 0
    damped[:, ~alive] = 0
    mean = float(diagonal[alive].mean())
    share, added = DAMPING, 0.0
    while share <= MOST_DAMPING:
        diagonal += (share - added) * mean
        added = share
        # Cholesky gives the lower factor; from the last row and column on it is the upper one.
        root, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper: torch.Tensor = root.flip(0, 1)
            return upper
        share *= 10
    raise ModelError(
        "the second moment of a layer's inputs is not positive semidefinite: its Cholesky "
        f"factorisation fails with {MOST_DAMPING:g} times the mean diagonal added; collect it anew"
    )


def _pruned(weight: FloatArray, grid: Grid) -> npt.NDArray[np.bool_]:
    """Which weights are 0 and can stay 0 on the grid."""
    zeros = np.zeros_like(weight)
    return np.asarray((weight == 0) & (grid.decode(grid.encode(zeros)) == 0))


def _best_rows(
    weight: FloatArray, grid: Grid, hessians: Array, candidates: Sequence[Codes]
) -> Codes:
    """For each row the candidate with the least quadratic loss, the first among equals."""
    losses = np.stack([_row_losses(weight, grid.decode(c), hessians) for c in candidates])
    best = losses.argmin(axis=0)
    return np.asarray(np.stack(candidates)[best, np.arange(len(weight))])


def _row_losses(weight: Array, quantized: Array, hessians: Array) -> npt.NDArray[np.float64]:
    """The quadratic loss (O,) of each row."""
    errors = weight.astype(np.float64) - quantized.astype(np.float64)
    parts = zip(np.split(errors, len(hessians)), hessians, strict=True)
    return np.concatenate([((e @ held.astype(np.float64)) * e).sum(axis=1) for e, held in parts])


def _grouped(weight: Array, hessian: Array) -> Array:
    hessians = hessian if hessian.ndim == 3 else hessian[None]
    rows, columns = weight.shape
    if hessians.shape[1:] != (columns, columns) or rows % len(hessians):
        raise SpecError(
            f"a weight of shape {weight.shape} needs a second moment of shape (groups, {columns}, "
            f"{columns}), its rows divided among the groups; got {hessian.shape}"
        )
    return hessians


def _checked(name: str, weight: Array, hessian: Array | None) -> Array:
    """`hessian` as (groups, K, K), usable."""
    if hessian is None:
        raise SpecError(
            f"rounding {name!r} needs the second moment of the layer's inputs; give calibration "
            "inputs, or use rounding 'nearest'"
        )
    if not np.isfinite(hessian).all():
        raise ModelError("the second moment of a layer's inputs holds NaN or infinity")
    return _grouped(weight, hessian)


def _grids(grid: Grid, groups: int) -> list[Grid]:
    """The grid of each group's rows."""
    if len(grid.scale) == 1:
        return [grid] * groups
    parts = zip(np.split(grid.scale, groups), np.split(grid.zero_point, groups), strict=True)
    return [dc.replace(grid, scale=scale, zero_point=zero) for scale, zero in parts]
