"""Where independent pieces of work are done: in this process, or spread over a cluster."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from tersor.errors import RunError, TersorError
from tersor.registry import Registry

Watch = Callable[[str, float], None]  # what is done, and the share of it that is finished (0 to 1)
Work = Callable[[Any, Any, Watch], Any]  # what all pieces share, the piece, and who is told


@dc.dataclass(frozen=True)
class Outcome:
    """What came of the piece `name`: its value, or the error it ended with."""

    name: str
    value: Any = None
    error: TersorError | None = None

    def get(self) -> Any:
        """The value. Raises the error instead, where there is one."""
        if self.error is not None:
            raise self.error
        return self.value


class Executor(Protocol):
    """Does work piece by piece; `here` tells whether in this process, one after the other."""

    here: bool

    def run(
        self,
        work: Work,
        shared: Any,
        items: Mapping[str, Any],
        *,
        watch: Watch,
        check: Callable[[], None],
    ) -> Iterator[Outcome]:
        """work(shared, item, watch) for each of `items`, in the order in which they end, each once.

        `work` is a function of a module; `shared` and the items can be sent to another machine. A piece that
        raises an error of ours or runs out of memory is an outcome with that error, and the others go on.
        `check` is called about every second, or between pieces where they run here: what it raises ends all.
        """
        ...


EXECUTORS: Registry[Callable[[int], Executor]] = Registry("executor")


def open_executor(name: str, *, threads: int = 1) -> Executor:
    """The executor `name` for pieces of work that take `threads` CPU threads each.

    Raises UnknownNameError, MissingExtraError for a library that is not installed, RunError where no cluster
    answers.
    """
    return EXECUTORS[name](threads)


def attempt(name: str, call: Callable[[], Any]) -> Outcome:
    """The outcome of one piece of work."""
    try:
        return Outcome(name, call())
    except MemoryError:
        return Outcome(name, error=RunError(f"{name} needs more memory than there is"))
    except TersorError as error:
        return Outcome(name, error=error)


@EXECUTORS.register("local")
class Local:
    """One piece after the other, in this process."""

    here = True

    def __init__(self, threads: int) -> None:
        """Work takes its own `threads`."""

    def run(
        self,
        work: Work,
        shared: Any,
        items: Mapping[str, Any],
        *,
        watch: Watch,
        check: Callable[[], None],
    ) -> Iterator[Outcome]:
        """See Executor."""
        for name, item in items.items():
            check()
            yield attempt(name, lambda item=item: work(shared, item, watch))  # type: ignore[misc]


@EXECUTORS.register("ray")
def _ray(threads: int) -> Executor:
    from tersor.runs.cluster import RayCluster

    return RayCluster(threads)
