"""The command that quantizes, as a person types it: every kind, training, and the choice of an engine."""

import json

import pytest

import tersor
from tersor.artifact import load
from tersor.cli import main


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    recipe = tersor.Finetune(epochs=1, batch_size=64, compile="off", augment="none")
    module = tersor.finetune(
        tersor.load_model("digits_net"), tersor.load_data("digits"), recipe
    ).module
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    tersor.save_weights(module, path)
    return str(path)


def run(capsys, *arguments):
    code = main(["quantize", "digits_net", *map(str, arguments), "--json"])
    told = capsys.readouterr()
    return code, told.out, told.err


def quantized(capsys, weights, out, *arguments):
    given = ("--data", "digits", "--weights", weights, "--num-calibration", 128, "--out", out)
    code, answer, said = run(capsys, *given, *arguments)
    assert code == 0, said
    return json.loads(answer), said


@pytest.mark.parametrize(
    "arguments",
    [
        ("--bits", 4, "--rounding", "gptq", "--bias-correction"),
        ("--bits", 3, "--equalize", "--observer", "entropy"),
        ("--mean-bits", 4.0),
        ("--mode", "weight_only", "--code", "codebook", "--bits", 3),
        ("--mode", "weight_only", "--granularity", "per_group", "--bits", 4, "--group-size", 16),
        ("--code", "ternary", "--bits", 2),
        ("--activation-bits", 6, "--activation-symmetry", "symmetric"),
    ],
    ids=lambda a: " ".join(map(str, a)),
)
def test_every_kind_writes_a_file_that_tells_what_was_asked(capsys, weights, tmp_path, arguments):
    out = tmp_path / "small.tersor"
    answer, _ = quantized(capsys, weights, out, *arguments)
    assert answer["size_bytes"] == out.stat().st_size and answer["bytes_share"] == 1.0
    request = load(out).plan["request"]
    for flag, value in zip(arguments[::2], arguments[1::2], strict=False):
        if not str(value).startswith("--"):
            assert request[flag.removeprefix("--").replace("-", "_")] == value


def test_the_engine_is_chosen_by_measuring(capsys, weights, tmp_path):
    out = tmp_path / "small.tersor"
    answer, said = quantized(capsys, weights, out, "--engine", "auto", "--batch", 4)
    choice = answer["choice"]
    assert choice["batch"] == 4 and choice["engine"] in said
    right = [c for c in choice["candidates"] if c["timing"] and c["model"] == "quantized"]
    fastest = min(right, key=lambda c: c["timing"]["median_ms"])
    assert fastest["engine"] == choice["engine"]
    assert all(c["agreement"] is not None for c in right)


def test_training_with_codes_needs_no_labels_and_is_told(capsys, weights, tmp_path):
    out = tmp_path / "small.tersor"
    answer, _ = quantized(capsys, weights, out, "--mode", "qat", "--bits", 2, "--train-epochs", 0.2)
    assert [layer["bits"] for layer in answer["layers"]][1] == 2
    assert load(out).plan["request"]["mode"] == "qat"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--train-epochs", 1), "--train-epochs does nothing in mode static"),
        (("--use-labels",), "--use-labels does nothing"),
        (("--batch", 4), "do nothing without --engine"),
        (("--engine", "oven", "--data", "digits"), "unknown engine 'oven'"),
        (("--bits", 1), "use code binary"),
        (("--mode", "weight_only", "--rounding", "gptq"), "rounding gptq needs calibration inputs"),
        (("--mode", "weight_only", "--engine", "auto"), "give --data"),
    ],
)
def test_options_that_would_be_ignored_are_refused(capsys, weights, tmp_path, arguments, words):
    out = tmp_path / "small.tersor"
    data = () if "--data" in arguments or "weight_only" in arguments else ("--data", "digits")
    code, _, said = run(capsys, "--weights", weights, "--out", out, *data, *arguments)
    assert code == 2 and words in said
    assert not out.exists()
