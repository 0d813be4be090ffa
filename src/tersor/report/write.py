"""The report as files: every one is made in memory first, written beside its place, and renamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersor.errors import RunError
from tersor.report.compose import compose
from tersor.report.figures import draw, file_name
from tersor.report.markup import document_markdown
from tersor.report.page import page
from tersor.report.text import document_text


def write_report(rows: list[dict[str, Any]], out: Path) -> Path:
    """Write tables.txt, tables.md, figures/*.svg and report.html into `out`; return the path of
    report.html.

    The folder is made where it is missing; files of an earlier report are replaced. Raises
    RunError for rows that cannot be read or a folder that cannot be written, MissingExtraError
    without matplotlib; either way no file is left half-written.
    """
    document = compose(rows)
    drawn = {file_name(plot): draw(plot) for section in document.sections for plot in section.plots}
    files = {f"figures/{name}": svg for name, svg in drawn.items()}
    files["tables.txt"] = document_text(document)
    files["tables.md"] = document_markdown(document, "figures")
    files["report.html"] = page(document, drawn)
    for name, content in files.items():
        _replace(Path(out) / name, content)
    return Path(out) / "report.html"


def _replace(path: Path, content: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(content, encoding="utf-8", newline="\n")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"the report cannot be written to {path}: {error.strerror or error}; "
            "choose another folder with --out"
        ) from None
