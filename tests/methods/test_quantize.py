"""The stored codes are those of the pinned formula, the engine runs on integers, and requests are kept."""

import collections

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tersor.engines import open_session
from tersor.engines.onnxruntime import inference_session
from tersor.errors import DataError, ModelError, SpecError, UnknownNameError
from tersor.graph import export_onnx
from tersor.methods.quantize import apply, plan, quantize
from tersor.specs import LayerPlan, Plan, Prune, Quantize, from_dict
from tersor.tensors import affine

SHAPE = (3, 16, 16)
LAYERS = ["stem", "first", "second", "side", "hidden", "head"]


class Net(nn.Module):
    """What the study's networks hold: a sum, both pools, an enlarged 1x1 map, linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.side = nn.Conv2d(16, 32, 1, stride=2, bias=False)
        self.hidden = nn.Linear(32 * 4, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.second(torch.relu(self.first(x))) + self.side(x))
        x = nn.functional.max_pool2d(x, 8)
        x = nn.functional.adaptive_avg_pool2d(x, 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return export_onnx(Net().eval(), SHAPE)


@pytest.fixture(scope="module")
def static(graph):
    return quantize(graph, Quantize(), [images(32)])


def initializers(model):
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def ops_after_loading(model, tmp_path):
    """Operators of the graph that the engine runs, after its own rewriting."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    optimized = onnx.load(options.optimized_model_filepath)
    return collections.Counter(node.op_type for node in optimized.graph.node)


def signal_to_noise(found, expected):
    return (expected**2).mean() / (((found - expected) ** 2).mean() + 1e-12)


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_stored_codes_are_the_formula_bit_for_bit(graph, mode, granularity):
    found = quantize(graph, Quantize(mode=mode, granularity=granularity), [images(8)])
    before, after = initializers(graph), initializers(found.graph)
    onnx.checker.check_model(found.graph)
    coded = [layer.layer for layer in found.plan.layers if layer.action != "keep"]
    assert coded == (LAYERS[4:] if mode == "dynamic" else LAYERS)
    for name in coded:
        weight = before[f"{name}.weight"]
        axis = 0 if granularity == "per_channel" else None
        scale = affine.choose_symmetric(weight, axis)
        assert np.array_equal(after[f"{name}.weight_scale"], scale)
        codes = after[f"{name}.weight_quantized"]
        assert codes.dtype == np.int8
        assert np.array_equal(codes, affine.quantize(weight, scale, axis=axis))
        assert f"{name}.weight" not in after


def test_biases_are_codes_at_the_product_of_the_scales(graph, static):
    before, after = initializers(graph), initializers(static.graph)
    scale = np.float32(after["input_scale"]) * after["stem.weight_scale"]
    assert np.array_equal(after["stem.bias_scale"], scale)
    codes = affine.quantize(before["stem.bias"], scale, dtype=np.int32, axis=0)
    assert np.array_equal(after["stem.bias_quantized"], codes)


def test_the_engine_runs_static_graphs_on_integers(static, tmp_path):
    found = ops_after_loading(static.graph, tmp_path)
    assert found["QLinearConv"] == 4 and found["QGemm"] == 2 and found["QLinearAdd"] == 1
    assert found["QuantizeLinear"] == 1
    assert not {"Conv", "Gemm", "MatMul", "Add", "Relu", "DequantizeLinear"} & set(found)


def test_the_engine_merges_dynamic_products(graph, tmp_path):
    found = ops_after_loading(quantize(graph, Quantize(mode="dynamic")).graph, tmp_path)
    assert found["DynamicQuantizeMatMul"] == 2 and found["MatMulInteger"] == 0


@pytest.mark.parametrize("mode, least", [("static", 300), ("dynamic", 3000), ("weight_only", 3000)])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_logits_are_close_to_float_at_every_batch(graph, static, mode, least, count):
    found = static if mode == "static" else quantize(graph, Quantize(mode=mode))
    batch = images(count, seed=count + 1)
    expected = open_session(graph, threads=1).run(batch)
    logits = open_session(found.graph, threads=1).run(batch)
    assert signal_to_noise(logits, expected) > least


