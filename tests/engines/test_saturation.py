"""Bounds of 16-bit sums against brute force, and which layers they are given for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from tersor.engines.saturation import quantized_layers, saturation


def codes(shape, low=-128, high=127):
    return arrays.arrays(np.int8, shape, elements=st.integers(low, high))


MATRICES = st.tuples(st.integers(1, 3), st.integers(1, 5)).flatmap(codes)


def product(weight, *, op="Conv", largest=255, quantized=True, name="layer"):
    """A graph with one product of `weight` codes with an activation of codes 0 to `largest`."""
    held = {f"{name}.weight_quantized": weight, "s": np.float32(1), "z": np.uint8(0)}
    held |= {"wz": np.int8(0), "low": np.uint8(0), "high": np.uint8(largest)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Clip", ["q", "low", "high"], ["c"]),
        helper.make_node("DequantizeLinear", ["c" if largest < 255 else "q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", [f"{name}.weight_quantized", "s", "wz"], ["w"]),
    ]
    turned = {"transB": 1} if op == "Gemm" else {}
    nodes.append(helper.make_node(op, ["d" if quantized else "x", "w"], ["y"], **turned))
    return graph_of(nodes, held)


def graph_of(nodes, held):
    values = [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], values))


def only(graph):
    (found,) = saturation(graph)
    return found


def brute_force(rows, pairs, largest):
    """The farthest sum of two products and the share of pairs that leave 16 bits, over every
    activation code."""
    activations = np.arange(largest + 1, dtype=np.int64)
    sums = [
        np.add.outer(activations * int(row[i]), activations * int(row[j]))
        for row in rows
        for i, j in pairs
    ]
    over = [bool((s < -32768).any() or (s > 32767).any()) for s in sums]
    farthest = max((int(v) for s in sums for v in (s.min(), s.max())), key=abs)
    return farthest, float(np.mean(over))


@settings(deadline=None, max_examples=60)
@given(MATRICES, st.sampled_from([15, 127, 128, 255]), st.booleans())
def test_bounds_are_those_of_brute_force(weight, largest, gemm):
    graph = product(weight if gemm else weight.T, op="Gemm" if gemm else "MatMul", largest=largest)
    found = only(graph)
    rows = np.pad(weight, ((0, 0), (0, weight.shape[1] % 2)))
    width = rows.shape[1]
    farthest, share = brute_force(rows, [(k, k + 1) for k in range(0, width, 2)], largest)
    assert abs(found.worst_pair_sum) == abs(farthest)
    assert found.share_of_pairs == pytest.approx(share)
    assert found.saturates == (share > 0)
    farthest, share = brute_force(rows, list(itertools.combinations(range(width), 2)), largest)
    assert abs(found.worst_any_pair_sum) == abs(farthest)
    assert found.may_saturate == (share > 0)


@given(codes((2, 3, 3, 3), low=-64, high=63))
def test_weights_of_seven_bits_never_saturate(weight):
    found = only(product(weight))
    assert not found.saturates
    assert not found.may_saturate


@given(codes((2, 4, 1, 1)))
def test_activations_of_seven_bits_never_saturate(weight):
    assert not only(product(weight, largest=127)).may_saturate


def test_neighbours_of_a_convolution_are_input_channels_at_one_position():
    weight = np.zeros((1, 2, 1, 2), np.int8)
    weight[0, :, 0, 0] = 100  # two channels, one position: one pair
    found = only(product(weight))
    assert (found.worst_pair_sum, found.share_of_pairs) == (255 * 200, 0.5)
    weight = np.zeros((1, 2, 1, 2), np.int8)
    weight[0, 0, 0, :] = 100  # one channel, two positions: neighbours in other kernels alone
    found = only(product(weight))
    assert (found.worst_pair_sum, found.saturates) == (255 * 100, False)
    assert (found.worst_any_pair_sum, found.may_saturate) == (255 * 200, True)


def test_a_layer_computed_in_float_has_no_integer_sums():
    weight = np.full((2, 4, 1, 1), 127, np.int8)
    assert saturation(product(weight, quantized=False)) == []
    assert only(product(weight, name="stem.0")).layer == "stem.0"
    assert quantized_layers(product(weight, name="stem.0")) == ["stem.0"]


@pytest.mark.parametrize("turned", [False, True])
def test_products_with_ranges_taken_at_run_time_count_too(turned):
    weight = np.array([[127, 127, 0, 0]], np.int8)  # one output of four inputs
    held = {"fc.weight_quantized": weight if turned else weight.T}
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])]
    source = "fc.weight_quantized"
    if turned:
        nodes.append(helper.make_node("Transpose", [source], ["t"], perm=[1, 0]))
        source = "t"
    nodes.append(helper.make_node("MatMulInteger", ["q", source, "z"], ["y"]))
    found = only(graph_of(nodes, held))
    assert (found.layer, found.worst_pair_sum, found.share_of_pairs) == ("fc", 255 * 254, 0.5)
