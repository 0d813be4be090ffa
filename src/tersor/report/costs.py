"""What came of a budget: the headline, bound by bound, before and after, and the energy in its parts."""

from __future__ import annotations

from typing import Any

from tersor.report.document import Column, Highlight, Table
from tersor.report.page import table_html, text
from tersor.report.told import (
    EAGER,
    GAIN,
    Json,
    Told,
    decimal,
    digits,
    end,
    factor,
    interval_words,
    million,
    most_points,
    ms,
    points,
)
from tersor.report.words import NONE, clean, count, percent, times

MET, MISSED = "met", "missed"
AXES = {
    "size_bytes": ("size", "size of the file", decimal),
    "latency_ms": ("latency", "time of one run", ms),
    "macs": ("macs", "multiplications of an input", million),
    "energy_mj": ("energy", "energy of an input, counted", lambda value: f"{digits(value)} mJ"),
    "drop_pt": ("drop", "points of accuracy lost", most_points),
}
EPSILON = 1e-9


def headline(told: Told) -> str:
    """The result in a line; that nothing fits comes first, where nothing does."""
    result = told.result
    smaller = factor(result["original"]["size_bytes"], result["size_bytes"], "smaller", "larger")
    faster = factor(result["speedup"], 1.0, "faster", "slower")
    cost = _cost(result["drop"])
    if not result["met"]:
        return (
            f"No model within the budget was found. The nearest is {smaller} and {faster}: {cost}"
        )
    return f"{told.model[:1].upper()}{told.model[1:]} is {smaller} and {faster}: {cost}"


def _cost(drop: Json) -> str:
    """What was lost, and within which limits."""
    said = points(drop["estimate_pt"]).replace("points", "points of accuracy")
    said = said.replace("nothing lost", "no accuracy lost")
    judge = "" if drop["labelled"] else " as the original would expect"
    return f"{said}{judge} ({interval_words(drop)})"


def highlight(told: Told) -> Highlight:
    """The figures large, and what they mean below."""
    result, drop = told.result, told.result["drop"]
    before = result["original"]["size_bytes"]
    facts = (
        (
            f"{times(result['smaller'])}×",
            f"smaller: {decimal(before)} to {decimal(result['size_bytes'])}",
        ),
        (
            f"{times(result['speedup'])}×",
            f"faster: {ms(told.eager_ms)} to {ms(result['latency_ms'])}",
        ),
        (_short(drop["estimate_pt"]), f"{_lost(drop)}; {interval_words(drop)}"),
    )
    title = (
        "The answer" if result["met"] else "The nearest that was found: it is not within the budget"
    )
    return Highlight(title, "", tuple(_sentences(told)), facts)


def _short(value: float) -> str:
    return "0.00 pt" if abs(value) < GAIN else f"{abs(value):.2f} pt"


def _lost(drop: Json) -> str:
    word = "gained" if drop["estimate_pt"] <= -GAIN else "lost"
    return f"{word}{'' if drop['labelled'] else ', expected'}"


def _sentences(told: Told) -> list[str]:
    result, drop = told.result, told.result["drop"]
    said = [_judgement(drop), _time_sentence(told)]
    if result.get("axis"):
        what = AXES[result["axis"]][1]
        said.insert(
            0,
            f"What binds is the {what}, at layer {clean(result['layer'])}: raise that bound, or take "
            "more effort.",
        )
    path = clean(str(result["path"])).replace("\\", "/").rsplit("/", 1)[-1]
    said.append(
        f"The file is {path}; it holds {choice_line(result['choice'])}. Found in {result['seconds']:,.0f} s."
    )
    return said


def _judgement(drop: Json) -> str:
    """What the drop means, in plain words."""
    whole = count(drop["num_samples"], "held-out input")
    same = f"{percent(drop['agreement'], 1)} % of the answers are the original's"
    if drop["interval"] is None:
        return (
            f"On {whole} without labels {same}. Where the two differ, the original's own confidence says what is lost: "
            f"{points(drop['estimate_pt'])} on average, and with 95 % confidence no more than {end(drop['high_pt'])}."
        )
    held = drop["interval"]
    level = percent(held["level"], 0)
    return (
        f"On {whole} with labels {_often(drop['estimate_pt'])}. With {level} % confidence the true difference "
        f"lies between {points(-held['high_pt'])} and {points(-held['low_pt'])}. {same[0].upper()}{same[1:]}."
    )


