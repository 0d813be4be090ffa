"""`tersor inspect` and `tersor export` on files: tables, pictures, other forms that hold the same."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tersor
from tersor.cli import main


@pytest.fixture(scope="module")
def graph():
    """input (batch, 1, 8, 8) -> coded convolution -> Gemm -> output (batch, 3)."""
    rng = np.random.default_rng(0)
    tensors = {
        "conv.weight_quantized": np.round(rng.laplace(0, 2, (16, 1, 3, 3))).astype(np.int8),
        "conv.weight_scale": np.linspace(0.1, 0.4, 16, dtype=np.float32),
        "conv.weight_zero_point": np.zeros(16, np.int8),
        "fc.weight": rng.standard_normal((3, 16)).astype(np.float32),
        "fc.bias": np.float32([0.5, -0.5, 0]),
    }
    coded = [f"conv.weight_{part}" for part in ("quantized", "scale", "zero_point")]
    nodes = [
        helper.make_node("DequantizeLinear", coded, ["conv.weight_dequantized"], axis=0),
        helper.make_node("Conv", ["input", "conv.weight_dequantized"], ["made"]),
        helper.make_node("GlobalAveragePool", ["made"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["output"], transB=1),
    ]
    made = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def small(graph, tmp_path_factory):
    path = tmp_path_factory.mktemp("contents") / "small.tersor"
    artifact = tersor.pack(graph, plan={"note": "p"}, state={"bn.running_mean": np.arange(4.0)})
    tersor.save(artifact, path)
    return path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_inspect_tells_tensors_bytes_and_what_is_left(capsys, small):
    code, said, _ = run(capsys, "inspect", small)
    assert code == 0
    assert "conv.weight_quantized" in said and "codes" in said
    assert "5 tensors below 64 elements" in said
    code, said, _ = run(capsys, "inspect", small, "--json")
    told = json.loads(said)
    assert {row["name"] for row in told["layers"]} >= {"fc.weight", "state/bn.running_mean"}
    whole = told["header_bytes"] + told["skeleton_bytes"] + told["tensor_bytes"]
    assert 56 + whole == told["size_bytes"] == small.stat().st_size


def test_inspect_draws_a_page_and_a_picture(capsys, small, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("page.html", "picture.svg"):
        code, _, _ = run(capsys, "inspect", small, "--out", tmp_path / name)
        text = (tmp_path / name).read_text()
        assert code == 0 and "conv.weight_quantized" in text and "small.tersor" in text
        assert "http:" not in text.replace("http://www.w3.org", "")
    page = (tmp_path / "page.html").read_text()
    assert "entropy-coded" in page and "state/bn.running_mean" in page


def test_a_picture_is_of_a_file(capsys, small, tmp_path):
    code, _, told = run(capsys, "inspect", "digits_net", "--out", tmp_path / "a.html")
    assert code == 2 and "a picture is made of a .tersor file" in told
    code, _, told = run(capsys, "inspect", small, "--out", tmp_path / "a.png")
    assert code == 2 and ".html or .svg" in told


def test_export_to_onnx_gives_the_graph(capsys, small, graph, tmp_path):
    code, _, _ = run(capsys, "export", small, "--to", "onnx", "--out", tmp_path / "a.onnx")
    assert code == 0 and onnx.load(tmp_path / "a.onnx") == graph


def test_export_to_torch_gives_floats_by_name(capsys, small, graph, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "a.safetensors"
    code, _, _ = run(capsys, "export", small, "--to", "torch", "--out", out)
    found = {name: tensor.numpy() for name, tensor in load_file(out).items()}
    held = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    weight = held["conv.weight_quantized"] * held["conv.weight_scale"][:, None, None, None]
    assert code == 0
    np.testing.assert_array_equal(found["conv.weight"], weight.astype(np.float32))
    np.testing.assert_array_equal(found["fc.weight"], held["fc.weight"])
    np.testing.assert_array_equal(found["bn.running_mean"], np.arange(4.0))


def test_export_to_openvino_computes_the_same(capsys, small, tmp_path):
    openvino = pytest.importorskip("openvino")
    out = tmp_path / "a.xml"
    code, said, _ = run(capsys, "export", small, "--to", "openvino", "--out", out, "--json")
    both = out.stat().st_size + out.with_suffix(".bin").stat().st_size
    assert code == 0 and json.loads(said)["size_bytes"] == both
    batch = np.random.default_rng(1).standard_normal((5, 1, 8, 8)).astype(np.float32)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    (found,) = openvino.compile_model(str(out), "CPU", settings)([batch]).values()
    wanted = tersor.open_session(tersor.load(small), threads=1).run(batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_export_names_the_forms(capsys, small, tmp_path):
    code, _, told = run(capsys, "export", small, "--to", "coreml", "--out", tmp_path / "a")
    assert code == 2 and "onnx, tersor, openvino, torch" in told
    code, _, told = run(capsys, "export", small, "--to", "openvino", "--out", tmp_path / "a.bin")
    assert code == 2 and ".xml" in told


def test_a_file_tells_machine_and_versions_but_no_directory(capsys, small, tmp_path):
    out = tmp_path / "again.tersor"
    code, _, _ = run(capsys, "export", small, "--to", "tersor", "--out", out)
    told = tersor.load(out).provenance
    assert code == 0 and told["model"] == "small.tersor" and told["machine"]["cpu"]
    assert {"python", "numpy", "tersor"} <= set(told["versions"])
    assert str(tmp_path.parent) not in json.dumps(told)
    np.testing.assert_array_equal(tersor.load(out).state()["bn.running_mean"], np.arange(4.0))
