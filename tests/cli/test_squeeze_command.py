"""A squeezing with a training goes on after a kill: from the network that was coded, and from its checkpoint."""

import json

import pytest

from tersor.cli import main
from tersor.methods import squeezing, training

NETWORK = """
from torch import nn


def net():
    maps = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(128, 10))
"""
OPTIONS = (
    "--size",
    "3kB",
    "--epochs",
    "1",
    "--num-calibration",
    "64",
    "--augment",
    "none",
    "--json",
)


@pytest.fixture
def command(tmp_path):
    (tmp_path / "mine.py").write_text(NETWORK)
    return ["squeeze", f"{tmp_path / 'mine.py'}:net", "--data", "digits", *OPTIONS, "--out"]


def test_a_killed_training_goes_on_from_the_coded_network_to_the_same_file(
    command, capsys, tmp_path, monkeypatch
):
    whole, parts, coded = tmp_path / "whole.tersor", tmp_path / "parts.tersor", []
    real, step = squeezing.code_to_size, training.Loop.step
    monkeypatch.setattr(
        squeezing, "code_to_size", lambda *given, **more: coded.append(1) or real(*given, **more)
    )
    assert main([*command, str(whole)]) == 0 and coded == [1]
    told = json.loads(capsys.readouterr().out)
    assert whole.stat().st_size == told["size_bytes"] <= 3000
    kept = tmp_path / "parts.tersor.steps"

    def interrupted(self, number):
        if number == 2:
            (place,) = (kept / "steps").iterdir()
            self.save(place / "checkpoint")
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(training.Loop, "step", interrupted)
    assert main([*command, str(parts)]) == 130
    (place,) = (kept / "steps").iterdir()
    assert sorted(p.name for p in place.iterdir()) == ["checkpoint", "checkpoint.start"]
    steps = []
    monkeypatch.setattr(
        training.Loop, "step", lambda *given: steps.append(given[1]) or step(*given)
    )
    other = [part if part != "3kB" else "4kB" for part in command]
    assert main([*other, str(parts)]) == 1
    assert "squeeze.size='3kB', now asked for '4kB'" in capsys.readouterr().err
    coded.clear()
    assert main([*command, str(parts)]) == 0
    assert coded == [] and steps[0] == 2, "neither coded nor trained again"
    assert parts.read_bytes() == whole.read_bytes()
    assert not kept.exists()


def test_what_is_refused_leaves_no_directory_behind(command, capsys, tmp_path):
    assert (
        main([*["1kB" if part == "3kB" else part for part in command], str(tmp_path / "x.tersor")])
        == 3
    )
    assert "squeeze.size 1kB" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["mine.py"]
