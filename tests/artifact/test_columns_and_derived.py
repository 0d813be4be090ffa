"""The skeleton's columns give back every byte; derived tensors are what they are derived from; the
state beside the graph."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import tersor
from tersor.artifact import derived, inspect, load, pack, save
from tersor.artifact.columns import COLUMNS, PLAIN, collapse, expand
from tersor.errors import ArtifactError, ModelError


def chain(number):
    """A graph of quantized layers behind one another, named as exporters do."""
    nodes, tensors, values = [], [], []
    last = "input"
    for layer in range(number):
        name = f"blocks.{layer}.conv"
        tensors += [
            numpy_helper.from_array(np.int8([[1]]), f"{name}.weight_quantized"),
            numpy_helper.from_array(np.float32(0.5), f"{name}.weight_scale"),
        ]
        coded = [f"{name}.weight_quantized", f"{name}.weight_scale"]
        made = f"{name}.weight_dequantized"
        nodes.append(
            helper.make_node("DequantizeLinear", coded, [made], name=f"{made}_DequantizeLinear")
        )
        nodes.append(helper.make_node("Gemm", [last, made], [f"out_{layer}"], name=f"n{layer}"))
        last = f"out_{layer}"
        values.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", 1]))
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 1]) for n in ("input", last)
    ]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors, value_info=values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key="author", value="someone")
    return model


def test_a_graph_of_repeated_layers_shrinks_and_comes_back():
    skeleton = pack(chain(30), quick=True).skeleton
    columns = collapse(skeleton)
    assert columns[0] == COLUMNS and len(columns) < len(skeleton) / 3
    assert expand(memoryview(columns), len(skeleton)) == skeleton


@given(st.binary(max_size=300))
def test_any_bytes_come_back(data):
    columns = collapse(data)
    assert expand(memoryview(columns), len(data)) == data


@given(st.data())
def test_damaged_columns_are_refused_or_give_as_many_bytes(data):
    skeleton = pack(chain(2), quick=True).skeleton
    columns = bytearray(collapse(skeleton))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(columns) - 1))
        columns[place] = data.draw(st.integers(0, 255))
    try:
        found = expand(memoryview(bytes(columns)), len(skeleton))
    except ArtifactError:
        return
    assert len(found) == len(skeleton)


def test_bytes_in_another_order_are_kept_as_they_are():
    model = chain(1)
    head = model.SerializeToString(deterministic=True)
    turned = onnx.ModelProto.FromString(head)
    odd = b"\x3a\x02\x0a\x00" + head[:2]  # the graph before the version
    assert collapse(odd)[0] == PLAIN and turned == model
    assert expand(memoryview(collapse(odd)), len(odd)) == odd


def with_tensors(**tensors):
    model = chain(1)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()
    )
    return model


def test_copies_and_products_are_not_stored_twice(tmp_path):
    rng = np.random.default_rng(0)
    scale = rng.random(300).astype(np.float32)
    artifact = pack(
        with_tensors(
            a_scale=scale,
            input_scale=np.float32(0.123),
            b_bias_scale=np.float32(0.123) * scale,
            c_copy=scale,
            d_near=np.nextafter(scale, np.float32(2)),
        )
    )
    names = [name for name, encoding in artifact.encodings.items() if encoding == derived.NAME]
    assert names == ["b_bias_scale", "c_copy"]
    size_bytes = save(artifact, tmp_path / "a.tersor")
    found = load(tmp_path / "a.tersor")
    assert {n: a.tobytes() for n, a in found.tensors.items()} == {
        n: a.tobytes() for n, a in artifact.tensors.items()
    }
    rows = {row["name"]: row["size_bytes"] for row in inspect(found)}
    assert rows["b_bias_scale"] == 3 and rows["c_copy"] == 2
    assert save(found, tmp_path / "b.tersor") == size_bytes
    assert (tmp_path / "a.tersor").read_bytes() == (tmp_path / "b.tersor").read_bytes()


def test_a_source_that_changed_makes_a_derived_tensor_stored_again(tmp_path):
    scale = np.random.default_rng(0).random(300).astype(np.float32)
    artifact = pack(with_tensors(a_scale=scale, b_copy=scale))
    assert artifact.encodings["b_copy"] == derived.NAME
    artifact.tensors["a_scale"] = 2 * scale
    save(artifact, tmp_path / "a.tersor")
    found = load(tmp_path / "a.tersor")
    np.testing.assert_array_equal(found.tensors["b_copy"], scale)
    np.testing.assert_array_equal(found.tensors["a_scale"], 2 * scale)


def test_products_with_nan_and_infinity_are_compared_bit_for_bit():
    odd = np.array([np.nan, np.inf, 0, -0.0] * 8, np.float32)
    with np.errstate(all="ignore"):
        artifact = pack(with_tensors(s=np.float32(2), a=odd, b=np.float32(2) * odd, c=odd * 0))
    assert artifact.encodings["a"] != derived.NAME


def test_the_state_comes_back_beside_the_graph(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "bn1.running_mean": rng.standard_normal(64).astype(np.float32),
        "bn1.num_batches_tracked": np.array(17),
        "fc.weight": np.where(rng.random((32, 20)) < 0.1, rng.random((32, 20)), 0).astype(
            np.float32
        ),
        "order": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    }
    before = {name: array.copy() for name, array in state.items()}
    artifact = pack(chain(2), state=state)
    bare = save(pack(chain(2)), tmp_path / "bare.tersor")
    assert save(artifact, tmp_path / "a.tersor") > bare
    found = load(tmp_path / "a.tersor")
    assert list(found.state()) == sorted(state)
    for name, array in found.state().items():
        assert array.dtype == before[name].dtype and not array.flags.writeable
        np.testing.assert_array_equal(array, before[name])
        np.testing.assert_array_equal(state[name], before[name])
    assert found.to_onnx() == artifact.to_onnx() == pack(chain(2)).to_onnx()
    assert found.encodings["state/fc.weight"] == "sparse"
    assert [row["name"] for row in inspect(found)][-4:] == [
        f"state/{name}" for name in sorted(state)
    ]
    assert load(tmp_path / "bare.tersor").state() == {}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": np.zeros(2, np.complex64)}, "state 'a': .* complex64"),
        ({"a": np.array(["x"])}, "state 'a'"),
        ({"a": np.array([object()])}, "state 'a'"),
    ],
)
def test_a_state_that_a_file_may_not_hold_is_refused(state, message):
    with pytest.raises(ArtifactError, match=message):
        pack(chain(1), state=state)
    for name in ("", "../x", "a\nb"):
        with pytest.raises((ArtifactError, ModelError), match=r"name|characters"):
            pack(chain(1), state={name: np.zeros(2)})


def test_quick_packing_is_larger_and_holds_the_same(tmp_path):
    rng = np.random.default_rng(0)
    codes = np.repeat(np.round(rng.laplace(0, 2, (32, 16, 1))), 9, axis=2).reshape(32, 16, 3, 3)
    graph = with_tensors(codes=codes.astype(np.int8))
    sizes = [save(pack(graph, quick=quick), tmp_path / "a.tersor") for quick in (False, True)]
    assert sizes[0] < 0.7 * sizes[1]
    assert load(tmp_path / "a.tersor").to_onnx() == pack(graph).to_onnx()


def test_a_file_runs_without_torch(tmp_path):
    import subprocess
    import sys

    save(pack(chain(3)), tmp_path / "a.tersor")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, tersor\n"
        "session = tersor.open_session(tersor.load(sys.argv[1]), engine='onnxruntime')\n"
        "print(session.run(np.ones((2, 1), np.float32)).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.tersor"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[[0.125], [0.125]]", done.stderr


def test_public_names_are_there():
    assert {"load", "pack", "save"} <= set(tersor.__all__)
