"""Ctrl-C once: what runs is finished and saved. Twice: at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# SIGTERM is what a cluster sends before it takes the machine back.
ORDINARY: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class _Note:
    """A handler that takes note of the first signal and raises KeyboardInterrupt at the second."""

    def __init__(self, tell: Callable[[], None] | None) -> None:
        self.came, self.tell = False, tell

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        if self.tell is not None:
            self.tell()


@contextlib.contextmanager
def noted_interrupts(tell: Callable[[], None] | None = None) -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C or SIGTERM of the block; the function handed out says whether it came.

    `tell` is called then, from within the signal's handler. The second one raises KeyboardInterrupt where it
    comes. A block inside a block shares its note. Only the ordinary handlers are replaced, for the time of the
    block: a program that handles a signal itself goes on doing so, and threads beside the main one cannot.
    """
    # A job in the background has Ctrl-C ignored, and SIGTERM not.
    outer = [h for h in map(signal.getsignal, ORDINARY) if isinstance(h, _Note)]
    if outer:
        yield lambda: outer[0].came
        return
    note, replaced = _Note(tell), []
    if threading.current_thread() is threading.main_thread():
        replaced = [n for n, plain in ORDINARY.items() if signal.getsignal(n) is plain]
    try:
        for number in replaced:
            signal.signal(number, note)
        yield lambda: note.came
    finally:
        for number in replaced:
            signal.signal(number, ORDINARY[number])
