"""The sensitivity of a network's layers as one figure, one page and one closing sentence: a
function of the command's JSON object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.report.document import Column, Document, Highlight, Line, Plot, Section, Table
from tersor.report.figures import (
    LINES_INCH,
    MARKERS,
    MEASURED,
    REFERENCE,
    figure_settings,
    file_name,
    require_matplotlib,
    rows_of_names,
    shown_label,
    svg_text,
)
from tersor.report.page import page
from tersor.report.svg import GROUND, QUIET, SERIES, finished
from tersor.report.words import NONE, clean, count, percent

MOST_NAMED = 3
LAYER_INCH = 0.235
LEGEND_ROW = 6  # entries that fit beside each other
INPUT_LABEL = "input, 8 bits"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Answer = Mapping[str, Any]


def worst_layers(answer: Answer) -> list[Mapping[str, Any]]:
    """The layers that hurt most at the fewest bits, three at most, the worst first."""
    return sorted(answer["layers"], key=lambda layer: int(layer["rank"]))[:MOST_NAMED]


def conclusion(answer: Answer) -> str:
    """Which layers hurt most, in two sentences: at the fewest bits, and at the most."""
    fewest, most = str(min(answer["bits"])), str(max(answer["bits"]))
    worst = worst_layers(answer)
    harms = [layer["harm_kl_nats"][fewest] for layer in worst]
    total = math.fsum(layer["harm_kl_nats"][fewest] for layer in answer["layers"])
    if not total:
        return f"At {_bits(fewest)} no layer changes the outputs at all."
    said = (
        f"At {_bits(fewest)} {listed([clean(layer['layer']) for layer in worst])} "
        f"hurt{'s' if len(worst) == 1 else ''} most: KL {listed([nats(h) for h in harms])} nats"
    )
    if len(answer["layers"]) > len(worst):
        share = percent(math.fsum(harms) / total, 0)
        said += f", {share} % of the sum over all {count(len(answer['layers']), 'layer')}"
    if most == fewest:
        return said + "."
    top = max(answer["layers"], key=lambda layer: float(layer["harm_kl_nats"][most]))
    return (
        f"{said}. At {_bits(most)} the worst is {clean(top['layer'])} with "
        f"{nats(top['harm_kl_nats'][most])} nats."
    )


def nats(value: float) -> str:
    """A divergence to three digits."""
    return f"{value:.3g}"


def sensitivity_svg(answer: Answer) -> str:
    """The figure as one SVG document, legible on light and dark grounds. Raises MissingExtraError
    without matplotlib."""
    return _drawn(_plot(answer), answer)


def sensitivity_page(answer: Answer) -> str:
    """Figure, tables and conclusion as one HTML file. Raises MissingExtraError without
    matplotlib."""
    plot = _plot(answer)
    subject = f"{clean(answer['model'])} on {clean(answer['data'])}"
    worst, fewest = worst_layers(answer), str(min(answer["bits"]))
    highlight = Highlight(
        subject,
        f"{worst[0]['layer']} hurts most at {_bits(fewest)}",
        (conclusion(answer),),
        tuple(
            (nats(layer["harm_kl_nats"][fewest]), f"nats, {layer['layer']} at {_bits(fewest)}")
            for layer in worst
        ),
    )
    section = Section(
        "layers",
        "Layer by layer",
        "The weights of one layer at a time are quantized; all else stays in float32. A divergence "
        "of 0 means equal outputs; those of several layers add up only roughly.",
        (
            _table(answer, "harm_kl_nats", "KL divergence, nats"),
            _table(answer, "harm_mse", "squared distance of logits over their variance"),
        ),
        (plot,),
    )
    document = Document(
        f"Tersor: sensitivity of {subject}",
        (highlight,),
        _conditions(answer),
        (section,),
        "Made by tersor sensitivity.",
    )
    return page(document, {file_name(plot): _drawn(plot, answer)})


def _conditions(answer: Answer) -> str:
    return (
        f"{_measure(answer)} Weights by evenly spaced symmetric codes with one scale of least "
        f"squared error for each output channel; measured in {answer['seconds']:.0f} s."
    )


def _measure(answer: Answer) -> str:
    return (
        "Mean over "
        f"{count(answer['num_images'], 'calibration image')}, without labels, of the divergence "
        "KL(softmax of the original ‖ softmax of the quantized), in nats."
    )


def _table(answer: Answer, key: str, title: str) -> Table:
    bits = sorted(answer["bits"])
    columns = [Column("layer", right=False), Column("weights"), Column("MACs, %")]
    columns += [Column(_bits(b), group=title) for b in bits]
    with_inputs = key == "harm_kl_nats" and _has_inputs(answer)
    if with_inputs:
        columns.append(Column(INPUT_LABEL, group=title))
    columns.append(Column("rank"))
    rows = []
    for layer in answer["layers"]:
        cells = [clean(layer["layer"]), count(layer["num_weights"])]
        cells += [percent(layer["macs_share"], 1)]
        cells += [nats(layer[key][str(b)]) for b in bits]
        if with_inputs:
            value = layer["harm_input_8bit_kl_nats"]
            cells.append(NONE if value is None else nats(value))
        rows.append((*cells, str(layer["rank"])))
    note = f"Rank by KL divergence at {_bits(bits[0])}; 1 hurts most."
    folded = key != "harm_kl_nats"
    return Table(f"table-{key}", _first_upper(title), tuple(columns), tuple(rows), (note,), folded)


def _plot(answer: Answer) -> Plot:
    layers: Sequence[Mapping[str, Any]] = answer["layers"]
    lines = []
    for bits in sorted(answer["bits"]):
        points = [(float(la["harm_kl_nats"][str(bits)]), float(i)) for i, la in enumerate(layers)]
        lines.append(Line(_bits(bits), tuple(points)))
    if _has_inputs(answer):
        harms = [layer["harm_input_8bit_kl_nats"] for layer in layers]
        known = [(float(h), float(i)) for i, h in enumerate(harms) if h is not None]
        lines.append(Line(INPUT_LABEL, tuple(known), reference=True))
    caption = (
        f"{_measure(answer)} Left is better. Layers in the order of computing; the names of the "
        f"worst at {_bits(min(answer['bits']))} are bold."
    )
    if any(x <= 0 for line in lines for x, _ in line.points):
        caption += " Open marks at the left edge: no divergence at all."
    return Plot(
        "sensitivity",
        f"What quantizing one layer costs · {clean(answer['model'])}",
        caption,
        "KL divergence, nats",
        lines=tuple(lines),
        categories=tuple(clean(layer["layer"]) for layer in layers),
    )


def _drawn(plot: Plot, answer: Answer) -> str:
    """A line a layer, a mark a number of bits, divergence on a logarithmic axis."""
    require_matplotlib()
    from matplotlib.figure import Figure

    with figure_settings():
        height = 1.15 + LAYER_INCH * len(plot.categories)
        figure = Figure(figsize=(LINES_INCH, height), layout="constrained")
        axes = figure.add_subplot()
        floor = _draw_marks(axes, plot)
        _dress(axes, plot, floor)
        worst = {int(layer["rank"]) for layer in worst_layers(answer)}
        for tick, layer in zip(axes.get_yticklabels(), answer["layers"], strict=True):
            tick.set_fontweight("bold" if layer["rank"] in worst else "normal")
        drawn = svg_text(figure)
    return finished(drawn, plot.key, plot.title, plot.caption)


def _draw_marks(axes: Any, plot: Plot) -> float:
    """Draw all marks, and a line from the least to the most of a layer; returns the left edge."""
    positive = [x for line in plot.lines for x, _ in line.points if x > 0]
    floor = 10.0 ** math.floor(math.log10(min(positive, default=1.0)))
    axes.set_xscale("log")
    measured = [line for line in plot.lines if not line.reference]
    for number in range(len(plot.categories)):
        own = [max(x, floor) for line in measured for x, y in line.points if y == number]
        axes.plot([min(own), max(own)], [number] * 2, color=QUIET, linewidth=1.0, zorder=2)
    for place, line in enumerate(measured):
        style = {**MEASURED, "color": SERIES[place % len(SERIES)], "linestyle": "none"}
        style["marker"] = MARKERS[place % len(MARKERS)]
        above = [(x, y) for x, y in line.points if x > 0]
        xs, ys = [x for x, _ in above], [y for _, y in above]
        axes.plot(xs, ys, label=shown_label(line.label), zorder=4, **style)
        if none := [y for x, y in line.points if x <= 0]:
            open_mark = {"markerfacecolor": GROUND, "markeredgecolor": style["color"]}
            axes.plot([floor] * len(none), none, zorder=5, clip_on=False, **style | open_mark)
    for line in plot.lines:
        if line.reference:
            xs, ys = [max(x, floor) for x, _ in line.points], [y for _, y in line.points]
            style = {**REFERENCE, "linestyle": "none"}
            axes.plot(xs, ys, label=shown_label(line.label), zorder=3, **style)
    return floor


def _dress(axes: Any, plot: Plot, floor: float) -> None:
    """Axes, names and legend."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    top = max((x for line in plot.lines for x, _ in line.points), default=0.0)
    last = max(math.ceil(math.log10(max(top, floor))), round(math.log10(floor)) + 1)
    first = round(math.log10(floor))
    axes.set_xlim(floor, 10.0**last)
    every = 1 + (last - first) // 9  # more decades than that would crowd
    axes.xaxis.set_major_locator(FixedLocator([10.0**i for i in range(first, last + 1, every)]))
    axes.xaxis.set_major_formatter(lambda value, _: _power(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel(f"{plot.x_label} (logarithmic)")
    rows_of_names(axes, plot.categories)
    axes.tick_params(axis="x", which="major", length=3, width=0.7)
    axes.figure.legend(
        loc="outside upper left",
        ncols=len(plot.lines) if len(plot.lines) <= LEGEND_ROW else math.ceil(len(plot.lines) / 2),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
        columnspacing=0.9,
    )


def _power(value: float) -> str:
    """A power of ten as it is read: 1, 0.1, 0.01, then 10⁻³."""
    exponent = round(math.log10(value))
    if -2 <= exponent <= 2:
        return f"{10.0**exponent:g}"
    return f"10{str(exponent).translate(SUPERSCRIPTS)}"


def _has_inputs(answer: Answer) -> bool:
    return any(la.get("harm_input_8bit_kl_nats") is not None for la in answer["layers"])


def _bits(bits: int | str) -> str:
    return count(int(bits), "bit")


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
