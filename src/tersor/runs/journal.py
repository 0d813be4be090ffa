"""Rows of a study, appended one by one to a file that survives kill -9 and a full disk."""

from __future__ import annotations

import copy
import json
import math
import os
import pathlib
import stat
from types import TracebackType
from typing import Any

from tersor.errors import RunError
from tersor.runs.owner import Owner

Row = dict[str, Any]


class Rows:
    """Rows held in memory, as a worker of a run makes them for the owner of its journal."""

    def __init__(self, rows: list[Row] | None = None) -> None:
        self._rows: list[Row] = copy.deepcopy(rows or [])

    def rows(self) -> list[Row]:
        """All rows in the order they were appended; copies."""
        return copy.deepcopy(self._rows)

    def find(self, **keys: Any) -> list[Row]:
        """The rows that hold all of `keys` with equal values (tuples equal lists); copies."""
        wanted = json.loads(_encode(keys))
        return [
            copy.deepcopy(row)
            for row in self._rows
            if all(key in row and row[key] == value for key, value in wanted.items())
        ]

    def append(self, row: Row) -> None:
        """Put `row` at the end. Raises RunError for a value JSON cannot hold, NaN and infinity among them."""
        self._rows.append(json.loads(_encode(row)))


class Journal(Rows):
    """One JSON object per line, appended and flushed to disk, never edited; one owner per
    directory.

    A row is on disk once `append` returned. A last line torn by a crash is cut off at opening, and
    `recovered` tells so ("" otherwise). Raises RunError when the file cannot be used, is damaged
    before its last line, or the directory belongs to another process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = pathlib.Path(path)
        self.recovered = ""
        self._size = 0
        self._torn = False
        self._file = -1
        self._owner = Owner(self.path.parent)
        try:
            self._file = _open(self.path)
            self._read()
        except OSError as error:
            self.close()
            raise RunError(
                f"journal {self.path} cannot be used: {error.strerror or error}"
            ) from None
        except RunError:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the directory back; the rows stay on disk. Closing twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
        self._owner.close()

    def append(self, row: Row) -> None:
        """Put `row` at the end of the file and wait until it is on disk.

        Raises RunError for a value JSON cannot hold (NaN and infinity among them), for a closed
        journal, and when writing fails: the rows before it are kept, and the append may be tried
        again.
        """
        line = _encode(row)
        if self._file < 0:
            raise RunError(f"journal {self.path} is closed; open it again to append")
        self._check_untouched()
        try:
            if self._torn:
                os.ftruncate(self._file, self._size)
                self._torn = False
            os.lseek(self._file, self._size, os.SEEK_SET)
            _write(self._file, line)
            os.fsync(self._file)
        except OSError as error:
            self._cut_back()
            raise RunError(
                f"journal {self.path}: a row of {len(line)} bytes could not be written "
                f"({error.strerror or error}); the {len(self._rows)} rows before it are kept: "
                "make room, then run again to go on"
            ) from None
        except BaseException:
            self._cut_back()
            raise
        self._size += len(line)
        self._rows.append(json.loads(line))

    def _check_untouched(self) -> None:
        """Refuse to write into a file that something else removed or changed since the last row."""
        now = os.fstat(self._file)
        if now.st_nlink == 0:
            raise RunError(f"journal {self.path} was removed while in use; start the run again")
        if now.st_size != self._size and not self._torn:
            raise RunError(
                f"journal {self.path} has {now.st_size} bytes where this run left {self._size}: "
                "another program changed it; start the run again"
            )

    def _cut_back(self) -> None:
        """Drop what is behind the last whole row; else the next append or opening does it."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self._torn = True

    def _read(self) -> None:
        """Take the rows in; cut a torn last line."""
        content = _read_all(self._file)
        self._rows, self._size = _parse(self.path, content)
        if self._size < len(content):
            self.recovered = (
                f"{self.path.name}: line {len(self._rows) + 1} was torn "
                f"({len(content) - self._size} bytes) and was cut; its measurement is made again"
            )
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a journal without owning it: a run may be writing, so a torn end is left out.

    Raises RunError for a file that cannot be read or is damaged before its last line.
    """
    file = pathlib.Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RunError(f"journal {file} cannot be read: {error.strerror or error}") from None
    return _parse(file, content)[0]


def _parse(path: pathlib.Path, content: bytes) -> tuple[list[Row], int]:
    """The whole rows and the bytes they take; a torn line before the last raises RunError."""
    rows: list[Row] = []
    size, lines = 0, content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the line has no end")
            rows.append(_decode(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise RunError(
                f"{path}, line {number}: not a row ({error}); restore the file or remove the line"
            ) from None
        size += len(line)
    return rows, size


def _open(path: pathlib.Path) -> int:
    """The journal's descriptor; a new file's name is on disk before its first row."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    file = os.open(path, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise RunError(
                f"journal {path} is not a regular file; remove it or use another directory"
            )
        directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        os.close(file)
        raise
    return file


def _read_all(file: int) -> bytes:
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _write(file: int, line: bytes) -> None:
    """os.write may take a part only, for example on a disk that is nearly full."""
    left = memoryview(line)
    while left:
        left = left[os.write(file, left) :]


def _encode(row: Row) -> bytes:
    """Canonical JSON: sorted keys, no spaces, ASCII, one line. RunError names the culprit."""
    if not isinstance(row, dict):
        raise RunError(f"a row is a dict, got {type(row).__name__}")
    if wrong := _culprit(row, ""):
        raise RunError(
            f"a row cannot hold {wrong}; give finite plain numbers, text, lists and dicts"
        )
    try:
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:  # an integer of thousands of digits
        raise RunError(f"a row cannot be written as JSON: {error}") from None
    return text.encode("ascii") + b"\n"


def _culprit(value: Any, place: str) -> str:
    """What in `value` JSON would lose or refuse, with its place; "" where all is well."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"the key {key!r}{place and f' in {place}'}"
            if found := _culprit(item, f"{place}.{key}" if place else key):
                return found
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if found := _culprit(item, f"{place}[{index}]"):
                return found
    elif isinstance(value, float):
        return "" if math.isfinite(value) else f"{place}={value}"
    elif not (value is None or isinstance(value, str | int)):
        return f"{place}={value!r} ({type(value).__name__})"
    return ""


def _decode(line: bytes) -> Row:
    """One line to a row. Raises ValueError for anything `append` would not have written."""
    row = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if wrong := _culprit(row, ""):
        raise ValueError(f"holds {wrong}")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found
