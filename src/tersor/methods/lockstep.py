"""Forward passes that stop at every weight layer, so that a layer can be changed before what follows runs.

A network is walked once for each batch, every walk in a thread of its own and only one of them running at
a time: what lies between two layers is computed once, whatever the network's structure, and each walk
holds the values that are still needed, no more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

_current = threading.local()


class Walk:
    """One forward pass of `module` on `inputs`, without gradients; stops are made by `stopping`."""

    def __init__(self, module: nn.Module, inputs: torch.Tensor, *, bf16: bool = False) -> None:
        self.module, self.inputs, self.bf16 = module, inputs, bf16
        self.name = ""
        self.value: torch.Tensor | None = None
        self.ended = False
        self._error: BaseException | None = None
        self._closing = False
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Run to the next stop or the end; then `name` and `value` tell the stop, or `ended` is true.

        An exception of the module is raised here.
        """
        self.name, self.value = "", None
        self._resume.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread wherever it is."""
        if not self.ended:
            self._closing = True
            self._resume.release()
        self._thread.join()

    def _run(self) -> None:
        _current.walk = self
        try:
            self._wait()
            with (
                torch.no_grad(),
                torch.autocast(self.inputs.device.type, torch.bfloat16, enabled=self.bf16),
            ):
                self.module(self.inputs)
        except _Closed:
            pass
        except BaseException as error:  # handed to the thread that waits
            self._error = error
        finally:
            self.ended = True
            self._paused.release()

    def stop(self, name: str, value: torch.Tensor) -> None:
        """Called from within the pass: hand `value` over and wait."""
        self.name, self.value = name, value
        self._paused.release()
        self._wait()

    def _wait(self) -> None:
        self._resume.acquire()
        if self._closing:
            raise _Closed


class _Closed(BaseException):
    """Ends a walk that nobody needs any more."""


@contextmanager
def stopping(
    layers: Mapping[str, nn.Module], *, after: bool, done: Callable[[str], bool]
) -> Iterator[None]:
    """Let walks stop at `layers` with the layer's input or, with `after`, its output, unless done(name)."""

    def stop(name: str, value: torch.Tensor) -> None:
        walk = getattr(_current, "walk", None)
        if isinstance(walk, Walk) and not done(name):
            walk.stop(name, value)

    handles = []
    for name, layer in layers.items():
        if after:

            def see_output(
                _: nn.Module,
                inputs: tuple[torch.Tensor, ...],
                output: torch.Tensor,
                name: str = name,
            ) -> None:
                stop(name, output)

            handles.append(layer.register_forward_hook(see_output))
        else:

            def see_input(_: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                stop(name, inputs[0])

            handles.append(layer.register_forward_pre_hook(see_input))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
