"""What a training tells while it runs: to a person, and to what steers it."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, Protocol


@dc.dataclass(frozen=True)
class Progress:
    """Where a training stands; handed to the caller about once a second."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    images_per_s: float
    left_s: float

    def __str__(self) -> str:
        rate = f"{self.images_per_s:.0f} images/s, {self.left_s:.0f} s left"
        return f"epoch {self.epoch:.1f}, loss {self.loss:.3f}, {rate}"


class Control(Protocol):
    """Something that watches a network while it is trained, and whose state belongs to the training's."""

    def begin(self, step: int, num_steps: int) -> None:
        """Be told that `step` (from 0) of `num_steps` begins."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As of a module."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> object:
        """As of a module."""
        ...
