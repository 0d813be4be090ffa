"""Rows to text, Markdown, SVG and one HTML page: a pure function of the rows; no model is ever
run."""

from tersor.report.figures import require_matplotlib
from tersor.report.markup import markdown
from tersor.report.summary import summary
from tersor.report.text import text_tables
from tersor.report.write import write_report

__all__ = ["markdown", "require_matplotlib", "summary", "text_tables", "write_report"]
