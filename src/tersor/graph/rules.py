"""What each elementary operation does to labels.

An operation without a rule freezes the labels of its inputs: nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.graph.labels import Nodes, Product
from tersor.graph.trace import Rule, Tracer, tensors_in

Axes = dict[int, Nodes]
RULES: dict[str, Rule] = {}
POINTWISE = {
    "hardswish", "_prelu_kernel", "prelu", "log_sigmoid_forward", "dropout", "native_dropout", "copy",
    "_to_copy", "bernoulli", "rrelu_with_noise", "fill", "zero", "normal", "uniform", "zeros_like",
    "ones_like", "empty_like", "rand_like", "randn_like", "full_like", "detach", "alias", "lift_fresh",
    "contiguous", "as_strided_same",
}  # fmt: skip
FACTORIES = {"empty", "zeros", "ones", "rand", "randn", "full", "arange", "scalar_tensor", "eye", "linspace"}


def rule_of(func: Any) -> Rule:
    """The rule of an operation; pointwise ones know themselves by torch's tag."""
    name = func.overloadpacket.__name__
    plain = name.removesuffix("_") if name != "_" else name
    if plain in RULES:
        return RULES[plain]
    if plain in POINTWISE or torch.Tag.pointwise in func.tags:
        return pointwise
    return unknown


