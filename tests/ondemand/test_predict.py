"""What was measured corrects what is predicted, where it was measured and beside it."""

import dataclasses as dc

import numpy as np
import pytest

from tersor.ondemand.facts import facts
from tersor.ondemand.predict import STATIC, Predictor
from tersor.ondemand.search import Search


def silent(text, share):
    pass


@pytest.fixture(scope="module")
def known(original, effort, kept):
    return facts(original, effort, kept, watch=silent)


@pytest.fixture
def predictor(original, known):
    return Predictor(original, known.family, known.bits, known.first)


def a_point(predictor, share):
    from tersor.search.tradeoff import points

    return points([predictor.form(share, STATIC)])[0]


def measured(known, harm, lost):
    drop = dc.replace(known.first.drop, harm_kl=harm, interval=None, labelled=False, high_pt=lost)
    return dc.replace(known.first, drop=drop)


def test_a_network_that_was_made_has_its_own_harm_and_narrower_ones_no_less(predictor, known):
    shares = predictor.shares()
    share = shares[2]
    before = {s: predictor.form(s, STATIC).harm for s in shares}
    predictor.correct(a_point(predictor, share), measured(known, 0.5, 5.0), 0.4, ms=1.0)
    after = {s: predictor.form(s, STATIC).harm for s in shares}
    assert after[share] == pytest.approx(predictor.activations + 0.4)
    assert all(after[s] >= after[share] for s in shares if s < share)
    assert after[1.0] == before[1.0]


@pytest.mark.parametrize("harm", [0.002, 0.05, 0.4])
@pytest.mark.parametrize("off", [0.6, 1.0, 1.7])
def test_the_drop_at_a_measured_harm_is_the_judged_one(predictor, known, harm, off):
    judged = off * float(np.interp(harm, *predictor._drops))  # of noise of that size
    predictor.correct(a_point(predictor, 0.9), measured(known, harm, judged), harm / 2, ms=1.0)
    assert predictor.drop_of(harm) == pytest.approx(judged, rel=1e-6)


@pytest.mark.parametrize("drop", [0.5, 2.0, 8.0])
def test_the_harm_allowed_is_not_predicted_to_lose_more(predictor, known, drop):
    predictor.correct(a_point(predictor, 0.9), measured(known, 0.1, 6.0), 0.05, ms=1.0)
    harm = predictor.harm_of(drop)
    assert predictor.drop_of(harm) <= drop
    assert predictor.harm_of(2 * drop) >= harm


def test_a_search_where_nothing_fits_tries_other_forms(original, known, effort, kept, monkeypatch):
    search = Search(original, known, {"size_bytes": 50.0}, effort, kept, watch=silent)
    built = []
    monkeypatch.setattr(
        search, "_build", lambda number, point, bits: built.append(point.form.choice)
    )
    search.run()
    assert len(built) == len(set(built)) > 1


def test_channels_priced_by_multiplications_reach_every_share_of_them(original, effort, kept):
    known = facts(original, effort, kept, by_macs=True, watch=silent)
    predictor = Predictor(original, known.family, known.bits, known.first, by_macs=True)
    whole = predictor.form(1.0)
    for share in predictor.shares()[1:]:
        form = predictor.form(share)
        assert form.costs["macs"] <= share * whole.costs["macs"]
        assert form.costs["latency_ms"] < whole.costs["latency_ms"]
    assert min(predictor.shares()) < 0.3
