"""Narrower networks of the same family: any convolutional network, by running it; refusals for those it cannot be."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.errors import ModelError, SpecError
from tersor.models import load_model
from tersor.models.narrow import STARTS, narrowed


class Hard(nn.Module):
    """Concatenation, a residual sum, groups, depthwise, flattening, a transposed convolution, every norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.left = nn.Conv2d(12, 20, 1)
        self.right = nn.Conv2d(12, 16, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(36)
        self.depthwise = nn.Conv2d(36, 72, 3, padding=1, groups=36)
        self.groupnorm = nn.GroupNorm(6, 72)
        self.again = nn.Conv2d(72, 72, 3, padding=1)
        self.prelu = nn.PReLU(72)
        self.up = nn.ConvTranspose2d(72, 24, 2, stride=2)
        self.classifier = nn.Sequential(
            nn.Linear(24 * 64, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 10)
        )

    def forward(self, images):
        x = functional.relu(self.stem(images))
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1))
        x = self.groupnorm(self.depthwise(x))
        x = self.prelu(self.again(x) + x)
        x = functional.adaptive_avg_pool2d(self.up(x), 8)
        return self.classifier(x.flatten(1))


@pytest.fixture(scope="module")
def hard():
    torch.manual_seed(0)
    return Hard()


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("width", [0.01, 0.25, 0.5, 0.75])
def test_widths_shrink_and_ends_stay(hard, width, start):
    student = narrowed(hard, width, (3, 8, 8), start=start)
    assert type(student) is Hard and not student.training
    assert student.stem.in_channels == 3 and student.classifier[-1].out_features == 10
    if width in (0.25, 0.5, 0.75):
        assert student.again.out_channels == 72 * width
        assert student.left.out_channels == 20 * width
        assert student.right.out_channels == 16 * width
        assert student.norm.num_features == 36 * width == student.depthwise.groups
        assert student.classifier[0].in_features == 24 * 64 * width
    assert size(student) < size(hard)
    student.train()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = student(images)
    assert outputs.shape == (4, 10) and torch.isfinite(outputs).all()
    outputs.square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in student.parameters())


def test_parts_say_their_new_sizes(hard):
    student = narrowed(hard, 0.5, (3, 8, 8))
    rebuilt = copy.deepcopy(student)
    for name, part in student.named_modules():
        if isinstance(part, nn.Conv2d) and not isinstance(part, nn.ConvTranspose2d):
            fresh = nn.Conv2d(
                part.in_channels, part.out_channels, part.kernel_size, part.stride,
                padding=part.padding, groups=part.groups, bias=part.bias is not None,
            )  # fmt: skip
            assert (
                fresh.weight.shape == part.weight.shape == rebuilt.get_submodule(name).weight.shape
            )


def test_starting_from_the_teacher_takes_its_first_channels(hard):
    student = narrowed(hard, 0.5, (3, 8, 8), start="teacher")
    assert torch.equal(student.stem.weight, hard.stem.weight[:6])
    assert torch.equal(student.again.weight, hard.again.weight[:36, :36])
    assert torch.equal(student.norm.running_var, hard.norm.running_var[:18])
    assert torch.equal(student.classifier[-1].bias, hard.classifier[-1].bias)


def test_a_network_whose_other_half_does_nothing_loses_nothing():
    """Only the first half of the channels carries anything: keeping it is exact."""
    module = load_model("digits_net", seed=3)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                half = part.num_features // 2
                part.weight[half:] = part.bias[half:] = 0
    module.classifier[0].weight.data[64:] = 0
    module.classifier[0].bias.data[64:] = 0
    student = narrowed(module, 0.5, (1, 8, 8), start="teacher")
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(student(images), module(images), atol=1e-5)


@pytest.mark.parametrize("multiple_of", [1, 8, 100])
def test_outputs_are_multiples_as_far_as_the_layer_goes(multiple_of):
    student = narrowed("digits_net", 0.3, (1, 8, 8), multiple_of=multiple_of)
    full = load_model("digits_net")
    pairs = [
        (part.out_channels, full.get_submodule(name).out_channels)
        for name, part in student.named_modules()
        if isinstance(part, nn.Conv2d)
    ]
    assert all(width % multiple_of == 0 or width == most for width, most in pairs)


def test_seeds_decide_and_other_random_numbers_are_left_alone(hard):
    before = {key: value.clone() for key, value in hard.state_dict().items()}
    state = torch.random.get_rng_state()
    first, same, other = (narrowed(hard, 0.5, (3, 8, 8), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.stem.weight, same.stem.weight)
    assert not torch.equal(first.stem.weight, other.stem.weight)
    assert not torch.equal(first.stem.weight, hard.stem.weight[:6])
    assert all(torch.equal(before[key], value) for key, value in hard.state_dict().items())
    assert hard.training and not any(part._forward_pre_hooks for part in hard.modules())
    assert not any(part._forward_pre_hooks for part in first.modules())


FAMILIES = (
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "resnext50_32x4d",
    "densenet121",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_torchvision_need_no_help(name):
    student = narrowed(f"torchvision:{name}", 0.5, (3, 64, 64))
    assert size(student) < 0.5 * size(load_model(f"torchvision:{name}"))


def test_known_networks_shrink_by_the_square_of_the_width():
    assert size(narrowed("resnet18", 0.5, (3, 32, 32))) / size(load_model("resnet18")) == (
        pytest.approx(0.25, abs=0.002)
    )


class Fixed(nn.Module):
    """Counts on a width."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)

    def forward(self, images):
        return self.head(self.layer(images).mean((2, 3)).view(len(images), 8))


class Own(nn.Module):
    """Holds a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Conv2d(1, 8, 3), nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, images):
        return (self.layer(images) * self.gain).mean((2, 3))


class Idle(nn.Module):
    """Has a layer that nothing runs."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, images):
        return self.head(self.layer(images).mean((2, 3)))


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (Fixed(), "it does not run then"),
        (Own(), r"the network \(Own\) holds parameters of a kind unknown"),
        (Idle(), "layer 'idle' never runs"),
        (nn.Flatten(), "no layer with weights"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_networks_that_cannot_be_narrowed_are_refused_with_the_way_out(module, told):
    with pytest.raises(ModelError, match=f"{told}.*give a student of your own"):
        narrowed(module, 0.5, (1, 8, 8))


def test_groups_that_fit_no_width_tell_which_multiple_would():
    module = nn.Sequential(
        nn.Conv2d(1, 30, 3), nn.Conv2d(30, 30, 3, groups=6), nn.Flatten(), nn.Linear(480, 10)
    )
    with pytest.raises(ModelError, match="13 channels do not fit 6 groups of 5: try multiple_of 5"):
        narrowed(module, 0.43, (1, 8, 8))
    assert narrowed(module, 0.43, (1, 8, 8), multiple_of=5)[1].groups == 5
    assert narrowed(module, 0.5, (1, 8, 8))[1].groups == 5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"width": 0}, "above 0 and below 1, got 0"),
        ({"width": 1}, "got 1"),
        ({"width": float("nan")}, "got nan"),
        ({"multiple_of": 0}, "at least 1, got 0"),
        ({"start": "random "}, "one of random, teacher"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(options, told):
    with pytest.raises(SpecError, match=told):
        narrowed("digits_net", **{"width": 0.5, "input_shape": (1, 8, 8), **options})
    with pytest.raises(ModelError, match=r"cannot take inputs of \(3, 8, 8\)"):
        narrowed("digits_net", 0.5, (3, 8, 8))
