"""Inputs without labels: what is held out is never calibrated on, and nothing is lost or invented."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tersor.data import load_data
from tersor.data.unlabelled import from_batches, unlabelled
from tersor.errors import DataError


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 60), st.integers(0, 5), st.booleans())
def test_every_input_has_one_use_and_its_own_label(count, seed, labelled):
    images = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1)
    labels = np.arange(count) if labelled else None
    splits = unlabelled("numbers", images, labels=labels, seed=seed)
    parts = [splits.train.images.ravel(), splits.validation.images.ravel()]
    assert sorted(np.concatenate(parts)) == list(range(count)) and len(splits.test) == 0
    assert set(splits.calibration.images.ravel()) <= set(parts[0])
    assert len(parts[1]) == max(1, round(count / 4))
    for part in (splits.train, splits.validation):
        if labelled:
            assert np.array_equal(part.labels, part.images.ravel())
        else:
            assert part.labels is None


def test_batches_of_any_kind():
    images = torch.randn(10, 3, 4, 4)
    labels = torch.arange(10) % 3
    for batches in (
        [images[:6].numpy(), images[6:].numpy()],
        [images[:6], images[6:]],
        [(images[:6], labels[:6]), (images[6:], labels[6:])],
        [[images]],
    ):
        splits = from_batches("mine", batches)
        held = np.concatenate([splits.train.images, splits.validation.images])
        assert sorted(held.ravel().tolist()) == sorted(images.numpy().ravel().tolist())
    known = from_batches("mine", [(images, labels)])
    assert known.num_classes == 3 and known.validation.labels is not None


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "gave no batches"),
        ([np.zeros((8, 3, 4, 4)), np.zeros((8, 3, 5, 4))], "batch 1"),
        ([np.zeros((8, 4))], "batch 0"),
        ([np.zeros((2, 1, 2, 2))], "too few"),
        ([np.full((8, 1, 2, 2), np.nan)], "input 0"),
        ([np.zeros((8, 1, 2, 2), np.int64)], "int64"),
        (["nonsense"], "batch 0"),
    ],
)
def test_what_cannot_be_used_is_refused(batches, words):
    with pytest.raises(DataError, match=words):
        from_batches("mine", iter(batches))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number in range(12):
        pixels = rng.integers(0, 256, (6 + number, 8, 3), np.uint8)
        place = tmp_path / "photos" / ("more" if number % 2 else ".") / f"{number}.png"
        Image.fromarray(pixels).save(place)
    return tmp_path / "photos"


def test_a_folder_of_photos_needs_no_classes(photos):
    with pytest.raises(DataError, match=r'give "size" in dataset\.json'):
        load_data(f"folder:{photos}")
    (photos / "dataset.json").write_text(json.dumps({"size": [5, 7]}))
    splits = load_data(f"folder:{photos}")
    assert splits.input_shape == (3, 5, 7) and splits.name == "photos"
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9, 3, 0)
    assert splits.train.labels is None
    inputs = splits.normalise(np.concatenate([splits.train.images, splits.validation.images]))
    assert abs(float(inputs.mean())) < 0.02 and float(inputs.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("size", [[5], [0, 4], "5x7", [5.5, 7], 5])
def test_a_size_that_means_nothing_is_refused(photos, size):
    (photos / "dataset.json").write_text(json.dumps({"size": size}))
    with pytest.raises(DataError, match="size must be"):
        load_data(f"folder:{photos}")


def test_a_folder_without_images_is_told(tmp_path):
    with pytest.raises(DataError, match="no images found"):
        load_data(f"folder:{tmp_path}")
