"""The simulation is the function that ONNX defines, computed by hand here."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tersor.engines import ENGINES, open_session
from tersor.engines.simulation import products_in_float, simulate
from tersor.errors import EngineError
from tersor.graph import export_onnx


def model(nodes, held, width):
    values = [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "classes"])
    graph = helper.make_graph(nodes, "g", [image], [logits], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.integers(0, 255), st.floats(0.01, 0.1))
def test_codes_are_computed_as_the_standard_writes_them(seed, zero_point, scale):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-128, 128, (6, 4)).astype(np.int8)
    held = {
        "s": np.float32(scale), "z": np.uint8(zero_point), "w": weight,
        "ws": rng.uniform(0.01, 0.1, 4).astype(np.float32), "wz": np.zeros(4, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["f"], axis=1),
        helper.make_node("MatMul", ["d", "f"], ["y"]),
    ]
    x = rng.normal(0, 5, (3, 6)).astype(np.float32)
    codes = np.clip(np.rint(x / held["s"]) + zero_point, 0, 255)  # half to even
    expected = ((codes - zero_point) * scale) @ (weight.astype(float) * held["ws"])
    found = simulate(model(nodes, held, 6), 1).run(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.booleans(), st.booleans())
def test_integer_products_are_exact_where_sums_of_16_bits_are_not(seed, centred, centred_weight):
    rng = np.random.default_rng(seed)
    a = rng.integers(200, 256, (2, 32)).astype(np.uint8)
    b = rng.integers(100, 128, (32, 3)).astype(np.int8)
    zero_points = [np.uint8(7), rng.integers(-9, 9, 3).astype(np.int8)]
    names = ["az" if centred else "", "bz" if centred_weight else ""]
    held = {"b": b, "az": zero_points[0], "bz": zero_points[1]}
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.UINT8),
        helper.make_node("MatMulInteger", ["a", "b", *names], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
    ]
    left = a.astype(np.int64) - (7 if centred else 0)
    right = b.astype(np.int64) - (zero_points[1] if centred_weight else 0)
    graph = model(nodes, held, 32)
    found = simulate(graph, 1).run(a.astype(np.float32))
    assert np.array_equal(found, (left @ right).astype(np.float32))
    assert "MatMulInteger" in {node.op_type for node in graph.graph.node}  # the given one is kept
    rewritten = products_in_float(graph)
    onnx.checker.check_model(rewritten)
    assert "MatMulInteger" not in {node.op_type for node in rewritten.graph.node}


def test_a_float_graph_is_its_own_simulation():
    torch.manual_seed(0)
    graph = export_onnx(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()), (3, 5, 5))
    assert products_in_float(graph) is graph
    x = np.random.default_rng(0).standard_normal((4, 3, 5, 5)).astype(np.float32)
    np.testing.assert_allclose(
        simulate(graph).run(x), open_session(graph).run(x), rtol=1e-4, atol=1e-5
    )


def test_the_measure_is_no_candidate_and_names_itself_in_errors():
    assert not ENGINES["simulation"].may_be_chosen
    with pytest.raises(EngineError, match=r"^simulation runs an onnx\.ModelProto"):
        simulate(nn.Flatten())
