"""The report as GitHub Markdown: docs/results.md is this text."""

from __future__ import annotations

import html
import re
from typing import Any

from tersor.report.compose import compose
from tersor.report.document import Document, Section, Table
from tersor.report.figures import file_name
from tersor.report.words import clean

SPECIAL = re.compile(r"([\\`*\[\]|#~]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z]))")


def markdown(rows: list[dict[str, Any]], *, figures: str = "figures") -> str:
    """The report of `rows` as Markdown; `figures` is the folder its pictures are linked from ("":
    none).

    Raises RunError for rows that cannot be read.
    """
    return document_markdown(compose(rows), figures)


def document_markdown(document: Document, figures: str) -> str:
    """A composed report as Markdown."""
    blocks = [f"# {escaped(document.title)}", escaped(document.conditions)]
    blocks += [
        f"**{escaped(h.title)}.** {escaped(' '.join(h.sentences))}" for h in document.highlights
    ]
    for section in document.sections:
        blocks += _section(section, figures)
    blocks.append(f"*{escaped(document.footer)}*")
    return "\n\n".join(blocks) + "\n"


def escaped(text: str) -> str:
    """`text` so that Markdown shows it as it is: no tag, no emphasis, no new table cell."""
    return SPECIAL.sub(r"\\\1", html.escape(clean(text), quote=False))


def _section(section: Section, figures: str) -> list[str]:
    blocks = [f"## {escaped(section.title)}"]
    if section.intro:
        blocks.append(escaped(section.intro))
    for table in section.tables:
        if table.folded:
            blocks.append(
                f"<details><summary>{html.escape(clean(table.caption))}</summary>\n\n"
                f"{_table(table)}\n\n</details>"
            )
        else:
            blocks.append(f"**{escaped(table.caption)}**\n\n{_table(table)}")
        blocks += [f"<sub>{escaped(note)}</sub>" for note in table.notes]
    if figures:
        blocks += [
            f"![{escaped(f'{plot.title}. {plot.caption}')}]({figures}/{file_name(plot)})"
            for plot in section.plots
        ]
    return blocks


def _table(table: Table) -> str:
    heads = [f"{c.group}: {c.head}" if c.group else c.head for c in table.columns]
    lines = [_line(heads), "|" + "|".join("--:" if c.right else ":--" for c in table.columns) + "|"]
    lines += [_line(row) for row in table.rows]
    return "\n".join(lines)


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"
