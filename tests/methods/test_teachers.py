"""Teachers on engines: what they answer, and that a student learns from them as from the network itself."""

import dataclasses as dc

import numpy as np
import pytest
import torch

import tersor
from tersor.data import load_data
from tersor.data.arrays import ArraySet
from tersor.engines import open_session
from tersor.errors import ModelError
from tersor.methods.distill import distill, labelled_by
from tersor.methods.finetune import finetune, training_accuracy
from tersor.methods.teachers import EngineTeacher
from tersor.models import load_model
from tersor.models.narrow import narrowed
from tersor.specs import Finetune

RECIPE = Finetune(
    epochs=4, batch_size=64, augment="none", precision="float32", compile="off", distill=1.0
)


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


@pytest.fixture(scope="module")
def unlabelled(data):
    return dc.replace(data, train=ArraySet(data.train.images, None))


@pytest.fixture(scope="module")
def network(data):
    return finetune(load_model("digits_net"), data, dc.replace(RECIPE, distill=0.0)).module


@pytest.fixture(scope="module")
def in_integers(network, data):
    graph = tersor.export_onnx(network, data.input_shape)
    return tersor.quantize(graph, tersor.Quantize(), list(data.batches(data.calibration, 64))).graph


def test_its_answers_are_the_mean_of_those_of_its_sessions(network, in_integers, data):
    images = next(iter(data.batches(data.validation, 20)))
    sessions = [open_session(held, engine="onnxruntime", threads=1) for held in (in_integers,)]
    sessions.append(open_session(network, engine="torch", threads=1))
    found = EngineTeacher(sessions)(torch.from_numpy(images))
    expected = np.mean([session.run(images) for session in sessions], axis=0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    one = EngineTeacher(sessions[:1])(torch.from_numpy(images).bfloat16())
    assert one.dtype == torch.float32 and one.shape == found.shape


def test_a_student_learns_from_integers_what_it_learns_from_the_network(
    network, in_integers, data, unlabelled
):
    student = narrowed(network, 0.5, data.input_shape)
    teacher = EngineTeacher([open_session(in_integers, engine="onnxruntime", threads=1)])
    judged = labelled_by(network, data, data.validation)
    agreements = {}
    for name, each in (("integers", teacher), ("network", network)):
        learned = distill(each, student, unlabelled, RECIPE).module
        agreements[name] = training_accuracy(learned, data, judged)
    untrained = training_accuracy(student, data, judged)
    gain = agreements["network"] - untrained
    assert gain > 0.2
    assert agreements["integers"] - untrained > 0.9 * gain


def test_teachers_that_answer_different_questions_are_refused(network, data):
    class Fewer:
        engine, threads = "torch", 1

        def run(self, batch):
            return np.zeros((len(batch), 3), np.float32)

    teacher = EngineTeacher([open_session(network, engine="torch", threads=1), Fewer()])
    with pytest.raises(ModelError, match=r"shapes \[\(2, 3\), \(2, 10\)\]"):
        teacher(torch.zeros(2, *data.input_shape))
    with pytest.raises(ModelError, match="at least one"):
        EngineTeacher([])
