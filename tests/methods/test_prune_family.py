"""A family's busy networks: within their cost, with more multiplications than equal widths, near these."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import ModelError
from tersor.methods import prune_family
from tersor.methods.prune_family import ChannelFamily


class Net(nn.Module):
    """Three layers whose channels cost differently: the middle ones most."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
        )

    def forward(self, images):
        return self.layers(images)


@pytest.fixture(scope="module")
def family():
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((32, 1, 8, 8)).astype(np.float32)

    def cost_of(found):
        def cost(removed):
            left = {g.name: g.num_units - len(removed.get(g.name, ())) for g in found.groups}
            first, second, third = left.values()
            return 10_000 + 100 * first + 10 * first * second + second * third

        return cost

    return ChannelFamily(Net().eval(), images, torch.zeros(1, 1, 8, 8), cost_of=cost_of)


def widths(family, units):
    return {g.name: g.num_units - len(units[g.name]) for g in family.ranked.groups}


@pytest.mark.parametrize("part", [0.15, 0.3, 0.5, 0.7, 0.9])
def test_a_busy_network_keeps_the_cost_and_has_more_multiplications_than_equal_widths(family, part):
    share = family.least_share + part * (1 - family.least_share)
    units = family.busiest(share)
    limit = share * family.whole
    assert family.cost(units) <= limit
    assert family.macs(units) >= family.macs(family._equal(limit))
    for group in family.ranked.groups:
        step = family.ranked.lowest(group, max(len(units[group.name]) - 1, 0))
        wider = {**units, group.name: step}
        within = family.cost(wider) <= limit and len(step) < len(units[group.name])
        floor = family.cost(family.ranked.at(1.0))
        bound = floor + prune_family.EQUAL * (limit - floor)
        equal = widths(family, family._equal(bound))[group.name]
        most = max(prune_family.WIDER * equal, equal + family.spec.multiple_of)
        assert not within or group.num_units - len(step) > most, "what was left could be used"
        assert widths(family, units)[group.name] <= most


class Classifier(nn.Module):
    """Two hidden layers much wider than the vector before them, as VGG-16's; of tokens where `tokens`."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        self.features = nn.Conv2d(1, 32, 8 if not tokens else 4, stride=4)
        self.first, self.second = nn.Linear(32, 256), nn.Linear(256, 256)
        self.last = nn.Linear(256, 10)

    def forward(self, images):
        x = torch.relu(self.features(images)).flatten(2).transpose(1, 2)  # (N, places, 32)
        x = x if self.tokens else x[:, 0]
        x = self.last(torch.relu(self.second(torch.relu(self.first(x)))))
        return x.mean(1) if self.tokens else x


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_hidden_layer_of_one_vector_is_no_wider_than_what_it_reads(tokens, share):
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((16, 1, 8, 8)).astype(np.float32)
    family = ChannelFamily(Classifier(tokens).eval(), images, torch.zeros(1, 1, 8, 8))
    units = family.busiest(share)
    left = widths(family, units)
    assert family.cost(units) <= share * family.whole
    if tokens:
        assert not family._of_vectors and left["first"] > left["features"]
    else:
        assert left["features"] >= left["first"] >= left["second"] > 0


def test_a_hidden_layer_may_be_wider_than_the_network_s_own_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    net.append(nn.Linear(256, 10))
    images = np.random.default_rng(0).standard_normal((16, 1, 2, 2)).astype(np.float32)
    family = ChannelFamily(net.eval(), images, torch.zeros(1, 1, 2, 2))
    first, second = widths(family, family.busiest(0.3)).values()
    assert first >= second > 4


def test_more_cost_gives_more_multiplications_and_all_the_whole(family):
    shares = np.linspace(family.least_share + 0.02, 0.99, 12)
    macs = [family.macs(family.busiest(share)) for share in shares]
    assert macs[-1] > 2 * macs[0]
    assert not any(map(len, family.busiest(1.0).values()))
    with pytest.raises(ModelError, match="stays"):
        family.busiest(0.9 * family.least_share)
