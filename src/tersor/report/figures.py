"""Plots to SVG by matplotlib: the same plot gives the same bytes, and a page's colours reach into
it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tersor.errors import missing_extra
from tersor.report.document import Bars, Plot
from tersor.report.svg import GROUND, INK, QUIET, RULE, SERIES, finished
from tersor.report.words import MISSING, clean

# One marker and one dash pattern a series: distinct in black and white, and without sight of
# colour.
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), "-", "-")
# Names lie over the axes and must not push them about.
SMALL: dict[str, Any] = {"fontsize": 9, "in_layout": False}
MEASURED: dict[str, Any] = {
    "linewidth": 1.9,
    "markersize": 6,
    "markeredgecolor": GROUND,
    "markeredgewidth": 0.8,
}
REFERENCE: dict[str, Any] = {
    "color": QUIET,
    "linestyle": (0, (4, 3)),
    "linewidth": 1.2,
    "marker": "x",
    "markersize": 5,
}
DIAMOND: dict[str, Any] = {
    "marker": "D",
    "markersize": 5.5,
    "markerfacecolor": GROUND,
    "markeredgecolor": INK,
    "markeredgewidth": 1.1,
    "linestyle": "none",
}
HATCHES = ("", "////", "....", "xxxx")
LINES_INCH, BARS_INCH = 5.2, 3.9
LONGEST_LABEL = 54  # characters; the whole name stands in the table
VALUES_SHARE = 1.45  # of the longest bar: what lies right of it is the column of values


def file_name(plot: Plot) -> str:
    """The plot's file: its key with every character but letters, digits, dot and dash made a
    dash."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", plot.key).strip("-.") + ".svg"


def require_matplotlib() -> None:
    """Raise MissingExtraError without matplotlib: before long work, not at its end."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", "report", "drawing the figures of a report") from None


def draw(plot: Plot) -> str:
    """`plot` as one SVG document. Raises MissingExtraError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    with figure_settings():
        height = 3.6 if plot.lines else 0.95 + _bars_height(plot)
        width = LINES_INCH if plot.lines else BARS_INCH
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        if plot.lines:
            _draw_lines(axes, plot)
        else:
            _draw_bars(axes, plot)
        for side in ("top", "right") if plot.lines else ("top", "right", "bottom", "left"):
            axes.spines[side].set_visible(False)
        axes.set_axisbelow(True)
        drawn = svg_text(figure)
    return finished(drawn, file_name(plot).removesuffix(".svg"), plot.title, plot.caption)


def svg_text(figure: Any) -> str:
    """`figure` as SVG, the same bytes for the same figure; inside `figure_settings`."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    return buffer.getvalue()


@contextmanager
def figure_settings() -> Iterator[None]:
    """matplotlib's own defaults under ours: a user's matplotlibrc must not change a report."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # The text stays text: what matplotlib's own font lacks is drawn in the reader's.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "tersor",
                "font.family": "DejaVu Sans",
                "font.size": 9.5,
                "text.color": INK,
                "axes.labelcolor": INK,
                "axes.edgecolor": QUIET,
                "xtick.color": QUIET,
                "ytick.color": QUIET,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "grid.color": RULE,
                "grid.linewidth": 0.7,
                "axes.linewidth": 0.7,
                "hatch.linewidth": 0.8,
                "text.parse_math": False,
            }
        )
        yield


def _draw_lines(axes: Any, plot: Plot) -> None:
    drawn = 0
    for line in plot.lines:
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        if line.reference:
            axes.plot(xs, ys, label=shown_label(line.label), zorder=2, **REFERENCE)
            continue
        color = SERIES[drawn % len(SERIES)]
        marker, dash = MARKERS[drawn % len(MARKERS)], DASHES[drawn % len(DASHES)]
        style = {"color": color, "marker": marker, "linestyle": dash, **MEASURED}
        axes.plot(xs, ys, label=shown_label(line.label), zorder=4, **style)
        for (x, _), ends in zip(line.points, line.spans, strict=True):
            if ends:
                axes.plot([x, x], ends, color=color, linewidth=1.1, zorder=3)
        drawn += 1
    low, high = plot.limits
    axes.set_ylim(low, high + 0.02 * (high - low))
    axes.set_yticks(
        [low + i * (high - low) / 5 for i in range(6)] if low == 0 else _whole(low, high)
    )
    axes.set_xticks(sorted({x for line in plot.lines for x, _ in line.points}))
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(axis="y")
    axes.tick_params(length=3, width=0.7)
    axes.figure.legend(
        loc="outside upper left", ncols=2, frameon=False, handlelength=3.2, columnspacing=1.5
    )


