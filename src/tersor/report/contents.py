"""What a file consists of as one figure, one page and one closing sentence: a function of the
command's JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tersor.report.document import Bars, Column, Document, Highlight, Plot, Section, Table
from tersor.report.figures import draw, file_name
from tersor.report.page import page
from tersor.report.words import clean, count, percent, size

Answer = Mapping[str, Any]
MOST_BARS = 32
ENCODINGS = {
    "bitmap": "one bit an element, then those that are not 0",
    "codebook": "a table of the distinct values, and coded places in it",
    "codes": "whole numbers of one byte, entropy-coded",
    "dense": "as it is",
    "derived": "computed from other tensors",
    "integers": "whole numbers of a wide range, entropy-coded",
    "packed": "whole numbers in as few bits as their span needs",
    "planes": "byte by byte, the highest entropy-coded",
    "sparse": "coded places of what is not 0, then that",
}


def conclusion(answer: Answer) -> str:
    """What takes the bytes, in a sentence or two."""
    rows, whole = answer["layers"], answer["size_bytes"]
    elements = sum(_elements(row) for row in rows)
    said = (
        f"{count(whole, 'byte')} for {count(elements, 'element')} in {count(len(rows), 'tensor')}"
    )
    if elements:
        said += f": {8 * whole / elements:.3g} bits each, all included"
    if rows:
        largest = max(rows, key=lambda row: int(row["size_bytes"]))
        said += (
            f". {clean(largest['name'])} takes most, {percent(largest['size_bytes'] / whole, 1)} %; "
            f"the graph {count(answer['skeleton_bytes'], 'byte')}, plan, provenance and index "
            f"{count(answer['header_bytes'], 'byte')}"
        )
    return said + "."


def contents_svg(answer: Answer) -> str:
    """The figure as one SVG document, legible on light and dark grounds. Raises MissingExtraError
    without matplotlib."""
    return draw(_plot(answer))


def contents_page(answer: Answer) -> str:
    """Figure, table and conclusion as one HTML file. Raises MissingExtraError without matplotlib."""
    plot = _plot(answer)
    subject = clean(answer["file"])
    kinds = sorted({str(row["encoding"]) for row in answer["layers"]})
    section = Section(
        "tensors",
        "Tensor by tensor",
        "Bytes are those of the tensor's own section; bits are bytes over elements.",
        (_table(answer), _encodings(answer, kinds)),
        (plot,),
    )
    highlight = Highlight(
        subject,
        f"{size(answer['size_bytes'])} in all",
        (conclusion(answer),),
        tuple((size(row["size_bytes"]), clean(row["name"])) for row in _largest(answer)[:3]),
    )
    conditions = f"Format version {answer['format_version']}; read and checked in full."
    document = Document(
        f"Tersor: contents of {subject}",
        (highlight,),
        conditions,
        (section,),
        "Made by tersor inspect.",
    )
    return page(document, {file_name(plot): draw(plot)})


def _elements(row: Mapping[str, Any]) -> int:
    found = 1
    for length in row["shape"]:
        found *= int(length)
    return found


def _largest(answer: Answer) -> list[Mapping[str, Any]]:
    return sorted(answer["layers"], key=lambda row: (-int(row["size_bytes"]), str(row["name"])))


def _plot(answer: Answer) -> Plot:
    rows = _largest(answer)
    shown, rest = rows[:MOST_BARS], rows[MOST_BARS:]
    bars = [
        (clean(row["name"]), int(row["size_bytes"]), f"{row['bits_per_weight']:.3g} bits")
        for row in shown
    ]
    if rest:
        name = f"{count(len(rest), 'more tensor')}"
        bars.append((name, sum(int(row["size_bytes"]) for row in rest), ""))
    bars.append(("graph", int(answer["skeleton_bytes"]), ""))
    bars.append(("plan, provenance, index", int(answer["header_bytes"]), ""))
    texts = [f"{value:,}" + (f" · {bits}" if bits else "") for _, value, bits in bars]
    return Plot(
        "contents",
        f"Bytes by tensor · {clean(answer['file'])}",
        "The largest tensors, what they take in the file and how many bits an element; below them "
        "what is left.",
        "bytes",
        categories=tuple(name for name, _, _ in bars),
        bars=(Bars("bytes", tuple(float(value) for _, value, _ in bars), tuple(texts)),),
    )


def _table(answer: Answer) -> Table:
    columns = (
        Column("tensor", right=False),
        Column("shape"),
        Column("type", right=False),
        Column("encoding", right=False),
        Column("not 0, %"),
        Column("bits an element"),
        Column("bytes"),
    )
    rows = tuple(
        (
            clean(row["name"]),
            " × ".join(map(str, row["shape"])) or "1",
            str(row["dtype"]),
            str(row["encoding"]),
            percent(row["density"], 1),
            f"{row['bits_per_weight']:.3g}",
            f"{row['size_bytes']:,}",
        )
        for row in answer["layers"]
    )
    return Table("table-tensors", "All tensors", columns, rows)


def _encodings(answer: Answer, kinds: list[str]) -> Table:
    columns = (
        Column("encoding", right=False),
        Column("what it is", right=False),
        Column("tensors"),
        Column("bytes"),
    )
    rows = []
    for kind in kinds:
        own = [row for row in answer["layers"] if row["encoding"] == kind]
        taken = sum(int(row["size_bytes"]) for row in own)
        rows.append((kind, ENCODINGS.get(kind, ""), f"{len(own):,}", f"{taken:,}"))
    return Table("table-encodings", "Encodings", columns, tuple(rows))
