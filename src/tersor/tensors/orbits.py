"""Filters that follow from others: the orbits of a few stored ones, and their fit to given filters."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment

from tersor.errors import ModelError, SpecError
from tersor.registry import Registry

Array = npt.NDArray[np.float64]
Orbit = Callable[[torch.Tensor], torch.Tensor]
MATCHING_ROUNDS = 30
FITTING_ROUNDS = 50


@dc.dataclass(frozen=True, eq=False)
class SharedFilters:
    """Filters (O, I, kh, kw) as `bases` (B, I, kh, kw): filter o is `scale`[o] times the image number
    `element`[o] of base `source`[o]. Every image of every base is used once: O = B * images."""

    transform: str
    bases: torch.Tensor
    source: torch.Tensor
    element: torch.Tensor
    scale: torch.Tensor

    def filters(self) -> torch.Tensor:
        """All filters (O, I, kh, kw)."""
        images = ORBITS[self.transform](self.bases)[self.element, self.source]
        return images * self.scale[:, None, None, None]


ORBITS: Registry[Orbit] = Registry("transform of filters")


@ORBITS.register("negate")
def negate(bases: torch.Tensor) -> torch.Tensor:
    """The two images of `bases` (B, I, kh, kw) before they are scaled: themselves; (2, B, I, kh, kw)."""
    return torch.stack([bases, bases])


@ORBITS.register("mirror")
def mirror(bases: torch.Tensor) -> torch.Tensor:
    """`bases` (B, I, kh, kw), and left to right; (2, B, I, kh, kw)."""
    return torch.stack([bases, bases.flip(-1)])


@ORBITS.register("mirror4")
def mirror4(bases: torch.Tensor) -> torch.Tensor:
    """`bases` (B, I, kh, kw), left to right, upside down, and both; (4, B, I, kh, kw)."""
    return torch.stack([bases, bases.flip(-1), bases.flip(-2), bases.flip(-2, -1)])


def num_images(transform: str) -> int:
    """How many filters one stored filter stands for."""
    return len(ORBITS[transform](torch.zeros(1, 1, 1, 1)))


def fit_orbits(weight: torch.Tensor, transform: str, *, seed: int = 0) -> SharedFilters:
    """The stored filters, and which filter follows from which, that are near to `weight` (O, I, kh,
    kw) in least squares; float64.

    Filters are paired, two at a time, with little left over, then two things are done in turns, each
    the best for the other, until nothing changes: each base becomes the first singular vector of the
    filters of its orbit, turned back; and all filters are assigned to all images of all bases at
    once (an assignment problem). The error never rises; it ends in a local minimum. Raises SpecError
    where O is no multiple of the number of images, ModelError for weights that are not finite.
    """
    images = num_images(transform)
    if len(weight) % images:
        raise SpecError(
            f"transform {transform!r} makes {images} filters of one, and {len(weight)} filters are no "
            f"multiple of {images}"
        )
    if not torch.isfinite(weight).all():
        raise ModelError("a weight holds NaN or infinity; train it again or mend the file")
    filters = weight.detach().double()
    orbits = _first_orbits(filters, transform, images, np.random.default_rng(seed))
    bases, gains = _best_bases(filters, orbits, transform)
    for _ in range(FITTING_ROUNDS):
        moved = _assigned(filters, bases, transform)
        fresh, fresh_gains = _best_bases(filters, moved, transform)
        if not float(fresh_gains.sum()) > float(gains.sum()) * (1 + 1e-9):
            break
        orbits, bases, gains = moved, fresh, fresh_gains
    return _described(filters, bases, orbits, transform)


def _first_orbits(
    filters: torch.Tensor, transform: str, images: int, rng: np.random.Generator
) -> torch.Tensor:
    """Filter of each base and image, (B, images), by pairing filters, then the pairs' bases."""
    orbits = torch.arange(len(filters))[:, None]
    bases = filters
    while orbits.shape[1] < images:
        step = orbits.shape[1]
        turned = ORBITS[transform](bases)[step]
        pairs = _matched(_lost(bases, turned), rng)
        # The images of the second half are those of the first, each turned once more.
        orbits = torch.cat([orbits[pairs[:, 0]], orbits[pairs[:, 1]]], dim=1)
        bases, _ = _rank_one(torch.stack([bases[pairs[:, 0]], turned[pairs[:, 1]]], dim=1))
    return orbits


