"""What a command prints: text and tables for people, or one JSON object; progress goes to stderr."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tersor.methods.finetune import Progress as TrainingProgress

Watch = Callable[[str, float], None]


@dc.dataclass(frozen=True)
class Output:
    """How the answer is printed.

    Attributes:
        json: print one JSON object on stdout; text and progress go to stderr
        debug: show the traceback of an error
    """

    json: bool = False
    debug: bool = False


def console(output: Output) -> Console:
    """The console for people: stdout, or stderr when stdout belongs to JSON."""
    return Console(stderr=output.json, highlight=False, soft_wrap=True)


def say(output: Output, text: str) -> None:
    """Print a line as it is: square brackets are not markup."""
    console(output).print(Text(text))


def show_table(
    output: Output, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Print a table; numbers stand right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        number = bool(rows) and all(isinstance(r[index], int | float | None) for r in rows)
        widest = max((len(_cell(row[index])) for row in rows), default=0)
        # Numbers and short words stay whole; long sentences fold.
        least = widest if number or widest <= 24 else 16
        justify: Literal["right", "left"] = "right" if number else "left"
        table.add_column(column, justify=justify, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    console(output).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def say_interrupted() -> None:
    """What the first Ctrl-C of a run answers, from within its handler."""
    os.write(2, b"\ninterrupted: what runs is finished and kept; Ctrl-C again stops at once\n")


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """A progress line on stderr: a live bar on a terminal, one line a step elsewhere. Of several processes the
    leader alone shows it."""
    from tersor.runs.processes import processes

    if not processes().leads:
        yield lambda text, share: None
        return
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        last = ["", -1]

        def line(text: str, share: float) -> None:
            tenth = int(share * 10)
            if (text.split(":")[0], tenth) != tuple(last):
                last[:] = [text.split(":")[0], tenth]
                screen.print(Text(f"{share:4.0%} {text}"))

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("start", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)


def training_watch(watch: Watch, label: str) -> Callable[[TrainingProgress], None]:
    """Show a training's progress: epoch, loss, images a second and time left."""
    return lambda p: watch(f"{label}: {p}", p.step / p.num_steps)