def _often(lost: float) -> str:
    """How many answers fewer or more are right, of a network that lost so many points."""
    if abs(lost) < GAIN:
        return "as many answers are right as of the original"
    less = "fewer" if lost > 0 else "more"
    return f"{abs(lost):.2f} answers in 100 {less} are right than of the original"


def _time_sentence(told: Told) -> str:
    batch = "one input" if told.batch == 1 else f"{told.batch:,} inputs at once"
    said = f"Times are of {batch} on {told.engine}, beside {EAGER} in the same run"
    base = told.float_engine_ms
    if base is None:
        return f"{said}."
    than = factor(base, told.result["latency_ms"], "faster", "slower")
    return f"{said}; it is {than} than the uncompressed network on ONNX Runtime ({ms(base)})."


def choice_line(choice: Json) -> str:
    """What was chosen, in a clause."""
    from tersor.report.front import choice_words

    said = choice_words(choice)
    epochs = choice.get("epochs") or 0
    source = "labels" if choice.get("labels") else "the original's answers"
    return f"{said}, trained for {digits(epochs)} epochs on {source}" if epochs else said


def budget_table(told: Told) -> Table:
    """Bound by bound: what was asked, what was reached, and whether that is within."""
    asked = told.first.get("budget", {})
    rows = []
    for axis, limit in told.result["limits"].items():
        name, what, shown = AXES[axis]
        reached = _reached(told, axis)
        words = asked.get(name)
        said = (
            f"{clean(words)}: at most {shown(limit)}"
            if words and axis != "drop_pt"
            else f"at most {shown(limit)}"
        )
        verdict = MET if reached <= limit + EPSILON else MISSED
        rows.append((what, said, _reached_words(told, axis, reached), verdict))
    columns = (
        Column("bound", right=False),
        Column("asked", right=False),
        Column("reached", right=False),
        Column("verdict", right=False),
    )
    if not rows:
        rows.append(("none", NONE, NONE, NONE))
    return Table("table-budget", "The budget", columns, tuple(rows), _budget_notes(told))


def relative_latency(told: Told) -> bool:
    """Whether the bound on time was relative to the original: both are then compared in the same run."""
    words = str(told.first.get("budget", {}).get("latency", ""))
    return any(sign in words for sign in "x×%")


def _reached(told: Told, axis: str) -> float:
    """What is held against the bound."""
    if axis == "drop_pt":
        return max(told.judged_pt, 0.0)
    if axis == "latency_ms" and relative_latency(told):
        return float(told.result["original"]["latency_ms"] / told.result["speedup"])
    return float(told.result[axis])


def _reached_words(told: Told, axis: str, reached: float) -> str:
    if axis == "drop_pt":
        return f"{points(told.judged_pt)}"
    before = told.result["original"][axis]
    return f"{AXES[axis][2](reached)}: {times(before / reached)}× less"


def _budget_notes(told: Told) -> tuple[str, ...]:
    notes, drop = [], told.result["drop"]
    if "drop_pt" in told.result["limits"]:
        limit = told.result["limits"]["drop_pt"]
        if drop["labelled"]:
            said = "With labels the budget is held against the measured difference"
            most = -drop["interval"]["low_pt"]
            if most > limit:
                said += f"; its interval reaches {end(most)}, past the bound: more labelled inputs would tell"
        elif told.conditions.get("by_estimate"):
            said = "So few inputs cannot show the bound to be kept: the estimate is held against it, not its limit"
        else:
            said = "Without labels the budget is held against the upper 95 % limit"
        notes.append(f"{said}.")
    if "latency_ms" in told.result["limits"] and relative_latency(told):
        notes.append(
            f"The bound on time is relative: original and answer are compared in the same run, in which {EAGER} took "
            f"{ms(told.eager_ms)}; at the start it took {ms(told.result['original']['latency_ms'])}."
        )
    return tuple(notes)


