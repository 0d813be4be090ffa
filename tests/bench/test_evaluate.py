"""Accuracy image by image, and each way in which data or an engine can make it meaningless."""

import dataclasses as dc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.bench import evaluate
from tersor.data.arrays import ArraySet, Splits
from tersor.errors import DataError, EngineError, SpecError, UnknownNameError


class Lookup:
    """Answers the class that an image's first pixel says (inputs pass unnormalised: float32)."""

    engine, threads = "lookup", 1

    def __init__(self, classes=4):
        self.classes, self.sizes = classes, []

    def run(self, batch):
        self.sizes.append(len(batch))
        return np.eye(self.classes, dtype=np.float32)[batch[:, 0, 0, 0].astype(int)]


class Fixed:
    """Returns `make(batch)`, on the `number`-th batch only; zeros before."""

    engine, threads = "fixed", 1

    def __init__(self, make, number=0):
        self.make, self.left = make, number

    def run(self, batch):
        self.left -= 1
        return np.zeros((len(batch), 4), np.float32) if self.left >= 0 else self.make(batch)


def splits_of(answers, labels, classes=4):
    answers = np.asarray(answers, np.float32)
    images = np.zeros((len(answers), 1, 2, 2), np.float32)
    images[:, 0, 0, 0] = answers
    labels = None if labels is None else np.asarray(labels, np.int64)
    part = ArraySet(images, labels)
    names = tuple(str(i) for i in range(classes))
    return Splits("toy", part, ArraySet(images, None), part, part, names, (0.0,), (1.0,), 0)


SIX = splits_of([0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 2])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30),
    st.integers(1, 40),
)
def test_per_sample_equals_the_comparison_in_the_datas_order_for_any_batch_size(pairs, batch_size):
    answers, labels = zip(*pairs, strict=True)
    score = evaluate(Lookup(), splits_of(answers, labels), batch_size=batch_size)
    assert score.per_sample.dtype == np.bool_
    assert score.per_sample.tolist() == [a == b for a, b in pairs]
    assert score.num_samples == len(pairs) and score.seconds >= 0


def test_batches_and_progress_end_with_the_short_batch():
    session, told = Lookup(), []
    evaluate(session, SIX, batch_size=4, on_progress=told.append)
    assert session.sizes == [4, 2]
    assert told == [pytest.approx(4 / 6), 1.0]


def test_the_part_asked_for_is_judged():
    other = dc.replace(SIX, validation=splits_of([3], [3]).test)
    assert evaluate(Lookup(), other, "validation").num_samples == 1
    assert evaluate(Lookup(), other, "train").num_samples == 6


def test_uint8_images_arrive_normalised():
    images = np.full((2, 1, 2, 2), 255, np.uint8)
    part = ArraySet(images, np.zeros(2, np.int64))
    seen = []
    session = Fixed(lambda batch: seen.append(batch) or np.zeros((len(batch), 4), np.float32))
    evaluate(session, dc.replace(SIX, test=part, mean=(0.5,), std=(0.25,)))
    assert np.allclose(seen[0], 2.0)


def test_a_part_without_labels_is_refused():
    with pytest.raises(DataError, match="calibration part has no labels"):
        evaluate(Lookup(), SIX, "calibration")


def test_an_empty_part_is_refused():
    with pytest.raises(DataError, match="the test part is empty"):
        evaluate(Lookup(), splits_of([], []))


def test_images_and_labels_of_different_number_are_refused():
    with pytest.raises(DataError, match="6 images but 5 labels"):
        evaluate(Lookup(), splits_of(range(6), [0] * 5))


def test_an_unknown_part_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'validation'"):
        evaluate(Lookup(), SIX, "validatoin")


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(SpecError, match="batch_size"):
        evaluate(Lookup(), SIX, batch_size=0)


@pytest.mark.parametrize(("label", "image"), [(4, 2), (-1, 2), (1000, 2)])
def test_labels_that_the_model_cannot_answer_are_refused(label, image):
    labels = [0, 1, label, 0, 0, 2]
    with pytest.raises(DataError, match=f"label {label} of test image {image} .*model's 4 outputs"):
        evaluate(Lookup(), splits_of([0] * 6, labels), batch_size=2)


def nan_in_second_image(batch):
    output = np.zeros((len(batch), 4), np.float32)
    output[1, 2] = np.nan
    return output


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (nan_in_second_image, "NaN, first for image 1"),
        (lambda batch: np.zeros((len(batch), 4, 1, 1), np.float32), r"shape \(2, 4, 1, 1\)"),
        (lambda batch: np.zeros(len(batch), np.float32), r"shape \(2,\)"),
        (lambda batch: np.zeros((1, 4), np.float32), r"shape \(1, 4\)"),
        (lambda batch: np.zeros((len(batch), 0), np.float32), r"shape \(2, 0\)"),
        (lambda batch: np.array([["a"], ["b"]]), "U1"),
        (lambda batch: None, "NoneType"),
        (lambda batch: [[0.0] * 4] * 2, "list"),
    ],
)
def test_outputs_that_are_no_logits_are_refused_with_the_batch(make, told):
    with pytest.raises(EngineError, match=f"batch 2: .*{told}"):
        evaluate(Fixed(make, number=2), SIX, batch_size=2)


def test_a_number_of_classes_that_changes_is_refused():
    session = Fixed(lambda batch: np.zeros((len(batch), 5), np.float32), number=1)
    with pytest.raises(EngineError, match=r"batch 1: .*earlier batches had 4 classes"):
        evaluate(session, SIX, batch_size=2)


def test_an_infinite_logit_is_an_answer():
    def sure(batch):
        output = np.full((len(batch), 4), -np.inf, np.float32)
        output[:, 0] = 0
        return output

    assert evaluate(Fixed(sure), SIX).accuracy == 0.5
