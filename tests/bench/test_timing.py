"""Order, counts and arithmetic of timing, on sessions that move a clock of their own."""

import collections
import itertools

import numpy as np
import pytest

from tersor.bench import time_sessions, timing
from tersor.bench.timing import time_apart
from tersor.errors import EngineError, SpecError


class Clock:
    def __init__(self):
        self.now_ns = 0

    def __call__(self):
        return self.now_ns


class FakeSession:
    """Costs the milliseconds of `costs` in turn, the last one for ever."""

    engine, threads = "fake", 7

    def __init__(self, name, clock, log, costs):
        self.name, self.clock, self.log, self.costs = name, clock, log, list(costs)
        self.inputs = []

    def run(self, batch):
        self.log.append(self.name)
        self.inputs.append(batch)
        cost = self.costs.pop(0) if len(self.costs) > 1 else self.costs[0]
        self.clock.now_ns += round(cost * 1e6)
        return np.zeros((len(batch), 10), np.float32)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "_clock_ns", clock)
    return clock


def make(clock, costs):
    log = []
    return log, {name: FakeSession(name, clock, log, c) for name, c in costs.items()}


def rounds_of(clock, repeats):
    log, sessions = make(clock, {"A": [1], "B": [1], "C": [1]})
    time_sessions(sessions, (1, 2, 2), 2, repeats=repeats, warmup=2)
    assert log[:6] == list("AABBCC")
    return ["".join(log[i : i + 3]) for i in range(6, len(log), 3)]


def test_after_the_warm_up_every_round_runs_each_session_once(clock):
    rounds = rounds_of(clock, 40)
    assert len(rounds) == 40 and {"".join(sorted(r)) for r in rounds} == {"ABC"}


def test_no_session_always_runs_after_the_same_neighbour(clock):
    following = collections.Counter(itertools.pairwise("".join(rounds_of(clock, 300))))
    for name in "ABC":
        before = [following[other, name] for other in "ABC" if other != name]
        assert min(before) > 0.8 * max(before)


def test_the_order_of_the_rounds_is_seeded(clock):
    assert rounds_of(clock, 20) == rounds_of(clock, 20)


def test_warm_up_runs_are_discarded(clock):
    _, sessions = make(clock, {"A": [900, 900, 5]})
    (found,) = time_sessions(sessions, (1, 2, 2), 1, repeats=5, warmup=2).values()
    assert (found.median_ms, found.p05_ms, found.p95_ms, found.repeats) == (5, 5, 5, 5)


def test_median_and_percentiles_are_numpys(clock):
    costs = np.random.default_rng(0).integers(1, 100, 41).tolist()
    _, sessions = make(clock, {"A": [0, *costs]})
    found = time_sessions(sessions, (1, 2, 2), 3, repeats=41, warmup=1)["A"]
    expected = np.percentile(costs, [5, 50, 95])
    assert (found.p05_ms, found.median_ms, found.p95_ms) == pytest.approx(expected)
    assert (found.engine, found.threads, found.batch) == ("fake", 7, 3)


def test_every_session_gets_the_same_seeded_input(clock):
    _, sessions = make(clock, {"A": [1], "B": [2]})
    time_sessions(sessions, (3, 4, 5), 2, repeats=3)
    seen = [batch for session in sessions.values() for batch in session.inputs]
    assert all(batch is seen[0] for batch in seen)
    assert seen[0].shape == (2, 3, 4, 5) and seen[0].dtype == np.float32 and seen[0].std() > 0.5


def test_the_cap_in_seconds_ends_the_rounds_before_it_is_passed(clock):
    _, sessions = make(clock, {"A": [300], "B": [200]})
    found = time_sessions(sessions, (1, 2, 2), 1, repeats=1000, seconds=10)
    assert {t.repeats for t in found.values()} == {20}
    assert sum(t.median_ms * t.repeats for t in found.values()) <= 10_000


def test_a_slow_session_still_gets_three_rounds(clock):
    _, sessions = make(clock, {"A": [60_000]})
    assert time_sessions(sessions, (1, 2, 2), 1, seconds=1)["A"].repeats == 3


def test_fewer_repeats_asked_for_are_kept(clock):
    _, sessions = make(clock, {"A": [1]})
    assert time_sessions(sessions, (1, 2, 2), 1, repeats=1, warmup=0)["A"].repeats == 1


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"batch": 0}, "batch must be 1 or more, got 0"),
        ({"repeats": 0}, "repeats"),
        ({"warmup": -1}, "warmup"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"input_shape": (3, 32)}, "input_shape"),
        ({"input_shape": (3, 0, 32)}, "input_shape"),
        ({"sessions": {}}, "no sessions"),
    ],
)
def test_a_request_that_cannot_be_timed_is_refused(clock, change, culprit):
    _, sessions = make(clock, {"A": [1]})
    asked = {"sessions": sessions, "input_shape": (1, 2, 2), "batch": 1, **change}
    with pytest.raises(SpecError, match=culprit):
        time_sessions(**asked)


def test_a_session_that_does_not_answer_the_batch_is_refused_by_name(clock):
    _, sessions = make(clock, {"good": [1], "bad": [1]})
    sessions["bad"].run = lambda batch: np.zeros((1, 10), np.float32)
    with pytest.raises(EngineError, match=r"'bad' returned shape \(1, 10\) for a batch of 4"):
        time_sessions(sessions, (1, 2, 2), 4)


def test_apart_each_runs_alone_in_turns_and_every_run_counts(clock, monkeypatch):
    rests = []
    monkeypatch.setattr(timing.time, "sleep", rests.append)
    log, sessions = make(clock, {"A": [1], "B": [4]})
    found = time_apart(sessions, (1, 2, 2), 2, repeats=30, warmup=1)
    assert [name for name, _ in itertools.groupby(log)] == list("ABABAB")
    assert len(rests) == 6 and min(rests) > 0
    assert {name: t.median_ms for name, t in found.items()} == {"A": 1, "B": 4}
    assert {t.repeats for t in found.values()} == {30}


def test_apart_keeps_to_its_seconds(clock, monkeypatch):
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    _, sessions = make(clock, {"A": [10], "B": [10]})
    time_apart(sessions, (1, 2, 2), 1, repeats=10**6, seconds=1.2, warmup=1)
    assert clock.now_ns * 1e-9 < 1.5
