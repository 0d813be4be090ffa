"""The sparsity of a network's activations and gradients as one figure, one page and one closing sentence: a function
of the command's JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tersor.report.document import Column, Document, Highlight, Line, Plot, Section, Table
from tersor.report.figures import (
    LINES_INCH,
    MARKERS,
    MEASURED,
    figure_settings,
    file_name,
    require_matplotlib,
    rows_of_names,
    svg_text,
)
from tersor.report.page import page
from tersor.report.sensitivity import LAYER_INCH, listed
from tersor.report.svg import QUIET, SERIES, finished
from tersor.report.words import clean, count, milliseconds, percent, signed, times

Answer = Mapping[str, Any]
NO_GAIN = 1.05  # below it a difference of two medians is not called a gain
SERIES_SHOWN = (
    ("input_zeros", "zero inputs"),
    ("macs_zero", "MACs by zero"),
    ("gradient_zeros", "zero gradients"),
)


def conclusion(answer: Answer) -> str:
    """What the zeros would allow, and what an engine makes of them; with activations pruned, their price."""
    share, possible = percent(answer["macs_zero"], 0), times(answer["potential_speedup"])
    found = answer["obtained"]
    real, dense = found["real"], found["dense"]
    gain = found["speedup"]
    said = (
        f"{share} % of all multiplications have a factor of zero: skipping them at no cost would make the "
        f"network {possible} times as fast. {clean(real['engine'])} takes {milliseconds(real['median_ms'])} ms "
        f"for {count(real['batch'], 'real image')} and {milliseconds(dense['median_ms'])} ms with "
        f"{percent(found['zeros_dense'], 0)} % zeros in place of {percent(found['zeros_real'], 0)} %"
    )
    said += (
        f": {times(gain)} times as fast is obtained."
        if gain >= NO_GAIN
        else f": nothing of it is obtained ({times(gain)} times)."
    )
    if answer["pruned"]:
        rows = answer["pruned"]
        said += (
            f" With {listed([percent(r['sparsity'], 0) for r in rows])} % of each layer's inputs set to zero "
            f"the accuracy is {listed([percent(r['accuracy']) for r in rows])} %, of "
            f"{percent(rows[0]['original_accuracy'])} % (n = {rows[0]['num_samples']:,})."
        )
    return said


def activity_svg(answer: Answer) -> str:
    """The figure as one SVG document, legible on light and dark grounds. Raises MissingExtraError
    without matplotlib."""
    return _drawn(_plot(answer))


def activity_page(answer: Answer) -> str:
    """Figure, tables and conclusion as one HTML file. Raises MissingExtraError without matplotlib."""
    plot = _plot(answer)
    subject = f"{clean(answer['model'])} on {clean(answer['data'])}"
    found = answer["obtained"]
    highlight = Highlight(
        subject,
        f"{percent(answer['macs_zero'], 0)} % of the multiplications are by zero",
        (conclusion(answer),),
        (
            (times(answer["potential_speedup"]), "times as fast if they cost nothing"),
            (times(found["speedup"]), f"times, obtained on {clean(found['real']['engine'])}"),
        ),
    )
    section = Section(
        "layers",
        "Layer by layer",
        "What each layer reads, and what comes back to it. Zeros are exact ones; multiplications by "
        "the zeros of padding are not counted.",
        (_table(answer), *([_pruned(answer)] if answer["pruned"] else [])),
        (plot,),
    )
    document = Document(
        f"Tersor: activity of {subject}",
        (highlight,),
        _conditions(answer),
        (section,),
        "Made by tersor activity.",
    )
    return page(document, {file_name(plot): _drawn(plot)})


def _conditions(answer: Answer) -> str:
    real = answer["obtained"]["real"]
    said = (
        f"Over {count(answer['num_images'], 'training image')}; gradients over "
        f"{count(answer['num_gradient_images'], 'image')}, of the cross-entropy with "
        f"{clean(answer['gradients_from'])}. Times: {clean(real['engine'])}, "
        f"{count(real['threads'], 'thread')}, median of {count(real['repeats'], 'run')} of each, interleaved; "
        "the dense twin has the same operations and shapes, with other weights."
    )
    if answer["unreached"]:
        names = ", ".join(clean(name) for name in answer["unreached"])
        said += f" Not called as layers, and so not counted: {names}."
    return said


def _table(answer: Answer) -> Table:
    thresholds = list(answer["layers"][0]["input_density"]) if answer["layers"] else []
    columns = [Column("layer", right=False), Column("MACs, %"), Column("inputs of zero, %")]
    columns += [Column(f"over {t} rms", group="inputs, %") for t in thresholds]
    columns += [Column("weights of zero, %"), Column("by zero, %", group="MACs")]
    columns += [Column("as evaluated", group="gradients of zero, %")]
    columns += [Column("in training", group="gradients of zero, %"), Column("top 1 % holds, %")]
    total = max(sum(layer["macs"] for layer in answer["layers"]), 1)
    rows = []
    for layer in answer["layers"]:
        shares = [layer["macs"] / total, layer["input_zeros"]]
        shares += [layer["input_density"][t] for t in thresholds]
        shares += [layer["weight_zeros"], layer["macs_zero"]]
        shares += [layer["gradient_zeros"], layer["gradient_zeros_training"], layer["gradient_top"]]
        rows.append((clean(layer["layer"]), *(percent(share, 1) for share in shares)))
    notes = (
        "rms: the root mean square of what a layer reads of one image. In training batch norm takes the "
        "statistics of the batch, through which every gradient reaches every value. The last column is the "
        "share of a weight gradient's squared norm that its largest hundredth holds.",
    )
    return Table("table-activity", "Zeros by layer", tuple(columns), tuple(rows), notes)


def _pruned(answer: Answer) -> Table:
    columns = ("inputs set to zero, %", "accuracy, %", "difference (95 %), points", "images")
    rows = tuple(
        (
            percent(row["sparsity"], 0),
            percent(row["accuracy"]),
            _interval(row),
            count(row["num_samples"]),
        )
        for row in answer["pruned"]
    )
    title = f"Activations pruned by {clean(answer['pruned'][0]['method'])}, without training"
    return Table("table-pruned", title, tuple(Column(name) for name in columns), rows)


def _interval(row: Answer) -> str:
    held = row["interval"]
    ends = f"{signed(held['low_pt'])} to {signed(held['high_pt'])}"
    return f"{signed(held['difference_pt'])}, {ends}"


def _plot(answer: Answer) -> Plot:
    layers = answer["layers"]
    lines = tuple(
        Line(label, tuple((100 * layer[key], float(i)) for i, layer in enumerate(layers)))
        for key, label in SERIES_SHOWN
    )
    return Plot(
        "activity",
        f"What is zero inside · {clean(answer['model'])}",
        f"Exact zeros over {count(answer['num_images'], 'training image')}; gradients of each layer's output with "
        "batch norm as in evaluation. With dense weights the first two marks all but coincide. Layers in the "
        "order of the network.",
        "share, %",
        lines=lines,
        categories=tuple(clean(layer["layer"]) for layer in layers),
        limits=(0.0, 100.0),
    )


def _drawn(plot: Plot) -> str:
    """A line a layer, a mark a share."""
    require_matplotlib()
    from matplotlib.figure import Figure

    with figure_settings():
        height = 1.15 + LAYER_INCH * len(plot.categories)
        figure = Figure(figsize=(LINES_INCH, height), layout="constrained")
        axes = figure.add_subplot()
        for number in range(len(plot.categories)):
            own = [x for line in plot.lines for x, y in line.points if y == number]
            axes.plot([min(own), max(own)], [number] * 2, color=QUIET, linewidth=1.0, zorder=2)
        for place, line in enumerate(plot.lines):
            style = {**MEASURED, "color": SERIES[place], "linestyle": "none"}
            style["marker"] = MARKERS[place]
            xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
            axes.plot(xs, ys, label=line.label, zorder=4, clip_on=False, **style)
        _dress(axes, plot)
        drawn = svg_text(figure)
    return finished(drawn, plot.key, plot.title, plot.caption)


def _dress(axes: Any, plot: Plot) -> None:
    """Axes, names and legend."""
    axes.set_xlim(*plot.limits)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(plot.x_label)
    rows_of_names(axes, plot.categories)
    axes.tick_params(axis="x", length=3, width=0.7)
    axes.figure.legend(
        loc="outside upper left", ncols=3, frameon=False, fontsize=9, handletextpad=0.2
    )
