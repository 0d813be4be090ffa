"""Which of two forms is faster, by the clock; here by a clock of our own."""

import pytest

import tersor.bench.forms as forms
from tersor.bench.forms import faster_forms
from tersor.errors import SpecError
from tersor.graph.export import export_onnx
from tersor.models import load_model
from tersor.results import Timing


@pytest.fixture(scope="module")
def graph():
    return export_onnx(load_model("digits_net"), (1, 8, 8))


def test_only_what_is_faster_at_every_batch_is_named(graph, monkeypatch):
    seen = []

    def timed(sessions, shape, batch, *, seconds):
        assert set(sessions) == {"usual", "other"} and shape == (1, 8, 8)
        seen.append(batch)
        other = {1: 10.0, 2: 9.0, 3: 9.7}[batch]
        ms = {"usual": 10.0, "other": other}
        return {name: Timing("onnxruntime", batch, 1, value, 0, 0, 3) for name, value in ms.items()}

    monkeypatch.setattr(forms, "time_sessions", timed)
    pairs = {"layer": (graph, graph)}
    assert faster_forms(pairs, batches=(2,), threads=1) == ["layer"]
    for batches in ((2, 1), (3,)):
        assert faster_forms(pairs, batches=batches, threads=1) == []
    assert seen == [2, 2, 1, 3]


def test_the_clock_is_the_interleaved_one(graph):
    assert faster_forms({}, threads=1) == []
    with pytest.raises(SpecError, match="seconds must be finite"):
        faster_forms({"layer": (graph, graph)}, threads=1, seconds=0)
