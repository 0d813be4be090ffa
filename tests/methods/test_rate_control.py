"""What holds a training to the bytes of its file: the dead zones of its weights, and the state that outlives a kill."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.methods.rate_control import CLOSE, CodedWeight, SizeControl, coded_layers, codes_of


@pytest.fixture
def module():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 256, generator=generator))
    part = CodedWeight(
        torch.full((64,), 0.25), torch.full((64, 256), 0.5), torch.ones(64), torch.ones(256)
    )
    parametrize.register_parametrization(layer, "weight", part)
    return nn.Sequential(layer)


def control_of(module):
    return SizeControl(module, start_bytes=6000.0, end_bytes=2000.0, price=1e-3)


@pytest.mark.parametrize("wanted", [5000, 3000, 1500])
def test_a_look_comes_to_the_bytes_wanted_and_the_file_agrees(module, wanted):
    control = control_of(module)
    control.measure_ratio()
    # step by step, as a training goes: the rates are those of the codes before
    for each in np.geomspace(6000, wanted, 30):
        told = control.look(float(each))
        control.measure_ratio()
    told = control.look(wanted)
    assert abs(told - wanted) <= 2 * CLOSE * wanted
    assert control.measure_ratio() == pytest.approx(wanted, rel=0.05)


def test_fewer_bytes_mean_wider_dead_zones_everywhere(module):
    control = control_of(module)
    (_, (_, part)) = next(iter(coded_layers(module)))
    control.look(5000)
    wide = part.dead.clone()
    control.look(2000)
    assert (part.dead >= wide - 1e-6).float().mean() > 0.95 and part.dead.mean() > wide.mean()


def test_the_state_is_read_back_with_nothing_trusted(module, tmp_path):
    control = control_of(module)
    control.look(4000)
    control.measure_ratio()
    torch.save({"control": control.state_dict()}, tmp_path / "state")
    held = torch.load(tmp_path / "state", weights_only=True)["control"]
    again = control_of(copy.deepcopy(module))
    again.load_state_dict(held)
    assert (again.price, again.ratio, again.looks) == (control.price, control.ratio, control.looks)


def test_codes_are_zero_inside_and_nearest_outside():
    values = torch.tensor([[0.1, -0.3, 0.6, -1.24, 40.0]])
    codes = codes_of(values, torch.tensor([0.25]), torch.full((1, 5), 2.0))
    assert codes.tolist() == [[0, 0, 2, -5, 127]]
