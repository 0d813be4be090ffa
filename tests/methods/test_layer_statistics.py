"""Statistics of layers against loops: second moments over windows, squared gradients by batch and by sample."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.errors import DataError, ModelError, SpecError
from tersor.methods import layer_statistics as module_under_test
from tersor.methods.layer_statistics import layer_statistics
from tersor.tensors.statistics import STATISTICS

EVERY_POSITION = 10**6


class Net(nn.Module):
    """Grouped, strided, transposed, and values written over in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        x = functional.relu(self.grouped(x), inplace=True)
        x = self.up(x)
        x += 1
        return self.head(x.mean((2, 3)))


LAYERS = ["stem", "grouped", "up", "head"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Net().eval()
    made.norm.running_mean.uniform_(-1, 1)
    return made


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 2, 6, 6)).astype(np.float32)


def batches(count=4, size=5):
    return [images(size, seed) for seed in range(count)]


def labels(count=4, size=5):
    return [np.random.default_rng(seed).integers(0, 3, size) for seed in range(count)]


def test_second_moments_are_those_of_unfolded_inputs(net):
    seen = {}
    for name in LAYERS:
        net.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: seen.setdefault(name, []).append(x[0].clone())
        )
    found = layer_statistics(
        copy.deepcopy(net),
        ["hessian", "input_sq_norm"],
        batches(),
        positions_per_image=EVERY_POSITION,
    )
    with torch.no_grad():
        net(torch.from_numpy(np.concatenate(batches())))
    assert list(found) == LAYERS
    stem = functional.unfold(seen["stem"][-1], 3, padding=1).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(found["stem"].hessian[0], stem.T @ stem / len(stem), atol=1e-5)
    for group, part in enumerate(seen["grouped"][-1].split(2, dim=1)):
        columns = functional.unfold(part, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
        expected = columns.T @ columns / len(columns)
        assert torch.allclose(found["grouped"].hessian[group], expected, atol=1e-5)
    for name in LAYERS:
        diagonal = found[name].hessian.diagonal(dim1=1, dim2=2)
        assert torch.equal(found[name].input_sq_norm, diagonal)
        assert found[name].gradient is None
    alone = layer_statistics(net, ["input_sq_norm"], batches(), positions_per_image=10**6)
    assert torch.allclose(alone["up"].input_sq_norm, found["up"].input_sq_norm, atol=1e-5)
    assert alone["up"].hessian is None


def test_drawn_positions_estimate_the_whole(net):
    whole = layer_statistics(net, ["hessian"], batches(15), positions_per_image=EVERY_POSITION)
    drawn = layer_statistics(net, ["hessian"], batches(15), positions_per_image=9, seed=3)
    again = layer_statistics(net, ["hessian"], batches(15), positions_per_image=9, seed=3)
    other = layer_statistics(net, ["hessian"], batches(15), positions_per_image=9, seed=4)
    assert torch.equal(drawn["stem"].hessian, again["stem"].hessian)
    assert not torch.equal(drawn["stem"].hessian, other["stem"].hessian)
    assert torch.allclose(drawn["stem"].hessian, whole["stem"].hessian, atol=0.3)


def gradients_of(net, inputs, answers, reduction):
    net.zero_grad()
    loss = functional.cross_entropy(net(inputs), torch.from_numpy(answers), reduction=reduction)
    loss.backward()
    return {name: net.get_submodule(name).weight.grad.double() for name in LAYERS}


def in_rows(name, value):
    return value.transpose(0, 1) if name == "up" else value


def test_gradients_are_squared_by_batch_and_by_sample(net):
    found = layer_statistics(net, STATISTICS, batches(), labels=labels())
    by_batch = dict.fromkeys(LAYERS, 0)
    by_sample = dict.fromkeys(LAYERS, 0)
    for batch, answers in zip(batches(), labels(), strict=True):
        inputs = torch.from_numpy(batch)
        for name, value in gradients_of(net, inputs, answers, "mean").items():
            by_batch[name] += value.square() / 4
        for one in range(5):
            part = slice(one, one + 1)
            for name, value in gradients_of(net, inputs[part], answers[part], "sum").items():
                by_sample[name] += value.square() / 20
    for name in LAYERS:
        told = found[name]
        expected = in_rows(name, by_batch[name])
        assert torch.allclose(told.gradient.double(), expected, rtol=1e-3, atol=1e-8), name
        expected = in_rows(name, by_sample[name])
        assert torch.allclose(told.sample_gradient.double(), expected, rtol=1e-3, atol=1e-8), name


def test_small_pieces_give_the_same(net, monkeypatch):
    whole = layer_statistics(net, STATISTICS, batches(), labels=labels())
    monkeypatch.setattr(module_under_test, "GATHERED_VALUES", 40)
    pieces = layer_statistics(net, STATISTICS, batches(), labels=labels())
    for name in LAYERS:
        for field in STATISTICS:
            first, second = getattr(whole[name], field), getattr(pieces[name], field)
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-9)


