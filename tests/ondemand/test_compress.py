"""A budget asked is a budget met: on the file and the engine, measured again by other means than the search's own."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.artifact import load
from tersor.bench.drop import measured_drop
from tersor.bench.timing import time_sessions
from tersor.errors import BudgetError, ModelError, RunError, SpecError

MINUTES = 0.3
SHAPE = (1, 8, 8)


def logits(session, images):
    return session.run(np.ascontiguousarray(images))


@pytest.fixture(scope="module")
def found(net, tmp_path_factory):
    out = tmp_path_factory.mktemp("answer") / "out"
    budget = tersor.Budget(size="8x smaller", drop=3.0)
    answer = tersor.compress(net, "digits", budget, out=out, minutes=MINUTES, use_labels=False)
    return answer, out


def test_the_budget_is_met_by_the_file_itself(found, net, splits):
    answer, out = found
    assert answer.path == out / "model.tersor"
    assert answer.path.stat().st_size == answer.size_bytes
    original = 4 * sum(
        t.numel() for t in [*net.parameters(), *net.buffers()] if t.is_floating_point()
    )
    assert original / 8 >= answer.size_bytes and answer.smaller == original / answer.size_bytes
    session = tersor.open_session(load(answer.path), engine=answer.engine)
    test = splits.normalise(splits.test.images)
    with torch.no_grad():
        before = net(torch.from_numpy(test)).numpy()
    fresh = measured_drop(before, logits(session, test), splits.test.labels)
    assert fresh.estimate_pt <= 3.0, (
        "on images the search has never seen, by labels it did not have"
    )


def test_the_held_out_drop_is_that_of_the_file(found, net, splits):
    answer, _ = found
    session = tersor.open_session(load(answer.path), engine=answer.engine)
    held = splits.normalise(splits.validation.images)
    with torch.no_grad():
        before = net(torch.from_numpy(held)).numpy()
    again = measured_drop(before, logits(session, held))
    assert not answer.drop.labelled and again.num_samples == answer.drop.num_samples
    assert again.agreement == answer.drop.agreement
    assert again.estimate_pt == pytest.approx(answer.drop.estimate_pt, abs=0.01)


def test_every_candidate_has_its_row_and_the_front_no_dominated_point(found):
    answer, out = found
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["kind"] == "run" and rows[-1] == {"kind": "done"}
    assert [row["step"] for row in rows[1:3]] == ["original", "candidate 0"]
    assert rows[-2]["step"] == "answer" and rows[-2]["met"]
    built = [row for row in rows if row.get("step", "").startswith("candidate")]
    assert len(built) >= 2 and all(row["size_bytes"] > 0 and row["engine"] for row in built)
    assert any(row["measured"] for row in answer.front)
    costs = [(r["size_bytes"], r["latency_ms"], r["drop_pt"]) for r in answer.front]
    assert len(costs) == len(set(costs))
    result = json.loads((out / "result.json").read_text())
    assert result["met"] and result["size_bytes"] == answer.size_bytes
    assert {p.name for p in out.iterdir()} >= {
        "model.tersor",
        "plan.json",
        "result.json",
        "rows.jsonl",
    }
    assert not (out / "steps").exists()


def test_the_file_goes_back_into_the_users_class(found, net, splits):
    answer, _ = found
    batches = list(splits.batches(splits.calibration, 64))
    again = tersor.load(answer.path, into=tersor.load_model("digits_net"), inputs=batches)
    held = splits.normalise(splits.validation.images)
    with torch.no_grad():
        same = again(torch.from_numpy(held)).argmax(1) == net(torch.from_numpy(held)).argmax(1)
    assert same.float().mean() > 0.9


def test_an_answer_is_given_again_and_not_written_over(found, net):
    answer, out = found
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.lock"}
    options = {"out": out, "minutes": MINUTES, "use_labels": False}
    again = tersor.compress(net, "digits", tersor.Budget(size="8x smaller", drop=3.0), **options)
    assert again.notes[:-1] == answer.notes and "nothing was measured again" in again.notes[-1]
    told, first = again.to_dict(), json.loads(json.dumps(answer.to_dict()))
    for name in set(first) - {"notes"}:
        assert json.loads(json.dumps(told[name])) == first[name], name
    assert again.plan == answer.plan and again.drop == answer.drop
    with pytest.raises(RunError, match=r"holds a run with budget.drop=3.0, now asked for 1"):
        tersor.compress(net, "digits", tersor.Budget(size="8x smaller", drop=1), **options)
    other = tersor.load_model("digits_net", seed=5)
    with pytest.raises(RunError, match="holds a run with weights="):
        tersor.compress(other, "digits", tersor.Budget(size="8x smaller", drop=3.0), **options)
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.lock"}
    assert after == before


def test_latency_and_multiplications_are_met_on_measuring_again(net, tmp_path):
    budget = tersor.Budget(macs="2x fewer", latency="20ms", drop=20)
    answer = tersor.compress(net, "digits", budget, out=tmp_path / "out", minutes=MINUTES)
    session = tersor.open_session(load(answer.path), engine=answer.engine)
    timing = time_sessions({"it": session}, SHAPE, 1, seconds=1)["it"]
    assert timing.median_ms <= 20
    assert answer.macs <= answer.original["macs"] / 2
    narrow = load(answer.path).to_onnx()
    from tersor.graph.layers import weight_layers

    module = tersor.load(answer.path, into=tersor.load_model("digits_net"))
    kept = sum(layer.weight.numel() for _, layer in weight_layers(module))
    assert kept < 0.9 * sum(layer.weight.numel() for _, layer in weight_layers(net))
    assert narrow.graph.node
    assert answer.drop.labelled and answer.drop.interval is not None


def test_an_impossible_budget_names_best_bound_and_layer(net, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        BudgetError, match=r"size [0-9.]+ kB .* at layer '(features|classifier)"
    ) as raised:
        tersor.compress(net, "digits", tersor.Budget(size="2kB", drop=1), out=out, minutes=MINUTES)
    assert raised.value.exit_code == 3
    assert "nearest.tersor" in str(raised.value) and not (out / "model.tersor").exists()
    assert load(out / "nearest.tersor").to_onnx().graph.node
    assert not json.loads((out / "result.json").read_text())["met"]


def test_learning_from_the_original_needs_no_labels(net, splits, tmp_path):
    images = splits.normalise(splits.train.images[:600])
    budget = tersor.Budget(macs="4x fewer")
    answer = tersor.compress(
        net, images, budget, out=tmp_path / "out", effort="standard", minutes=0.8
    )
    assert answer.choice["channels_share"] < 1 and answer.choice["epochs"] > 0
    assert answer.macs <= answer.original["macs"] / 4
    assert "no labels" in answer.data


def test_nothing_is_left_of_the_given_network_but_itself(net, tmp_path):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tersor.compress(net, "digits", tersor.Budget(drop=5), out=tmp_path / "out", minutes=0.1)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_without_data_inputs_come_from_batch_norms_and_that_is_said(net, tmp_path):
    budget = tersor.Budget(size="6x smaller")
    answer = tersor.compress(
        net, None, budget, out=tmp_path / "out", input_shape=SHAPE, minutes=MINUTES
    )
    assert answer.smaller >= 6
    assert "synthetic" in answer.data and any("no data" in note for note in answer.notes)
    splits = tersor.load_data("digits")
    session = tersor.open_session(load(answer.path), engine=answer.engine)
    right = session.run(splits.normalise(splits.test.images)).argmax(1) == splits.test.labels
    assert right.mean() > 0.85, "real images, which it has never seen"


def test_few_inputs_are_told_to_prove_little(net, splits, tmp_path):
    images = splits.normalise(splits.train.images[:80])
    budget = tersor.Budget(drop=0.5)
    answer = tersor.compress(net, images, budget, out=tmp_path / "out", minutes=0.1)
    assert any("cannot show a drop below" in note for note in answer.notes)


def test_a_dry_run_predicts_and_writes_no_model(net, tmp_path):
    budget = tersor.Budget(size="10x smaller")
    answer = tersor.compress(net, "digits", budget, out=tmp_path / "out", dry_run=True)
    assert answer.path is None and answer.size_bytes <= answer.original["size_bytes"] / 10
    assert set(answer.choice["bits"]) == {
        "features.0", "features.3", "features.7", "classifier.0", "classifier.2",
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "out").glob("*.tersor")] == []
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["predicted"]
    assert list((tmp_path / "out" / "steps").glob("bits-*")), (
        "a search goes on from what it measured"
    )


class Plain(nn.Module):
    """No batch norm, no channels that could go: one layer."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(64, 10)

    def forward(self, images):
        return self.only(images.flatten(1))


