"""Histograms of weights and of what layers read, before and after, drawn as small SVGs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tersor.report.page import breakable, text
from tersor.report.told import Json, Told, digits
from tersor.report.words import count

OPEN = 6  # layers that are shown at once; the others are folded
HEIGHT = 100.0
SIDES = {"weights": "weights", "inputs": "what it reads"}


def spread_html(told: Told) -> str:
    """Two histograms a layer: the most telling layers first, all others folded."""
    rows: Sequence[Json] = told.details["histograms"]
    chosen = _chosen(told, rows)
    first = "\n".join(_figure(row, number) for number, row in enumerate(rows) if number in chosen)
    rest = [_figure(row, number) for number, row in enumerate(rows) if number not in chosen]
    legend = (
        '<ul class="legend"><li><i class="before" aria-hidden="true"></i>before</li>'
        '<li><i class="after" aria-hidden="true"></i>after</li></ul>'
    )
    folded = ""
    if rest:
        joined = "\n".join(rest)
        folded = (
            f"<details><summary>{count(len(rest), 'other layer')}</summary>\n"
            f'<div class="spreads">{joined}</div></details>'
        )
    return f'{legend}\n<div class="spreads">{first}</div>\n{folded}'


def _chosen(told: Told, rows: Sequence[Json]) -> set[int]:
    """The layers of the fewest bits, then of the largest harm, at most OPEN."""
    facts = {row["layer"]: row for row in told.details.get("layers", [])}

    def rank(number: int) -> tuple[float, float, int]:
        held = facts.get(rows[number]["layer"], {})
        return held.get("bits") or 32, -(held.get("harm_tried_kl") or 0.0), number

    return set(sorted(range(len(rows)), key=rank)[:OPEN])


def _figure(row: Json, number: int) -> str:
    key = f"spread-{number}"
    parts = [_chart(row[side], words, row["layer"]) for side, words in SIDES.items() if side in row]
    return (
        f'<figure class="spread" tabindex="0" aria-labelledby="{key}"><figcaption id="{key}">{breakable(row["layer"])}'
        f"</figcaption>{''.join(parts)}</figure>"
    )


def _chart(held: Json, words: str, layer: str) -> str:
    before, after = held["before"], held["after"]
    bins = len(before)
    label = (
        f"{words} of {layer}, from {digits(held['low'])} to {digits(held['high'])}: "
        f"{_filled(before)} of {bins} bins hold values before, {_filled(after)} after"
    )
    high = (
        max(
            (math.sqrt(n / max(sum(side), 1)) for side in (before, after) for n in side),
            default=0.0,
        )
        or 1.0
    )
    return (
        f'<div class="chart"><span class="what">{text(words)}</span>'
        f'<svg role="img" aria-label="{text(label)}" viewBox="0 0 {bins} {HEIGHT:g}" preserveAspectRatio="none">'
        f'<path class="before" d="{_steps(before, high)}Z"/><path class="after" d="{_steps(after, high)}"/></svg>'
        f'<span class="ends" aria-hidden="true"><span>{text(digits(held["low"]))}</span>'
        f"<span>{text(digits(held['high']))}</span></span></div>"
    )


def _filled(counts: Sequence[int]) -> int:
    return sum(n > 0 for n in counts)


def _steps(counts: Sequence[int], high: float) -> str:
    """A path of steps: heights are square roots of shares, so that what is rare is seen."""
    total = max(sum(counts), 1)
    parts = [f"M0 {HEIGHT:g}"]
    for n in counts:
        level = HEIGHT - HEIGHT * math.sqrt(n / total) / high
        parts.append(f"V{level:.1f}h1")
    return "".join(parts) + f"V{HEIGHT:g}"
