"""One trained network for all tests of the room."""

import pytest

import tersor
from tersor.ondemand.effort import Clock, effort_of
from tersor.ondemand.kept import Kept
from tersor.ondemand.original import given, measured_original


@pytest.fixture(scope="session")
def splits():
    return tersor.load_data("digits")


@pytest.fixture(scope="session")
def net(splits):
    recipe = tersor.Finetune(epochs=10, batch_size=64, augment="crop", compile="off")
    return tersor.finetune(tersor.load_model("digits_net"), splits, recipe).module


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def effort():
    return effort_of("quick", 0.1)


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    return Kept(tmp_path_factory.mktemp("kept"), Clock(1e6))


@pytest.fixture(scope="session")
def original(net, effort, kept):
    return measured_original(
        given(net, "digits"), tersor.Budget(drop=1), effort, kept, watch=lambda *told: None
    )
