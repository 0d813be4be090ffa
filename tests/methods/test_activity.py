"""Zeros inside a network are counted as a convolution of indicators counts them, padding left out."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tersor.errors import DataError, ModelError
from tersor.graph.dense import dense_twin
from tersor.graph.export import export_onnx
from tersor.graph.layers import graph_layers
from tersor.methods.activity import THRESHOLDS, mac_counts, measure_activity, zeros_read
from tersor.models import load_model


def indicator(tensor):
    return (tensor != 0).double()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2) | st.sampled_from(["same", "valid"]),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "circular", "reflect"]),
    seed=st.integers(0, 99),
)
def test_multiplications_of_a_convolution(groups, kernel, stride, padding, dilation, mode, seed):
    stride = 1 if padding == "same" else stride
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(
        2 * groups, 3 * groups, (kernel, 2), stride, padding, dilation, groups, padding_mode=mode
    )
    given_values = torch.randn(3, 2 * groups, 7, 8, generator=generator).relu()
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) > 0.4)

    def count(values, weight):
        made = copy.deepcopy(layer).double()
        made.weight.data, made.bias = weight, None
        return round(made(values).sum().item())

    ones = torch.ones_like(given_values).double()
    weight, full = indicator(layer.weight), torch.ones_like(layer.weight).double()
    live = indicator(given_values)
    expected = count(ones, full), count(live, full), count(live, weight)
    assert mac_counts(layer, given_values) == expected


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(5, 4), (3, 5)),
        (nn.Linear(5, 4), (3, 6, 5)),
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
        (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
    ],
    ids=["matrix", "tokens", "1d", "3d", "transposed"],
)
def test_multiplications_of_other_layers(layer, shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).relu()
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) > 0.4)
    weights = torch.ones_like(layer.weight), torch.ones_like(layer.weight), indicator(layer.weight)
    inputs = torch.ones_like(values), indicator(values), indicator(values)
    for found, weight, given_values in zip(mac_counts(layer, values), weights, inputs, strict=True):
        made = copy.deepcopy(layer).double()
        made.weight.data, made.bias = weight.double(), None
        assert found == round(made(given_values.double()).sum().item())


class Branching(nn.Module):
    """Batch norm, a residual sum, a layer nobody calls, and one called by its weight alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.idle = nn.Linear(3, 3)
        self.functional = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10)

    def forward(self, images):
        hidden = functional.relu(self.stem(images), inplace=True)
        hidden = functional.relu(self.norm(self.body(hidden)) + hidden)
        hidden = functional.linear(hidden.mean((2, 3)), self.functional.weight).relu()
        return self.head(hidden)


def branching():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Branching().eval()


def images(count=12, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 1, 8, 8)).astype(np.float32)


def test_zeros_densities_and_what_is_never_called():
    module = branching()
    module.norm.momentum, module.train(True)
    before = copy.deepcopy(module.state_dict())
    found = measure_activity(module, [images()[:5], images()[5:]], num_images=10)
    assert module.training
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert [layer.layer for layer in found.layers] == ["stem", "body", "head"]
    assert found.unreached == ("idle", "functional")
    assert found.num_images == found.num_gradient_images == 10
    with torch.no_grad():
        read = module.eval().stem(torch.from_numpy(images()[:10])).relu()
    body = found.layers[1]
    assert body.input_zeros == pytest.approx((read == 0).double().mean().item(), abs=1e-12)
    rms = read.square().mean((1, 2, 3), keepdim=True).sqrt()
    for threshold, density in zip(THRESHOLDS, body.input_density, strict=True):
        assert density == pytest.approx((read > threshold * rms).double().mean().item(), abs=1e-3)
    assert body.macs_zero_input == body.macs_zero > 0
    assert found.layers[0].input_zeros == found.layers[0].weight_zeros == 0
    shares = [layer.macs * layer.macs_zero for layer in found.layers]
    assert found.macs_zero == pytest.approx(
        sum(shares) / sum(layer.macs for layer in found.layers), rel=1e-12
    )
    assert found.potential_speedup == pytest.approx(1 / (1 - found.macs_zero), rel=1e-12)