def _lost(first: torch.Tensor, second: torch.Tensor) -> Array:
    """What is lost where filter i and filter j, turned, become multiples of one: the smaller squared
    singular value of the two, (n, n), symmetric."""
    a, b = first.flatten(1), second.flatten(1)
    inner = (a @ b.T).square()
    norms = a.square().sum(dim=1)
    total, gap = norms[:, None] + norms, norms[:, None] - norms
    lost = (total - (gap.square() + 4 * inner).sqrt()) / 2
    return np.asarray(lost.clamp(min=0).numpy())


def _matched(cost: Array, rng: np.random.Generator) -> torch.Tensor:
    """Pairs (n / 2, 2) of all n with little `cost` (n, n), symmetric, in all.

    From the greedy pairing on: a coin tells for each pair who stands left, and the left are assigned
    to the right anew, at the least cost; the old pairing is among the possible ones, so no round
    costs more.
    """
    count = len(cost)
    rows, columns = np.triu_indices(count, 1)
    free = np.ones(count, bool)
    greedy = []
    for place in np.argsort(cost[rows, columns], kind="stable"):
        i, j = rows[place], columns[place]
        if free[i] and free[j]:
            free[i] = free[j] = False
            greedy.append((i, j))
    pairs = np.array(greedy)
    for _ in range(MATCHING_ROUNDS):
        swap = rng.random(len(pairs)) < 0.5
        pairs[swap] = pairs[swap][:, ::-1]
        _, taken = linear_sum_assignment(cost[np.ix_(pairs[:, 0], pairs[:, 1])])
        pairs[:, 1] = pairs[taken, 1]
    return torch.from_numpy(pairs)


def _rank_one(turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For filters (B, images, I, kh, kw) the base (B, I, kh, kw) whose multiples are nearest to all
    images, with their common norm, and the squared norm it explains (B,)."""
    rows = turned.flatten(2)
    values, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
    base = (vectors[:, :, -1:].transpose(1, 2) @ rows)[:, 0]
    return base.view(turned.shape[:1] + turned.shape[2:]), values[:, -1].clamp(min=0)


def _best_bases(
    filters: torch.Tensor, orbits: torch.Tensor, transform: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best bases for `orbits` (B, images), and the squared norm each explains."""
    # Every image is its own inverse: turning a filter once more turns it back.
    turned = [
        ORBITS[transform](filters[orbits[:, image]])[image] for image in range(orbits.shape[1])
    ]
    return _rank_one(torch.stack(turned, dim=1))


def _assigned(filters: torch.Tensor, bases: torch.Tensor, transform: str) -> torch.Tensor:
    """Filter of each base and image, (B, images), so that the most of all filters is explained."""
    images = ORBITS[transform](bases).flatten(2)
    slots = images.transpose(0, 1).flatten(0, 1)
    directions = slots / slots.norm(dim=1, keepdim=True).clamp(min=1e-300)
    gain = (filters.flatten(1) @ directions.T).square()
    _, filter_of_slot = linear_sum_assignment(gain.T.numpy(), maximize=True)
    return torch.from_numpy(filter_of_slot).view(len(bases), -1)


def _described(
    filters: torch.Tensor, bases: torch.Tensor, orbits: torch.Tensor, transform: str
) -> SharedFilters:
    """The least squares scale of each filter; bases get the root mean square norm of their orbit, so
    that scales are near 1 or -1."""
    count, images = orbits.shape
    bases = bases / images**0.5
    slots = ORBITS[transform](bases).transpose(0, 1).flatten(0, 1).flatten(1)
    held = filters.flatten(1)[orbits.flatten()]
    scales = (held * slots).sum(dim=1) / slots.square().sum(dim=1).clamp(min=1e-300)
    source, element, scale = (
        torch.empty(len(filters), dtype=d) for d in (torch.int64,) * 2 + (torch.float64,)
    )
    source[orbits.flatten()] = torch.arange(count).repeat_interleave(images)
    element[orbits.flatten()] = torch.arange(images).repeat(count)
    scale[orbits.flatten()] = scales
    return SharedFilters(transform, bases, source, element, scale)