def test_the_engine_agrees_with_the_simulation_of_its_own_graph(static):
    """The same graph, once rewritten to integer kernels and once node by node in float."""
    batch = images(256, seed=5)
    integer = open_session(static.graph, threads=1).run(batch)
    session = inference_session(static.graph, 1, optimize=False)
    (simulated,) = session.run(None, {"input": batch})
    differ = int((integer.argmax(1) != simulated.argmax(1)).sum())
    assert differ <= 2
    # one step of one activation may fall on the other side of a tie
    assert np.abs(integer - simulated).max() < 0.02 * np.abs(simulated).max()


@pytest.mark.parametrize("observer", ["histogram", "minmax", "percentile"])
def test_ranges_are_those_of_the_observer(graph, observer):
    data = [images(20, seed=1), images(30, seed=2), images(40, seed=3)]
    found = quantize(graph, Quantize(observer=observer, num_calibration=40), data)
    assert found.num_calibration == 40
    low, high = found.ranges["input"]
    seen = np.concatenate(data)[:40]
    assert seen.min() <= low < 0 < high <= seen.max()
    if observer == "minmax":
        assert (low, high) == (float(seen.min()), float(seen.max()))
    after = initializers(found.graph)
    assert (after["input_scale"], after["input_zero_point"]) == affine.choose_affine(low, high)


def test_values_that_only_move_share_one_scale(static):
    names = set(initializers(static.graph))
    assert not any("max_pool" in name and name.endswith("_scale") for name in names)
    assert len(static.ranges) == 7  # input, three ReLUs, two terms of the sum, the hidden layer


def test_dead_channels_and_constant_activations_stay_exact():
    torch.manual_seed(0)
    module = Net().eval()
    with torch.no_grad():
        module.first.weight[3] = 0  # its bias alone is left, at no scale of weights
        module.first.weight[4] = 1e-30
        module.first.bias[3:5] = torch.tensor([0.5, 100.0])
        module.hidden.weight.zero_()
        module.hidden.bias.fill_(-1)  # the ReLU after it gives zeros only
    graph = export_onnx(module, SHAPE)
    found = quantize(graph, Quantize(), [images(16)])
    after = initializers(found.graph)
    assert all((values > 0).all() for name, values in after.items() if name.endswith("_scale"))
    bias = after["first.bias_quantized"] * after["first.bias_scale"].astype(np.float64)
    np.testing.assert_allclose(bias[3:5], [0.5, 100.0], rtol=1e-3)
    logits = open_session(found.graph, threads=1).run(images(4))
    expected = open_session(graph, threads=1).run(images(4))
    np.testing.assert_allclose(logits, expected, rtol=0.02, atol=0.01)


def test_coverage_counts_multiplications_and_bytes(graph, static):
    assert static.coverage.to_dict() == {"macs_share": 1.0, "bytes_share": 1.0}
    weights = dict(zip(LAYERS, [432, 4608, 9216, 512, 3072, 120], strict=True))
    macs = {**weights, "stem": 432 * 256}
    macs |= {name: weights[name] * 64 for name in ("first", "second", "side")}
    linear = quantize(graph, Quantize(mode="dynamic")).coverage
    linear_weights = weights["hidden"] + weights["head"]
    assert linear.bytes_share == pytest.approx(linear_weights / sum(weights.values()))
    assert linear.macs_share == pytest.approx(linear_weights / sum(macs.values()))
    assert quantize(graph, Quantize(mode="weight_only")).coverage.macs_share == 0


@pytest.mark.parametrize(
    "exclude, kept",
    [
        (("stem",), ["stem"]),
        (("stem.weight", "head"), ["stem", "head"]),
        (("re:(first|second)",), ["first", "second"]),
        (("re:.*",), LAYERS),
    ],
)
def test_excluded_layers_stay_float_with_their_reason(graph, exclude, kept):
    found = quantize(graph, Quantize(exclude=exclude), [images(8)])
    onnx.checker.check_model(found.graph)
    reasons = {layer.layer: layer.reason for layer in found.plan.layers if layer.action == "keep"}
    assert list(reasons) == kept and all("excluded" in reason for reason in reasons.values())
    before, after = initializers(graph), initializers(found.graph)
    for name in kept:
        assert np.array_equal(after[f"{name}.weight"], before[f"{name}.weight"])
    logits = open_session(found.graph, threads=1).run(images(4))
    expected = open_session(graph, threads=1).run(images(4))
    assert signal_to_noise(logits, expected) > 100


