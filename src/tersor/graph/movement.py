"""Rules of operations that only move values: they are run a second time, on the nodes themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.graph.labels import Nodes
from tersor.graph.trace import Tracer, for_ops, tensors_in


def _spread(shape: torch.Size, axis: int) -> Tensor:
    """The index along `axis` at every entry of a value of `shape`; float64, since every operation runs on it."""
    view = [-1 if a == axis else 1 for a in range(len(shape))]
    return torch.arange(shape[axis], dtype=torch.float64).view(view).expand(shape)


def _varying(ids: Tensor) -> list[int]:
    """The axes along which the entries differ."""
    return [
        a
        for a in range(ids.ndim)
        if ids.shape[a] > 1 and not bool((ids == ids.narrow(a, 0, 1)).all())
    ]


def _settle(
    tracer: Tracer, kind: str, ids: Tensor, nodes: Nodes, prefer: int | None = None
) -> tuple[int, Nodes] | None:
    """The one axis along which a moved value is labelled, and its nodes; `ids` are the indices that the entries had
    among `nodes` before. Entries that share a place on the axis are tied."""
    axes = _varying(ids)
    if not axes:
        return None
    if len(axes) == 1:
        axis = axes[0]
    else:
        order = list(reversed(axes))
        if prefer in order:
            order.remove(prefer)
            order.insert(0, prefer)
        axis = order[tracer.choose(kind, len(order), nodes)]
    rows = ids.movedim(axis, 0).reshape(ids.shape[axis], -1).numpy().astype(np.int64)
    if len(axes) > 1:
        tracer.ties.tie(nodes[rows[:, :1]], nodes[rows])
    return axis, nodes[rows[:, 0]]


@for_ops("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "repeat",
         "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "flip", "unfold", "im2col", "clone", "movedim",
         "view_copy", "_reshape_alias", "_reshape_copy", "diagonal", "numpy_T", "tile", "unflatten", "flatten",
         "native_channel_shuffle", "rot90")  # fmt: skip
def moved(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One value in, one out, every entry a copy of an entry (or a padding zero)."""
    out = func(*args, **kwargs)
    value, name = args[0], func.overloadpacket.__name__
    held = tracer.of(value)
    found: dict[int, Nodes] = {}
    for axis, nodes in held.axes.items():
        if value.shape[axis] == 1:
            place = _place_of_single(value, out, axis, name, args)
            if place is None:
                tracer.freeze(nodes, f"the operation {name} makes copies of it along its own axis")
            elif place not in found:
                found[place] = nodes
            continue
        ids = _again(func, name, _spread(value.shape, axis), args[1:], kwargs)
        settled = _settle(tracer, name, ids, nodes, 1 if name.startswith("pixel_") else None)
        if settled is None:
            tracer.freeze(nodes, f"the operation {name} leaves no axis of its own to it")
        elif settled[0] in found:
            tracer.freeze(nodes, "it shares an axis with others")
        else:
            found[settled[0]] = settled[1]
    tracer.put(out, found, held.parameter)
    return out


