"""A network run eagerly or compiled, whichever is faster here."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from tersor.errors import ModelError

COMPILE_PAYS_AFTER_S = (
    900.0  # a compiled step is at most a seventh faster; compiling takes about a minute
)
TRIED = 3  # steps timed of each form, of which the first warms up
LARGE_LINEAR = 4_000_000


class Forward:
    """Calls `module`, compiled where `mode` is "on", or where it is "auto" and the steps left would repay it.

    "auto" compiles after three eager steps and goes back where the compiled step is slower, or cannot be
    made; `notes` says so, and calls the network `name`.
    """

    def __init__(self, module: nn.Module, mode: str, name: str) -> None:
        self.module, self.mode, self.name = module, mode, name
        self.compiled = mode == "on"
        self.notes: list[str] = []
        self._call: Any = torch.compile(module) if self.compiled else module
        self._called = False  # in its present form
        self._decided = mode != "auto"
        self._seconds: dict[bool, list[float]] = {False: [], True: []}

    def __call__(self, inputs: torch.Tensor) -> Any:
        """What the module gives for `inputs`. Raises ModelError where mode "on" cannot be compiled."""
        if not self.compiled or self._called:
            return self._call(inputs)
        self._called = True
        try:
            return self._call(inputs)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            said = f"{self.name} cannot be compiled: {reason}"
            if self.mode == "on":
                raise ModelError(f"{said}; use compile=off") from error
            self._go_back(f"{said}; it ran eagerly")
            return self._call(inputs)

    def took(self, seconds: float, steps_left: int) -> None:
        """Be told how long a whole step took, and decide."""
        if self._decided:
            return
        times = self._seconds[self.compiled]
        times.append(seconds)
        if self.compiled and len(times) == TRIED + 1:  # the first of them compiled
            self._decided = True
            eager, fast = (statistics.median(self._seconds[form][1:]) for form in (False, True))
            if fast > eager:
                self._go_back(
                    f"a compiled step took {fast:.3g} s, an eager one {eager:.3g} s; it ran eagerly"
                )
        elif not self.compiled and len(times) == TRIED:
            if self._pays(statistics.median(times[1:]) * steps_left):
                self.compiled, self._call = True, torch.compile(self.module)
            else:
                self._decided = True

    def _pays(self, seconds_left: float) -> bool:
        # Compiled linear layers as large as VGG-16's were slower than eager ones on CPUs (measured).
        heavy = any(p.numel() > LARGE_LINEAR for p in self.module.parameters() if p.ndim == 2)
        return not heavy and seconds_left > COMPILE_PAYS_AFTER_S

    def _go_back(self, note: str) -> None:
        self.compiled, self._call, self._decided = False, self.module, True
        self.notes.append(note)
