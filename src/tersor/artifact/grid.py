"""A weight as rows, channels and positions, and the order in which its codes are coded."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator

from tersor.artifact.encoding import Array, Shape, count

LANES = 8192  # codes of one step, where there are as many
NEIGHBOURS = 8
MAX_POSITIONS = 64
MAX_CHANNELS, MAX_COLUMNS = 1 << 16, 1 << 18


@dc.dataclass(frozen=True)
class Grid:
    """`rows` x `channels` x `positions` codes; `width` is the kernel's, 0 where positions are no
    kernel's but every so-manieth column of a matrix."""

    rows: int
    channels: int
    positions: int
    width: int

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Rows from, to: one row at first, then blocks that grow until a step has LANES codes or a
        block an eighth of the rows."""
        most = max(1, min(LANES // max(self.channels, 1), self.rows // 8))
        start, size = 0, 1
        while start < self.rows:
            end = min(start + size, self.rows)
            yield start, end
            start, size = end, min(most, max(size + 1, size * 3 // 2))

    @property
    def steps(self) -> int:
        """How many steps coding takes: what its time depends on beside the number of codes."""
        return self.positions * sum(1 for _ in self.blocks())

    @property
    def affordable(self) -> bool:
        """Whether steps have enough codes each, and few enough columns stand beside them, that
        coding in context is worth its time and memory."""
        size = self.rows * self.channels * self.positions
        return (
            self.steps <= max(128, size // 96)
            and self.channels <= MAX_CHANNELS
            and self.channels * self.positions <= MAX_COLUMNS
        )

    def neighbours(self, position: int) -> list[int]:
        """The nearest earlier positions of the kernel, at most NEIGHBOURS, nearest first (of two as
        near the later)."""
        if not self.width:
            return []
        y, x = divmod(position, self.width)
        away = {p: (p // self.width - y) ** 2 + (p % self.width - x) ** 2 for p in range(position)}
        return sorted(away, key=lambda p: (away[p], -p))[:NEIGHBOURS]


def grid_of(shape: Shape, transposed: bool) -> Grid | None:
    """The grid of a tensor of `shape`, its first two axes exchanged where `transposed`; None for
    fewer than two axes and for tensors without elements.

    A tensor of more than two axes is a convolution's weight (outputs, inputs, kernel); a matrix, and
    a kernel of one position or of more than MAX_POSITIONS, has columns, dealt out over up to 8
    positions.
    """
    if len(shape) < 2 or not count(shape):
        return None
    kernel = count(shape[2:])
    if len(shape) > 2 and 1 < kernel <= MAX_POSITIONS:
        first, second = (shape[1], shape[0]) if transposed else shape[:2]
        return Grid(first, second, kernel, shape[-1])
    rows, columns = shape[0], count(shape[1:])
    if transposed:
        rows, columns = columns, rows
    positions = next(p for p in range(8, 0, -1) if columns % p == 0)
    return Grid(rows, columns // positions, positions, 0)


def as_grid(array: Array, transposed: bool) -> Array:
    """`array`, C-contiguous, as a view (rows, positions, channels)."""
    grid = grid_of(array.shape, transposed)
    assert grid is not None, "a tensor with a grid"
    if grid.width:
        kernel = array.reshape(*array.shape[:2], grid.positions)
        return kernel.transpose((1, 2, 0) if transposed else (0, 2, 1))
    matrix = array.reshape(array.shape[0], -1)
    if transposed:
        return matrix.reshape(grid.channels, grid.positions, grid.rows).transpose(2, 1, 0)
    return matrix.reshape(grid.rows, grid.channels, grid.positions).transpose(0, 2, 1)
