"""What every registered engine that can run here must do with a batch, a wrong batch and a wrong
model."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.engines import ENGINES, open_session
from tersor.engines.openvino import has_bf16
from tersor.errors import EngineError, MissingExtraError, SpecError, UnknownNameError
from tersor.graph import export_onnx


def runs_here(engine):
    """An engine of an extra that is not installed, or of another processor, has no contract."""
    try:
        return not engine.startswith("openvino") or has_bf16() or engine != "openvino_bf16"
    except MissingExtraError:
        return False


EVERY = pytest.mark.parametrize("engine", [name for name in ENGINES if runs_here(name)])
SHAPE = (3, 8, 8)


def small_module():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    module = nn.Sequential(*layers)
    module(torch.randn(16, *SHAPE))  # batch statistics
    return module.eval()


@pytest.fixture(scope="module")
def module():
    return small_module()


@pytest.fixture(scope="module")
def graph(module):
    return export_onnx(module, SHAPE)


def images(count):
    return np.random.default_rng(count).standard_normal((count, *SHAPE)).astype(np.float32)


def session(engine, module, graph, threads=1):
    model = module if engine.startswith("torch") else graph
    return open_session(model, engine=engine, threads=threads)


@EVERY
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_logits_are_those_of_the_module(engine, module, graph, count):
    opened = session(engine, module, graph)
    assert (opened.engine, opened.threads) == (engine, 1)
    logits = opened.run(images(count))
    assert logits.dtype == np.float32
    with torch.no_grad():
        expected = module(torch.from_numpy(images(count))).numpy()
    tolerance = 0.05 if engine.endswith("bf16") else 1e-5
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=tolerance)


@EVERY
def test_a_run_depends_on_its_batch_alone_and_leaves_it_untouched(engine, module, graph):
    opened = session(engine, module, graph)
    batch = images(4)
    before = batch.copy()
    batch.flags.writeable = False
    first = opened.run(batch)
    opened.run(images(3))
    assert np.array_equal(opened.run(batch), first)
    assert np.array_equal(batch, before)
    strided = np.repeat(batch, 2, axis=0)[::2]
    assert np.array_equal(opened.run(strided), first)


@EVERY
@pytest.mark.parametrize(
    "batch, words",
    [
        (np.zeros((0, *SHAPE), np.float32), "empty"),
        (np.zeros((2, 3, 8), np.float32), r"\(N, .*\(2, 3, 8\)"),
        (np.zeros((2, *SHAPE), np.uint8), "float32.*uint8"),
        (np.zeros((2, *SHAPE)), "float32.*float64"),
        ([[1.0]], "numpy array.*list"),
    ],
)
def test_a_wrong_batch_is_named_with_what_is_expected(engine, module, graph, batch, words):
    with pytest.raises(EngineError, match=words):
        session(engine, module, graph).run(batch)


@EVERY
def test_images_of_another_size_are_refused(engine, module, graph):
    with pytest.raises(EngineError, match=r"\(2, 3, 9, 9\)"):
        session(engine, module, graph).run(np.zeros((2, 3, 9, 9), np.float32))


@EVERY
def test_a_model_of_another_kind_is_refused_with_the_remedy(engine, module, graph):
    wrong = graph if engine.startswith("torch") else module
    with pytest.raises(EngineError, match=r"onnxruntime|export_onnx"):
        open_session(wrong, engine=engine)


@EVERY
@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_threads_are_a_positive_integer(engine, module, graph, threads):
    with pytest.raises(SpecError, match="threads"):
        session(engine, module, graph, threads)


def test_an_unknown_engine_is_named():
    with pytest.raises(UnknownNameError, match="Did you mean 'onnxruntime'"):
        open_session(None, engine="onnx_runtime")


def test_threads_default_to_the_cpus_of_this_process(graph):
    assert open_session(graph).threads >= 1
