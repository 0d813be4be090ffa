"""What a search measured and made, piece by piece: nothing is done twice, whatever ended the process."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tersor.artifact.storage import write_whole
from tersor.errors import RunError
from tersor.ondemand.effort import Clock
from tersor.runs import Run
from tersor.runs.directory import RESULT

Make = Callable[[pathlib.Path], Any]


class Kept:
    """The pieces of one search, in `run`, where they outlive the process; without one in `directory`.

    What a piece took when it was made counts on `clock`, also where it was there already.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        clock: Clock,
        run: Run | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.clock, self.run = directory, clock, run
        self.about = dict(about or {})

    def of(self, **about: Any) -> Kept:
        """The pieces that belong to what is told `about` them: others than those of the same name and request here."""
        return Kept(self.directory, self.clock, self.run, {**self.about, **about})

    def piece(self, name: str, request: Mapping[str, Any], make: Make) -> tuple[Any, pathlib.Path]:
        """What `make` gives (anything JSON holds), made once for `name` and `request`, and the directory of its files,
        which `make` is given."""
        made, request = False, {**self.about, **request}

        def timed(place: pathlib.Path) -> dict[str, Any]:
            nonlocal made
            made, started = True, self.clock.passed
            value = make(place)
            return {"value": value, "seconds": self.clock.passed - started}

        if self.run is None:
            place = self.directory / name
            place.mkdir(exist_ok=True)
            found = timed(place)
        else:
            found = self.run.step(name, request, timed)
            place = self.run.place(name, request)
        if not made:
            self.clock.spend(found["seconds"])
        return found["value"], place

    def held(self, name: str, request: Mapping[str, Any]) -> bool:
        """Whether the piece is there."""
        asked = {**self.about, **request}
        return self.run is not None and (self.run.place(name, asked) / RESULT).exists()

    def check(self) -> None:
        """Raise KeyboardInterrupt where Ctrl-C came: what is done is kept."""
        if self.run is not None:
            self.run.check()


def write_array(path: pathlib.Path, array: npt.NDArray[Any]) -> None:
    """Write `array` to a file (.npy). Raises RunError."""
    held = io.BytesIO()
    np.save(held, array, allow_pickle=False)
    write_whole(path, [held.getbuffer()], held.getbuffer().nbytes)


def read_array(path: pathlib.Path) -> npt.NDArray[Any]:
    """The array of such a file. Raises RunError."""
    try:
        found: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove it to measure again") from None
    return found
