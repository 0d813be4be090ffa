"""The fastest engine that is right: engines with made-up faults and costs, then the real ones."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tersor.bench import timing
from tersor.bench.choose import choose_engine, offered_engines
from tersor.engines import ENGINES
from tersor.engines.saturation import quantized_layers
from tersor.engines.simulation import simulate
from tersor.errors import EngineError, SpecError, UnknownNameError, missing_extra
from tersor.graph import export_onnx
from tersor.methods.quantize import quantize
from tersor.specs import Quantize

SHAPE = (3, 8, 8)
SPEC = Quantize(num_calibration=64, observer="minmax")
LAYERS = ("0", "2", "4", "7")


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def float_graph():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return export_onnx(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)), SHAPE)


@pytest.fixture(scope="module")
def quantized(float_graph):
    graph = quantize(float_graph, SPEC, [images(64)]).graph
    assert quantized_layers(graph) == list(LAYERS)
    return graph


@pytest.fixture
def requantize(float_graph):
    def build(name, left_float):
        spec = Quantize(num_calibration=64, observer="minmax", exclude=tuple(left_float))
        return quantize(float_graph, spec, [images(64)]).graph

    return build


@pytest.fixture
def engine(monkeypatch):
    """Registers an engine that adds `error` to the logits while one of `faulty` is an integer layer,
    and takes `cost` ms for a quantized graph and `float_cost` for another."""
    clock = [0]
    monkeypatch.setattr(timing, "_clock_ns", lambda: clock[0])

    def register(name, *, cost=5, float_cost=10, faulty=(), refuses=None):
        class Fake:
            engine = name

            def __init__(self, graph, threads):
                if refuses is not None:
                    raise refuses
                self.threads = threads
                self.inner = simulate(graph, threads)
                held = quantized_layers(graph)
                self.cost = cost if held else float_cost
                self.wrong = bool(set(faulty) & set(held))

            def run(self, batch):
                clock[0] += round(self.cost * 1e6)
                logits = self.inner.run(batch)
                return logits[:, ::-1] if self.wrong else logits

        monkeypatch.setitem(ENGINES._items, name, Fake)
        return name

    return register


def choose(candidates, engines, **options):
    options = {"batch": 2, "threads": 1, "seconds": 1.0, **options}
    return choose_engine(candidates, images(32), engines=engines, **options)


def row(choice, engine, model="int8"):
    (found,) = [c for c in choice.candidates if (c.engine, c.model) == (engine, model)]
    return found


def test_the_fastest_right_engine_is_chosen_and_a_faster_wrong_one_refused(
    engine, quantized, float_graph
):
    names = [
        engine("slow", cost=7),
        engine("quick", cost=3),
        engine("wrong", cost=1, faulty=("2",)),
    ]
    choice = choose({"int8": quantized}, names, float_graph=float_graph)
    assert (choice.engine, choice.chosen.median_ms) == ("quick", 3)
    assert choice.graph is quantized
    wrong = row(choice, "wrong")
    assert not wrong.agreement.right
    assert (wrong.timing, wrong.refused) == (None, "computes another function")
    assert row(choice, "wrong", "float").agreement.right  # its fault needs integer layers
    assert row(choice, "slow").slower_than_float is False
    assert "another function" in str(choice)
    assert "chosen" in str(choice)


@pytest.mark.parametrize("faulty", [("0",), ("2", "4"), ("7",)])
def test_layers_at_fault_are_left_in_float(engine, quantized, requantize, faulty):
    names = [engine("wrong", cost=1, faulty=faulty), engine("right", cost=3)]
    choice = choose({"int8": quantized}, names, requantize=requantize)
    assert choice.engine == "wrong"
    assert choice.chosen.left_float == faulty
    assert choice.chosen.agreement.right
    assert quantized_layers(choice.graph) == [name for name in LAYERS if name not in faulty]
    assert f"left in float: {', '.join(faulty)}" in str(choice)


def test_a_remedy_of_one_engine_is_tried_first_on_the_next(engine, quantized, requantize):
    names = [engine("wrong", faulty=("2",)), engine("wrong_too", faulty=("2",))]
    asked = []

    def counted(name, left_float):
        asked.append(left_float)
        return requantize(name, left_float)

    choice = choose({"int8": quantized}, names, requantize=counted)
    assert [c.left_float for c in choice.candidates] == [("2",), ("2",)]
    assert asked[-1] == {"2"}
    assert asked.count({"2"}) == 3  # found, confirmed, and tried on the other


def test_where_float_does_not_help_the_engine_is_refused(
    engine, quantized, requantize, monkeypatch
):
    name = engine("broken", faulty=LAYERS)
    kept = quantized_layers(quantized)
    monkeypatch.setattr("tersor.bench.choose.quantized_layers", lambda graph: kept[:2])
    choice = choose({"int8": quantized}, [name], requantize=requantize)
    assert (choice.chosen, choice.graph, choice.engine) == (None, None, None)
    assert "left in float too" in row(choice, "broken").refused
    assert "no engine here computes the right function" in choice.verdict()


def test_a_model_slower_than_float_is_said_plainly(engine, quantized, float_graph):
    names = [engine("a", cost=9, float_cost=20), engine("b", cost=30, float_cost=4)]
    choice = choose({"int8": quantized}, names, float_graph=float_graph)
    assert choice.engine == "a"
    assert choice.chosen.slower_than_float is True
    assert "SLOWER THAN FLOAT, which takes 4 ms on b" in choice.verdict()
    assert choice.verdict() in str(choice)


def test_an_engine_that_is_not_there_or_fails_is_a_row_with_its_reason(engine, quantized):
    names = [
        engine("absent", refuses=missing_extra("openvino", "openvino", "it")),
        engine("failing", refuses=EngineError("failing: no such operator")),
        engine("right"),
    ]
    choice = choose({"int8": quantized}, names)
    assert "pip install 'tersor[openvino]'" in row(choice, "absent").refused
    assert row(choice, "failing").refused == "failing: no such operator"
    assert choice.engine == "right"
    assert choice.chosen.slower_than_float is None  # there was no float graph


def test_of_several_models_the_fastest_is_chosen_and_everything_is_json(
    engine, quantized, float_graph
):
    name = engine("one", cost=5, float_cost=2)
    choice = choose({"int8": quantized, "plain": float_graph}, [name])
    assert (choice.chosen.model, choice.engine) == ("plain", "one")
    told = json.loads(json.dumps(choice.to_dict(), allow_nan=False))
    assert (told["engine"], told["model"], told["batch"], told["threads"]) == ("one", "plain", 2, 1)
    assert told["inputs"] == "32 calibration inputs"
    first = told["candidates"][0]
    assert first["timing"]["median_ms"] == 5
    assert first["agreement"]["right"] is True


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"candidates": {}}, SpecError, "no candidates"),
        ({"candidates": {"float": onnx.ModelProto()}}, SpecError, "'float' is kept"),
        ({"batch": 0}, SpecError, "batch.*0"),
        ({"inputs": np.zeros((0, *SHAPE), np.float32)}, SpecError, r"\(0, 3, 8, 8\)"),
        ({"engines": ["onnx_runtime"]}, UnknownNameError, "Did you mean 'onnxruntime'"),
        ({"candidates": {"empty": onnx.ModelProto()}}, EngineError, "simulation.*0 outputs"),
    ],
)
def test_a_request_that_means_nothing_is_refused(quantized, change, error, words):
    request = {"candidates": {"int8": quantized}, "inputs": images(2), **change}
    with pytest.raises(error, match=words):
        choose_engine(**request)


def test_real_engines_are_chosen_from_and_the_measure_is_not_among_them(quantized, float_graph):
    offered = offered_engines()
    assert "onnxruntime" in offered
    assert "openvino" in offered
    assert not {"simulation", "torch"} & set(offered)
    choice = choose({"int8": quantized}, None, float_graph=float_graph, seconds=0.05)
    assert row(choice, "onnxruntime").agreement.right
    assert choice.engine in offered
    assert {c.engine for c in choice.candidates} == set(offered)
    for found in choice.candidates:
        assert (found.timing is None) == bool(found.refused)
