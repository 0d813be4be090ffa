"""After removal: every layer fitted to what it gave before, by least squares on unlabelled inputs."""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.graph.surgery import kept_by
from tersor.graph.watch import Product, Products
from tersor.specs import LayerPlan

BATCH = 64  # images at a time
POSITIONS = 64  # of a map, drawn anew for each batch
UNFOLDED = 2**25  # values of unfolded inputs at a time
_PLAIN = {"dilation": 1, "padding": 0, "stride": 1}
RIDGE = 1e-2  # of the mean square of an input


class _Reached(Exception):
    """The layer that is wanted has run; what follows need not."""


@dc.dataclass(eq=False)
class _Layer:
    """A weight to fit: one of its runs, how often it runs, and its targets (rows, makes), batch by batch and run by
    run."""

    product: Product
    runs: int
    targets: list[Tensor]


def reconstructed(
    original: nn.Module,
    smaller: nn.Module,
    lines: Sequence[LayerPlan],
    images: npt.NDArray[Any],
    *,
    ridge: float = RIDGE,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of `smaller` (what `lines` leave of `original`) whose layers give nearly what they gave in `original`;
    and the weights that were left as they are, each with the reason.

    In the order of computing, each linear layer and ungrouped convolution from the first that lost an input on gets the
    weights W (and bias, where it has one) that minimise, over images and POSITIONS drawn of each map, |y - W x|^2 +
    ridge * m * |W - W_0|^2: x what it reads in the smaller network, whose earlier layers are fitted already, y what it
    gave in the original, W_0 its present weights and m the mean square of x (after He 2017, "Channel pruning for
    accelerating very deep neural networks", eq. 1, here for the inputs that are left). `images` (N, C, H, W) have the
    modules' dtype; labels are not used. Both run in eval mode; normal equations are in float64.
    """
    teacher, fresh = copy.deepcopy(original).eval(), copy.deepcopy(smaller).eval()
    batches = [torch.from_numpy(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    layers, left = _targets(teacher, batches, kept_by(teacher, lines), seed)
    tensors = dict(fresh.named_parameters())
    for name, layer in layers.items():
        weight, bias = tensors[name], tensors.get(layer.product.bias or "")
        present = torch.cat(
            [weight.detach().flatten(1), *([bias.detach()[:, None]] if bias is not None else [])], 1
        )
        gram = torch.zeros(present.shape[1], present.shape[1], dtype=torch.float64)
        cross = torch.zeros(present.shape[1], present.shape[0], dtype=torch.float64)
        if not _sums_(fresh, batches, layer, bias is not None, gram, cross, seed):
            left[name] = "in the smaller network it reads other positions"
            continue
        size = float(gram.diagonal().mean())
        damping = ridge * size if size > 0 else 1.0  # nothing is read: the weights stay
        gram.diagonal().add_(damping)
        fitted = torch.linalg.solve(gram, cross + damping * present.double().T).T
        with torch.no_grad():
            weight.copy_(fitted[:, : weight[0].numel()].reshape(weight.shape))
            if bias is not None:
                bias.copy_(fitted[:, -1])
    return fresh.train(smaller.training), left


def _targets(
    teacher: nn.Module,
    batches: Sequence[Tensor],
    kept: dict[str, dict[int, tuple[int, ...]]],
    seed: int,
) -> tuple[dict[str, _Layer], dict[str, str]]:
    """What is to be fitted, in the order of computing, and what cannot be."""
    layers: dict[str, _Layer] = {}
    left: dict[str, str] = {}
    begun = False
    runs: dict[str, int] = {}
    number = 0  # of the batch

    def after(product: Product, out: Tensor) -> None:
        nonlocal begun
        name = product.name
        begun = begun or 1 in kept.get(name, {})
        if not begun:
            return
        if reason := _unfit(product, out):
            left[name] = reason
            return
        run = runs[name] = runs.get(name, -1) + 1
        rows = _rows_of(product, out, _drawn(product, out, seed, number, run))
        chosen = kept.get(name, {}).get(0)
        layer = layers.setdefault(name, _Layer(product, 0, []))
        layer.runs = max(layer.runs, run + 1)
        layer.targets.append(rows[:, list(chosen)] if chosen is not None else rows)

    for images in batches:
        runs, begun = {}, False
        with torch.no_grad(), Products(teacher, lambda _, value: value, after):
            teacher(images)
        number += 1
    return layers, left


def _sums_(
    fresh: nn.Module,
    batches: Sequence[Tensor],
    layer: _Layer,
    biased: bool,
    gram: Tensor,
    cross: Tensor,
    seed: int,
) -> bool:
    """Add X^T X and X^T Y over what `layer` reads in `fresh`; False where the rows of X and Y do not match."""
    targets = iter(layer.targets)
    number, run, fits, read = 0, 0, True, None

    def before(product: Product, value: Tensor) -> Tensor:
        nonlocal read
        read = value if product.name == layer.product.name else None
        return value

    def after(product: Product, out: Tensor) -> None:
        nonlocal run, fits
        if product.name != layer.product.name:
            return
        assert read is not None
        drawn, target = _drawn(product, out, seed, number, run), next(targets)
        fits = fits and len(target) == len(out) * len(drawn)
        run += 1
        start = 0
        for columns in _columns(product, read, sizes, drawn) if fits else ():
            if biased:
                columns = torch.cat([columns, torch.ones_like(columns[:, :1])], 1)
            gram.add_((columns.T @ columns).double())
            cross.add_((columns.T @ target[start : start + len(columns)].to(columns)).double())
            start += len(columns)
        if run == layer.runs:
            raise _Reached

    sizes = fresh.get_parameter(layer.product.name).shape[2:]
    for number, images in enumerate(batches):  # noqa: B007  `after` reads it
        run = 0
        try:
            with torch.no_grad(), Products(fresh, before, after):
                fresh(images)
        except _Reached:
            continue
    return fits


def _unfit(product: Product, out: Tensor) -> str:
    """Why a layer is left as it is; empty where it is fitted."""
    if product.kind not in ("linear", "conv1d", "conv2d"):
        return f"{product.kind} has no least squares here"
    if product.geometry.get("groups", 1) != 1:
        return "it is a grouped convolution"
    if product.bias == "":
        return "its bias is computed"
    if product.axis != (1 if product.kind != "linear" else out.ndim - 1) or not product.axis:
        return "it reads no batches"
    return ""


def _drawn(product: Product, out: Tensor, seed: int, batch: int, run: int) -> npt.NDArray[np.int64]:
    """Positions of a map, the same in both networks."""
    places = out.shape[1:-1] if product.kind == "linear" else out.shape[2:]
    count = int(np.prod(places))
    rng = np.random.default_rng([seed, batch, run])
    return np.sort(rng.permutation(count)[:POSITIONS])


def _rows_of(product: Product, out: Tensor, drawn: npt.NDArray[np.int64]) -> Tensor:
    """(images * positions, makes)."""
    if product.kind == "linear":
        values = out.reshape(len(out), -1, out.shape[-1])[:, drawn]
    else:
        values = out.flatten(2)[:, :, drawn].transpose(1, 2)
    return values.reshape(-1, values.shape[-1])


def _columns(
    product: Product, value: Tensor, sizes: Sequence[int], drawn: npt.NDArray[np.int64]
) -> list[Tensor]:
    """What the rows of a weight are multiplied with, (images * positions, K), in the order of its flattened rows; a
    few images at a time."""
    if product.kind == "linear":
        return [_rows_of(product, value, drawn)]
    words: dict[str, Any] = {w: _pair(product.geometry.get(w, d)) for w, d in _PLAIN.items()}
    kernel = tuple(sizes)
    if value.ndim == 3:
        value, kernel = value.unsqueeze(2), (1, *kernel)
        words = {w: (_PLAIN[w], held[-1]) for w, held in words.items()}
    if isinstance(product.geometry.get("padding"), str):
        same = product.geometry["padding"] == "same"
        reach = [d * (k - 1) * same for d, k in zip(words["dilation"], kernel, strict=True)]
        widths = [w for r in reversed(reach) for w in (r // 2, r - r // 2)]
        value = functional.pad(value, widths)
        words["padding"] = (0, 0)
    found = []
    step = max(1, UNFOLDED // (value[0].numel() * int(np.prod(kernel))))
    for start in range(0, len(value), step):
        columns = functional.unfold(value[start : start + step], kernel, **words)[:, :, drawn]
        found.append(columns.transpose(1, 2).reshape(-1, columns.shape[1]))
    return found


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (0, 0) if isinstance(value, str) else (value[0], value[-1])
