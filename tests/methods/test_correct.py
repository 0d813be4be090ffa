"""The shift of a layer's outputs, by hand and through a graph that holds the other weights."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tersor.engines.onnxruntime import inference_session
from tersor.errors import ModelError
from tersor.graph import export_onnx
from tersor.graph.layers import graph_layers
from tersor.methods.correct import bias_shift, output_gain
from tersor.methods.layer_inputs import InputMoments, input_moments
from tersor.methods.quantize import quantize
from tersor.specs import Quantize

SHAPE = (4, 7, 7)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_shift_is_the_mean_change_of_the_outputs(groups):
    rng = np.random.default_rng(groups)
    weight, rounded = rng.standard_normal((2, 6, 5)).astype(np.float32)
    inputs = rng.standard_normal((groups, 200, 5)) + rng.standard_normal((groups, 1, 5))
    changes = [
        (inputs[row // (6 // groups)] @ (rounded[row] - weight[row])).mean() for row in range(6)
    ]
    second = np.zeros((groups, 5, 5), np.float32)
    moments = InputMoments(second, inputs.mean(1).astype(np.float32), 200)
    shift = bias_shift(weight, rounded, moments)
    assert shift.shape == (6,) and shift.dtype == np.float32
    np.testing.assert_allclose(shift, changes, rtol=1e-4, atol=1e-5)
    assert (bias_shift(weight, weight, moments) == 0).all()


def test_it_is_what_a_convolution_with_the_other_weights_does():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)).eval()
    graph = export_onnx(conv, SHAPE)
    data = np.random.default_rng(0).standard_normal((30, *SHAPE)).astype(np.float32) + 1
    (layer,) = graph_layers(graph)
    moments = input_moments(graph, [layer], [data], num_images=30, positions_per_image=100)
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    (held,) = [i for i in other.graph.initializer if i.name == layer.weight]
    weight = numpy_helper.to_array(held)
    rounded = np.round(weight * 8) / np.float32(8)
    held.CopyFrom(numpy_helper.from_array(rounded, held.name))
    (before,), (after,) = (
        inference_session(g, 1).run(None, {"input": data}) for g in (graph, other)
    )
    shift = bias_shift(weight.reshape(6, -1), rounded.reshape(6, -1), moments[layer.name])
    np.testing.assert_allclose(shift, (after - before).mean((0, 2, 3)), rtol=1e-3, atol=1e-5)


def test_moments_of_another_layer_are_refused():
    weight = np.zeros((6, 5), np.float32)
    for groups, columns in ((1, 4), (4, 5)):
        moments = InputMoments(
            np.zeros((groups, columns, columns), np.float32),
            np.zeros((groups, columns), np.float32),
            1,
        )
        with pytest.raises(ModelError, match="moments of another layer"):
            bias_shift(weight, weight, moments)
        with pytest.raises(ModelError, match="moments of another layer"):
            output_gain(weight, weight, moments)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_gain_brings_the_variance_back(groups):
    rng = np.random.default_rng(groups)
    weight, rounded = rng.standard_normal((2, 6, 5))
    mixing = rng.standard_normal((groups, 5, 5))
    inputs = rng.standard_normal((groups, 200, 5)) @ mixing + rng.standard_normal((groups, 1, 5))
    second = np.einsum("gni,gnj->gij", inputs, inputs) / 200
    moments = InputMoments(second, inputs.mean(1), 200)
    gain = output_gain(weight, rounded, moments)
    spread = [
        [(inputs[row // (6 // groups)] @ each[row]).std() for row in range(6)]
        for each in (weight, rounded)
    ]
    expected = np.divide(*spread).clip(0.5, 2)
    assert ((gain > 0.5) & (gain < 2)).any()
    np.testing.assert_allclose(gain, expected, rtol=1e-5)


def test_a_constant_channel_keeps_its_scale():
    moments = InputMoments(np.ones((1, 3, 3), np.float32), np.ones((1, 3), np.float32), 9)
    weight = np.array([[1, 2, 3], [0, 0, 0]], np.float32)
    assert output_gain(weight, np.float32(0.5) * weight, moments).tolist() == [1, 1]


@pytest.mark.parametrize(
    "code", [dict(bits=3), dict(bits=2, code="ternary"), dict(bits=2, code="codebook")]
)
def test_reestimated_layers_have_the_moments_of_the_float_ones(code):
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).eval()
    graph = export_onnx(conv, SHAPE)
    data = np.random.default_rng(0).standard_normal((30, *SHAPE)).astype(np.float32) + 1
    spec = Quantize(mode="weight_only", reestimate=True, edge_bits=0, **code)
    plain = Quantize(mode="weight_only", edge_bits=0, **code)
    before, without, after = (
        inference_session(g, 1).run(None, {"input": data})[0].transpose(1, 0, 2, 3).reshape(6, -1)
        for g in (graph, quantize(graph, plain).graph, quantize(graph, spec, [data]).graph)
    )
    np.testing.assert_allclose(after.mean(1), before.mean(1), atol=1e-3)
    worst, worst_without = (
        np.abs(each.std(1) / before.std(1) - 1).max() for each in (after, without)
    )
    assert worst <= 2e-3 and worst <= worst_without / 4
