"""Least squares of layers on the inputs that are left, against numpy in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor import load_data, load_model
from tersor.errors import DataError, SpecError
from tersor.graph.coupling import coupled_groups, half_of
from tersor.graph.surgery import lines_of, removed
from tersor.methods.prune_structured import apply, plan
from tersor.methods.refit import reconstructed
from tersor.specs import Prune


def halved(module, example):
    found = coupled_groups(module, example)
    lines = lines_of(module, found.kept({g.name: half_of(g) for g in found.groups}))
    return lines, removed(module, lines)


class Two(nn.Module):
    def __init__(self, second, head):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), second, head

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()))


class Pooled(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.fc = nn.Linear(made, 4)

    def forward(self, x):
        return self.fc(x.relu().flatten(2).mean(2))


def conv(**words):
    return nn.Conv2d(8, 10, **words)


SECOND = {
    "plain": lambda: conv(kernel_size=3, padding=1, stride=2),
    "dilated": lambda: conv(kernel_size=(1, 3), padding=(0, 2), dilation=2, bias=False),
    "same": lambda: conv(kernel_size=(2, 3), padding="same"),
    "valid": lambda: conv(kernel_size=2, padding="valid"),
    "mirrored": lambda: conv(kernel_size=3, padding=1, padding_mode="reflect"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("build", SECOND.values(), ids=SECOND)
def test_against_numpy(build):
    torch.manual_seed(0)
    module = Two(build(), Pooled(10)).double()
    images = torch.randn(70, 3, 9, 9).double()
    lines, smaller = halved(module, images[:1])
    fitted, left = reconstructed(module, smaller, lines, images.numpy(), ridge=0.0)
    assert not left
    (line,) = (held for held in lines if held.layer == "second")
    with torch.no_grad():
        target = module.second(module.first(images).relu())[:, list(line.outputs)]
        reads = fitted.first(images).relu()
    # Columns of the design, one for each weight of a row: what the layer gives with that weight alone.
    small, columns = smaller.second, []
    probe = copy.deepcopy(small)
    with torch.no_grad():
        for index in range(small.weight[0].numel()):
            nn.init.zeros_(probe.weight)
            if probe.bias is not None:
                nn.init.zeros_(probe.bias)
            probe.weight.view(probe.out_channels, -1)[0, index] = 1
            columns.append(probe(reads)[:, 0].flatten().numpy())
    if small.bias is not None:
        columns.append(np.ones_like(columns[0]))
    expected = np.linalg.lstsq(
        np.stack(columns, 1), target.movedim(1, 0).flatten(1).T.numpy(), rcond=None
    )[0].T
    got = [fitted.second.weight.detach().flatten(1)]
    if small.bias is not None:
        got.append(fitted.second.bias.detach()[:, None])
    assert np.allclose(torch.cat(got, 1).numpy(), expected, rtol=1e-7, atol=1e-9)
    # The next layer reads what the fitted one gives.
    with torch.no_grad():
        pooled = fitted.second(reads).relu().flatten(2).mean(2).numpy()
        answers = module(images).numpy()
    design = np.concatenate([pooled, np.ones((70, 1))], 1)
    expected = np.linalg.lstsq(design, answers, rcond=None)[0].T
    assert np.allclose(fitted.head.fc.weight.detach().numpy(), expected[:, :-1], atol=1e-9)


def test_functional_shared_and_unfit_layers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.twice = nn.Conv2d(8, 8, 1)
            self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
            self.wise = nn.Conv2d(8, 8, 3, groups=8)
            self.up, self.tokens = nn.ConvTranspose2d(8, 8, 1), nn.Linear(8, 6)

        def forward(self, x):
            x = self.twice(self.twice(self.stem(x)).tanh())
            x = self.up(self.wise(functional.conv2d(x, weight=self.weight).relu()))
            return self.tokens(x.flatten(2).transpose(1, 2)).mean(1)

    torch.manual_seed(0)
    module, images = Odd().double(), torch.randn(80, 3, 5, 5).double()
    lines, smaller = halved(module, images[:1])
    fitted, left = reconstructed(module, smaller, lines, images.numpy())
    assert left == {
        "wise.weight": "it is a grouped convolution",
        "up.weight": "conv_transpose2d has no least squares here",
    }
    for name, value in smaller.named_parameters():
        same = torch.equal(value, fitted.get_parameter(name))
        assert same == (name.split(".")[0] in ("stem", "wise", "up"))
    with torch.no_grad():
        expected = module(images)
        error, before = ((m(images) - expected).square().mean() for m in (fitted, smaller))
    assert float(error) < float(before)


def test_nothing_removed_changes_nothing_and_dead_inputs_keep_their_weights():
    torch.manual_seed(0)
    module = Two(conv(kernel_size=1), Pooled(10)).double()
    images = torch.randn(64, 3, 5, 5).double()
    same, _ = reconstructed(module, module, (), images.numpy())
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), module.parameters(), strict=True))  # fmt: skip
    with torch.no_grad():
        module.first.bias[:] = -100.0  # nothing passes the ReLU
    lines, smaller = halved(module, images[:1])
    fitted, _ = reconstructed(module, smaller, lines, images.numpy())
    assert torch.allclose(fitted.second.weight, smaller.second.weight)
    assert torch.isfinite(fitted(images)).all()


def test_as_part_of_a_plan():
    splits = load_data("digits", num_calibration=256)
    inputs = list(splits.batches(splits.calibration, 100))
    net, example = load_model("digits_net", seed=1), torch.zeros(1, 1, 8, 8)
    decided = plan(net, Prune(structure="channel", sparsity=0.5, reconstruct=True), example)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fitted = apply(net, decided, inputs=inputs)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    plain = removed(net, decided.layers)
    fresh = torch.from_numpy(next(iter(splits.batches(splits.validation, 100))))
    with torch.no_grad():
        errors = [(m(fresh) - net(fresh)).square().mean() for m in (fitted, plain)]
    assert float(errors[0]) < 0.5 * float(errors[1])
    again = apply(net, decided, inputs=inputs)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fitted.parameters(), strict=True))  # fmt: skip
    with pytest.raises(SpecError, match="reconstruct needs calibration inputs"):
        apply(net, decided)
    with pytest.raises(DataError, match="NaN or infinity"):
        apply(net, decided, inputs=[np.full((2, 1, 8, 8), np.nan, np.float32)])
