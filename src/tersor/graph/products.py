"""Rules of products: what is multiplied and summed goes together, and what a weight makes is a source of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tersor.graph.labels import Nodes, Product
from tersor.graph.rules import Axes, united, unknown
from tersor.graph.trace import Tracer, for_ops


def contract(tracer: Tracer, left: Nodes | None, right: Nodes | None) -> None:
    """Two axes that are multiplied and summed go together."""
    if left is not None and right is not None:
        tracer.ties.tie(left, right)
    else:
        tracer.freeze(
            left if left is not None else right, "it is multiplied with a value of fixed size"
        )


def _product(tracer: Tracer, sizes: Sequence[int], labels: Sequence[Nodes | None]) -> None:
    constant = math.prod(s for s, nodes in zip(sizes, labels, strict=True) if nodes is None)
    axes = tuple(nodes for nodes in labels if nodes is not None)
    tracer.ties.products.append(Product(constant, axes))


@for_ops("mm", "bmm", "mv", "dot")
def matmul(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(batch, N, K) times (batch, K, M), or without batch, N or M: K goes together; the others remain."""
    left, right = args
    batch = 1 if left.ndim == 3 else 0
    inner = left.ndim - 1
    one, other = tracer.of(left), tracer.of(right)
    out = func(tracer.masked(left, inner), right, **kwargs)
    contract(tracer, one.axes.get(inner), other.axes.get(batch))
    axes: Axes = {}
    if batch and (0 in one.axes or 0 in other.axes):
        contract(tracer, one.axes.get(0), other.axes.get(0))
        axes[0] = one.axes[0] if 0 in one.axes else other.axes[0]
    for operand, axis, place in ((one, inner - 1, inner - 1), (other, batch + 1, out.ndim - 1)):
        if axis >= batch and axis in operand.axes and (operand is one or right.ndim == batch + 2):
            axes[place] = operand.axes[axis]
            if operand.parameter:
                tracer.ties.sources.append(axes[place])
    tracer.put(out, axes, one.parameter and other.parameter)
    summed = one.axes.get(inner, other.axes.get(batch))
    sizes = [*out.shape, left.shape[inner]]
    _product(tracer, sizes, [*[axes.get(a) for a in range(out.ndim)], summed])
    return out


@for_ops("addmm", "baddbmm", "addmv", "addbmm")
def add_matmul(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A bias plus a product."""
    bias, left, right = args
    if func.overloadpacket.__name__.startswith("addbmm"):
        return unknown(tracer, func, args, kwargs)
    plain = {"addmm": torch.ops.aten.mm, "baddbmm": torch.ops.aten.bmm, "addmv": torch.ops.aten.mv}
    name = func.overloadpacket.__name__.removesuffix("_")
    product = matmul(tracer, plain[name].default, (left, right), {})
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    out = product * alpha + (bias * beta if beta != 0 else 0)
    axes = united(tracer, [product, bias], out.shape)
    tracer.put(out, axes)
    return out


@for_ops("linear")
def linear(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where torch does not take a linear layer apart itself."""
    value, weight = args[:2]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    one, other = tracer.of(value), tracer.of(weight)
    last = value.ndim - 1
    out = func(tracer.masked(value, last), weight, bias)
    contract(tracer, one.axes.get(last), other.axes.get(1))
    axes = {a: nodes for a, nodes in one.axes.items() if a != last}
    rows = other.axes.get(0)
    if rows is not None:
        axes[last] = rows
        tracer.ties.sources.append(rows)
    tracer.put(out, axes)
    if bias is not None:
        tracer.put(out, united(tracer, [out, bias], out.shape))
    _product(
        tracer,
        [math.prod(value.shape[:-1]), *weight.shape],
        [None, rows, one.axes.get(last)],
    )
    return out


@for_ops("convolution", "_convolution")
def convolution(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any dimension, grouped, depthwise and transposed."""
    value, weight, bias = args[:3]
    transposed, groups = args[6], args[8]
    channel = 1 if value.ndim == weight.ndim else 0
    out = func(tracer.masked(value, channel), *args[1:], **kwargs)
    incoming, held = tracer.of(value).axes, tracer.of(weight)
    for axis, nodes in held.axes.items():
        if axis > 1:
            tracer.freeze(nodes, "it is a position of a kernel")
    for axis, nodes in incoming.items():
        if axis > channel:
            tracer.freeze(nodes, "it is a position of an image that is convolved")
    into, rows = held.axes.get(0 if transposed else 1), held.axes.get(1 if transposed else 0)
    if rows is None or into is None:
        outgoing = None
        for held_back in (incoming.get(channel), rows, into):
            tracer.freeze(held_back, "it belongs to a convolution whose weight is computed")
    elif groups == 1:
        contract(tracer, incoming.get(channel), into)
        outgoing = rows
    else:
        outgoing = _grouped(tracer, incoming.get(channel), into, rows, groups, transposed)
    axes = {channel: outgoing} if outgoing is not None else {}
    if channel and 0 in incoming:
        axes[0] = incoming[0]
    if outgoing is not None:
        tracer.ties.sources.append(outgoing)
    tracer.put(out, axes)
    shift = tracer.of(bias).axes.get(0)
    if shift is not None and outgoing is not None:
        tracer.ties.tie(outgoing, shift)
    elif bias is not None:
        tracer.freeze(shift if shift is not None else outgoing, "its bias has a fixed size")
    positions = math.prod((value if transposed else out).shape[channel + 1 :])
    batch = out.shape[0] if channel else 1
    sizes = [batch * positions, *weight.shape]
    _product(
        tracer, sizes, [None, *[held.axes.get(a) if a < 2 else None for a in range(weight.ndim)]]
    )
    return out


def _grouped(
    tracer: Tracer, incoming: Nodes | None, into: Nodes, rows: Nodes, groups: int, transposed: bool
) -> Nodes:
    """A grouped convolution loses whole groups, or the same place in each group: what leaves more to choose."""
    inputs = into if transposed else np.tile(into, groups)
    outputs = np.tile(rows, groups) if transposed else rows
    if incoming is None:
        tracer.freeze(into, "it is multiplied with a value of fixed size")
        incoming = np.zeros_like(inputs)
    per_group = len(inputs) // groups
    nodes = np.concatenate([incoming, into, rows])
    whole_first = groups >= per_group
    whole = (tracer.choose("groups", 2, nodes) == 0) == whole_first
    if whole:
        blocks = incoming.reshape(groups, -1)
        tracer.ties.tie(blocks[:, :1], blocks)
        if transposed:
            tracer.ties.tie(incoming, into)
            tracer.freeze(rows, "it is shared by the groups of a convolution")
            return np.repeat(blocks[:, 0], len(rows))
        tracer.freeze(into, "it is shared by the groups of a convolution")
        tracer.ties.tie(blocks[:, :1], rows.reshape(groups, -1))
        return rows
    tracer.ties.tie(incoming, inputs)
    for nodes in (inputs, outputs):
        blocks = nodes.reshape(groups, -1)
        tracer.ties.tie(blocks[:1], blocks)
    return outputs
