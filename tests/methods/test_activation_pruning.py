"""Pruned activations: exact counts, gradients where a value stayed, the same answers from the graph."""

import copy
import dataclasses as dc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tersor
from tersor.data import ArraySet, load_data
from tersor.errors import DataError, ModelError, SpecError
from tersor.graph.export import export_onnx
from tersor.methods.activation_pruning import KeepAbove, KeepLargest, prune_activations
from tersor.methods.activity import measure_activity
from tersor.methods.finetune import finetune
from tersor.models import load_model
from tersor.specs import Finetune

LAYERS = ["features.3", "features.7", "classifier.0", "classifier.2"]


def images(count=16):
    return np.random.default_rng(0).standard_normal((count, 1, 8, 8)).astype(np.float32)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    density=st.floats(0.01, 1.0),
    ties=st.booleans(),
    seed=st.integers(0, 999),
)
def test_exactly_the_largest_of_each_sample_are_kept(shape, density, ties, seed):
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if ties:
        values = (2 * values).round() + 0.5  # no zeros among them
    values.requires_grad_()
    kept = KeepLargest(density)(values)
    count = max(1, round(density * shape[1] * shape[2]))
    flat, given_values = kept.detach().flatten(1), values.detach().flatten(1)
    assert ((flat != 0).sum(1) == count).all()
    assert torch.equal(flat[flat != 0], given_values[flat != 0])
    for row, found in zip(given_values.abs().numpy(), flat.abs().numpy(), strict=True):
        assert np.array_equal(np.sort(found)[-count:], np.sort(row)[-count:])
    weights = torch.arange(1.0, values.numel() + 1, dtype=torch.float64).view(shape)
    (kept * weights).sum().backward()
    assert torch.equal(values.grad, torch.where(kept != 0, weights, 0.0))


@given(threshold=st.floats(0, 3), seed=st.integers(0, 999))
def test_a_threshold_keeps_what_is_above_it(threshold, seed):
    values = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed))
    found = KeepAbove(threshold)(values)
    assert torch.equal(found, torch.where(values.abs() > np.float32(threshold), values, 0.0))


@pytest.mark.parametrize("method", ["top_k", "threshold"])
@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9])
def test_every_layer_but_the_first_reads_the_share_of_zeros(method, sparsity):
    module = load_model("digits_net")
    before = copy.deepcopy(module.state_dict())
    calibration = images() if method == "threshold" else None
    pruned = prune_activations(module, sparsity, method=method, images=calibration)
    assert list(module.state_dict()) == list(before)
    assert not any(m._forward_pre_hooks for m in module.modules())
    found = {la.layer: la.input_zeros for la in measure_activity(pruned, [images()]).layers}
    was = {la.layer: la.input_zeros for la in measure_activity(module, [images()]).layers}
    assert found["features.0"] == 0
    for name in LAYERS:
        # Of 256 and 128 values the count is rounded; a threshold's ties go on the side of zeros.
        assert found[name] >= max(sparsity, was[name] if sparsity < was[name] else 0) - 0.004
        if sparsity > max(was[name], 0.6):
            assert found[name] == pytest.approx(sparsity, abs=0.01)


def test_nothing_is_pruned_at_a_sparsity_of_zero():
    module = load_model("digits_net")
    inputs = torch.from_numpy(images())
    with torch.no_grad():
        for held in ({}, {"method": "threshold", "images": images()}):
            assert torch.equal(prune_activations(module, 0.0, **held)(inputs), module(inputs))


@pytest.mark.parametrize("method", ["top_k", "threshold"])
def test_the_graph_gives_the_answers_of_the_module_at_any_batch(method):
    calibration = images() if method == "threshold" else None
    pruned = prune_activations(load_model("digits_net"), 0.6, method=method, images=calibration)
    graph = export_onnx(pruned, (1, 8, 8))
    operations = {node.op_type for node in graph.graph.node}
    assert ("TopK" if method == "top_k" else "Where") in operations
    session = tersor.open_session(graph, threads=1)
    for count in (1, 3, 16):
        with torch.no_grad():
            expected = pruned(torch.from_numpy(images(count))).numpy()
        assert np.allclose(session.run(images(count)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["top_k", "threshold"])
def test_a_pruned_network_trains_and_is_better_for_it(method):
    digits = load_data("digits")
    spec = Finetune(
        epochs=4, batch_size=64, augment="none", precision="float32", compile="off", ema_decay=0.9
    )
    module = finetune(load_model("digits_net"), digits, spec).module
    calibration = digits.normalise(digits.calibration.images[:64])
    options = {"images": calibration} if method == "threshold" else {}
    pruned = prune_activations(module, 0.95, method=method, **options)
    recovery = dc.replace(spec, epochs=2, distill=1.0, learning_rate=0.03)
    bare = dc.replace(digits, train=ArraySet(digits.train.images, None))
    trained = finetune(pruned, bare, recovery, teacher=module).module
    assert [n for n, m in trained.named_modules() if n.endswith("activation_mask")] == [
        f"{name}.activation_mask" for name in LAYERS
    ]

    def loss(network):
        inputs = torch.from_numpy(digits.normalise(digits.validation.images))
        with torch.no_grad():
            return nn.functional.cross_entropy(
                network(inputs), torch.from_numpy(digits.validation.labels)
            ).item()

    assert loss(module) < loss(trained) < 0.8 * loss(pruned)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"sparsity": 1.0}, SpecError, "at least 0 and below 1, got 1.0"),
        ({"method": "topk"}, SpecError, "Did you mean 'top_k'"),
        ({"method": "threshold"}, SpecError, "calibrated on images"),
        ({"images": images()}, SpecError, "top_k needs no images"),
        ({"method": "threshold", "images": images(0)}, DataError, "no calibration images"),
        ({"exclude": ("feature",)}, SpecError, "matches no layer"),
        ({"exclude": ("re:.*",)}, ModelError, "no layer left"),
    ],
)
def test_requests_that_mean_nothing_are_refused(options, error, told):
    with pytest.raises(error, match=told):
        prune_activations(load_model("digits_net"), **{"sparsity": 0.5, **options})


def test_excluded_layers_read_everything_and_nothing_is_pruned_twice():
    pruned = prune_activations(load_model("digits_net"), 0.5, exclude=("re:classifier.*",))
    held = [n for n, m in pruned.named_modules() if isinstance(m, KeepLargest)]
    assert held == ["features.3.activation_mask", "features.7.activation_mask"]
    with pytest.raises(ModelError, match=r"'features\.3' is pruned already"):
        prune_activations(pruned, 0.5)
