"""A student learns from a teacher alone: without labels, without a change of the teacher."""

import dataclasses as dc

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.data import load_data
from tersor.data.arrays import ArraySet
from tersor.engines import open_session
from tersor.errors import DataError, ModelError, SpecError
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
def teacher(data):
    return finetune(load_model("digits_net"), data, dc.replace(RECIPE, distill=0.0)).module


@pytest.fixture(scope="module")
def unlabelled(data):
    return dc.replace(data, train=ArraySet(data.train.images, None))


def test_without_labels_the_student_comes_to_agree_with_the_teacher(data, unlabelled, teacher):
    student = narrowed(teacher, 0.5, data.input_shape)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    learned = distill(teacher, student, unlabelled, RECIPE).module
    judged = labelled_by(teacher, data, data.validation)
    untrained = training_accuracy(student, data, judged)
    agreement = training_accuracy(learned, data, judged)
    assert agreement > 0.85 and agreement > 2 * untrained
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_labels_do_not_matter_where_the_teacher_is_all(data, unlabelled, teacher):
    student, short = narrowed(teacher, 0.25, data.input_shape), dc.replace(RECIPE, epochs=1)
    weights = [distill(teacher, student, s, short).module.state_dict() for s in (data, unlabelled)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_answers_of_the_teacher_are_those_of_its_logits(data, teacher):
    part = data.validation.take(np.arange(30))
    labelled = labelled_by(teacher.train(), data, part, batch_size=7)
    assert teacher.training and teacher.eval()
    with torch.no_grad():
        logits = teacher(torch.from_numpy(data.normalise(part.images)))
    assert np.array_equal(labelled.labels, logits.argmax(1).numpy())
    assert training_accuracy(teacher, data, labelled) == 1.0


def test_what_cannot_be_is_refused(data, unlabelled, teacher):
    student = narrowed(teacher, 0.5, data.input_shape)
    with pytest.raises(SpecError, match="from labels alone and no teacher"):
        distill(teacher, student, data, dc.replace(RECIPE, distill=0.0))
    with pytest.raises(DataError, match=r"use distill=1\.0"):
        distill(teacher, student, unlabelled, dc.replace(RECIPE, distill=0.5))
    nine = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    with pytest.raises(ModelError, match=r"shape \(2, 10\).*student Sequential \(2, 9\)"):
        distill(teacher, nine, data, RECIPE)
    with pytest.raises(ModelError, match=r"cannot take inputs of \(1, 8, 8\)"):
        distill(teacher, nn.Sequential(nn.Flatten(), nn.Linear(65, 10)), data, RECIPE)


# Teachers on engines


@pytest.fixture(scope="module")
def in_integers(teacher, data):
    graph = tersor.export_onnx(teacher, data.input_shape)
    return tersor.quantize(graph, tersor.Quantize(), list(data.batches(data.calibration, 64))).graph


def test_its_answers_are_the_mean_of_those_of_its_sessions(teacher, in_integers, data):
    images = next(iter(data.batches(data.validation, 20)))
    sessions = [open_session(held, engine="onnxruntime", threads=1) for held in (in_integers,)]
    sessions.append(open_session(teacher, engine="torch", threads=1))
    found = EngineTeacher(sessions)(torch.from_numpy(images))
    expected = np.mean([session.run(images) for session in sessions], axis=0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    one = EngineTeacher(sessions[:1])(torch.from_numpy(images).bfloat16())
    assert one.dtype == torch.float32 and one.shape == found.shape


def test_a_student_learns_from_integers_what_it_learns_from_the_network(
    teacher, in_integers, data, unlabelled
):
    student = narrowed(teacher, 0.5, data.input_shape)
    in_use = EngineTeacher([open_session(in_integers, engine="onnxruntime", threads=1)])
    judged = labelled_by(teacher, data, data.validation)
    agreements = {}
    for name, each in (("integers", in_use), ("network", teacher)):
        learned = distill(each, student, unlabelled, RECIPE).module
        agreements[name] = training_accuracy(learned, data, judged)
    untrained = training_accuracy(student, data, judged)
    gain = agreements["network"] - untrained
    assert gain > 0.2
    assert agreements["integers"] - untrained > 0.9 * gain


def test_teachers_that_answer_different_questions_are_refused(teacher, data):
    class Fewer:
        engine, threads = "torch", 1

        def run(self, batch):
            return np.zeros((len(batch), 3), np.float32)

    in_use = EngineTeacher([open_session(teacher, engine="torch", threads=1), Fewer()])
    with pytest.raises(ModelError, match=r"shapes \[\(2, 3\), \(2, 10\)\]"):
        in_use(torch.zeros(2, *data.input_shape))
    with pytest.raises(ModelError, match="at least one"):
        EngineTeacher([])
