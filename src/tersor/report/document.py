"""What a report says, before it is text, Markdown or HTML. Every string is plain and not yet
escaped."""

from __future__ import annotations

import dataclasses as dc


@dc.dataclass(frozen=True)
class Column:
    """A column: its heading, the heading it shares with its neighbours, and where its cells
    stand."""

    head: str
    group: str = ""
    right: bool = True


@dc.dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names the row. `folded` tables are details, closed at
    first."""

    key: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    folded: bool = False

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.key


@dc.dataclass(frozen=True)
class Line:
    """One line of a plot: points (x, y) and, where known, the ends of each point's interval.

    A y that is not a number is a point not measured: the line is broken there.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    spans: tuple[tuple[float, float] | None, ...] = ()
    reference: bool = False


@dc.dataclass(frozen=True)
class Bars:
    """One series of bars: a value for each category (None: not measured), and its printed form."""

    label: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]
    references: tuple[float | None, ...] = ()


@dc.dataclass(frozen=True)
class Plot:
    """A figure: lines over x, or horizontal bars by category. `key` is its file name and id."""

    key: str
    title: str
    caption: str
    x_label: str
    y_label: str = ""
    lines: tuple[Line, ...] = ()
    categories: tuple[str, ...] = ()
    bars: tuple[Bars, ...] = ()
    limits: tuple[float, float] = (0.0, 0.0)  # of the values; equal: as the values are


@dc.dataclass(frozen=True)
class Section:
    """A part of the report. Sections without a table or a plot are never made."""

    key: str
    title: str
    intro: str = ""
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()


@dc.dataclass(frozen=True)
class Highlight:
    """The result of one network: a headline, sentences, and its facts as (figure, what it is)."""

    title: str
    headline: str
    sentences: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


@dc.dataclass(frozen=True)
class Document:
    """The report in its order: result first, then conditions, then the tables."""

    title: str
    highlights: tuple[Highlight, ...]
    conditions: str
    sections: tuple[Section, ...]
    footer: str