def test_a_pattern_without_a_layer_is_an_error(graph):
    with pytest.raises(SpecError, match="Did you mean 'second'"):
        plan(graph, Quantize(exclude=("secnd",)))
    with pytest.raises(SpecError, match="regular expression"):
        plan(graph, Quantize(exclude=("re:(",)))


def test_layers_that_dynamic_leaves_alone_say_why(graph):
    decided = plan(graph, Quantize(mode="dynamic"))
    reasons = {layer.layer: layer.reason for layer in decided.layers}
    assert "linear layers only" in reasons["stem"] and reasons["head"] == ""


def test_a_plan_survives_json_and_can_be_edited(graph, static):
    decided = from_dict(plan(graph, Quantize()).to_dict())
    assert decided == static.plan
    edited = Plan(
        decided.request, tuple(layer for layer in decided.layers if layer.layer != "head")
    )
    found = apply(graph, edited, [images(32)])
    assert "head.weight" in initializers(found.graph)
    assert "stem.weight" not in initializers(found.graph)


def test_the_float_graph_is_untouched_and_the_result_is_repeatable(graph, static):
    before = graph.SerializeToString(deterministic=True)
    again = quantize(graph, Quantize(), [images(32)])
    assert graph.SerializeToString(deterministic=True) == before
    assert again.graph.SerializeToString(deterministic=True) == (
        static.graph.SerializeToString(deterministic=True)
    )


@pytest.mark.parametrize(
    "data, words",
    [
        ([], "no calibration images"),
        ([images(0)], "no calibration images"),
        ([images(2), np.full((2, *SHAPE), np.nan, np.float32)], "batch 1 .*NaN.*image 0"),
        ([images(2), images(2)[:, :, :9]], r"batch 1 .*\(2, 3, 9, 16\).*\(N, 3, 16, 16\)"),
        ([images(2)[0]], "batch 0"),
        ([images(2).astype(np.float64)], "batch 0 is float64"),
        ([np.full((2, *SHAPE), 3e38, np.float32)], "batch 0.*overflows"),
    ],
)
def test_unusable_calibration_is_named(graph, data, words):
    with pytest.raises(DataError, match=words):
        quantize(graph, Quantize(), data)


def test_weights_that_are_not_finite_are_named(graph):
    broken = onnx.ModelProto()
    broken.CopyFrom(graph)
    for tensor in broken.graph.initializer:
        if tensor.name == "first.weight":
            values = numpy_helper.to_array(tensor).copy()
            values[0, 0, 0, 0] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(ModelError, match=r"'first'.*NaN"):
        plan(broken, Quantize())


def test_what_cannot_be_meant_is_refused(graph, static):
    with pytest.raises(UnknownNameError, match="Did you mean 'histogram'"):
        plan(graph, Quantize(observer="histograms"))
    with pytest.raises(ModelError, match="quantized already"):
        plan(static.graph, Quantize())
    with pytest.raises(SpecError, match="prune"):
        apply(graph, Plan(Prune()))
    with pytest.raises(ModelError, match=r"'steam'.*Did you mean 'stem'"):
        apply(graph, Plan(Quantize(), (LayerPlan("steam", "int8"),)))
    with pytest.raises(SpecError, match=r"'prune'.*allows keep and int8"):
        apply(graph, Plan(Quantize(), (LayerPlan("stem", "prune"),)))
    with pytest.raises(SpecError, match="linear layers only"):
        apply(graph, Plan(Quantize(mode="dynamic"), (LayerPlan("stem", "dynamic"),)))


def test_a_graph_without_layers_is_refused():
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        plan(export_onnx(nn.Flatten(), SHAPE), Quantize())
