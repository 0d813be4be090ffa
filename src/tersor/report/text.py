"""The report as plain text, aligned for a terminal of fixed width."""

from __future__ import annotations

import textwrap
import unicodedata
from typing import Any

from tersor.report.compose import compose
from tersor.report.document import Column, Document, Table
from tersor.report.words import clean

WIDTH = 100
WIDEST_CELL = 56  # longer cells wrap, so that a recipe does not push the rest off the screen


def text_tables(rows: list[dict[str, Any]]) -> str:
    """The tables as plain text without colours. Raises RunError for rows that cannot be read."""
    return document_text(compose(rows))


def document_text(document: Document) -> str:
    """A composed report as plain text."""
    blocks = [_underlined(document.title, "=")]
    blocks += [_wrapped(f"{h.title}: {' '.join(h.sentences)}") for h in document.highlights]
    blocks.append(_wrapped(document.conditions))
    for section in document.sections:
        blocks.append(_underlined(section.title, "-"))
        if section.intro:
            blocks.append(_wrapped(section.intro))
        blocks += [table_text(table) for table in section.tables]
    blocks.append(_wrapped(document.footer))
    return "\n\n".join(blocks) + "\n"


def table_text(table: Table) -> str:
    """One table: caption, headings over a rule, aligned rows, notes."""
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    heads = [[clean(column.head)] for column in table.columns]
    widths = [
        max(_width(line) for row in [heads, *rows] for line in row[i])
        for i in range(len(table.columns))
    ]
    groups = _groups(table.columns, widths)
    lines = [clean(table.caption), *groups]
    lines += _row(heads, widths, table.columns)
    lines.append("  ".join("─" * width for width in widths))
    for row in rows:
        lines += _row(row, widths, table.columns)
    for note in table.notes:
        lines.append(_wrapped(note))
    return "\n".join(lines)


def _groups(columns: tuple[Column, ...], widths: list[int]) -> list[str]:
    """The line of shared headings, where a table has any; widens the last column of a narrow
    group."""
    if not any(column.group for column in columns):
        return []
    pieces, start = [], 0
    while start < len(columns):
        end = start + 1
        while (
            end < len(columns) and columns[end].group and columns[end].group == columns[start].group
        ):
            end += 1
        title = clean(columns[start].group)
        room = sum(widths[start:end]) + 2 * (end - start - 1)
        if _width(title) > room:
            widths[end - 1] += _width(title) - room
            room = _width(title)
        pieces.append(_padded(title, room, False))
        start = end
    return ["  ".join(pieces).rstrip()]


def _row(cells: list[list[str]], widths: list[int], columns: tuple[Column, ...]) -> list[str]:
    height = max(len(cell) for cell in cells)
    lines = []
    for level in range(height):
        parts = [
            _padded(cell[level] if level < len(cell) else "", width, column.right)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


def _cell(text: str) -> list[str]:
    return textwrap.wrap(clean(text), WIDEST_CELL) or [""]


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _underlined(title: str, character: str) -> str:
    return f"{clean(title)}\n{character * _width(clean(title))}"


def _wrapped(text: str) -> str:
    return textwrap.fill(clean(text), WIDTH)
