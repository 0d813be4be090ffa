"""What efforts that train do besides: times before they train, and labels where there are some."""

import copy
import dataclasses as dc
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from tersor.artifact import load
from tersor.engines import open_session
from tersor.errors import EngineError
from tersor.methods.prune_family import ChannelFamily
from tersor.ondemand import build, learn
from tersor.ondemand import search as searching
from tersor.ondemand.effort import EFFORTS, Clock
from tersor.ondemand.facts import facts
from tersor.ondemand.kept import Kept
from tersor.ondemand.network import Wanted, example_of
from tersor.ondemand.predict import LEARNT_MACS, LEARNT_PT, STATIC
from tersor.ondemand.probe import probed
from tersor.ondemand.search import FREE_PT, LEARNT, TEACHER_KL, Search
from tersor.search.tradeoff import points
from tersor.specs import Finetune


def silent(text, share):
    pass


@pytest.fixture(scope="module")
def known(original, effort, kept):
    return facts(original, effort, kept, by_macs=True, watch=silent)


@pytest.fixture
def trying(original, known, tmp_path):
    def made(asked, effort="standard", original=original, **options):
        chosen = dc.replace(EFFORTS[effort], minutes=0.05)
        kept = Kept(tmp_path, Clock(chosen.minutes))
        return Search(original, known, asked, chosen, kept, watch=silent, **options)

    return made


class Training(NamedTuple):
    module: nn.Module
    spec: Finetune
    teacher: nn.Module | None


@pytest.fixture
def trainings(monkeypatch):
    """Those that networks of a search were given, in their order."""
    given = []
    real = learn.finetune

    def spied(module, splits, spec, *, teacher, **options):
        given.append(Training(module, spec, teacher))
        return real(module, splits, spec, teacher=teacher, **options)

    monkeypatch.setattr(learn, "finetune", spied)
    return given


def test_a_time_that_was_measured_is_the_prediction_and_moves_the_others(trying):
    predictor = trying({}).predictor
    one, other = predictor.shares()[3], predictor.shares()[6]
    before = {share: predictor.form(share).costs["latency_ms"] for share in (one, other)}
    predictor.hear_time(one, 1.3 * before[one])
    after = {share: predictor.form(share).costs["latency_ms"] for share in (one, other)}
    assert after[one] == pytest.approx(1.3 * before[one])
    assert after[other] == pytest.approx(1.3 * before[other])
    predictor.hear_time(one, before[one])
    assert predictor.form(other).costs["latency_ms"] == pytest.approx(before[other])


def test_between_two_measured_times_the_prediction_is_between_their_corrections(trying):
    predictor = trying({}).predictor
    wide, middle, narrow = predictor.shares()[3:8:2]
    before = {s: predictor.form(s).costs["latency_ms"] for s in (wide, middle, narrow)}
    predictor.hear_time(wide, 1.4 * before[wide])
    predictor.hear_time(narrow, 0.6 * before[narrow])
    part = (middle - narrow) / (wide - narrow)
    expected = (0.6 + part * 0.8) * before[middle]
    assert predictor.form(middle).costs["latency_ms"] == pytest.approx(expected)


def test_no_network_is_made_whose_time_would_be_too_long(trying, known, monkeypatch):
    limit = 0.7 * known.first.costs["latency_ms"]
    search = trying({"latency_ms": limit})
    monkeypatch.setattr(search.predictor, "modes", lambda: [STATIC])
    told, built = [], []

    def slow_at_first(original, plan, engines, *, seconds):
        told.append(2 * limit if not told else 0.9 * limit)
        return told[-1], 1.0

    monkeypatch.setattr(searching, "probed", slow_at_first)
    monkeypatch.setattr(search, "_build", lambda number, point, bits: built.append(point))
    search.run()
    assert len(told) >= 2
    assert built[0].costs["latency_ms"] == pytest.approx(0.9 * limit)


def test_the_probe_runs_what_the_plan_leaves(original, known):
    family = known.family
    engines = list(known.first.engines_ms)
    plan = family.plan(family.units(0.3))
    ms, speedup = probed(original, plan, engines, seconds=0.3)
    assert ms > 0 and speedup > 0


