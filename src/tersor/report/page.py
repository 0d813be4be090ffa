"""The report as one HTML file: no script, no request, light and dark, any width, by keyboard
alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from tersor.report.document import Column, Document, Highlight, Plot, Section, Table
from tersor.report.figures import file_name
from tersor.report.style import STYLE
from tersor.report.svg import inline
from tersor.report.words import MISSING, NONE, clean

# Nothing may be fetched or run, whatever a row says: the page is also safe should escaping ever
# fail.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
UNIT = re.compile(
    r" (?=%)|(?<=\d) (?=(?:MiB|ms|pt|bytes|points|times)\b)|(?<=n) (?==)|(?<==) (?=\d)"
)
SHORT_HEAD = 12
SHORT_CELL = 36  # characters that stay on one line in a column of words
MARKS = {"met": "✓", "missed": "✗", MISSING: "–"}


def page(document: Document, drawn: Mapping[str, str]) -> str:
    """The page of `document`; `drawn` maps a plot's file name to its SVG."""
    sections = "\n".join(_section(section, drawn) for section in document.sections)
    contents = [(section.key, section.title) for section in document.sections]
    body = f"""{_highlights(document)}
<p class="conditions">{text(document.conditions)}</p>
{contents_html(contents)}
{sections}"""
    return shell(document.title, _headline(document), body, document.footer)


def shell(
    title: str, headline: str, body: str, footer: str, *, style: str = "", policy: str = POLICY
) -> str:
    """A whole page around `body` (HTML); `headline` is HTML too, `title` and `footer` are plain text. `style` follows
    the house's own sheet."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(title)}</title>
<style>
{STYLE}{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>
<p class="eyebrow">{text(title)}</p>
<h1>{headline}</h1>
</header>
<main id="main" tabindex="-1">
{body}
</main>
<footer><p>{text(footer)}</p></footer>
</body>
</html>
"""


def _headline(document: Document) -> str:
    """The first network's result in a line: smaller, faster, and what it cost."""
    if not document.highlights:
        return "What was measured"
    return text(document.highlights[0].headline)


def _highlights(document: Document) -> str:
    if not document.highlights:
        return ""
    cards = "\n".join(card(highlight) for highlight in document.highlights)
    return f'<section class="cards" aria-label="Results in short">\n{cards}\n</section>'


def card(highlight: Highlight) -> str:
    """One result: its facts large, its sentences below."""
    facts = "".join(
        f"<div><dt>{text(what)}</dt><dd>{text(figure)}</dd></div>"
        for figure, what in highlight.facts
    )
    sentences = "".join(f"<p>{text(sentence)}</p>" for sentence in highlight.sentences)
    return (
        f'<article class="card"><h2>{text(highlight.title)}</h2>'
        f"<dl>{facts}</dl>{sentences}</article>"
    )


def contents_html(sections: Sequence[tuple[str, str]]) -> str:
    """The page's contents: links to sections by (id, title)."""
    items = "".join(f'<li><a href="#{text(key)}">{text(title)}</a></li>' for key, title in sections)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _section(section: Section, drawn: Mapping[str, str]) -> str:
    key = text(section.key)
    parts = [f'<section aria-labelledby="{key}"><h2 id="{key}">{text(section.title)}</h2>']
    if section.intro:
        parts.append(f'<p class="intro">{text(section.intro)}</p>')
    plots = "\n".join(_figure(plot, drawn[file_name(plot)]) for plot in section.plots)
    if plots:
        kind = "lines" if section.plots[0].lines else "bars"
        parts.append(f'<div class="figures {kind}">\n{plots}\n</div>')
    parts += [table_html(table) for table in section.tables]
    return "\n".join(parts) + "\n</section>"


def _figure(plot: Plot, svg: str) -> str:
    return (
        f"<figure>{inline(svg)}<figcaption><b>{text(plot.title)}</b> "
        f"{text(plot.caption)}</figcaption>"
        "</figure>"
    )


def table_html(table: Table) -> str:
    """A table in a box of its own that scrolls; closed at first where it is folded."""
    key = text(table.key)
    body = "\n".join(_row(table.columns, row) for row in table.rows)
    notes = "".join(f'<p class="note">{text(note)}</p>' for note in table.notes)
    region = (
        f'<div class="scroll" role="region" aria-labelledby="{key}" tabindex="0">\n<table>\n'
        f'<caption id="{key}"><span>{text(table.caption)}</span></caption>\n'
        f"<thead>\n{_head(table.columns)}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
        f"{notes}"
    )
    if not table.folded:
        return region
    lines = f"{len(table.rows):,} line{'' if len(table.rows) == 1 else 's'}"
    return f"<details><summary>{text(table.caption)} ({lines})</summary>\n{region}</details>"


def _head(columns: tuple[Column, ...]) -> str:
    """One line of headings, or two where neighbours share one."""
    if not any(column.group for column in columns):
        return "<tr>" + "".join(_heading(column) for column in columns) + "</tr>"
    upper, lower, start = [], [], 0
    while start < len(columns):
        column = columns[start]
        end = start + 1
        if not column.group:
            upper.append(_heading(column, ' rowspan="2"'))
        else:
            while end < len(columns) and columns[end].group == column.group:
                end += 1
            spread = f'scope="colgroup" colspan="{end - start}" class="group"'
            upper.append(f"<th {spread}>{text(column.group)}</th>")
            lower += [_heading(c, first=place == 0) for place, c in enumerate(columns[start:end])]
        start = end
    return f"<tr>{''.join(upper)}</tr>\n<tr>{''.join(lower)}</tr>"


def _heading(column: Column, attributes: str = "", *, first: bool = False) -> str:
    short = len(column.head) <= SHORT_HEAD
    marks = (("right", column.right), ("first", first), ("short", short))
    names = [name for name, on in marks if on]
    classes = f' class="{" ".join(names)}"' if names else ""
    return f'<th scope="col"{attributes}{classes}>{text(column.head)}</th>'


def _row(columns: tuple[Column, ...], row: tuple[str, ...]) -> str:
    cells = []
    for number, (column, cell) in enumerate(zip(columns, row, strict=True)):
        names = ["right"] if column.right else ["short"] if len(cell) <= SHORT_CELL else []
        if column.group and columns[number - 1].group != column.group:
            names.append("first")
        if cell in (MISSING, NONE):
            names.append("missing")
        mark = ""
        if column.head == "verdict" and cell in MARKS:
            names.append("verdict-" + cell.replace(" ", "-"))
            mark = f'<span aria-hidden="true">{MARKS[cell]}</span> '
        classes = f' class="{" ".join(names)}"' if names else ""
        tag, scope = ("th", ' scope="row"') if number == 0 else ("td", "")
        cells.append(f"<{tag}{scope}{classes}>{mark}{text(cell)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def text(words: str) -> str:
    """Plain `words` as HTML: escaped, in one line, without characters that reverse what follows."""
    # A number and its unit stay on one line.
    return UNIT.sub("\u00a0", escape(clean(words), quote=True))


def breakable(name: str) -> str:
    """A dotted name as HTML that may be broken after its dots."""
    return text(name).replace(".", ".<wbr>")
