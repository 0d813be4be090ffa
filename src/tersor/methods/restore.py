"""From a file back to a network that can be trained: the plans are applied to a fresh instance of the
user's class, and the file's weights are put in."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.artifact import Artifact
from tersor.engines.load import available_cpus
from tersor.engines.onnxruntime import inference_session
from tersor.errors import DataError, ModelError
from tersor.graph.constants import Array, codes_activations, constant_values, right_factors
from tersor.graph.fold import FoldedCopies, fold_copies_, unfold_copies_
from tersor.graph.layers import WEIGHT_LAYERS, weight_layers
from tersor.graph.stripes import whole_kernels
from tersor.graph.surgery import removed
from tersor.methods.factorize import restructured as factorized
from tersor.methods.share import restructured as shared
from tersor.specs import LayerPlan, Plan, from_dict

FloatArray = npt.NDArray[np.float32]
TOLERANCE = 1e-3  # of the logits' size: rounding of float32 in another order
# Of logits whose activations are codes with those of floats. Another network's are near zero.
LEAST_CORRELATION = 0.9


def restore(
    artifact: Artifact, module: nn.Module, *, inputs: Iterable[FloatArray] | None = None
) -> nn.Module:
    """A copy of `module`, a fresh instance of the network's class, as the file holds it: smaller
    where its plans removed or factorized, with its (decoded) weights. Where no plan tells of
    channels that are gone, the shapes in the file do.

    Batch norms that the file has folded into the layers before them are set so that they change
    nothing. To train on, give some unlabelled `inputs` (N, C, H, W) float32: their statistics go into
    those batch norms, at the same function, so that training starts where the file stands.
    The network computes what the file's graph does, with its activations in float: this is checked
    on noise, exactly where the graph has no codes of activations. Raises ModelError, naming the
    tensors, for a network of another class or one whose parameters the file does not hold by their
    names, in its graph or beside it (`unheld`).
    """
    graph = artifact.to_onnx()
    changed = copy.deepcopy(module)
    for plan in plans_of(artifact):
        changed = restructured(changed, plan)
    shape = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim][1:]
    # half as large as normalised images: calibrated codes would cut more of it off
    noise = np.random.default_rng(0).normal(0, 0.5, (8, *shape)).astype(np.float32)
    values = {**artifact.state(), **whole_kernels(graph, changed, constant_values(graph))}
    example = torch.from_numpy(noise)
    folds: list[FoldedCopies] = []
    narrow, norms = _narrowed(changed, values, example)
    if _differs(narrow, values) or not _runs(narrow, example):
        folds, _ = fold_copies_(changed, example)
        narrow, norms = _narrowed(changed, values, example)
    changed = narrow
    _fill_(changed, values, norms, right_factors(graph))
    if folds:
        unfold_copies_(changed, folds, {})
    changed.eval()
    _require_same(changed, graph, noise)
    if inputs is not None:
        _measure_(changed, norms, inputs)
    return changed


def unheld(module: nn.Module, graph: onnx.ModelProto) -> dict[str, Array]:
    """Parameters and buffers of `module`, by name, that its deployment `graph` does not hold under
    their names (tables that the exporter folded into others): what `restore` needs beside the graph.

    Left out is what `restore` finds again: batch norms folded into the layers before them, biases of
    zeros, counters.
    """
    values = whole_kernels(graph, module, constant_values(graph))
    folded = {
        f"{name}.{key}"
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and f"{name}.running_mean" not in values
        for key in part.state_dict()
    }
    found = {}
    for name, tensor in module.state_dict().items():
        if name in values or name in folded or name.endswith("num_batches_tracked"):
            continue
        if name.endswith(".bias") and not tensor.any():
            continue
        held = tensor.detach().cpu()
        found[name] = (held.float() if held.is_floating_point() else held).numpy().copy()
    return found


def plan_of(artifact: Artifact) -> Plan | None:
    """The plan that made a file, which holds those before it; None where the file holds none."""
    if not artifact.plan:
        return None
    plan = from_dict(artifact.plan)
    if not isinstance(plan, Plan):
        raise ModelError(f"the file's plan is of kind {plan.kind!r}; expected plan")
    return plan


def plans_of(artifact: Artifact) -> list[Plan]:
    """The plans of a file in the order they were applied; none where it holds none."""
    last = plan_of(artifact)
    return [] if last is None else [*last.earlier, last]


def restructured(module: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `module` of the shape that `plan` made of it, its new weights without a meaning; or `module`, where
    the plan made it no other."""
    if plan.request.kind in ("factorize", "share"):
        return (factorized if plan.request.kind == "factorize" else shared)(module, plan)
    changes = any(line.action in ("remove", "bypass") for line in plan.layers)
    return removed(module, plan.layers) if changes else module


