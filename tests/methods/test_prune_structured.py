"""Structured pruning: the plan as asked, the smaller network as planned."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tersor import load_model
from tersor.errors import BudgetError, ModelError, SpecError
from tersor.graph.coupling import coupled_groups
from tersor.graph.labels import STAYS
from tersor.methods.prune_structured import apply, chosen_units, plan
from tersor.specs import Prune, from_dict
from tersor.tensors.unit_criteria import UNIT_CRITERIA, UnitValues

EXAMPLE = torch.zeros(1, 1, 8, 8)
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
COUPLED = {}
WIDTHS = {"features.0": 32, "features.3": 64, "features.7": 64, "classifier.0": 128}


@pytest.fixture(scope="module")
def net():
    return load_model("digits_net", seed=1)


@pytest.fixture(scope="module")
def found(net):
    return coupled_groups(net, EXAMPLE)


def channels(module):
    return {n: module.get_submodule(n).weight.shape[0] for n in WIDTHS}


def flops(module):
    with FlopCounterMode(display=False) as counter:
        module(EXAMPLE)
    return counter.get_total_flops()


def channel(**fields):
    return Prune(structure="channel", **fields)


def test_a_plan_through_json_gives_the_same_network_again(net, found):
    decided = plan(net, channel(sparsity=0.5), EXAMPLE, found=found)
    again = from_dict(json.loads(json.dumps(decided.to_dict())))
    assert again == decided
    smaller, fresh = apply(net, decided), apply(load_model("digits_net", seed=2), again)
    assert type(smaller) is type(net)
    assert channels(smaller) == {name: width // 2 for name, width in WIDTHS.items()}
    fresh.load_state_dict(smaller.state_dict())
    assert torch.equal(fresh(IMAGES), smaller(IMAGES))
    direct = apply(net, again)
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), smaller.parameters(), strict=True))  # fmt: skip


def test_the_network_is_left_alone_and_the_smaller_one_trains(net, found):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    smaller = apply(net, plan(net, channel(), EXAMPLE, found=found))
    smaller.train()(IMAGES).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in smaller.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_each_layer_has_a_line_and_what_stays_a_reason(net, found):
    decided = plan(net, channel(), EXAMPLE, found=found)
    lines = {line.layer: line for line in decided.layers}
    assert {*WIDTHS, "classifier.2"} <= set(lines)
    assert "output of the network" in lines["classifier.2"].reason


@given(
    macs=st.floats(0.02, 1),
    scope=st.sampled_from(["layer", "global"]),
    criterion=st.sampled_from(["l1", "random"]),
)
@settings(max_examples=30, deadline=None)
def test_macs_are_met_and_nearly_used_up(macs, scope, criterion):
    net = load_model("digits_net", seed=1)
    found = COUPLED.setdefault("digits_net", coupled_groups(net, EXAMPLE))
    spec = channel(macs=macs, scope=scope, criterion=criterion)
    units = chosen_units(net, spec, EXAMPLE, found)
    smaller = apply(net, plan(net, spec, EXAMPLE, found=found))
    assert flops(smaller) <= macs * flops(net)
    assert flops(smaller) == 2 * found.macs(units)
    # A unit more in each layer would be too much, where one is left to give back.
    if any(len(gone) for gone in units.values()):
        fuller = {name: gone[1:] for name, gone in units.items()}
        assert found.macs(fuller) > macs * found.macs()


def test_global_scope_takes_the_lowest_of_all_layers(found):
    net = load_model("digits_net", seed=1)
    with torch.no_grad():
        net.features[3].weight[:40] *= 1e-3  # far below the mean of its layer
    gone = chosen_units(net, channel(sparsity=40 / 288, scope="global"), EXAMPLE, found)
    assert set(range(40)) == set(gone["features.3"].tolist())
    assert sum(len(units) for units in gone.values()) == 40


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_floor_multiple_and_exclusion_hold(net, found, scope):
    fields = {"sparsity": 0.97, "scope": scope}
    got = channels(apply(net, plan(net, channel(floor=0.25, **fields), EXAMPLE, found=found)))
    assert all(got[name] >= width / 4 for name, width in WIDTHS.items())
    got = channels(apply(net, plan(net, channel(multiple_of=8, **fields), EXAMPLE, found=found)))
    assert all(width % 8 == 0 for width in got.values())
    spec = channel(exclude=("features.3", "re:classifier.*"), **fields)
    decided = plan(net, spec, EXAMPLE, found=found)
    got = channels(apply(net, decided))
    assert got["features.3"] == 64 and got["classifier.0"] == 128 and got["features.7"] < 64
    lines = {line.layer: line for line in decided.layers}
    assert "excluded by name" in lines["features.3"].reason


@pytest.mark.parametrize(
    ("structure", "changed"),
    [("filter", {"features.0", "features.3", "features.7"}), ("neuron", {"classifier.0"})],
)
def test_structures_choose_their_layers(net, found, structure, changed):
    got = channels(apply(net, plan(net, Prune(structure=structure), EXAMPLE, found=found)))
    assert {name for name, width in WIDTHS.items() if got[name] < width} == changed


def test_removing_everything_leaves_one_unit_a_layer(net, found):
    got = channels(apply(net, plan(net, channel(sparsity=0.999, floor=0.0), EXAMPLE, found=found)))
    assert set(got.values()) == {1}


def test_what_cannot_be_is_refused(net, found):
    with pytest.raises(BudgetError, match=r"macs=0\.001 cannot be met.*0\.\d+ of the"):
        plan(net, channel(macs=0.001, floor=0.5), EXAMPLE, found=found)
    with pytest.raises(SpecError, match=r"feature\.0.*Did you mean 'features\.0'"):
        plan(net, channel(exclude=("feature.0",)), EXAMPLE, found=found)
    with pytest.raises(SpecError, match="leaves zeros"):
        plan(net, Prune(structure="unstructured"), EXAMPLE, found=found)
    with pytest.raises(ModelError, match=r"no channel that can be removed.*output of the network"):
        plan(nn.Linear(3, 4), channel(), torch.zeros(1, 3))
    with pytest.raises(ModelError, match="does not run on the example"):
        plan(net, channel(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(found, value):
    net = load_model("digits_net", seed=1)
    with torch.no_grad():
        net.features[3].weight[2, 1, 0, 0] = value
    with pytest.raises(ModelError, match=r"features\.3\.weight.*NaN or infinite"):
        plan(net, channel(), EXAMPLE, found=found)


def test_a_plan_of_another_network_is_refused_with_names(net, found):
    decided = plan(net, channel(), EXAMPLE, found=found)
    with pytest.raises(ModelError, match=r"'features\.0', which Linear does not have"):
        apply(nn.Linear(3, 3), decided)
    narrow = apply(net, decided)
    with pytest.raises(ModelError, match=r"features\.0\.weight.*another network"):
        apply(narrow, decided)


@pytest.mark.parametrize("name", list(UNIT_CRITERIA))
def test_every_criterion(name, net, found):
    draw = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=draw)

    parts = [noise(7, 12), noise(7, 5) * 9], [noise(7, 2, 4)], [noise(7, 1)], [noise(7, 2).abs()]
    effects = noise(3, 7)
    saliency = UNIT_CRITERIA[name](UnitValues(7, *parts, effects), 0)
    assert saliency.shape == (7,) and bool((saliency >= 0).all())
    assert torch.equal(saliency, UNIT_CRITERIA[name](UnitValues(7, *parts, effects), 0))
    if name == "random":
        assert not torch.equal(saliency, UNIT_CRITERIA[name](UnitValues(7), 1))
    else:  # units are judged by their values, not by their place
        order = torch.randperm(7, generator=draw)
        moved = UnitValues(7, *([p[order] for p in held] for held in parts), effects[:, order])
        assert torch.allclose(UNIT_CRITERIA[name](moved, 0), saliency[order], rtol=1e-5)
        # Layers whose units are all zero say nothing, and divide nothing by zero.
        empty = UnitValues(7, *([0 * p for p in held] for held in parts), effects * 0)
        same = 0.0 if UNIT_CRITERIA[name].comparable else 1.0
        assert torch.equal(UNIT_CRITERIA[name](empty, 0), torch.full((7,), same))
    spec = channel(sparsity=0.25, criterion=name)
    decided = plan(net, spec, EXAMPLE, found=found, inputs=[IMAGES.numpy()])
    assert channels(apply(net, decided)) == {n: w * 3 // 4 for n, w in WIDTHS.items()}
    if UNIT_CRITERIA[name].needs:
        with pytest.raises(SpecError, match=f"{name}.*needs calibration inputs"):
            plan(net, spec, EXAMPLE, found=found)


def test_criteria_against_numpy(net, found):
    weight = net.features[3].weight.detach().double().flatten(1).numpy()
    gamma = net.features[4].weight.detach()
    gone = chosen_units(net, channel(criterion="l1"), EXAMPLE, found)["features.3"]
    assert set(gone) == set(abs(weight).sum(1).argsort()[:32])
    gone = chosen_units(net, channel(criterion="l2"), EXAMPLE, found)["features.3"]
    assert set(gone) == set((weight**2).sum(1).argsort()[:32])
    gone = chosen_units(net, channel(criterion="fpgm"), EXAMPLE, found)["features.3"]
    distance = ((weight[:, None] - weight[None]) ** 2).sum(-1) ** 0.5
    assert set(gone) == set(distance.sum(1).argsort()[:32])
    assert float(gamma.min()) == 1.0 == float(gamma.max())  # a fresh batch norm tells none apart


def test_batch_norms_scale_decides_where_asked(found):
    net = load_model("digits_net", seed=1)
    with torch.no_grad():
        net.features[4].weight.copy_(torch.linspace(-1, 1, 64))
    gone = chosen_units(net, channel(criterion="bn_gamma"), EXAMPLE, found)["features.3"]
    assert set(gone.tolist()) == set(range(16, 48))


def test_nothing_frozen_is_chosen(net, found):
    gone = found.nodes_of(chosen_units(net, channel(sparsity=0.9), EXAMPLE, found))
    assert not gone[STAYS]


def test_a_schedule_is_refused_here(net, found):
    with pytest.raises(SpecError, match=r"schedule='iterative' needs a recovery between"):
        plan(net, channel(schedule="iterative", rounds=2), EXAMPLE, found=found)
