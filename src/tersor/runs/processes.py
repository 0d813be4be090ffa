"""One run on several processes, as torchrun and accelerate launch start them: who leads, and what all agree on.

Each process runs the same program. The leader, rank 0, alone owns directories, writes and prints; what it read
or measured reaches the others here. torch is imported where there is more than one process, and nowhere else.
"""

from __future__ import annotations

import atexit
import dataclasses as dc
import datetime
import functools
import os
import pathlib
import re
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from tersor.errors import LostProcessError, RunError

if TYPE_CHECKING:
    import torch

# What torchrun sets, and mpirun, with which accelerate launch starts processes without a GPU.
RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# A step of a training takes seconds; while the leader measures alone the others wait as long as it takes.
STEP_LIMIT = datetime.timedelta(minutes=10)
PATIENCE = datetime.timedelta(days=30)


@dc.dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `count`, from 0. One process alone exchanges nothing."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    def agreed(self, value: Any) -> Any:
        """The leader's `value`, in every process. Raises LostProcessError where one is lost."""
        if self.alone:
            return value
        held = [value if self.leads else None]
        _exchange("broadcast_object_list", held, src=0, group=_group(PATIENCE))
        return held[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. Raises LostProcessError where one is lost."""
        if self.alone:
            return [value]
        held = [None] * self.count
        _exchange("all_gather_object", held, value, group=_group(PATIENCE))
        return held

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all processes, in place: the same bits in each. Raises LostProcessError
        where one is lost."""
        if not self.alone:
            _exchange("all_reduce", tensor, group=_group(STEP_LIMIT))
        return tensor


def processes() -> Processes:
    """Which of how many processes this is."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return Processes(distributed.get_rank(), distributed.get_world_size())
    if not all(name in os.environ for name in MEETING):
        return Processes()
    for names in RANKS:
        if not all(name in os.environ for name in names):
            continue
        told = [os.environ[name] for name in names]
        try:
            rank, count = (int(value) for value in told)
        except ValueError:
            raise RunError(
                f"{names[0]}={told[0]!r} and {names[1]}={told[1]!r} are not numbers; torchrun sets them, or "
                "unset them to run as one process"
            ) from None
        return Processes(rank, count) if count > 1 else Processes()
    return Processes()


@functools.cache
def scratch() -> pathlib.Path:
    """Where a process that does not lead writes what it must: a directory that ends with the process."""
    held = tempfile.TemporaryDirectory(prefix="tersor-")
    _KEPT.append(held)
    return pathlib.Path(held.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _group(limit: datetime.timedelta) -> Any:
    """A group of all processes on gloo, which works on every machine. All make their groups in one order."""
    import torch.distributed as distributed

    if not distributed.is_initialized():
        here = processes()
        distributed.init_process_group(
            "gloo", timeout=PATIENCE, rank=here.rank, world_size=here.count
        )
        # Else gloo's threads may outlive the interpreter and abort the process, whose exit code is then lost.
        atexit.register(_leave)
    return distributed.new_group(backend="gloo", timeout=limit)


def _leave() -> None:
    import torch.distributed as distributed

    _group.cache_clear()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _exchange(name: str, *values: Any, **options: Any) -> None:
    """One collective call. torch has no one exception for a peer that is gone: gloo raises RuntimeError."""
    import torch.distributed as distributed

    try:
        getattr(distributed, name)(*values, **options)
    except RuntimeError as error:
        raise LostProcessError(
            f"another process of this run was lost ({_reason(str(error))}); start all again to go on"
        ) from None


def _reason(told: str) -> str:
    """What gloo says, without the place in its source and its advice."""
    known = re.search(r"connection (?:closed|reset) by peer|timed out", told, re.IGNORECASE)
    if known is not None:
        return known[0].lower()
    return (told.strip().splitlines() or ["no reason given"])[0].rpartition("] ")[2][:200]
