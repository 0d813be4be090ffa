"""Removal in rounds: what each leaves follows the schedule, and the whole is one plan for the first network."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tersor
from tersor import load_data, load_model
from tersor.errors import BudgetError, ModelError, SpecError
from tersor.graph.coupling import coupled_groups, label
from tersor.graph.surgery import lines_of, removed
from tersor.methods.prune_structured import apply, plan
from tersor.methods.schedules import remove_gradually
from tersor.pipeline import prune_model
from tersor.recipe import run_recipe
from tersor.specs import Finetune, Prune, Recipe, from_dict

EXAMPLE = torch.zeros(1, 1, 8, 8)
RECIPE = Finetune(epochs=0.2, batch_size=64, precision="float32", compile="off")


class Joined(nn.Module):
    """A residual sum, a concatenation, groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.c = nn.Conv2d(24, 16, 3, padding=1, groups=4)
        self.d = nn.Linear(16, 4)

    def forward(self, inputs):
        one = self.a(inputs).relu()
        two = torch.cat([one + self.b(one), one], 1)
        return self.d(self.c(two).relu().mean((2, 3)))


NETS = {"plain": load_model("digits_net", seed=1), "joined": Joined().eval()}
FOUND = {name: coupled_groups(net, EXAMPLE) for name, net in NETS.items()}


def steps_of(module, spec, **options):
    """(recovered after each round, result)."""
    seen = []

    def recover(smaller, masks, number):
        assert masks == {} and number == len(seen) + 1
        moved = copy.deepcopy(smaller)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.mul_(1.5)
        seen.append(moved)
        return moved

    return seen, remove_gradually(module, spec, EXAMPLE, recover=recover, **options)