def costs_table(told: Told) -> Table:
    """Original and answer, cost by cost."""
    result, original = told.result, told.result["original"]
    columns = (
        Column("cost", right=False),
        Column("original"),
        Column("answer"),
        Column("times less"),
    )
    rows = [
        _cost_row("file", original["size_bytes"], result["size_bytes"], decimal),
        _cost_row(
            f"time, {count(told.batch, 'input')}, same run", told.eager_ms, result["latency_ms"], ms
        ),
        _cost_row("multiplications", original["macs"], result["macs"], million),
        _cost_row(
            "energy, counted",
            original["energy_mj"],
            result["energy_mj"],
            lambda v: f"{digits(v)} mJ",
        ),
    ]
    if told.float_engine_ms is not None:
        own = _cost_row("time, ONNX Runtime", told.float_engine_ms, result["latency_ms"], ms)
        rows.insert(2, own)
    note = (
        f"The original's file: all its weights and buffers in float32. Its time: {EAGER} in the answer's run, and ONNX "
        "Runtime's float32. Multiplications and energy are those of one input."
    )
    return Table("table-costs", "Before and after", columns, tuple(rows), (note,))


def _cost_row(name: str, before: float, after: float, shown: Any) -> tuple[str, ...]:
    return name, shown(before), shown(after), times(before / after)


def energy_html(told: Told) -> str:
    """Two stacked bars, and what was measured."""
    held: Json = told.details["energy"]
    wholes = {
        side: held[f"{side}_compute_mj"] + held[f"{side}_memory_mj"]
        for side in ("original", "compressed")
    }
    top = max(wholes.values()) or 1.0
    bars = "".join(
        _energy_bar(held, side, word, wholes[side], top)
        for side, word in (("original", "original"), ("compressed", "answer"))
    )
    kind = "integers of 8 bits" if held["integers"] else "float32"
    prices = (
        f"Counted, not measured: each multiplication with its sum at {held['float32_mac_pj']:g} pJ in float32 and "
        f"{held['int8_mac_pj']:g} pJ in 8-bit integers, each byte of weights read from memory once a run at "
        f"{held['dram_byte_pj']:g} pJ (Horowitz 2014, 45 nm). The answer computes in {kind}. Only the ratio means "
        "anything on another chip."
    )
    return (
        '<figure class="energy" tabindex="0" aria-labelledby="energy-words"><div class="stack">'
        f"{bars}</div>"
        '<ul class="legend"><li><i class="compute" aria-hidden="true"></i>arithmetic</li>'
        '<li><i class="memory" aria-hidden="true"></i>reading the weights</li></ul>'
        f'<figcaption id="energy-words"><b>{text(_energy_words(wholes))}</b>{text(prices)}</figcaption></figure>'
        f"<p>{text(_measured_words(held))}</p>{table_html(_energy_table(held, wholes))}"
    )


def _energy_words(wholes: Json) -> str:
    than = factor(wholes["original"], wholes["compressed"], "less", "more")
    return f"{digits(wholes['original'])} mJ an input before, {digits(wholes['compressed'])} mJ now: {than}"


def _energy_bar(held: Json, side: str, word: str, whole: float, top: float) -> str:
    parts = "".join(
        f'<span class="{part}" style="width:{100 * held[f"{side}_{part}_mj"] / top:.2f}%"></span>'
        for part in ("compute", "memory")
    )
    return (
        f'<div class="bar"><span class="name">{word}</span><span class="track" aria-hidden="true">{parts}</span>'
        f'<span class="value">{text(digits(whole))} mJ</span></div>'
    )


def _measured_words(held: Json) -> str:
    before, after = held["original_measured_mj"], held["compressed_measured_mj"]
    if before is None or after is None:
        return f"Not measured: {clean(held['not_measured'])}."
    return (
        f"Measured by the processor's counters (RAPL, the whole package with all that ran beside): {digits(before)} mJ "
        f"an input before, {digits(after)} mJ now, {factor(before, after, 'less', 'more')}."
    )


def _energy_table(held: Json, wholes: Json) -> Table:
    columns = (Column("mJ of an input", right=False), Column("original"), Column("answer"))
    rows = [
        (word, digits(held[f"original_{part}_mj"]), digits(held[f"compressed_{part}_mj"]))
        for word, part in (("arithmetic", "compute"), ("reading the weights", "memory"))
    ]
    rows.append(("both", digits(wholes["original"]), digits(wholes["compressed"])))
    before, after = held["original_measured_mj"], held["compressed_measured_mj"]
    if before is not None and after is not None:
        rows.append(("measured (RAPL)", digits(before), digits(after)))
    return Table("table-energy", "Energy in numbers", columns, tuple(rows), folded=True)
