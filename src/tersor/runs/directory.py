"""A run's directory: one owner, rows that stay, steps that are made once, and stopping when asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from tersor.artifact.storage import write_whole
from tersor.errors import RunError
from tersor.runs.interrupts import noted_interrupts
from tersor.runs.journal import Journal, Rows
from tersor.runs.processes import Processes, processes, scratch

ROWS, STEPS, RESULT, CHECKPOINT = "rows.jsonl", "steps", "result.json", "checkpoint"
UNFINISHED = ".tersor-*.part"  # what write_whole leaves when it is killed
Make = Callable[[pathlib.Path], Any]


class Run:
    """A directory that long work may be killed in at any moment, and go on from.

    `directory` is made where it is missing, and owned until `close`. `journal` keeps rows (rows.jsonl), `step`
    keeps results (steps/). The first Ctrl-C or SIGTERM is noted (`tell` is called) and raised as
    KeyboardInterrupt by the next `check` or at the end of a step; the second is raised at once. Under torchrun
    the leader owns the directory; the others start from its rows and write to a scratch directory.
    Raises RunError where the directory cannot be used or is in use, naming the process.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, tell: Callable[[], None] | None = None
    ) -> None:
        self.processes: Processes = processes()
        given = pathlib.Path(directory)
        self.directory = given if self.processes.leads else scratch() / given.name
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"output directory {given} cannot be made: {error.strerror or error}"
            ) from None
        self.journal, self.recovered = Rows(), ""
        with contextlib.ExitStack() as opened:
            if self.processes.leads:
                journal = opened.enter_context(Journal(self.directory / ROWS))
                self.journal, self.recovered = journal, journal.recovered
                self._clean()
            rows = self.processes.agreed(self.journal.rows())
            if not self.processes.leads:
                self.journal = Rows(rows)
            self._interrupted = opened.enter_context(noted_interrupts(tell))
            self._closing = opened.pop_all()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the directory back; closing twice is allowed."""
        self._closing.close()

    def begin(self, **settings: Any) -> None:
        """Write what the run was asked for as its first row; at a resume, refuse what differs.

        A setting that the first run did not know had its default there. Raises RunError naming the first
        difference.
        """
        found = self.journal.find(kind="run")
        if not found:
            self.journal.append({"kind": "run", "settings": settings})
            return
        before = found[0]["settings"]
        known = {key: value for key, value in plain(settings).items() if key in before}
        if different := difference({key: before[key] for key in known}, known):
            raise RunError(
                f"{self.directory} holds a run with {different}; use the same settings to go on, "
                "another output, or remove it to start anew"
            )

    def check(self) -> None:
        """Raise KeyboardInterrupt where Ctrl-C or SIGTERM came, in any process of the run: what is done is kept."""
        if any(self.processes.gathered(self._interrupted())):
            raise KeyboardInterrupt

    def step(
        self, name: str, request: Mapping[str, Any], make: Make, *, together: bool = False
    ) -> Any:
        """The result of `make` (anything JSON holds), made once for `name` and `request` and kept on disk.

        `make` is given a directory of its own, in which it may write files, and where it finds those of an
        earlier call that was killed, a checkpoint for instance. Once it returned, the files and then the
        result are brought to the disk; the next call with an equal request gives that result. Under torchrun
        the leader makes it and the others receive result and files, or with `together` all make it (a
        training). Raises RunError for a request or result that JSON cannot hold, and where writing fails.
        """
        place = self.place(name, request)
        found = self.processes.agreed(
            _finished(place, plain(request)) if self.processes.leads else None
        )
        apart = found is None and together  # each process made its own files
        if found is None and (together or self.processes.leads):
            found = self._made(place, request, make)
        if not self.processes.alone:
            found = self._shared(place, found, files=not apart)
        self.check()
        return found["result"]

    def place(self, name: str, request: Mapping[str, Any]) -> pathlib.Path:
        """The directory of a step, whether it is there or not; one for each request."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.=,-]{0,99}", name, re.ASCII):
            raise RunError(f"a step's name is letters, digits and . = , - _, got {name!r}")
        digest = hashlib.sha256(_encoded(plain(request))).hexdigest()
        return self.directory / STEPS / f"{name}-{digest[:16]}"

    def checkpoint(self, name: str, request: Mapping[str, Any]) -> pathlib.Path:
        """Where a training that is no step keeps its checkpoint: a file, there or not, in a directory that is."""
        place = self.place(name, request)
        _make(place)
        return place / CHECKPOINT

    @property
    def kept(self) -> bool:
        """Whether any step holds a file."""
        return any(path.is_file() for path in (self.directory / STEPS).rglob("*"))

    def forget(self) -> None:
        """Remove what the steps kept, once the run's own result is on disk."""
        shutil.rmtree(self.directory / STEPS, ignore_errors=True)

    def _made(self, place: pathlib.Path, request: Mapping[str, Any], make: Make) -> dict[str, Any]:
        _make(place)
        result = plain(make(place))
        found = {"request": plain(request), "result": result, "files": _synced(place)}
        if self.processes.leads:
            content = _encoded(found)
            write_whole(place / RESULT, [content], len(content))
        return found

    def _shared(self, place: pathlib.Path, found: Any, *, files: bool) -> dict[str, Any]:
        """What the leader found, in every process."""
        content = {}
        if self.processes.leads and files:
            content = {name: (place / name).read_bytes() for name in found["files"]}
        found, content = self.processes.agreed((found, content))
        if not self.processes.leads:
            for name, data in content.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(data)
        return dict(found)

    def _clean(self) -> None:
        """Remove the halves of files that a killed run was writing."""
        for pattern in (UNFINISHED, f"{STEPS}/**/{UNFINISHED}"):
            for left in self.directory.glob(pattern):
                with contextlib.suppress(OSError):
                    left.unlink()


def _make(place: pathlib.Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{place} cannot be made: {error.strerror or error}") from None


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples as lists. Raises RunError naming what JSON cannot hold."""
    held = Rows()
    held.append({"value": value if not isinstance(value, Mapping) else dict(value)})
    return held.rows()[0]["value"]


def difference(before: Any, now: Any, place: str = "") -> str:
    """The first difference of two JSON values in words, with its place; "" where they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            inner = f"{place}.{key}" if place else key
            if key not in before or key not in now:
                held, asked = ("nothing", now[key]) if key in now else (before[key], "nothing")
                return f"{inner}={held!r}, now asked for {asked!r}"
            if found := difference(before[key], now[key], inner):
                return found
        return ""
    return "" if before == now else f"{place}={before!r}, now asked for {now!r}"


def _encoded(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _finished(place: pathlib.Path, request: Any) -> dict[str, Any] | None:
    """What a step kept; None where it has to be made, again where its files are not what they were."""
    try:
        found = json.loads((place / RESULT).read_bytes())
        sizes = {name: (place / name).stat().st_size for name in found["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if sizes != found["files"] or found.get("request") != request or "result" not in found:
        return None
    return dict(found)


def _synced(place: pathlib.Path) -> dict[str, int]:
    """Bring a step's files to the disk; their sizes in bytes, by name."""
    sizes = {}
    try:
        for path in sorted(place.rglob("*")):
            size = _sync(path)
            if path.is_file() and path != place / RESULT:
                sizes[path.relative_to(place).as_posix()] = size
        for path in (place, place.parent, place.parent.parent):
            _sync(path)
    except OSError as error:
        raise RunError(
            f"{place} cannot be brought to the disk: {error.strerror or error}; make room, then run again "
            "to go on"
        ) from None
    return sizes


def _sync(path: pathlib.Path) -> int:
    """Bring a file or directory to the disk; its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
