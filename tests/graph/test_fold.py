"""Folding is exact: the same function in float64, the same zeros, and nothing else is touched."""

import copy

import pytest
import torch
from torch import nn

from tersor.graph.fold import fold_copies_, unfold_copies_

EXAMPLE = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


class Net(nn.Module):
    """VGG's end in small: a 1x1 map of 5 channels, pooled up to `size`, then linear layers."""

    def __init__(self, size=(3, 3), between=None, copies=None):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(size)
        high, wide = (size, size) if isinstance(size, int) else size
        self.between = between or (lambda maps: maps.flatten(1))
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(5 * (copies or high * wide), 7), nn.ReLU(), nn.Linear(7, 4)
        )

    def forward(self, images):
        return self.classifier(self.between(self.pool(self.features(images))))


def seeded(make):
    torch.manual_seed(0)
    return make().double().eval()


def same_function(first, second, inputs=None):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        return torch.allclose(first(inputs), second(inputs), rtol=1e-10, atol=1e-10)


def random_mask(shape, density=0.4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) < density


@pytest.mark.parametrize("size", [(3, 3), 7, (2, 5), (1, 2)])
def test_folding_and_unfolding_keep_the_function(size):
    module = seeded(lambda: Net(size))
    original = copy.deepcopy(module)
    folded, masks = fold_copies_(module, EXAMPLE)
    assert [f.linear for f in folded] == ["classifier.1"] and masks == {}
    assert module.classifier[1].weight.shape == (7, 5) and module.classifier[1].in_features == 5
    assert same_function(module, original)
    unfold_copies_(module, folded)
    assert same_function(module, original)
    assert module.classifier[1].weight.shape == original.classifier[1].weight.shape
    assert module.classifier[1].in_features == original.classifier[1].in_features
    assert module.pool.output_size == original.pool.output_size


def test_masked_weights_fold_to_the_masked_function_and_come_back_with_the_same_zeros():
    module = seeded(Net)
    key = "classifier.1.weight"
    mask = random_mask(module.classifier[1].weight.shape)
    mask[2] = False  # a row that loses everything
    mask[:, 9:18] = False  # all copies of one input
    with torch.no_grad():
        module.classifier[1].weight.mul_(mask)
    original = copy.deepcopy(module)
    folded, small = fold_copies_(module, EXAMPLE, {key: mask})
    assert same_function(module, original)
    assert torch.equal(small[key], mask.view(7, 5, 9).any(2))
    assert not module.classifier[1].weight[~small[key]].any()
    unfold_copies_(module, folded, {key: mask})
    assert same_function(module, original)
    assert not module.classifier[1].weight[~mask].any(), "no removed weight came back"
    assert torch.equal(module.classifier[1].weight != 0, mask), "and no other was lost"
    assert torch.isfinite(module.classifier[1].weight).all()


def test_weights_under_the_mask_that_are_not_yet_zero_are_left_out():
    module = seeded(Net)
    key = "classifier.1.weight"
    mask = random_mask(module.classifier[1].weight.shape)
    pruned = copy.deepcopy(module)
    with torch.no_grad():
        pruned.classifier[1].weight.mul_(mask)
    fold_copies_(module, EXAMPLE, {key: mask})
    assert same_function(module, pruned)


def test_other_masks_pass_through_and_the_callers_are_left_alone():
    module = seeded(Net)
    masks = {
        "classifier.3.weight": random_mask((4, 7)),
        "classifier.1.weight": random_mask((7, 45)),
    }
    before = dict(masks)
    _, small = fold_copies_(module, EXAMPLE, masks)
    assert masks == before and small["classifier.3.weight"] is masks["classifier.3.weight"]


def permuted(maps):
    return maps.permute(0, 2, 3, 1).flatten(1)


def positions(maps):
    flat = maps.flatten(1)
    return flat + torch.arange(flat.shape[1], dtype=flat.dtype)


class Direct(nn.Module):
    """A map of more than 1x1 before the pool: nothing is copied."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 5, 5)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.classifier = nn.Linear(45, 4)

    def forward(self, images):
        return self.classifier(self.pool(self.features(images)).flatten(1))


class Twice(Net):
    """The linear layer is called twice: its second input is no copy."""

    def forward(self, images):
        first = self.classifier[1](self.pool(self.features(images)).flatten(1))
        return first + self.classifier[1](images.flatten(1)[:, :45])


class TwoHeads(Net):
    """Two linear layers read the same copies."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(45, 7)

    def forward(self, images):
        maps = self.pool(self.features(images)).flatten(1)
        return self.classifier[1](maps) + self.other(maps)


class SharedPool(Net):
    """The pool serves a second map, which is larger than 1x1."""

    def forward(self, images):
        first = self.classifier[1](self.pool(self.features(images)).flatten(1))
        return first + self.pool(images).sum((1, 2, 3))[:, None]


@pytest.mark.parametrize(
    "make",
    [
        Direct,
        lambda: Net((1, 1)),
        lambda: Net(between=permuted),
        lambda: Net(between=positions),
        Twice,
        TwoHeads,
        SharedPool,
        lambda: nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten(), nn.Linear(5, 2)),
    ],
)
def test_where_no_copies_are_read_nothing_is_touched(make):
    module = seeded(make)
    original = copy.deepcopy(module)
    folded, _ = fold_copies_(module, EXAMPLE)
    assert folded == []
    before, after = original.state_dict(), module.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert same_function(module, original)
    unfold_copies_(module, folded)
    assert same_function(module, original)


def test_elementwise_layers_between_do_not_hinder():
    module = seeded(lambda: Net(between=lambda maps: torch.relu(maps * 2 - 0.1).flatten(1)))
    original = copy.deepcopy(module)
    folded, _ = fold_copies_(module, EXAMPLE)
    assert len(folded) == 1 and same_function(module, original)


def test_a_frozen_layer_stays_frozen():
    module = seeded(Net)
    module.classifier[1].weight.requires_grad_(False)
    folded, _ = fold_copies_(module, EXAMPLE)
    assert not module.classifier[1].weight.requires_grad
    unfold_copies_(module, folded)
    assert not module.classifier[1].weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_mode_hooks_and_batch_statistics_are_as_before(training):
    module = seeded(lambda: nn.Sequential(nn.BatchNorm2d(3), Net())).train(training)
    module[1].pool.eval()
    modes = [m.training for m in module.modules()]
    before = copy.deepcopy(module[0].state_dict())
    generator = torch.random.get_rng_state()
    fold_copies_(module, EXAMPLE)
    assert [m.training for m in module.modules()] == modes
    assert not any(m._forward_hooks for m in module.modules())
    assert all(torch.equal(before[k], v) for k, v in module[0].state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_layers_that_take_keywords_and_give_several_values_are_passed_by():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.linear = nn.Linear(8, 3)

        def forward(self, images):
            rows = images[:, 0]
            mixed, _ = self.attention(query=rows, key=rows, value=rows)
            return self.linear(mixed.mean(1))

    net = seeded(Attending)
    before = copy.deepcopy(net)
    assert fold_copies_(net, EXAMPLE)[0] == []
    assert same_function(net, before)
