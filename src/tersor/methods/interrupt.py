"""Ctrl-C once: what runs is finished and saved. Twice: at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def noted_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold back the first KeyboardInterrupt of the block; the function handed out tells whether it came.

    The second one is raised where it comes. Python's own handler alone is replaced, for the time of the
    block: a program that handles the signal itself goes on doing so, and other threads cannot.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    replaced = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if replaced:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
