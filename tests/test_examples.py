"""The README's example and those of examples/ run as they stand."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    directory = tmp_path_factory.mktemp("example")
    told = run(ROOT / "examples" / "shrink_digits.py", "digits.tersor", cwd=directory)
    return directory / "digits.tersor", told


def test_the_example_shrinks_and_stays_accurate(shrunk):
    path, told = shrunk
    size, accuracy = re.match(r"(\d+) bytes, accuracy ([\d.]+)", told).groups()
    assert int(size) == path.stat().st_size
    assert float(accuracy) > 0.9


def test_serving_needs_no_torch(shrunk):
    path, _ = shrunk
    np.save(path.with_name("batch.npy"), np.zeros((3, 1, 8, 8), np.float32))
    told = run(ROOT / "examples" / "serve.py", path, path.with_name("batch.npy"), cwd=path.parent)
    assert len(told.split()) == 3


def test_the_readme_example_runs(tmp_path):
    code = re.search(
        r"## Ten lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    told = run("-c", code.group(1), cwd=tmp_path)
    size, accuracy = told.split("bytes\n")
    assert int(size) == (tmp_path / "digits.tersor").stat().st_size
    assert float(accuracy) > 0.8


@pytest.fixture
def photos(tmp_path):
    """A folder of unlabelled images, and trained weights for examples/my_model.py."""
    import torch
    from PIL import Image
    from torch import nn

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from my_model import net
    finally:
        sys.path.pop(0)
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "holiday").mkdir(parents=True)
    pixels = rng.integers(0, 90, (160, 12, 12, 3), np.uint8)
    kinds = np.arange(160) % 4
    for image, kind in zip(pixels, kinds, strict=True):  # a bright quarter tells the class
        image[(kind // 2) * 6 :][:6, (kind % 2) * 6 :][:, :6] += 150
    for number, image in enumerate(pixels):
        place = "." if number % 2 else "holiday"
        Image.fromarray(image).save(tmp_path / "photos" / place / f"{number}.png")
    torch.manual_seed(0)
    module = net().train()
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = inputs.mean((0, 2, 3), keepdim=True), inputs.std((0, 2, 3), keepdim=True)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module((inputs - mean) / std), torch.from_numpy(kinds))
        loss.backward()
        optimizer.step()
    torch.save(module.state_dict(), tmp_path / "my_weights.pt")
    return tmp_path


def test_a_network_of_ones_own_and_a_folder_without_labels(photos):
    command = (
        "compress", ROOT / "examples" / "my_model.py:net", "--weights", "my_weights.pt",
        "--data", "folder:photos", "--size", "3x smaller", "--drop", "5", "--minutes", "0.2",
        "--out", "small",
    )  # fmt: skip
    call = "import sys; from tersor.cli import main; sys.exit(main(sys.argv[1:]))"
    told = run("-c", call, *command, cwd=photos)
    assert (photos / "small" / "model.tersor").is_file()
    assert "no labels" in told and "x smaller" in told
    serve = re.search(r"serve it.*?:\n\n(.*?)\n\n", told, re.DOTALL).group(1)
    lines = [line.strip() for line in serve.splitlines()]
    assert len(lines) == 5
    answer = run("-c", "\n".join(lines), cwd=photos)
    assert re.fullmatch(r"\[[0-3]\]\n", answer)
