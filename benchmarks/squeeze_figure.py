"""The figure of bytes against accuracy, from the rows of squeeze.py."""

from __future__ import annotations

from network_names import piece_name

# (what, colour, line and marker, which rows)
SERIES = (
    (
        "codes alone: no training, no labels",
        "#1d4ed8",
        "o-",
        lambda r: piece_name(r) and not r["epochs"],
    ),
    (
        "pruned, trained, then coded",
        "#0e7490",
        "P-",
        lambda r: piece_name(r) and "network=" in r["form"],
    ),
    (
        "trained with the size in it",
        "#15803d",
        "s-",
        lambda r: piece_name(r) and r["epochs"] and "network=" not in r["form"],
    ),
    ("Deep Compression, no training", "#b45309", "v", lambda r: is_deep(r) and not r["epochs"]),
    ("Deep Compression, trained", "#7c2d12", "^", lambda r: is_deep(r) and r["epochs"]),
    ("8-bit codes in gzip or zstd", "#6b7280", "X", lambda r: r["form"] in ("gzip", "zstd")),
)
# Points: our smallest files that lose no more stand beside the published ones.
SHOWN_LOSSES = (0.2, 0.5)


def is_deep(row):
    return row["form"].startswith("deep")


def pyplot_words():
    """Letters as outlines, so that the figure is the same everywhere, and the same bytes each time."""
    from matplotlib import rc_context

    return rc_context({"svg.hashsalt": "tersor"})


def drawn(told):
    """Points lost against bytes, one panel a network; published sizes of other networks below, hollow."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in told["rows"]))
    points = beside(told)
    height = 1.1 + 0.24 * len(points)
    figure = Figure(figsize=(5.4 * max(len(models), 2), 4.4 + height), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4.4, height))
    for model, axes in zip(models, upper.subplots(1, len(models), squeeze=False)[0], strict=True):
        draw_curve([row for row in told["rows"] if row["model"] == model], axes)
    pairs = [axes.get_legend_handles_labels() for axes in upper.axes]
    found = {
        label: mark for marks, labels in pairs for mark, label in zip(marks, labels, strict=True)
    }
    upper.legend(
        found.values(), found.keys(), fontsize=8, loc="outside upper center", ncols=5, frameon=False
    )
    draw_points(points, lower.subplots())
    return figure


def draw_curve(rows, axes):
    for label, colour, style, belongs in SERIES:
        some = sorted((r for r in rows if belongs(r)), key=lambda r: r["size_bytes"])
        if not some:
            continue
        change = [r["interval"]["difference_pt"] for r in some]
        errors = [
            [c - r["interval"]["low_pt"] for c, r in zip(change, some, strict=True)],
            [r["interval"]["high_pt"] - c for c, r in zip(change, some, strict=True)],
        ]
        sizes = [r["size_bytes"] / 1e6 for r in some]
        axes.errorbar(
            sizes, change, errors, fmt=style, color=colour, capsize=2, markersize=5, label=label
        )
    size_axis(axes, [r["size_bytes"] / 1e6 for r in rows])
    axes.set_yscale("symlog", linthresh=1, linscale=2)
    ticks = [-64, -16, -4, -2, -1, -0.5, 0, 0.5, 1]
    axes.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axes.set_ylim(min(-1, 1.6 * min(r["interval"]["low_pt"] for r in rows)), 1)
    axes.minorticks_off()
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("accuracy against float, points")
    first = rows[0]
    axes.set_title(
        f"{first['model']} on {first['data']}, n = {first['num_samples']:,}\n"
        f"float: {first['float_accuracy']:.2%} in {first['float_bytes'] / 1e6:.1f} MB",
        fontsize=10,
    )


def beside(told):
    """(label, bytes, what stands beside the mark, published?) of published sizes and of our smallest files that
    lose no more than SHOWN_LOSSES, the largest first."""
    points = [
        (
            f"{p['form']}, {p['model']} ({p['source']})",
            p["size_bytes"],
            f"{p['accuracy_percent']:.1f} %",
            True,
        )
        for p in told["published"]
    ]
    for model in dict.fromkeys(row["model"] for row in told["rows"]):
        held = {id(row): row for row in (smallest(told, model, x) for x in SHOWN_LOSSES) if row}
        for row in held.values():
            lost = row["interval"]["difference_pt"]
            text = f"{row['accuracy']:.2%}: {lost:+.2f} points against float"
            points.append((f"Tersor, {model}", row["size_bytes"], text, False))
    return sorted(points, key=lambda point: -point[1])


def smallest(told, model, loss_pt):
    """Of the network's Tersor files that lose at most so many points the smallest row; None if there is none."""
    rows = (r for r in told["rows"] if r["model"] == model and piece_name(r))
    right = [r for r in rows if r["interval"]["difference_pt"] >= -loss_pt]
    return min(right, key=lambda r: r["size_bytes"], default=None)


def draw_points(points, axes):
    sizes = [size / 1e6 for _, size, *_ in points]
    for place, (_, size, text, foreign) in enumerate(points):
        face, edge = ("white", "black") if foreign else ("#1d4ed8", "#1d4ed8")
        axes.plot(size / 1e6, place, "D", markersize=6, markerfacecolor=face, markeredgecolor=edge)
        axes.annotate(
            text,
            (size / 1e6, place),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set_yticks(range(len(points)), [label for label, *_ in points], fontsize=8)
    axes.set_ylim(len(points) - 0.3, -0.7)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    size_axis(axes, sizes, right=8)
    axes.set_title(
        "Hollow: published, not measured here (other networks and trainings, the original CIFAR-10). "
        "Filled: ours, as above",
        fontsize=10,
        loc="right",
    )


def size_axis(axes, sizes, right=1.6):
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * right)
    wide = max(sizes) / min(sizes) > 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.minorticks_off()
    axes.set_xlabel("file, MB (10^6 bytes)")