def test_multiplications_are_counted_as_in_the_graph():
    module = load_model("digits_net")
    graph = {la.name: la.macs for la in graph_layers(export_onnx(module, (1, 8, 8)))}
    found = measure_activity(module, [images()])
    assert {layer.layer: layer.macs for layer in found.layers} == graph


def test_gradients_are_sparse_behind_relu_until_batch_norm_takes_the_batchs_statistics():
    module = branching()
    labels = np.arange(12) % 10
    found = {la.layer: la for la in measure_activity(module, [images()], labels).layers}
    inputs = torch.from_numpy(images())
    made = {}
    module.body.register_forward_hook(lambda _, __, output: made.update(body=output))
    output = module(inputs)
    made["body"].retain_grad()
    functional.cross_entropy(output, torch.from_numpy(labels)).backward()
    expected = (made["body"].grad == 0).double().mean().item()
    assert expected > 0.1
    assert found["body"].gradient_zeros == pytest.approx(expected, abs=1e-12)
    assert found["body"].gradient_zeros_training == 0
    assert found["stem"].gradient_zeros > 0
    squares = module.body.weight.grad.flatten().square()
    top = squares.topk(round(0.01 * squares.numel())).values.sum() / squares.sum()
    assert found["body"].gradient_top == pytest.approx(top.item(), rel=1e-4)


def test_without_labels_the_own_answers_take_their_place():
    module = branching()
    with torch.no_grad():
        own = module(torch.from_numpy(images())).argmax(1).numpy()
    assert measure_activity(module, [images()]) == measure_activity(module, [images()], own)
    assert measure_activity(module, [images()]) != measure_activity(
        module, [images()], (own + 1) % 10
    )


def test_weights_of_zero_count_where_the_input_is_not():
    module = branching()
    with torch.no_grad():
        module.stem.weight[::2] = 0
    stem, *_ = measure_activity(module, [images()]).layers
    assert stem.macs_zero_input == 0
    assert stem.macs_zero == stem.weight_zeros == 0.5


@pytest.mark.parametrize(
    ("module", "labels", "given_images", "error", "told"),
    [
        (nn.Flatten(), None, images(), ModelError, "Flatten has no convolutional or linear"),
        (nn.Conv2d(1, 2, 1), None, images(), ModelError, r"outputs of shape \(12, 2, 8, 8\)"),
        (branching(), np.arange(3), images(), DataError, "12 labels from 0 to 9"),
        (branching(), np.arange(12), images(), DataError, "got 12 from 0 to 11"),
        (branching(), None, images(0), DataError, "no images|shape"),
        (branching(), None, images() * np.float32(np.nan), DataError, "NaN"),
        (branching(), None, images().astype(np.float64), DataError, "float64"),
    ],
)
def test_what_cannot_be_measured_is_refused(module, labels, given_images, error, told):
    with pytest.raises(error, match=told):
        measure_activity(module, [given_images] if len(given_images) else [], labels)


class Residual(nn.Module):
    """Grouped and strided convolutions, a sum, a pool and a multiplied constant."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.before = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.scale = nn.Parameter(torch.tensor([[-1.0] * 8]))
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        hidden = self.stem(images).relu()
        hidden = self.grouped(self.before(hidden).relu()).relu() + hidden
        return self.head(self.down(hidden).relu().amax((2, 3)) * self.scale)


@pytest.mark.parametrize("make", [lambda: load_model("digits_net"), lambda: Residual().eval()])
def test_the_dense_twin_has_the_same_operations_and_no_zeros(make):
    module = make()
    graph = export_onnx(module, (1, 8, 8))
    before = graph.SerializeToString()
    twin = dense_twin(graph)
    assert graph.SerializeToString() == before
    assert [n.op_type for n in twin.graph.node] == [n.op_type for n in graph.graph.node]
    shapes = [
        {i.name: (list(i.dims), i.data_type) for i in g.graph.initializer} for g in (graph, twin)
    ]
    assert shapes[0] == shapes[1]
    assert zeros_read(twin, np.abs(images()) + np.float32(1)) == 0
    found = measure_activity(module, [images()])
    sizes = [layer.input_zeros for layer in found.layers]
    assert min(sizes) < zeros_read(graph, images()) < max(sizes)
