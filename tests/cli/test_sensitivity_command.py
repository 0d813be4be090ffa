"""The command end to end on the embedded digits: table, sentence, JSON object and picture."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from tersor.cli import main
from tersor.models import load_model, save_weights
from tersor.report.sensitivity import conclusion


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command with a network whose logits are far apart; training would add no claim."""
    out = tmp_path_factory.mktemp("home") / "net.safetensors"
    module = load_model("digits_net", seed=0)
    with torch.no_grad():
        *_, head = (m for m in module.modules() if isinstance(m, torch.nn.Linear))
        head.weight *= 30
    save_weights(module, out)
    return ["sensitivity", "digits_net", "--weights", str(out), "--data", "digits"]


def test_json_has_every_layer_with_its_harms_and_rank(command, capsys):
    code = main([*command, "--bits", "4", "2", "--num-images", "24", "--json"])
    captured = capsys.readouterr()
    assert code == 0
    answer = json.loads(captured.out)
    assert set(answer) == {"model", "data", "num_images", "seconds", "bits", "layers"}
    assert (answer["model"], answer["num_images"], answer["bits"]) == ("digits_net", 24, [2, 4])
    layers = answer["layers"]
    assert sorted(layer["rank"] for layer in layers) == list(range(1, len(layers) + 1))
    by_rank = sorted(layers, key=lambda layer: layer["rank"])
    harms = [layer["harm_kl_nats"]["2"] for layer in by_rank]
    assert harms == sorted(harms, reverse=True)
    assert sum(layer["macs_share"] for layer in layers) == pytest.approx(1)
    for layer in layers:
        assert set(layer["harm_kl_nats"]) == set(layer["harm_mse"]) == {"2", "4"}
        assert layer["harm_input_8bit_kl_nats"] is None
        assert layer["layer"] in captured.err
    assert conclusion(answer) in captured.err


def test_people_read_the_unit_and_the_worst_layers_and_get_a_page(command, capsys, tmp_path):
    page, figure = tmp_path / "net.html", tmp_path / "net.svg"
    options = ["--bits", "2", "8", "--num-images", "8"]
    assert main([*command, *options, "--inputs", "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "KL divergence in nats" in said
    assert "input 8 bits" in said
    assert "hurt most: KL" in said
    text = page.read_text()
    assert "Content-Security-Policy" in text
    assert not re.findall(r"https?://|<script", text)
    assert main([*command, *options, "--out", str(figure)]) == 0
    assert ElementTree.parse(figure).getroot().tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.html", "net.svg"]


REFUSALS = {
    "bits": (["--bits", "9"], 2, "whole numbers from 1 to 8, got 9"),
    "ending": (["--out", "x.png"], 2, r"\.html or \.svg"),
    "images": (["--num-images", "0"], 2, "num_calibration|num_images"),
    "model": (["--num-classes", "3"], 1, "3|shape|classes"),
}


@pytest.mark.parametrize("options, code, said", REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_one_line_and_say_what_is_allowed(
    command, options, code, said, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *options]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(said, captured.err)
    assert not list(tmp_path.iterdir())
