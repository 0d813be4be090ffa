"""Splits are disjoint, complete, seeded, and the calibration inputs carry no labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.data import ArraySet, split
from tersor.errors import DataError, SpecError


def numbered(count, start=0):
    """Images whose every pixel is the image's own number, labels the number too."""
    numbers = np.arange(start, start + count)
    images = np.broadcast_to(numbers[:, None, None, None], (count, 1, 2, 2)).astype(np.float32)
    return ArraySet(images.copy(), numbers.astype(np.int64))


def make(count=50, test=10, **options):
    classes = tuple(str(i) for i in range(count + test))
    return split("toy", numbered(count), numbered(test, 1000), classes, (0.5,), (0.25,), **options)


def members(part):
    return part.images[:, 0, 0, 0].astype(int).tolist()


@given(
    count=st.integers(2, 200),
    share=st.floats(0.01, 0.99),
    num_calibration=st.integers(1, 300),
    seed=st.integers(0, 2**63),
)
def test_the_four_uses_of_any_data_set(count, share, num_calibration, seed):
    held = round(count * share)
    options = {"validation_share": share, "num_calibration": num_calibration, "seed": seed}
    if held < 1 or held >= count:
        with pytest.raises(DataError, match="too few"):
            make(count, **options)
        return
    splits = make(count, **options)
    train, validation = members(splits.train), members(splits.validation)
    assert sorted(train + validation) == list(range(count)), "disjoint and complete"
    assert len(validation) == held
    assert members(splits.test) == list(range(1000, 1010)), "the test part is left as it is"
    calibration = members(splits.calibration)
    assert calibration == train[:num_calibration]
    assert splits.calibration.labels is None
    for part in (splits.train, splits.validation, splits.test):
        assert part.labels.tolist() == members(part), "labels stay with their images"


def test_the_order_depends_on_the_seed_alone():
    assert members(make(seed=3).train) == members(make(seed=3, num_calibration=7).train)
    assert members(make(seed=3).train) != members(make(seed=4).train)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    make(seed=3)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"num_calibration": 0}, "num_calibration must be 1 or more, got 0"),
        ({"num_calibration": -5}, "num_calibration"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, culprit):
    with pytest.raises(SpecError, match=culprit):
        make(**options)


@pytest.mark.parametrize(("count", "test"), [(0, 5), (1, 5), (4, 5), (50, 0)])
def test_too_few_images_are_refused_with_their_numbers(count, test):
    with pytest.raises(DataError, match=f"{count} training and {test} test images are too few"):
        make(count, test)


def test_normalise_is_the_formula_for_bytes_and_nothing_for_floats():
    splits = make()
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    expected = (pixels.astype(np.float64) / 255 - 0.5) / 0.25
    found = splits.normalise(pixels)
    assert found.dtype == np.float32 and np.allclose(found, expected, atol=1e-6)
    ready = splits.train.images
    assert splits.normalise(ready) is ready


def test_batches_cover_a_part_in_order():
    splits = make(33)
    batches = list(splits.batches(splits.train, 8))
    assert [len(b) for b in batches] == [8, 8, 8, 6]
    assert np.array_equal(np.concatenate(batches), splits.train.images)


def test_take_copies():
    whole = numbered(4)
    taken = whole.take(np.array([2, 0]))
    taken.images[:] = -1
    assert members(whole) == [0, 1, 2, 3] and taken.labels.tolist() == [2, 0]
    assert ArraySet(whole.images, None).take(np.array([1])).labels is None


def test_shape_and_classes():
    splits = make(20, 5)
    assert splits.input_shape == (1, 2, 2) and splits.num_classes == 25
