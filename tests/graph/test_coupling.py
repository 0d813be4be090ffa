"""Pruned equals masked, in float64, on hand-written hard cases; what cannot go stays, with a reason."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import VisionTransformer

from tersor.engines import open_session
from tersor.graph import coupling
from tersor.graph.coupling import coupled_groups, half_of, masked, random_twin
from tersor.graph.export import export_onnx
from tersor.graph.surgery import lines_of, removed
from tersor.models.load import load_weights_, save_weights


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.c = nn.Conv2d(20, 5, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x).relu(), self.b(x)], 1)).mean((2, 3))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 12, 1),
        )
        self.short, self.head = nn.Conv2d(8, 12, 1, stride=2), nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        out = self.body(x)
        out += self.short(x)
        return self.head(functional.adaptive_avg_pool2d(out, 1).flatten(1))


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.wise = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        one, two = self.first(x).chunk(2, 1)
        two = functional.pad(self.wise(two), (1, 1, 1, 1))
        x = torch.cat([one, two], 1)
        n, c, h, w = x.shape
        return self.last(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.last = nn.Conv2d(3, 24, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.last(functional.pixel_shuffle(self.up(x).relu(), 2))


class Flatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.out(self.fc(torch.flatten(self.conv(x), 1)).sigmoid())


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 24, 1)
        self.many = nn.Conv2d(24, 48, 3, groups=12)
        self.few = nn.Conv2d(48, 32, 3, groups=2)
        self.up = nn.ConvTranspose2d(32, 10, 2, stride=2)
        self.last = nn.Conv2d(10, 3, 1)

    def forward(self, x):
        return self.last(self.up(self.few(self.many(self.first(x)).relu())))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.head.weight = nn.Parameter(self.head.weight)

    def forward(self, x):
        return self.head(self.twice(self.twice(self.stem(x)).relu()).relu())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.code, self.back = nn.Linear(6, 8), nn.Linear(8, 6)
        self.other = nn.Linear(6, 8)
        self.other.weight = self.code.weight

    def forward(self, x):
        return self.back(self.code(x).relu() * self.other(x).tanh())


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.v, self.scale = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        x = functional.gelu(functional.conv2d(x, self.w, self.b)) * self.scale
        return functional.linear(x.mean((2, 3)), self.v)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.heads = nn.Linear(6, 16), 4
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def split(self, x):
        n, t, _ = x.shape
        return x.reshape(n, t, self.heads, -1).transpose(1, 2)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        y = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        return self.head((x + self.out(y.transpose(1, 2).flatten(2))).mean(1))


class Control(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x)
        for _ in range(2):
            if x.abs().sum() > 0:
                x = self.b(x).relu()
        return {"logits": self.c(x)}


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.PReLU(16), nn.Conv2d(16, 8, 1),
            nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


IMAGE, ROW, TOKENS = (1, 3, 8, 8), (2, 6), (1, 5, 6)
CASES = [
    (Concat, IMAGE), (Residual, IMAGE), (Shuffle, IMAGE), (PixelShuffle, IMAGE), (Flatten, IMAGE),
    (Grouped, IMAGE), (Shared, ROW), (Tied, ROW), (Functional, IMAGE), (Attention, TOKENS), (Control, ROW),
    (Norms, IMAGE),
]  # fmt: skip


@pytest.mark.parametrize(("build", "shape"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_pruned_equals_masked(build, shape):
    torch.manual_seed(0)
    module = build()
    example = torch.randn(shape)
    found = coupled_groups(module, example)
    assert {f.reason for f in found.frozen} == {"it is an output of the network"}
    twin = random_twin(module)
    units = {group.name: half_of(group) for group in found.groups}
    smaller = removed(twin, lines_of(twin, found.kept(units)))
    assert type(smaller) is build
    out, expected = smaller(example.double()), masked(twin, example.double(), found, units)
    if isinstance(out, dict):
        out, expected = out["logits"], expected["logits"]
    assert torch.allclose(out, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    count = sum(p.numel() for p in smaller.parameters())
    assert count < 0.75 * sum(p.numel() for p in twin.parameters())


@pytest.mark.parametrize(("build", "shape"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_pruned_saved_loaded_and_run_by_the_engine(build, shape, tmp_path):
    torch.manual_seed(0)
    module = build()
    found = coupled_groups(module, torch.randn(shape))
    lines = lines_of(module, found.kept({group.name: half_of(group) for group in found.groups}))
    smaller = removed(module, lines).eval()
    save_weights(smaller, tmp_path / "smaller.safetensors")
    loaded = removed(build(), lines).eval()
    load_weights_(loaded, tmp_path / "smaller.safetensors")
    inputs = torch.randn(3, *shape[1:])
    with torch.no_grad():
        expected, again = smaller(inputs), loaded(inputs)
    if isinstance(expected, dict):
        expected, again = expected["logits"], again["logits"]
    assert torch.equal(again, expected)
    if len(shape) == 4:  # deployment graphs read images
        graph = export_onnx(loaded, shape[1:])
        got = open_session(graph, threads=1).run(inputs.numpy())
        scale = float(expected.abs().max())
        assert np.abs(got - expected.numpy()).max() <= 1e-5 * scale


def test_layers_alike_cost_few_trials(monkeypatch):
    """Heads go, and hidden neurons do; a trial for each of them would take minutes in large networks."""
    trials = []
    problem = coupling._Proof.problem

    def counted(proof, groups):
        trials.append(len(groups))
        return problem(proof, groups)

    monkeypatch.setattr(coupling._Proof, "problem", counted)
    module = VisionTransformer(32, 16, num_layers=6, num_heads=4, hidden_dim=32, mlp_dim=64)
    found = coupled_groups(module, torch.randn(1, 3, 32, 32))
    layers = [f"encoder.layers.encoder_layer_{n}" for n in range(6)]
    assert {g.name for g in found.groups} == {
        f"{layer}.{part}" for layer in layers for part in ("self_attention.in_proj_weight", "mlp.0")
    }
    assert len(trials) < len(found.groups)
