"""Graphs that this engine must refuse, and files it must take."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from tersor.artifact import pack
from tersor.engines import open_session
from tersor.errors import EngineError
from tersor.graph import export_onnx


def tiny_graph(outputs=1, kind=TensorProto.FLOAT):
    nodes = [helper.make_node("Relu", ["x"], [f"y{i}"]) for i in range(outputs)]
    values = [helper.make_tensor_value_info(f"y{i}", kind, ["n", 2]) for i in range(outputs)]
    image = helper.make_tensor_value_info("x", kind, ["n", 2])
    graph = helper.make_graph(nodes, "g", [image], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_packed_file_gives_the_logits_of_its_graph():
    torch.manual_seed(0)
    graph = export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2))
    batch = np.random.default_rng(0).standard_normal((2, 3, 2, 2)).astype(np.float32)
    packed = open_session(pack(graph), threads=1).run(batch)
    assert np.array_equal(packed, open_session(graph, threads=1).run(batch))


@pytest.mark.parametrize(
    "graph, words",
    [
        (tiny_graph(outputs=2), "2 outputs"),
        (tiny_graph(kind=TensorProto.INT32), "inputs are"),
        (onnx.ModelProto(), "outputs"),
    ],
)
def test_a_graph_that_is_no_classifier_is_refused(graph, words):
    with pytest.raises(EngineError, match=words):
        open_session(graph)


def test_a_broken_graph_is_refused_in_one_line():
    graph = tiny_graph()
    graph.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match="cannot be loaded") as caught:
        open_session(graph)
    assert "\n" not in str(caught.value)
