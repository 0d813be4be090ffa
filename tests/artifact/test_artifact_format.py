"""pack, save, load, to_onnx: what goes in comes out, bit for bit; equal content, equal bytes."""

import copy
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from tersor.artifact import ENCODINGS, Artifact, inspect, inspect_file, load, pack, save
from tersor.artifact.encoding import DTYPES
from tersor.errors import ArtifactError, ModelError


def graph_of(*initializers, nodes=(), **options):
    """A graph that adds nothing: Identity from input to output, and the initializers."""
    shape = ["batch", 4]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["input"], ["output"], name="same"), *nodes],
            "tiny",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
            list(initializers),
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
        **options,
    )


def network(density=1.0):
    """input (batch, 4) -> Gemm -> Relu -> Gemm -> output (batch, 3), float32."""
    rng = np.random.default_rng(3)
    first = rng.standard_normal((64, 4)).astype(np.float32)
    first[rng.random(first.shape) >= density] = 0
    second = rng.standard_normal((3, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["input", "first"], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "second"], ["output"], transB=1),
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])],
            [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def bits(model):
    return {
        t.name: (t.data_type, tuple(t.dims), numpy_helper.to_array(t).tobytes())
        for t in model.graph.initializer
    }


def typed(array, name):
    """A TensorProto that keeps its elements in float_data, int32_data, ... instead of raw_data."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())


SAMPLES = {
    "bool": [True, False, True],
    "float16": [1.5, -0.0, 6e-8],
    "float32": [1.5, -0.0, 1e-45],
    "float64": [0.1, -0.0, 5e-324],
    "int8": [-128, 0, 127],
    "int32": [-(2**31), 0, 2**31 - 1],
    "int64": [-(2**63), 0, 2**63 - 1],
    "uint8": [0, 1, 255],
}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("make", [numpy_helper.from_array, typed])
def test_every_type_comes_back_from_raw_and_typed_fields(tmp_path, make, dtype):
    graph = graph_of(make(np.array(SAMPLES[dtype], dtype), "weight"))
    save(pack(graph), tmp_path / "a.tersor")
    assert bits(load(tmp_path / "a.tersor").to_onnx()) == bits(graph)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (2, 1, 3), (1,) * 8], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_every_shape_comes_back(tmp_path, shape, dtype):
    graph = graph_of(numpy_helper.from_array(np.ones(shape, dtype), "weight"))
    save(pack(graph), tmp_path / "a.tersor")
    back = load(tmp_path / "a.tersor")
    assert back.tensors["weight"].shape == shape
    assert bits(back.to_onnx()) == bits(graph)


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    arrays=st.dictionaries(
        st.from_regex(r"[a-zA-Z][a-z0-9_./]{0,12}", fullmatch=True).filter(lambda n: ".." not in n),
        st.sampled_from(sorted(DTYPES)).flatmap(
            lambda d: hnp.arrays(DTYPES[d], hnp.array_shapes(min_dims=0, max_dims=3, max_side=6))
        ),
        max_size=5,
    )
)
def test_round_trip_property(tmp_path, arrays):
    graph = graph_of(*(numpy_helper.from_array(np.array(a), n) for n, a in arrays.items()))
    artifact = pack(graph)
    size_bytes = save(artifact, tmp_path / "a.tersor")
    assert size_bytes == (tmp_path / "a.tersor").stat().st_size
    back = load(tmp_path / "a.tersor")
    assert bits(back.to_onnx()) == bits(graph)
    assert back.skeleton == artifact.skeleton and back.encodings == artifact.encodings
    assert list(back.tensors) == sorted(arrays)
    save(back, tmp_path / "b.tersor")
    assert (tmp_path / "a.tersor").read_bytes() == (tmp_path / "b.tersor").read_bytes()


def test_the_graph_computes_the_same(tmp_path):
    graph = network(density=0.3)
    save(pack(graph), tmp_path / "a.tersor")
    inputs = {"input": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)}
    outputs = [
        onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, inputs)[0]
        for model in (graph, load(tmp_path / "a.tersor").to_onnx())
    ]
    assert outputs[0].tobytes() == outputs[1].tobytes()
    onnx.checker.check_model(load(tmp_path / "a.tersor").to_onnx(), full_check=True)


def test_pack_and_save_leave_their_input_alone(tmp_path):
    graph = network(0.5)
    before = graph.SerializeToString(deterministic=True)
    plan = {"layers": [1, 2]}
    artifact = pack(graph, plan=plan)
    skeleton, tensors = artifact.skeleton, {n: a.tobytes() for n, a in artifact.tensors.items()}
    save(artifact, tmp_path / "a.tersor")
    artifact.to_onnx()
    plan["layers"].append(3)
    assert graph.SerializeToString(deterministic=True) == before
    assert artifact.skeleton == skeleton and artifact.plan == {"layers": [1, 2]}
    assert {n: a.tobytes() for n, a in artifact.tensors.items()} == tensors


def test_tensors_cannot_be_written_to(tmp_path):
    artifact = pack(network(0.1))
    save(artifact, tmp_path / "a.tersor")
    for held in (artifact, load(tmp_path / "a.tersor")):
        for array in held.tensors.values():
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_equal_content_gives_equal_bytes_whatever_the_order(tmp_path):
    one, two = (numpy_helper.from_array(np.full(3, i, np.float32), n) for i, n in enumerate("ab"))
    plan = {"b": 1, "a": [True, None, 0.1, "\u00e9"]}
    artifact = pack(graph_of(one, two), plan=plan)
    turned = Artifact(
        artifact.skeleton,
        dict(reversed(artifact.tensors.items())),
        dict(reversed(artifact.encodings.items())),
        dict(reversed(plan.items())),
        {},
    )
    save(artifact, tmp_path / "a.tersor")
    save(turned, tmp_path / "b.tersor")
    assert (tmp_path / "a.tersor").read_bytes() == (tmp_path / "b.tersor").read_bytes()


def test_pruned_weights_make_the_file_smaller(tmp_path):
    sizes = [save(pack(network(density)), tmp_path / "a.tersor") for density in (1.0, 0.5, 0.1)]
    assert sizes[0] > sizes[1] > sizes[2]
    artifact = load(tmp_path / "a.tersor")
    assert artifact.encodings["first"] == "sparse"


def test_plan_and_provenance_come_back(tmp_path):
    plan = {"kind": "plan", "layers": ({"layer": "conv1", "sparsity": 0.1},), "\u00fc": "\u2713"}
    provenance = {"seed": 0, "score": 0.1 + 0.2, "big": 2**63 - 1, "none": None, "empty": {}}
    save(pack(network(), plan=plan, provenance=provenance), tmp_path / "a.tersor")
    back = load(tmp_path / "a.tersor")
    assert back.plan == {**plan, "layers": [{"layer": "conv1", "sparsity": 0.1}]}
    assert back.provenance == provenance


def test_exporters_notes_and_their_paths_are_left_out(tmp_path):
    graph = network()
    secret = "File /home/someone/model.py"
    graph.metadata_props.add(key="pkg.torch.export", value=secret)
    graph.metadata_props.add(key="author", value="kept")
    graph.graph.doc_string = graph.graph.node[0].doc_string = secret
    for part in (
        graph.graph,
        graph.graph.node[1],
        graph.graph.input[0],
        graph.graph.initializer[0],
    ):
        part.metadata_props.add(key="trace", value=secret)
    artifact = pack(graph)
    save(artifact, tmp_path / "a.tersor")
    assert b"someone" not in artifact.skeleton
    assert [p.value for p in load(tmp_path / "a.tersor").to_onnx().metadata_props] == ["kept"]


def test_graphs_inside_nodes_and_constants_survive(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("Identity", ["one"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.array([1, 2], np.float32), "one")],
    )
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=inner, else_branch=inner),
    ]
    graph = graph_of(nodes=nodes)
    save(pack(graph), tmp_path / "a.tersor")
    assert load(tmp_path / "a.tersor").to_onnx() == graph


def test_inspection_adds_up_to_the_file(tmp_path):
    size_bytes = save(pack(network(0.1), plan={"p": 1}, provenance={"q": 2}), tmp_path / "a.tersor")
    account = inspect_file(tmp_path / "a.tersor")
    assert json.loads(json.dumps(account)) == account
    assert account["size_bytes"] == size_bytes and account["format_version"] == 2
    parts = account["header_bytes"] + account["skeleton_bytes"] + account["tensor_bytes"]
    assert size_bytes == 56 + parts
    assert account["tensor_bytes"] == sum(row["size_bytes"] for row in account["layers"])
    assert account["plan"] == {"p": 1} and account["provenance"] == {"q": 2}
    rows = inspect(tmp_path / "a.tersor")
    assert rows == account["layers"] == inspect(load(tmp_path / "a.tersor"))
    first = rows[0]
    stored = np.count_nonzero(load(tmp_path / "a.tersor").tensors["first"])
    assert first == {
        "name": "first",
        "shape": [64, 4],
        "dtype": "float32",
        "encoding": "sparse",
        "size_bytes": account["layers"][0]["size_bytes"],
        "bits_per_weight": account["layers"][0]["size_bytes"] / 32,
        "density": stored / 256,
    }


def test_inspecting_an_empty_tensor_divides_by_nothing():
    row = inspect(pack(graph_of(numpy_helper.from_array(np.ones((0, 2), np.int8), "none"))))[0]
    assert (row["size_bytes"], row["bits_per_weight"], row["density"]) == (0, 0, 0)


def external(tensor):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def in_constant(graph):
    node = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(2)))
    external(node.attribute[0].t)
    graph.graph.node.append(node)


def add(graph, array, name):
    graph.graph.initializer.append(numpy_helper.from_array(array, name))


BAD_GRAPHS = {
    "outside the file": lambda g: external(g.graph.initializer[0]),
    "data outside": in_constant,
    "type BFLOAT16": lambda g: g.graph.initializer.append(
        helper.make_tensor("x", TensorProto.BFLOAT16, [1], [1.0])
    ),
    "type STRING": lambda g: g.graph.initializer.append(
        helper.make_tensor("x", TensorProto.STRING, [1], ["a"])
    ),
    "'first' twice": lambda g: add(g, np.zeros(1), "first"),
    "'../x' holds '..'": lambda g: add(g, np.zeros(1), "../x"),
    "cannot be printed": lambda g: add(g, np.zeros(1), "a\nb"),
    "has 0 characters": lambda g: add(g, np.zeros(1), ""),
    "at most 8 dimensions": lambda g: add(g, np.zeros((1,) * 9), "deep"),
    "domain 'mine'": lambda g: g.graph.node.append(helper.make_node("Op", [], [], domain="mine")),
    "reads other files": lambda g: g.graph.node.append(
        helper.make_node("EPContext", [], [], domain="com.microsoft")
    ),
    "sparse initializers": lambda g: g.graph.sparse_initializer.add(),
    "functions of its own": lambda g: g.functions.add(name="f"),
    "training graphs": lambda g: g.training_info.add(),
    "imports the operator domain": lambda g: g.opset_import.add(domain="mine", version=1),
    "should be initializers": lambda g: g.graph.node.append(
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(600_000)))
    ),
    "does not match its shape": lambda g: setattr(g.graph.initializer[0], "raw_data", b"123"),
    "lacks an ONNX graph": lambda g: g.ClearField("opset_import"),
}


@pytest.mark.parametrize("message", list(BAD_GRAPHS))
def test_a_graph_that_a_file_may_not_hold_is_refused(message):
    graph = network()
    BAD_GRAPHS[message](graph)
    with pytest.raises(ModelError, match=r"cannot be packed: .*" + message.replace(".", r"\.")):
        pack(graph)


def looped():
    value = {}
    value["self"] = value
    return value


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"a": float("nan")}, r"plan\.a is nan"),
        ({"a": [float("inf")]}, r"plan\.a is inf"),
        ({"a": np.float32(1)}, r"plan\.a is of type numpy\.float32"),
        ({"a": {1: 2}}, "a key must be text, got 1"),
        ({"a": 2**64}, "more than 64 bits"),
        ({"a": "\ud800"}, "not Unicode"),
        ({"\ud800": 1}, "not Unicode"),
        ({"a": {1, 2}}, "of type builtins.set"),
        (looped(), "levels deep"),
    ],
)
def test_a_plan_that_is_not_json_is_refused(plan, message):
    with pytest.raises(ArtifactError, match=message):
        pack(network(), plan=plan)


def test_an_artifact_built_by_hand_is_held_to_the_same_rules(tmp_path):
    good = pack(network())
    fields = ("skeleton", "tensors", "encodings", "plan", "provenance")
    other = {**good.tensors, "first": good.tensors["first"].astype(np.float64)}
    complex_ = {**good.tensors, "first": good.tensors["first"].astype(np.complex64)}
    for change, message in [
        ({"tensors": {}}, "encodings must name"),
        ({"tensors": {}, "encodings": {}}, "'first' has no data"),
        ({"tensors": other}, "'first' is float64"),
        ({"tensors": complex_}, "complex64"),
        ({"encodings": {"first": "dense", "second": "rans"}}, "cannot be encoded as 'rans'"),
        ({"plan": {"a": float("nan")}}, "plan.a is nan"),
        ({"skeleton": b"junk"}, "not an ONNX model|unknown field"),
    ]:
        broken = Artifact(**{**{f: copy.copy(getattr(good, f)) for f in fields}, **change})
        with pytest.raises(ArtifactError, match=message):
            save(broken, tmp_path / "a.tersor")
    assert not list(tmp_path.iterdir())


def test_an_artifact_over_the_limits_is_refused_before_it_is_written(tmp_path):
    good = pack(network(), provenance={"log": "x" * (17 << 20)})
    with pytest.raises(ArtifactError, match=r"header would take 1782.* at most 1048576"):
        save(good, tmp_path / "a.tersor")
    half = np.broadcast_to(np.float32(0), 1 << 28)  # 1 GiB in name only
    tensors = {"first": half, "second": half}
    with pytest.raises(ArtifactError, match="take 2147483648 bytes; at most 2147483647"):
        save(Artifact(good.skeleton, tensors, good.encodings, {}, {}), tmp_path / "a.tersor")
    names = dict.fromkeys(map(str, range(100_001)), half)
    with pytest.raises(ArtifactError, match="100001 tensors; at most 100000"):
        save(Artifact(good.skeleton, names, {}, {}, {}), tmp_path / "a.tersor")
    assert not list(tmp_path.iterdir())


def test_a_tensor_in_another_memory_order_is_written_in_c_order(tmp_path):
    good = pack(network())
    array = np.asfortranarray(good.tensors["first"])
    turned = Artifact(good.skeleton, {**good.tensors, "first": array}, good.encodings, {}, {})
    save(turned, tmp_path / "a.tersor")
    assert bits(load(tmp_path / "a.tersor").to_onnx()) == bits(turned.to_onnx()) == bits(network())


def test_torch_is_not_needed(tmp_path):
    save(pack(network()), tmp_path / "a.tersor")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tersor.artifact import load, inspect_file\n"
        "load(sys.argv[1]).to_onnx(); inspect_file(sys.argv[1])\n"
        "sys.exit(any(name.split('.')[0] == 'torch' and sys.modules[name] for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.tersor"], check=True)


def test_every_encoding_is_known_by_a_name():
    assert {"dense", "codes", "planes"} <= set(ENCODINGS)
