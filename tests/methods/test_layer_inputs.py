"""Moments of layer inputs against torch's unfold over all positions, in float64."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.errors import DataError, ModelError
from tersor.graph import export_onnx
from tersor.graph.layers import graph_layers
from tersor.methods import layer_inputs
from tersor.methods.layer_inputs import input_moments

SHAPE = (3, 12, 12)
EVERYWHERE = 10**6


class Net(nn.Module):
    """Stride, padding, dilation, groups, a flat kernel, one weight at two sizes of map, both forms
    of linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=(2, 1), padding=(1, 2))
        self.dilated = nn.Conv2d(8, 12, (3, 2), dilation=(1, 2), padding=(2, 1), groups=4)
        self.depthwise = nn.Conv2d(12, 12, 3, stride=2, groups=12, bias=False)
        self.shared = nn.Conv2d(12, 12, (1, 3), padding=(0, 1))
        self.point = nn.Conv2d(12, 6, 1)
        self.tokens = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.dilated(torch.relu(self.stem(x))))
        x = torch.relu(self.depthwise(x))
        x = self.shared(functional.max_pool2d(torch.relu(self.shared(x)), 2))
        x = self.point(torch.relu(x))
        x = torch.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


def images(count, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32) + 0.3


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def graph(module):
    return export_onnx(module, SHAPE)


