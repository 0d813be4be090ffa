"""What the page of a run tells is what the run's own file says, measured again here; and no input leaves it."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import tersor
from tersor.artifact import load
from tersor.cli import main
from tersor.errors import BudgetError, RunError
from tersor.graph.constants import constant_values
from tersor.graph.layers import graph_layers, num_weights
from tersor.ondemand.changed import picture
from tersor.ondemand.page import write_page
from tersor.pipeline import deployment_graph
from tersor.report.changed import pictures_in

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def run(net, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    budget = tersor.Budget(size="14x smaller", energy="3x less", drop=8)  # so in integers
    answer = tersor.compress(net, "digits", budget, out=out, minutes=0.1, seed=0)
    return answer, out, json.loads((out / "details.json").read_text())


def test_the_layers_are_those_of_the_file(run, net):
    answer, _, told = run
    held = load(answer.path)
    weights = constant_values(held.to_onnx())
    graph = deployment_graph(net, SHAPE)
    assert [row["layer"] for row in told["layers"]] == [layer.name for layer in graph_layers(graph)]
    for row in told["layers"]:
        weight = weights[f"{row['layer']}.weight"]
        assert row["weights"] == weight.size and row["outputs"] == weight.shape[0]
        assert row["density"] == np.count_nonzero(weight) / weight.size
        assert row["bits"] == answer.choice["bits"].get(row["layer"], 8)
        assert max(len(np.unique(each)) for each in weight) <= 2 ** row["bits"]
        if answer.choice["mode"] == "static":  # the table holds integer kernels
            assert row["time_ms"] > 0 and row["time_before_ms"] > 0
        else:
            assert row["time_ms"] is None
        assert row["harm_tried_kl"] >= 0
    own = sum(row["size_bytes"] for row in told["layers"])
    assert own + told["rest_bytes"] == answer.path.stat().st_size and told["rest_bytes"] > 0
    assert own <= sum(held.size_of(key) for key in held.tensors)


def test_the_histograms_count_every_weight_and_the_inputs_of_both(run, net):
    answer, _, told = run
    before, after = (
        constant_values(graph)
        for graph in (deployment_graph(net, SHAPE), load(answer.path).to_onnx())
    )
    assert {row["layer"] for row in told["histograms"]} == {row["layer"] for row in told["layers"]}
    for row in told["histograms"]:
        held, name = row["weights"], f"{row['layer']}.weight"
        assert sum(held["before"]) == before[name].size and sum(held["after"]) == after[name].size
        assert held["low"] == before[name].min() and held["high"] == before[name].max()
        edges = np.linspace(held["low"], held["high"], len(held["before"]) + 1)
        assert held["before"] == np.histogram(before[name], edges)[0].tolist()
        assert sum(row["inputs"]["before"]) > 0 and sum(row["inputs"]["after"]) > 0


def test_changed_answers_are_those_of_the_file_on_its_engine(run, net, splits):
    answer, out, told = run
    images = splits.normalise(splits.validation.images)
    session = tersor.open_session(load(answer.path), engine=answer.engine)
    new = session.run(np.ascontiguousarray(images))
    with torch.no_grad():
        old = net(torch.from_numpy(images)).numpy()
    labels = splits.validation.labels
    was, now = old.argmax(1), new.argmax(1)
    held = told["changed"]
    assert held["num_samples"] == len(images) and held["num_changed"] == (was != now).sum()
    assert held["num_changed"] == round((1 - answer.drop.agreement) * len(images))
    assert held["lost"] == ((was == labels) & (now != labels)).sum()
    assert held["won"] == ((was != labels) & (now == labels)).sum()
    assert held["lost"] - held["won"] == round(answer.drop.estimate_pt * len(images) / 100)
    pictures = pictures_in((out / "report.html").read_text())
    assert set(pictures) == {each["index"] for each in held["examples"]}
    for each in held["examples"]:
        i = each["index"]
        assert each["label"] == f"class {labels[i]}" or each["label"] == splits.classes[labels[i]]
        odds = np.exp(new[i].astype(np.float64) - new[i].max())
        assert each["after_confidence"] == pytest.approx((odds / odds.sum()).max(), abs=1e-5)
        shown = np.asarray(Image.open(io.BytesIO(pictures[i])))
        assert shown.shape == (8, 8) and (shown == splits.validation.images[i, 0]).all()


def test_energy_counts_the_weights_that_are_read(run, net):
    answer, _, told = run
    held = told["energy"]
    assert answer.energy_mj == pytest.approx(
        held["compressed_compute_mj"] + held["compressed_memory_mj"]
    )
    weights = num_weights(load(answer.path).to_onnx())
    assert weights == sum(row["weights"] for row in told["layers"])
    # Horowitz 2014: 1.3 nJ for 64 bits from memory; codes that are computed with in float are read as floats.
    size = weights * (1 if held["integers"] else 4)
    assert held["integers"] == (answer.choice["mode"] == "static")
    assert held["compressed_memory_mj"] == pytest.approx(size * 1300 / 8 * 1e-9)
    assert answer.original["energy_mj"] == pytest.approx(
        held["original_compute_mj"] + held["original_memory_mj"]
    )
    assert (held["compressed_measured_mj"] is None) == bool(held["not_measured"])


def test_no_input_is_in_any_file_but_the_page(run, splits):
    _, out, told = run
    assert told["changed"]["examples"], "the case needs an answer that changed"
    for name in ("result.json", "details.json", "plan.json", "rows.jsonl"):
        text = (out / name).read_text()
        assert "base64" not in text and "iVBOR" not in text
        longest = max((len(run) for run in re.findall(r"(?:\d+,\s*)+", text)), default=0)
        assert longest < 8 * 64 * 8, "no list as long as an image"


def test_the_page_is_made_again_from_its_directory_with_its_pictures(run, capsys):
    _, out, _ = run
    first = (out / "report.html").read_text()
    assert main(["report", str(out), "--json"]) in (0, None)
    assert json.loads(capsys.readouterr().out)["report"] == str(out / "report.html")
    assert (out / "report.html").read_text() == first
    (out / "report.html").unlink()
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    page = write_page(out, rows).read_text()
    assert pictures_in(page) == {} and "The pictures were in the page that the run wrote" in page


def test_the_report_command_refuses_what_is_no_answer(run, tmp_path):
    _, out, _ = run
    assert main(["report", str(out), "--markdown", str(tmp_path / "x.md")]) == 2
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "result.json").write_text('{"met": true}')
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(RunError, match="does not hold an answer"):
        write_page(tmp_path, [])
    (tmp_path / "result.json").write_text("[")
    with pytest.raises(RunError, match="cannot be read"):
        write_page(tmp_path, [])


def test_nothing_fits_and_no_examples(net, tmp_path):
    out = tmp_path / "out"
    budget = tersor.Budget(size="2kB", drop=1)
    with pytest.raises(BudgetError, match=r"report\.html shows it"):
        tersor.compress(net, "digits", budget, out=out, minutes=0.1, examples=False)
    page = (out / "report.html").read_text()
    assert "No model within the budget was found" in page
    told = json.loads((out / "details.json").read_text())
    assert not told["changed"]["shown"] and told["changed"]["examples"] == []
    assert "<img" not in page and "--no-examples" in page


def test_a_picture_shows_the_input():
    rng = np.random.default_rng(0)
    color = rng.integers(0, 255, (3, 20, 30), np.uint8)
    shown = np.asarray(Image.open(io.BytesIO(picture(color))))
    assert (shown == np.moveaxis(color, 0, -1)).all()
    floats = rng.standard_normal((1, 300, 200)).astype(np.float32)
    small = Image.open(io.BytesIO(picture(floats)))
    assert max(small.size) == 96 and small.mode == "L"
    flat = np.asarray(Image.open(io.BytesIO(picture(np.full((2, 4, 4), 7.5, np.float32)))))
    assert flat.shape == (4, 4)
    assert base64.b64encode(picture(color))
