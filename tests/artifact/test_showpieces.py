"""Every committed file of results/squeezed is the one that results/squeeze.json speaks of, and runs without torch."""

import json
import pathlib
import subprocess
import sys

import pytest

import tersor

RESULTS = pathlib.Path(__file__).parents[2] / "results"
PIECES = sorted((RESULTS / "squeezed").glob("*"))

CHILD = """
import json, sys
import numpy as np
import tersor
held = tersor.load(sys.argv[1])
graph = held.to_onnx()
weights = [tensor for tensor in held.tensors.values() if tensor.dtype.kind == "f"]
dims = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
images = np.random.default_rng(0).standard_normal((1, *dims[1:])).astype(np.float32)
logits = tersor.open_session(held, engine="onnxruntime", threads=1).run(images)
print(json.dumps({
    "torch": "torch" in sys.modules,
    "model": held.provenance["model"],
    "weights": sum(tensor.size for tensor in held.tensors.values()),
    "finite": all(bool(np.isfinite(tensor).all()) for tensor in weights),
    "shape": logits.shape,
    "logits_finite": bool(np.isfinite(logits).all()),
    "spread": float(np.ptp(logits)),
}))
"""


def test_there_are_pieces():
    assert PIECES
    assert all(path.suffix == ".tersor" for path in PIECES)


@pytest.mark.parametrize("path", PIECES, ids=lambda path: path.stem)
def test_a_piece_has_the_bytes_of_its_row_and_runs_without_torch(path):
    size = path.stat().st_size
    model, _, name = path.stem.rpartition("_")
    assert name == f"{size // 1000}kB"
    rows = json.loads((RESULTS / "squeeze.json").read_text())["rows"]
    (row,) = (row for row in rows if (row["model"], row["size_bytes"]) == (model, size))
    narrow = any(how in row["form"] for how in ("-channel-", "-widths-", "kB-"))

    done = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert not told["torch"] and told["model"] == model
    assert told["weights"] > (600_000 if narrow else 10_000_000) and told["finite"]
    assert told["shape"] == [1, {"resnet18": 10, "vgg16_bn": 1000}[model]]
    assert told["logits_finite"] and told["spread"] > 0


@pytest.mark.parametrize(
    "path", [p for p in PIECES if p.stat().st_size < 1e6], ids=lambda p: p.stem
)
def test_a_narrow_piece_goes_back_into_its_class(path):
    """Their files hold no plan of the channels that are gone; `load` compares the answers."""
    model = path.stem.rpartition("_")[0]
    module = tersor.load(path, into=tersor.load_model(model))
    assert type(module) is type(tersor.load_model(model))
    assert sum(p.numel() for p in module.parameters()) < 12e6
