"""Entropy coding: integer frequencies of ours, the arithmetic of `constriction`'s ANS coder.

What a symbol costs is decided by counts that both sides keep in the same integers (`Counts`); no
table is stored. Frequencies reach the coder as float64 holding whole numbers below 2^16 that add up
to 2^16: every operation on them is exact, so no machine can round differently (`docs/format.md`).
"""

from __future__ import annotations

from typing import Any, Protocol

import constriction
import numpy as np
import numpy.typing as npt

from tersor.errors import ArtifactError

Ints = npt.NDArray[np.int64]
Symbols = npt.NDArray[np.int32]

TOTAL = 1 << 16  # the sum of the frequencies of one table
UNIT = 32  # what one seen symbol adds to its count
SEGMENT = 1 << 21  # symbols after which a stream is closed: bounds what encoding holds
MAX_ALPHABET = 256
FIRST_RUN, LONGEST_RUN = 48, 1 << 17


class Counts:
    """Adaptive tables, one row a context: `counts` (contexts, symbols) int64, at least 1 each.

    `frequencies` (contexts, symbols) float64: whole numbers of at least 1 that add up to TOTAL.
    A row whose counts pass `limit` symbols is halved, so that old ones fade.
    """

    def __init__(self, prior: Ints, limit: int) -> None:
        self.counts = prior.copy()
        self.limit = limit * UNIT
        self.frequencies = frequencies(self.counts)

    def update(self, index: Any, symbols: npt.NDArray[Any]) -> None:
        """Count `symbols` (n,), each in the context of `index` (n,), or all in that one."""
        num, size = self.counts.shape
        seen = np.bincount(index * size + symbols, minlength=num * size).reshape(num, size)
        rows = np.flatnonzero(seen.any(axis=1))
        self.counts[rows] += UNIT * seen[rows]
        self.refresh(rows)

    def refresh(self, rows: Any = slice(None)) -> None:
        """Fade what passes the limit and make the frequencies of `rows` anew."""
        counts = self.counts[rows]
        while (over := counts.sum(axis=1) > self.limit).any():
            counts[over] = (counts[over] + 1) >> 1
        self.counts[rows] = counts
        self.frequencies[rows] = frequencies(counts)


def frequencies(counts: Ints) -> npt.NDArray[np.float64]:
    """Frequencies of `counts` (contexts, symbols): 1 each, the rest of TOTAL shared out in
    proportion, by whole-number division of the cumulated counts."""
    ends = np.cumsum(counts, axis=1)
    size = counts.shape[1]
    ends = ends * (TOTAL - size) // ends[:, -1:] + np.arange(1, size + 1)
    ends[:, 1:] -= ends[:, :-1].copy()
    return np.asarray(ends, np.float64)


class Coder(Protocol):
    """One side of a stream. The same calls in the same order write it and read it; `known` is what
    to write, and is ignored by the reader."""

    def symbols(self, table: Counts, index: npt.NDArray[Any], known: Any) -> Symbols:
        """Symbols (n,), the i-th under row `index[i]` of `table`, which is left as it is."""
        ...

    def run(self, table: Counts, count: int, known: Any) -> Symbols:
        """`count` symbols under the first row of `table`, which is left as it is."""
        ...

    def uniform(self, sizes: npt.NDArray[np.int32], known: Any) -> Symbols:
        """Symbols (n,), the i-th one of 0 to `sizes[i]` - 1 (at least 2), all equally likely."""
        ...

    def boundary(self) -> None:
        """A place where a long stream may be closed and the next one begun."""
        ...


