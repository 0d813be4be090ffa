"""The executor `ray`: pieces of work spread over a Ray cluster that runs already (extra `ray`)."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tersor.errors import RunError, missing_extra
from tersor.runs.executors import Outcome, Watch, Work, attempt

RETRIES = 3  # of a piece whose worker was lost
WAIT_S, KNOCK_S = 1.0, 10.0


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()


class RayCluster:
    """Pieces of work as Ray tasks of `threads` CPUs each; one that loses its worker starts again, elsewhere.

    Connects to the cluster that this program is part of already, to RAY_ADDRESS, or to the one on this machine.
    """

    here = False

    def __init__(self, threads: int) -> None:
        try:
            ray: Any = importlib.import_module("ray")  # typed or not, installed or not
        except ImportError:
            raise missing_extra("ray", "ray", "the executor 'ray'") from None
        self.ray = ray
        self.threads = threads
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS", "auto")
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise RunError(
                    f"no Ray cluster answers at {address!r} ({reason}); start one with: ray start --head, or "
                    "give its address in RAY_ADDRESS"
                ) from None
        most = max(
            (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0
        )
        if most < threads:
            raise RunError(
                f"a piece of work takes {threads} CPUs, and no machine of the Ray cluster has more than "
                f"{most:g}; lower threads"
            )

    def run(
        self,
        work: Work,
        shared: Any,
        items: Mapping[str, Any],
        *,
        watch: Watch,
        check: Callable[[], None],
    ) -> Iterator[Outcome]:
        """See Executor. `watch` is told when a piece ends; pieces that have not ended at an error are given up."""
        ray = self.ray
        for name, module in list(sys.modules.items()):
            if name.startswith("tersor_user_"):  # the other machines do not have the user's file
                ray.cloudpickle.register_pickle_by_value(module)
        task = ray.remote(num_cpus=self.threads, max_retries=RETRIES)(_serve)
        version = importlib.metadata.version("tersor")
        held = ray.put(shared)
        running = {
            task.remote(version, work, held, name, item): name for name, item in items.items()
        }
        try:
            while running:
                check()
                ended, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_S)
                for reference in ended:
                    name = running.pop(reference)
                    outcome = self._outcome(name, reference)
                    watch(name, 1 - len(running) / len(items))
                    yield outcome
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _outcome(self, name: str, reference: Any) -> Outcome:
        errors = self.ray.exceptions
        try:
            found: Outcome = self.ray.get(reference)
        except errors.RayTaskError:
            raise  # a fault of ours, with the traceback of the worker
        except errors.OutOfMemoryError:
            return Outcome(name, error=RunError(f"{name} needs more memory than its machine has"))
        except errors.RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            told = f"{name}: its worker was lost {RETRIES + 1} times ({reason}); run again to go on"
            return Outcome(name, error=RunError(told))
        return found


def _serve(version: str, work: Work, shared: Any, name: str, item: Any) -> Outcome:
    """The worker's part: one piece of work, in the version of the package that asked for it."""
    return attempt(name, lambda: _checked(version, work, shared, item))


def _checked(version: str, work: Work, shared: Any, item: Any) -> Any:
    own = importlib.metadata.version("tersor")
    if own != version:
        raise RunError(
            f"{platform.node()} has tersor {own}, the run is of tersor {version}; install the same version on "
            "all machines"
        )
    return work(shared, item, _unwatched)


def _unwatched(text: str, share: float) -> None:
    """Nobody looks at a worker's progress."""
