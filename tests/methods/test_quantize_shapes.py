"""Networks of other makes than the study's: every mode gives a valid graph that computes nearly the same."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.engines import open_session
from tersor.graph import export_onnx
from tersor.methods.quantize import quantize
from tersor.specs import Quantize

SHAPE = (4, 8, 8)


class Shared(nn.Module):
    """One convolution used twice, with another range each time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(torch.relu(self.conv(x)) * 3).mean((2, 3)))


class Joined(nn.Module):
    """Concatenation, average pool, grouped convolution, a cut-off ReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.c = nn.Conv2d(12, 3, 3)

    def forward(self, x):
        x = torch.cat([functional.relu6(self.a(x)), self.b(x)], 1)
        return functional.adaptive_avg_pool2d(self.c(functional.avg_pool2d(x, 2)), 1).flatten(1)


class Gated(nn.Module):
    """Squeeze and excitation, and activations without an integer kernel."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = functional.hardswish(self.conv(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(functional.gelu(x).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers on sequences, and a product of two activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x.flatten(2).transpose(1, 2))
        weights = torch.softmax(x @ self.second(x).transpose(1, 2), -1)
        return self.head((weights @ x).mean(1))


class Upward(nn.Module):
    """A transposed convolution, which is kept, and a map as the last layer's output."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 6, 3, stride=2), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.last(self.up(self.down(x)))


def images(count):
    return np.random.default_rng(count).standard_normal((count, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module", params=[Shared, Joined, Gated, Tokens, Upward])
def graph(request):
    torch.manual_seed(0)
    return request.param, export_onnx(request.param().eval(), SHAPE)


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_every_mode_gives_nearly_the_same_function(graph, mode, granularity):
    make, original = graph
    # what is judged is seen in calibration too: a range of few values would cut others
    calibration = [images(64), images(1), images(3)]
    found = quantize(original, Quantize(mode=mode, granularity=granularity), calibration)
    onnx.checker.check_model(found.graph)
    kept = {layer.layer: layer.reason for layer in found.plan.layers if layer.action == "keep"}
    if mode != "dynamic":
        assert list(kept) == (["up"] if make is Upward else [])
    assert all(kept.values())
    for count in (1, 3):
        expected = open_session(original, threads=1).run(images(count))
        logits = open_session(found.graph, threads=1).run(images(count))
        noise = ((logits - expected) ** 2).mean()
        assert noise <= expected.var() / 300 + 1e-12
