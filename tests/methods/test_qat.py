"""Trained quantization: what is learned is what the graph holds, the network survives, and no label is read."""

import copy
import dataclasses as dc

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils import parametrizations

from tersor.data import ArraySet, load_data
from tersor.engines.onnxruntime import inference_session
from tersor.errors import ModelError, RunError, SpecError
from tersor.graph import export_onnx
from tersor.graph.layers import graph_layers
from tersor.methods import learned as learned_room
from tersor.methods import qat
from tersor.methods import training as loop
from tersor.methods.fake_quantize import LearnedStep, weight_levels
from tersor.methods.finetune import finetune
from tersor.methods.learned import InputGrid, LayerBits, export_quantized
from tersor.methods.qat import input_sources, prepare_, strip, train_quantized
from tersor.models import load_model
from tersor.specs import Finetune
from tersor.tensors.affine import choose_affine

SHAPE = (3, 8, 8)
LAYERS = ["stem", "depthwise", "pointwise", "side", "tokens", "hidden", "head"]
TINY = Finetune(
    epochs=1,
    learning_rate=0.02,
    batch_size=64,
    distill=1.0,
    augment="none",
    ema_decay=0.9,
    precision="float32",
    compile="off",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums in one order: equal runs are equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def each_network_is_exported_once():
    """Exporting takes a second; the same weights give the same graph."""
    held = {}

    def cached(module, input_shape):
        state = [(name, value.numpy().tobytes()) for name, value in module.state_dict().items()]
        key = (type(module), input_shape, str(module), tuple(state))
        if key not in held:
            held[key] = export_onnx(module, input_shape)
        copied = onnx.ModelProto()
        copied.CopyFrom(held[key])
        return copied

    with pytest.MonkeyPatch.context() as patch:
        for room in (qat, learned_room):
            patch.setattr(room, "export_onnx", cached)
        yield


class Net(nn.Module):
    """Batch norm of both signs, a depthwise convolution, two readers of one value, a sum, a product of three
    dimensions, dropout."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.pointwise, self.pointwise_norm = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.side = nn.Conv2d(8, 12, 1, bias=False)
        self.tokens = nn.Linear(12, 12)
        self.drop = nn.Dropout(0.4)
        self.hidden, self.head = nn.Linear(12 * 16, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.depthwise_norm(self.depthwise(x)))
        y = torch.relu(self.pointwise_norm(self.pointwise(y)) + self.side(x))
        y = nn.functional.max_pool2d(y, 2)
        y = torch.relu(self.tokens(y.flatten(2).transpose(1, 2)))
        return self.head(self.drop(torch.relu(self.hidden(y.flatten(1)))))


def net(seed=0):
    """Net with the batch norm of a trained network: negative and positive gamma, moved statistics."""
    torch.manual_seed(seed)
    module = Net()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module.eval()


def images(count=64, seed=0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator)


def run(module, inputs):
    with torch.no_grad():
        return module(inputs)


def grids(module):
    """Sources of the layers' inputs, and their ranges over `images()` by hooks."""
    graph = qat.export_onnx(module, SHAPE)
    sources = input_sources(graph, graph_layers(graph))
    ranges = {}

    def watch(name):
        def look(_, inputs):
            low, high = float(inputs[0].min()), float(inputs[0].max())
            for value in sources[name]:
                before = ranges.get(value, (0.0, 0.0))
                ranges[value] = (min(before[0], low), max(before[1], high))

        return look

    held = dict(module.named_modules())
    handles = [held[name].register_forward_pre_hook(watch(name)) for name in sources]
    run(module, images())
    for handle in handles:
        handle.remove()
    return sources, ranges


def prepared(module, bits=8, code="uniform", activation_bits=8, inputs=True):
    decisions = {name: LayerBits(bits, activation_bits, code) for name in LAYERS}
    result = copy.deepcopy(module)
    prepare_(result, decisions, *(grids(net()) if inputs else ({}, {})))
    return result


def jolted(module, seed=3):
    """A prepared module as training leaves it: steps and weights moved from where they started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
    return module


def relative_error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_eight_bits_are_near_the_float_network():
    module = net()
    assert relative_error(run(prepared(module), images()), run(module, images())) < 0.02


def test_the_classes_and_the_order_of_the_state_survive():
    module = net()
    ready = prepared(module)
    assert type(ready) is Net and isinstance(ready.stem, nn.Conv2d)
    plain, _ = strip(ready)
    assert [type(part) for part in plain.modules()] == [type(part) for part in module.modules()]
    assert list(plain.state_dict()) == list(module.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(part._forward_pre_hooks for part in plain.modules())


@pytest.mark.parametrize(
    ("bits", "code"),
    [(1, "binary"), (2, "uniform"), (2, "ternary"), (3, "uniform"), (8, "uniform")],
)
def test_the_stripped_weights_are_the_fake_quantized_ones_and_codes_times_scale(bits, code):
    ready = jolted(prepared(net(), bits, code))
    plain, learned = strip(ready)
    assert sorted(learned) == sorted(LAYERS)
    levels = weight_levels(bits, code)
    for name, layer in learned.items():
        weight = plain.get_submodule(name).weight
        assert torch.equal(weight, ready.get_submodule(name).weight)
        assert layer.codes.dtype == np.int8 and layer.scale.dtype == np.float32
        assert layer.scale.shape == layer.codes.shape[:1] == weight.shape[:1]
        exact = layer.codes.astype(np.float32) * layer.scale[:, None]
        assert np.array_equal(weight.detach().flatten(1).numpy(), exact)
        assert np.isin(layer.codes, range(levels.low, levels.high + 1, levels.spacing)).all()
        assert (layer.scale > 0).all() and layer.bits == LayerBits(bits, 8, code)


def test_stripping_leaves_the_prepared_module_and_its_copies_alone():
    ready = prepared(net(), 3)
    other = copy.deepcopy(ready)
    before = run(ready, images())
    strip(ready)
    strip(other)
    assert torch.equal(run(ready, images()), before)
    assert torch.equal(run(other, images()), before)


def test_a_deep_copy_has_steps_of_its_own():
    ready = prepared(net(), 4)
    other = copy.deepcopy(ready)
    before = run(ready, images())
    jolted(other)
    assert not torch.equal(run(other, images()), before)
    assert torch.equal(run(ready, images()), before)
    assert not {id(p) for p in ready.parameters()} & {id(p) for p in other.parameters()}


def test_a_state_makes_an_equal_module_and_is_refused_by_other_bits():
    ready = jolted(prepared(net(), 2))
    fresh = prepared(net(1), 2)
    fresh.stem.input_step.levels = ready.stem.input_step.levels
    for name in LAYERS:  # as by the same calibration
        fresh.get_submodule(name).input_step.levels = ready.get_submodule(name).input_step.levels
    fresh.load_state_dict(ready.state_dict())
    assert torch.equal(run(fresh, images()), run(ready, images()))
    with pytest.raises(ValueError, match="expected"):
        prepared(net(), 3).load_state_dict(ready.state_dict())


def test_readers_of_one_value_share_its_step():
    ready = prepared(net())
    assert ready.side.input_step is ready.depthwise.input_step
    names = [n for n, _ in ready.named_parameters() if n.endswith("input_step.step")]
    assert len(names) == len(LAYERS) - 1
    assert ready.stem.input_step.levels.low < 0 == ready.side.input_step.levels.low


class Twice(nn.Module):
    """One layer used twice, whose two inputs have different ranges, and another reader of the second."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = torch.relu(self.first(3 * torch.relu(self.first(x))))
        return self.head((x + self.again(x)).mean((2, 3)))


def test_a_layer_used_twice_covers_both_of_its_inputs():
    torch.manual_seed(0)
    module = Twice().eval()
    sources, ranges = grids(module)
    assert len(sources["first"]) == 2
    ready = copy.deepcopy(module)
    prepare_(ready, {name: LayerBits(8) for name in sources}, sources, ranges)
    assert relative_error(run(ready, images()), run(module, images())) < 0.02
    exported = export_quantized(*strip(ready), SHAPE)
    assert len(exported.inputs) == 4
    assert len({exported.inputs[value] for value in sources["first"]}) == 1


# ---- the graph


@pytest.mark.parametrize(
    ("bits", "code"),
    [(1, "binary"), (2, "uniform"), (2, "ternary"), (4, "uniform"), (8, "uniform")],
)
def test_the_graph_computes_what_the_module_computes_and_holds_the_codes(bits, code):
    ready = jolted(prepared(net(), bits, code, inputs=False))
    plain, learned = strip(ready)
    exported = export_quantized(plain, learned, SHAPE)
    session = inference_session(exported.graph, 1)
    found = session.run(None, {"input": images().numpy()})[0]
    np.testing.assert_allclose(found, run(ready, images()), rtol=1e-4, atol=1e-4)
    assert "BatchNormalization" not in {node.op_type for node in exported.graph.graph.node}
    constants = {i.name: numpy_helper.to_array(i) for i in exported.graph.graph.initializer}
    axes = {layer.name: (layer.weight, layer.axis) for layer in graph_layers(exported.graph)}
    assert sorted(exported.layers) == sorted(LAYERS) and not exported.inputs
    levels = weight_levels(bits, code)
    for name, layer in exported.layers.items():
        weight, axis = axes[name]
        rows = np.moveaxis(constants[weight], axis, 0).reshape(len(layer.codes), -1)
        assert np.array_equal(rows, layer.codes.astype(np.float32) * layer.scale[:, None])
        assert np.isin(layer.codes, range(levels.low, levels.high + 1, levels.spacing)).all()


def test_a_negative_gamma_flips_codes_and_its_size_goes_to_the_scale():
    plain, learned = strip(prepared(net(), 2))
    exported = export_quantized(plain, learned, SHAPE)
    norm = plain.stem_norm
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
    assert (factor < 0).any() and (factor > 0).any()
    stem = exported.layers["stem"]
    assert np.array_equal(stem.codes, learned["stem"].codes * np.sign(factor)[:, None])
    np.testing.assert_allclose(stem.scale, learned["stem"].scale * np.abs(factor), rtol=1e-6)
    assert np.array_equal(exported.layers["side"].codes, learned["side"].codes)


@pytest.mark.parametrize("gamma", [0.0, 1e-42])
def test_a_channel_that_batch_norm_removes_has_codes_of_zero(gamma):
    module = net()
    with torch.no_grad():
        module.stem_norm.weight[2] = gamma
    plain, learned = strip(prepared(module, 2))
    stem = export_quantized(plain, learned, SHAPE).layers["stem"]
    assert not stem.codes[2].any() and stem.codes[[0, 1, 3]].all()
    assert (stem.scale > 0).all() and np.isfinite(stem.scale).all()


def with_codes(exported):
    """The graph whose layer inputs pass through the learned codes, by ONNX's own operators."""
    model = onnx.ModelProto()
    model.CopyFrom(exported.graph)
    nodes, held = [], {}
    for value, grid in exported.inputs.items():
        for part, number in (
            ("scale", np.float32(grid.scale)),
            ("zero", np.uint8(grid.zero_point)),
        ):
            model.graph.initializer.append(numpy_helper.from_array(number, f"{value}_{part}"))
        held[value] = [f"{value}_scale", f"{value}_zero"]

    def coded(value):
        ends = (f"{value}_codes", f"{value}_again")
        q = helper.make_node("QuantizeLinear", [value, *held[value]], ends[:1])
        return [q, helper.make_node("DequantizeLinear", [ends[0], *held[value]], ends[1:])]

    given_names = {v.name for v in model.graph.input}
    made = [node for value in held if value in given_names for node in coded(value)]
    nodes += made
    for node in model.graph.node:
        node.input[:] = [f"{name}_again" if name in held else name for name in node.input]
        nodes.append(node)
        nodes += [n for value in node.output if value in held for n in coded(value)]
    new = [copy.deepcopy(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(new)
    return model


@pytest.mark.parametrize("bits", [2, 8])
def test_with_the_learned_input_codes_the_graph_computes_what_training_saw(bits):
    """Every reader of such a value gets codes here; in Net those are layers alone, or what moves values."""
    ready = jolted(prepared(net(), bits))
    exported = export_quantized(*strip(ready), SHAPE)
    wanted = run(ready, images())
    inputs = {"input": images().numpy()}
    # As written: the engine's own rewriting merges codes away.
    (found,) = inference_session(with_codes(exported), 1, optimize=False).run(None, inputs)
    (in_float,) = inference_session(exported.graph, 1).run(None, inputs)
    assert relative_error(torch.from_numpy(found), wanted) < 1e-5
    assert relative_error(torch.from_numpy(in_float), wanted) > 1e-3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("limits", [(0.0, 3.7), (-1.3, 2.9), (-2.0, 0.0)])
def test_an_input_grid_is_the_one_of_its_range(bits, limits):
    scale, zero_point = choose_affine(*limits, bits=bits)
    grid = InputGrid(float(scale), int(zero_point), bits)
    assert choose_affine(*grid.range, bits=bits) == (scale, zero_point)


def test_a_module_changed_after_stripping_is_refused():
    plain, learned = strip(prepared(net(), 2))
    with torch.no_grad():
        plain.pointwise.weight[3, 1] += 0.01
    with pytest.raises(ModelError, match=r"'pointwise': channel 3 .*changed after"):
        export_quantized(plain, learned, SHAPE)
    missing = {"other": learned["head"]}
    with pytest.raises(ModelError, match="no layer 'other'"):
        export_quantized(plain, missing, SHAPE)
    with pytest.raises(ModelError, match="in the graph, learned were"):
        export_quantized(plain, {"stem": learned["head"]}, SHAPE)


# ---- training


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def teacher(digits):
    spec = dc.replace(TINY, epochs=3, learning_rate=0.1, distill=0.0)
    return finetune(load_model("digits_net"), digits, spec).module


def disagreement(module, teacher, splits):
    """Mean divergence of the answers on the validation images, in nats."""
    inputs = torch.from_numpy(next(splits.batches(splits.validation, 1000)))
    found, wanted = run(module, inputs).log_softmax(1), run(teacher, inputs).log_softmax(1)
    return float(nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def without_labels(splits):
    return dc.replace(splits, train=ArraySet(splits.train.images, None))


@pytest.mark.parametrize(("bits", "code"), [(2, "uniform"), (2, "ternary"), (1, "binary")])
def test_an_epoch_of_distillation_moves_it_to_its_teacher(digits, teacher, bits, code):
    options = {"weight_bits": bits, "code": code}
    splits = without_labels(digits)
    short = dc.replace(TINY, epochs=1e-3, learning_rate=1e-12)
    start = train_quantized(teacher, splits, training=short, **options)
    end = train_quantized(teacher, splits, training=TINY, **options)
    assert disagreement(end.trained.module, teacher, splits) < 0.5 * disagreement(
        start.trained.module, teacher, splits
    )


def test_batch_norm_ends_with_the_statistics_of_the_quantized_network(digits, teacher):
    short = dc.replace(TINY, epochs=0.1)
    result = train_quantized(teacher, digits, weight_bits=2, training=short)
    ready = result.trained.module.features
    inputs = torch.from_numpy(next(digits.batches(digits.calibration, 512)))
    mean = run(ready[0], inputs).mean((0, 2, 3))
    assert torch.allclose(ready[1].running_mean, mean, atol=1e-5)
    assert torch.equal(result.module.features[1].running_mean, ready[1].running_mean)


def test_labels_change_nothing(digits, teacher):
    short = dc.replace(TINY, epochs=0.2)
    results = [
        train_quantized(teacher, splits, training=short, weight_bits=2)
        for splits in (digits, without_labels(digits))
    ]
    assert equal(*(result.module for result in results))


def equal(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(
        torch.equal(ours[k], theirs[k]) if torch.is_tensor(ours[k]) else ours[k] == theirs[k]
        for k in ours
    )


def test_edges_keep_their_bits_and_the_rest_is_told(digits, teacher):
    shown = []
    result = train_quantized(
        teacher,
        digits,
        weight_bits=2,
        activation_bits=4,
        code="ternary",
        exclude=["re:classifier.0"],
        training=dc.replace(TINY, epochs=0.1),
        on_progress=shown.append,
    )
    assert {name: (each.bits.bits, each.bits.code) for name, each in result.learned.items()} == {
        "features.0": (8, "uniform"),
        "features.3": (2, "ternary"),
        "features.7": (2, "ternary"),
        "classifier.2": (8, "uniform"),
    }
    assert all(each.input.bits == 4 for each in result.learned.values())
    assert shown[-1].step == shown[-1].num_steps
    assert {name for name, p in result.module.named_parameters() if p.ndim > 1} == {
        name for name, p in teacher.named_parameters() if p.ndim > 1
    }
    exported = export_quantized(result.module, result.learned, digits.input_shape)
    assert list(exported.layers) == list(result.learned) and len(exported.inputs) == 4


def test_bits_by_layer(digits, teacher):
    bits = {"features.3": 3, "classifier.0": 5}
    short = dc.replace(TINY, epochs=1e-3)
    result = train_quantized(teacher, digits, weight_bits=bits, training=short)
    assert {name: each.bits.bits for name, each in result.learned.items()} == bits
    with pytest.raises(ModelError, match=r"'features\.4', which is no layer .*Did you mean"):
        train_quantized(teacher, digits, weight_bits={"features.4": 2}, training=short)


def test_symmetric_inputs_have_their_zero_in_the_middle(digits, teacher):
    short = dc.replace(TINY, epochs=1e-3)
    result = train_quantized(
        teacher, digits, weight_bits=8, symmetric_inputs=True, activation_bits=6, training=short
    )
    assert {each.input.zero_point for each in result.learned.values()} == {32}


def test_the_network_given_is_left_alone(digits, teacher):
    module = copy.deepcopy(teacher).train()
    before = copy.deepcopy(module.state_dict())
    train_quantized(module, digits, weight_bits=2, training=dc.replace(TINY, epochs=0.1))
    assert module.training and all(
        torch.equal(before[k], v) for k, v in module.state_dict().items()
    )
    assert not any(isinstance(part, LearnedStep) for part in module.modules())


class Killed(BaseException):
    pass


def test_resumed_after_a_kill_it_is_what_an_uninterrupted_training_gives(
    digits, teacher, tmp_path, monkeypatch
):
    short = dc.replace(TINY, epochs=0.5)
    whole = train_quantized(teacher, digits, weight_bits=2, training=short)
    path = tmp_path / "run.pt"
    real = loop.Loop.save

    def kill(self, target):
        real(self, target)
        if self.state.step == 4:
            raise Killed

    options = {"weight_bits": 2, "training": short, "checkpoint": path}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Loop, "save", kill)
        train_quantized(teacher, digits, checkpoint_seconds=0, **options)
    shown = []
    resumed = train_quantized(teacher, digits, on_progress=shown.append, **options)
    assert all(progress.step > 4 for progress in shown)
    assert equal(resumed.module, whole.module)
    assert equal(resumed.trained.module, whole.trained.module)
    with pytest.raises(RunError, match="another network"):
        train_quantized(teacher, digits, **options | {"weight_bits": 3})


def test_steps_and_norms_get_no_weight_decay(digits):
    ready = prepared(net(), 2)
    splits = dc.replace(digits, train=ArraySet(images(8).numpy(), None))
    job = loop.Loop(ready, splits, TINY, {}, net(), torch.device("cpu"))
    decayed = {id(p) for p in job.optimizer.param_groups[0]["params"]}
    names = {name for name, p in ready.named_parameters() if id(p) in decayed}
    assert names == {f"{name}.parametrizations.weight.original" for name in LAYERS}
    moved = {name for name, _ in job.averaged.module.named_parameters() if name.endswith("step")}
    assert moved == {name for name, _ in ready.named_parameters() if name.endswith("step")} != set()


class Copied(nn.Module):
    """A 1x1 map pooled up to 7x7 before a linear layer, as VGG-16 has at 32x32."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(196, 10), nn.Linear(10, 10))

    def forward(self, images):
        return self.classifier(self.pool(self.features(images)).flatten(1))


def test_equal_copies_are_trained_as_one_and_share_their_codes(digits):
    torch.manual_seed(0)
    module = Copied().eval()
    result = train_quantized(
        module, digits, weight_bits={"classifier.1": 2}, training=dc.replace(TINY, epochs=0.3)
    )
    assert result.module.pool.output_size == 7 and result.module.classifier[0].p == 0.5
    codes = result.learned["classifier.1"].codes.reshape(10, 4, 49)
    assert (codes == codes[:, :, :1]).all() and set(codes.flat) <= {-3, -1, 1, 3}
    weight = result.module.classifier[1].weight.detach().numpy()
    assert np.array_equal(weight, result.learned["classifier.1"].weight())
    export_quantized(result.module, result.learned, digits.input_shape)
    inputs = torch.from_numpy(next(digits.batches(digits.test, 64)))
    folded, _ = strip(result.trained.module)
    assert folded.classifier[1].in_features == 4
    assert torch.allclose(run(result.module, inputs), run(folded, inputs), atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's own bfloat16")
def test_it_trains_in_bfloat16(digits, teacher, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    spec = dc.replace(TINY, epochs=0.1, precision="bf16", compile="on")
    result = train_quantized(teacher, digits, weight_bits=2, training=spec)
    assert result.trained.precision == "bf16" and not result.trained.compiled
    assert all(p.dtype == torch.float32 for p in result.module.parameters())


# ---- refusals


def shared():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    return module


def holed():
    module = nn.Sequential(nn.Linear(4, 4))
    nn.init.constant_(module[0].weight, float("nan"))
    return module


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "1", "'1' is missing"),
        (nn.Sequential(nn.BatchNorm1d(4)), "0", "'0' is a BatchNorm1d"),
        (shared(), "0", "layer '0' is computed from others or shared"),
        (holed(), "0", "layer '0' holds NaN or infinity"),
        (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), "0", "'0' is computed"),
    ],
)
def test_layers_that_cannot_be_trained_at_few_bits_are_refused(module, name, told):
    with pytest.raises(ModelError, match=told):
        prepare_(module, {name: LayerBits(4)}, {}, {})


def test_requests_that_mean_nothing_are_refused(digits, teacher):
    with pytest.raises(SpecError, match="'uniform' of 9 bits"):
        train_quantized(teacher, digits, weight_bits=9, training=TINY)
    with pytest.raises(SpecError, match="'codebook' of 2 bits"):
        train_quantized(teacher, digits, weight_bits=2, code="codebook", training=TINY)
    with pytest.raises(SpecError, match="matches no layer"):
        train_quantized(teacher, digits, weight_bits=2, exclude=["stem"], training=TINY)
    with pytest.raises(ModelError, match="no convolutional or linear layer left"):
        train_quantized(teacher, digits, weight_bits=2, exclude=["re:.*"], training=TINY)
