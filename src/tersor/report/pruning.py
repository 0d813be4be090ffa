"""Table 4.1 and Figure 4.1: accuracy over sparsity, and the files of the pruned forms."""

from __future__ import annotations

import math

from tersor.report.document import Column, Line, Plot, Section, Table
from tersor.report.measurements import RECOVERIES, Accuracy, Measurements, Network
from tersor.report.reference import PRUNED, STUDY
from tersor.report.words import (
    MISSING,
    NONE,
    SCOPE_DETAILS,
    SCOPES,
    clean,
    count,
    mib,
    network_title,
    percent,
    signed,
    span,
    times,
)
from tersor.report.words import RECOVERIES as RECOVERY_TITLES

LOSS_LIMITS = (-3.0, 1.0)


def pruning_sections(found: Measurements) -> list[Section]:
    """One section for every network whose pruned forms are a study of several sparsities."""
    sections = []
    for index, network in enumerate(found.networks):
        if not found.is_sweep(network):
            continue
        scopes = _scopes(found, network)
        tables = [_accuracy_table(found, network, scope, index) for scope in scopes]
        tables.append(_size_table(found, network, scopes, index))
        plots = [_plot(found, network, scope, index) for scope in scopes]
        losses = (_loss_plot(found, network, scope, index) for scope in scopes)
        plots += [plot for plot in losses if plot is not None]
        sections.append(
            Section(
                f"pruning-{index}",
                f"Pruning {network_title(network)}",
                "Unstructured pruning by L1 norm, over all convolutional and linear layers. "
                "Sparsity is the "
                "share of weights removed.",
                tuple(tables),
                tuple(plots),
            )
        )
    return sections


def pruned(
    found: Measurements, network: Network, scope: str, sparsity: float, recovery: str
) -> Accuracy | None:
    """The score of one pruned form, on the preferred engine where several ran it."""
    known = found.best_known(
        network, variant="pruned", scope=scope, sparsity=sparsity, recovery=recovery
    )
    return known[1] if known else None


def _scopes(found: Measurements, network: Network) -> list[str]:
    present = {
        form.scope
        for form in found.forms(network)
        if form.variant == "pruned" and form.sparsity > 0
    }
    wanted = {"layer", "global"} if network.family else present
    return sorted(wanted | present, key=lambda scope: (scope != "layer", scope))


def _sparsities(found: Measurements, network: Network) -> list[float]:
    asked = [s for s in PRUNED.get(network.family, {}) if s > 0]
    return sorted({*asked, *(s for s in found.sparsities(network) if s > 0)})


def _recoveries(found: Measurements, network: Network) -> list[str]:
    present = {form.recovery for form in found.forms(network) if form.variant == "pruned"}
    extra = sorted(present - set(RECOVERIES) - {""})
    return (
        [*RECOVERIES, *extra] if network.family else [r for r in RECOVERIES if r in present] + extra
    )


def _accuracy_table(found: Measurements, network: Network, scope: str, index: int) -> Table:
    recoveries = _recoveries(found, network)
    study = PRUNED.get(network.family, {})
    columns = [Column("sparsity %", right=False)]
    for recovery in recoveries:
        group = RECOVERY_TITLES.get(recovery, recovery)
        columns += [Column("accuracy %", group), Column("difference, pt", group)]
    if study:
        columns.append(Column("one-shot, accuracy %", STUDY))
    baseline = found.best_known(network, variant="float")
    base = baseline[1] if baseline else None
    first = ["0 (float32)"]
    for _ in recoveries:
        first += [percent(base.accuracy) if base else MISSING, NONE]
    rows = [tuple(first + ([percent(study[0.0])] if study else []))]
    for sparsity in _sparsities(found, network):
        cells = [percent(sparsity, 0)]
        for recovery in recoveries:
            score = pruned(found, network, scope, sparsity, recovery)
            cells += [percent(score.accuracy) if score else MISSING, span(score)]
        if study:
            cells.append(percent(study[sparsity]) if sparsity in study else NONE)
        rows.append(tuple(cells))
    return Table(
        f"table-4-1-{index}-{scope or 'all'}",
        f"Table 4.1 · {network_title(network)}, pruned {_scope_words(scope)}",
        tuple(columns),
        tuple(rows),
        (_interval_note(found, network),),
    )


def _scope_words(scope: str) -> str:
    known = scope in SCOPE_DETAILS
    return f"{SCOPES[scope]} ({SCOPE_DETAILS[scope]})" if known else scope


def _interval_note(found: Measurements, network: Network) -> str:
    scores = [score for form in found.forms(network) if (score := found.score(network, form))]
    levels = sorted({s.level for s in scores if s.level is not None})
    level = " and ".join(f"{percent(value, 0)} %" for value in levels)
    samples = " and ".join(count(n) for n in sorted({s.num_samples for s in scores}))
    note = "Difference from the float32 network on the same images, in percentage points"
    note += f", with its paired {level} interval" if level else ""
    note += f"; {samples} test images." if samples else "."
    other = {
        form.precision
        for form in found.forms(network)
        if form.variant == "pruned" and form.precision
    }
    if other:
        note += f" Pruned networks were judged in {clean(min(other))} in PyTorch, the float32 network in its file"
        note += " on ONNX Runtime."
    seeds = max((s.num_seeds for s in scores), default=1)
    if seeds > 1:
        note += f" Forms with several seeds (up to {seeds}): means, and the widest span of"
        note += " their intervals."
    return note


