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