def test_a_network_without_channels_still_gets_its_bits(splits, tmp_path):
    torch.manual_seed(0)
    images = splits.normalise(splits.train.images[:400])
    answer = tersor.compress(
        Plain(), images, tersor.Budget(drop=8), out=tmp_path / "out", minutes=0.1
    )
    assert any("no channels are removed" in note for note in answer.notes)
    assert answer.choice["channels_share"] == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"effort": "fast"}, SpecError, "quick"),
        ({"minutes": -1}, SpecError, "minutes"),
        ({"data": None}, SpecError, "--input-shape"),
        ({"data": 7}, SpecError, "data is int"),
        ({"model": "x.tersor"}, SpecError, "needs the network itself"),
        ({"weights": "w.pt"}, SpecError, "weights does not apply"),
        ({"out": "x.tersor"}, SpecError, "a directory is expected"),
        ({"data": None, "input_shape": SHAPE, "model": Plain()}, ModelError, "no batch norms"),
    ],
)
def test_requests_that_mean_nothing_are_refused(net, tmp_path, options, error, words):
    given = {"model": net, "data": "digits", "out": tmp_path / "out", **options}
    if options.get("out"):
        given["out"] = tmp_path / options["out"]
    with pytest.raises(error, match=words):
        tersor.compress(given.pop("model"), given.pop("data"), tersor.Budget(drop=1), **given)
