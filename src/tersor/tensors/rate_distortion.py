"""Codes of a weight by rate and distortion: how much its outputs change against what the codes cost.

A weight is a matrix W (R, K) of wanted values, H = E[x x^T] (K, K) the second moment of what its rows are
multiplied with. Row r has the step s_r, its codes q are whole numbers, and what is lowered is

    sum over r of  a_r (W_r - s_r q_r) H (W_r - s_r q_r)^T + price * bits(q_r)

column after column as GPTQ goes (Frantar 2022), with the rate as in CERWU (Conzelmann and Bamler 2025):
each code is chosen for what it costs and for the error it leaves, which the columns after it take over.
The rows of a grouped layer are those of its groups in order, each group with its own H.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tersor.errors import ModelError, SpecError
from tersor.tensors.rates import LARGEST_CODE, Codes, FloatArray, Rates, fit_rates
from tersor.tensors.rounding import upper_root

BLOCK = 128  # columns between two matrix products
ROUNDS = 2  # of a sweep and counting anew
STEP_SHARES = (0.7, 1.0, 1.4)  # of the step that many bits would ask for
DEAD_ZONE = 0.66  # of a step: nearer to 0 a first guess is 0
LEAST_IMPORTANCE = 0.02  # of a layer's mean: an output is never worth less


@dc.dataclass(frozen=True, eq=False)
class Factor:
    """H (K, K) float32 as it is, the `order` in which its columns are coded, and `root`, upper triangular
    float64 with root root^T = H in that order, `added` to its diagonal. None for an H of zeros."""

    hessian: FloatArray
    order: npt.NDArray[np.intp]
    root: torch.Tensor | None
    added: float

    def fitted(self, cross: FloatArray, before: FloatArray) -> FloatArray:
        """The rows (R, K) of least squared error where E[y x^T] is `cross` (R, K), drawn towards `before`
        by what was added to the diagonal."""
        if self.root is None:
            return before
        asked = torch.from_numpy((cross + self.added * before)[:, self.order]).double()
        # root flipped in both axes is the lower factor of the flipped H
        solved = torch.cholesky_solve(asked.T.flip(0), self.root.flip(0, 1)).flip(0)
        found = np.empty_like(before)
        found[:, self.order] = solved.T.float().numpy()
        return found

    def level(self) -> float:
        """Logarithm of what an error of 1 in a column leaves once the others have made up for it, the mean
        over the columns; 0 for an H of zeros."""
        if self.root is None:
            return 0.0
        return 2 * self.root.diagonal().clamp_min(1e-20).log().mean().item()

    def curvature(self) -> FloatArray:
        """About that for each column (K,) float32: in proportion to the diagonal of H."""
        diagonal = np.diag(self.hessian) + np.float32(self.added)
        logarithm = np.log(np.maximum(diagonal, np.finfo(np.float32).tiny))
        found: FloatArray = np.exp(logarithm - logarithm.mean() + self.level()).astype(np.float32)
        return found


def factor(hessian: FloatArray) -> Factor:
    """The factor of a second moment (K, K) float32, damped as GPTQ's. Raises ModelError where it is not
    finite or not positive semidefinite."""
    if not np.isfinite(hessian).all():
        raise ModelError("the second moment of a layer's inputs holds NaN or infinity")
    order = np.argsort(-np.diag(hessian), kind="stable")
    root = upper_root(hessian, order)
    if root is None:
        return Factor(hessian, order, None, 0.0)
    added = float(root.square().sum(1)[0]) - float(hessian[order[0], order[0]])
    return Factor(hessian, order, root, max(added, 0.0))


@dc.dataclass(frozen=True, eq=False)
class Coded:
    """A weight scale * codes: `codes` (R, K) int8, `scale` (R,) float32 above 0; what the codes take by
    `fit_rates`, in `bits`, and the `loss` that was lowered, in units of bits."""

    codes: Codes
    scale: FloatArray
    bits: float
    loss: float

    def values(self) -> FloatArray:
        """The weight (R, K) float32."""
        return self.codes.astype(np.float32) * self.scale[:, None]


def code_by_rate(
    wanted: FloatArray,
    factors: Sequence[Factor],
    importance: FloatArray,
    price: float,
    *,
    positions: int = 1,
    keep: npt.NDArray[np.bool_] | None = None,
    rounds: int = ROUNDS,
    step_shares: Sequence[float] = STEP_SHARES,
) -> Coded:
    """Codes and steps for `wanted` (R, K) float32, whose K = channels * positions, at `price` above 0.

    `importance` (R,) is a_r: what a squared error of 1 in output r is worth in the unit of which `price`
    says how much a bit may cost. `keep` (R, K): what is False stays 0. Each row gets the best of the steps
    step_shares * sqrt(6 price / (ln 2 a_r h)), h the geometric mean of what an error of 1 in a column
    leaves: the step at which, with many bits, one more lowers the error by `price`. Raises SpecError for a
    price that is not above 0 or shapes that do not fit, ModelError for values that are not finite.
    """
    _check(wanted, factors, importance, price)
    worth = (at_least(importance) / price).astype(np.float32)  # of an error, in bits
    groups = _groups(len(wanted), factors)
    finest = np.ones(len(wanted), np.float32)
    for rows, each in groups:
        if each.root is not None:
            finest[rows] = np.sqrt(6 / (np.log(2) * np.exp(each.level()) * worth[rows]))
    largest = np.abs(wanted).max(axis=1, initial=0)
    smallest = np.maximum(largest / LARGEST_CODE, np.finfo(np.float32).tiny)
    best: list[npt.NDArray[np.floating]] = []
    for share in step_shares:
        step = np.clip(finest * np.float32(share), smallest, 2 * largest + smallest)
        codes = first_codes(wanted, step)
        for _ in range(rounds):
            rates = fit_rates(codes, positions)
            codes = np.concatenate(
                [
                    sweep(
                        wanted[at], each, step[at], worth[at], rates.of_rows(at), keep=_of(keep, at)
                    )
                    for at, each in groups
                ]
            )
        bits = fit_rates(codes, positions).bits(codes).sum(axis=1)
        found: list[npt.NDArray[Any]] = [bits, step, bits, codes]
        for rows, each in groups:
            found[1][rows] = refitted(wanted[rows], codes[rows], step[rows], each.hessian)
            error = wanted[rows] - codes[rows] * found[1][rows, None]
            squared = ((error @ each.hessian) * error).sum(axis=1)
            found[0] = found[0] if rows.start else found[0].copy()
            found[0][rows] += worth[rows] * squared
        if best:
            better = found[0] < best[0]
            found = [
                np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(found, best, strict=True)
            ]
        best = found
    loss, scale, bits, final = best
    return Coded(
        final.astype(np.int8), scale.astype(np.float32), float(bits.sum()), float(loss.sum())
    )


def at_least(importance: FloatArray) -> FloatArray:
    """`importance` (R,), none below a small share of the mean; ones where all are 0."""
    mean = importance.mean()
    return (
        np.maximum(importance, np.float32(LEAST_IMPORTANCE) * mean) if mean > 0 else importance + 1
    )


def first_codes(wanted: FloatArray, step: FloatArray) -> Codes:
    """Codes (R, K) each by itself, with a wider zone of zeros: a guess to count rates from."""
    ratio = wanted / step[:, None]
    rounded = np.where(np.abs(ratio) < DEAD_ZONE, 0, np.rint(ratio))
    return rounded.clip(-LARGEST_CODE, LARGEST_CODE).astype(np.int8)


def refitted(wanted: FloatArray, codes: Codes, step: FloatArray, hessian: FloatArray) -> FloatArray:
    """Scales (R,) of least error for the codes at hand; `step` where that is nothing sensible."""
    image = codes.astype(np.float32) @ hessian
    product, square = (image * wanted).sum(axis=1), (image * codes).sum(axis=1)
    fitted = np.divide(product, square, out=step.astype(np.float32), where=square > 0)
    return np.where((fitted > step / 4) & (fitted < 4 * step), fitted, step).astype(np.float32)


def sweep(
    wanted: FloatArray,
    factor: Factor,
    step: FloatArray,
    worth: FloatArray,
    rates: Rates,
    *,
    keep: npt.NDArray[np.bool_] | None = None,
    bit: float = 1.0,
) -> Codes:
    """Codes (R, K) int8 of `wanted` (R, K), one pass over the columns.

    With t what column j is asked for after it has taken over the errors before it, the code q is, of the
    nearest one to t / step, the next one towards 0, and 0 itself, the one with the least

        worth * (root_jj)^2 * (t - step * q)^2 + bit * bits(q).

    With `bit` 0 these are GPTQ's codes at that step.
    """
    codes = np.zeros(wanted.T.shape, np.int8)
    if factor.root is None:
        return codes.T
    order, num_columns = factor.order, len(factor.order)
    ratios = (factor.root / factor.root.diagonal()).float().numpy()
    own = factor.root.diagonal().float().square().numpy()
    columns = np.ascontiguousarray(wanted.T[order], np.float32)
    errors = np.zeros_like(columns)
    choose = _Choice(step, worth, rates, bit)
    for start in range(0, num_columns, BLOCK):
        stop = min(start + BLOCK, num_columns)
        shift = ratios[:start, start:stop].T @ errors[:start]
        shift += columns[start:stop]
        within = np.ascontiguousarray(ratios[start:stop, start:stop].T)
        choose.begin(order[start:stop], keep)
        for place in range(stop - start):
            asked = shift[place]
            if place:
                asked += within[place, :place] @ errors[start : start + place]
            number = start + place
            chosen = choose(place, asked, own[number])
            codes[number] = chosen
            np.multiply(chosen, step, out=errors[number])
            np.subtract(columns[number], errors[number], out=errors[number])
    found = np.empty(wanted.shape, np.int8)
    found[:, order] = codes.T
    return found


class _Choice:
    """The cheapest code of each row in one column."""

    def __init__(self, step: FloatArray, worth: FloatArray, rates: Rates, bit: float) -> None:
        self.scaled = (worth * step * step).astype(np.float32)
        self.inverse = (1 / step).astype(np.float32)
        self.rates, self.bit = rates, np.float32(bit)
        self.sizes = np.zeros(rates.sizes.size, np.float32)
        if bit:
            self.sizes = (rates.sizes * self.bit).ravel()
        self.base = rates.row_class * rates.sizes.shape[1]

    def begin(self, columns: npt.NDArray[np.intp], keep: npt.NDArray[np.bool_] | None) -> None:
        """The next block of columns."""
        self.zero = np.ascontiguousarray(self.rates.zero[:, columns].T) * self.bit
        self.some = np.ascontiguousarray(self.rates.some[:, columns].T) * self.bit
        if keep is not None:
            self.some[~keep[:, columns].T] = np.inf

    def __call__(self, place: int, asked: FloatArray, own: np.float32) -> FloatArray:
        """Codes (R,) float32."""
        ratio = asked * self.inverse
        size = np.abs(ratio)
        near = np.rint(size)
        np.minimum(near, LARGEST_CODE, out=near)
        weight = self.scaled * own
        if self.bit:
            lower = np.maximum(near - 1, 0)
            at = near.astype(np.int64)
            at += self.base
            of_near = np.square(size - near) * weight
            of_near += self.sizes.take(at)
            of_lower = np.square(size - lower) * weight
            of_lower += self.sizes.take(np.maximum(at - 1, self.base))
            np.copyto(near, lower, where=of_lower < of_near)
            least = np.minimum(of_near, of_lower)
        else:
            least = np.square(size - near) * weight
        least += self.some[place]
        near[np.square(size) * weight + self.zero[place] <= least] = 0
        signed: FloatArray = np.copysign(near, ratio)
        return signed


def _groups(num_rows: int, factors: Sequence[Factor]) -> list[tuple[slice, Factor]]:
    size = num_rows // len(factors)
    return [(slice(n * size, (n + 1) * size), each) for n, each in enumerate(factors)]


def _of(keep: npt.NDArray[np.bool_] | None, rows: slice) -> npt.NDArray[np.bool_] | None:
    return None if keep is None else keep[rows]


def _check(
    wanted: FloatArray, factors: Sequence[Factor], importance: FloatArray, price: float
) -> None:
    rows, columns = wanted.shape
    if not (np.isfinite(price) and price > 0):
        raise SpecError(f"the price of a bit must be finite and above 0, got {price!r}")
    sides = {each.hessian.shape for each in factors}
    if sides != {(columns, columns)} or importance.shape != (rows,) or rows % len(factors):
        raise SpecError(
            f"a weight of shape {wanted.shape} needs second moments of shape ({columns}, {columns}), its rows "
            f"divided among them, and the importance of {rows} outputs; got {sorted(sides)} and "
            f"{importance.shape}"
        )
    for name, held in (("weight", wanted), ("importance", importance)):
        if not np.isfinite(held).all():
            raise ModelError(f"the {name} of a layer holds NaN or infinity")
