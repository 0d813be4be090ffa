"""Effects of units are derivatives of the loss, and norms are norms, whoever calls the layers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.errors import DataError, ModelError
from tersor.graph.coupling import coupled_groups
from tersor.methods.unit_statistics import first_labels, unit_statistics

IMAGES = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
LABELS = np.array([3, 1, 0, 1, 2])


class Mixed(nn.Module):
    """A stream read twice and written in place, a grouped convolution, a functional call, a flatten."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.grouped, self.up = nn.Conv2d(8, 8, 1, groups=2), nn.ConvTranspose2d(8, 6, 2)
        self.weight, self.head = nn.Parameter(torch.randn(5, 6, 1, 1)), nn.Linear(5 * 25, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.body(x)
        x.relu_()
        x = self.up(self.grouped(x).tanh())
        return self.head(functional.conv2d(x, self.weight).flatten(1))


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    return Mixed().double()


def losses(module, labels=LABELS):
    with torch.no_grad():
        return functional.cross_entropy(module(IMAGES), torch.from_numpy(labels), reduction="none")


def test_effects_against_differences(mixed):
    statistics = unit_statistics(mixed, IMAGES.numpy(), LABELS, gradients=True)
    found = coupled_groups(mixed, IMAGES[:1])
    assert {g.name for g in found.groups} == {"stem", "grouped", "up", "weight"}
    for group in found.groups:
        got = statistics.effects(group)
        assert got.shape == (5, group.num_units)
        readers = [m for m in group.members if m.role == "input"]
        assert readers
        for unit in range(group.num_units):
            ends = []
            for factor in (1 + 1e-5, 1 - 1e-5):
                changed = copy.deepcopy(mixed)
                with torch.no_grad():
                    for member in readers:
                        held = changed.get_parameter(member.name).movedim(member.axis, 0)
                        held[torch.from_numpy(member.index[unit])] *= factor
                ends.append(losses(changed))
            expected = (ends[0] - ends[1]) / 2e-5
            assert torch.allclose(got[:, unit].double(), expected, rtol=1e-4, atol=1e-6)


def test_units_that_no_layer_reads_are_judged_where_they_are_made():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 4)

        def forward(self, x):
            x = x.flatten(2).transpose(1, 2)
            return ((self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)).mean(1)

    torch.manual_seed(0)
    module = Attention().double()
    (group,) = (g for g in coupled_groups(module, IMAGES[:1]).groups if g.num_units == 8)
    statistics = unit_statistics(module, IMAGES.numpy(), LABELS, gradients=True)
    got = statistics.effects(group)[:, 3].double()
    ends = []
    for factor in (1 + 1e-5, 1 - 1e-5):
        changed = copy.deepcopy(module)
        with torch.no_grad():
            for layer in (changed.q, changed.k):
                layer.weight[3] *= factor
                layer.bias[3] *= factor
        ends.append(losses(changed))
    assert torch.allclose(got, (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-7)


def test_norms(mixed):
    statistics = unit_statistics(mixed, IMAGES.numpy(), None, gradients=False)
    assert not statistics.effects_in
    with torch.no_grad():
        x = mixed.stem(IMAGES).relu()
        y = (x + mixed.body(x)).relu()
    expected = x.square().sum((0, 2, 3)).sqrt().float()
    assert torch.allclose(statistics.norms["body.weight"], expected)
    folded = y.square().sum((0, 2, 3)).view(2, 4).sum(0).sqrt().float()
    assert torch.allclose(statistics.norms["grouped.weight"], folded)


def test_without_labels_the_mean_square_is_the_curvature_of_the_distance(mixed):
    """Fisher's information: of 1/2 v F v for a small change of one unit, over many draws of labels."""
    images = IMAGES[:1].numpy().repeat(4000, 0)
    statistics = unit_statistics(mixed, images, None, gradients=True, seed=1)
    found = coupled_groups(mixed, IMAGES[:1])
    group, step = found["up"], 1e-2
    got = statistics.effects(group).square().mean(0) / 2
    original = mixed(IMAGES[:1]).log_softmax(1).detach()
    for unit in range(group.num_units):
        changed = copy.deepcopy(mixed)
        with torch.no_grad():
            changed.weight[:, unit] *= 1 + step
        other = changed(IMAGES[:1]).log_softmax(1).detach()
        distance = (original.exp() * (original - other)).sum() / step**2
        assert float(got[unit]) == pytest.approx(float(distance), rel=0.1)


def test_labels_must_fit(mixed):
    for labels in (LABELS[:3], LABELS + 1, LABELS - 1):
        with pytest.raises(DataError, match="labels"):
            unit_statistics(mixed, IMAGES.numpy(), labels, gradients=True)
    with pytest.raises(ModelError, match="no logits"):
        unit_statistics(nn.Conv2d(3, 4, 1).double(), IMAGES.numpy(), None, gradients=True)
    assert first_labels(None, 3) is None
    assert first_labels([LABELS, LABELS], 7).tolist() == [*LABELS, *LABELS[:2]]
    assert first_labels(LABELS, 2).tolist() == [3, 1]


def test_the_network_is_left_alone(mixed):
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    unit_statistics(mixed, IMAGES.numpy(), LABELS, gradients=True)
    assert all(p.requires_grad and p.grad is None for p in mixed.parameters())
    assert all(torch.equal(before[name], value) for name, value in mixed.state_dict().items())