def for_ops(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule of the operations `names` (aten names, in place or not)."""

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def unknown(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Everything that goes in stays."""
    name = func.overloadpacket.__name__
    for value in tensors_in((args, kwargs)):
        for nodes in tracer.of(value).axes.values():
            tracer.freeze(nodes, f"the operation {name} mixes it in a way that is not known")
    return func(*args, **kwargs)


def united(
    tracer: Tracer, values: Sequence[Tensor], shape: Sequence[int], axes_of: Sequence[Axes] | None = None
) -> Axes:
    """Labels of an elementwise result of `shape`: along each axis the operands go together."""
    held = axes_of or [tracer.of(value).axes for value in values]
    found: Axes = {}
    for axis, size in enumerate(shape):
        full, labelled = 0, []
        for value, axes in zip(values, held, strict=True):
            own = axis - (len(shape) - value.ndim)
            if own < 0:
                continue
            nodes = axes.get(own)
            if value.shape[own] == size:
                full += 1
                if nodes is not None:
                    labelled.append(nodes)
            else:
                tracer.freeze(nodes, "it is one value shared by all along an axis")
        if not labelled:
            continue
        for nodes in labelled[1:]:
            tracer.ties.tie(labelled[0], nodes)
        if full > len(labelled):
            tracer.freeze(labelled[0], "it meets a value whose size is fixed")
        found[axis] = labelled[0]
    return found


def pointwise(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Elementwise, with broadcasting."""
    values = tensors_in((args, kwargs))
    parameter = all(tracer.of(v).parameter for v in values)
    axes_of = [tracer.of(v).axes for v in values]
    out = func(*args, **kwargs)
    results = [out] if isinstance(out, Tensor) else [o for o in out if isinstance(o, Tensor)]
    for result in results:
        axes = united(tracer, values, result.shape, axes_of)
        tracer.put(result, axes, parameter)
    return out


def _only_first(out: Any) -> Tensor:
    first = out if isinstance(out, Tensor) else out[0]
    assert isinstance(first, Tensor)
    return first


# ---- products


def contract(tracer: Tracer, left: Nodes | None, right: Nodes | None) -> None:
    """Two axes that are multiplied and summed go together."""
    if left is not None and right is not None:
        tracer.ties.tie(left, right)
    else:
        tracer.freeze(left if left is not None else right, "it is multiplied with a value of fixed size")


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
        for nodes in (incoming.get(channel), rows, into):
            tracer.freeze(nodes, "it belongs to a convolution whose weight is computed")
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
    _product(tracer, sizes, [None, *[held.axes.get(a) if a < 2 else None for a in range(weight.ndim)]])
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


@for_ops("as_strided")
def as_strided(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Only where it does not change the shape is it known what it does."""
    value, size = args[:2]
    if tuple(size) == tuple(value.shape):
        return pointwise(tracer, func, args, kwargs)
    return unknown(tracer, func, args, kwargs)


@for_ops("embedding")
def embedding(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of a table by index: its columns are the channels."""
    out = func(*args, **kwargs)
    axes = tracer.of(args[0]).axes
    tracer.freeze(axes.get(0), "it is a row of a table that is read by index")
    if 1 in axes:
        tracer.put(out, {out.ndim - 1: axes[1]})
        tracer.ties.sources.append(axes[1])
    return out


# ---- normalisation


@for_ops("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
         "_batch_norm_with_update", "miopen_batch_norm", "_batch_norm_no_update")  # fmt: skip
def batch_norm(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each channel alone: its scale, shift and statistics go with it."""
    out = func(*args, **kwargs)
    value = args[0]
    axes = dict(tracer.of(value).axes)
    for held in tensors_in(args[1:]):
        nodes = tracer.of(held).axes.get(0)
        if nodes is None:
            continue
        if 1 in axes:
            tracer.ties.tie(axes[1], nodes)
        else:
            tracer.freeze(nodes, "it belongs to channels that stay")
    tracer.put(_only_first(out), axes)
    return out


@for_ops("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Means over channels change when one goes: they stay."""
    out = func(*args, **kwargs)
    value, shape = args[:2]
    axes = tracer.of(value).axes
    first = value.ndim - len(shape)
    for axis, nodes in axes.items():
        if axis >= first:
            tracer.freeze(nodes, "it is normalised together with the other channels")
    for held in tensors_in(args[2:]):
        for axis, nodes in tracer.of(held).axes.items():
            if first + axis in axes:
                tracer.ties.tie(nodes, axes[first + axis])
            else:
                tracer.freeze(nodes, "it belongs to channels that stay")
    tracer.put(_only_first(out), axes)
    return out


@for_ops("native_group_norm")
def group_norm(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A group is normalised by itself: whole groups may go."""
    out = func(*args, **kwargs)
    axes = tracer.of(args[0]).axes
    groups = args[7] if len(args) > 7 else kwargs["group"]
    for axis, nodes in axes.items():
        if axis > 1 or (axis == 1 and groups == 1):
            tracer.freeze(nodes, "it is normalised together with the other channels")
    for held in tensors_in(args[1:]):
        nodes = tracer.of(held).axes.get(0)
        if nodes is not None and 1 in axes:
            tracer.ties.tie(nodes, axes[1])
        elif nodes is not None:
            tracer.freeze(nodes, "it belongs to channels that stay")
    if 1 in axes:
        blocks = axes[1].reshape(groups, -1)
        tracer.ties.tie(blocks[:, :1], blocks)
    tracer.put(_only_first(out), axes)
    return out


# ---- along one axis


def _dims(value: Tensor, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(value.ndim))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [d % max(value.ndim, 1) for d in dims]


@for_ops("sum", "mean", "amax", "amin", "var", "std", "prod", "any", "all", "max", "min", "argmax", "argmin",
         "linalg_vector_norm", "norm", "logsumexp", "var_mean", "nansum", "median", "aminmax")  # fmt: skip
def reduction(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is summed may lose terms that are zero; what is averaged or compared may not."""
    name = func.overloadpacket.__name__
    value = args[0]
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        return pointwise(tracer, func, args, kwargs)
    words = {a.name: i for i, a in enumerate(func._schema.arguments)}

    def argument(word: str, default: Any) -> Any:
        place = words.get(word, len(args))
        return args[place] if place < len(args) else kwargs.get(word, default)

    dims = _dims(value, argument("dim", None))
    keep = bool(argument("keepdim", False))
    axes, parameter = tracer.of(value).axes, tracer.of(value).parameter
    for axis in dims:
        if name != "sum":
            tracer.freeze(axes.get(axis), f"the operation {name} runs over all of them")
        else:
            value = tracer.masked(value, axis)
    out = func(value, *args[1:], **kwargs)
    left = [a for a in range(value.ndim) if keep or a not in dims]
    found = {left.index(a): nodes for a, nodes in axes.items() if a not in dims}
    for result in tensors_in(out):
        if result.ndim == len(left):
            tracer.put(result, found, parameter)
    return out


@for_ops("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort",
         "logcumsumexp", "topk", "cummax", "cummin", "kthvalue")  # fmt: skip
def along(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Entries along one axis depend on each other; the other axes do not notice."""
    out = func(*args, **kwargs)
    name, value = func.overloadpacket.__name__, args[0]
    words = [a.name for a in func._schema.arguments]
    place = words.index("dim") if "dim" in words else len(args)
    dim = args[place] if place < len(args) else kwargs.get("dim", -1)
    axes = dict(tracer.of(value).axes)
    tracer.freeze(axes.pop(dim % max(value.ndim, 1), None), f"the operation {name} runs over all of them")
    for result in tensors_in(out):
        if result.ndim == value.ndim:
            tracer.put(result, axes, tracer.of(value).parameter)
    return out


def _spatial(count: int) -> Rule:
    def rule(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pools and resizes the last axes."""
        out = func(*args, **kwargs)
        value = args[0]
        axes = dict(tracer.of(value).axes)
        for axis in range(value.ndim - count, value.ndim):
            tracer.freeze(axes.pop(axis, None), "it is a position of an image that is pooled or resized")
        for result in tensors_in(out):
            if result.ndim == value.ndim:
                tracer.put(result, axes)
        return out

    return rule


for _n in (1, 2, 3):
    for _name in ("avg_pool{}d", "_adaptive_avg_pool{}d", "adaptive_avg_pool{}d", "max_pool{}d",
                  "max_pool{}d_with_indices", "adaptive_max_pool{}d", "fractional_max_pool{}d",
                  "upsample_nearest{}d", "_upsample_nearest_exact{}d", "reflection_pad{}d", "replication_pad{}d"):  # fmt: skip
        RULES[_name.format(_n)] = _spatial(_n)
for _name in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
              "grid_sampler_2d"):  # fmt: skip
    RULES[_name] = _spatial(2)
RULES["upsample_linear1d"] = _spatial(1)
RULES["upsample_trilinear3d"] = _spatial(3)
for _name in FACTORIES:
    RULES[_name] = lambda tracer, func, args, kwargs: func(*args, **kwargs)
for _name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "empty_strided", "randperm"):
    RULES[_name] = lambda tracer, func, args, kwargs: func(*args, **kwargs)
