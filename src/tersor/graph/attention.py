"""Attention that can lose whole heads: torch's own reshapes by numbers that it fixed when it was made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import ModelError


class Heads(nn.MultiheadAttention):
    """nn.MultiheadAttention with any number of heads of its `head_dim`: the same parameters, by the same names, and the
    same function while all heads are there.

    in_proj_weight is (3 * heads * head_dim, embed_dim), out_proj.weight (embed_dim, heads * head_dim). Made from an
    instance of torch's class by `headed_`, never by itself.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of torch's class; `is_causal` is the hint that it is there, and means nothing without attn_mask. Raises
        ModelError for the hint alone, and for a mask of its own for every head where heads have gone."""
        if is_causal and attn_mask is None:
            raise ModelError("is_causal is a hint of what attn_mask says: give the mask too")
        single = query.ndim == 2
        inputs = [query] if query is key is value else [query, key, value]
        if single:
            inputs = [each.unsqueeze(0) for each in inputs]
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            inputs = [each.transpose(0, 1) for each in inputs]
        query = inputs[0]
        q, k, v = (self._split(each) for each in self._projected(inputs))
        mask = self._mask(query, q.shape[1], key_padding_mask, attn_mask)
        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout)
            joined = weights @ v
        else:
            joined = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(joined.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Queries, keys and values (N, length, heads * head_dim), of one input or of one each."""
        if len(inputs) == 1:
            return functional.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(
            functional.linear(each, weight, bias)
            for each, weight, bias in zip(inputs, self.in_proj_weight.chunk(3), biases, strict=True)
        )

    def _split(self, values: Tensor) -> Tensor:
        """(N, heads, length, head_dim)."""
        return values.reshape(*values.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _mask(
        self, query: Tensor, heads: int, padding: Tensor | None, attention: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores, (N or 1, heads or 1, length or 1, keys)."""
        found: Tensor | None = None
        if attention is not None:
            found = _added(attention, query.dtype)
            if attention.ndim == 3:
                if attention.shape[0] != len(query) * heads:
                    raise ModelError(
                        f"attn_mask has a mask for each of {attention.shape[0]} heads of all images; {heads} heads of "
                        f"{len(query)} images are left: give one mask (length, keys) for all"
                    )
                found = found.reshape(len(query), heads, *found.shape[1:])
        if padding is not None:
            keys = _added(padding, query.dtype)[:, None, None]
            found = keys if found is None else found + keys
        return found


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans (true: left out) as numbers to add."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def headed_(module: nn.Module) -> None:
    """In place: torch's own multi-head attentions in `module` may lose heads. Others, of another class or with
    separate projections or extra keys, stay as they are."""
    for part in module.modules():
        plain = type(part) is nn.MultiheadAttention and part.in_proj_weight is not None
        if plain and part.bias_k is None and not part.add_zero_attn:
            part.__class__ = Heads
            part._qkv_same_embed_dim = False  # torch's fused encoder would not look at the sizes


def fit_heads_(module: nn.Module) -> None:
    """In place: attentions whose heads were removed compute with those that are left."""
    for part in module.modules():
        if not isinstance(part, nn.MultiheadAttention) or part.in_proj_weight is None:
            continue
        heads = len(part.in_proj_weight) // (3 * part.head_dim)
        if heads != part.num_heads:
            headed_(part)
            part.num_heads = heads
