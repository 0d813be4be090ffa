"""Cross-layer equalization keeps the function and makes the ranges of two layers equal."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional

from tersor.engines import open_session
from tersor.graph import export_onnx
from tersor.graph.equalize import equalize
from tersor.graph.layers import attribute, graph_layers

SHAPE = (3, 10, 10)


class Chain(nn.Module):
    """Depthwise and grouped layers, a pool, two layers with nothing between, linear layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.b = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, groups=4)
        self.c = nn.Conv2d(8, 6, 1)
        self.hidden, self.head = nn.Linear(6 * 9, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.a(x))))
        x = functional.max_pool2d(torch.relu(self.b(x)), 2)
        x = self.c(self.grouped(x))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


class Tokens(nn.Module):
    """Linear layers on sequences, whose weights are stored inputs first."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 8, bias=False)
        self.second = nn.Linear(8, 6)  # its bias is added by a node of its own
        self.third = nn.Linear(6, 4)

    def forward(self, x):
        x = self.second(functional.leaky_relu(self.first(x.flatten(2).mT)))
        return self.third(torch.relu(x)).mean(1)


class Branches(nn.Module):
    """What must not be touched, around one pair."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.six, self.shared = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.last, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.second(torch.relu(self.first(x))) + x)
        x = self.shared(torch.relu(self.shared(functional.relu6(self.six(x)))))
        x = self.twice(torch.sigmoid(x))
        return (self.last(x) + self.other(x)).mean((2, 3))


PAIRS = {
    Chain: [
        *itertools.pairwise(["a", "depthwise", "b", "grouped", "c"]),
        ("hidden", "head"),
    ],
    Tokens: [("first", "second")],
    Branches: [("first", "second")],
}


def spread_(module):
    """Channels of very different ranges, so that there is something to equalize."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (p for p in module.parameters() if p.ndim > 1):
            for axis in (0, 1):
                shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
                noise = torch.randn(weight.shape[axis], generator=generator)
                weight.mul_(torch.exp(noise).reshape(shape))
    return module


def exported(make, change=lambda module: None):
    torch.manual_seed(0)
    module = spread_(make().eval())
    with torch.no_grad():
        change(module)
    return export_onnx(module, SHAPE)


@pytest.fixture(scope="module", params=[Chain, Tokens, Branches])
def case(request):
    graph = exported(request.param)
    return PAIRS[request.param], graph, *equalize(graph)


@pytest.fixture(scope="module")
def dying():
    def change(module):
        module.a.weight[0] = 0
        module.b.weight[:, 1] = 0
        module.hidden.weight[2] = 1e-12
        module.a.bias[0] = module.hidden.bias[2] = 0.5

    return exported(Chain, change)


def initializers(graph):
    return {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}


def ranges(graph, name):
    """Largest magnitude of every output and of every input channel of a layer."""
    (layer,) = [layer for layer in graph_layers(graph) if layer.name == name]
    weight = np.abs(np.moveaxis(initializers(graph)[layer.weight], layer.axis, 0))
    groups = int(attribute(graph.graph.node[layer.nodes[0]], "group", 1))
    outputs = [row.max() for row in weight]
    inputs = [
        max(row[column].max() for row in part)
        for part in np.split(weight, groups)
        for column in range(weight.shape[1])
    ]
    return np.array(outputs), np.array(inputs)


def assert_same_function(found, graph):
    batch = np.random.default_rng(0).standard_normal((16, *SHAPE)).astype(np.float32)
    expected = open_session(graph, threads=1).run(batch)
    logits = open_session(found, threads=1).run(batch)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_function_is_kept_by_a_valid_graph_and_the_given_one_is_untouched(case):
    _, graph, found, _ = case
    before = graph.SerializeToString(deterministic=True)
    equalize(graph)
    assert graph.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(found)
    assert_same_function(found, graph)


def test_the_ranges_of_both_layers_are_equal_channel_by_channel(case):
    expected, graph, found, pairs = case
    assert pairs == expected
    for first, second in pairs:
        leaving, entering = ranges(found, first)[0], ranges(found, second)[1]
        np.testing.assert_allclose(leaving, entering, rtol=1e-3)
        assert not np.allclose(ranges(graph, first)[0], ranges(graph, second)[1], rtol=0.5)


def test_other_layers_keep_their_weights_bit_for_bit(case):
    pairs, graph, found, _ = case
    before, after = initializers(graph), initializers(found)
    assert list(before) == list(after)
    touched = {layer for pair in pairs for layer in pair}
    for name, values in before.items():
        changed = not np.array_equal(values, after[name])
        assert not changed or name.rpartition(".")[0] in touched
    changed_biases = {n for n in before if "bias" in n and not np.array_equal(before[n], after[n])}
    assert changed_biases == {f"{first}.bias" for first, _ in pairs} & set(before)


def test_equalizing_again_changes_little(case):
    _, _, found, pairs = case
    again, same_pairs = equalize(found)
    assert same_pairs == pairs
    before, after = initializers(found), initializers(again)
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=1e-2)


def test_channels_of_zeros_keep_their_scale(dying):
    found, pairs = equalize(dying)
    assert pairs == PAIRS[Chain]
    before, after = initializers(dying), initializers(found)
    assert all(np.isfinite(values).all() for values in after.values())
    assert (after["a.weight"][0] == 0).all() and (after["b.weight"][:, 1] == 0).all()
    assert after["a.bias"][0] == before["a.bias"][0]
    assert_same_function(found, dying)


def test_a_channel_of_nearly_nothing_does_not_blow_up_its_bias(dying):
    found, _ = equalize(dying)
    assert initializers(found)["hidden.bias"][2] == np.float32(0.5)


def test_a_graph_without_pairs_comes_back_as_it_is():
    graph = export_onnx(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardswish()).eval(), SHAPE)
    found, pairs = equalize(graph)
    assert pairs == [] and found == graph
