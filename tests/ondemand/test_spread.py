"""Networks are made where there are processors, several at once; what is timed is timed here."""

import pickle
import tempfile

import pytest

import tersor
from tersor.errors import RunError, UnknownNameError
from tersor.ondemand import build
from tersor.runs.executors import Outcome, attempt
from tersor.specs import Budget

BUDGET = Budget(macs="2x fewer", drop=95)  # all fits, however few were built


class Elsewhere:
    """Another machine, as far as what is sent there and back goes. It loses the worker of its first piece."""

    here = False

    def __init__(self):
        self.asked = []

    def run(self, work, shared, items, *, watch, check):
        """See Executor."""
        self.asked.append(sorted(items))
        for number, (name, item) in enumerate(items.items()):
            check()
            if number == 0 and len(self.asked) == 1:
                yield Outcome(name, error=RunError(f"{name}: its worker was lost"))
                continue
            call, given, one = pickle.loads(pickle.dumps((work, shared, item)))
            done = attempt(name, lambda: call(given, one, lambda text, share: None))  # noqa: B023
            yield Outcome(name, pickle.loads(pickle.dumps(done.value)), done.error)


def test_networks_are_made_elsewhere_at_once_and_found_here(net, tmp_path, monkeypatch):
    import importlib

    module = importlib.import_module("tersor.ondemand.compress")
    workers, made, real = Elsewhere(), [], build._network

    def network(original, wanted, checkpoint, kept, watch):
        made.append((wanted.share, "here" if kept.run is not None else "elsewhere"))
        return real(original, wanted, checkpoint, kept, watch)

    monkeypatch.setattr(module, "open_executor", lambda name, threads: workers)
    monkeypatch.setattr(build, "_network", network)
    options = {"out": tmp_path / "out", "minutes": 0.02, "executor": "ray"}
    answer = tersor.compress(net, "digits", BUDGET, **options)
    assert answer.macs <= answer.original["macs"] / 2
    assert len(workers.asked[0]) == 4, "several at once"
    lost = [note for note in answer.notes if "its worker was lost" in note]
    assert len(lost) == 1 and lost[0].startswith("network 0.")
    shares = [share for share, where in made if where == "elsewhere"]
    assert len(shares) == len(set(shares)) >= 3, "each once"
    assert not {share for share, where in made if where == "here"} & set(shares)


def test_an_unknown_executor_is_told_before_any_work(net, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown executor 'rya'"):
        tersor.compress(net, "digits", BUDGET, out=tmp_path / "out", executor="rya")
    assert not (tmp_path / "out").exists()


def test_one_of_several_processes_is_told_that_times_would_mean_nothing(net, tmp_path, monkeypatch):
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="start it without torchrun"):
        tersor.compress(net, "digits", BUDGET, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of ray are not ours
def test_a_ray_cluster_makes_the_networks(net, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed (extra 'ray')")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(num_cpus=2, _temp_dir=place, **quiet)
        try:
            told = []
            answer = tersor.compress(
                net,
                "digits",
                Budget(macs="2x fewer", drop=95, threads=1),
                out=tmp_path / "out",
                minutes=0.3,
                executor="ray",
                on_progress=lambda text, share: told.append(text),
            )
        finally:
            ray.shutdown()
    assert answer.macs <= answer.original["macs"] / 2
    ended = {text.split(":")[0] for text in told if text.startswith("network 0.")}
    assert len(ended) >= 4
