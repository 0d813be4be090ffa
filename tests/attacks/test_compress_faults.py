"""A search on demand killed at every point, every write of it failing, its journal torn: it goes on to the same answer.

One child process does it: it forks a search for every point. What computes is replaced there (compress_child.py);
tests/ondemand ends and resumes real searches.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

CHILD = pathlib.Path(__file__).with_name("compress_child.py")
MADE = ["original", "candidate_0.tersor", "channels", "bits", "network", "candidate_1.tersor"]
LAST = ["network", "candidate_2.tersor"]


def child(place, *acts):
    done = subprocess.run(
        [sys.executable, str(CHILD), str(place), *acts],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERSOR_CACHE": str(place / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place = tmp_path_factory.mktemp("faults")
    return child(place, "again:1", "killed:23", "failing:17:ENOSPC", "torn:301")


def kinds(made):
    """Networks without the share of channels that they keep."""
    return [name.split()[0] for name in made]


def test_what_was_measured_is_not_measured_again(found):
    told = found[0]
    assert kinds(told["whole"]) == [*MADE, *LAST]
    assert len(set(told["whole"])) == len(told["whole"]), "the networks are two"
    assert told["answered"] == [] == told["stopped"], (
        "an answer is given again, and written from what is kept"
    )
    assert kinds(told["interrupted"]) == MADE, "what ran was finished"
    assert told["interrupted"] + told["after it"] == told["whole"]


def test_a_candidate_that_needs_too_much_memory_fails_alone(found):
    told = found[0]
    assert "candidate_1.tersor" not in told["memory"] and "candidate_2.tersor" in told["memory"]
    assert any("candidate 1 failed: it needs more memory" in note for note in told["notes"])


def test_another_process_is_told_who_has_the_directory(found):
    assert found[0]["owner"].startswith("out is in use by process ")


def killed_rightly(points, again, least):
    assert points >= least and again > points, "points found, and killed at again"


def refused_rightly(points, refused, messages, least):
    assert points >= least and refused > points / 2
    assert not any("Errno" in message for message in messages)


def test_killed_and_killed_again_it_goes_on_to_the_same_bytes(found):
    killed_rightly(*found[1], least=8)


def test_a_disk_that_is_full_is_told_and_gone_on_from(found):
    refused_rightly(*found[2], least=10)


def test_a_torn_journal_is_gone_on_from(found):
    assert found[3][0] > 10


@pytest.mark.slow
@pytest.mark.parametrize("act", ["killed:1", "failing:1:ENOSPC", "failing:1:EIO", "torn:1"])
def test_at_every_point(tmp_path, act):
    (told,) = child(tmp_path, act)
    if act.startswith("killed"):
        killed_rightly(*told, least=150)
    elif act.startswith("failing"):
        refused_rightly(*told, least=150)
    else:
        assert told[0] > 3000
