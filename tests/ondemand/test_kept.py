"""What a search measured and made outlives it: real networks, ended in the middle and asked again."""

import signal

import numpy as np
import pytest
import torch

import tersor
from tersor.errors import RunError
from tersor.methods import prune_family
from tersor.methods.prune_family import ChannelFamily
from tersor.ondemand import build, facts, search, trials
from tersor.ondemand.effort import EFFORTS, Clock
from tersor.ondemand.kept import Kept, read_array, write_array
from tersor.ondemand.network import Wanted, example_of
from tersor.ondemand.original import given, measured_original
from tersor.runs import Run, read_rows
from tersor.specs import Budget


class Killed(BaseException):
    pass


def unwatched(text, share):
    pass


def test_a_search_that_ended_in_its_first_candidate_goes_on_from_there(net, tmp_path, monkeypatch):
    made = []

    def counted(module, name, what=lambda given: ""):
        real = getattr(module, name)

        def call(*given, **options):
            made.append(name + what(given))
            return real(*given, **options)

        monkeypatch.setattr(module, name, call)

    for each in (facts, search):
        counted(each, "measured", lambda given: f" {given[3].name}")
    counted(trials, "bit_options")
    counted(prune_family, "group_harms")
    counted(build, "_network", lambda given: f" {given[1].share}")

    def end(text, share):
        if text.startswith("candidate 1"):
            raise Killed

    def compress(on_progress):
        budget = Budget(macs="2x fewer", drop=95)  # all fits, however few were built
        options = {"out": tmp_path / "out", "minutes": 0.05, "on_progress": on_progress}
        return tersor.compress(net, "digits", budget, **options)

    with pytest.raises(Killed):
        compress(end)
    steps = [row.get("step") for row in read_rows(tmp_path / "out" / "rows.jsonl")]
    assert steps == [None, "original", "candidate 0"]
    before, made[:] = set(made), []
    (network,) = (name for name in before if name.startswith("_network"))
    assert before == {"measured candidate_0.tersor", "bit_options", "group_harms", network}
    told = []
    answer = compress(lambda text, share: told.append(text))
    assert not before & set(made) and "measured candidate_1.tersor" in made
    assert answer.macs <= answer.original["macs"] / 2
    assert all(": at most " in text or ": its time is up" in text for text in told), "time left"


def test_a_training_that_was_interrupted_goes_on_from_its_checkpoint(
    net, splits, tmp_path, request
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    effort = EFFORTS["standard"]
    told, shares = [], []

    def interrupting(text, share):
        if text.startswith("learning") and share < 1:
            signal.raise_signal(signal.SIGINT)

    def watch(text, share):
        if text.startswith("learning"):
            shares.append(share)

    with Run(tmp_path, tell=lambda: told.append(1)) as run:
        kept = Kept(tmp_path, Clock(1.0), run)
        # What is learnt from labels is always taken; of the original's answers only what came nearer.
        loaded = given(net, splits)
        original = measured_original(loaded, Budget(drop=1), effort, kept, watch=unwatched)
        family = ChannelFamily(original.module, original.inputs[:64], example_of(original))
        plan = family.plan(family.units(0.5))
        with pytest.raises(KeyboardInterrupt):
            build.network(original, Wanted(0.5, plan, 9.0, labelled=True), kept, interrupting)
        assert told == [1]
    with Run(tmp_path) as run:
        kept = Kept(tmp_path, Clock(1.0), run)
        trained = build.network(original, Wanted(0.5, plan, 9.0, labelled=True), kept, watch)
        spent = kept.clock.passed
        again = build.network(original, Wanted(0.5, plan, labelled=True), kept, watch)
        assert kept.clock.passed > spent, "what it took counts again, in another process"
    assert trained.epochs == again.epochs > 0 and trained.harm_kl == again.harm_kl
    assert trained.plan == again.plan
    for (name, ours), theirs in zip(
        again.module.state_dict().items(), trained.module.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert shares == sorted(shares) and shares[-1] == 1, "it did not begin anew"


def test_without_a_run_a_piece_is_made_where_it_is_asked(tmp_path):
    kept = Kept(tmp_path, Clock(1.0))
    value, place = kept.piece("piece", {}, lambda place: place.name)
    assert (value, place) == ("piece", tmp_path / "piece") and place.is_dir()


def test_an_array_comes_back_and_what_is_none_is_refused(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_array(tmp_path / "a.npy", array)
    assert np.array_equal(read_array(tmp_path / "a.npy"), array)
    (tmp_path / "b.npy").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"b.npy cannot be read .* remove it to measure again"):
        read_array(tmp_path / "b.npy")
