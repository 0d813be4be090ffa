"""An image folder: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, or images alone, without labels; decoded once
and cached as arrays. DIR/val/CLASS/*.jpg, where there is one, is the validation part, else a tenth of train is.

An optional DIR/dataset.json may hold `name`, `mean` and `std`; otherwise the folder's name is used and the
statistics are computed from the training images. Its `size`, [height, width], is what every image is resized to.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tersor.data.arrays import ArraySet, Splits, split
from tersor.data.unlabelled import image_files, unlabelled
from tersor.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


def cache_dir() -> pathlib.Path:
    """Where decoded images are kept: $TERSOR_CACHE, else the user's cache directory."""
    if set_dir := os.environ.get("TERSOR_CACHE"):
        return pathlib.Path(set_dir)
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "tersor"


def load_folder(
    directory: str | os.PathLike[str], *, seed: int = 0, num_calibration: int = 512
) -> Splits:
    """Read an image folder. All images must have one size (the first training image's), unless dataset.json gives
    one.

    A folder with neither train nor test in it is taken as images without labels (see data.unlabelled). Raises
    DataError for a missing folder, no images, a class that the training part has not, an image that cannot be read or
    has another size; the message names the file.
    """
    root = pathlib.Path(directory)
    if root.is_dir() and not any((root / part).exists() for part in ("train", "test")):
        return _without_labels(root, seed, num_calibration)
    train_files = _files(root / "train")
    test_files = _files(root / "test")
    classes = tuple(sorted({f.parent.name for f in train_files}))
    folders = {d.name for d in (root / "train").iterdir() if d.is_dir() and d.name[0] != "."}
    if empty := sorted(folders - set(classes)):
        raise DataError(
            f"{root / 'train'}: class {empty[0]!r} holds no images; add some, or remove its folder"
        )
    val_files = _files(root / "val") if (root / "val").exists() else []
    for part, files in (("test", test_files), ("val", val_files)):
        if unknown := sorted({f.parent.name for f in files} - set(classes)):
            raise DataError(f"{root / part}: class {unknown[0]!r} has no training images")
    settings = _settings(root)
    size = settings.get("size")
    train = _cached(train_files, classes, size=size)
    test = _cached(test_files, classes, expected=train.images.shape[1:], size=size)
    val = (
        _cached(val_files, classes, expected=train.images.shape[1:], size=size)
        if val_files
        else None
    )
    mean, std = settings.get("mean"), settings.get("std")
    if mean is None or std is None:
        mean, std = channel_statistics(train.images)
    return split(
        str(settings.get("name", root.resolve().name)),
        train,
        test,
        classes,
        tuple(float(m) for m in mean),
        tuple(float(s) for s in std),
        seed=seed,
        num_calibration=num_calibration,
        validation=val,
    )