def _again(func: Any, name: str, ids: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The same move of the nodes; how they lie in memory must not matter."""
    if name in ("view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "view_copy"):
        return ids.reshape(args[0])
    result = func(ids, *args, **({} if name == "clone" else kwargs))
    assert isinstance(result, Tensor)
    return result


def _place_of_single(value: Tensor, out: Tensor, axis: int, name: str, args: Any) -> int | None:
    """Where an axis of size one is after the move; only the plainest moves are followed."""
    marks = [f"{a}" for a in range(value.ndim)]
    if name in ("transpose", "t", "permute"):
        order = list(range(value.ndim))
        if name == "permute":
            order = [d % value.ndim for d in args[1]]
        elif value.ndim > 1:
            one, other = (0, 1) if name == "t" else (args[1] % value.ndim, args[2] % value.ndim)
            order[one], order[other] = order[other], order[one]
        return order.index(axis)
    if name in ("clone", "flip") or value.shape == out.shape:
        return axis
    before = [s for s in value.shape if s != 1]
    after = [s for s in out.shape if s != 1]
    del marks
    if before == after and value.ndim == out.ndim:
        return axis
    return None


@for_ops("constant_pad_nd")
def pad(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """New entries on an axis of channels are no channels: they stay."""
    out = func(*args, **kwargs)
    value, widths = args[:2]
    axes = {}
    for axis, nodes in tracer.of(value).axes.items():
        place = 2 * (value.ndim - 1 - axis)
        before, after = widths[place : place + 2] if place + 1 < len(widths) else (0, 0)
        if min(before, after) < 0:
            tracer.freeze(nodes, "it is cut at a fixed index")
            continue
        axes[axis] = np.pad(nodes, (before, after))
    tracer.put(out, axes)
    return out


@for_ops("cat")
def cat(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One after the other along an axis; together along the others."""
    out = func(*args, **kwargs)
    values = [v for v in args[0] if not (v.ndim == 1 and v.shape[0] == 0 and out.ndim != 1)]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    held = [tracer.of(v) for v in values]
    found = {}
    for other in range(out.ndim):
        nodes = [h.axes.get(other) for h in held]
        labelled = [n for n in nodes if n is not None]
        if not labelled:
            continue
        if other == axis:
            parts = [
                np.zeros(v.shape[axis], np.int64) if n is None else n
                for v, n in zip(values, nodes, strict=True)
            ]
            found[axis] = np.concatenate(parts)
            continue
        for more in labelled[1:]:
            tracer.ties.tie(labelled[0], more)
        if len(labelled) < len(nodes):
            tracer.freeze(labelled[0], "it is joined with a value whose size is fixed")
        found[other] = labelled[0]
    tracer.put(out, found, all(h.parameter for h in held))
    return out


@for_ops("stack")
def stack(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new axis; the values go together along their own."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    axis %= args[0][0].ndim + 1
    parts = [moved(tracer, torch.ops.aten.unsqueeze.default, (v, axis), {}) for v in args[0]]
    return cat(tracer, torch.ops.aten.cat.default, (parts, axis), {})


@for_ops(
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    "split_copy",
)
def split(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Equal pieces of an axis of channels must keep equally many: the same place in each."""
    out = func(*args, **kwargs)
    value = args[0]
    axis = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % value.ndim
    held = tracer.of(value)
    sizes = [piece.shape[axis] for piece in out]
    nodes = held.axes.get(axis)
    if nodes is not None and len(set(sizes)) == 1:
        pieces = nodes.reshape(len(sizes), -1)
        tracer.ties.tie(pieces[:1], pieces)
    elif nodes is not None:
        tracer.freeze(nodes, "it is split into unequal pieces of fixed size")
    ends = np.cumsum(sizes)
    for piece, size, end in zip(out, sizes, ends, strict=True):
        axes = {a: n[end - size : end] if a == axis else n for a, n in held.axes.items()}
        tracer.put(piece, axes, held.parameter)
    return out


@for_ops("slice", "narrow")
def slice_(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `split` where the cut makes equal pieces; else it is at a fixed index."""
    out = func(*args, **kwargs)
    value = args[0]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % value.ndim
    held = tracer.of(value)
    axes = dict(held.axes)
    nodes = axes.pop(axis, None)
    if nodes is not None:
        kept = func(torch.from_numpy(nodes), 0, *args[2:]).numpy()
        size, total = len(kept), len(nodes)
        if size < total:
            place = int(np.flatnonzero(nodes == kept[0])[0]) if size else 0
            step = args[4] if len(args) > 4 else 1
            if size and total % size == 0 and step == 1 and place % size == 0:
                pieces = nodes.reshape(-1, size)
                tracer.ties.tie(pieces[:1], pieces)
            elif size and step == total // size and total % step == 0:
                pieces = nodes.reshape(-1, step)
                tracer.ties.tie(pieces[:, :1], pieces)
            else:
                tracer.freeze(nodes, "it is cut at a fixed index")
        if size:
            axes[axis] = kept
    tracer.put(out, axes, held.parameter)
    return out


@for_ops("select", "unbind")
def select(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One entry of an axis: the axis stays as it is."""
    out = func(*args, **kwargs)
    value = args[0]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % value.ndim
    held = tracer.of(value)
    tracer.freeze(held.axes.get(axis), "one of them is picked by its index")
    axes = {a - (a > axis): nodes for a, nodes in held.axes.items() if a != axis}
    for result in tensors_in(out):
        tracer.put(result, axes, held.parameter)
    return out


@for_ops("index", "index_select", "gather", "roll", "take_along_dim", "_unsafe_index")
def indexed(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Picked by fixed indices along some axes, which stay; the others move along."""
    out = func(*args, **kwargs)
    value, name = args[0], func.overloadpacket.__name__
    held = tracer.of(value)
    if name == "index" or name == "_unsafe_index":
        picked = {a for a, i in enumerate(args[1]) if i is not None}
        if any(i is not None and i.dtype == torch.bool for i in args[1]):
            picked = set(range(value.ndim))
    elif name == "roll":
        dims = args[2] if len(args) > 2 else []
        picked = {d % value.ndim for d in dims} or set(range(value.ndim))
    else:
        picked = {args[1] % value.ndim} if name == "index_select" else set(range(value.ndim))
    found = {}
    for axis, nodes in held.axes.items():
        if axis in picked:
            tracer.freeze(nodes, "it is picked by fixed indices")
            continue
        ids = func(_spread(value.shape, axis), *args[1:], **kwargs)
        settled = _settle(tracer, name, ids, nodes)
        if settled is None:
            tracer.freeze(nodes, f"the operation {name} leaves no axis of its own to it")
        else:
            found[settled[0]] = settled[1]
    tracer.put(out, found, held.parameter)
    return out