def _whole(low: float, high: float) -> list[float]:
    return [float(value) for value in range(int(low), int(high) + 1)]


def _bars_height(plot: Plot) -> float:
    return len(plot.categories) * (0.3 + 0.19 * len(plot.bars))


def _draw_bars(axes: Any, plot: Plot) -> None:
    """Horizontal bars, a name above each group: long names stay readable on a narrow screen."""
    from matplotlib.ticker import MaxNLocator

    top = plot.limits[1] or _largest(plot)
    step = len(plot.bars) * 0.62 + 0.95
    has_reference = False
    for number, name in enumerate(plot.categories):
        axes.text(0, number * step - 0.42, shown_label(name), va="bottom", ha="left", **SMALL)
        for place, series in enumerate(plot.bars):
            y = number * step + place * 0.62
            has_reference |= _draw_bar(axes, series, number, y, place, top)
    axes.set_ylim(len(plot.categories) * step - 0.95, -1.05)
    axes.set_xlim(0, top * VALUES_SHARE)
    axes.set_yticks([])
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top)
    axes.set_xticks([t for t in ticks if t <= top * 1.001])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel(plot.x_label)
    axes.grid(axis="x")
    axes.tick_params(length=0)
    _bars_legend(axes, plot, has_reference)


def _draw_bar(axes: Any, series: Bars, number: int, y: float, place: int, top: float) -> bool:
    """One bar, its value in words behind it, the study's value as an open diamond. True: it has
    one."""
    value = series.values[number]
    if value is None:
        axes.text(0.01 * top, y, MISSING, va="center", fontstyle="italic", **SMALL)
        return False
    axes.barh(
        y,
        value,
        height=0.5,
        color=SERIES[place % len(SERIES)],
        hatch=HATCHES[place % len(HATCHES)],
        edgecolor=GROUND,
        linewidth=0.0,
        zorder=3,
    )
    end = axes.get_yaxis_transform()
    axes.text(
        1, y, shown_label(series.texts[number]), va="center", ha="right", fontsize=9, transform=end
    )
    reference = series.references[number] if series.references else None
    if reference is None:
        return False
    axes.plot([reference], [y], zorder=5, **DIAMOND)
    return True


def _bars_legend(axes: Any, plot: Plot, has_reference: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if len(plot.bars) > 1:
        for place, series in enumerate(plot.bars):
            handles.append(
                Patch(
                    facecolor=SERIES[place % len(SERIES)],
                    edgecolor=GROUND,
                    linewidth=0.0,
                    hatch=HATCHES[place % len(HATCHES)],
                    label=shown_label(series.label),
                )
            )
    if has_reference:
        handles.append(Line2D([], [], label="study", **DIAMOND))
    if handles:
        axes.figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=len(handles),
            frameon=False,
            fontsize=8.5,
        )


def _largest(plot: Plot) -> float:
    values = [v for series in plot.bars for v in series.values if v is not None]
    values += [v for series in plot.bars for v in series.references if v is not None]
    return max(values, default=0) or 1.0


def rows_of_names(axes: Any, names: Sequence[str]) -> None:
    """A row for each of `names`, downwards, on an axes with a grid and no frame but the line below."""
    axes.set_yticks(range(len(names)), [shown_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="both", which="major")
    axes.tick_params(axis="y", length=0)


def shown_label(text: str) -> str:
    """A label of one line that fits, without the leading underscore that matplotlib hides."""
    cleaned = clean(text)
    if len(cleaned) > LONGEST_LABEL:
        cleaned = cleaned[: LONGEST_LABEL - 1] + "…"
    return f"\u200b{cleaned}" if cleaned.startswith("_") else cleaned
