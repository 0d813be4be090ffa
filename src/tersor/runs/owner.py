"""One owner for a directory: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import pathlib
import platform
import time
import weakref

from tersor.errors import RunError

LOCK_NAME = "run.lock"


class Owner:
    """Holds `directory` from its making to `close`, or to the end of the process, kill -9 included.

    Raises RunError naming the process that holds it already, in this process or another one, and where the
    directory cannot be used.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._lock = _own(directory)
        _HELD.add(self)

    def close(self) -> None:
        """Give the directory back. Closing twice is allowed."""
        if self._lock >= 0:
            os.close(self._lock)  # releases the lock; the file stays, since removing it would race
        self._lock = -1


_HELD: weakref.WeakSet[Owner] = weakref.WeakSet()


def _forked() -> None:
    """A forked child is no owner: its copy of the lock would outlive a killed parent."""
    for owner in list(_HELD):
        owner.close()


os.register_at_fork(after_in_child=_forked)


def _own(directory: pathlib.Path) -> int:
    """Lock `directory` until the descriptor returned is closed, or the process ends."""
    path = directory / LOCK_NAME
    lock = -1
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} {platform.node()}\n".encode(), 0)
    except BlockingIOError:
        owner = _owner(lock)
        os.close(lock)
        raise RunError(
            f"{directory} is in use by {owner}; wait for it to end, or use another output directory"
        ) from None
    except OSError as error:
        if lock >= 0:
            os.close(lock)
        raise RunError(
            f"output directory {directory} cannot be used: {error.strerror or error} ({path.name})"
        ) from None
    return lock


def _owner(lock: int) -> str:
    """Who holds the lock. The owner writes its number just after locking: empty is read again."""
    for _ in range(50):
        held = os.pread(lock, 512, 0).decode("utf-8", "replace").split()
        if held:
            elsewhere = held[1:] and held[1] != platform.node()
            return f"process {held[0]}" + (f" on {held[1]}" if elsewhere else "")
        time.sleep(0.01)
    return "another process"
