"""`tersor benchmark --engine auto` as a person types it."""

import json

import pytest

from tersor.cli import main
from tersor.engines import ENGINES


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    out = tmp_path_factory.mktemp("auto") / "small.tersor"
    arguments = ["quantize", "digits_net", "--data", "digits", "--num-calibration", "64"]
    assert main([*arguments, "--out", str(out)]) == 0
    return str(out)


@pytest.fixture(autouse=True)
def only_what_is_always_there(monkeypatch):
    """One engine, so that the test needs no child processes; tests/bench tries the others."""
    monkeypatch.setattr("tersor.bench.choose.offered_engines", lambda: ["onnxruntime"])
    assert "onnxruntime" in ENGINES


def benchmark(capsys, *arguments):
    code = main(["benchmark", *arguments, "--seconds", "0.1", "--threads", "1"])
    return code, capsys.readouterr()


def test_the_answer_holds_timings_environment_and_the_choice_at_each_batch(file, capsys):
    code, captured = benchmark(
        capsys, file, "--engine", "auto", "--batch", "1", "3", "--data", "digits", "--json",
        "--original", "digits_net",
    )  # fmt: skip
    assert code == 0
    told = json.loads(captured.out)
    assert set(told) == {"timings", "environment", "choice"}
    assert [(c["batch"], c["engine"], c["model"]) for c in told["choice"]] == [
        (1, "onnxruntime", file),
        (3, "onnxruntime", file),
    ]
    assert "256 calibration inputs of " in told["choice"][0]["inputs"]
    assert [(t["model"], t["batch"]) for t in told["timings"]] == [
        ("digits_net", 1), (file, 1), ("digits_net", 3), (file, 3),
    ]  # fmt: skip
    for choice in told["choice"]:
        assert all(c["agreement"]["right"] for c in choice["candidates"])
        assert isinstance(choice["candidates"][1]["slower_than_float"], bool)


def test_without_data_the_table_says_that_noise_was_used(file, capsys):
    code, captured = benchmark(capsys, file, "--engine", "auto", "--batch", "2")
    assert code == 0
    assert "256 seeded noise images" in captured.out
    assert "agreement" in captured.out
    assert "batch 2, 1 threads: " in captured.out


def test_other_engines_are_timed_as_before_and_choose_nothing(file, capsys):
    code, captured = benchmark(capsys, file, "--batch", "1", "--json")
    assert code == 0
    assert json.loads(captured.out)["choice"] is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--engine", "auto", "torch"), "leave out torch"),
        (("--data", "digits"), "--data does nothing without --engine auto"),
    ],
)
def test_options_that_contradict_are_refused(file, capsys, arguments, words):
    code, captured = benchmark(capsys, file, *arguments)
    assert code == 2
    assert words in captured.err
