"""Scope auto: shares from measured harm, costs counted again, never above the limit."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tersor import load_data, load_model
from tersor.data.arrays import ArraySet
from tersor.errors import DataError, ModelError, SpecError
from tersor.graph.coupling import coupled_groups
from tersor.graph.surgery import lines_of, removed
from tersor.methods.prune_auto import KL_BOUND, allocated, within_bound
from tersor.methods.prune_structured import apply, chosen_units, plan
from tersor.methods.prune_trials import Trials
from tersor.methods.sensitivity import output_distance
from tersor.specs import Prune

EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def splits():
    return load_data("digits", num_calibration=128)


@pytest.fixture(scope="module")
def inputs(splits):
    return list(splits.batches(splits.calibration, 64))


@pytest.fixture(scope="module")
def net(splits):
    """A trained network in which most channels of one layer are copies of nothing: they are never read."""
    torch.manual_seed(0)
    module = load_model("digits_net", seed=1)
    with torch.no_grad():
        module.features[7].weight[:, 16:] = 0
        module.features[3].weight[16:] *= 1e-3
    module.features[7].weight.register_hook(lambda g: g * (torch.arange(64) < 16).view(1, -1, 1, 1))
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(4):
        for start in range(0, len(splits.train), 64):
            batch = slice(start, start + 64)
            (images,) = splits.batches(ArraySet(splits.train.images[batch], None), 64)
            labels = torch.from_numpy(splits.train.labels[batch])
            functional.cross_entropy(module.train()(torch.from_numpy(images)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    clean = load_model("digits_net")
    clean.load_state_dict(module.state_dict())
    with torch.no_grad():
        clean.features[3].weight[16:] *= 1e-3
    return clean


@pytest.fixture(scope="module")
def found(net):
    return coupled_groups(net, EXAMPLE)


def auto(**fields):
    return Prune(structure="channel", scope="auto", **fields)


def test_a_layer_that_does_not_matter_pays(net, found, inputs):
    units = chosen_units(net, auto(macs=0.2), EXAMPLE, found, inputs=inputs)
    assert 0.18 < found.macs(units) / found.macs() <= 0.2
    assert len(units["features.3"]) >= 44 and len(units["features.7"]) < 32
    trials = Trials(net, np.concatenate(inputs))
    equal = chosen_units(net, Prune(structure="channel", macs=0.2), EXAMPLE, found)

    def harm(units):
        return trials.harm_(removed(net, lines_of(net, found.kept(units))))

    assert harm(units) < harm(equal) / 2


def test_a_share_of_units_and_no_target_at_all(net, found, inputs):
    units = chosen_units(net, auto(sparsity=0.5), EXAMPLE, found, inputs=inputs)
    # At least what was asked, and no more beyond it than from one point of the lower hull to the next.
    assert 0.5 <= sum(map(len, units.values())) / 288 <= 0.55
    free = chosen_units(net, auto(sparsity=0.0), EXAMPLE, found, inputs=inputs)
    trials = Trials(net, np.concatenate(inputs))
    assert trials.harm_(removed(net, lines_of(net, found.kept(free)))) <= KL_BOUND
    assert len(free["features.3"]) >= 44
    assert found.macs(free) < 0.6 * found.macs()


def test_floor_multiple_and_exclusion_hold(net, found, inputs):
    spec = auto(macs=0.5, floor=0.5, multiple_of=8, exclude=("features.0",))
    smaller = apply(net, plan(net, spec, EXAMPLE, found=found, inputs=inputs))
    widths = [smaller.features[n].weight.shape[0] for n in (0, 3, 7)]
    assert widths[0] == 32 and all(w % 8 == 0 and w >= 32 for w in widths)


def test_the_same_twice(net, found, inputs):
    one, other = (plan(net, auto(macs=0.5), EXAMPLE, found=found, inputs=inputs) for _ in "ab")
    assert one == other


def test_harm_is_the_distance_of_outputs(inputs):
    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(x.flatten(1))

    torch.manual_seed(0)
    module = Row()
    images = np.concatenate(inputs)
    trials = Trials(module, images)
    assert trials.offset == 0.0 == trials.harm_(copy.deepcopy(module))
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.fc.bias[3] += 2
        expected = output_distance(*(m(torch.from_numpy(images)).numpy() for m in (module, other)))
    assert trials.harm_(other) == pytest.approx(expected[0], rel=0.02)  # bfloat16
    with torch.no_grad():
        other.fc.weight[:] = 3e38
    assert trials.harm_(other) == float("inf")
    with pytest.raises(ModelError, match="NaN or infinity for a calibration image"):
        Trials(other, images)
    with pytest.raises(ModelError, match="returns no logits"):
        Trials(nn.Conv2d(1, 2, 1), images)


def test_batch_norms_of_a_trial_use_its_own_statistics(net, inputs):
    trials = Trials(net, np.concatenate(inputs))
    shifted = copy.deepcopy(net)
    for part in shifted.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean += 10
    assert trials.harm_(shifted) < 1e-3


def test_inputs_are_demanded_and_checked(net, found, inputs):
    with pytest.raises(SpecError, match="scope='auto' needs calibration inputs"):
        plan(net, auto(macs=0.5), EXAMPLE, found=found)
    with pytest.raises(DataError, match="got none"):
        plan(net, auto(macs=0.5), EXAMPLE, found=found, inputs=[])
    with pytest.raises(DataError, match=r"shape .*expected \(N, 1, 8, 8\)"):
        plan(net, auto(macs=0.5), EXAMPLE, found=found, inputs=[np.zeros((4, 3, 8, 8), "f4")])
    bad = inputs[0].copy()
    bad[3, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN or infinity in image 3"):
        plan(net, auto(macs=0.5), EXAMPLE, found=found, inputs=[bad])


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_allocation_against_all_choices(data):
    """Two coupled layers: no choice of both that keeps the limit has clearly less harm."""
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    found = LINEAR.setdefault("found", coupled_groups(module, torch.zeros(1, 4)))
    one, other = found.groups
    rises = st.lists(st.floats(0.01, 1), min_size=5, max_size=5)
    harms = {}
    for group in (one, other):  # convex, as the hull wants them
        steps = np.cumsum(sorted(data.draw(rises)))
        harms[group.name] = (list(range(6)), [0.0, *np.cumsum(steps)])

    def pick(group, wanted):
        return np.arange(min(wanted, 5))

    def cost(units):
        return found.macs(units)

    limit = data.draw(st.floats(1.0, 1.2)) * cost({one.name: np.arange(3), other.name: np.arange(3)})  # fmt: skip
    start = {one.name: np.arange(3), other.name: np.arange(3)}
    got = allocated(found.groups, harms, pick, cost, limit, start)
    assert cost(got) <= limit

    def total(units):
        return sum(harms[name][1][len(gone)] for name, gone in units.items())

    assert total(got) <= total(start)
    every = [{one.name: np.arange(a), other.name: np.arange(b)} for a in range(6) for b in range(6)]
    best = min(total(units) for units in every if cost(units) <= limit)
    # The hull leaves at most one step of one layer unused.
    largest = max(b - a for _, held in harms.values() for a, b in itertools.pairwise(held))
    assert total(got) <= best + largest + 1e-9


LINEAR = {}


def test_the_bound_is_met_by_the_strongest(net):
    def allocate(share):
        return {"a": np.arange(int(1000 * (1 - share)))}

    got = within_bound(allocate, lambda units: len(units["a"]) / 1000, 0.3, 0.01)
    assert 265 < len(got["a"]) <= 300


def test_a_trial_leaves_the_running_statistics_alone(net, inputs):
    smaller = copy.deepcopy(net)
    with torch.no_grad():
        smaller.features[3].weight[:8] = 0
    before = {name: value.clone() for name, value in smaller.named_buffers() if "running" in name}
    trials = Trials(net, inputs[0])
    assert trials.harm_(smaller) > 0
    held = dict(smaller.named_buffers())
    assert before and all(torch.equal(value, held[name]) for name, value in before.items())
    assert not any(part.training for part in smaller.modules())
    assert all(part.momentum == 0.1 for part in smaller.modules() if hasattr(part, "momentum"))