class Writer:
    """Collects what is to be coded; `finish` gives the bytes."""

    def __init__(self) -> None:
        self._log: list[tuple[Any, ...]] = []
        self._segments: list[bytes] = []
        self._held = 0

    def symbols(self, table: Counts, index: npt.NDArray[Any], known: Any) -> Symbols:
        """See Coder."""
        held = np.asarray(known, np.int32)
        if held.size:
            self._log.append((held, index, table.frequencies.astype(np.uint16)))
            self._held += held.size
        return held

    def run(self, table: Counts, count: int, known: Any) -> Symbols:
        """See Coder."""
        held = np.asarray(known, np.int32)
        if held.size:
            self._log.append((held, table.frequencies[0].copy()))
            self._held += held.size
        return held

    def uniform(self, sizes: npt.NDArray[np.int32], known: Any) -> Symbols:
        """See Coder."""
        held = np.asarray(known, np.int32)
        if held.size:
            self._log.append((held, sizes))
            self._held += held.size
        return held

    def boundary(self) -> None:
        """See Coder."""
        if self._held >= SEGMENT:
            self._close()

    def finish(self) -> list[bytes]:
        """The streams, at least one."""
        self._close()
        return self._segments

    def _close(self) -> None:
        coder = constriction.stream.stack.AnsCoder()
        for entry in reversed(self._log):  # a stack: what is written last is read first
            if len(entry) == 3:
                coder.encode_reverse(entry[0], _FAMILY, entry[2][entry[1]].astype(np.float64))
            elif entry[1].dtype == np.float64:
                coder.encode_reverse(entry[0], _model(entry[1]))
            else:
                coder.encode_reverse(entry[0], _UNIFORM, entry[1])
        words = coder.get_compressed().astype("<u4")
        self._segments.append(words.tobytes().rstrip(b"\0"))
        self._log, self._held = [], 0


class Reader:
    """Reads `streams` (as `Writer.finish` gave them) from anybody. Raises ArtifactError."""

    def __init__(self, streams: list[bytes]) -> None:
        self._left = streams[::-1]
        self._held = 0
        self._open()

    def symbols(self, table: Counts, index: npt.NDArray[Any], known: Any) -> Symbols:
        """See Coder."""
        if not len(index):
            return np.zeros(0, np.int32)
        self._held += len(index)
        return self._decode(_FAMILY, table.frequencies.take(index, axis=0))

    def run(self, table: Counts, count: int, known: Any) -> Symbols:
        """See Coder."""
        if not count:
            return np.zeros(0, np.int32)
        self._held += count
        return self._decode(_model(table.frequencies[0]), count)

    def uniform(self, sizes: npt.NDArray[np.int32], known: Any) -> Symbols:
        """See Coder."""
        if not len(sizes):
            return np.zeros(0, np.int32)
        self._held += len(sizes)
        return self._decode(_UNIFORM, sizes)

    def boundary(self) -> None:
        """See Coder."""
        if self._held >= SEGMENT:
            self._close()
            self._open()

    def finish(self) -> None:
        """Every stream must have been used up to its last bit: an ANS coder that is back at its
        first state has read exactly what encoding these symbols writes."""
        self._close()
        if self._left:
            raise ArtifactError(f"{len(self._left)} coded streams are not needed")

    def _open(self) -> None:
        if not self._left:
            raise ArtifactError("the coded streams end too early")
        data = self._left.pop()
        if data.endswith(b"\0"):
            raise ArtifactError("a coded stream ends in a zero byte")
        words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)
        self._coder = constriction.stream.stack.AnsCoder(words)
        self._held = 0

    def _close(self) -> None:
        if not self._coder.is_empty():
            raise ArtifactError("a coded stream is too short or too long for its tensor")

    def _decode(self, model: Any, *arguments: Any) -> Symbols:
        try:
            return np.asarray(self._coder.decode(model, *arguments), np.int32)
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            raise ArtifactError(
                f"a coded stream cannot be decoded ({type(error).__name__})"
            ) from None


_FAMILY = constriction.stream.model.Categorical(perfect=False)
_UNIFORM = constriction.stream.model.Uniform()


def _model(frequency: npt.NDArray[np.float64]) -> Any:
    return constriction.stream.model.Categorical(frequency, perfect=False)


class Run:
    """Symbols one after another under one table, in runs that grow by half: each run is coded under
    what was counted before it."""

    def __init__(self, table: Counts) -> None:
        self.table = table
        self._length = self._left = FIRST_RUN

    def code(self, coder: Coder, count: int, known: Any) -> Symbols:
        """The next `count` symbols; a run goes on over the end of a call."""
        found = np.empty(count, np.int32)
        start = 0
        while start < count:
            size = min(self._left, count - start)
            part = slice(start, start + size)
            found[part] = coder.run(self.table, size, None if known is None else known[part])
            self.table.counts[0] += UNIT * np.bincount(
                found[part], minlength=len(self.table.counts[0])
            )
            start += size
            self._left -= size
            if not self._left:
                self.table.refresh()
                self._length = self._left = min(self._length * 3 // 2, LONGEST_RUN)
                coder.boundary()
        return found


def flat_prior(size: int, weight: int = 2) -> Ints:
    """A prior (1, size) under which every symbol was seen `weight` / UNIT times."""
    return np.full((1, size), weight, np.int64)
