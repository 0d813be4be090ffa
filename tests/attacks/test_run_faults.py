"""A run killed at every point, and every write, sync and rename of it failing: what is on disk stays right.

One child process does it all, without torch: it forks a run for every point, and looks at what is left.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tersor.errors import RunError
from tersor.runs import Run

WORK = textwrap.dedent(
    """
    import errno, os, pathlib, resource, shutil, signal, sys
    from tersor.errors import RunError
    from tersor.runs import Run

    os.fsync = lambda file: None  # thousands of calls; a killed process does not lose what it wrote

    def work(directory):
        with Run(directory) as run:
            run.begin(seed=0)
            for n in range(2):
                def make(place, n=n):
                    half = place / "checkpoint"
                    if not half.exists():
                        half.write_text("half")
                    (place / "weights").write_text("w" * 50 * (n + 1))
                    half.unlink()
                    return {"n": n}
                if not run.journal.find(step=n):
                    run.journal.append({"step": n, **run.step(f"step{n}", {"n": n}, make)})
            return [row for row in run.journal.rows()]

    def content(directory):
        return {
            str(p.relative_to(directory)): p.read_bytes()
            for p in sorted(pathlib.Path(directory).rglob("*"))
            if p.is_file() and p.name != "run.lock"
        }

    def finished(directory):
        # what a later run may never lose: whole rows, and results with their files
        held = content(directory)
        rows = held.get("rows.jsonl", b"")
        return rows[: rows.rfind(b"\\n") + 1], {k for k in held if k.endswith("result.json")}

    CALLS = ("open", "write", "fsync", "ftruncate", "pwrite", "mkdir", "replace", "unlink", "close")

    class Point:
        # counts the calls that change a disk, and does something at the n-th
        def __init__(self, at, act, only=CALLS):
            self.at, self.act, self.count = at, act, 0
            for name in only:
                setattr(os, name, self.wrapped(getattr(os, name), name))

        def wrapped(self, real, name):
            def call(*args, **options):
                self.count += 1
                if self.count == self.at:
                    self.act(name, real, args)
                return real(*args, **options)
            return call
    """
)


def child(code, *arguments):
    """Run WORK and `code` in a process without torch; its last line of output as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", WORK + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_before_any_call_that_changes_the_disk_and_again_while_resuming(tmp_path):
    told = child(
        """
        import json
        base = pathlib.Path(sys.argv[1])
        work(base / "whole")
        expected = content(base / "whole")

        def killed(directory, at):
            pid = os.fork()
            if pid == 0:
                Point(at, lambda *_: os.kill(os.getpid(), 9))
                work(directory)
                os._exit(0)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9

        points, again = 0, 0
        while True:
            directory = base / "killed"
            shutil.rmtree(directory, ignore_errors=True)
            if not killed(directory, points + 1):
                break
            points += 1
            for second in (1 + points % 7, 20):
                rows, results = finished(directory) if directory.exists() else (b"", set())
                again += killed(directory, second)
                after, kept = finished(directory) if directory.exists() else (b"", set())
                assert after.startswith(rows) and kept >= results, ("lost", points, second)
            work(directory)
            assert content(directory) == expected, points
        print(json.dumps([points, again]))
        """,
        tmp_path,
    )
    assert told[0] > 60 and told[1] > 60, "points found and killed at"


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_every_call_failing_is_a_typed_error_and_the_run_goes_on(tmp_path, error):
    told = child(
        """
        import json
        base, number = pathlib.Path(sys.argv[1]), getattr(errno, sys.argv[2])
        work(base / "whole")
        expected = content(base / "whole")
        real = {name: getattr(os, name) for name in CALLS}

        def failing(name, function, args):
            if name == "write" and len(args[1]) > 3:
                function(args[0], bytes(args[1])[:3])  # a disk takes a part before it is full
            raise OSError(number, os.strerror(number))

        points, refused, messages = 0, 0, set()
        while True:
            directory = base / "failing"
            shutil.rmtree(directory, ignore_errors=True)
            point = Point(points + 1, failing, tuple(c for c in CALLS if c != "close"))
            try:
                work(directory)
            except RunError as told:
                refused += 1
                assert os.strerror(number) in str(told), told
                messages.add(str(told).replace(str(directory), ""))
            except OSError as raw:
                # the user's own files, made inside a step, fail as they do anywhere
                assert "checkpoint" in str(raw.filename) or "weights" in str(raw.filename) or not raw.filename, raw
            finally:
                for name, function in real.items():
                    setattr(os, name, function)
            if point.count < points + 1:
                break
            points += 1
            work(directory)
            assert content(directory) == expected, points
        print(json.dumps([points, refused, sorted(messages)]))
        """,
        tmp_path,
        error,
    )
    points, refused, messages = told
    assert points > 40 and refused > points / 2
    assert not any("Errno" in message for message in messages)


def test_a_full_disk_keeps_the_old_state_tells_the_bytes_and_is_gone_on_from(tmp_path):
    told = child(
        """
        import json
        base = pathlib.Path(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        whole = work(base / "whole")
        expected, largest = content(base / "whole"), 0
        refused = []
        for limit in range(0, 400, 7):
            directory = base / f"full{limit}"
            pid = os.fork()
            if pid == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    work(directory)
                except RunError as told:
                    os._exit(1 if "bytes" in str(told) else 3)
                except OSError:
                    os._exit(2)  # the step's own file
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            refused.append(code)
            if directory.exists():
                assert expected["rows.jsonl"].startswith(finished(directory)[0])
            work(directory)
            assert content(directory) == expected, limit
        print(json.dumps(refused))
        """,
        tmp_path,
    )
    assert {0, 1} <= set(told) <= {0, 1, 2, 3} and told[-1] == 0
    assert told.count(3) < told.count(1), (
        "a file that cannot even be opened for one byte tells no size"
    )


def test_a_torn_journal_of_a_run_at_every_byte_three_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands of calls, and nothing crashes

    def rows():
        with Run(tmp_path) as run:
            run.begin(seed=0)
            for n in range(3):
                if not run.journal.find(n=n):
                    run.journal.append({"n": n})
            return run.journal.rows(), run.recovered

    whole, _ = rows()
    path = tmp_path / "rows.jsonl"
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        for resume in range(3):
            found, recovered = rows()
            assert found == whole
            torn = cut > 0 and content[cut - 1 : cut] != b"\n"
            assert bool(recovered) == (torn and resume == 0)
        assert path.read_bytes() == content


HOLD = "import sys; from tersor.runs import Run; run = Run(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


def test_two_processes_one_owner_and_a_killed_owner_frees_the_directory(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"{tmp_path} is in use by process {owner.pid}"):
            Run(tmp_path)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        Run(tmp_path).close()
