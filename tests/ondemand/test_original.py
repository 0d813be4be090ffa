"""Costs are compared with the network as it was given; what works on it works on the folded one."""

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.ondemand import candidate, probe
from tersor.ondemand.original import given, measured_original
from tersor.specs import Plan, Prune, Quantize

COPIES = 9  # each value before the linear layer is seen so often


class Copying(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 8), nn.ReLU())  # one place is left
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.head = nn.Linear(16 * COPIES, 10)

    def forward(self, x):
        return self.head(self.pool(self.features(x)).flatten(1))


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Copying().eval()


@pytest.fixture(scope="module")
def original(module, effort, kept):
    return measured_original(
        given(module, "digits"), tersor.Budget(drop=1), effort, kept, watch=lambda *told: None
    )


def test_costs_are_those_of_the_network_as_given(module, original):
    convolution, head = 16 * 64, 16 * 10
    assert original.folded == ("head",)
    assert original.costs["size_bytes"] == 4 * sum(p.numel() for p in module.parameters())
    assert original.costs["macs"] == convolution + COPIES * head
    assert original.macs == convolution + head


def test_the_folded_network_answers_the_same_and_the_given_one_stays(module, original):
    inputs = torch.from_numpy(original.held[:32])
    with torch.inference_mode():
        answers = [m(inputs).numpy() for m in (original.as_given, original.module, module)]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(answers[0], answers[2])
    assert original.as_given.head.in_features == COPIES * original.module.head.weight.shape[1]
    assert original.whole is original.module


def test_where_nothing_is_folded_it_is_one_network(net, effort, kept):
    asked = tersor.Budget(drop=1)
    found = measured_original(given(net, "digits"), asked, effort, kept, watch=lambda *told: None)
    assert found.as_given is found.module is found.whole and not found.folded


@pytest.mark.parametrize("room", [candidate, probe])
def test_times_are_compared_with_the_network_as_given(original, monkeypatch, tmp_path, room):
    compared, real = [], room.open_session

    def opened(network, **options):
        if options.get("engine") == "torch":
            compared.append(network)
        return real(network, **options)

    monkeypatch.setattr(room, "open_session", opened)
    engines = ["onnxruntime"]
    if room is probe:
        probe.probed(original, Plan(Prune(structure="channel", macs=0.5)), engines, seconds=0.1)
    else:
        place, told = tmp_path / "whole.tersor", {"macs": original.macs, "seconds": 0.1}
        candidate.measured(
            original, original.graph, Plan(Quantize()), place, {}, engines=engines, **told
        )
    assert len(compared) == 1 and compared[0] is original.as_given