@given(data=st.data(), name=st.sampled_from(sorted(NETS)))
@settings(max_examples=25, deadline=None)
def test_what_is_left_has_the_same_groups_at_its_own_indices(data, name):
    net, found = NETS[name], FOUND[name]

    def some(group):
        most = st.sets(st.integers(0, group.num_units - 1), max_size=group.num_units - 1)
        return np.array(sorted(data.draw(most)), np.int64)

    first = {group.name: some(group) for group in found.groups}
    smaller = removed(net, lines_of(net, found.kept(first)))
    left = found.without(first)
    assert left.macs() == found.macs(first) == label(smaller, EXAMPLE).macs()
    assert left.whole_macs == found.macs()
    second = {group.name: some(group) for group in left.groups}
    in_two = removed(smaller, lines_of(smaller, left.kept(second)))
    both = {}
    for group in found.groups:
        stays = np.setdiff1d(np.arange(group.num_units), first[group.name])
        both[group.name] = np.union1d(first[group.name], stays[second[group.name]])
    at_once = removed(net, lines_of(net, found.kept(both)))
    assert left.macs(second) == found.macs(both)
    for one, other in zip(in_two.parameters(), at_once.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("schedule", ["iterative", "gradual"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_shares_of_the_first_network_after_each_round(schedule, scope):
    net, found = NETS["plain"], FOUND["plain"]
    spec = Prune(structure="channel", sparsity=0.75, scope=scope, schedule=schedule, rounds=3)
    seen, made = steps_of(net, spec, found=found)
    total = sum(group.num_units for group in found.groups)
    left = [sum(g.num_units for g in coupled_groups(net, EXAMPLE).groups) for net in seen]
    done = [r / 3 for r in (1, 2, 3)]
    shares = {
        "iterative": [1 - 0.25**d for d in done],
        "gradual": [0.75 * (1 - (1 - d) ** 3) for d in done],
    }[schedule]
    for units, share in zip(left, shares, strict=True):
        assert units == pytest.approx((1 - share) * total, abs=len(found.groups) / 2 + 1)
    once = plan(net, Prune(structure="channel", sparsity=0.75, scope=scope), EXAMPLE, found=found)
    last = sum(g.num_units for g in coupled_groups(apply(net, once), EXAMPLE).groups)
    assert left[-1] == last
    assert made.module is seen[-1] and made.plan.request == spec


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_whole_is_one_plan_for_a_fresh_instance(name):
    net = NETS[name]
    spec = Prune(structure="channel", macs=0.3, schedule="gradual", rounds=3, floor=0.2)
    before = copy.deepcopy(net.state_dict())
    seen, made = steps_of(net, spec, found=FOUND[name])
    fresh = copy.deepcopy(net)
    for part in fresh.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    again = apply(fresh, from_dict(json.loads(json.dumps(made.plan.to_dict()))))
    again.load_state_dict(made.module.state_dict())
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(images), made.module.eval()(images))
    # what stays was only scaled, once a round: the plan names the right channels
    direct = apply(net, made.plan)
    for one, other in zip(direct.parameters(), made.module.parameters(), strict=True):
        assert torch.allclose(one * 1.5 ** len(seen), other)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_multiplications_fall_as_asked_and_floors_are_of_the_first_network():
    net, found = NETS["plain"], FOUND["plain"]
    spec = Prune(
        structure="channel", macs=0.2, schedule="gradual", rounds=4, floor=0.25, multiple_of=4
    )
    seen, _ = steps_of(net, spec, found=found)
    macs = [label(net, EXAMPLE).macs(), *(label(each, EXAMPLE).macs() for each in seen)]
    for number, (before, after) in enumerate(itertools.pairwise(macs), 1):
        share = 1 - 0.8 * (1 - (1 - number / 4) ** 3)
        assert after <= share * macs[0] and after < before
    widths = {g.name: g.num_units for g in coupled_groups(seen[-1], EXAMPLE).groups}
    for group in found.groups:
        assert widths[group.name] >= 0.25 * group.num_units and widths[group.name] % 4 == 0


def test_one_round_is_one_shot():
    net, found = NETS["plain"], FOUND["plain"]
    spec = Prune(structure="channel", macs=0.4, criterion="fpgm")
    made = remove_gradually(net, spec, EXAMPLE, recover=lambda net, *_: net, found=found)
    assert made.plan == plan(net, spec, EXAMPLE, found=found)


def test_no_ratio_by_hand_in_rounds():
    splits = load_data("digits", num_calibration=64)
    inputs = list(splits.batches(splits.calibration, 64))
    spec = Prune(structure="channel", scope="auto", sparsity=0, schedule="iterative", rounds=2)
    seen, _ = steps_of(NETS["joined"], spec, found=FOUND["joined"], inputs=inputs)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (NETS["joined"], *seen)]
    assert len(seen) == 2 and sizes[0] >= sizes[1] >= sizes[2]


def test_what_cannot_be_is_said_before_any_work():
    def never(*_):
        raise AssertionError("a recovery for a target that cannot be met")

    net, found = NETS["plain"], FOUND["plain"]
    rounds = {"schedule": "gradual", "rounds": 2}
    with pytest.raises(BudgetError, match=r"macs=0.0001 cannot be met"):
        spec = Prune(structure="channel", macs=0.0001, **rounds)
        remove_gradually(net, spec, EXAMPLE, recover=never, found=found)
    with pytest.raises(SpecError, match="whole blocks go in one"):
        remove_gradually(net, Prune(structure="block", **rounds), EXAMPLE, recover=never)
    with pytest.raises(ModelError, match=r"round 1 gave a network without .*'features.0.weight'"):
        remove_gradually(
            net,
            Prune(structure="channel", **rounds),
            EXAMPLE,
            recover=lambda *_: nn.Linear(2, 2),
            found=found,
        )


def test_rounds_resume_after_a_kill_and_repeat_nothing(tmp_path):
    splits = load_data("digits", num_calibration=64)
    net = NETS["plain"]
    spec = Prune(structure="channel", sparsity=0.6, schedule="gradual", rounds=2)
    told = []

    def run(on_progress, place):
        return prune_model(
            net, splits, spec, recovery=RECIPE, checkpoint=place, on_progress=on_progress
        )

    whole = run(told.append, tmp_path / "a.checkpoint")
    ends = [progress.step for progress in told if progress.step == progress.num_steps]
    assert len(ends) == 2

    class Killed(Exception):
        pass

    def stop(progress):
        stop.ends += progress.step == progress.num_steps
        if stop.ends == 2:
            raise Killed

    stop.ends = 0
    with pytest.raises(Killed):
        run(stop, tmp_path / "b.checkpoint")
    again = []
    resumed = run(again.append, tmp_path / "b.checkpoint")
    assert [p.step for p in again if p.step == p.num_steps] == ends[:1]  # only the second round
    assert resumed.plan == whole.plan
    for one, other in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_recipe_trains_after_each_round_and_the_file_goes_back(tmp_path):
    splits = load_data("digits", num_calibration=64)
    steps = (
        Prune(structure="channel", macs=0.4, schedule="iterative", rounds=2),
        RECIPE,
        Prune(sparsity=0.5),
    )
    trained = []
    made = run_recipe(
        NETS["plain"],
        splits,
        Recipe(steps),
        on_progress=lambda named, p: trained.append(named) if p.step == p.num_steps else None,
    )
    assert trained == ["step 1, prune"] * 2
    tersor.write(made.graph, tmp_path / "net.tersor", plan=made.plan)
    back = tersor.load(tmp_path / "net.tersor", into=load_model("digits_net"))
    assert label(back, EXAMPLE).macs() <= 0.4 * label(NETS["plain"], EXAMPLE).macs()
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(back(images), made.module.eval()(images), atol=1e-4)
