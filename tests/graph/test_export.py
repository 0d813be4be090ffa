"""The exported graph computes what the module does, at any batch, and the module stays as it was."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tersor.engines import open_session
from tersor.errors import ModelError
from tersor.graph import export_onnx, weight_layers
from tersor.graph.layers import graph_layers
from tersor.models import load_model

BATCHES = (1, 2, 7, 64)


class Residual(nn.Module):
    """Convolutions with batch norm, a sum, a pool that enlarges a 1x1 map, and linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.shrink = nn.MaxPool2d(8)
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 49, 5)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(self.body(x) + x)
        return self.head(self.dropout(torch.flatten(self.pool(self.shrink(x)), 1)))


def trained(module, shape):
    """`module` with batch statistics and biases that are not zero."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    with torch.no_grad():
        module.train()(torch.randn(32, *shape))
    return module.eval()


def assert_same_function(module, graph, shape, batches=BATCHES):
    onnx.checker.check_model(graph)
    session = open_session(graph, threads=1)
    for count in batches:
        batch = torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = module(batch).numpy()
        np.testing.assert_allclose(session.run(batch.numpy()), expected, rtol=1e-3, atol=1e-5)


def ops(graph):
    return [node.op_type for node in graph.graph.node]


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    module = trained(Residual(), (3, 8, 8))
    return module, export_onnx(module, (3, 8, 8))


def test_batch_norm_is_folded_and_copies_are_an_expand(residual):
    module, graph = residual
    assert_same_function(module, graph, (3, 8, 8))
    found = set(ops(graph))
    assert found == {"Conv", "Relu", "Add", "MaxPool", "Expand", "Reshape", "Gemm"}
    names = {i.name for i in graph.graph.initializer}
    assert {"stem.0.weight", "stem.0.bias", "body.0.bias", "head.weight", "head.bias"} <= names


def test_layers_are_those_of_the_module_with_their_work(residual):
    module, graph = residual
    layers = graph_layers(graph)
    assert [layer.name for layer in layers] == [name for name, _ in weight_layers(module)]
    work = {layer.name: (layer.num_weights, layer.macs) for layer in layers}
    assert work == {
        "stem.0": (216, 216 * 64),
        "body.0": (576, 576 * 64),
        "head": (1960, 1960),
    }


def test_no_traces_of_the_machine_are_left(residual):
    _, graph = residual
    assert b".py" not in graph.SerializeToString()
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def test_the_demonstration_network():
    module = trained(load_model("digits_net"), (1, 8, 8))
    graph = export_onnx(module, (1, 8, 8))
    assert_same_function(module, graph, (1, 8, 8))
    assert [layer.name for layer in graph_layers(graph)] == [n for n, _ in weight_layers(module)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn"])
def test_the_networks_of_the_study(name):
    module = trained(load_model(name, num_classes=10), (3, 32, 32))
    graph = export_onnx(module, (3, 32, 32))
    assert_same_function(module, graph, (3, 32, 32))
    assert not set(ops(graph)) & {"BatchNormalization", "GatherND", "ReduceMean"}
    assert [layer.name for layer in graph_layers(graph)] == [n for n, _ in weight_layers(module)]


def test_a_mean_over_the_map_is_a_global_pool_and_means_over_else_are_not():
    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.head(torch.cat([x.mean((2, 3)), x.mean((1, 2))[:, :4]], 1))

    torch.manual_seed(0)
    module = Means().eval()
    graph = export_onnx(module, (3, 8, 8))
    assert_same_function(module, graph, (3, 8, 8), (1, 3))
    assert ops(graph).count("GlobalAveragePool") == ops(graph).count("ReduceMean") == 1


def test_linear_layers_on_sequences_keep_their_names():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.second(torch.relu(self.first(x.flatten(2)))).mean(1)

    torch.manual_seed(0)
    module = Tokens().eval()
    graph = export_onnx(module, (5, 2, 2))
    assert_same_function(module, graph, (5, 2, 2), (1, 3))
    layers = graph_layers(graph)
    assert [(layer.name, layer.macs) for layer in layers] == [("first", 5 * 24), ("second", 5 * 18)]


def test_the_module_is_left_as_it_was_and_nothing_is_said(capfd):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    module.train()
    module[1].eval()
    calls = []
    module[0].register_forward_hook(lambda *_: calls.append(1))
    module.double()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        export_onnx(module, (1, 4, 4))
    assert not said
    assert capfd.readouterr() == ("", "")
    assert [part.training for part in module] == [True, False, True, True]
    assert len(module[0]._forward_hooks) == 1 and not module[1]._forward_hooks
    after = module.state_dict()
    assert after["0.weight"].dtype == torch.float64
    assert all(torch.equal(after[name], value) for name, value in before.items())


class DependsOnValues(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the line that cannot be traced
            return x.flatten(1)
        return -x.flatten(1)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 12)


class WrongShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(x.flatten(1))


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x.flatten(1), x.sum((1, 2, 3))


@pytest.mark.parametrize(
    "module, words",
    [
        (DependsOnValues(), [r"if x.sum\(\) > 0", "torch.where", "test_export.py"]),
        (FixedBatch(), ["batch", "x.shape"]),
        (WrongShape(), [r"\(batch, 3, 2, 2\)", "self.head"]),
        (TwoOutputs(), ["2 values|output", "logits|check"]),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(module, words):
    with pytest.raises(ModelError) as caught:
        export_onnx(module.train(), (3, 2, 2))
    message = str(caught.value)
    assert "\n" not in message and type(module).__name__ in message
    for word in words:
        caught.match(word)
    assert module.training


def test_a_shared_layer_is_listed_once():
    shared = nn.Linear(4, 4)
    module = nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    assert [name for name, _ in weight_layers(module)] == ["0", "3"]
