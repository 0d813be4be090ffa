"""Wall-clock time of several sessions, interleaved so that drift of the machine hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tersor.errors import EngineError, SpecError
from tersor.results import Timing

if TYPE_CHECKING:  # sessions are handed in: timing them needs no engine imported
    from tersor.engines import Session

MIN_ROUNDS = 3  # below three runs a median is no better than a single one
BLOCKS = 3  # turns of each session where they are timed apart
REST_SECONDS = 0.05
_clock_ns = time.perf_counter_ns


def time_sessions(
    sessions: Mapping[str, Session],
    input_shape: tuple[int, int, int],
    batch: int,
    *,
    repeats: int = 200,
    seconds: float = 30.0,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Time one forward pass of `batch` images (C, H, W) on every session; returns name -> Timing.

    All sessions get the same seeded normal input. After `warmup` discarded runs each, every round
    runs each session once, in an order drawn anew (seeded): a session that always ran after the
    same neighbour would be charged for the caches and threads that one leaves behind (2 to 4 % at
    2 ms, measured). There are `repeats` rounds, fewer when `seconds` (of the whole call, warm-up
    aside) would be passed, but never below three. Medians and 5/95 percentiles are in milliseconds.
    Raises SpecError for a request that cannot be timed, EngineError for a session that returns no
    (batch, ...) array.
    """
    _check(sessions, input_shape, batch, repeats, seconds, warmup)
    noise = np.random.default_rng(0).standard_normal((batch, *input_shape))
    inputs = noise.astype(np.float32)
    for name, session in sessions.items():
        for _ in range(max(1, warmup)):
            _check_output(name, session.run(inputs), batch)
    return {
        name: _timing(sessions[name], batch, times)
        for name, times in _rounds(sessions, inputs, repeats, seconds).items()
    }


def time_apart(
    sessions: Mapping[str, Session],
    input_shape: tuple[int, int, int],
    batch: int,
    *,
    repeats: int = 200,
    seconds: float = 30.0,
    warmup: int = 3,
) -> dict[str, Timing]:
    """As `time_sessions`, but each session runs alone for a while, in BLOCKS turns with a rest before each.

    For sessions of different libraries: the threads of one may go on waiting actively after its run (OpenMP's do,
    for some milliseconds) and take the cores from the next, which in use would have them. ResNet-18 in
    integers took twice its time where PyTorch ran before it on two cores. Turns go round, so that drift of the
    machine still hits all alike.
    """
    _check(sessions, input_shape, batch, repeats, seconds, warmup)
    spent: dict[str, list[int]] = {name: [] for name in sessions}
    inputs = np.random.default_rng(0).standard_normal((batch, *input_shape)).astype(np.float32)
    for _ in range(BLOCKS):
        for name, session in sessions.items():
            time.sleep(REST_SECONDS)
            for _ in range(max(1, warmup)):
                _check_output(name, session.run(inputs), batch)
            alone = {name: session}
            share = seconds / (BLOCKS * len(sessions))
            spent[name] += _rounds(alone, inputs, -(-repeats // BLOCKS), share)[name]
    return {name: _timing(sessions[name], batch, times) for name, times in spent.items()}


def _rounds(
    sessions: Mapping[str, Session],
    inputs: npt.NDArray[np.float32],
    repeats: int,
    seconds: float,
) -> dict[str, list[int]]:
    """Nanoseconds of each run, by name."""
    names = list(sessions)
    draw = np.random.default_rng(0)
    spent: dict[str, list[int]] = {name: [] for name in names}
    started = _clock_ns()
    for done in range(repeats):
        passed = (_clock_ns() - started) * 1e-9
        if done >= MIN_ROUNDS and passed * (done + 1) / done > seconds:
            break
        for place in draw.permutation(len(names)):
            name = names[place]
            run = sessions[name].run
            before = _clock_ns()
            run(inputs)
            spent[name].append(_clock_ns() - before)
    return spent


def _timing(session: Session, batch: int, spent_ns: list[int]) -> Timing:
    low, median, high = (float(v) * 1e-6 for v in np.percentile(spent_ns, [5, 50, 95]))
    return Timing(session.engine, batch, session.threads, median, low, high, len(spent_ns))


def _check(
    sessions: Mapping[str, Session],
    input_shape: tuple[int, int, int],
    batch: int,
    repeats: int,
    seconds: float,
    warmup: int,
) -> None:
    if not sessions:
        raise SpecError("no sessions to time; give one at least")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise SpecError(f"input_shape is (C, H, W), each 1 or more, got {input_shape}")
    for name, value, least in (("batch", batch, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise SpecError(f"{name} must be {least} or more, got {value}")
    if not (math.isfinite(seconds) and seconds > 0):
        raise SpecError(f"seconds must be finite and positive, got {seconds}")


def _check_output(name: str, output: object, batch: int) -> None:
    shape = getattr(output, "shape", ())
    if not shape or shape[0] != batch:
        raise EngineError(
            f"session {name!r} returned shape {shape} for a batch of {batch}; expected "
            f"({batch}, classes)"
        )