def _without_labels(root: pathlib.Path, seed: int, num_calibration: int) -> Splits:
    files = image_files(root, SUFFIXES)
    if not files:
        raise DataError(
            f"{root}: no images found, and neither train/CLASS/ nor test/CLASS/ folders; allowed endings: "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    settings = _settings(root)
    images = _cached(files, (), size=settings.get("size")).images
    mean, std = settings.get("mean"), settings.get("std")
    if mean is None or std is None:
        mean, std = channel_statistics(images)
    return unlabelled(
        str(settings.get("name", root.resolve().name)),
        images,
        mean=tuple(float(m) for m in mean),
        std=tuple(float(s) for s in std),
        seed=seed,
        num_calibration=num_calibration,
    )


def channel_statistics(
    images: npt.NDArray[Any],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (N, C, H, W) scaled to 0..1, 4 digits."""
    counts = np.stack(
        [np.bincount(images[:, c].reshape(-1), minlength=256) for c in range(images.shape[1])]
    )
    level = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ level
    std = np.sqrt(np.maximum(share @ level**2 - mean**2, 1e-8))
    return tuple(np.round(mean, 4).tolist()), tuple(np.round(std, 4).tolist())


def _files(part: pathlib.Path) -> list[pathlib.Path]:
    if not part.is_dir():
        raise DataError(
            f"no such directory: {part}; an image folder needs train/CLASS/*.jpg and test/CLASS/*.jpg"
        )
    files = sorted(p for p in part.glob("*/*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(
            f"{part}: no images found in CLASS/ folders; allowed endings: {', '.join(sorted(SUFFIXES))}"
        )
    return files


def _settings(root: pathlib.Path) -> dict[str, Any]:
    path = root / "dataset.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    allowed = {"name", "mean", "std", "size"}
    if not isinstance(found, dict) or set(found) - allowed:
        raise DataError(f"{path}: expected an object with {', '.join(sorted(allowed))} only")
    size = found.get("size", [1, 1])
    whole = isinstance(size, list) and all(isinstance(v, int) and 1 <= v <= 4096 for v in size)
    if not whole or len(size) != 2:
        raise DataError(f"{path}: size must be [height, width] in pixels, got {size!r}")
    name = found.get("name", "data")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{path}: name must be text, got {name!r}")
    if "mean" in found or "std" in found:
        for key in ("mean", "std"):
            values = found.get(key)
            if not (isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))):
                raise DataError(
                    f"{path}: {key} must be 3 finite numbers (mean and std go together), got "
                    f"{values!r}"
                )
        if min(found["std"]) <= 0:
            raise DataError(f"{path}: std must be positive, got {found['std']}")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cached(
    files: list[pathlib.Path],
    classes: tuple[str, ...],
    expected: tuple[int, ...] | None = None,
    size: list[int] | None = None,
) -> ArraySet:
    """Decode `files`, or map the arrays that an earlier call with the same files left in the cache; without
    `classes` there are no labels."""
    key = hashlib.sha256(b"" if size is None else repr(size).encode())
    for file in files:
        stat = file.stat()
        key.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    labels = np.array([classes.index(f.parent.name) for f in files], np.int64) if classes else None
    path = cache_dir() / f"{key.hexdigest()[:32]}.npy"
    images = _kept(path, len(files))
    if images is None:
        images = _decode(files, expected, size)
        _keep(path, images)
    if expected is not None and images.shape[1:] != tuple(expected):
        raise DataError(
            f"{files[0]}: size {images.shape[1:]} differs from the training images' {tuple(expected)}"
        )
    return ArraySet(images, labels)


def _kept(path: pathlib.Path, count: int) -> npt.NDArray[np.uint8] | None:
    """The cached array, or None where there is none or it is damaged: then it is made again."""
    try:
        images = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    fits = images.dtype == np.uint8 and images.ndim == 4 and len(images) == count
    return images if fits else None


def _keep(path: pathlib.Path, images: npt.NDArray[np.uint8]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                np.save(stream, images)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"decoded images cannot be kept in {path.parent}: {error}; set TERSOR_CACHE to a "
            "directory that can be written and has room"
        ) from None


def _decode(
    files: list[pathlib.Path], expected: tuple[int, ...] | None, size: list[int] | None = None
) -> npt.NDArray[np.uint8]:
    images: npt.NDArray[np.uint8] | None = None
    for index, file in enumerate(files):
        try:
            with Image.open(file) as image:
                colours = image.convert("RGB")
                if size is not None:
                    colours = colours.resize((size[1], size[0]), Image.Resampling.BILINEAR)
                pixels = np.asarray(colours, np.uint8).transpose(2, 0, 1)
        except Exception as error:  # decoders raise SyntaxError, struct.error and more
            raise DataError(
                f"{file}: not a readable image ({error}); remove or replace it"
            ) from None
        if images is None:
            images = np.empty((len(files), *(expected or pixels.shape)), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{file}: is {pixels.shape[2]}x{pixels.shape[1]} pixels, the others are "
                f"{images.shape[3]}x{images.shape[2]}; resize the images to one size, or "
                'give "size" in dataset.json'
            )
        images[index] = pixels
    assert images is not None, "callers pass at least one file"
    return images
