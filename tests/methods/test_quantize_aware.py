"""Training with codes ends in the same integer graph as quantizing afterwards, and in a better one."""

import dataclasses as dc

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import tersor
from tersor.engines import open_session
from tersor.engines.onnxruntime import inference_session
from tersor.errors import SpecError
from tersor.pipeline import QAT_TRAINING, deployment_graph, quantize_graph, quantize_network
from tersor.specs import Finetune, Quantize

NUM = 200


@pytest.fixture(scope="module")
def data():
    return tersor.load_data("digits", num_calibration=NUM)


@pytest.fixture(scope="module")
def trained(data):
    recipe = Finetune(epochs=3, batch_size=64, compile="off", augment="none")
    return tersor.finetune(tersor.load_model("digits_net"), data, recipe).module


@pytest.fixture(scope="module")
def expected(data, trained):
    graph = deployment_graph(trained, data.input_shape)
    return open_session(graph, threads=1).run(inputs(data))


def inputs(data):
    return next(iter(data.batches(data.validation, len(data.validation))))


def unlabelled(data):
    return dc.replace(data, train=dc.replace(data.train, labels=None))


def training(epochs):
    return dc.replace(QAT_TRAINING, epochs=epochs, batch_size=64, augment="none")


@pytest.mark.parametrize(
    ("code", "bits", "edge_bits"), [("uniform", 2, 8), ("ternary", 2, 0), ("binary", 1, 8)]
)
def test_training_without_labels_beats_rounding_afterwards(
    data, trained, expected, code, bits, edge_bits
):
    spec = Quantize(mode="qat", code=code, bits=bits, edge_bits=edge_bits, num_calibration=NUM)
    found = quantize_network(trained, unlabelled(data), spec, training(2))
    onnx.checker.check_model(found.graph)
    assert found.plan.request == spec and found.num_calibration == NUM
    coded = [d.bits for d in found.plan.layers]
    assert coded[1:-1] == [bits] * len(coded[1:-1]) and coded[0] == coded[-1] == max(
        bits, edge_bits
    )
    for held in found.graph.graph.initializer:
        if held.name.endswith("weight_quantized"):
            values = np.unique(numpy_helper.to_array(held))
            layer = held.name.removesuffix(".weight_quantized")
            (width,) = [d.bits for d in found.plan.layers if d.layer == layer]
            assert len(values) <= 2**width and values.dtype == np.int8
    after = quantize_graph(
        deployment_graph(trained, data.input_shape), data, dc.replace(spec, mode="static")
    )
    errors = [
        float(((open_session(each.graph, threads=1).run(inputs(data)) - expected) ** 2).mean())
        for each in (found, after)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_the_engine_computes_what_was_trained(data, trained):
    """Integer kernels, the graph node by node in float, and the trained module agree."""
    spec = Quantize(mode="qat", bits=3, num_calibration=NUM)
    found = quantize_network(trained, data, spec, training(0.3))
    batch = inputs(data)
    integer = open_session(found.graph, threads=1).run(batch)
    (simulated,) = inference_session(found.graph, 1, optimize=False).run(None, {"input": batch})
    size = np.abs(simulated).max()
    assert np.abs(integer - simulated).max() < 0.03 * size
    assert (integer.argmax(1) == simulated.argmax(1)).mean() > 0.98


def test_the_network_handed_in_stays_as_it_was(data, trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    quantize_network(trained, data, Quantize(mode="qat", num_calibration=NUM), training(0.1))
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_a_training_without_its_mode_is_refused(data, trained):
    with pytest.raises(SpecError, match="mode qat, got mode static"):
        quantize_network(trained, data, Quantize(num_calibration=NUM), training(1))
