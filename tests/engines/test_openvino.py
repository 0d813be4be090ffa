"""OpenVINO computes what the graph says, reports to nobody, and fails in one line."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from tersor.artifact import pack, save
from tersor.engines import open_session
from tersor.engines import openvino as engine_module
from tersor.engines.agreement import agreement
from tersor.engines.simulation import simulate
from tersor.errors import EngineError, MissingExtraError
from tersor.graph import export_onnx
from tersor.methods.quantize import quantize
from tersor.specs import Quantize

INSTALLED = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not INSTALLED, reason="the extra openvino is not installed")
SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return export_onnx(module.eval(), SHAPE)


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


def tiny_graph(outputs=1, kind=TensorProto.FLOAT):
    nodes = [helper.make_node("Relu", ["x"], [f"y{i}"]) for i in range(outputs)]
    values = [helper.make_tensor_value_info(f"y{i}", kind, ["n", 2]) for i in range(outputs)]
    image = helper.make_tensor_value_info("x", kind, ["n", 2])
    made = helper.make_graph(nodes, "g", [image], values)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("engine", ["openvino", "openvino_bf16", "openvino_streams"])
def test_without_the_library_the_extra_is_named(engine, graph, monkeypatch):
    monkeypatch.setattr(engine_module, "has_bf16", lambda: True)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tersor\[openvino\]'"):
        open_session(graph, engine=engine)


def test_a_processor_without_bfloat16_is_told_of_the_other_engine(graph, monkeypatch):
    monkeypatch.setattr(engine_module, "has_bf16", lambda: False)
    with pytest.raises(EngineError, match=r"no bfloat16.*'openvino'"):
        open_session(graph, engine="openvino_bf16")


@needs_openvino
def test_float_stays_float32_also_where_the_processor_has_bfloat16(graph):
    found = agreement(
        simulate(graph, 1).run(images(32)), open_session(graph, engine="openvino").run(images(32))
    )
    assert found.relative < 1e-5  # bfloat16 has steps of 2^-8


@needs_openvino
def test_integer_weights_do_not_quantize_the_inputs(graph):
    small = quantize(graph, Quantize(mode="weight_only")).graph
    found = agreement(
        simulate(small, 1).run(images(32)), open_session(small, engine="openvino").run(images(32))
    )
    assert found.relative < 1e-5


@needs_openvino
def test_codes_of_seven_bits_give_the_right_function_on_every_processor(graph):
    spec = Quantize(bits=7, edge_bits=0, observer="minmax", num_calibration=64)
    small = quantize(graph, spec, [images(64)]).graph
    found = agreement(
        simulate(small, 1).run(images(64)), open_session(small, engine="openvino").run(images(64))
    )
    assert found.right, str(found)


@needs_openvino
def test_a_packed_file_gives_the_logits_of_its_graph(graph):
    packed = open_session(pack(graph), engine="openvino", threads=1).run(images(2))
    assert np.array_equal(packed, open_session(graph, engine="openvino", threads=1).run(images(2)))


@needs_openvino
@pytest.mark.parametrize(
    "model, words",
    [(tiny_graph(outputs=2), "2 outputs"), (tiny_graph(kind=TensorProto.INT32), "inputs are")],
)
def test_a_graph_that_is_no_classifier_is_refused(model, words):
    with pytest.raises(EngineError, match=words):
        open_session(model, engine="openvino")


@needs_openvino
def test_a_broken_graph_is_refused_in_one_line():
    model = tiny_graph()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match="openvino: the graph cannot be loaded: ") as caught:
        open_session(model, engine="openvino")
    assert "\n" not in str(caught.value)
    assert "Exception from" not in str(caught.value)


@needs_openvino
def test_nothing_is_reported_and_nothing_written_to_the_home(graph, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    save(pack(graph), tmp_path / "net.tersor")
    code = (
        "import sys, tersor; "
        "tersor.open_session(tersor.load(sys.argv[1]), engine='openvino', threads=1); "
        "import openvino; openvino.convert_model; "
        "sys.exit(any(name.startswith('openvino_telemetry') for name in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "net.tersor")]
    told = {**os.environ, "HOME": str(home), "LOCALAPPDATA": str(home)}
    assert subprocess.run(command, env=told, check=False).returncode == 0
    assert [path.name for path in home.iterdir() if path.name.lower().startswith("intel")] == []


@needs_openvino
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_of_a_batch_come_back_in_their_order(graph, count):
    batch = images(count)
    whole = open_session(graph, engine="openvino", threads=1).run(batch)
    shared = open_session(graph, engine="openvino_streams", threads=3).run(batch)
    np.testing.assert_allclose(shared, whole, rtol=1e-4, atol=1e-5)
    assert len(np.unique(np.round(whole, 3), axis=0)) == count  # an exchanged order would show
