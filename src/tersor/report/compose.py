"""Rows to a document: which sections there are, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tersor.report.bars import bar_sections
from tersor.report.details import coverage_sections, measurement_sections, training_sections
from tersor.report.document import Document
from tersor.report.forms import form_sections
from tersor.report.headline import conditions, highlights
from tersor.report.measurements import read
from tersor.report.pruning import pruning_sections
from tersor.report.words import clean

TITLE = "Tersor: measured results"


def compose(rows: Sequence[Mapping[str, Any]]) -> Document:
    """The report of `rows`, which stay as they are. Raises RunError for rows that cannot be read."""
    found = read(rows)
    footer = "Made by tersor report from rows.jsonl; change the rows, not this page."
    if any(network.family for network in found.networks):
        footer += (
            " The study's columns are its own published figures, on the original CIFAR-10 with "
            "other "
            "weights: a reference, not a comparison."
        )
    if found.unknown_kinds:
        kinds = ", ".join(clean(kind) for kind in found.unknown_kinds)
        footer += f" Rows of a kind this version does not know are not shown: {kinds}."
    sections = (
        *bar_sections(found),
        *pruning_sections(found),
        *form_sections(found),
        *coverage_sections(found),
        *training_sections(found),
        *measurement_sections(found),
    )
    return Document(TITLE, highlights(found), conditions(found), sections, footer)
