"""A layer's harm is that of the whole network with this layer changed; budgets of bits hold."""

import numpy as np
import onnx
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from scipy.special import softmax
from torch import nn

from tersor.engines import open_session
from tersor.errors import BudgetError, DataError, ModelError, SpecError
from tersor.graph import export_onnx
from tersor.graph.layers import graph_layers
from tersor.methods.sensitivity import (
    LayerHarm,
    Sensitivity,
    fit_uniform,
    mixed_bits,
    output_distance,
    sensitivities,
)
from tersor.tensors.affine import choose_affine
from tersor.tensors.observers import OBSERVERS

SHAPE = (3, 8, 8)
LAYERS = ["stem", "inner", "side", "twice", "head"]


class Net(nn.Module):
    """A sum of two branches with one input, a layer used twice, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.side = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.twice = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.inner(x) + self.side(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return 4 * self.head(x.mean((2, 3)))


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return export_onnx(Net().eval(), SHAPE)


def with_weight(graph, name, value):
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    (held,) = (i for i in changed.graph.initializer if i.name == name)
    held.CopyFrom(numpy_helper.from_array(value, name))
    return changed


def test_a_weights_harm_is_that_of_the_network_with_it_alone_quantized(graph):
    batch, before = images(40), graph.SerializeToString()
    found = sensitivities(graph, None, (3, 2), [batch])
    assert found.num_images == 40
    assert [(row.layer, row.bits) for row in found.table] == [
        (n, b) for n in LAYERS for b in (2, 3)
    ]
    assert graph.SerializeToString() == before
    original = open_session(graph).run(batch)
    weights = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    for layer in graph_layers(graph):
        for row in (row for row in found.table if row.layer == layer.name):
            fitted = fit_uniform(layer, weights[layer.weight], row.bits)
            changed = with_weight(graph, layer.weight, fitted)
            kl, mse = output_distance(original, open_session(changed).run(batch))
            assert kl > 0
            assert row.harm_kl == pytest.approx(kl, rel=1e-3)
            assert row.harm_mse == pytest.approx(mse, rel=1e-3)
            assert (row.num_weights, row.macs) == (layer.num_weights, layer.macs)


def test_a_weight_that_stays_does_no_harm(graph):
    found = sensitivities(graph, None, [8], [images(40)], fit=lambda layer, weight, bits: weight)
    assert all(row.harm_kl < 1e-9 and row.harm_mse < 1e-9 for row in found.table)


def test_more_bits_do_less_harm(graph):
    found = sensitivities(graph, None, (2, 4, 8), [images(40)])
    for name in LAYERS:
        two, four, eight = (row.harm_kl for row in found.table if row.layer == name)
        assert two > four > eight


def test_an_inputs_harm_is_that_of_codes_for_this_reader_alone(graph):
    batch = images(40)
    found = sensitivities(graph, None, [8], [batch], inputs=True)
    # A layer used twice has two inputs, and none of them alone.
    assert [row.layer for row in found.inputs] == ["stem", "inner", "side", "head"]
    original = open_session(graph).run(batch)
    node = graph.graph.node[next(la for la in graph_layers(graph) if la.name == "side").nodes[0]]
    observer = OBSERVERS["histogram"]()
    tapped = onnx.ModelProto()
    tapped.CopyFrom(graph)
    del tapped.graph.output[:]
    tapped.graph.output.append(onnx.helper.make_tensor_value_info(node.input[0], 1, None))
    for start in (0, 32):  # the observer's bins depend on how its input is split
        observer.observe(open_session(tapped).run(batch[start : start + 32]))
    coded = onnx.ModelProto()
    coded.CopyFrom(graph)
    index = list(graph.graph.node).index(node)
    for name, value in zip(("s", "z"), choose_affine(*observer.range()), strict=True):
        coded.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    coded.graph.node[index].input[0] = "dequantized"
    coded.graph.node.insert(
        index, onnx.helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["dequantized"])
    )
    coded.graph.node.insert(
        index, onnx.helper.make_node("QuantizeLinear", [node.input[0], "s", "z"], ["codes"])
    )
    kl, mse = output_distance(original, open_session(coded).run(batch))
    (row,) = (row for row in found.inputs if row.layer == "side")
    assert row.bits == 8
    assert row.harm_kl == pytest.approx(kl, rel=2e-2)
    assert row.harm_mse == pytest.approx(mse, rel=2e-2)


def test_only_the_images_asked_for_count_however_they_are_batched(graph):
    batch = images(50)
    whole = sensitivities(graph, ["inner"], [2], [batch[:37]])
    parts = sensitivities(graph, ["inner"], [2], np.array_split(batch, 7), num_images=37)
    assert parts.num_images == whole.num_images == 37
    assert parts.table[0].harm_kl == pytest.approx(whole.table[0].harm_kl, rel=1e-4)


def test_named_layers_come_in_the_order_of_computing_and_progress_is_told(graph):
    shares = []
    found = sensitivities(
        graph, ["head", "stem.weight"], [8, 8], [images(4)], on_progress=shares.append
    )
    assert [row.layer for row in found.table] == ["stem", "head"]
    assert shares == [0.5, 1.0]


@given(st.integers(0, 2**31), st.floats(0.1, 30))
def test_the_divergence_is_that_of_the_softmax_outputs(seed, spread):
    generator = np.random.default_rng(seed)
    p, q = (generator.standard_normal((6, 4)).astype(np.float32) * spread for _ in "pq")
    kl, mse = output_distance(p, q)
    apart = softmax(p.astype(float), 1), softmax(q.astype(float), 1)
    assert kl == pytest.approx(np.mean(scipy.stats.entropy(*apart, axis=1)), rel=1e-6)
    assert mse == pytest.approx(np.mean((p - q) ** 2) / p.var(), rel=1e-4)
    assert output_distance(p, p) == (0.0, 0.0)


def test_logits_that_are_all_equal_divide_by_one():
    flat = np.ones((3, 4), np.float32)
    assert output_distance(flat, flat + 2) == (0.0, 4.0)


REFUSALS = {
    "unknown layer": ({"layers": ["sted"]}, SpecError, "Did you mean 'stem'"),
    "no bits": ({"bits": []}, SpecError, "at least one"),
    "too many bits": ({"bits": [4, 16]}, SpecError, "1 to 8, got 16"),
    "half a bit": ({"bits": [2.5]}, SpecError, "whole numbers"),
    "no images": ({"calibration_batches": []}, DataError, "no calibration images"),
    "num_images": ({"num_images": 0}, SpecError, "num_images must be 1 or more"),
    "wrong shape": ({"calibration_batches": [images(2)[:, :1]]}, DataError, "shape"),
    "fit of another shape": ({"fit": lambda *a: a[1][:1]}, ModelError, "'stem' at 4 bits"),
    "fit of NaN": ({"fit": lambda *a: a[1] * np.nan}, ModelError, "not finite"),
    "overflow": (
        {"calibration_batches": [np.full((1, *SHAPE), 3e38, np.float32)]},
        DataError,
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("change, error, said", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_measured_is_refused(graph, change, error, said):
    options = {"layers": None, "bits": [4], "calibration_batches": [images(2)], **change}
    with pytest.raises(error, match=said):
        sensitivities(graph, **options)


def test_weights_that_are_not_finite_are_refused(graph):
    broken = with_weight(graph, "side.weight", np.full((8, 8, 1, 1), np.nan, np.float32))
    with pytest.raises((ModelError, DataError), match="NaN"):
        sensitivities(broken, None, [4], [images(2)])


def test_a_graph_without_float_layers_is_refused(graph):
    empty = onnx.ModelProto()
    empty.CopyFrom(graph)
    del empty.graph.node[:]
    with pytest.raises(ModelError, match="give the float network"):
        sensitivities(empty, None, [4], [images(2)])


BITS = (2, 3, 4, 6, 8)


@st.composite
def tables(draw):
    sizes = draw(st.lists(st.integers(1, 5000), min_size=1, max_size=6))
    return Sensitivity(
        tuple(
            LayerHarm(f"layer{i}", b, draw(st.floats(0, 3)), 0.0, size, size)
            for i, size in enumerate(sizes)
            for b in BITS
        ),
        16,
    )


def cost(table, bits):
    return sum(row.num_weights * row.bits for row in table.table if bits[row.layer] == row.bits)


def harm(table, bits):
    return sum(row.harm_kl for row in table.table if bits[row.layer] == row.bits)


@settings(deadline=None)
@given(tables(), st.sampled_from([2.0, 2.5, 3.7, 4.0, 6.5, 8.0]))
def test_mean_bits_hold_and_are_never_worse_than_the_same_bits_everywhere(table, mean_bits):
    found = mixed_bits(table, mean_bits=mean_bits)
    weights = sum(row.num_weights for row in table.table if row.bits == 2)
    assert cost(table, found) <= mean_bits * weights
    for same in (b for b in BITS if b <= mean_bits):
        assert harm(table, found) <= harm(table, dict.fromkeys(found, same)) + 1e-12
    # The same budget in bytes gives the same bits.
    assert mixed_bits(table, size_bytes=mean_bits * weights / 8) == found


@given(tables())
def test_fixed_layers_keep_their_bits_and_count(table):
    weights = {row.layer: row.num_weights for row in table.table}
    fixed = {"layer0": 8}
    least = 2 * (sum(weights.values()) - weights["layer0"]) + 8 * weights["layer0"]
    found = mixed_bits(table, size_bytes=least / 8, fixed=fixed, allowed=(2, 4))
    assert found == {name: 8 if name == "layer0" else 2 for name in weights}
    if least > 2 * sum(weights.values()):
        with pytest.raises(BudgetError, match=f"{least / 8:,.0f} bytes"):
            mixed_bits(table, size_bytes=least / 8 - 0.01, fixed=fixed)


def test_budgets_and_layers_that_mean_nothing_are_refused():
    table = Sensitivity((LayerHarm("conv", 4, 0.1, 0.1, 10, 10),), 1)
    for options, error, said in (
        ({}, SpecError, "one budget"),
        ({"mean_bits": 4, "size_bytes": 9}, SpecError, "one budget"),
        ({"mean_bits": 4, "fixed": {"cony": 8}}, SpecError, "Did you mean 'conv'"),
        ({"mean_bits": 4, "allowed": (3, 4)}, SpecError, "3 bits were not measured"),
        ({"mean_bits": 4, "allowed": ()}, SpecError, "'conv' is left without bits"),
        ({"mean_bits": 3}, BudgetError, "3 bits a weight: the smallest possible is 4 bits"),
    ):
        with pytest.raises(error, match=said):
            mixed_bits(table, **options)
