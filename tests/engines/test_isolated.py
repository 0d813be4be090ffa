"""A child process gives the same logits, its errors, and an EngineError where it dies."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.engines import isolated, open_session
from tersor.engines.isolated import isolated_logits, may_crash
from tersor.errors import EngineError
from tersor.graph import export_onnx

INPUTS = np.random.default_rng(0).standard_normal((5, 2, 3, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(18, 4)), (2, 3, 3))


def run(graph, engine="onnxruntime"):
    return isolated_logits(graph, INPUTS, engine=engine, threads=1, batch=2)


def test_the_child_computes_what_this_process_computes(graph):
    expected = open_session(graph, threads=1).run(INPUTS)
    np.testing.assert_allclose(run(graph), expected, rtol=1e-6)


def test_an_error_of_the_engine_keeps_its_words(graph):
    with pytest.raises(EngineError, match=r"^torch runs a torch\.nn\.Module"):
        run(graph, engine="torch")


@pytest.mark.parametrize(
    "death, words",
    [("import os; os.kill(os.getpid(), 8)", "SIGFPE"), ("import os; os._exit(7)", "exit code 7")],
)
def test_the_end_of_the_child_is_an_error_that_says_how(graph, monkeypatch, death, words):
    monkeypatch.setattr(isolated, "CALL", death)
    with pytest.raises(EngineError, match=f"onnxruntime: its process ended.*{words}"):
        run(graph)


def test_engines_say_whether_they_need_it():
    assert may_crash("openvino")
    assert not may_crash("onnxruntime")
