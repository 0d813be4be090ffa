"""One trained network for all tests of the room."""

import pytest

import tersor


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
