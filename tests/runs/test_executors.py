"""Every executor does each piece once, whatever becomes of others; on Ray a lost worker's piece is done again."""

import importlib.util
import sys
import tempfile
import time

import pytest

from tersor.errors import MissingExtraError, RunError, UnknownNameError
from tersor.runs.executors import EXECUTORS, Outcome, open_executor
from tersor.userfile import load_function

NO_RAY = importlib.util.find_spec("ray") is None
needs_ray = pytest.mark.skipif(NO_RAY, reason="ray is not installed (extra 'ray')")
pytestmark = pytest.mark.filterwarnings("default")  # those of ray are not ours

# As a user's file, which no other machine has.
WORK = '''
import os, pathlib, signal
import numpy as np
from tersor.errors import ModelError

def scaled(shared, item, watch):
    watch(f"piece {item}", 0.5)
    return float(shared["values"].sum()) * item

def failing(shared, item, watch):
    if item == 1:
        raise ModelError("piece 1 cannot be made")
    if item == 2:
        raise MemoryError
    return item

def faulty(shared, item, watch):
    raise ZeroDivisionError("a fault of ours")

def killed(shared, item, watch):
    """Ends its process in the middle, `times` times a piece."""
    place = pathlib.Path(shared["place"]) / str(item)
    with place.open("a") as started:
        started.write("x")
    if place.stat().st_size <= shared["times"] and item % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item
'''


def unwatched(text, share):
    pass


def unchecked():
    pass


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "pieces.py"
    path.write_text(WORK)
    return lambda name: load_function(f"{path}:{name}")


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of this machine with two CPUs, which ends with the module."""
    ray = pytest.importorskip("ray", reason="ray is not installed (extra 'ray')")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=place,
        )
        yield ray
        ray.shutdown()
    patch.undo()


@pytest.fixture(params=sorted(EXECUTORS))
def executor(request):
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return open_executor(request.param)


def outcomes(executor, function, shared, items, watch=unwatched, check=unchecked):
    found = list(executor.run(function, shared, items, watch=watch, check=check))
    assert sorted(o.name for o in found) == sorted(items), "each once"
    return {outcome.name: outcome for outcome in found}


def test_every_piece_is_done_once_with_what_all_share(executor, work):
    numpy = pytest.importorskip("numpy")
    shared = {"values": numpy.ones((1000, 100))}
    items = {f"piece {n}": n for n in range(5)}
    seen = []
    found = outcomes(
        executor, work("scaled"), shared, items, watch=lambda text, share: seen.append(share)
    )
    assert {name: outcome.get() for name, outcome in found.items()} == {
        name: 1e5 * n for name, n in items.items()
    }
    assert len(seen) == 5 and all(0 <= share <= 1 for share in seen)


def test_a_piece_that_fails_leaves_the_others_alone(executor, work):
    found = outcomes(executor, work("failing"), None, {f"piece {n}": n for n in range(4)})
    assert [found[f"piece {n}"].value for n in (0, 3)] == [0, 3]
    with pytest.raises(Exception, match="piece 1 cannot be made"):
        found["piece 1"].get()
    with pytest.raises(RunError, match="piece 2 needs more memory"):
        found["piece 2"].get()


def test_a_fault_of_the_program_is_raised_as_it_is(executor, work):
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        outcomes(executor, work("faulty"), None, {"piece": 0})


def test_nothing_to_do_is_done(executor, work):
    assert outcomes(executor, work("scaled"), None, {}) == {}


def test_what_check_raises_ends_the_work(executor, work):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outcomes(executor, work("failing"), None, {"piece": 0}, check=stop)


def test_an_unknown_executor_and_a_missing_library_are_told(monkeypatch):
    with pytest.raises(UnknownNameError, match="unknown executor 'rya'"):
        open_executor("rya")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"tersor\[ray\]"):
        open_executor("ray")


def test_an_outcome_gives_its_value_or_raises_its_error():
    assert Outcome("a", 3).get() == 3
    with pytest.raises(RunError, match="no"):
        Outcome("a", error=RunError("no")).get()


def test_the_piece_of_a_lost_worker_is_done_again_and_none_twice_in_the_result(
    cluster, work, tmp_path
):
    shared = {"place": str(tmp_path), "times": 1}
    found = outcomes(open_executor("ray"), work("killed"), shared, {f"p{n}": n for n in range(4)})
    assert sorted(outcome.get() for outcome in found.values()) == [0, 1, 2, 3]
    started = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert started == {"0": 1, "1": 2, "2": 1, "3": 2}


@pytest.mark.slow
def test_a_piece_that_loses_every_worker_is_given_up_and_the_others_are_done(
    cluster, work, tmp_path
):
    shared = {"place": str(tmp_path), "times": 99}
    found = outcomes(open_executor("ray"), work("killed"), shared, {"p0": 0, "p1": 1})
    assert found["p0"].get() == 0
    with pytest.raises(RunError, match="p1: its worker was lost 4 times"):
        found["p1"].get()


def test_more_threads_than_any_machine_has_are_refused(cluster):
    with pytest.raises(
        RunError, match="takes 64 CPUs, and no machine of the Ray cluster has more than 2"
    ):
        open_executor("ray", threads=64)


def test_a_worker_of_another_version_is_refused(cluster, work, monkeypatch):
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99")
    found = outcomes(open_executor("ray"), work("scaled"), None, {"piece": 1})
    with pytest.raises(RunError, match="the run is of tersor 99"):
        found["piece"].get()


@needs_ray
def test_no_cluster_is_told_with_the_remedy(tmp_path):
    import os
    import subprocess

    code = (
        "from tersor.runs.executors import open_executor\n"
        "from tersor.errors import RunError\n"
        "try:\n    open_executor('ray')\n"
        "except RunError as told:\n    print(told)\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "RAY_TMPDIR": str(tmp_path)}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "no Ray cluster answers at '127.0.0.1:1'" in done.stdout, done.stderr[-2000:]
    assert "ray start --head" in done.stdout and time.monotonic() - begun < 60