def _size_table(found: Measurements, network: Network, scopes: list[str], index: int) -> Table:
    recoveries = _recoveries(found, network)
    columns = [Column("sparsity %", right=False)]
    for scope in scopes:
        columns += [Column(RECOVERY_TITLES.get(r, r), f"{scope}, MiB") for r in recoveries]
        columns.append(Column("times smaller", f"{scope}, MiB"))
    baseline = found.best_known(network, variant="float")
    base = found.size_bytes(network, baseline[0]) if baseline else None
    rows = []
    for sparsity in _sparsities(found, network):
        cells = [percent(sparsity, 0)]
        for scope in scopes:
            scores = [pruned(found, network, scope, sparsity, r) for r in recoveries]
            sizes = [s.size_bytes if s else None for s in scores]
            cells += [mib(value) for value in sizes]
            last = next((value for value in reversed(sizes) if value), None)
            cells.append(times(base / last) if base and last else MISSING)
        rows.append(tuple(cells))
    return Table(
        f"pruned-files-{index}",
        f"Files of the pruned forms of {network_title(network)}",
        tuple(columns),
        tuple(rows),
        (
            "Bytes of the real file on disk in MiB (2^20 bytes); the float32 file: "
            f"{mib(base) + ' MiB' if base else MISSING}. "
            "“Times smaller” compares with that file, for the last measured column of the scope.",
        ),
    )


def _plot(found: Measurements, network: Network, scope: str, index: int) -> Plot:
    baseline = found.best_known(network, variant="float")
    base = baseline[1].accuracy if baseline else None
    lines = []
    for recovery in _recoveries(found, network):
        points: list[tuple[float, float]] = [] if base is None else [(0.0, 100 * base)]
        spans: list[tuple[float, float] | None] = [None for _ in points]
        for sparsity in _sparsities(found, network):
            score = pruned(found, network, scope, sparsity, recovery)
            if score is None:
                points.append((100 * sparsity, math.nan))
                spans.append(None)
                continue
            points.append((100 * sparsity, 100 * score.accuracy))
            ends = None
            if base is not None and score.low_pt is not None and score.high_pt is not None:
                ends = (100 * base + score.low_pt, 100 * base + score.high_pt)
            spans.append(ends)
        if any(x > 0 and math.isfinite(y) for x, y in points):
            label = RECOVERY_TITLES.get(recovery, recovery)
            lines.append(Line(label, tuple(points), tuple(spans)))
    study = PRUNED.get(network.family)
    if study:
        reference = tuple((100 * s, 100 * accuracy) for s, accuracy in study.items())
        lines.append(Line("study, one-shot", reference, reference=True))
    title = f"{network_title(network)}, {_scope_words(scope)}"
    last = [(line.label, [p for p in line.points if math.isfinite(p[1])][-1]) for line in lines]
    ends_at = "; ".join(f"{label}: {y:.1f} % at {x:.0f} % removed" for label, (x, y) in last)
    return Plot(
        f"pruning-{network.model}-{scope or 'all'}-{index}",
        f"Figure 4.1 · {title}",
        f"Accuracy over the share of weights removed. {ends_at}.",
        "weights removed, %",
        "accuracy, %",
        tuple(lines),
        limits=(0.0, 100.0),
    )


def _loss_plot(found: Measurements, network: Network, scope: str, index: int) -> Plot | None:
    """The same near the float network's accuracy, where the lines of an overview cover each
    other."""
    low, high = LOSS_LIMITS
    lines = []
    for recovery in _recoveries(found, network):
        points: list[tuple[float, float]] = [(0.0, 0.0)]
        spans: list[tuple[float, float] | None] = [None]
        for sparsity in _sparsities(found, network):
            score = pruned(found, network, scope, sparsity, recovery)
            if score is None or score.difference_pt is None:
                points.append((100 * sparsity, math.nan))
                spans.append(None)
                continue
            points.append((100 * sparsity, score.difference_pt))
            low_pt, high_pt = score.low_pt, score.high_pt
            spans.append(None if low_pt is None or high_pt is None else (low_pt, high_pt))
        if any(math.isfinite(y) for _, y in points[1:]):
            lines.append(Line(RECOVERY_TITLES.get(recovery, recovery), tuple(points), tuple(spans)))
    if not any(low <= y <= high for line in lines for _, y in line.points[1:]):
        return None
    return Plot(
        f"pruning-{network.model}-{scope or 'all'}-loss-{index}",
        f"Figure 4.1, enlarged · {network_title(network)}, {_scope_words(scope)}",
        f"Difference from float32 in points, between {signed(low, 0)} and {signed(high, 0)}; "
        f"upright lines "
        "are paired intervals. What loses more leaves the picture below.",
        "weights removed, %",
        "difference, pt",
        tuple(lines),
        limits=LOSS_LIMITS,
    )
