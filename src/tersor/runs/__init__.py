"""Long work that survives: a directory with one owner, its rows and steps, and where the work is done."""

from tersor.runs.directory import Run
from tersor.runs.journal import Journal, Row, Rows, read_rows
from tersor.runs.processes import Processes, processes

__all__ = ["Journal", "Processes", "Row", "Rows", "Run", "processes", "read_rows"]
