"""When an engine counts as right, and what is said of logits that cannot be compared."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tersor.engines.agreement import RELATIVE_BOUND, agreement, check_engine
from tersor.errors import EngineError

LOGITS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 8), st.integers(2, 5)), elements=st.floats(-8, 8, width=32)
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(LOGITS)
def test_equal_logits_are_right_whatever_they_are(logits):
    found = agreement(logits, logits.copy())
    assert found.right
    assert (found.top1_share, found.relative, found.max_difference) == (1, 0, 0)
    assert found.num_samples == len(logits)


def test_the_numbers_are_those_of_their_definitions():
    reference = np.array([[3, 4], [0, 12]], np.float32)
    logits = np.array([[3, 1], [0, 12]], np.float32)
    found = agreement(reference, logits)
    assert found.top1_share == found.same_or_tied_share == 0.5
    assert (found.max_difference, found.mean_difference) == (3, 0.75)
    assert found.relative == pytest.approx(3 / 13)  # sqrt(9 / 4) / sqrt(169 / 4)
    assert not found.right
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["right"] is False


@given(st.floats(0, 1), st.integers(0, 99))
def test_noise_is_right_up_to_the_bound_and_wrong_beyond(share, seed):
    reference = normal(400, 10, seed=seed)
    noise = normal(400, 10, seed=seed + 100)
    noise *= np.sqrt((reference**2).mean() / (noise**2).mean())
    assert agreement(reference, reference + 0.4 * RELATIVE_BOUND * share * noise).right
    assert not agreement(reference, reference + RELATIVE_BOUND * (1.01 + share) * noise).right


def test_a_class_that_rounding_may_decide_is_no_error_and_another_is():
    reference = np.tile(np.array([1, 1 + 1e-4, -1], np.float32), (50, 1))
    flipped = reference[:, [1, 0, 2]]
    found = agreement(reference, flipped)
    assert (found.top1_share, found.same_or_tied_share, found.right) == (0, 1, True)
    clear = np.zeros((50, 1000), np.float32)
    clear[:, 0], clear[:, 1:] = 1, 0.9
    other = clear.copy()
    other[:2, 0] = 0.89  # two of fifty images: more than 2 %
    found = agreement(clear, other)
    assert found.relative < RELATIVE_BOUND
    assert not found.right


def test_an_engine_that_mixes_images_or_classes_up_is_wrong():
    reference = normal(64, 10)
    assert not agreement(reference, np.roll(reference, 1, axis=0)).right
    assert not agreement(reference, np.roll(reference, 1, axis=1)).right


def test_a_reference_of_zeros_is_met_by_zeros_alone():
    zeros = np.zeros((4, 3), np.float32)
    assert agreement(zeros, zeros).right
    found = agreement(zeros, zeros + 1)
    assert not found.right
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "reference, logits, words",
    [
        (normal(4, 3), normal(4, 2), r"\(4, 2\).*\(4, 3\)"),
        (normal(4, 3), normal(4), r"the engine.*\(4,\)"),
        (normal(2, 3), np.array([[1, 2, 3], [1, np.nan, 3]], np.float32), "engine.*image 1"),
        (np.full((1, 2), np.inf, np.float32), np.ones((1, 2), np.float32), "reference.*image 0"),
    ],
)
def test_logits_that_cannot_be_compared_are_refused(reference, logits, words):
    with pytest.raises(EngineError, match=words):
        agreement(reference, logits)


class Doubling:
    engine, threads = "fake", 1

    def __init__(self):
        self.sizes = []

    def run(self, batch):
        self.sizes.append(len(batch))
        return 2 * batch.reshape(len(batch), -1)


def test_an_engine_is_checked_at_the_batch_size_that_is_meant():
    session, reference = Doubling(), Doubling()
    found = check_engine(session, reference, normal(7, 1, 2, 2), batch=3)
    assert (session.sizes, reference.sizes) == ([3, 3, 1], [7])
    assert found.right
    assert found.num_samples == 7
