"""The page of an answer to a budget: one file, a function of the run's JSON objects."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tersor.report.changed import changed_html, pictures_in
from tersor.report.costs import budget_table, costs_table, energy_html, headline, highlight
from tersor.report.document import Column, Table
from tersor.report.front import front_html
from tersor.report.layers import coverage_table, layers_html, request_table
from tersor.report.ondemand_style import ONDEMAND_STYLE
from tersor.report.page import POLICY, card, contents_html, shell, table_html, text
from tersor.report.spread import spread_html
from tersor.report.told import Told, ms
from tersor.report.words import NONE, clean, count, engine_title

__all__ = ["Told", "ondemand_page", "pictures_in"]

# Pictures lie in the page itself.
WITH_PICTURES = f"{POLICY}; img-src data:"
AGAIN = "A run of this version keeps that in details.json; this directory has none."


@dc.dataclass(frozen=True)
class Part:
    """A section: its id, its title, a line on what it shows, and how it is made."""

    key: str
    title: str
    intro: str
    made: Callable[[Told], str]
    needs: str = ""  # a key of details.json without which it cannot be shown


PARTS = (
    Part(
        "front",
        "What could be had instead",
        "Every model that was built and measured, and what the search predicts beyond: of those none is worse than "
        "another in size, time and points at once.",
        front_html,
    ),
    Part(
        "layers",
        "Layer by layer",
        "What is left of each layer, what it takes, and how much it matters.",
        layers_html,
        "layers",
    ),
    Part(
        "spread",
        "Weights and activations",
        "How the values of a layer are spread before and after: its weights, and what it reads. Heights are square "
        "roots of shares, so that what is rare can be seen; fewer bits leave fewer different values. Shown are the "
        "layers of the fewest bits that matter most.",
        spread_html,
        "histograms",
    ),
    Part("changed", "Answers that changed", "", changed_html, "changed"),
    Part("energy", "Energy", "", energy_html, "energy"),
    Part(
        "coverage",
        "Coverage",
        "Every layer: what was done to it, or why not.",
        lambda told: table_html(coverage_table(told)) + table_html(request_table(told)),
    ),
    Part("measured", "How it was measured", "", lambda told: _measured(told)),
)


def ondemand_page(told: Told) -> str:
    """The page as one HTML document: no script, no request, light and dark, any width, by keyboard alone.

    Raises KeyError, TypeError or ValueError for objects that are not those of an answer.
    """
    sections = "\n".join(_section(part, told) for part in PARTS)
    verdict = "" if told.result["met"] else " missed"
    body = f"""<section class="cards{verdict}" aria-label="The result in short">
{card(highlight(told))}
</section>
{contents_html([("result", "The budget"), *((part.key, part.title) for part in PARTS)])}
<section aria-labelledby="result"><h2 id="result">The budget, and what was reached</h2>
{_notes(told)}<div class="pair"><div>{table_html(budget_table(told))}</div>
<div>{table_html(costs_table(told))}</div></div>
</section>
{sections}"""
    return shell(
        f"Tersor: {told.model} on demand",
        text(headline(told)),
        body,
        "Made by tersor compress; tersor report DIR makes it again from the files beside it.",
        style=ONDEMAND_STYLE,
        policy=WITH_PICTURES,
    )


def _section(part: Part, told: Told) -> str:
    intro = f'<p class="intro">{text(part.intro)}</p>\n' if part.intro else ""
    if part.needs and not told.details.get(part.needs):
        made = f'<p class="missing">Not measured: {text(_why_not(told))}</p>'
    else:
        made = part.made(told)
    return (
        f'<section aria-labelledby="{part.key}"><h2 id="{part.key}">{text(part.title)}</h2>\n'
        f"{intro}{made}\n</section>"
    )


def _why_not(told: Told) -> str:
    problem = told.details.get("problem")
    return f"{clean(problem)}." if problem else AGAIN


def _notes(told: Told) -> str:
    """What a reader must know."""
    notes = told.result["notes"]
    if not notes:
        return ""
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return f'<ul class="notes" aria-label="What must be known">{items}</ul>\n'


def _measured(told: Told) -> str:
    columns = (Column("condition", right=False), Column("value", right=False))
    table = Table("table-conditions", "Conditions", columns, tuple(_conditions(told)))
    exact = Table(
        "table-exact",
        "Every value of result.json, exactly",
        columns,
        tuple((key, clean(value)) for key, value in _flat(told.result)),
        folded=True,
    )
    return table_html(table) + table_html(_candidates(told)) + table_html(exact)


def _conditions(told: Told) -> Iterator[tuple[str, str]]:
    """How it was measured, line by line."""
    result, held = told.result, told.conditions
    around = told.first.get(
        "environment", result["environment"]
    )  # engines may bind the process to cores
    asked = told.first.get("budget", {})
    effort = held.get("effort") or told.first.get("effort") or {}
    shape = " × ".join(str(side) for side in result["input_shape"])
    yield "network", told.model
    yield "inputs", f"{clean(result['data'])}; each {shape}"
    if held:
        synthetic = ", made from batch-norm statistics" if held["synthetic"] else ""
        yield (
            "made from",
            f"{count(held['num_calibration'], 'other input')}{synthetic}, without labels",
        )
    yield "n", f"{result['drop']['num_samples']:,}"
    yield "seed", str(told.first.get("seed", held.get("seed", NONE)))
    yield "batch", str(told.batch)
    yield "threads", str(held.get("threads") or asked.get("threads") or "all")
    yield "engine", told.engine
    if effort:
        used = f"{result['seconds']:,.0f} s were used"
        yield (
            "effort",
            f"{clean(effort['name'])}, {effort['minutes']:g} minutes; {used}",
        )
    if told.float_engine_ms is not None:
        yield "float32 on ONNX Runtime", ms(told.float_engine_ms)
    if held:
        yield (
            "timing",
            f"medians; original and model in turns, {held['timing_seconds']:g} s together, after a warm-up",
        )
        if held["folded"]:
            yield "folded exactly", ", ".join(map(clean, held["folded"]))
    yield "processor", f"{clean(around['cpu'])}, {count(around['cores'], 'core')} usable"
    yield "instructions", ", ".join(map(clean, around["flags"])) or "none of those looked for"
    yield "system", clean(around["platform"])
    yield "versions", ", ".join(f"{clean(k)} {clean(v)}" for k, v in around["versions"].items())


def _candidates(told: Told) -> Table:
    """The models that were built, in their order."""
    columns = (
        Column("model", right=False),
        Column("what it is", right=False),
        Column("bytes"),
        Column("points lost"),
        Column("same answers, %"),
        Column("times of the engines", right=False),
        Column("seconds"),
    )
    from tersor.report.front import choice_words

    rows = tuple(
        (
            clean(row["file"]).removesuffix(".tersor"),
            choice_words(row["choice"]),
            f"{row['size_bytes']:,.0f}",
            f"{row['drop']['estimate_pt']:.2f}",
            f"{100 * row['drop']['agreement']:.1f}",
            ", ".join(
                f"{engine_title(name)} {ms(value)}" for name, value in row["engines_ms"].items()
            ),
            f"{row['seconds']:,.1f}",
        )
        for row in told.candidates
    )
    return Table("table-candidates", "All models that were built", columns, rows, folded=True)


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Every value by its path, but the front, which has its own table."""
    for key, held in value.items():
        path = f"{before}{key}"
        if path == "front":
            continue
        if isinstance(held, Mapping):
            yield from _flat(held, f"{path}.")
        elif isinstance(held, list):
            yield clean(path), ", ".join(map(str, held)) or NONE
        else:
            yield clean(path), str(held)
