"""Dropout of a network that became narrower drops as much less, wherever that network is trained on."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor import pipeline, recipe
from tersor.data import load_data
from tersor.errors import ModelError
from tersor.methods.dropout import fitted_dropout
from tersor.methods.finetune import finetune
from tersor.pipeline import prune_model
from tersor.recipe import run_recipe
from tersor.specs import Finetune, Prune, Recipe

EXAMPLE = torch.zeros(2, 1, 8, 8)
TRAINING = Finetune(epochs=0.2, batch_size=32, compile="off")
REMOVED = Prune(structure="neuron", criterion="l2", sparsity=0.5, multiple_of=1)


def network(units=(24, 16), shares=(0.5, 0.25)):
    """As VGG-16 ends: two hidden layers, each before a dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, units[0]),
        nn.ReLU(),
        nn.Dropout(shares[0]),
        nn.Linear(units[0], units[1]),
        nn.ReLU(),
        nn.Dropout(shares[1]),
        nn.Linear(units[1], 10),
    ).eval()


def shares_of(module):
    return [part.p for part in module.modules() if isinstance(part, nn.Dropout)]


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 24), st.integers(1, 16)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_the_share_falls_as_the_units_do(units, shares):
    original, narrow = network(shares=shares), network(units, shares)
    found = fitted_dropout(narrow, original, EXAMPLE)
    assert shares_of(found) == pytest.approx(
        [shares[0] * units[0] / 24, shares[1] * units[1] / 16], abs=1e-12
    )
    assert shares_of(narrow) == list(shares), "what is given stays"
    assert fitted_dropout(found, original, EXAMPLE) is found, "once is enough"
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(found(images), narrow(images)), "in use nothing is dropped"


def test_what_is_no_narrower_stays_as_it_is():
    original = network()
    assert fitted_dropout(original, original, EXAMPLE) is original
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert fitted_dropout(plain, plain, EXAMPLE) is plain
    assert fitted_dropout(plain, original, EXAMPLE) is plain, "its dropouts have gone"
    wider = network((48, 16))
    assert shares_of(fitted_dropout(wider, original, EXAMPLE)) == [0.5, 0.25]


def test_channels_are_counted_where_maps_are_dropped():
    def convolutional(channels):
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.Dropout2d(0.4), nn.Conv2d(channels, 2, 1)
        )

    found = fitted_dropout(convolutional(3), convolutional(12), EXAMPLE)
    assert found[1].p == pytest.approx(0.1)


def test_an_example_of_another_size_is_refused():
    with pytest.raises(ModelError, match=r"Sequential cannot run an input of \(2, 7\)"):
        fitted_dropout(network((2, 2)), network(), torch.zeros(2, 7))


@pytest.fixture
def trained(monkeypatch):
    """The dropout of each network that the pipeline or a recipe trains."""
    seen = []

    def spied(module, *given, **options):
        seen.append(shares_of(module))
        return finetune(module, *given, **options)

    monkeypatch.setattr(pipeline, "finetune", spied)
    monkeypatch.setattr(recipe, "finetune", spied)
    return seen


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_was_pruned_is_trained_with_less_of_it(trained, rounds):
    splits, original = load_data("digits"), network()
    asked = REMOVED
    if rounds > 1:
        asked = Prune(**{**REMOVED.__dict__, "rounds": rounds, "schedule": "iterative"})
    found = prune_model(original, splits, asked, recovery=TRAINING)
    left = [part.out_features for part in found.module if isinstance(part, nn.Linear)][:2]
    assert left == [12, 8] and len(trained) == rounds
    assert trained[-1] == pytest.approx([0.25, 0.125])
    steps = Recipe((asked, TRAINING))
    again = run_recipe(copy.deepcopy(original), splits, steps)
    assert len(trained) == 2 * rounds and trained[-1] == trained[rounds - 1]
    assert shares_of(again.module) == pytest.approx([0.25, 0.125])
    assert shares_of(original) == [0.5, 0.25]
