"""The command end to end on the embedded digits: tables, sentence, JSON object and page."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tersor.cli import main
from tersor.report.activity import conclusion

COMMAND = ["activity", "digits_net", "--data", "digits", "--num-images", "16", "--batch", "8"]
SHARES = ("input_zeros", "weight_zeros", "macs_zero_input", "macs_zero", "gradient_zeros")


def test_json_has_every_layer_the_times_and_the_accuracies(capsys):
    code = main([*COMMAND, "--labels", "--sparsities", "0.5", "0.9", "--threads", "1", "--json"])
    captured = capsys.readouterr()
    assert code == 0
    answer = json.loads(captured.out)
    assert (answer["num_images"], answer["gradients_from"]) == (16, "labels")
    assert answer["layers"][0]["layer"] == "features.0"
    for layer in answer["layers"]:
        assert all(0 <= layer[key] <= 1 for key in SHARES)
        assert layer["layer"] in captured.err
    assert answer["unreached"] == []
    assert answer["potential_speedup"] == pytest.approx(1 / (1 - answer["macs_zero"]))
    found = answer["obtained"]
    assert found["zeros_dense"] == 0 < found["zeros_real"]
    for name in ("real", "dense"):
        timing = found[name]
        assert (timing["engine"], timing["batch"], timing["threads"]) == ("onnxruntime", 8, 1)
    assert found["speedup"] == found["dense"]["median_ms"] / found["real"]["median_ms"]
    assert [row["sparsity"] for row in answer["pruned"]] == [0.5, 0.9]
    for row in answer["pruned"]:
        assert row["num_samples"] == row["interval"]["num_samples"] == 449
        change = 100 * (row["accuracy"] - row["original_accuracy"])
        assert row["interval"]["difference_pt"] == pytest.approx(change)
    assert conclusion(answer) in captured.err


def test_people_read_tables_and_get_a_page(capsys, tmp_path):
    page, figure = tmp_path / "net.html", tmp_path / "net.svg"
    options = ["--method", "threshold", "--sparsities", "0.7"]
    assert main([*COMMAND, *options, "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "from own answers" in said
    assert "activations pruned by threshold" in said
    assert "skipping them at no cost" in said
    text = page.read_text()
    assert "Content-Security-Policy" in text
    assert not re.findall(r"https?://|<script", text)
    assert main([*COMMAND, "--out", str(figure)]) == 0
    assert ElementTree.parse(figure).getroot().tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.html", "net.svg"]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--out", "x.png"], 2, r"\.html or \.svg"),
        (["--sparsities", "1.0"], 2, "below 1, got 1.0"),
        (["--engine", "onnx"], 2, "unknown engine 'onnx'"),
        (["--num-images", "0"], 1, "no images"),
    ],
)
def test_refusals_are_one_line_and_say_what_is_allowed(options, code, told, capsys):
    assert main([*COMMAND, *options]) == code
    assert re.search(told, capsys.readouterr().err.splitlines()[-1])


def test_a_file_has_no_gradients_to_measure(capsys, tmp_path):
    target = tmp_path / "net.tersor"
    shape = ["--input-shape", "1", "8", "8"]
    assert main(["export", "digits_net", "--to", "tersor", "--out", str(target), *shape]) == 0
    capsys.readouterr()
    assert main(["activity", str(target), "--data", "digits"]) == 1
    assert "activity needs the network itself" in capsys.readouterr().err
