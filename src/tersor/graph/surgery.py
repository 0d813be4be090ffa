"""Physical removal: a copy of the user's own class with smaller weights, as the lines of a plan say."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersor.errors import ModelError
from tersor.graph.attention import fit_heads_
from tersor.graph.labels import Nodes, named_tensors
from tersor.specs import LayerPlan

Kept = Mapping[tuple[str, int], Nodes]  # (parameter or buffer, axis) -> indices that stay, rising


def lines_of(module: nn.Module, kept: Kept) -> tuple[LayerPlan, ...]:
    """The plan for `kept`: a line for each layer that loses outputs or inputs, in the order of the module, and one
    for each axis of a parameter that belongs to no such layer."""
    left = dict(kept)
    lines = []
    names = {id(t): n for n, t in [*module.named_parameters(), *module.named_buffers()]}
    for layer, part in module.named_modules():
        ends: dict[str, tuple[int, ...]] = {}
        for end in ("outputs", "inputs"):
            places = _places(part, end)
            held = [
                left.get((names[id(tensor)], axis))
                for own, axis in places
                if (tensor := _tensor(part, own)) is not None
            ]
            first = held[0] if held else None
            if first is None or any(h is None or not np.array_equal(h, first) for h in held):
                continue
            ends[end] = tuple(first.tolist())
        if ends:
            lines.append(
                LayerPlan(
                    layer, "remove", outputs=ends.get("outputs", ()), inputs=ends.get("inputs", ())
                )
            )
            for end in ends:
                for own, axis in _places(part, end):
                    if (tensor := _tensor(part, own)) is not None:
                        left.pop((names[id(tensor)], axis), None)
    for (name, axis), index in sorted(left.items()):
        lines.append(LayerPlan(name, "remove", outputs=tuple(index.tolist()), axis=axis))
    return tuple(lines)


def removed(module: nn.Module, lines: Sequence[LayerPlan]) -> nn.Module:
    """A copy of `module` without the slices that the lines with action "remove" leave out.

    Modules of lines with action "bypass" become identities. The copy is of the same class, in the same mode, with an
    ordinary state_dict; the attributes of torch's layers (out_channels, num_features, ...) tell its new sizes. Shared
    parameters stay shared. Raises ModelError for a line that names what the module does not have, or an index beyond
    its size.
    """
    skipped = [_named_module(module, line) for line in lines if line.action == "bypass"]
    lines = [line for line in lines if line.action == "remove"]
    tensors = dict(named_tensors(module))
    kept = kept_by(module, lines)
    # Wherever the copy would hold a tensor it holds its slice: shared ones stay shared, and no more is copied.
    instead = {id(tensors[name]): _sliced(tensors[name], axes) for name, axes in kept.items()}
    smaller: nn.Module = copy.deepcopy(
        module, {**instead, **{id(part): nn.Identity() for part in skipped}}
    )
    parts = dict(smaller.named_modules(remove_duplicate=False))
    for line in lines:
        if line.layer in parts:
            _fit_(parts[line.layer], line)
    fit_heads_(smaller)
    return smaller


def _named_module(module: nn.Module, line: LayerPlan) -> nn.Module:
    found: nn.Module | None = dict(module.named_modules(remove_duplicate=False)).get(line.layer)
    if found is None or found is module:
        raise ModelError(
            f"the plan passes over {line.layer!r}, which {type(module).__name__} does not have; the plan belongs to "
            "another network"
        )
    return found


def kept_by(module: nn.Module, lines: Sequence[LayerPlan]) -> dict[str, dict[int, tuple[int, ...]]]:
    """By name of a parameter or buffer: axis -> the indices that the lines with action "remove" keep of it.

    Raises ModelError as `removed` does.
    """
    tensors = dict(named_tensors(module))
    names = {id(tensor): name for name, tensor in tensors.items()}
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for line in lines:
        for tensor, axis, index in _addressed(module, line) if line.action == "remove" else ():
            name = names[id(tensor)]
            if index[-1] >= tensor.shape[axis] or kept.get(name, {}).get(axis, index) != index:
                raise ModelError(
                    f"the plan keeps {len(index)} of axis {axis} of {name!r}, up to index {index[-1]}; there are "
                    f"{tensor.shape[axis]}, or it says so twice: the plan belongs to another network"
                )
            kept.setdefault(name, {})[axis] = index
    return kept


def _addressed(module: nn.Module, line: LayerPlan) -> list[tuple[Tensor, int, tuple[int, ...]]]:
    """The tensors that a line slices: (tensor, axis, indices that stay)."""
    parts = dict(module.named_modules(remove_duplicate=False))
    if line.layer in parts and _places(parts[line.layer], "outputs"):
        part, found = parts[line.layer], []
        for end, index in (("outputs", line.outputs), ("inputs", line.inputs)):
            for own, axis in _places(part, end) if index else ():
                tensor = _tensor(part, own)
                assert tensor is not None
                found.append((tensor, axis, index))
        return found
    owner, _, own = line.layer.rpartition(".")
    tensor = _tensor(parts[owner], own) if owner in parts else None
    if tensor is None or line.axis >= tensor.ndim or not line.outputs:
        raise ModelError(
            f"the plan removes parts of {line.layer!r}, which {type(module).__name__} does not have; the plan belongs "
            "to another network"
        )
    return [(tensor, line.axis, line.outputs)]


def _tensor(part: nn.Module, own: str) -> Tensor | None:
    held = part._parameters.get(own)
    return held if held is not None else part._buffers.get(own)


def _places(part: nn.Module, end: str) -> list[tuple[str, int]]:
    """Which axes of which tensors of a layer of torch hold its outputs, and its inputs."""
    if isinstance(part, _ConvTransposeNd):
        held = {"outputs": [("weight", 1), ("bias", 0)], "inputs": [("weight", 0)]}
        if part.groups > 1:  # its weight counts the outputs of one group, its bias all
            held = {"outputs": [], "inputs": []}
    elif isinstance(part, _ConvNd | nn.Linear):
        held = {"outputs": [("weight", 0), ("bias", 0)], "inputs": [("weight", 1)]}
    elif isinstance(part, _NormBase | nn.GroupNorm | nn.PReLU):
        names = ("weight", "bias", "running_mean", "running_var")
        held = {"outputs": [(name, 0) for name in names], "inputs": []}
    elif isinstance(part, nn.Embedding):
        held = {"outputs": [("weight", 1)], "inputs": []}
    else:
        held = {"outputs": [], "inputs": []}
    return [(own, axis) for own, axis in held[end] if _tensor(part, own) is not None]


def _sliced(tensor: Tensor, axes: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The slice that stays, of the same kind."""
    data = tensor.detach()
    for axis, index in axes.items():
        data = data.index_select(axis, torch.tensor(index, dtype=torch.int64, device=data.device))
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _fit_(part: nn.Module, line: LayerPlan) -> None:
    """Set the sizes that a layer of torch remembers from its tensors."""
    if isinstance(part, _ConvNd):
        before, after = (0, 1) if isinstance(part, _ConvTransposeNd) else (1, 0)
        if part.groups > 1:
            whole = line.inputs if isinstance(part, _ConvTransposeNd) else line.outputs
            size = (
                part.in_channels if isinstance(part, _ConvTransposeNd) else part.out_channels
            ) // part.groups
            if whole:
                part.groups = len({index // size for index in whole})
        sizes = [part.weight.shape[before], part.weight.shape[after]]
        sizes[1 if isinstance(part, _ConvTransposeNd) else 0] *= part.groups
        part.in_channels, part.out_channels = sizes
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, _NormBase):
        part.num_features = len(line.outputs)
    elif isinstance(part, nn.GroupNorm):
        size = part.num_channels // part.num_groups
        part.num_groups = len({index // size for index in line.outputs})
        part.num_channels = len(line.outputs)
    elif isinstance(part, nn.PReLU):
        part.num_parameters = len(line.outputs)
    elif isinstance(part, nn.Embedding):
        part.embedding_dim = part.weight.shape[1]
