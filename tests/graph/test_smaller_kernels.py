"""Smaller and shifted convolutions compute what the masked one computed, in float64."""

import copy

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor.engines import open_session
from tersor.errors import ModelError, SpecError
from tersor.graph import export_onnx
from tersor.graph.smaller_kernels import ShiftedConvolution, shift_kernels_, shrink_kernels_


def masked(layer, keep):
    """The layer in float64, alone in a network, with the kernel positions of `keep` (kernel or weight)."""
    with torch.no_grad():
        layer.double().weight.mul_(keep)
    return nn.Sequential(layer)


def same(first, second, inputs):
    expected, found = first(inputs), second(inputs)
    scale = expected.abs().max().clamp(min=1)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-12 * scale)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_pattern_of_positions_is_exact(data):
    rank = data.draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 4)] * rank)
    kernel, dilation = data.draw(each), data.draw(st.tuples(*[st.integers(1, 2)] * rank))
    stride = data.draw(st.tuples(*[st.integers(1, 3)] * rank))
    padding = data.draw(st.tuples(*[st.integers(0, 3)] * rank))
    groups = data.draw(st.sampled_from([1, 2]))
    if data.draw(st.booleans()) and set(stride) == {1} and all(k % 2 for k in kernel):
        padding = "same"
    torch.manual_seed(0)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](
        4, 6, kernel, stride, padding, dilation, groups, bias=data.draw(st.booleans())
    )
    count = layer.weight[0, 0].numel()
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    network = masked(layer, keep.view(kernel))
    inputs = torch.randn([2, 4, *[9, 8, 7][:rank]]).double()
    smaller = copy.deepcopy(network)
    changes = shrink_kernels_(smaller)
    assert same(network, smaller, inputs)
    for change in changes:
        assert change.before == kernel and (change.reason == "") == (change.after != kernel)
    left = [p for p in smaller.parameters() if p.ndim > 1]
    if rank == 1 and count > 1 and not (keep[0] and keep[-1]):
        assert left[0].numel() < layer.weight.numel()


def test_a_row_and_a_column_gone_make_a_2x2_kernel_with_padding_in_front():
    keep = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 0, 0]])
    network = masked(nn.Conv2d(3, 5, 3, padding=1), keep)
    (change,) = shrink_kernels_(network)
    assert (change.layer, change.before, change.after) == ("0", (3, 3), (2, 2))
    assert change.macs_share == pytest.approx(4 / 9)
    pad, convolution = network[0]
    assert pad.padding == (1, 0, 0, 1) and convolution.padding == (0, 0)


def test_both_ends_gone_need_no_layer_in_front_and_corners_become_dilation():
    middle = torch.zeros(3, 3)
    middle[1] = 1
    network = masked(nn.Conv2d(3, 5, 3, padding=1), middle)
    shrink_kernels_(network)
    assert network[0].kernel_size == (1, 3) and network[0].padding == (0, 1)
    corners = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]])
    network = masked(nn.Conv2d(3, 5, 3, padding=1), corners)
    shrink_kernels_(network)
    assert network[0].kernel_size == (2, 2) and network[0].dilation == (2, 2)


def test_what_is_left_alone_is_said():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv2d(4, 4, 1),
    )
    reasons = {change.layer: change.reason for change in shrink_kernels_(network)}
    assert set(reasons) == {"0", "1", "2"} and all(reasons.values())
    assert "reflect" in reasons["1"] and "transposed" in reasons["2"]


def test_a_layer_in_two_places_is_refused():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        layer.weight[:, :, 0] = 0
    with pytest.raises(ModelError, match=r"'0' is also '1'"):
        shrink_kernels_(nn.Sequential(layer, layer))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([0.05, 0.5, 1.0]), st.integers(1, 2))
def test_a_sum_of_shifted_convolutions_is_exact(seed, density, stride):
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 6, (3, 2), stride, 1, dilation=2, bias=seed % 2 == 0)
    network = masked(layer, torch.rand(6, 1, 3, 2) < density)
    shifted = copy.deepcopy(network)
    (change,) = shift_kernels_(shifted, ["0"])
    assert same(network, shifted, torch.randn(2, 4, 9, 8).double())
    stripes = int((layer.weight != 0).any(1).sum())
    assert change.macs_share == pytest.approx(stripes / 36)
    kept = sum(weight.numel() for weight in shifted[0].weights)
    assert kept == 4 * stripes


def test_both_run_on_the_engine():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, padding=1)
    keep = torch.rand(8, 1, 3, 3) < 0.4
    keep[:, :, 0] = False
    with torch.no_grad():
        layer.weight.mul_(keep)
    network = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    inputs = torch.randn(4, 3, 6, 6)
    smaller, shifted = copy.deepcopy(network), copy.deepcopy(network)
    shrink_kernels_(smaller)
    shift_kernels_(shifted, ["0"])
    assert isinstance(shifted[0], ShiftedConvolution)
    for candidate in (smaller, shifted):
        session = open_session(export_onnx(candidate, (3, 6, 6)), threads=1)
        found = torch.from_numpy(session.run(inputs.numpy()))
        assert torch.allclose(found, network(inputs), atol=1e-5), onnxruntime.__version__


def test_layers_that_cannot_be_shifted_are_refused():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(3, 3))
    for name in ("0", "1", "nothing"):
        with pytest.raises(SpecError, match=f"'{name}' cannot become"):
            shift_kernels_(network, [name])
