"""Layer by layer: what is left of each, what it takes and how much it matters; and what was done to it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence

from tersor.report.document import Column, Table
from tersor.report.page import breakable, text
from tersor.report.told import Json, Told, decimal, digits, ms
from tersor.report.words import MISSING, NONE, clean, count, percent

TALL = 30  # layers above which the table scrolls inside its own height
ACTIONS = {
    "int8": "computed in integers",
    "dynamic": "in integers, inputs coded at run time",
    "weight_only": "computed in float",
    "prune": "weights set to zero",
    "remove": "channels removed",
    "bypass": "left out whole",
    "factorize": "split into thinner layers",
    "share": "filters shared",
    "keep": "left as it is",
}


@dc.dataclass(frozen=True)
class Measure:
    """A column of the picture: its heading, what it says, its length as a share of the longest, and its words."""

    head: str
    group: str
    value: Callable[[Json], float | None]
    words: Callable[[Json], str]
    most: float | None = None  # the value of a full bar; None: the largest there is


def layers_html(told: Told) -> str:
    """The picture: a row a layer, a bar for each of its numbers."""
    rows: Sequence[Json] = told.details["layers"]
    rest = told.details["rest_bytes"]
    tried = rows[0]["tried_bits"] if rows else 3
    measures = _measures(tried)
    tops = [m.most or max((m.value(row) or 0.0 for row in rows), default=0.0) for m in measures]
    heads = "".join(f'<th scope="col">{text(m.head)}</th>' for m in measures)
    body = "\n".join(
        f'<tr><th scope="row">{breakable(row["layer"])}</th>'
        + "".join(_cell(m, row, top) for m, top in zip(measures, tops, strict=True))
        + "</tr>"
        for row in rows
    )
    whole = told.result["size_bytes"]
    used = sum(row["size_bytes"] for row in rows)
    tall = " tall" if len(rows) > TALL else ""
    return (
        f'<div class="scroll layers{tall}" role="region" aria-labelledby="layers-caption" tabindex="0"><table>\n'
        f'<caption id="layers-caption"><span>{count(len(rows), "layer")}, in the order of computing</span></caption>'
        f'<thead><tr><th scope="col">layer</th>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n'
        f'<p class="note">{text(_bytes_note(used, rest, whole))} {text(_time_note(told, rows))} '
        f"{text(_harm_note(tried))}</p>"
    )


def _measures(tried: int) -> tuple[Measure, ...]:
    return (
        Measure("bits a weight", "", lambda r: r["bits"], _bits_words, 32.0),
        Measure("outputs kept", "", _kept, _width_words, 1.0),
        Measure("weights not 0", "", lambda r: r["density"], _density_words, 1.0),
        Measure("in the file", "", lambda r: r["size_bytes"], lambda r: decimal(r["size_bytes"])),
        Measure("time alone", "", lambda r: r["time_ms"], lambda r: ms(r["time_ms"])),
        Measure(
            f"harm at {tried} bits, nats",
            "",
            lambda r: r["harm_tried_kl"],
            lambda r: MISSING if r["harm_tried_kl"] is None else digits(r["harm_tried_kl"]),
        ),
    )


def _bits_words(row: Json) -> str:
    return "left out" if row["bits"] is None else str(row["bits"])


def _kept(row: Json) -> float | None:
    return None if row["outputs"] is None else float(row["outputs"] / row["outputs_before"])


def _width_words(row: Json) -> str:
    if row["outputs"] is None:
        return MISSING if row["bits"] is not None else NONE
    if row["outputs"] == row["outputs_before"]:
        return f"all {row['outputs']:,}"
    return f"{row['outputs']:,} of {row['outputs_before']:,}"


def _density_words(row: Json) -> str:
    if row["density"] is None:
        return MISSING if row["bits"] is not None else NONE
    return f"{percent(row['density'], 1)} %"


def _cell(measure: Measure, row: Json, top: float) -> str:
    value = measure.value(row)
    if value is None:
        return f'<td class="missing">{text(measure.words(row))}</td>'
    share = 100 * value / top if top > 0 else 0.0
    return f'<td style="--share:{share:.1f}%">{text(measure.words(row))}</td>'


def _bytes_note(used: float, rest: float, whole: float) -> str:
    return (
        f"In the file: weights, scales and biases of a layer, as coded; together {decimal(used)} of {decimal(whole)}, "
        f"and {decimal(rest)} for the graph, the plan and what belongs to no layer."
    )


def _time_note(told: Told, rows: Sequence[Json]) -> str:
    if all(row["time_ms"] is None for row in rows):
        return "No layer was timed alone: the table of times holds integer kernels, and this model has none."
    known = [row for row in rows if row["time_ms"] is not None]
    now = sum(row["time_ms"] for row in known)
    before = sum(row["time_before_ms"] or 0.0 for row in known)
    whole = ms(told.result["latency_ms"])
    return (
        f"Time alone: the layer by itself as an integer kernel of ONNX Runtime, {count(told.batch, 'input')}; the sum "
        f"is {ms(now)} now and {ms(before)} at full width. The whole on {told.engine} takes {whole}: "
        "engines merge layers, so the two need not agree."
    )


def _harm_note(tried: int) -> str:
    return (
        f"Harm: how far the network's answers move (KL divergence) when this layer alone is rounded to {tried} bits; "
        "the longer the bar, the more bits it needs."
    )


def coverage_table(told: Told) -> Table:
    """Every layer of the plan: what was done to it, or why not."""
    removed = {
        each["layer"]: each
        for plan in told.plan.get("earlier", [])
        for each in plan["layers"]
        if each["action"] != "keep"
    }
    left = {
        each["layer"]: each["reason"]
        for plan in told.plan.get("earlier", [])
        for each in plan["layers"]
        if each["action"] == "keep" and each["reason"]
    }
    sizes = {row["layer"]: row for row in told.details.get("layers", [])}
    rows = []
    named = [each["layer"] for each in told.plan["layers"]]
    for each in told.plan["layers"]:
        name = each["layer"]
        rows.append(
            (
                clean(name),
                _done(each),
                _channels(removed.get(name), sizes.get(name)),
                _why(each, left.get(name, "")),
            )
        )
    for name, each in removed.items():
        if name not in named:
            rows.append((clean(name), NONE, _channels(each, None), clean(each["reason"]) or NONE))
    changed = sum(each["action"] != "keep" for each in told.plan["layers"])
    columns = (
        Column("layer", right=False),
        Column("weights", right=False),
        Column("channels", right=False),
        Column("why not more", right=False),
    )
    caption = f"{changed} of {count(len(named), 'layer')} changed"
    return Table("table-coverage", caption, columns, tuple(rows))


def _done(each: Json) -> str:
    words = ACTIONS.get(each["action"], clean(each["action"]))
    if each["action"] == "keep":
        return f"{words}, float32"
    return f"{each['bits']} bits, {words}" if each["bits"] < 32 else words


def _channels(each: Json | None, row: Json | None) -> str:
    if each is None:
        return "all kept"
    parts = []
    for side in ("inputs", "outputs"):
        kept = len(each[side])
        if kept:
            whole = f" of {row[f'{side}_before']:,}" if row is not None else ""
            parts.append(f"{kept:,}{whole} {side}")
    return (
        f"{', '.join(parts)} kept" if parts else ACTIONS.get(each["action"], clean(each["action"]))
    )


def _why(each: Json, left: str) -> str:
    found = [clean(reason) for reason in (each["reason"], left) if reason]
    return "; ".join(found) or NONE


def request_table(told: Told) -> Table:
    """What was asked of each step of the plan, word by word."""
    rows = []
    for number, plan in enumerate([*told.plan.get("earlier", []), told.plan], 1):
        request = plan["request"]
        for key, value in request.items():
            if key != "kind":
                shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                rows.append(
                    (f"{number}. {clean(request['kind'])}", clean(key), clean(shown) or NONE)
                )
    columns = (
        Column("step", right=False),
        Column("option", right=False),
        Column("value", right=False),
    )
    return Table("table-request", "Options of every step", columns, tuple(rows), folded=True)
