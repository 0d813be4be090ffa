"""Residual blocks are found by what they compute, and an identity in their place computes what is left."""

import pytest
import torch
from torch import nn

from tersor.errors import ModelError
from tersor.graph.branches import residual_blocks
from tersor.graph.coupling import random_twin
from tersor.graph.surgery import removed
from tersor.specs import LayerPlan


class After(nn.Module):
    """Rectified after the sum, in place, as in ResNet."""

    def __init__(self, narrow, wide):
        super().__init__()
        self.a, self.b = nn.Conv2d(narrow, wide, 3, padding=1), nn.Conv2d(wide, wide, 1)
        self.norm = nn.BatchNorm2d(wide)
        self.short = nn.Conv2d(narrow, wide, 1) if narrow != wide else nn.Identity()

    def forward(self, x):
        out = self.norm(self.b(self.a(x).relu()))
        out += self.short(x)
        return out.relu_()


class Before(nn.Module):
    """Two branches one after the other on a stream that nothing rectifies."""

    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.scale = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x):
        x = x + self.scale * self.one(x.relu())
        return self.two(x.tanh()) + x


class Gated(nn.Module):
    """Not residual: the sum is scaled afterwards."""

    def __init__(self, width):
        super().__init__()
        self.a, self.gate = nn.Conv2d(width, width, 1), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (x + self.a(x)) * self.gate


class Plain(nn.Module):
    """Not residual: a layer that keeps its shape."""

    def __init__(self, width):
        super().__init__()
        self.a = nn.Conv2d(width, width, 1)

    def forward(self, x, factor=1.0):
        return self.a(x) * factor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.unrectified = After(6, 6)
        self.stage = nn.Sequential(After(6, 8), After(8, 8), After(8, 8))
        self.before, self.gated, self.plain = Before(8), Gated(8), Plain(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stage(self.unrectified(self.stem(x)))
        x = self.plain(self.gated(self.before(x)), factor=2.0)
        return self.head(x.mean((2, 3)))


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_found_by_what_they_compute():
    torch.manual_seed(0)
    assert residual_blocks(Net(), EXAMPLE) == ("stage.1", "stage.2", "before")
    assert residual_blocks(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity()), EXAMPLE) == ()


@pytest.mark.parametrize(
    ("block", "last"), [("stage.1", ["stage.1.norm"]), ("before", ["before.one", "before.two"])]
)
def test_an_identity_computes_what_a_silent_branch_leaves(block, last):
    torch.manual_seed(0)
    twin = random_twin(Net())
    smaller = removed(twin, [LayerPlan(block, "bypass")])
    assert type(smaller) is Net and not list(smaller.get_submodule(block).parameters())
    with torch.no_grad():
        for name in last:
            twin.get_submodule(name).weight.zero_()
            twin.get_submodule(name).bias.zero_()
        assert torch.equal(smaller(EXAMPLE.double()), twin(EXAMPLE.double()))


def test_a_shared_block_goes_everywhere_and_strangers_are_refused():
    torch.manual_seed(0)
    block = Before(4)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), block, block, nn.Flatten(), nn.Linear(256, 2))
    assert residual_blocks(module, EXAMPLE) == ("1",)
    smaller = removed(module, [LayerPlan("1", "bypass")])
    assert isinstance(smaller[1], nn.Identity) and isinstance(smaller[2], nn.Identity)
    assert smaller(EXAMPLE).shape == (2, 2) and isinstance(module[1], Before)
    for stranger in ("layer9", ""):
        with pytest.raises(ModelError, match="which Sequential does not have"):
            removed(module, [LayerPlan(stranger, "bypass")])