def _differs(module: nn.Module, values: Mapping[str, Any]) -> bool:
    parameters = dict(module.named_parameters())
    return any(
        name in parameters and parameters[name].numel() != held.size
        for name, held in values.items()
    )


def _runs(module: nn.Module, example: torch.Tensor) -> bool:
    """Whether the layers fit each other: those of a file whose copies were folded do not, in the class as it is."""
    try:
        with torch.no_grad():
            module.eval()(example)
    except RuntimeError:
        return False
    return True


def _narrowed(
    module: nn.Module, values: Mapping[str, Any], example: torch.Tensor
) -> tuple[nn.Module, dict[str, str]]:
    """`module` as narrow as `values` are, and its folded norms as `_folded_norms`; which channels went does not matter,
    since every weight is the file's."""
    norms = _folded_norms(module, values, example)
    stay: dict[str, tuple[int, int]] = {}  # outputs, inputs
    for name, layer in weight_layers(module):
        own = tuple(layer.get_parameter("weight").shape)
        held = np.shape(values.get(f"{name}.weight", 0))
        same_kind = (
            len(held) == len(own) and held[2:] == own[2:] and getattr(layer, "groups", 1) == 1
        )
        if same_kind and held != own and held[0] <= own[0] and held[1] <= own[1]:
            stay[name] = held[0], held[1]
    lines = [
        LayerPlan(name, "remove", outputs=tuple(range(outputs)), inputs=tuple(range(inputs)))
        for name, (outputs, inputs) in stay.items()
    ]
    widths = {norm: stay[layer][0] for norm, layer in norms.items() if layer in stay}
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and f"{name}.running_mean" in values:
            widths[name] = len(values[f"{name}.running_mean"])
    for name, width in widths.items():
        norm = module.get_submodule(name)
        if isinstance(norm, _BatchNorm) and width < norm.num_features:
            lines.append(LayerPlan(name, "remove", outputs=tuple(range(width))))
    return (removed(module, lines) if lines else module), norms


