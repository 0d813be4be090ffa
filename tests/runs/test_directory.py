"""A run's directory: results are made once, other settings are refused, Ctrl-C finishes what runs."""

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import RunError
from tersor.runs import Run, read_rows
from tersor.runs.directory import difference

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def counting(calls, result="made"):
    def make(place):
        calls.append(place)
        (place / "file").write_text("content")
        return result

    return make


def test_a_step_is_made_once_for_each_name_and_request(tmp_path):
    calls = []
    with Run(tmp_path / "new" / "run") as run:
        assert run.step("prune", {"sparsity": 0.5}, counting(calls, {"bits": (1, 2)})) == {
            "bits": [1, 2]
        }
        assert run.step("prune", {"sparsity": 0.5}, counting(calls)) == {"bits": [1, 2]}
    with Run(tmp_path / "new" / "run") as run:
        assert run.step("prune", {"sparsity": 0.5}, counting(calls)) == {"bits": [1, 2]}
        assert len(calls) == 1
        assert (run.place("prune", {"sparsity": 0.5}) / "file").read_text() == "content"
        assert run.step("prune", {"sparsity": 0.6}, counting(calls, None)) is None
        assert run.step("prune", {"sparsity": 0.6}, counting(calls)) is None, "None is a result too"
        run.step("other", {"sparsity": 0.5}, counting(calls))
        assert len(calls) == len(set(calls)) == 3


def test_a_step_that_failed_is_made_again_and_finds_its_files(tmp_path):
    def failing(place):
        (place / "checkpoint").write_text("half way")
        raise RunError("no")

    def going_on(place):
        return (place / "checkpoint").read_text()

    with Run(tmp_path) as run:
        with pytest.raises(RunError, match="no"):
            run.step("train", {}, failing)
        assert run.step("train", {}, going_on) == "half way"


@pytest.mark.parametrize("damage", ["file", "result", "removed", "other request"])
def test_a_step_whose_files_are_not_what_they_were_is_made_again(tmp_path, damage):
    calls = []
    with Run(tmp_path) as run:
        run.step("a", {"n": 1}, counting(calls))
        place = run.place("a", {"n": 1})
        if damage == "file":
            (place / "file").write_text("short")
        elif damage == "removed":
            (place / "file").unlink()
        elif damage == "result":
            (place / "result.json").write_bytes((place / "result.json").read_bytes()[:-9])
        else:
            told = json.loads((place / "result.json").read_text()) | {"request": {"n": 2}}
            (place / "result.json").write_text(json.dumps(told))
        assert run.step("a", {"n": 1}, counting(calls, "again")) == "again"
        assert run.step("a", {"n": 1}, counting(calls)) == "again" and len(calls) == 2


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a b", "é", "x" * 200])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with Run(tmp_path) as run, pytest.raises(RunError, match="a step's name"):
        run.step(name, {}, lambda place: 1)


def test_results_and_requests_that_json_cannot_hold_are_refused_and_nothing_is_kept(tmp_path):
    with Run(tmp_path) as run:
        with pytest.raises(RunError, match=r"value\.loss=nan"):
            run.step("a", {"loss": float("nan")}, lambda place: 1)
        with pytest.raises(RunError, match="value=b'x'"):
            run.step("a", {}, lambda place: b"x")
        assert run.step("a", {}, lambda place: 2) == 2


def test_forgotten_steps_are_gone_and_rows_stay(tmp_path):
    with Run(tmp_path) as run:
        run.journal.append({"n": 1})
        run.step("a", {}, lambda place: 1)
        run.forget()
        run.forget()
        assert not (tmp_path / "steps").exists() and run.journal.rows() == [{"n": 1}]


def test_other_settings_are_refused_with_the_first_difference(tmp_path):
    asked = {"recipe": {"steps": [{"kind": "prune", "sparsity": 0.5}]}, "data": "digits"}
    with Run(tmp_path) as run:
        run.begin(**asked)
    with Run(tmp_path) as run:
        run.begin(**asked)
        run.begin(**asked, later="a setting of a newer version")
        with pytest.raises(RunError, match="data='digits', now asked for 'cifar10'"):
            run.begin(**{**asked, "data": "cifar10"})
        other = {"steps": [{"kind": "prune", "sparsity": 0.5, "scope": "layer"}]}
        with pytest.raises(RunError, match=r"recipe\.steps=.*now asked for.*scope"):
            run.begin(**{**asked, "recipe": other})
        assert len(run.journal.find(kind="run")) == 1


@given(before=json_values, now=json_values)
def test_a_difference_is_told_exactly_where_values_differ(before, now):
    assert (difference(before, now) == "") == (before == now)
    assert difference(before, before) == ""


def test_two_owners_are_refused_with_the_process_named_and_a_closed_run_is_free(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(RunError, match=f"is in use by process {os.getpid()}"):
        Run(tmp_path)
    run.close()
    run.close()
    Run(tmp_path).close()


def test_a_forked_child_does_not_keep_its_parents_directory(tmp_path):
    code = (
        "import os, sys, time\n"
        "from tersor.runs import Run\n"
        "run = Run(sys.argv[1])\n"
        "if os.fork() == 0:\n"
        "    print('ready', flush=True)\n"  # the child runs, and has let go
        "    os.kill(os.getppid(), 9)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    ) as child:
        assert child.stdout.readline() == b"ready\n"
        child.wait()
        try:
            Run(tmp_path).close()
        finally:
            os.killpg(child.pid, signal.SIGKILL)


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run cannot be made: Not a directory"):
        Run(tmp_path / "file" / "run")


@pytest.fixture
def ctrl_c():
    """As in a terminal; a job in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_step_and_keeps_it(tmp_path, number):
    told = []

    def interrupted(place):
        signal.raise_signal(number)
        assert told == [1], "told at once"
        return "finished"

    before = signal.getsignal(number)
    with Run(tmp_path, tell=lambda: told.append(1)) as run:
        run.check()
        with pytest.raises(KeyboardInterrupt):
            run.step("a", {}, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.check()
    assert signal.getsignal(number) is before
    with Run(tmp_path) as run:
        assert run.step("a", {}, lambda place: "made again") == "finished"


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_signal_stops_at_once_and_the_step_is_made_again(tmp_path):
    def interrupted(place):
        (place / "half").write_text("half")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")

    with Run(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        run.step("a", {}, interrupted)
    with Run(tmp_path) as run:
        assert run.step("a", {}, lambda place: "made") == "made"


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "background"])
def test_a_block_inside_shares_the_note_of_the_run(tmp_path, ctrl_c, ignored):
    from tersor.runs.interrupts import noted_interrupts

    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Run(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        with noted_interrupts() as interrupted:
            assert not interrupted()
            signal.raise_signal(signal.SIGTERM)
            assert interrupted()
        run.check()


def test_rows_of_a_run_are_read_while_it_goes_on(tmp_path):
    with Run(tmp_path) as run:
        run.begin(seed=0)
        assert read_rows(tmp_path / "rows.jsonl") == [{"kind": "run", "settings": {"seed": 0}}]
