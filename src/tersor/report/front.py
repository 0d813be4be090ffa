"""What could be had instead: every model that was measured or predicted, by size, time and points lost."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence

from tersor.report.document import Column, Table
from tersor.report.page import table_html, text
from tersor.report.scales import Scale, bent, logarithmic
from tersor.report.told import Json, Told, decimal, most_points, ms, points
from tersor.report.words import NONE, percent

ANSWER, MEASURED, PREDICTED, ORIGINAL = "answer", "measured", "predicted", "original"
WORDS = {
    ANSWER: "the answer, measured",
    MEASURED: "built and measured",
    PREDICTED: "predicted, not built",
    ORIGINAL: "the original",
}
# One shape a kind: told apart without colour. In a box of 16.
SHAPES = {
    ANSWER: '<path d="M8 0.5 15.5 8 8 15.5 0.5 8Z"/>',
    MEASURED: '<circle cx="8" cy="8" r="5"/>',
    PREDICTED: '<circle cx="8" cy="8" r="4.2"/>',
    ORIGINAL: '<rect x="3.2" y="3.2" width="9.6" height="9.6"/>',
}


@dc.dataclass(frozen=True)
class Model:
    """One model of the front: what it costs and what it is."""

    kind: str
    size_bytes: float
    latency_ms: float
    drop_pt: float
    what: str

    @property
    def words(self) -> str:
        """Its costs in a line."""
        return f"{decimal(self.size_bytes)}, {ms(self.latency_ms)}, {points(self.drop_pt)}"


def front_html(told: Told) -> str:
    """Two plots and the table of all numbers."""
    found = models(told)
    size = _plot(told, found, "size", "size of the file", lambda m: m.size_bytes, decimal)
    time = _plot(told, found, "time", "time of one run", lambda m: m.latency_ms, ms)
    legend = "".join(
        f"<li>{_mark(kind)}{text(words)}</li>"
        for kind, words in WORDS.items()
        if any(m.kind == kind for m in found)
    )
    if _limits(told):
        legend += '<li><i class="inside" aria-hidden="true"></i>within the budget</li>'
    return (
        f'<ul class="legend">{legend}</ul>\n<div class="figures lines">\n{size}\n{time}\n</div>\n'
        f"{table_html(_table(told))}"
    )


def models(told: Told) -> list[Model]:
    """The original, all that was measured, and what was predicted; the answer last."""
    result, original = told.result, told.result["original"]
    answer = Model(
        ANSWER,
        result["size_bytes"],
        result["latency_ms"],
        told.judged_pt,
        choice_words(result["choice"]),
    )
    known = {(answer.latency_ms, answer.drop_pt)}
    found = [Model(ORIGINAL, original["size_bytes"], original["latency_ms"], 0.0, "in float32")]
    for row in result["front"]:
        if not row["measured"]:
            costs = (row["size_bytes"], row["latency_ms"], row["drop_pt"])
            found.append(Model(PREDICTED, *costs, choice_words(row)))
    for row in told.candidates:
        drop = row["drop"]
        judged = drop["estimate_pt" if told.conditions.get("by_estimate") else "judged_pt"]
        if (row["latency_ms"], judged) not in known:
            costs = (row["size_bytes"], row["latency_ms"], judged)
            found.append(Model(MEASURED, *costs, choice_words(row["choice"])))
            known.add((row["latency_ms"], judged))
    return [*found, answer]


def choice_words(choice: Json) -> str:
    """What the search had chosen: "channels with 95 % of their time, 7.6 bits on average". Of what is left where whole
    blocks went, which are named."""
    bits = list(choice.get("bits", {}).values())
    share = choice.get("channels_share", 1.0)
    parts = ["all channels" if share >= 1 else f"channels with {percent(share, 0)} % of their time"]
    if gone := choice.get("without"):
        parts.insert(0, f"without {', '.join(gone)}")
    if bits:
        parts.append(f"{sum(bits) / len(bits):.1f} bits on average")
    else:
        parts.append("8 bits")
    if choice.get("mode") == "weight_only":
        parts.append("computed in float")
    return ", ".join(parts)


def _limits(told: Told) -> dict[str, float]:
    held = told.result["limits"]
    return {axis: held[axis] for axis in ("size_bytes", "latency_ms", "drop_pt") if axis in held}


def _plot(
    told: Told,
    found: Sequence[Model],
    key: str,
    label: str,
    cost: Callable[[Model], float],
    shown: Callable[[float], str],
) -> str:
    """Points lost over one cost. The marks are radio buttons: one stop of the Tab key, arrows go from model to model,
    and what is chosen is told below."""
    limits = _limits(told)
    bound = limits.get("size_bytes" if key == "size" else "latency_ms")
    most = limits.get("drop_pt")
    x = logarithmic([*map(cost, found), *([bound] if bound else [])])
    y = bent([max(m.drop_pt, 0.0) for m in found] + ([most] if most else []))
    order = sorted(range(len(found)), key=lambda i: (cost(found[i]), i))
    marks = "".join(_label(found[i], key, x.at(cost(found[i])), y) for i in order)
    title = f"Points of accuracy lost over {label}"
    return (
        f'<figure class="front" aria-labelledby="front-{key}"><figcaption id="front-{key}"><b>{title}</b>'
        f"Left and down is better. {_bound_words(bound, most, shown)}</figcaption>"
        f'<fieldset class="plot"><legend class="unseen">{title}: choose a model with the arrow keys</legend>'
        f'<span class="y-title" aria-hidden="true">points lost</span>'
        f'<div class="area">{_axes(x, y, bound, most, shown)}{marks}</div>'
        f'<span class="x-title" aria-hidden="true">{label}</span></fieldset></figure>'
    )


def _bound_words(bound: float | None, most: float | None, shown: Callable[[float], str]) -> str:
    parts = []
    if bound is not None:
        parts.append(f"at most {shown(bound)}")
    if most is not None:
        parts.append(f"at most {most_points(most)} lost")
    return f"Asked: {' and '.join(parts)}." if parts else "The budget sets no bound here."


def _axes(
    x: Scale, y: Scale, bound: float | None, most: float | None, shown: Callable[[float], str]
) -> str:
    """Grid, ticks and bounds; positions in per cent, so that letters keep their size at every width."""
    parts = ['<svg aria-hidden="true" focusable="false">']
    if bound is not None or most is not None:
        right = 100.0 if bound is None else x.at(bound)
        top = 0.0 if most is None else 100 - y.at(most)
        parts.append(
            f'<rect class="inside" x="0" y="{top:.2f}%" width="{right:.2f}%" height="{100 - top:.2f}%"/>'
        )
    for tick in y.ticks:
        place = 100 - y.at(tick)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{place:.2f}%" y2="{place:.2f}%"/>')
        parts.append(f'<text class="y" x="0" dx="-8" y="{place:.2f}%" dy="4">{tick:g}</text>')
    for tick in x.ticks:
        place = x.at(tick)
        parts.append(
            f'<line class="grid" x1="{place:.2f}%" x2="{place:.2f}%" y1="100%" y2="0"/>'
            f'<text class="x" x="{place:.2f}%" y="100%" dy="26">{text(_tick(tick, shown))}</text>'
        )
    if bound is not None:
        place = x.at(bound)
        side = "end" if place > 60 else "start"
        parts.append(
            f'<line class="bound" x1="{place:.2f}%" x2="{place:.2f}%" y1="-6" y2="100%"/>'
            f'<text class="bound {side}" x="{place:.2f}%" dx="{-5 if side == "end" else 5}" y="0" dy="-8">'
            f"≤ {text(shown(bound))}</text>"
        )
    if most is not None:
        place = 100 - y.at(most)
        parts.append(
            f'<line class="bound" x1="0" x2="100%" y1="{place:.2f}%" y2="{place:.2f}%"/>'
            f'<text class="bound end" x="100%" dx="-4" y="{place:.2f}%" dy="-6">≤ {most:g} lost</text>'
        )
    return "".join(parts) + "</svg>"


def _tick(value: float, shown: Callable[[float], str]) -> str:
    """A round number without the digits that a measured one has: "2 MB"."""
    number, _, unit = shown(value).partition(" ")
    return f"{float(number.replace(',', '')):g} {unit}"


def _label(model: Model, key: str, left: float, y: Scale) -> str:
    down = 100 - y.at(max(model.drop_pt, 0.0))
    words = f"{WORDS[model.kind]}: {model.words}; {model.what}"
    checked = " checked" if model.kind == ANSWER else ""
    return (
        f'<label class="{model.kind}" title="{text(words)}">'
        f'<input type="radio" name="front-{key}" aria-label="{text(words)}"{checked} '
        f'style="left:{left:.2f}%;top:{down:.2f}%">'
        f'<span class="at" style="left:{left:.2f}%;top:{down:.2f}%">{_mark(model.kind)}</span>'
        f'<span class="tip" aria-hidden="true"><b>{text(WORDS[model.kind])}</b> {text(model.words)}<br>'
        f"{text(model.what)}</span></label>"
    )


def _mark(kind: str) -> str:
    return f'<svg class="mark {kind}" viewBox="0 0 16 16" aria-hidden="true" focusable="false">{SHAPES[kind]}</svg>'


def _table(told: Told) -> Table:
    """All models with their numbers."""
    columns = (
        Column("model", right=False),
        Column("bytes"),
        Column("ms"),
        Column("points lost"),
        Column("multiplications"),
        Column("mJ, counted"),
        Column("channels' time kept, %"),
        Column("bits, mean"),
        Column("how known", right=False),
    )
    result = told.result
    rows = [_original_row(result), _row("the answer", {**result, **result["choice"]}, told, True)]
    rows += [
        _row(row["file"].removesuffix(".tersor"), {**row, **row["choice"]}, told, True)
        for row in told.candidates
    ]
    rows += [
        _row(f"prediction {number}", row, told, False)
        for number, row in enumerate((r for r in result["front"] if not r["measured"]), 1)
    ]
    return Table("table-front", "All models and their numbers", columns, tuple(rows), folded=True)


def _original_row(result: Json) -> tuple[str, ...]:
    held = result["original"]
    return (
        "original",
        f"{held['size_bytes']:,.0f}",
        f"{held['latency_ms']:.4f}",
        NONE,
        f"{held['macs']:,.0f}",
        f"{held['energy_mj']:.4g}",
        "100",
        "32",
        "measured",
    )


def _row(name: str, row: Json, told: Told, measured: bool) -> tuple[str, ...]:
    bits = list(row.get("bits", {}).values())
    drop = row.get("drop_pt")
    if drop is None:
        held = row["drop"]
        drop = held["estimate_pt" if told.conditions.get("by_estimate") else "judged_pt"]
    return (
        name,
        f"{row['size_bytes']:,.0f}",
        f"{row['latency_ms']:.4f}",
        f"{drop:.2f}",
        f"{row['macs']:,.0f}",
        f"{row['energy_mj']:.4g}",
        percent(row["channels_share"], 0),
        f"{sum(bits) / len(bits):.2f}" if bits else "8.00",
        "measured" if measured else "predicted",
    )
