"""The paired interval against brute force: enumeration, a numeric likelihood, a bootstrap."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import multinomial, norm

from tersor.bench import paired_interval
from tersor.bench.stats import mcnemar_p, tango_interval
from tersor.errors import DataError, SpecError
from tersor.results import Score

Z = norm.ppf(0.975)
counts = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200)).filter(sum)


def scores(won, lost, same, right=0):
    """Two scores with `won` and `lost` disagreements, `same` agreements, `right` of those right."""
    agreed = np.arange(same) < right
    ours = np.r_[np.ones(won, bool), np.zeros(lost, bool), agreed]
    return Score(ours), Score(np.r_[np.zeros(won, bool), np.ones(lost, bool), agreed])


def squared_score(d, won, lost, total):
    """The score statistic, its nuisance share found by maximising the likelihood numerically."""

    def minus_log_likelihood(q):
        shares = ((won, q + d), (lost, q), (total - won - lost, 1 - 2 * q - d))
        return -sum(n * math.log(max(p, 1e-300)) for n, p in shares if n)

    low, high = max(0.0, -d), (1 - d) / 2
    found = minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x
    q = min((low, high, found), key=minus_log_likelihood)
    return (won - lost - total * d) ** 2 / (total * (2 * q + d * (1 - d)))


@pytest.mark.parametrize(
    ("won", "lost", "total"), [(1, 2, 20), (5, 0, 30), (0, 7, 9), (12, 3, 100), (30, 41, 500)]
)
def test_the_ends_are_where_the_numeric_score_statistic_reaches_the_quantile(won, lost, total):
    for end in tango_interval(won, lost, total, 0.95):
        assert squared_score(end, won, lost, total) == pytest.approx(Z**2, rel=1e-3)


@pytest.mark.parametrize(("p_won", "p_lost"), [(0.02, 0.02), (0.1, 0.05), (0.3, 0.1), (0.0, 0.15)])
def test_coverage_by_enumeration_of_every_outcome(p_won, p_lost):
    total, covered = 40, 0.0
    for won in range(total + 1):
        for lost in range(total + 1 - won):
            counted = [won, lost, total - won - lost]
            chance = multinomial.pmf(counted, total, [p_won, p_lost, 1 - p_won - p_lost])
            if chance > 1e-9:
                low, high = tango_interval(won, lost, total, 0.95)
                covered += chance * (low <= p_won - p_lost <= high)
    assert 0.93 < covered <= 1


def test_agrees_with_a_bootstrap_where_samples_are_many():
    ours, theirs = scores(260, 180, 9560, right=8000)
    interval = paired_interval(ours, theirs)
    difference = ours.per_sample.astype(int) - theirs.per_sample
    values, number = np.unique(difference, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(10_000, number / 10_000, size=40_000)
    bootstrap = np.percentile(drawn @ values / 100, [2.5, 97.5])
    assert (interval.low_pt, interval.high_pt) == pytest.approx(bootstrap, abs=0.02)


@pytest.mark.parametrize("won", range(8))
@pytest.mark.parametrize("lost", range(8))
def test_mcnemar_is_the_exact_binomial_by_enumeration(won, lost):
    trials = won + lost
    chances = [math.comb(trials, k) / 2**trials for k in range(trials + 1)]
    as_rare = sum(chance for chance in chances if chance <= chances[won] * (1 + 1e-9))
    assert mcnemar_p(won, lost) == pytest.approx(as_rare)


@given(counts, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_interval_holds_the_estimate_and_mirrors_when_the_models_are_swapped(count, level):
    ours, theirs = scores(*count)
    there, back = paired_interval(ours, theirs, level), paired_interval(theirs, ours, level)
    assert -100 <= there.low_pt <= there.difference_pt <= there.high_pt <= 100
    mirrored = (-back.high_pt, -back.low_pt, -back.difference_pt, back.p_value)
    assert (there.low_pt, there.high_pt, there.difference_pt, there.p_value) == pytest.approx(
        mirrored, abs=1e-9
    )
    assert there.difference_pt == pytest.approx(100 * (ours.accuracy - theirs.accuracy))


@given(counts)
def test_zero_is_outside_exactly_when_mcnemars_chi_square_says_so(count):
    won, lost, same = count
    low, high = tango_interval(won, lost, won + lost + same, 0.95)
    statistic = (won - lost) ** 2 - Z**2 * (won + lost)
    if abs(statistic) > 1e-6:
        assert (low > 0 or high < 0) == (statistic > 0)


@given(counts)
def test_a_higher_level_is_wider(count):
    won, lost, same = count
    narrow = tango_interval(won, lost, won + lost + same, 0.8)
    wide = tango_interval(won, lost, won + lost + same, 0.99)
    assert wide[0] <= narrow[0] and narrow[1] <= wide[1]


def test_no_disagreement_still_has_a_width():
    total = 100
    interval = paired_interval(*scores(0, 0, total, right=90))
    assert interval.high_pt == pytest.approx(100 * Z**2 / (total + Z**2))
    assert (interval.difference_pt, interval.p_value, interval.num_samples) == (0.0, 1.0, total)


@pytest.mark.parametrize(("won", "lost", "end"), [(9, 0, 100.0), (0, 9, -100.0)])
def test_complete_disagreement_reaches_the_end_of_the_scale(won, lost, end):
    interval = paired_interval(*scores(won, lost, 0))
    assert end in (interval.low_pt, interval.high_pt)


def test_scores_of_different_sizes_are_refused():
    with pytest.raises(DataError, match=r"candidate was judged on 10 images.*original on 11"):
        paired_interval(Score(np.ones(10, bool)), Score(np.ones(11, bool)))


def test_empty_scores_are_refused():
    with pytest.raises(DataError, match="no images"):
        paired_interval(Score(np.zeros(0, bool)), Score(np.zeros(0, bool)))


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 95.0, math.nan])
def test_a_level_outside_zero_to_one_is_refused(level):
    with pytest.raises(SpecError, match="level"):
        paired_interval(*scores(1, 1, 5), level)
