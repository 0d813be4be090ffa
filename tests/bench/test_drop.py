"""The drop of accuracy: exact where labels are given, rather too much than too little without."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.bench.drop import measured_drop
from tersor.bench.stats import paired_interval
from tersor.errors import DataError
from tersor.results import Score


def logits(seed, count=400, classes=5, spread=2.0):
    return np.random.default_rng(seed).normal(0, spread, (count, classes)).astype(np.float32)


def test_nothing_changed_loses_nothing_and_still_proves_little_on_few_inputs():
    for count in (10, 1000):
        same = measured_drop(logits(0, count), logits(0, count))
        assert same.estimate_pt == 0 and same.harm_kl == 0 and same.agreement == 1
    assert measured_drop(logits(0, 10), logits(0, 10)).judged_pt > 5
    assert measured_drop(logits(0, 1000), logits(0, 1000)).judged_pt < 0.2


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_without_labels_the_true_drop_is_met_when_the_original_knows_how_sure_it_may_be(noise):
    rng = np.random.default_rng(int(noise * 100))
    original = logits(1, 40_000)
    share = np.exp(original - original.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    labels = (share.cumsum(1) > rng.random((len(share), 1))).argmax(1)  # as probable as it says
    changed = original + rng.normal(0, noise, original.shape).astype(np.float32)
    told, truth = measured_drop(original, changed), measured_drop(original, changed, labels)
    assert told.estimate_pt == pytest.approx(truth.estimate_pt, abs=0.6)
    assert told.estimate_pt < told.high_pt == told.judged_pt
    assert truth.estimate_pt <= 100 * (1 - truth.agreement) + 1e-9


def test_an_original_that_is_too_sure_of_itself_is_told_to_lose_more():
    rng = np.random.default_rng(3)
    original = logits(1, 20_000)
    share = np.exp(original / 3 - (original / 3).max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    labels = (share.cumsum(1) > rng.random((len(share), 1))).argmax(1)
    changed = original + rng.normal(0, 0.5, original.shape).astype(np.float32)
    told, truth = measured_drop(original, changed), measured_drop(original, changed, labels)
    assert told.estimate_pt > truth.estimate_pt


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60))
def test_with_labels_it_is_the_paired_comparison(seed, count):
    rng = np.random.default_rng(seed)
    one, other = logits(seed, count), logits(seed + 1, count)
    labels = rng.integers(0, 5, count)
    found = measured_drop(one, other, labels)
    expected = paired_interval(Score(other.argmax(1) == labels), Score(one.argmax(1) == labels))
    assert found.interval == expected and found.judged_pt == -expected.difference_pt
    assert found.estimate_pt <= found.high_pt + 1e-9
    assert "by labels" in str(found)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros((3, 2)), np.zeros((2, 2))),
        (np.zeros((0, 2)), np.zeros((0, 2))),
        (np.zeros(3), np.zeros(3)),
        (np.full((1, 2), np.nan), np.zeros((1, 2))),
    ],
)
def test_logits_that_cannot_be_compared_are_refused(one, other):
    with pytest.raises(DataError):
        measured_drop(one, other)
