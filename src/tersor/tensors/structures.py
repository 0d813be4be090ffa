"""Masked structures: which weights go as one piece, and a mask of pieces with exact counts.

Weights, saliencies and masks have the form (O, I) or (O, I, *kernel): outputs, inputs of one group,
positions of the kernel.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import torch

from tersor.errors import ModelError
from tersor.registry import Registry
from tersor.tensors.masks import keep_top


@dc.dataclass(frozen=True)
class Structure:
    """How a layer is cut into pieces.

    `pieces` gives the saliency of each piece, any shape; `spread` puts one value a piece back in the
    shape of the weight; `problem` says why a weight of some shape has no such pieces, or nothing.
    """

    name: str
    pieces: Callable[[torch.Tensor], torch.Tensor]
    spread: Callable[[torch.Tensor, torch.Size], torch.Tensor]
    problem: Callable[[torch.Size], str]

    def piece_size(self, shape: torch.Size) -> int:
        """Weights in one piece of a weight of `shape`."""
        weights = torch.empty(shape, device="meta")
        return weights.numel() // self.pieces(weights).numel()

    def per_weight(self, saliency: torch.Tensor) -> torch.Tensor:
        """The mean saliency of its piece for every weight: comparable between pieces of any size."""
        pieces = self.pieces(saliency) / self.piece_size(saliency.shape)
        return self.spread(pieces, saliency.shape)

    def mask(self, saliency: torch.Tensor, num_removed: int) -> torch.Tensor:
        """Bool mask of the shape of `saliency` (True = keep) without the pieces of lowest saliency:
        as many as fit into `num_removed` weights. Raises ModelError for NaN."""
        count = num_removed // self.piece_size(saliency.shape)
        kept = keep_top(self.pieces(saliency), count)
        return self.spread(kept, saliency.shape).contiguous()


STRUCTURES: Registry[Structure] = Registry("masked structure")


def _stripe_problem(shape: torch.Size) -> str:
    if len(shape) > 2 and shape[2:].numel() > 1:
        return ""
    return "its kernel has one position, so a stripe would be a whole filter"


STRUCTURES.register("unstructured")(
    Structure("unstructured", lambda s: s, lambda values, shape: values, lambda shape: "")
)
# Meng 2020: one position of one filter, weight[o, :, i, j].
STRUCTURES.register("stripe")(
    Structure(
        "stripe",
        lambda s: s.sum(1, dtype=torch.float64),
        lambda values, shape: values.unsqueeze(1).expand(shape),
        _stripe_problem,
    )
)


def n_m_mask(saliency: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    """Bool mask (True = keep) with the `kept` largest of every `of` consecutive inputs, for each output and
    position of the kernel (Mishra 2021, section 3).

    Where `of` does not divide I, the last t inputs keep ceil(t * kept / of). Equal saliencies go in
    the order of their index. Raises ModelError for NaN.
    """
    if torch.isnan(saliency).any():
        raise ModelError("the saliency holds NaN: the weights or their statistics are not finite")
    return torch.cat([_largest(part, kept, of) for part in torch.split(saliency, of, dim=1)], dim=1)


def n_m_removed(inputs: int, kept: int, of: int) -> int:
    """Of `inputs` weights along the inputs, those that `n_m_mask` removes."""
    whole, tail = divmod(inputs, of)
    return whole * (of - kept) + tail - -(-tail * kept // of)


def _largest(part: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    """The mask of one run of inputs."""
    count = part.shape[1]
    removed = n_m_removed(count, kept, of)
    order = part.argsort(dim=1, stable=True)
    mask = torch.ones_like(part, dtype=torch.bool)
    return mask.scatter_(1, order[:, :removed], False)