@pytest.mark.parametrize("labelled", [True, False])
def test_labels_are_learnt_from_where_the_effort_and_the_user_say_so(
    original, labelled, trainings, tmp_path, monkeypatch
):
    family = ChannelFamily(original.module, original.inputs[:64], example_of(original))
    plan = family.plan(family.units(0.5))
    wanted = Wanted(0.5, plan, 6.0, labelled=labelled)
    monkeypatch.setattr(learn, "ANSWERING", 0.0)  # of the time: with labels no teacher is heard
    monkeypatch.setattr(learn, "TRIAL_STEPS", 2)  # which leaves time to learn on a busy machine too
    made = build.network(original, wanted, Kept(tmp_path, Clock(1.0)), silent)
    assert made.epochs > 0
    asked = {(each.spec.distill, each.teacher) for each in trainings}
    assert asked == {(0.0, None) if labelled else (1.0, original.module)}
    assert (made.drop is not None and made.drop.labelled) if labelled else made.drop is None


def test_what_became_narrower_learns_with_less_dropout(original, trainings, tmp_path):
    dropping = copy.deepcopy(original.module)
    dropping.classifier[1] = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    changed = dc.replace(original, module=dropping)
    family = ChannelFamily(dropping, original.inputs[:64], example_of(original))
    plan = family.plan(family.units(0.3))
    build.network(
        changed, Wanted(0.3, plan, 4.0, labelled=True), Kept(tmp_path, Clock(1.0)), silent
    )
    assert trainings
    for module, *_ in trainings:
        units = module.classifier[0].out_features
        assert units < 128 and module.classifier[1][1].p == pytest.approx(0.5 * units / 128)
    assert dropping.classifier[1][1].p == 0.5


@pytest.mark.parametrize(
    "least, labelled, cut", [(2, True, True), (3, True, False), (2, False, False)]
)
def test_long_trainings_from_labels_cut_squares_out(
    original, least, labelled, cut, trainings, tmp_path, monkeypatch
):
    monkeypatch.setattr(learn, "CUTOUT_EPOCHS", least)
    monkeypatch.setattr(learn._Training, "_tried", lambda *_: (2.0, 0.01, 0))
    family = ChannelFamily(original.module, original.inputs[:64], example_of(original))
    wanted = Wanted(0.5, family.plan(family.units(0.5)), 1.0, labelled=labelled)
    build.network(original, wanted, Kept(tmp_path, Clock(1.0)), silent)
    ((_, spec, _),) = trainings
    assert (spec.epochs, spec.cutout) == (2.0, learn.CUTOUT if cut else 0.0)


@pytest.mark.parametrize("memory, views", [(1 << 30, True), (1000, False)])
def test_beside_labels_the_original_answers_some_epochs_once(
    original, memory, views, trainings, tmp_path, monkeypatch
):
    """It answers so many that their share of the time is small, or none where that is too few to learn from."""
    monkeypatch.setattr(learn, "ANSWERS_BYTES", memory)
    monkeypatch.setattr(learn, "ANSWERING", 1.0)
    family = ChannelFamily(original.module, original.inputs[:64], example_of(original))
    plan = family.plan(family.units(0.5))
    wanted = Wanted(0.5, plan, 4.0, labelled=True)
    made = build.network(original, wanted, Kept(tmp_path, Clock(1.0)), silent)
    _, spec, teacher = trainings[-1]
    assert made.epochs == spec.epochs > 0
    if views:
        assert learn.FEWEST_VIEWS <= spec.views <= learn.VIEWS
        assert spec.distill == learn.TAUGHT and teacher is original.module
    else:
        assert (spec.views, spec.distill, teacher) == (0, 0.0, None)


def test_only_max_learns_from_labels_and_says_so(trying, original, monkeypatch):
    unlabelled = dc.replace(original, labels=None)
    assert [
        trying({}, effort, held).labelled
        for effort in ("quick", "standard", "max")
        for held in (original, unlabelled)
    ] == [False] * 4 + [True, False]
    search = trying({}, "max")
    share = search.predictor.shares()[5]
    monkeypatch.setattr(search.clock, "limit", search.clock.passed + 10)
    monkeypatch.setattr(searching.coding, "seconds_to_code", lambda num_weights: 0.0)
    (point, *_) = points([search.predictor.form(share)])
    search._build(1, point, {})
    assert LEARNT in search.found().notes


