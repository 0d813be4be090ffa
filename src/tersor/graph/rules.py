"""What each elementary operation does to labels.

An operation without a rule freezes the labels of its inputs: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tersor.graph.labels import Nodes
from tersor.graph.trace import ELEMENTWISE, RULES, UNKNOWN, Rule, Tracer, for_ops, tensors_in

Axes = dict[int, Nodes]


@for_ops(UNKNOWN)
def unknown(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Everything that goes in stays."""
    name = func.overloadpacket.__name__
    for value in tensors_in((args, kwargs)):
        for nodes in tracer.of(value).axes.values():
            tracer.freeze(nodes, f"the operation {name} mixes it in a way that is not known")
    return func(*args, **kwargs)


def united(
    tracer: Tracer,
    values: Sequence[Tensor],
    shape: Sequence[int],
    axes_of: Sequence[Axes] | None = None,
) -> Axes:
    """Labels of an elementwise result of `shape`: along each axis the operands go together."""
    held = axes_of or [tracer.of(value).axes for value in values]
    only_parameters = all(tracer.of(v).parameter for v in values if tracer.of(v).axes)
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
            if only_parameters:
                continue
        found[axis] = labelled[0]
    return found


@for_ops(
    ELEMENTWISE, "hardswish", "_prelu_kernel", "prelu", "log_sigmoid_forward", "dropout", "native_dropout", "copy",
    "_to_copy", "bernoulli", "rrelu_with_noise", "fill", "zero", "normal", "uniform", "zeros_like", "ones_like",
    "empty_like", "rand_like", "randn_like", "full_like", "detach", "alias", "lift_fresh", "contiguous",
)  # fmt: skip
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
    groups = args[6] if len(args) > 6 else kwargs["group"]
    for axis, nodes in axes.items():
        if axis > 1 or (axis == 1 and groups == 1):
            tracer.freeze(nodes, "it is normalised together with the other channels")
    for held in tensors_in(args[1:]):
        own = tracer.of(held).axes.get(0)
        if own is not None and 1 in axes:
            tracer.ties.tie(own, axes[1])
        elif own is not None:
            tracer.freeze(own, "it belongs to channels that stay")
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
    tracer.freeze(
        axes.pop(dim % max(value.ndim, 1), None), f"the operation {name} runs over all of them"
    )
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
            tracer.freeze(
                axes.pop(axis, None), "it is a position of an image that is pooled or resized"
            )
        for result in tensors_in(out):
            if result.ndim == value.ndim:
                tracer.put(result, axes)
        return out

    return rule


_SPATIAL = (
    "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "max_pool", "adaptive_max_pool", "fractional_max_pool",
    "upsample_nearest", "_upsample_nearest_exact", "reflection_pad", "replication_pad",
)  # fmt: skip
for _n in (1, 2, 3):
    RULES.update(dict.fromkeys([f"{name}{_n}d" for name in _SPATIAL], _spatial(_n)))
    RULES[f"max_pool{_n}d_with_indices"] = _spatial(_n)
for _name in (
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
):
    RULES[_name] = _spatial(2)
RULES["grid_sampler_2d"] = _spatial(2)
RULES["upsample_linear1d"] = _spatial(1)
RULES["upsample_trilinear3d"] = _spatial(3)


@for_ops("empty", "zeros", "ones", "rand", "randn", "full", "arange", "scalar_tensor", "eye", "linspace", "new_zeros",
         "new_ones", "new_empty", "new_full", "new_empty_strided", "empty_strided", "randperm", "randint")  # fmt: skip
def factory(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new value of a fixed size: no labels."""
    return func(*args, **kwargs)
