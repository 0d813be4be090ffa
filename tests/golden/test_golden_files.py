"""Files of every released format version load for ever, bit for bit.

`plain_v1.tersor` was written once by `save` at format version 1 and is never written again.
"""

import pathlib

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tersor.artifact import FORMAT_VERSION, inspect_file, load, save

HERE = pathlib.Path(__file__).parent
TENSORS = {
    "bool": np.array([[True], [False]]),
    "empty": np.zeros((0, 3), np.float32),
    "float16": np.array([0x3E00, 0x8000, 0x7E01], np.uint16).view(np.float16),
    "float32": np.array([0x3FC00000, 0x80000000, 0x7FC00001, 1], np.uint32).view(np.float32),
    "float64": np.array([0.1, -0.0, np.pi]),
    "int32": np.array([-(2**31), 0, 2**31 - 1], np.int32),
    "int64": np.array([-(2**63), 0, 2**63 - 1]),
    "int8": np.array([-128, 0, 127], np.int8),
    "scalar": np.array(0.25, np.float32),
    "sparse": np.where(np.arange(60) % 13 == 5, -np.arange(60) / 8, 0).astype(np.float32),
    "uint8": np.array([0, 1, 255], np.uint8),
}
PLAN = {"kind": "plan", "layers": [{"layer": "conv1", "sparsity": 0.9}]}
PROVENANCE = {"note": "golden \u00e9", "seed": 0, "value": 0.1}


def golden_graph():
    """The graph in `plain_v1.tersor`."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "golden",
        value[:1],
        value[1:],
        [numpy_helper.from_array(array, name) for name, array in TENSORS.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
        producer_name="tersor-golden",
    )


def test_the_file_of_version_1_loads_bit_for_bit():
    artifact = load(HERE / "plain_v1.tersor")
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in artifact.tensors.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in TENSORS.items()
    }
    assert artifact.to_onnx() == golden_graph()
    assert (artifact.plan, artifact.provenance) == (PLAN, PROVENANCE)
    assert artifact.encodings["sparse"] == "bitmap" and artifact.encodings["float32"] == "dense"


def test_every_released_version_has_a_golden_file():
    versions = {inspect_file(path)["format_version"] for path in HERE.glob("*.tersor")}
    assert versions == set(range(1, FORMAT_VERSION + 1))


@pytest.mark.parametrize("path", sorted(HERE.glob("*.tersor")), ids=lambda p: p.stem)
def test_a_golden_file_survives_being_saved_again(path, tmp_path):
    artifact = load(path)
    save(artifact, tmp_path / "again.tersor")
    again = load(tmp_path / "again.tersor")
    assert again.to_onnx() == artifact.to_onnx() and again.encodings == artifact.encodings