def columns_of(layer, values):
    """(groups, K, samples) in float64 of one call of the layer."""
    values = values.double()
    if isinstance(layer, nn.Linear):
        return values.reshape(-1, values.shape[-1]).T[None]
    unfolded = functional.unfold(
        values, layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    together = unfolded.permute(1, 0, 2).reshape(unfolded.shape[1], -1)
    return together.reshape(layer.groups, -1, together.shape[1])


def expected_moments(module, inputs):
    """Mean of x x^T, mean of x and number of columns, by layer name, over all positions and calls."""
    seen = {}
    hooks = [
        layer.register_forward_hook(
            lambda layer, given, _, name=name: seen.setdefault(name, []).append(
                columns_of(layer, given[0])
            )
        )
        for name, layer in module.named_children()
    ]
    with torch.no_grad():
        module(torch.from_numpy(inputs))
    for hook in hooks:
        hook.remove()
    found = {}
    for name, calls in seen.items():
        x = torch.cat(calls, dim=2)
        found[name] = ((x @ x.mT / x.shape[2]).numpy(), x.mean(2).numpy(), x.shape[2])
    return found


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_moments_are_those_of_all_unfolded_positions(module, graph):
    data = images(40)
    layers = graph_layers(graph)
    found = input_moments(
        graph, layers, [data[:33], data[33:], data], num_images=40, positions_per_image=EVERYWHERE
    )
    expected = expected_moments(module, data)
    assert set(found) == set(expected) and len(expected) == 7
    for layer in layers:
        second, mean, count = expected[layer.name]
        moments = found[layer.name]
        assert moments.second.dtype == moments.mean.dtype == np.float32
        assert moments.second.shape == second.shape and moments.mean.shape == mean.shape
        assert layer.num_weights % second.shape[-1] == 0
        assert close(moments.second, second) and close(moments.mean, mean)
        assert moments.num_samples == count


@pytest.mark.parametrize("limit", ["HELD_VALUES", "GATHERED_VALUES"])
def test_memory_limits_change_nothing(graph, limit, monkeypatch):
    layers = graph_layers(graph)
    options = {"num_images": 5, "positions_per_image": EVERYWHERE}
    expected = input_moments(graph, layers, [images(5)], **options)
    monkeypatch.setattr(layer_inputs, limit, 500)
    found = input_moments(graph, layers, [images(5)], **options)
    for name, moments in found.items():
        assert close(moments.second, expected[name].second)
        assert close(moments.mean, expected[name].mean)
        assert moments.num_samples == expected[name].num_samples


def test_positions_are_drawn_by_seed_and_only_of_larger_maps(graph):
    layers = graph_layers(graph)
    options = {"num_images": 6, "positions_per_image": 7}
    found = input_moments(graph, layers, [images(6)], **options, seed=1)
    counts = {name: moments.num_samples for name, moments in found.items()}
    assert counts["stem"] == counts["dilated"] == 6 * 7
    assert counts["shared"] == 6 * (7 + 3)  # its second map has 1 x 3 positions
    assert counts["head"] == 6
    again = input_moments(graph, layers, [images(6)], **options, seed=1)
    other = input_moments(graph, layers, [images(6)], **options, seed=2)
    assert all(np.array_equal(found[n].second, again[n].second) for n in found)
    assert not np.array_equal(found["stem"].second, other["stem"].second)


def test_drawn_positions_stand_for_all(module, graph):
    data = images(400)
    stem = graph_layers(graph)[:1]
    found = input_moments(graph, stem, [data], num_images=400, positions_per_image=30)["stem"]
    second, mean, _ = expected_moments(module, data)["stem"]
    assert np.abs(found.second[0] - second[0]).max() < 0.1 * np.diag(second[0]).max()
    assert np.abs(found.mean - mean).max() < 0.05


def test_nodes_of_one_weight_weigh_by_their_positions_though_equally_many_are_drawn():
    """Maps of one value each: whichever positions are drawn, the moments are known."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return (
                self.conv(x).flatten(1) @ torch.ones(64, 4)
                + self.conv(3 * x[:, :, :4, :4])[:, 0, 0, :4]
            )

    graph = export_onnx(Twice().eval(), (1, 8, 8))
    (conv,) = [layer for layer in graph_layers(graph) if layer.name == "conv"]
    assert len(conv.nodes) == 2
    data = np.ones((2, 1, 8, 8), np.float32)
    found = input_moments(graph, [conv], [data], num_images=2, positions_per_image=4)["conv"]
    assert found.num_samples == 2 * (4 + 4)
    assert found.mean.item() == pytest.approx((64 * 1 + 16 * 3) / 80)
    assert found.second.item() == pytest.approx((64 * 1 + 16 * 9) / 80)


@pytest.mark.parametrize(
    "data, words",
    [
        ([], "no calibration images"),
        ([images(0)], "no calibration images"),
        ([images(2), np.full((2, *SHAPE), np.nan, np.float32)], "batch 1 .*NaN.*image 0"),
        ([images(2)[:, :, :9]], r"batch 0 .*\(2, 3, 9, 12\).*\(N, 3, 12, 12\)"),
        ([images(2).astype(np.float64)], "batch 0 is float64"),
        ([images(2), np.full((2, *SHAPE), 3e38, np.float32)], "batch 1.*overflows"),
    ],
)
def test_unusable_calibration_is_named(graph, data, words):
    with pytest.raises(DataError, match=words):
        input_moments(graph, graph_layers(graph), data, num_images=10)


def test_layers_without_columns_are_named(graph):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(8193, 2))
    exported = export_onnx(wide, (3, 1, 2731))
    with pytest.raises(ModelError, match=r"'1' reads 8193 inputs.*--fold-copies"):
        input_moments(exported, graph_layers(exported), [], num_images=1)
    upward = export_onnx(nn.Sequential(nn.ConvTranspose2d(3, 2, 2)), SHAPE)
    with pytest.raises(ModelError, match=r"'0' has no moments.*transposed"):
        input_moments(upward, graph_layers(upward), [], num_images=1)
    left_open = onnx.ModelProto()
    left_open.CopyFrom(graph)
    conv = next(node for node in left_open.graph.node if node.input[1] == "stem.weight")
    for held in [a for a in conv.attribute if a.name in ("pads", "auto_pad")]:
        conv.attribute.remove(held)
    conv.attribute.append(onnx.helper.make_attribute("auto_pad", "SAME_UPPER"))
    with pytest.raises(ModelError, match=r"'stem'.*auto_pad=SAME_UPPER"):
        input_moments(left_open, graph_layers(left_open), [images(1)], num_images=1)