def test_the_teacher_is_the_network_in_integers_while_that_answers_alike(
    trying, known, original, trainings, tmp_path
):
    def search_of(harm_kl):
        first = dc.replace(known.first, drop=dc.replace(known.first.drop, harm_kl=harm_kl))
        return trying({}, made=[first])

    far, near = search_of(2 * TEACHER_KL), search_of(0.5 * TEACHER_KL)
    share = far.predictor.shares()[5]
    assert far._wanted(share).teacher is None
    wanted = dc.replace(near._wanted(share), train_seconds=2.0)
    build.network(original, wanted, Kept(tmp_path, Clock(1.0)), silent)
    images = original.inputs[:8]
    answers = trainings[0].teacher(torch.from_numpy(images)).numpy()
    integers = open_session(load(known.first.path), threads=1).run(images)
    np.testing.assert_allclose(answers, integers, atol=1e-4)
    assert len({type(each.teacher) for each in trainings}) == 1


@pytest.mark.parametrize("error", [EngineError("no kernel for it"), MemoryError()])
def test_a_probe_that_fails_is_told_and_another_share_is_taken(trying, known, monkeypatch, error):
    limit = 0.7 * known.first.costs["latency_ms"]
    search = trying({"latency_ms": limit})
    monkeypatch.setattr(search.predictor, "modes", lambda: [STATIC])
    refused, built = [], []

    def failing_at_first(original, plan, engines, *, seconds):
        if not refused:
            refused.append(plan)
            raise error
        return 0.9 * limit, 1.0

    monkeypatch.setattr(searching, "probed", failing_at_first)
    monkeypatch.setattr(search, "_build", lambda number, point, bits: built.append(point))
    first_choice = search.point()[0].form.choice
    search.run()
    assert built and built[0].form.choice != first_choice
    assert any("of the channels' time failed" in note for note in search.found().notes)


def test_before_any_network_has_learnt_the_bound_on_points_does_not_choose(trying, known):
    limit = 0.5 * known.first.costs["macs"]
    asked = {"macs": limit, "drop_pt": 1e-3}
    search = trying(asked, "max")
    point, axis = search.point()
    inside = [f for f in search.predictor.forms() if f.costs["macs"] <= 0.98 * limit]
    assert axis == "" and point.costs["macs"] <= limit
    least = min(
        form.harm + sum(min(o.harm for o in held) for held in form.options.values())
        for form in inside
    )
    assert point.harm <= least + search.predictor.harm_of(FREE_PT)
    assert point.harm > search.predictor.harm_of(asked["drop_pt"])
    unlabelled = trying(asked, "standard")
    assert unlabelled.point()[1] != "", (
        "what learns from the original is predicted, and nothing fits"
    )
    taught = dc.replace(known.first, choice={**known.first.choice, "labels": True})
    search.made.append(taught)
    assert search.point()[1] != ""


def test_what_learns_from_labels_loses_with_the_square_of_its_multiplications(trying, original):
    predictor = trying({}, "max").predictor
    shares = [share for share in predictor.shares() if predictor.units(share)[0]]
    told = {predictor.form(s).costs["macs"]: predictor._expected_loss(s) for s in shares}
    harms, drops = predictor._drops
    for macs, harm in told.items():
        share = macs / original.costs["macs"]
        expected = LEARNT_PT * (LEARNT_MACS / share) ** 2
        if expected < drops[-1]:
            assert np.interp(harm, harms, drops) == pytest.approx(expected, rel=0.05, abs=1e-3)
    narrow = min(shares)
    before = predictor._expected_loss(narrow)
    predictor.hear_network(narrow, 2 * before)
    assert predictor.form(narrow).harm == pytest.approx(2 * before + predictor.activations)


@pytest.mark.parametrize(
    "left, labels, another", [(240, True, False), (260, True, True), (240, False, True)]
)
def test_after_a_network_that_learnt_another_begins_only_with_a_quarter_of_its_time(
    trying, known, left, labels, another
):
    search = trying({}, effort="max")
    choice = {**known.first.choice, "labels": labels}
    search.made.append(dc.replace(known.first, choice=choice, seconds=1000.0))
    search.clock.limit = search.clock.passed + left
    assert search._time_for_another(10.0) is another
    assert not search._time_for_another(250.0), (
        "nor with less than the last took beside its training"
    )


def test_a_network_that_learnt_from_labels_harms_as_much_as_it_loses(trying, known):
    predictor = trying({}, "max").predictor
    drop = dc.replace(known.first.drop, harm_kl=3.0)
    for points_lost in (-0.5, 0.0, 2.0):
        told = predictor.harm_like(dc.replace(drop, estimate_pt=points_lost, labelled=True))
        again = np.interp(told, *predictor._drops)
        assert again == pytest.approx(max(points_lost, 0.0), abs=0.02)
