"""Every factorization on every family of networks: the same as the old network with the product as its weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tersor.methods.factorize import factorize, restructured
from tersor.models import load_model
from tersor.specs import Factorize
from tersor.specs.factorize import FACTORIZATIONS

METHODS = pytest.mark.parametrize("method", FACTORIZATIONS)
FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 32,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "vgg11_bn": 32,
    "vit_b_32": 224,
}


def as_before(module, found):
    """`module` with the product of each series of layers as its weight, in float64."""
    old = copy.deepcopy(module).double().eval()
    for decision in found.plan.layers:
        if decision.action != "factorize":
            continue
        layer = old.get_submodule(decision.layer)
        parts = [p.weight.detach().double() for p in found.module.get_submodule(decision.layer)]
        last = parts[-1].flatten(1)
        inner = parts[0]
        if len(parts) == 3:
            inner = torch.einsum("sr...,ri->si...", parts[1], parts[0].flatten(1))
        with torch.no_grad():
            layer.weight.copy_(torch.einsum("os,s...->o...", last, inner))
        bias = found.module.get_submodule(decision.layer)[-1].bias
        layer.bias = None if bias is None else nn.Parameter(bias.detach().double())
    return old


def check(module, method, shape):
    images = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    found = factorize(module, Factorize(method, energy=0.5), [images])
    changed = [d for d in found.plan.layers if d.action == "factorize"]
    assert changed
    assert all(d.reason for d in found.plan.layers if d.action == "keep")
    assert found.size_share < 1 and found.macs_share < 1
    held = torch.from_numpy(images).double()
    with torch.no_grad():
        small, old = (
            m.double().eval()(held) for m in (copy.deepcopy(found.module), as_before(module, found))
        )
    assert (small - old).abs().max() <= 1e-10 * old.abs().max()
    fresh = restructured(module, found.plan)
    fresh.load_state_dict(found.module.state_dict())
    assert sum(p.numel() for p in fresh.parameters()) < sum(p.numel() for p in module.parameters())


@METHODS
@pytest.mark.parametrize(
    ("name", "shape"), [("digits_net", (1, 8, 8)), ("torchvision:squeezenet1_1", (3, 32, 32))]
)
def test_small_networks(name, shape, method):
    check(load_model(name), method, shape)


@pytest.mark.slow
@METHODS
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_family_of_torchvision(name, method):
    torch.manual_seed(0)
    check(load_model(f"torchvision:{name}"), method, (3, FAMILIES[name], FAMILIES[name]))
