"""Reading and writing whole files with no surprise: regular files in, all or nothing out."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
import stat
from collections.abc import Iterable, Iterator
from io import FileIO

import numpy as np
import numpy.typing as npt

from tersor.errors import ArtifactError, RunError


@contextlib.contextmanager
def open_regular(path: pathlib.Path) -> Iterator[tuple[FileIO, int]]:
    """The file unbuffered and its size in bytes. Raises ArtifactError naming `path`; never waits
    on a FIFO."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a device could already do something
            raise ArtifactError(f"{path} is not a regular file; a .tersor file is expected")
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with FileIO(os.open(path, flags), "r") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"{path} is not a regular file; a .tersor file is expected")
            yield file, status.st_size
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; a .tersor file is expected") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path} cannot be read: {reason}") from None
    except MemoryError:
        raise ArtifactError(f"{path} needs more memory than there is") from None


def read_exactly(file: FileIO, size_bytes: int, what: str) -> npt.NDArray[np.uint8]:
    """The next bytes (size_bytes,) of `file`. Raises ArtifactError when it ends before."""
    data = np.empty(size_bytes, np.uint8)
    view = data.data
    while view:
        count = file.readinto(view)
        if not count:
            raise ArtifactError(f"the file ends inside {what}")
        view = view[count:]
    return data


def write_whole(
    path: pathlib.Path,
    parts: Iterable[bytes | memoryview],
    size_bytes: int,
    *,
    again: bool = False,
) -> None:
    """Make `path` a file of `parts`, `size_bytes` in all, or leave what was there.

    The bytes go to a new file in the same directory and to the disk before it takes the name. A process that
    is killed while it writes leaves the new file behind; with `again`, for a file that is written again and
    again by one process, that file has always the same name, and the next call removes it.
    Raises RunError naming `path`.
    """
    _check_place(path)
    tag = path.name if again else secrets.token_hex(8)
    temporary = path.with_name(f".tersor-{tag}.part")
    try:
        if again:
            temporary.unlink(missing_ok=True)
        _write_new(temporary, parts)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = f"; {size_bytes} bytes of free space are needed" if full else ""
        raise RunError(f"{path} cannot be written: {error.strerror or error}{remedy}") from None
    _sync_directory(path)


def _check_place(path: pathlib.Path) -> None:
    directory = path.parent
    try:
        if not directory.is_dir():
            raise RunError(
                f"{path} cannot be written: there is no directory {directory}; make it first"
            )
        if not os.access(directory, os.W_OK | os.X_OK):
            raise RunError(f"{path} cannot be written: the directory {directory} is not writable")
        if not stat.S_ISREG(path.stat().st_mode):
            raise RunError(f"{path} cannot be written: it is there and is not a regular file")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise RunError(f"{path} cannot be written: {error}") from None


def _write_new(path: pathlib.Path, parts: Iterable[bytes | memoryview]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: pathlib.Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RunError(
            f"{path} is written, but its directory cannot be brought to the disk "
            f"({error.strerror}); after a power failure the old content may be there"
        ) from None
