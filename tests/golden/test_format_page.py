"""docs/format.md tells the whole format: a reader written from it alone gives what Tersor gives."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest

from tersor.artifact import load, pack, save
from tersor.artifact.encoding import DTYPES
from tersor.artifact.encodings.codes import Codes

HERE = pathlib.Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "format.md").read_text()


@pytest.fixture(scope="module")
def plain():
    spec = importlib.util.spec_from_file_location("plain_reader", HERE / "plain_reader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(plain, data, artifact):
    header, skeleton, tensors = plain.read(data)
    assert (header["plan"], header["provenance"]) == (artifact.plan, artifact.provenance)
    assert skeleton == artifact.skeleton
    wanted = {**artifact.tensors, **{f"state/{n}": a for n, a in artifact.beside.items()}}
    assert tensors.keys() == wanted.keys()
    for name, (kind, shape, content) in tensors.items():
        assert (kind, shape) == (wanted[name].dtype.name, wanted[name].shape), name
        assert content == wanted[name].tobytes(), name


def test_the_golden_file_reads_as_the_page_says(plain):
    path = HERE / "every_encoding_v2.tersor"
    same(plain, path.read_bytes(), load(path))


@pytest.mark.parametrize("seed", range(4))
def test_codes_of_any_shape_read_as_the_page_says(plain, seed):
    rng = np.random.default_rng(seed)
    shape = [(24, 9, 3, 3), (40, 30), (12, 8, 5, 1), (20, 16, 2, 2)][seed]
    rows, columns = rng.random((shape[0], *[1] * (len(shape) - 1))), rng.random(shape[1:2])
    spread = 8 * rows**2 * columns.reshape(-1, *[1] * (len(shape) - 2))
    found = np.round(rng.laplace(0, 1, shape) * spread)
    found[:, ::5] = 0
    codes = np.clip(found, -128, 127).astype(np.int8)
    for quick in (False, True):
        section = Codes.encode(codes, quick)
        assert plain.codes(plain.Place(section), shape, "int8") == codes.tobytes()
    assert Codes.encode(codes)[0] == 2, "in context"


def test_the_table_of_offsets_is_that_of_the_file(plain, tmp_path):
    """The page's own table cuts the file into its parts."""
    rows = re.findall(r"^\| (\d+) \| (\d+|H) \| ([^|]+) \|", PAGE, re.MULTILINE)
    assert [(int(start), size) for start, size, _ in rows] == [
        (0, "8"), (8, "4"), (12, "4"), (16, "8"), (24, "32"), (56, "H"),
    ]  # fmt: skip
    data = (HERE / "every_encoding_v2.tersor").read_bytes()
    cut = [data[int(a) : int(a) + int(b)] for a, b, _ in rows[:-1]]
    assert " ".join(f"{byte:02X}" for byte in cut[0]) in rows[0][2]
    version, head, total = (int.from_bytes(part, "little") for part in cut[1:4])
    assert (version, total) == (2, len(data)) and f"u32: {version}" in rows[1][2]
    header, *_ = plain.read(data)
    assert 56 + head + header["skeleton"]["size_bytes"] + sum(header["sizes"]) == total


def test_the_page_names_every_encoding_and_type():
    from tersor.artifact import ENCODINGS

    for name in (*ENCODINGS, "derived"):
        assert re.search(rf"^#+ `{name}`", PAGE, re.MULTILINE), name
    assert all(kind in PAGE for kind in DTYPES)


def test_a_plain_file_reads_as_the_page_says(plain, tmp_path):
    artifact = load(HERE / "plain_v1.tersor")
    again = pack(artifact.to_onnx(), plan=artifact.plan, provenance=artifact.provenance)
    save(again, tmp_path / "a.tersor")
    same(plain, (tmp_path / "a.tersor").read_bytes(), again)