def test_without_labels_answers_are_drawn_from_the_original(net):
    """Where the original is sure, its answers are its labels."""
    sure = copy.deepcopy(net)
    with torch.no_grad():
        sure.head.weight *= 1e4
        sure.head.bias *= 1e4
        answers = [sure(torch.from_numpy(batch)).argmax(1).numpy() for batch in batches()]
    drawn = layer_statistics(net, ["gradient"], batches(), original=sure)
    given = layer_statistics(net, ["gradient"], batches(), labels=answers)
    for name in LAYERS:
        assert torch.equal(drawn[name].gradient, given[name].gradient)
    unsure = layer_statistics(net, ["gradient"], batches(), seed=1)
    assert torch.equal(
        unsure["stem"].gradient,
        layer_statistics(net, ["gradient"], batches(), seed=1)["stem"].gradient,
    )
    assert not torch.equal(unsure["stem"].gradient, drawn["stem"].gradient)


def test_the_module_is_left_alone(net):
    net.train()
    net.norm.eval()
    before = copy.deepcopy(net.state_dict())
    layer_statistics(net, STATISTICS, batches(), original=net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training and not net.norm.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(part._forward_hooks for part in net.modules())


def test_named_layers_alone(net):
    assert list(layer_statistics(net, ["hessian"], batches(), layers=["up"])) == ["up"]


def test_what_cannot_be_is_refused(net, monkeypatch):
    with pytest.raises(SpecError, match="unknown statistic 'hesian'"):
        layer_statistics(net, ["hesian"], batches())
    with pytest.raises(DataError, match="need one at least"):
        layer_statistics(net, ["hessian"], [])
    broken = images(3)
    broken[1, 0, 2, 2] = np.nan
    with pytest.raises(DataError, match="batch 1 holds NaN or infinity in sample 1"):
        layer_statistics(net, ["hessian"], [images(3), broken])
    with pytest.raises(DataError, match=r"float64 of shape \(3, 2, 6, 6\); expected float32"):
        layer_statistics(net, ["hessian"], [images(3).astype(np.float64)])
    with pytest.raises(DataError, match=r"labels of batch 3 .* expected \(5,\) int64"):
        layer_statistics(net, ["gradient"], batches(), labels=labels(3))
    with pytest.raises(DataError, match="labels of batch 0 range from 0 to 7"):
        layer_statistics(net, ["gradient"], batches(1), labels=[np.array([0, 7, 1, 1, 1])])
    with pytest.raises(ModelError, match="need a classifier's logits"):
        layer_statistics(nn.Sequential(nn.Conv2d(2, 3, 3)), ["gradient"], batches())
    monkeypatch.setattr(module_under_test, "LARGEST_INPUTS", 30)
    with pytest.raises(ModelError, match=r"'up' reads 54 inputs.*fold_copies_"):
        layer_statistics(net, ["hessian"], batches(), layers=["up"])
