"""How long each layer takes on this machine, at any number of channels: measured by itself, and remembered.

A layer is run alone as the integer kernel that a quantized network uses (ONNX Runtime's QLinearConv and
QLinearMatMul), at its full and at half its channels on both sides; between these four its time is taken to be
bilinear. The sum over a network's layers tells which channels cost time; the time of the whole is measured on the
whole.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from tersor.artifact.storage import write_whole
from tersor.bench.environment import environment
from tersor.data.folder import cache_dir
from tersor.engines.onnxruntime import inference_session
from tersor.errors import EngineError, TersorError
from tersor.graph.groups import Coupling, Removed
from tersor.graph.watch import Product, Products

RUNS = 25  # of one layer; the fastest counts, since other work only ever adds time
WARM_UP = 3
OPSET = 20


@dc.dataclass(frozen=True)
class LayerShape:
    """One run of a layer: its kernel and the map it makes. `kernel`, `stride`, ... are (height, width)."""

    inputs: int  # of one group
    outputs: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    size: tuple[int, int] = (1, 1)  # of the map that is read

    def narrowed(self, inputs: int, outputs: int) -> LayerShape:
        """The same layer with other numbers of channels."""
        return dc.replace(self, inputs=max(inputs, 1), outputs=max(outputs, 1))


class LatencyTable:
    """Milliseconds of layers in integers at one batch size and number of threads, on this machine.

    Kept in the cache directory by processor and engine version, so that a layer is measured once.
    """

    def __init__(self, batch: int, threads: int, *, remember: bool = True) -> None:
        self.batch, self.threads = batch, threads
        around = environment()
        place = [
            around["cpu"],
            around["flags"],
            around["cores"],
            around["versions"],
            batch,
            threads,
        ]
        key = hashlib.sha256(json.dumps(place).encode()).hexdigest()[:24]
        self.path = cache_dir() / f"latency-{key}.json" if remember else None
        self._times: dict[str, float] = {}
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                found = json.loads(self.path.read_text())
                self._times = {str(k): float(v) for k, v in found.items() if float(v) > 0}
        self._empty: float | None = None

    def time_ms(self, shape: LayerShape) -> float:
        """The fastest of RUNS runs, without what calling the engine costs."""
        key = json.dumps(dc.astuple(shape))
        if key not in self._times:
            if self._empty is None:
                self._empty = _fastest_ms(_identity(), (1, 1, 1, 1), self.threads)
            images = (self.batch, shape.inputs * shape.groups, *shape.size)
            spent = _fastest_ms(_alone(shape), images, self.threads)
            self._times[key] = max(spent - self._empty, 1e-5)
        return self._times[key]

    def curve(self, shape: LayerShape) -> Callable[[int, int], float]:
        """(inputs, outputs) -> milliseconds, exact at the full layer."""
        full = self.time_ms(shape)
        if shape.groups > 1:  # inputs and outputs go together
            return lambda inputs, outputs: full * outputs / shape.outputs
        half_in, half_out = -(-shape.inputs // 2), -(-shape.outputs // 2)
        x0, y0 = half_in / shape.inputs, half_out / shape.outputs
        corners = {
            (i, o): self.time_ms(shape.narrowed(i, o))
            for i in (half_in, shape.inputs)
            for o in (half_out, shape.outputs)
        }
        # More channels never cost less: what noise says otherwise is levelled.
        low = min(corners.values())
        a = low
        b = min(max(corners[shape.inputs, half_out], low), full)
        c = min(max(corners[half_in, shape.outputs], low), full)

        def at(inputs: int, outputs: int) -> float:
            x = 1.0 if x0 == 1 else (inputs / shape.inputs - x0) / (1 - x0)
            y = 1.0 if y0 == 1 else (outputs / shape.outputs - y0) / (1 - y0)
            value = (
                a * (1 - x) * (1 - y) + b * x * (1 - y) + c * (1 - x) * y + max(full, b, c) * x * y
            )
            return max(value, 0.02 * full)

        return at

    @property
    def times(self) -> dict[str, float]:
        """All that is known, for `remember`."""
        return dict(self._times)

    def remember(self, times: Mapping[str, float]) -> None:
        """Take over what another table of this machine knew."""
        self._times |= times

    def keep(self) -> None:
        """Write the table to the cache; where that cannot be, it is measured again next time."""
        if self.path is not None:
            with contextlib.suppress(OSError, TersorError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                data = json.dumps(self._times, sort_keys=True).encode()
                write_whole(self.path, [data], len(data))


def layer_shapes(
    module: nn.Module, input_shape: tuple[int, int, int]
) -> dict[str, list[LayerShape]]:
    """The runs of each linear layer and two-dimensional convolution, by the name of its weight."""
    found: dict[str, list[LayerShape]] = {}
    read: list[tuple[int, ...]] = []

    def before(_: Product, value: Tensor) -> Tensor:
        read.append(tuple(value.shape))
        return value

    def after(product: Product, out: Tensor) -> None:
        shape = read.pop()
        if product.kind == "linear":
            rows = int(np.prod(shape[1:-1])) if len(shape) > 2 else 1
            made = LayerShape(product.reads, product.makes, size=(rows, 1))
        elif product.kind == "conv2d" and not isinstance(product.geometry.get("padding"), str):
            kernel = tuple(module.get_parameter(product.name).shape[2:])
            g = product.geometry
            made = LayerShape(
                product.reads,
                product.makes,
                int(g.get("groups", 1)),
                (int(kernel[0]), int(kernel[1])),
                _pair(g.get("stride", 1)),
                _pair(g.get("padding", 0)),
                _pair(g.get("dilation", 1)),
                (shape[2], shape[3]),
            )
        else:
            return
        found.setdefault(product.name, []).append(made)

    training = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad(), Products(module.eval(), before, after):
            module(torch.zeros(1, *input_shape))
    finally:
        for part, was_training in training:
            part.training = was_training
    return found


def time_cost(
    module: nn.Module, input_shape: tuple[int, int, int], table: LatencyTable
) -> Callable[[Coupling], Callable[[Removed], int]]:
    """For a `ChannelFamily`: what the layers left take, in nanoseconds. Products that no layer makes (attention)
    count by their multiplications, at the average rate of the layers."""
    shapes = layer_shapes(module, input_shape)

    def of(found: Coupling) -> Callable[[Removed], int]:
        places, starts = found.ties.places, np.asarray(found.ties.starts)
        timed, others, macs, spent = [], [], 0, 0.0
        runs: dict[str, int] = {}
        for product in found.ties.products:
            name, rows, columns = _weight_of(product.axes, places, starts)
            held = shapes.get(name, [])
            run = runs[name] = runs.get(name, -1) + 1
            if run >= len(held):
                others.append(product)
                continue
            curve = table.curve(held[run])
            timed.append((curve, rows, columns, held[run]))
            macs += product.constant * int(np.prod([len(axis) for axis in product.axes]))
            spent += curve(held[run].inputs, held[run].outputs)
        table.keep()
        rate = spent / max(macs, 1)

        def cost(units: Removed) -> int:
            left = ~found.nodes_of(units)
            total = 0.0
            for curve, rows, columns, shape in timed:
                outputs = shape.outputs if rows is None else int(left[rows].sum())
                inputs = shape.inputs if columns is None else int(left[columns].sum())
                total += curve(inputs, outputs)
            for product in others:
                total += (
                    rate * product.constant * int(np.prod([left[a].sum() for a in product.axes]))
                )
            return round(1e6 * total)

        return cost

    return of


def _weight_of(axes: Any, places: Any, starts: Any) -> tuple[str, Any, Any]:
    """The weight whose rows a product makes, the nodes of its rows and of what it sums over."""
    for number, nodes in enumerate(axes):
        place = int(np.searchsorted(starts, nodes.max(), side="right")) - 1
        name, axis = places[place] if place >= 0 else ("", 0)
        if axis == 0 and name.endswith("weight") and len(axes) <= 2:
            other = axes[1 - number] if len(axes) == 2 else None
            return name, nodes, other
    return "", None, None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _fastest_ms(model: onnx.ModelProto, shape: tuple[int, ...], threads: int) -> float:
    session = inference_session(model, threads)
    (given,) = session.get_inputs()
    images = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    spent = []
    for run in range(WARM_UP + RUNS):
        before = time.perf_counter_ns()
        session.run(None, {given.name: images})
        if run >= WARM_UP:
            spent.append(time.perf_counter_ns() - before)
    return min(spent) * 1e-6


def _identity() -> onnx.ModelProto:
    return _model([helper.make_node("Identity", ["x"], ["y"])], {})


def _alone(shape: LayerShape) -> onnx.ModelProto:
    """The layer as a graph of one integer node, uint8 to uint8."""
    channels = shape.inputs * shape.groups
    codes = np.random.default_rng(1).integers(
        -64, 64, (shape.outputs, shape.inputs, *shape.kernel), np.int8
    )
    constants: Mapping[str, Any] = {
        "scale": np.float32(0.05),
        "zero": np.uint8(128),
        "w": codes,
        "w_scale": np.full(shape.outputs, 0.01, np.float32),
        "w_zero": np.zeros(shape.outputs, np.int8),
    }
    node = helper.make_node(
        "QLinearConv",
        ["x", "scale", "zero", "w", "w_scale", "w_zero", "scale", "zero"],
        ["y"],
        kernel_shape=shape.kernel,
        strides=shape.stride,
        pads=[*shape.padding, *shape.padding],
        dilations=shape.dilation,
        group=shape.groups,
    )
    assert codes.shape[0] % shape.groups == 0 and channels, "a layer has channels"
    return _model([node], constants)


def _model(nodes: list[Any], constants: Mapping[str, Any]) -> onnx.ModelProto:
    held = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, [None, None, None, None])
        for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 10
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise EngineError(f"a layer cannot be timed by itself: {error}") from None
    return model
