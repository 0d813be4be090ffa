"""Data sets by name: the embedded digits, the user's own function, and every refusal."""

import numpy as np
import pytest

from tersor.data import cifar10, load_data
from tersor.data.load import DATASETS
from tersor.errors import DataError, SpecError, UnknownNameError


@pytest.fixture
def user(tmp_path):
    """A file whose function `data` returns the expression given; its name for load_data."""

    def write(expression):
        path = tmp_path / "own.py"
        path.write_text(
            "import numpy as np\n"
            "images = np.arange(240, dtype=np.uint8).reshape(20, 3, 2, 2)\n"
            "floats = np.zeros((20, 3, 2, 2))\n"
            "labels = np.arange(20) % 4\n"
            f"def data():\n    return {expression}\n"
        )
        return f"{path}:data"

    return write


def test_digits_have_their_sizes_and_cover_the_whole_set():
    splits = load_data("digits", num_calibration=100)
    parts = (splits.train, splits.validation, splits.test)
    assert sum(map(len, parts)) == 1797 and len(splits.test) == 449
    assert len(splits.calibration) == 100 and splits.calibration.labels is None
    assert splits.input_shape == (1, 8, 8) and splits.num_classes == 10
    for part in parts:
        assert part.images.dtype == np.uint8 and part.images.max() == 255
        assert set(part.labels.tolist()) == set(range(10))
    normalised = splits.normalise(np.concatenate([splits.train.images, splits.validation.images]))
    assert abs(normalised.mean()) < 0.01 and abs(normalised.std() - 1) < 0.01


def test_the_test_part_of_digits_is_the_same_for_every_seed():
    first, second = load_data("digits", seed=0), load_data("digits", seed=1)
    assert np.array_equal(first.test.images, second.test.images)
    assert not np.array_equal(first.train.images, second.train.images)


def test_the_digits_keep_their_sixteen_levels():
    from sklearn.datasets import load_digits

    images = load_data("digits").test.images
    back = np.round(images / 255 * 16)
    assert set(np.unique(back)) == set(range(17))
    originals = {image.tobytes() for image in load_digits().images.astype(np.uint8)}
    assert all(image.astype(np.uint8).tobytes() in originals for image in back[:, 0])


def test_a_users_arrays_become_splits(user):
    splits = load_data(user("(images, labels), (images[:5], labels[:5])"))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 2, 5)
    assert splits.num_classes == 4 and splits.train.labels.dtype == np.int64
    assert splits.name.endswith("own.py:data")
    assert max(splits.mean) <= 1


def test_a_users_floats_pass_as_they_are(user):
    splits = load_data(user("(floats + 7, labels.tolist()), (floats.tolist(), labels)"))
    assert splits.mean == (0.0,) * 3 and splits.std == (1.0,) * 3
    assert splits.train.images.dtype == np.float32
    assert (splits.normalise(splits.train.images) == 7).all()


def test_a_users_splits_are_taken_as_they_are(user):
    made = load_data(user("__import__('tersor.data', fromlist=['x']).load_data('digits', seed=5)"))
    assert made.name == "scikit-learn digits" and made.seed == 5


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("None", "returned NoneType; expected a Splits or"),
        ("(images, labels)", "expected a Splits or"),
        ("5", "returned int"),
        ("((images, labels, 1), (images, labels))", "returned tuple"),
        ("((images[0], labels), (images, labels))", r"train images have shape \(3, 2, 2\)"),
        ("((images[:0], labels[:0]), (images, labels))", "train images have shape"),
        ("((images[:, :0], labels), (images[:, :0], labels))", "train images have shape"),
        ("((images, labels), (images[:, :1], labels))", "train images are .* test images"),
        ("((images, labels[:5]), (images, labels))", r"train labels have shape \(5,\)"),
        ("((images, labels), (images, labels[:, None]))", r"test labels have shape \(20, 1\)"),
        ("((images, labels / 2), (images, labels))", "type float64"),
        ("((images, labels - 1), (images, labels))", "train label -1 is negative"),
        ("((floats * np.nan, labels), (floats, labels))", "train image 0 holds NaN"),
        ("((floats, labels), (floats + np.inf, labels))", "test image 0 holds NaN or infinity"),
        ("((images.astype(int), labels), (images.astype(int), labels))", "int64"),
        ("((images, labels), (floats, labels))", "uint8.*float32"),
        ("(([[1], [1, 2]], labels), (images, labels))", "train images"),
        ("((images.astype(str), labels), (images, labels))", "train images"),
        ("((images.astype(object), labels), (images, labels))", "train images"),
        ("((images, [[1], [1, 2]]), (images, labels))", "train labels"),
        ("1 / 0", "data raised ZeroDivisionError: division by zero"),
        ("data(1)", "TypeError"),
        ("((images[:3], labels[:3]), (images, labels))", "too few"),
    ],
)
def test_what_a_users_function_returns_wrongly_is_told(user, expression, told):
    with pytest.raises(DataError, match=told):
        load_data(user(expression))


@pytest.mark.parametrize(
    ("name", "nearest"), [("digit", "digits"), ("CIFAR10", "cifar10"), ("cifar_10", "cifar10")]
)
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(UnknownNameError) as refused:
        load_data(name)
    known = (*DATASETS, "folder:DIR", "FILE.py:FUNCTION")
    assert all(item in str(refused.value) for item in (name, *known))
    if name.islower():
        assert f"Did you mean {nearest!r}?" in str(refused.value)


def test_a_missing_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no such directory: .*train"):
        load_data(f"folder:{tmp_path / 'none'}")
    with pytest.raises(SpecError, match=r"no such file: .*none\.py"):
        load_data(f"{tmp_path / 'none.py'}:data")


class Archive:
    """Stands in for torchvision's loader: 60,000 images (small ones), without the network."""

    classes = tuple("abcdefghij")

    def __init__(self, root, train, download):
        count = 50_000 if train else 10_000
        self.data = np.zeros((count, 4, 4, 3), np.uint8)
        self.data[:, 0, 1, 2] = 9
        self.targets = (np.arange(count) % 10).tolist()


def test_cifar10_gives_the_sizes_promised(monkeypatch, tmp_path):
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Archive)
    splits = load_data("cifar10")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (45_000, 5_000, 10_000)
    assert splits.input_shape == (3, 4, 4) and (splits.test.images[:, 2, 0, 1] == 9).all()
    assert splits.name == "CIFAR-10" and splits.classes == Archive.classes


@pytest.mark.parametrize(
    "error", [OSError("no route"), RuntimeError("File not found or corrupted.")]
)
def test_a_failed_download_is_told_with_the_remedy(monkeypatch, tmp_path, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    with pytest.raises(DataError, match=r"cifar10: the download .*folder:DIR"):
        cifar10.load_cifar10()
