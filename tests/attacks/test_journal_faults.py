"""Torn files, failing disks, two owners: no finished row is ever lost, each refusal is typed."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from tersor.errors import RunError
from tersor.runs.journal import Journal

ROWS = [{"n": n, "é": "é" * n, "nested": {"values": [n / 7, "}\n{"]}} for n in range(3)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def fill(path, rows=ROWS):
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        for row in rows:
            journal.append(row)
    return path.read_bytes()


def read(path):
    with Journal(path) as journal:
        return journal.rows()


def test_cut_at_every_byte_every_whole_row_is_recovered_by_three_resumes(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands of calls, and nothing crashes
    content = fill(path)
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        torn = cut > 0 and content[cut - 1 : cut] != b"\n"
        for resume in range(3):
            with Journal(path) as journal:
                assert journal.rows() == ROWS[:whole] + [{"resume": r} for r in range(resume)]
                assert bool(journal.recovered) == (torn and resume == 0)
                if journal.recovered:
                    assert f"line {whole + 1} was torn" in journal.recovered
                journal.append({"resume": resume})
        assert read(path) == ROWS[:whole] + [{"resume": r} for r in range(3)]


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 64, b"\0" * 64 + b"\n", b'{"a":NaN}\n', b"\xff\n", b"{}{}\n", b"\n", b"[" * 9**5],
)
def test_a_last_line_of_rubbish_is_a_torn_one(path, tail):
    content = fill(path)
    path.write_bytes(content + tail)
    with Journal(path) as journal:
        assert journal.rows() == ROWS and "line 4 was torn" in journal.recovered
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [1, 2])
@pytest.mark.parametrize(
    "rubbish",
    [
        b'{"n":1',
        b"",
        b"[1]",
        b"null",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":1,"a":2}',
        b'{"a":' + b"9" * 5000 + b"}",
        b"[" * 10**5,
        b"\x80",
        b'{"a":1} trailing',
    ],
)
def test_a_damaged_line_before_the_last_is_refused_by_number_and_left_alone(path, line, rubbish):
    lines = fill(path).split(b"\n")
    lines[line - 1] = rubbish
    damaged = b"\n".join(lines)
    path.write_bytes(damaged)
    with pytest.raises(RunError, match=f"line {line}: not a row"):
        Journal(path)
    assert path.read_bytes() == damaged


class Disk:
    """Stands in for one function of `os`; its n-th call fails, after writing `part` bytes."""

    def __init__(self, monkeypatch, function, fail_at, part=None, error=errno.ENOSPC):
        self.real, self.fail_at, self.part, self.error = getattr(os, function), fail_at, part, error
        self.calls = 0
        monkeypatch.setattr(os, function, self)

    def __call__(self, *args):
        self.calls += 1
        if self.calls != self.fail_at:
            return self.real(*args)
        if self.part is not None:
            self.real(args[0], bytes(args[1])[: self.part])
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("fail_at", [1, 2])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("function", "part"), [("write", None), ("write", 5), ("fsync", None)])
def test_the_nth_write_or_fsync_failing_keeps_the_old_rows_and_may_be_tried_again(
    path, monkeypatch, function, part, fail_at, error
):
    fill(path, ROWS[:1])
    with Journal(path) as journal:
        Disk(monkeypatch, function, fail_at, part, error)
        done = ROWS[:1]
        for row in ROWS[1:]:
            before = path.read_bytes()
            try:
                journal.append(row)
            except RunError as refused:
                assert os.strerror(error) in str(refused) and "bytes" in str(refused)
                assert path.read_bytes() == before and journal.rows() == done
                journal.append(row)
            done = [*done, row]
    monkeypatch.undo()
    assert read(path) == ROWS


def test_a_failed_write_that_cannot_be_cut_back_is_mended_by_the_next_append(path, monkeypatch):
    with Journal(path) as journal:
        journal.append(ROWS[0])
        with monkeypatch.context() as broken:
            Disk(broken, "write", 1, part=5)
            Disk(broken, "ftruncate", 1)
            with pytest.raises(RunError):
                journal.append(ROWS[1])
        assert journal.rows() == ROWS[:1]
        journal.append({})
        assert journal.rows() == [ROWS[0], {}]
    assert read(path) == [ROWS[0], {}]


def test_a_failed_write_that_stays_torn_is_mended_by_the_next_opening(path, monkeypatch):
    with Journal(path) as journal:
        journal.append(ROWS[0])
        with monkeypatch.context() as broken:
            Disk(broken, "write", 1, part=5)
            Disk(broken, "ftruncate", 1)
            with pytest.raises(RunError):
                journal.append(ROWS[1])
    with Journal(path) as journal:
        assert journal.rows() == ROWS[:1] and "5 bytes" in journal.recovered


def test_short_writes_are_completed(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data)[:3]))
    fill(path)
    monkeypatch.undo()
    assert read(path) == ROWS


def test_an_interrupt_inside_an_append_leaves_no_half_row(path, monkeypatch):
    def interrupted(file):
        raise KeyboardInterrupt

    with Journal(path) as journal:
        journal.append(ROWS[0])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "fsync", interrupted)
            journal.append(ROWS[1])
        journal.append(ROWS[2])
    assert read(path) == [ROWS[0], ROWS[2]]


@pytest.mark.parametrize("function", ["open", "fsync", "read", "pwrite", "fstat"])
@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_failure_at_opening_is_typed_and_frees_the_directory(
    path, monkeypatch, function, fail_at
):
    fill(path)
    with monkeypatch.context() as broken:
        disk = Disk(broken, function, fail_at, error=errno.EIO)
        try:
            Journal(path).close()
        except RunError as refused:
            assert disk.calls >= fail_at and "Input/output error" in str(refused)
        else:
            assert disk.calls < fail_at
    assert read(path) == ROWS


def test_a_file_changed_by_another_program_is_not_written_over(path):
    with Journal(path) as journal:
        journal.append(ROWS[0])
        changed = path.read_bytes() + b'{"theirs":1}\n'
        path.write_bytes(changed)
        with pytest.raises(RunError, match="another program changed it"):
            journal.append(ROWS[1])
    assert path.read_bytes() == changed


def test_a_journal_removed_while_in_use_is_told(path):
    with Journal(path) as journal:
        path.unlink()
        with pytest.raises(RunError, match="was removed"):
            journal.append(ROWS[0])


def test_a_directory_a_fifo_and_a_missing_directory_are_refused(tmp_path):
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("dir", "fifo"):
        with pytest.raises(RunError, match=name):
            Journal(tmp_path / name)
    with pytest.raises(RunError, match="No such file or directory"):
        Journal(tmp_path / "none" / "rows.jsonl")


CHILD = """
import sys
from tersor.runs.journal import Journal
journal = Journal(sys.argv[1])
journal.append({"from": "child"})
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child(path):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_owns_the_directory(path, child):
    with pytest.raises(RunError, match=f"{path.parent} is in use by process {child.pid}"):
        Journal(path)
    child.communicate("")
    assert read(path) == [{"from": "child"}]


def test_a_killed_owner_frees_the_directory_and_its_rows_are_there(path, child):
    child.send_signal(signal.SIGKILL)
    child.wait()
    with Journal(path) as journal:
        assert journal.rows() == [{"from": "child"}]


def test_killed_at_any_moment_no_acknowledged_row_is_lost(path):
    code = (
        "import sys; from tersor.runs.journal import Journal\n"
        "journal = Journal(sys.argv[1]); start = len(journal.rows())\n"
        "for n in range(start, 10**9):\n"
        "    journal.append({'n': n, 'pad': 'x' * (n % 97)}); print(n, flush=True)\n"
    )
    for kills in range(1, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(7 * kills):
            process.stdout.readline()
        process.kill()
        told = process.communicate()[0].split()
        rows = read(path)
        assert [row["n"] for row in rows] == list(range(len(rows)))
        assert not told or len(rows) > int(told[-1])