def _folded_norms(
    module: nn.Module, values: Mapping[str, Any], example: torch.Tensor
) -> dict[str, str]:
    """Batch norms that the graph does not hold, each with the layer whose outputs it reads."""
    made: list[tuple[torch.Tensor, str]] = []  # keeps the tensors, so that no identity comes twice
    found: dict[str, str] = {}

    def seen(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if isinstance(layer, _BatchNorm):
                before = [n for tensor, n in made if tensor is inputs[0]]
                found[name] = before[-1] if before else ""
            else:
                made.append((output, name))

        return layer.register_forward_hook(hook)

    absent = {
        name
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and f"{name}.running_mean" not in values
    }
    parts = dict(module.named_modules())
    handles = [
        seen(name, part)
        for name, part in parts.items()
        if name in absent or isinstance(part, WEIGHT_LAYERS)
    ]
    try:
        with torch.no_grad():
            module.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
    if lost := [name for name in absent if not found.get(name)]:
        raise ModelError(
            f"{type(module).__name__}: batch norm {lost[0]!r} is not in the file and follows no layer "
            "that could hold it; the file belongs to another network"
        )
    return found


def _fill_(
    module: nn.Module, values: Mapping[str, Any], norms: Mapping[str, str], factors: set[str]
) -> None:
    """Put the graph's constants into the parameters of their names, folded biases into the norms.
    `factors` are matrices that stand in the graph as linear layers' transposes."""
    state = module.state_dict()
    fresh: dict[str, torch.Tensor] = {}
    for norm, layer in norms.items():
        part = module.get_submodule(norm)
        assert isinstance(part, _BatchNorm)
        bias = values.get(f"{layer}.bias", np.zeros(part.num_features, np.float32))
        own = {"weight": np.ones_like(bias), "bias": bias, "running_mean": np.zeros_like(bias)}
        own["running_var"] = np.full_like(bias, 1 - part.eps)
        fresh |= {f"{norm}.{key}": torch.from_numpy(np.array(value)) for key, value in own.items()}
        if f"{layer}.bias" in state:
            fresh[f"{layer}.bias"] = torch.zeros(part.num_features)
    unlike = []
    for name, tensor in state.items():
        if name in fresh or name.endswith("num_batches_tracked"):
            continue
        value = values.get(name)
        if value is None and name.endswith(".bias"):
            value = np.zeros(tuple(tensor.shape), np.float32)  # the exporter leaves zeros out
        if value is not None and _is_turned(
            module, name, tuple(tensor.shape), value.shape, factors
        ):
            value = value.T
        if value is None or value.shape != tuple(tensor.shape):
            held = "nothing" if value is None else f"shape {value.shape}"
            unlike.append(f"{name}: the network has {tuple(tensor.shape)}, the file {held}")
        else:
            fresh[name] = torch.from_numpy(np.array(value)).to(tensor.dtype)
    if unlike:
        more = f" and {len(unlike) - 5} more" if len(unlike) > 5 else ""
        raise ModelError(
            f"{type(module).__name__} does not fit the file: {'; '.join(unlike[:5])}{more}. Give an "
            "instance of the class and size that was compressed"
        )
    module.load_state_dict({**state, **fresh})


def _is_turned(
    module: nn.Module, name: str, shape: tuple[int, ...], held: tuple[int, ...], factors: set[str]
) -> bool:
    """Whether a matrix of the graph, of shape `held`, is the transpose of the parameter `name`. Where
    the shapes do not tell, the layer does: torch's own multiply by the transposes of their weights."""
    if len(shape) != 2 or held != shape[::-1]:
        return False
    owner = module.get_submodule(name.rpartition(".")[0])
    return held != shape or (
        name in factors and isinstance(owner, nn.Linear | nn.MultiheadAttention)
    )


def _require_same(module: nn.Module, graph: Any, noise: FloatArray) -> None:
    session = inference_session(graph, available_cpus(), optimize=False)
    (expected,) = session.run(None, {session.get_inputs()[0].name: noise})
    with torch.no_grad():
        found = module(torch.from_numpy(noise)).numpy()
    if found.shape != expected.shape or not _alike(found, expected, codes_activations(graph)):
        raise ModelError(
            f"{type(module).__name__} with the file's weights does not compute what the file does; "
            "give an instance of the class that was compressed"
        )


def _alike(found: FloatArray, expected: FloatArray, coded: bool) -> bool:
    if coded:
        return bool(np.corrcoef(found.ravel(), expected.ravel())[0, 1] >= LEAST_CORRELATION)
    size = float(np.abs(expected).max())
    return np.allclose(found, expected, TOLERANCE, TOLERANCE * size)


def _measure_(module: nn.Module, norms: Mapping[str, str], inputs: Iterable[FloatArray]) -> None:
    """Statistics of `inputs` into the batch norms `norms`, whose scale and shift undo them."""
    rows: dict[str, list[torch.Tensor]] = {norm: [] for norm in norms}  # count, sum, squares

    def watching(norm: str) -> Any:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            seen = given[0].double().transpose(0, 1).flatten(1)
            count = torch.full((len(seen),), seen.shape[1], dtype=torch.float64)
            rows[norm].append(torch.stack([count, seen.sum(1), seen.square().sum(1)]))

        return module.get_submodule(norm).register_forward_pre_hook(hook)

    handles = [watching(norm) for norm in norms]
    try:
        with torch.no_grad():
            for batch in inputs:
                module(torch.from_numpy(batch))
    finally:
        for handle in handles:
            handle.remove()
    for norm, held in rows.items():
        if not held:
            raise DataError("inputs to measure batch-norm statistics on were asked for; none came")
        part = module.get_submodule(norm)
        assert isinstance(part, _BatchNorm)
        count, total, squares = torch.stack(held).sum(0)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        own = {"weight": (variance + part.eps).sqrt(), "bias": part.bias + mean}
        with torch.no_grad():
            for key, value in {**own, "running_mean": mean, "running_var": variance}.items():
                getattr(part, key).copy_(value)
