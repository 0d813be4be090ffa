"""Depth: where channels alone do not reach a budget, blocks go before them, and what is left is taught."""

import dataclasses as dc

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.artifact import load
from tersor.engines import open_session
from tersor.ondemand import depth, search
from tersor.ondemand.depth import shallower
from tersor.ondemand.details import details
from tersor.ondemand.effort import EFFORTS, Clock, effort_of
from tersor.ondemand.facts import facts
from tersor.ondemand.kept import Kept
from tersor.ondemand.original import given, macs_of, measured_original
from tersor.ondemand.search import Search
from tersor.report.costs import choice_line
from tersor.report.front import choice_words
from tersor.runs import Run


def silent(text, share):
    pass


class Block(nn.Module):
    def __init__(self, width, kernel):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


class Deep(nn.Module):
    """Two blocks that may go, of which the first has nine times the multiplications."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.wide, self.slim = Block(32, 3), Block(32, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))

    def forward(self, x):
        return self.head(self.slim(self.wide(self.stem(x))))


@pytest.fixture(scope="module")
def deep(splits):
    torch.manual_seed(0)
    recipe = tersor.Finetune(epochs=4, batch_size=64, augment="crop", compile="off")
    return tersor.finetune(Deep(), splits, recipe).module


@pytest.fixture(scope="module")
def original(deep, effort, tmp_path_factory):
    kept = Kept(tmp_path_factory.mktemp("original"), Clock(1e6))
    return measured_original(
        given(deep, "digits"), tersor.Budget(drop=5), effort, kept, watch=silent
    )


@pytest.fixture(scope="module")
def known(original, effort, tmp_path_factory):
    kept = Kept(tmp_path_factory.mktemp("known"), Clock(1e6))
    return facts(original, effort, kept, by_macs=True, watch=silent)


@pytest.fixture
def trying(original, known, tmp_path):
    def made(asked, effort="max", labels=True):
        chosen = dc.replace(EFFORTS[effort], minutes=10)
        held = original if labels else dc.replace(original, labels=None)
        return Search(held, known, asked, chosen, Kept(tmp_path, Clock(10)), watch=silent)

    return made


@pytest.fixture
def run(tmp_path):
    with Run(tmp_path / "run") as held:
        yield held


@pytest.fixture
def beyond(original, known):
    """Multiplications that the narrowest network has too many of, and has no more without its largest block."""
    narrow = known.family.macs(known.family.ranked.at(1.0))
    return {"macs": 0.6 * narrow}


def test_a_budget_that_channels_reach_keeps_all_blocks(trying, original):
    start = trying({"macs": 0.5 * original.costs["macs"]})
    assert shallower(start) is start


@pytest.mark.parametrize("name, labels", [("quick", True), ("standard", True), ("max", False)])
def test_blocks_go_only_where_what_is_left_is_taught_from_labels(trying, beyond, name, labels):
    start = trying(beyond, name, labels)
    assert shallower(start) is start


@pytest.mark.parametrize("drop", [{}, {"drop_pt": 1e-3}], ids=["alone", "beside a drop"])
def test_the_dearest_block_goes_first_and_no_more_than_must(trying, beyond, original, deep, drop):
    start = trying(beyond | drop)
    found = shallower(start)
    assert [line.layer for line in found.original.gone.layers] == ["wide"]
    assert found.reached()[1] == ""
    assert macs_of(found.original.graph) < 0.5 * macs_of(original.graph)
    assert found.original.whole is original.module
    assert found.made == start.made, "what was measured of the whole network stays"
    assert any("without the block wide" in note and "macs" in note for note in found.notes)
    np.testing.assert_array_equal(found.original.logits, original.logits)


def test_where_no_block_helps_the_search_ends_with_all_gone(trying, original):
    found = shallower(trying({"macs": 1.0}))
    assert {line.layer for line in found.original.gone.layers} == {"wide", "slim"}
    assert found.reached()[1] == "macs"


def test_for_time_the_block_goes_without_which_the_narrowest_is_fastest(trying, monkeypatch):
    start = trying({"latency_ms": 1e-6})
    asked = []

    def timed(original, plan, engines, *, seconds):
        gone = [line.layer for line in plan.layers if line.action == "bypass"]
        asked.append(gone)
        return (1.0 if gone == ["slim"] else 2.0), 1.0

    monkeypatch.setattr(depth, "probed", timed)
    gone = depth._one_more(start)
    assert asked == [["wide"], ["slim"]]
    assert [line.layer for line in gone.layers] == ["slim"]


@pytest.mark.parametrize(
    "shares, gone",
    [
        ((0.5, 0.9, 0.9), 0),
        ((0.05, 0.04, 0.9), 0),
        ((0.05, 0.07, 0.06), 1),
        ((0.05, 0.06, 0.07), 2),
    ],
)
def test_of_what_is_fast_enough_that_with_the_most_multiplications_is_taught(
    trying, original, monkeypatch, shares, gone
):
    """`shares` of the original's multiplications are left within the time with 0, 1 and 2 blocks gone."""
    start = trying({"latency_ms": 1e3})
    monkeypatch.setattr(depth, "probed", lambda *args, **options: (1.0, 1.0))

    def reached(self):
        lines = self.original.gone.layers if self.original.gone else ()
        return shares[len(lines)] * original.costs["macs"], ""

    monkeypatch.setattr(Search, "reached", reached)
    found = shallower(start)
    assert len(found.original.gone.layers if found.original.gone else ()) == gone


def test_a_model_without_blocks_is_whole_in_file_page_and_class(
    trying, beyond, original, known, splits, run, monkeypatch
):
    monkeypatch.setattr(search.coding, "seconds_to_code", lambda num_weights: 0.0)
    start = trying(beyond)
    run.begin(test="depth")
    start.kept.run = run
    found = shallower(start)
    monkeypatch.setattr(found.clock, "limit", found.clock.passed + 15)
    answer = found.run().answer
    assert answer.choice["without"] == ["wide"] and answer.choice["epochs"] > 0
    assert "epochs on labels" in choice_line(answer.choice)
    assert answer.costs["macs"] <= beyond["macs"]
    assert choice_words(answer.choice).startswith("without wide, ")
    held = load(answer.path)
    again = tersor.load(answer.path, into=Deep().eval())
    assert isinstance(again.wide, nn.Identity)
    images = splits.normalise(splits.test.images[:64])
    with torch.no_grad():
        floats = again(torch.from_numpy(images)).numpy()
    integers = open_session(held, threads=1).run(images)
    assert np.mean(floats.argmax(1) == integers.argmax(1)) > 0.9
    told, _ = details(
        original, known, answer, answer.path, effort_of("quick"), model="Deep", seed=0
    )
    (row,) = [row for row in told["layers"] if row["layer"] == "wide.conv"]
    assert row["action"] == "bypass" and row["reason"] == "its block wide went"
    assert row["weights"] is None and row["weights_before"] == 9 * 32 * 32
    assert row["bits"] is None, "nothing is left that has bits"
