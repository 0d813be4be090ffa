"""Labels: which slices of which parameters every value of a network is made of.

Each axis of each parameter and buffer has one node per index; node 0 is "must stay". A value is labelled on an axis
where the entries along it come and go with such nodes: the channels of a convolution's output with the rows of its
weight. Two nodes that can only go together are tied; after the trace the connected components are the smallest
pieces that can be removed.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

Nodes = npt.NDArray[np.int64]
STAYS = 0


@dc.dataclass(frozen=True, eq=False)
class Labels:
    """The nodes along the labelled axes of one value: axis -> (size of that axis,) int64.

    `parameter` is true for parameters, buffers and what is computed from them alone.
    """

    axes: dict[int, Nodes] = dc.field(default_factory=dict)
    parameter: bool = False


@dc.dataclass(frozen=True, eq=False)
class Product:
    """Multiplications of one product: `constant` times the number of entries left along each axis of `axes`."""

    constant: int
    axes: tuple[Nodes, ...]


@dc.dataclass(eq=False)
class Ties:
    """What a trace finds: the nodes of a module, which of them are tied, frozen, and sources of channels."""

    places: list[tuple[str, int]] = dc.field(default_factory=list)  # tensor and axis
    starts: list[int] = dc.field(default_factory=list)  # the first node of each place
    num_nodes: int = 1
    pairs: list[npt.NDArray[np.int64]] = dc.field(default_factory=list)
    frozen: list[tuple[Nodes, str]] = dc.field(default_factory=list)
    sources: list[Nodes] = dc.field(default_factory=list)
    products: list[Product] = dc.field(default_factory=list)

    def add_tensor(self, name: str, shape: Sequence[int]) -> Labels:
        """Give every index of every axis of `name` its node; returns the labels of the tensor."""
        axes = {}
        for axis, size in enumerate(shape):
            if not size:
                continue
            self.places.append((name, axis))
            self.starts.append(self.num_nodes)
            axes[axis] = np.arange(self.num_nodes, self.num_nodes + size)
            self.num_nodes += size
        return Labels(axes, parameter=True)

    def size(self, place: tuple[str, int]) -> int:
        """How many indices an axis of a tensor has: `place` is (name, axis)."""
        number = self.places.index(place)
        return [*self.starts, self.num_nodes][number + 1] - self.starts[number]

    def tie(self, one: Nodes, other: Nodes) -> None:
        """The nodes of `one` go only with their partners in `other` (shapes broadcast)."""
        one, other = np.broadcast_arrays(one, other)
        if one is not other and one.size:
            pairs = np.stack([one.ravel(), other.ravel()])
            self.pairs.append(pairs[:, pairs[0] != pairs[1]])

    def freeze(self, nodes: Nodes, reason: str) -> None:
        """The nodes stay, for `reason`."""
        self.frozen.append((nodes, reason))

    def components(self) -> tuple[Nodes, dict[int, list[str]]]:
        """The component of each node, and the reasons of the components that stay."""
        ends = np.concatenate([np.zeros((2, 0), np.int64), *self.pairs], axis=1)
        free = ends[:, (ends != STAYS).all(axis=0)]
        bound = ends.max(axis=0)[(ends == STAYS).any(axis=0)]
        ones = np.ones(free.shape[1], np.int8)
        graph = coo_matrix((ones, (free[0], free[1])), shape=(self.num_nodes, self.num_nodes))
        component = connected_components(graph, directed=False)[1].astype(np.int64)
        reasons: dict[int, list[str]] = {}
        for nodes, reason in [
            *self.frozen,
            (bound, "it is joined with values that are not channels"),
        ]:
            for number in np.unique(component[nodes[nodes != STAYS]]):
                held = reasons.setdefault(int(number), [])
                if reason not in held:
                    held.append(reason)
        reasons.setdefault(int(component[STAYS]), ["it stays"])
        return component, reasons


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by their first name, each tensor once."""
    return [*module.named_parameters(), *module.named_buffers()]
