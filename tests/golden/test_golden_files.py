"""Files of every released format version load for ever, bit for bit.

Each was written once by `save` at its version and is never written again: `plain_v1.tersor` at 1,
`every_encoding_v2.tersor` at 2.
"""

import pathlib

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tersor.artifact import ENCODINGS, FORMAT_VERSION, inspect_file, load, save

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


def golden_graph(tensors):
    """The graph of the golden files, with `tensors`."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "golden",
        value[:1],
        value[1:],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
        producer_name="tersor-golden",
    )


def numbers(seed, *shape):
    """Whole numbers from 0 to 2^31 - 1 by a rule of our own: no library's generator may change them."""
    found, state = np.empty(int(np.prod(shape)), np.int64), seed
    for place in range(found.size):
        state = (1103515245 * state + 12345) % 2**31
        found[place] = state >> 7
    return found.reshape(shape)


def second_tensors():
    """Every encoding of version 2, every form of `codes`, every flag of its contexts."""
    kernel = numbers(1, 16, 12, 1, 1) % 13 - 6 + (numbers(2, 16, 12, 3, 3) % 8 == 0)
    striped = kernel * (numbers(3, 16, 1, 3, 3) % 3 == 0) * (numbers(4, 1, 12, 1, 1) % 4 > 0)
    turned = np.where(numbers(5, 1, 64) % 5 > 2, numbers(6, 40, 64) % 3 - 1, 0)
    wide = (kernel * 20 + numbers(7, 16, 12, 3, 3) % 21 - 10).clip(-128, 127)
    rows = numbers(8, 6, 42) % (2 + 40 * (np.arange(6)[:, None] % 2))
    return {
        **TENSORS,
        "context": kernel.astype(np.int8),
        "context.striped": striped.astype(np.int8),
        "context.turned": turned.astype(np.int8),
        "context.wide": wide.astype(np.int8),
        "constant": np.full((7, 3), 3, np.int8),
        "runs": (numbers(9, 500) % 5).astype(np.uint8),
        "runs.rows": rows.astype(np.uint8),
        "levels": np.float32([-1.5, -0.25, 0.0, 0.5, 2.0])[numbers(10, 24, 16) % 5],
        "planes": (numbers(11, 9, 20) / 2.0**24 - 60).astype(np.float32),
        "integers": (numbers(12, 64) * 512 - 2**32).astype(np.int64),
        "pruned": np.where(numbers(13, 16, 40) % 6 == 0, numbers(14, 16, 40) - 2**23, 0).astype(
            np.float32
        ),
        "product": np.float32(0.25) * (numbers(15, 40) / 2.0**24).astype(np.float32),
        "factor": (numbers(15, 40) / 2.0**24).astype(np.float32),
        "packed": (numbers(16, 30) % 2).astype(np.int8),
    }


def bits(tensors):
    return {n: (a.dtype, a.shape, a.tobytes()) for n, a in tensors.items()}


def test_the_file_of_version_1_loads_bit_for_bit():
    artifact = load(HERE / "plain_v1.tersor")
    assert bits(artifact.tensors) == bits(TENSORS)
    assert artifact.to_onnx() == golden_graph(TENSORS)
    assert (artifact.plan, artifact.provenance) == (PLAN, PROVENANCE)
    assert artifact.encodings["sparse"] == "bitmap" and artifact.encodings["float32"] == "dense"


def test_the_file_of_version_2_loads_bit_for_bit():
    artifact = load(HERE / "every_encoding_v2.tersor")
    tensors = second_tensors()
    assert bits(artifact.tensors) == bits({n: tensors[n] for n in sorted(tensors)})
    assert artifact.to_onnx() == golden_graph(tensors)
    assert (artifact.plan, artifact.provenance) == (PLAN, PROVENANCE)
    assert bits(artifact.state()) == bits({"running.mean": np.float32([0.5, -1.5])})
    assert set(artifact.encodings.values()) == {*ENCODINGS, "derived"}


def test_every_released_version_has_a_golden_file():
    versions = {inspect_file(path)["format_version"] for path in HERE.glob("*.tersor")}
    assert versions == set(range(1, FORMAT_VERSION + 1))


@pytest.mark.parametrize("path", sorted(HERE.glob("*.tersor")), ids=lambda p: p.stem)
def test_a_golden_file_survives_being_saved_again(path, tmp_path):
    artifact = load(path)
    save(artifact, tmp_path / "again.tersor")
    again = load(tmp_path / "again.tersor")
    assert again.to_onnx() == artifact.to_onnx() and again.encodings == artifact.encodings
