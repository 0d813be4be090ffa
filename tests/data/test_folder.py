"""An image folder: read once, cached, and refused with the name of what is wrong."""

import json
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from tersor.data import folder, load_data
from tersor.data.folder import channel_statistics, load_folder
from tersor.errors import DataError

CLASSES = ("cat", "dog")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("TERSOR_CACHE", str(path))
    return path


@pytest.fixture
def root(tmp_path):
    """Two classes, 10 training and 2 test images each, 6 wide and 4 high, every image different."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 2)):
        for name in CLASSES:
            directory = tmp_path / "pets" / part / name
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (4, 6, 3), np.uint8)
                Image.fromarray(pixels).save(directory / f"{number}.png")
    return tmp_path / "pets"


@pytest.fixture
def decoded(monkeypatch):
    """The files opened by the decoder."""
    opened, real = [], Image.open
    monkeypatch.setattr(folder.Image, "open", lambda file: opened.append(file) or real(file))
    return opened


def test_images_labels_and_classes_are_those_of_the_files(root):
    splits = load_folder(root)
    assert splits.classes == CLASSES and splits.name == "pets"
    assert splits.input_shape == (3, 4, 6)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 4)
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    first = np.asarray(Image.open(root / "test" / "cat" / "0.png"))
    assert np.array_equal(splits.test.images[0], first.transpose(2, 0, 1))
    known = {
        np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes(): CLASSES.index(file.parent.name)
        for file in (root / "train").glob("*/*")
    }
    for part in (splits.train, splits.validation):
        assert [known[image.tobytes()] for image in part.images] == part.labels.tolist()


def test_images_are_decoded_once(root, decoded):
    first = load_folder(root)
    assert len(decoded) == 24
    second = load_data(f"folder:{root}")
    assert len(decoded) == 24, "the second load came from the cache"
    assert np.array_equal(first.train.images, second.train.images)
    load_folder(root, seed=1)
    assert len(decoded) == 24, "another split needs no decoding either"


def test_a_changed_image_is_decoded_again(root, decoded):
    load_folder(root)
    changed = root / "test" / "cat" / "0.png"
    Image.fromarray(np.full((4, 6, 3), 77, np.uint8)).save(changed)
    os.utime(changed, ns=(1, 1))
    assert (load_folder(root).test.images[0] == 77).all()
    assert len(decoded) == 24 + 4, "only the part with the change"


def test_a_damaged_cache_is_made_again(root, cache):
    first = load_folder(root)
    for kept in cache.glob("*.npy"):
        kept.write_bytes(kept.read_bytes()[:100])
    assert np.array_equal(load_folder(root).train.images, first.train.images)


def test_a_cache_that_cannot_be_written_is_told_with_the_remedy(root, cache):
    cache.write_text("a file is in the way")
    with pytest.raises(DataError, match="TERSOR_CACHE"):
        load_folder(root)


def test_statistics_are_those_of_the_training_images(root):
    splits = load_folder(root)
    pixels = np.concatenate([splits.train.images, splits.validation.images]) / 255
    assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-4)
    assert splits.std == pytest.approx(pixels.std((0, 2, 3)), abs=1e-4)


def test_a_constant_channel_has_a_positive_deviation():
    mean, std = channel_statistics(np.zeros((2, 1, 3, 3), np.uint8))
    assert mean == (0.0,) and std[0] > 0


def test_settings_of_the_data_set_are_used(root):
    told = {"name": "Pets (PNG)", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 1]}
    (root / "dataset.json").write_text(json.dumps(told))
    splits = load_folder(root)
    assert (splits.name, splits.mean, splits.std) == (
        "Pets (PNG)",
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 1.0),
    )


@pytest.mark.parametrize(
    "content",
    [
        "{not json",
        "[1, 2]",
        '{"title": "x"}',
        '{"mean": [0.1, 0.2, 0.3]}',
        '{"std": [0.1, 0.2, 0.3]}',
        '{"mean": [0.1], "std": [0.1]}',
        '{"mean": 0.5, "std": 0.5}',
        '{"mean": ["a", "b", "c"], "std": [1, 1, 1]}',
        '{"mean": [0, 0, 0], "std": [1, 0, 1]}',
        '{"mean": [0, 0, 0], "std": [1, -1, 1]}',
        '{"mean": [0, NaN, 0], "std": [1, 1, 1]}',
        '{"mean": [0, 0, 0], "std": [1, Infinity, 1]}',
        '{"mean": [true, 0, 0], "std": [1, 1, 1]}',
        '{"name": 5}',
        '{"name": ""}',
        b"\xff\xfe",
    ],
)
def test_bad_settings_are_refused_by_the_files_name(root, content):
    path = root / "dataset.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"dataset\.json"):
        load_folder(root)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_an_unreadable_image_is_named(root, part, content):
    (root / part / "dog" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"{part}/dog/1\.png: not a readable image"):
        load_folder(root)


def test_any_damage_to_an_image_is_a_named_refusal_or_an_image(root, cache):
    """Decoders raise many kinds of exceptions; none of them may pass."""
    victim = root / "test" / "cat" / "0.png"
    whole, refused = victim.read_bytes(), 0
    load_folder(root)
    for number in range(len(whole)):
        victim.write_bytes(whole[:number] + bytes([whole[number] ^ 0x21]) + whole[number + 1 :])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                folder._decode([victim], (3, 4, 6))
        except DataError as error:
            assert "cat/0.png" in str(error)
            refused += 1
    assert refused > len(whole) // 4


def test_a_bomb_is_refused_by_name(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        load_folder(root)


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_of_another_size_is_named_with_both_sizes(root, part):
    Image.new("RGB", (7, 5)).save(root / part / "dog" / "9.png")
    with pytest.raises(DataError, match=rf"{part}/dog/9\.png: is 7x5 .* 6x4"):
        load_folder(root)


def test_a_cached_test_part_of_another_size_than_new_training_images_is_refused(root):
    load_folder(root)
    for file in (root / "train").glob("*/*"):
        Image.new("RGB", (5, 5)).save(file)
    with pytest.raises(DataError, match="test/cat/0"):
        load_folder(root)


def test_grey_and_transparent_images_become_rgb(root):
    Image.new("L", (6, 4), 9).save(root / "test" / "cat" / "0.png")
    Image.new("RGBA", (6, 4), (1, 2, 3, 0)).save(root / "test" / "cat" / "1.png")
    images = load_folder(root).test.images
    assert (images[0] == 9).all()
    assert images[1][:, 0, 0].tolist() == [1, 2, 3]


def test_a_validation_part_of_its_own_leaves_all_training_images_to_training(root):
    before = load_folder(root)
    (root / "test").rename(root / "val")
    (root / "train").rename(root / "test")
    with pytest.raises(DataError, match="train"):
        load_folder(root)
    (root / "test").rename(root / "train")
    new = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)
    (root / "test" / "dog").mkdir(parents=True)
    Image.fromarray(new).save(root / "test" / "dog" / "0.png")
    splits = load_folder(root)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 4, 1)
    assert np.array_equal(splits.validation.images, before.test.images)
    assert splits.validation.labels.tolist() == before.test.labels.tolist()
    seen = {image.tobytes() for image in splits.train.images}
    assert seen == {i.tobytes() for part in (before.train, before.validation) for i in part.images}
    assert not seen & {image.tobytes() for image in splits.validation.images}
    assert load_folder(root, seed=1).validation.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("part", ["test", "val"])
def test_a_class_without_training_images_is_refused(root, part):
    (root / part / "emu").mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(root / part / "emu" / "0.png")
    with pytest.raises(DataError, match="class 'emu' has no training images"):
        load_folder(root)


def test_an_empty_class_is_refused_and_hidden_folders_are_not_classes(root):
    (root / "train" / ".hidden").mkdir()
    assert load_folder(root).classes == CLASSES
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "readme.txt").write_text("no images here")
    with pytest.raises(DataError, match=r"class 'emu'.*no images"):
        load_folder(root)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_or_empty_part_is_refused(root, part):
    for file in (root / part).glob("*/*"):
        file.unlink()
    with pytest.raises(DataError, match=f"{part}: no images found.*png"):
        load_folder(root)
    for directory in (root / part).iterdir():
        directory.rmdir()
    (root / part).rmdir()
    with pytest.raises(DataError, match=f"no such directory: .*{part}"):
        load_folder(root)


def test_other_files_beside_the_images_are_ignored(root):
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "train" / "notes.txt").write_text("x")
    assert len(load_folder(root).train) == 18


def test_nothing_half_written_is_left_when_the_cache_fails(root, cache, monkeypatch):
    def full(stream, images):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.np, "save", full)
    with pytest.raises(DataError, match="No space left"):
        load_folder(root)
    assert list(cache.iterdir()) == []
