"""Every kind of quantization: what is stored decodes to what runs, and what makes no sense says why."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tersor.artifact import pack
from tersor.artifact.inspection import inspect
from tersor.engines import open_session
from tersor.engines.onnxruntime import inference_session
from tersor.errors import BudgetError, DataError, SpecError
from tersor.graph import export_onnx
from tersor.graph.layers import graph_layers
from tersor.graph.qdq import as_matrix, as_weight
from tersor.methods.calibrate import with_outputs
from tersor.methods.quantize import plan, quantize
from tersor.specs import GRANULARITIES, WEIGHT_CODES, Quantize
from tersor.tensors.grids import GRIDS, fit_grid
from tersor.tensors.observers import OBSERVERS
from tersor.tensors.rounding import ROUNDINGS

SHAPE = (3, 12, 12)


class Net(nn.Module):
    """Plain, depthwise, grouped and linear layers, a sum, one layer used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2, bias=False)
        self.twice = nn.Conv2d(32, 32, 1)
        self.hidden = nn.Linear(32 * 9, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.depthwise(x)) + x
        x = torch.relu(self.grouped(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = nn.functional.avg_pool2d(x, 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def images(count, seed=0):
    """Neighbouring pixels alike, as in photographs: second-order roundings live on that."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 3, 4, 4)).repeat(3, 2).repeat(3, 3)
    return (coarse + 0.3 * rng.standard_normal((count, *SHAPE))).astype(np.float32)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return export_onnx(Net().eval(), SHAPE)


def constants(model):
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def decoded_weights(model, names):
    """The float weights that a loaded graph computes from its codes."""
    inner = [f"{name}.weight_dequantized" for name in names]
    session = inference_session(with_outputs(model, inner), 1, optimize=False)
    return dict(zip(names, session.run(inner, {"input": images(1)}), strict=True))


def allowed(**fields):
    try:
        return Quantize(**fields, num_calibration=32, group_size=5)
    except SpecError:
        return None


def bits_of(code):
    return {"binary": [1], "ternary": [2], "codebook": [1, 3]}.get(code, [2, 4])


KINDS = [
    spec
    for mode, code, symmetry, granularity in itertools.product(
        ("static", "dynamic", "weight_only"),
        WEIGHT_CODES,
        ("symmetric", "asymmetric"),
        GRANULARITIES,
    )
    for bits in bits_of(code)
    if (
        spec := allowed(
            mode=mode, code=code, bits=bits, symmetry=symmetry, granularity=granularity, edge_bits=0
        )
    )
]


def test_the_names_of_a_request_are_those_of_the_registries():
    assert set(WEIGHT_CODES) == set(GRIDS)
    for field, registry in (("observer", OBSERVERS), ("rounding", ROUNDINGS)):
        for name in registry:
            assert getattr(Quantize(**{field: name}), field) == name


@pytest.mark.parametrize(
    "spec", KINDS, ids=lambda s: f"{s.mode}-{s.code}{s.bits}-{s.symmetry[0]}-{s.granularity}"
)
def test_stored_codes_decode_to_the_fitted_grid_bit_for_bit(graph, spec):
    found = quantize(graph, spec, [images(32)])
    onnx.checker.check_model(found.graph)
    before, layers = constants(graph), {layer.name: layer for layer in graph_layers(graph)}
    coded = [d.layer for d in found.plan.layers if d.action != "keep"]
    assert coded == (["hidden", "head"] if spec.mode == "dynamic" else list(layers))
    assert {d.bits for d in found.plan.layers if d.action != "keep"} == {spec.bits}
    held = constants(found.graph)
    running = {} if spec.mode == "dynamic" else decoded_weights(found.graph, coded)
    for name in coded:
        assert held[f"{name}.weight_quantized"].itemsize == 1
        assert len(np.unique(held[f"{name}.weight_quantized"])) <= 2**spec.bits
        matrix = as_matrix(before[f"{name}.weight"], layers[name].axis)
        grid = fit_grid(
            spec.code,
            matrix,
            spec.bits,
            symmetric=spec.symmetry == "symmetric",
            granularity=spec.granularity,
            group_size=spec.group_size,
            search="mse",  # at fewer than 8 bits
        )
        if spec.mode != "dynamic":
            values = as_weight(
                grid.decode(grid.encode(matrix)), before[f"{name}.weight"].shape, layers[name].axis
            )
            assert np.array_equal(running[name], values)
    batch = images(16, seed=3)
    logits = open_session(found.graph, threads=1).run(batch)
    simulated = inference_session(found.graph, 1, optimize=False).run(None, {"input": batch})[0]
    assert np.abs(logits - simulated).max() <= 0.05 * np.abs(simulated).max() + 1e-5


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(code="codebook", bits=4), "multiply whole numbers"),
        (dict(code="power_of_two", bits=5), "multiply whole numbers"),
        (dict(granularity="per_group"), "one scale for each output channel"),
        (dict(code="binary", bits=2), "binary has 1 bit"),
        (dict(code="ternary", bits=3), "three values of 2 bits"),
        (dict(bits=1), "needs 2 bits or more"),
        (dict(bits=9), "1 to 8"),
        (dict(bits=0), "1 to 8"),
        (dict(activation_bits=1), "2 to 8"),
        (dict(symmetry="asymmetric"), "one zero point for each weight tensor"),
        (dict(mode="weight_only", code="ternary", bits=2, symmetry="asymmetric"), "its own values"),
        (dict(mode="weight_only", code="codebook", rounding="adaround"), "not evenly spaced"),
        (dict(mode="dynamic", activation_bits=4), "static and qat"),
        (dict(mode="weight_only", activation_symmetry="symmetric"), "static and qat"),
        (dict(code="ternary", bits=2, mean_bits=3.0), "choose between bits of code uniform"),
        (dict(mode="qat", rounding="gptq"), "takes no other rounding"),
        (dict(mean_bits=9.0), "0 .* or 1 to 8"),
        (dict(reestimate=True, granularity="per_tensor"), "scale of each output channel"),
        (dict(mean_bits=4.0, code_bytes=1000), "one limit said in two ways"),
        (dict(equalize=1), "true or false"),
        (dict(rounding="gtpq"), "Did you mean 'gptq'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(fields, words):
    with pytest.raises(SpecError, match=words):
        Quantize(**fields)


def test_training_is_not_done_on_a_graph(graph):
    with pytest.raises(SpecError, match=r"quantize_network"):
        plan(graph, Quantize(mode="qat"))


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_roundings_that_see_inputs_keep_the_outputs_better(graph, mode, rounding):
    batch = images(200, seed=9)
    expected = open_session(graph, threads=1).run(batch)
    errors = {}
    for name in ("nearest", rounding):
        spec = Quantize(mode=mode, bits=3, edge_bits=0, rounding=name, num_calibration=128)
        found = quantize(graph, spec, [images(128)])
        assert found.num_calibration == (128 if mode == "static" or name != "nearest" else 0)
        logits = open_session(found.graph, threads=1).run(batch)
        errors[name] = float(((logits - expected) ** 2).mean())
    assert errors[rounding] < 0.8 * errors["nearest"]


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_equalization_keeps_the_function_and_helps_one_scale_for_all(graph, granularity):
    batch = images(64, seed=4)
    expected = open_session(graph, threads=1).run(batch)
    fields = dict(mode="weight_only", bits=8, granularity=granularity, num_calibration=32)
    found = quantize(graph, Quantize(**fields, equalize=True), [images(32)])
    logits = open_session(found.graph, threads=1).run(batch)
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_bias_correction_takes_the_mean_error_back(mode):
    """A layer whose inputs are never negative, with all weights rounded up: a shift of the mean."""
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4)
    )
    with torch.no_grad():
        module[3].weight.abs_()
        module[3].weight[:, 0] = 1.0  # a wide range makes coarse steps
    graph = export_onnx(module.eval(), SHAPE)
    batch = images(128, seed=5)
    expected = open_session(graph, threads=1).run(batch)
    shift = {}
    for corrected in (False, True):
        spec = Quantize(
            mode=mode, bits=4, edge_bits=0, bias_correction=corrected, num_calibration=128
        )
        found = quantize(graph, spec, [images(128)])
        onnx.checker.check_model(found.graph)
        logits = open_session(found.graph, threads=1).run(batch)
        shift[corrected] = float(np.abs((logits - expected).mean(0)).max())
    assert shift[True] < 0.5 * shift[False]


@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_activations_of_few_bits_have_so_many_codes(graph, bits, symmetry):
    spec = Quantize(activation_bits=bits, activation_symmetry=symmetry, num_calibration=32)
    found = quantize(graph, spec, [images(32)])
    onnx.checker.check_model(found.graph)
    codes = [o for n in found.graph.graph.node for o in n.output if o.endswith("_limited")]
    assert codes
    watched = onnx.ModelProto()
    watched.CopyFrom(found.graph)
    for name in codes:
        watched.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)
        )
    session = inference_session(watched, 1, optimize=False)
    values = session.run(codes, {"input": 3 * images(16, seed=6)})  # beyond the calibrated range
    assert max(int(value.max()) for value in values) == 2**bits - 1
    if symmetry == "symmetric":
        held = constants(found.graph)
        points = {
            int(v) for n, v in held.items() if n.endswith("_zero_point") and v.dtype == np.uint8
        }
        assert points == {2 ** (bits - 1)}
    batch = images(16, seed=7)
    logits = open_session(found.graph, threads=1).run(batch)
    (simulated,) = inference_session(found.graph, 1, optimize=False).run(None, {"input": batch})
    assert np.abs(logits - simulated).max() <= 0.1 * np.abs(simulated).max()


def test_first_and_last_layer_keep_more_bits_unless_told(graph):
    bits = [d.bits for d in plan(graph, Quantize(bits=4)).layers]
    assert bits == [8, 4, 4, 4, 4, 8]
    assert {d.bits for d in plan(graph, Quantize(bits=4, edge_bits=0)).layers} == {4}


def test_mixed_precision_keeps_the_mean_and_spends_it_where_it_hurts(graph):
    spec = Quantize(mode="weight_only", mean_bits=4.5, num_calibration=64)
    found = quantize(graph, spec, [images(64)])
    weights = {layer.name: layer.num_weights for layer in graph_layers(graph)}
    bits = {d.layer: d.bits for d in found.plan.layers}
    mean = sum(bits[name] * count for name, count in weights.items()) / sum(weights.values())
    assert 4.0 < mean <= 4.5 and len(set(bits.values())) > 1
    uniform = quantize(graph, Quantize(mode="weight_only", bits=4, edge_bits=0))
    batch = images(200, seed=8)
    expected = open_session(graph, threads=1).run(batch)
    errors = [
        float(((open_session(each.graph, threads=1).run(batch) - expected) ** 2).mean())
        for each in (found, uniform)
    ]
    assert errors[0] < errors[1]


def test_a_limit_of_bytes_is_the_same_limit_as_its_mean_of_bits(graph):
    total = sum(layer.num_weights for layer in graph_layers(graph))
    by_mean, by_bytes = (
        quantize(graph, Quantize(mode="weight_only", num_calibration=64, **limit), [images(64)])
        for limit in (dict(mean_bits=4.0), dict(code_bytes=total // 2))
    )
    assert by_bytes.plan.layers == by_mean.plan.layers
    with pytest.raises(BudgetError, match=f"fits {total // 8:,} bytes"):
        spec = Quantize(mode="weight_only", num_calibration=64, code_bytes=total // 8)
        quantize(graph, spec, [images(64)])


def test_codes_of_few_bits_make_small_files(graph):
    weights = sum(layer.num_weights for layer in graph_layers(graph))
    for bits in (2, 3, 4, 8):
        spec = Quantize(mode="weight_only", bits=bits, edge_bits=0)
        rows = inspect(pack(quantize(graph, spec).graph))
        coded = [row for row in rows if row["name"].endswith("weight_quantized")]
        # a grid of odd numbers (-3 to 3) has a span of three bits, of which two are used
        least = bits if bits != 2 else 3
        assert sum(row["size_bytes"] for row in coded) <= weights * least / 8 + 3 * len(coded)


@pytest.mark.parametrize(
    "fields", [dict(rounding="gptq"), dict(bias_correction=True), dict(reestimate=True)]
)
def test_unlabelled_inputs_are_asked_for_where_they_are_needed(graph, fields):
    assert Quantize(mode="weight_only", **fields).needs_inputs
    assert not Quantize(mode="weight_only").needs_inputs
    with pytest.raises(DataError, match="no calibration"):
        quantize(graph, Quantize(mode="weight_only", **fields), [])
