"""Kernels with empty positions, made smaller in the graph: the same function, and whole again in a module."""

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

import tersor
from tersor.engines.onnxruntime import inference_session
from tersor.graph import export_onnx
from tersor.graph.export import OPSET
from tersor.graph.constants import constant_values
from tersor.graph.layers import graph_layers
from tersor.graph.stripes import (
    forms_of_stripes,
    shrink_kernels_,
    split_stripes_,
    striped_layers,
    whole_kernels,
)

SHAPE = (4, 9, 8)


def masked(layer, keep):
    """The layer with the kernel positions of `keep` (kernel or weight) left, and its graph, made by hand: exporting
    takes seconds."""
    with torch.no_grad():
        layer.weight.mul_(keep)
        sizes = layer(torch.zeros(2, *SHAPE)).shape[1:]
    right, left = (
        layer._reversed_padding_repeated_twice[:2],
        layer._reversed_padding_repeated_twice[2:],
    )
    node = onnx.helper.make_node(
        "Conv",
        ["input", "0.weight", *["0.bias"] * (layer.bias is not None)],
        ["output"],
        pads=[left[0], right[0], left[1], right[1]],
        strides=list(layer.stride),
        dilations=list(layer.dilation),
        group=layer.groups,
        kernel_shape=list(layer.kernel_size),
    )
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("input", SHAPE), ("output", sizes))
    ]
    held = [
        numpy_helper.from_array(value.detach().numpy(), f"0.{name}")
        for name, value in layer.named_parameters()
    ]
    graph = onnx.helper.make_graph([node], "one", infos[:1], infos[1:], initializer=held)
    opset = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model)
    return nn.Sequential(layer).eval(), model


def outputs(graph, inputs):
    (found,) = inference_session(graph, 1, optimize=False).run(None, {"input": inputs})
    return found


def check(network, before, after):
    """The same function; the module's own weight is put together from what the graph holds."""
    inputs = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    expected, found = outputs(before, inputs), outputs(after, inputs)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1)
    values = whole_kernels(after, network, constant_values(after))
    assert np.array_equal(values["0.weight"], network[0].weight.detach().numpy())
    if network[0].bias is not None:
        assert np.array_equal(values["0.bias"], network[0].bias.detach().numpy())


def layers(data, groups):
    each = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel, dilation = data.draw(each), data.draw(st.tuples(*[st.integers(1, 2)] * 2))
    stride = data.draw(st.tuples(*[st.integers(1, 3)] * 2))
    padding = data.draw(st.tuples(*[st.integers(0, 3)] * 2))
    if data.draw(st.booleans()) and set(stride) == {1}:
        padding = "same"
    torch.manual_seed(data.draw(st.integers(0, 99)))
    bias = data.draw(st.booleans())
    return nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, bias=bias)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_any_pattern_of_positions_is_the_same_function(data):
    layer = layers(data, data.draw(st.sampled_from([1, 2])))
    count = layer.weight[0, 0].numel()
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    network, before = masked(layer, keep.view(layer.kernel_size))
    after = copy.deepcopy(before)
    changes = shrink_kernels_(after)
    check(network, before, after)
    assert [c.before for c in changes] == [layer.kernel_size] * (count > 1)
    for change in changes:
        assert (change.reason == "") == (change.after != change.before)
        (held,) = [i for i in after.graph.initializer if i.name == "0.weight"]
        assert tuple(held.dims[2:]) == change.after


@settings(deadline=None, max_examples=20)
@given(data=st.data(), density=st.sampled_from([0.0, 0.2, 0.6]))
def test_a_sum_over_stripes_is_the_same_function(data, density):
    layer = layers(data, 1)
    keep = torch.rand(6, 1, *layer.kernel_size) < density
    network, before = masked(layer, keep)
    after = copy.deepcopy(before)
    changes = split_stripes_(after, ["0"])
    if layer.kernel_size == (1, 1) or keep.all():
        assert not changes
        return
    check(network, before, after)
    multiplied = sum(each.num_weights for each in graph_layers(after))
    most = (int(keep.sum()) + 6 + keep[0, 0].numel()) * 4
    assert multiplied <= most and changes[0].macs_share <= (most / 4) / keep.numel()
    both = data.draw(st.booleans()) and copy.deepcopy(before)
    if both:
        shrink_kernels_(both)
        split_stripes_(both, ["0"])
        expected, found = (outputs(g, np.ones((1, *SHAPE), np.float32)) for g in (before, both))
        assert np.allclose(expected, found, atol=1e-5)


def test_rows_and_columns_gone_make_a_smaller_kernel_and_corners_dilation():
    middle = torch.zeros(3, 3)
    middle[1] = 1
    corners = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]])
    for keep, after, pads in (
        (middle, (1, 3), [0, 1, 0, 1]),
        (torch.tensor([[0, 0, 0], [1, 1, 0], [1, 0, 0]]), (2, 2), [0, 1, 1, 0]),
        (corners, (2, 2), [1, 1, 1, 1]),
    ):
        _, graph = masked(nn.Conv2d(4, 5, 3, padding=1), keep)
        (change,) = shrink_kernels_(graph)
        assert (change.layer, change.before, change.after) == ("0", (3, 3), after)
        (node,) = [n for n in graph.graph.node if n.op_type == "Conv"]
        assert {a.name: list(a.ints) for a in node.attribute}["pads"] == pads


def test_what_is_left_alone_is_said():
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
    ).eval()
    with torch.no_grad():
        network[3].weight[:, :, 0] = 0  # no padding that could become less
    reasons = {c.layer: c.reason for c in shrink_kernels_(export_onnx(network, SHAPE))}
    assert set(reasons) == {"0", "3"} and all("can go" in reason for reason in reasons.values())


def test_stripes_of_every_layer_alone_in_two_forms():
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, 2),
        nn.Conv2d(6, 6, 3, groups=2),
    ).eval()
    with torch.no_grad():
        for place in (0, 2, 3):
            network[place].weight.mul_(torch.rand(len(network[place].weight), 1, 3, 3) < 0.4)
    graph = export_onnx(network, SHAPE)
    assert [layer.name for layer in striped_layers(graph)] == ["0", "2"]
    for name, (whole, split) in forms_of_stripes(graph).items():
        layer = network[int(name)]
        inputs = np.random.default_rng(0).standard_normal((2, layer.in_channels, 9, 8))
        inputs = inputs.astype(np.float32)
        expected, found = outputs(whole, inputs), outputs(split, inputs)
        assert np.allclose(expected, found, atol=1e-5)
        assert np.allclose(expected, layer(torch.from_numpy(inputs)).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_file_with_smaller_kernels_goes_back_into_the_class(tmp_path, quantized):
    network = tersor.load_model("digits_net", seed=2)
    with torch.no_grad():
        network.features[3].weight[:, :, 0] = 0
        keep = torch.rand(64, 1, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3
        network.features[7].weight.mul_(keep)
    graph = export_onnx(network.eval(), (1, 8, 8))
    assert shrink_kernels_(graph)[1].after == (2, 3)
    assert split_stripes_(graph, ["features.7"])
    if quantized:
        graph = tersor.quantize(graph, tersor.Quantize(mode="weight_only")).graph
    tersor.write(graph, tmp_path / "net.tersor")
    back = tersor.load(tmp_path / "net.tersor", into=tersor.load_model("digits_net"))
    assert not back.features[3].weight[:, :, 0].any()
    assert torch.equal((back.features[7].weight != 0).any(1, keepdim=True), keep)
    inputs = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(outputs(graph, inputs.numpy()))
    assert torch.allclose(back(inputs), expected, atol=1e-4)
