"""The command end to end on the embedded digits: a narrowed student, a student of one's own, resumption, refusals."""

import json
import pathlib
import re

import pytest

from tersor.artifact import load
from tersor.cli import main
from tersor.methods import training
from tersor.models import load_weights_
from tersor.models.narrow import narrowed

RECIPE = ("--epochs", "4", "--batch-size", "64", "--augment", "none", "--compile", "off")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A trained network, made by the command itself."""
    out = tmp_path_factory.mktemp("home") / "net.safetensors"
    assert main(["train", "digits_net", "--data", "digits", "--out", str(out), *RECIPE]) == 0
    return ["digits_net", "--weights", str(out), "--data", "digits"]


def run(capsys, *arguments):
    code = main(["distill", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if "--json" in arguments else None, captured


def test_a_narrowed_student_learns_without_labels(teacher, capsys, tmp_path):
    out, weights = tmp_path / "small.tersor", tmp_path / "small.safetensors"
    code, told, captured = run(
        capsys,
        *teacher,
        "--width",
        "0.25",
        "--out",
        out,
        "--save-weights",
        weights,
        *RECIPE,
        "--json",
    )
    assert code == 0
    assert told["recipe"]["distill"] == 1
    assert told["student"] == "digits_net narrowed to 0.25"
    assert told["student_parameters"] < 0.1 * told["teacher_parameters"]
    assert told["agreement"] > 0.8 and told["student_accuracy"] > 0.8
    assert told["size_bytes"] == out.stat().st_size
    assert load(out).provenance["teacher"] == "digits_net"
    assert "epoch" in captured.err and "answers as the teacher does" in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.safetensors", "small.tersor"]
    again = narrowed("digits_net", 0.25, (1, 8, 8), multiple_of=8)
    load_weights_(again, weights)
    assert sum(p.numel() for p in again.parameters()) == told["student_parameters"]


def test_a_student_of_ones_own_learns_and_people_get_a_table(teacher, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))\n"
    )
    own = f"{tmp_path / 'mine.py'}:net"
    code, _, captured = run(
        capsys, *teacher, "--student", own, "--out", tmp_path / "mine.tersor", *RECIPE
    )
    assert code == 0
    assert "validation, n = " in captured.out and "accuracy %" in captured.out


def test_a_killed_training_goes_on_where_it_was(teacher, capsys, tmp_path, monkeypatch):
    """Ctrl-C in the middle: the checkpoint is kept, and the answer of the resumed run is that of one in one go."""
    whole, parts = tmp_path / "whole.tersor", tmp_path / "parts.tersor"
    kept = tmp_path / "parts.tersor.steps"
    options = (*RECIPE, "--precision", "float32", "--json")
    _, expected, _ = run(capsys, *teacher, "--out", whole, *options)
    step, seen = training.Loop.step, []

    def interrupted(self, number):
        seen.append(number)
        if number == 20:
            (checkpoint,) = (kept / "steps").iterdir()
            self.save(checkpoint / "checkpoint")
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(training.Loop, "step", interrupted)
    assert main(["distill", *teacher, "--out", str(parts), *options]) == 130
    assert not parts.exists() and kept.exists()
    capsys.readouterr()
    monkeypatch.setattr(training.Loop, "step", lambda *a: seen.append(a[1]) or step(*a))
    seen.clear()
    code, told, _ = run(capsys, *teacher, "--out", parts, *options)
    assert code == 0 and seen[0] == 20
    assert told["agreement"] == expected["agreement"]
    assert parts.read_bytes() == whole.read_bytes()
    assert not kept.exists()


REFUSALS = {
    "both": (
        ["--student", "digits_net", "--width", "0.5"],
        2,
        "--width narrows the network itself",
    ),
    "start": (["--student", "digits_net", "--start", "teacher"], 2, "--start narrows"),
    "width": (["--width", "1.5"], 2, "width is above 0 and below 1, got 1.5"),
    "unknown start": (["--start", "best"], 2, "start must be one of random, teacher"),
    "no teacher": (["--distill", "0"], 2, "learns from labels alone"),
    "unknown student": (["--student", "digit_net"], 2, "Did you mean 'digits_net'"),
    "ending": (["--out", "x.onnx"], 2, r"\.tersor"),
    "other outputs": (["--student", "NINE.py:net"], 1, r"student Sequential \(2, 9\)"),
    "file": (["--student", "x.tersor"], 2, "unknown model"),
}


@pytest.mark.parametrize("options, code, said", REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_one_line_and_nothing_is_written(
    teacher, options, code, said, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    nine = tmp_path / "NINE.py"
    nine.write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))\n"
    )
    out = [] if "--out" in options else ["--out", "small.tersor"]
    assert main(["distill", *teacher, *out, *options]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(said, captured.err)
    nine.unlink()
    assert not [p for p in tmp_path.iterdir() if p.name != "__pycache__"]


def test_a_deployed_file_is_no_teacher(capsys, tmp_path):
    file = pathlib.Path(__file__).parent.parent / "golden" / "plain_v1.tersor"
    code, _, captured = run(capsys, file, "--data", "digits", "--out", tmp_path / "small.tersor")
    assert code == 1
    assert "distillation needs the network itself" in captured.err
