"""Table 4.2 and Figure 4.3: size, accuracy and CPU time of every form, and the lists behind
them."""

from __future__ import annotations

from tersor.report.document import Bars, Column, Plot, Section, Table
from tersor.report.measurements import Form, Measurements, Network, Time
from tersor.report.reference import QUANTIZED, STUDY, Quantized
from tersor.report.words import (
    MISSING,
    NONE,
    count,
    engine_title,
    form_title,
    mib,
    milliseconds,
    network_title,
    percent,
    signed,
    span,
    times,
)


def form_sections(found: Measurements) -> list[Section]:
    """One section for every network with a form to compare."""
    sections = []
    for index, network in enumerate(found.networks):
        forms = shown_forms(found, network)
        if not forms:
            continue
        quantized = any(f.variant not in ("float", "pruned") for f in forms)
        title = "Quantizing" if quantized and found.is_sweep(network) else "The forms of"
        sections.append(
            Section(
                f"forms-{index}",
                f"{title} {network_title(network)}",
                "What a form costs and what it gives. float32 on ONNX Runtime stands beside the "
                "int8 forms, "
                "so that no speed-up of the engine is credited to quantization."
                if quantized
                else "",
                (_forms_table(found, network, forms, index),),
                tuple(_plots(found, network, forms, index)),
            )
        )
    return sections


def shown_forms(found: Measurements, network: Network) -> list[Form]:
    """The forms that get a line: all of them, but of a pruning study only those that were timed."""
    forms = found.forms(network)
    if not found.is_sweep(network):
        return forms
    timed = {form for n, form, _, _ in found.timing if n == network}
    return [form for form in forms if form.variant != "pruned" or form in timed]


def _forms_table(found: Measurements, network: Network, forms: list[Form], index: int) -> Table:
    batches, study = found.batches(network), QUANTIZED.get(network.family, {})
    sizes = [found.size_bytes(network, form) for form in forms]
    in_mib = max((s for s in sizes if s is not None), default=0) >= 2**20
    columns = [
        Column("form", right=False),
        Column("engine", right=False),
        Column("MiB" if in_mib else "bytes", "file"),
        Column("times smaller", "file"),
        Column("%", "accuracy"),
        Column("difference, pt", "accuracy"),
    ]
    for batch in batches:
        columns += [
            Column("median ms", f"CPU time, batch {batch}"),
            Column("% of eager", f"CPU time, batch {batch}"),
        ]
    if study:
        columns += [Column("MiB", STUDY), Column("accuracy %", STUDY), Column("CPU time %", STUDY)]
    baseline = found.best_known(network, variant="float")
    base = found.size_bytes(network, baseline[0]) if baseline else None
    rows = []
    for form, size_bytes in zip(forms, sizes, strict=True):
        score = found.score(network, form)
        is_baseline = form.variant == "float" and baseline is not None and form == baseline[0]
        cells = [
            form_title(form, with_engine=False),
            engine_title(form.engine) or NONE,
            mib(size_bytes) if in_mib else count(size_bytes),
            times(base / size_bytes) if base and size_bytes else MISSING,
            percent(score.accuracy) if score else MISSING,
            NONE if is_baseline and score and score.difference_pt is None else span(score),
        ]
        for batch in batches:
            time = found.time(network, form, batch)
            cells += [milliseconds(time.median_ms) if time else MISSING, _share(time)]
        if study:
            cells += _study_cells(network, form)
        rows.append(tuple(cells))
    prefix = "Table 4.2 · " if study else ""
    return Table(
        f"forms-table-{index}",
        f"{prefix}{network_title(network)}: size, accuracy and CPU time",
        tuple(columns),
        tuple(rows),
        (_forms_note(found, network, forms),),
    )


def _share(time: Time | None) -> str:
    return percent(time.ratio, 1) if time and time.ratio is not None else MISSING


def _study_cells(network: Network, form: Form) -> list[str]:
    known = _study_reference(network, form)
    if known is None:
        return [NONE, NONE, NONE]
    return [f"{known.size_mib:.2f}", percent(known.accuracy), percent(known.time_share)]


def _forms_note(found: Measurements, network: Network, forms: list[Form]) -> str:
    scores = [score for form in forms if (score := found.score(network, form))]
    levels = sorted({s.level for s in scores if s.level is not None})
    samples = sorted({s.num_samples for s in scores})
    note = "File: bytes on disk. Difference: from the float32 network on the same images, in points"
    if levels:
        note += (
            ", with its paired " + " and ".join(f"{percent(v, 0)} %" for v in levels) + " interval"
        )
    if samples:
        note += f" ({' and '.join(count(n) for n in samples)} test images)"
    threads = found.threads(network)
    if threads:
        note += (
            f". CPU time: median of interleaved runs after warm-up, {count(threads, 'thread')}; "
            "“% of eager” is the share of PyTorch's eager float32 at the same batch"
        )
    return note + "."


def _plots(found: Measurements, network: Network, forms: list[Form], index: int) -> list[Plot]:
    labels = tuple(form_title(form) for form in forms)
    study = [_study_reference(network, form) for form in forms]
    title = network_title(network)
    prefix = "Figure 4.3 · " if network.family else ""
    sizes = [found.size_bytes(network, form) for form in forms]
    unit = 2**20 if max((s for s in sizes if s is not None), default=0) >= 2**20 else 1
    unit_title = "MiB" if unit > 1 else "bytes"
    scores = [found.score(network, form) for form in forms]
    plots = [
        Plot(
            f"size-{network.model}-{index}",
            f"{prefix}{title}, file size",
            f"Bytes of the file on disk, {unit_title}; less is better.",
            f"file size, {unit_title}",
            categories=labels,
            bars=(
                Bars(
                    "measured",
                    tuple(None if s is None else s / unit for s in sizes),
                    tuple(mib(s) if unit > 1 else count(s) for s in sizes),
                    tuple(None if r is None or unit == 1 else r.size_mib for r in study),
                ),
            ),
        ),
        Plot(
            f"accuracy-{network.model}-{index}",
            f"{prefix}{title}, accuracy",
            "Top-1 accuracy on the test images; in brackets the difference from float32, in "
            "points.",
            "accuracy, %",
            categories=labels,
            bars=(
                Bars(
                    "measured",
                    tuple(100 * s.accuracy if s else None for s in scores),
                    tuple(
                        MISSING
                        if s is None
                        else percent(s.accuracy)
                        + (f"  ({signed(s.difference_pt)})" if s.difference_pt is not None else "")
                        for s in scores
                    ),
                    tuple(None if r is None else 100 * r.accuracy for r in study),
                ),
            ),
            limits=(0, 100),
        ),
    ]
    time = _time_plot(found, network, forms, index, labels)
    return [*(p for p in plots if _measured(p)), *([time] if time else [])]


def _time_plot(
    found: Measurements, network: Network, forms: list[Form], index: int, labels: tuple[str, ...]
) -> Plot | None:
    bars = []
    for batch in found.batches(network):
        measured = [found.time(network, form, batch) for form in forms]
        shares = tuple(100 * t.ratio if t and t.ratio is not None else None for t in measured)
        texts = tuple(f"{_share(t)} %" if t and t.ratio is not None else MISSING for t in measured)
        study = tuple(
            None if (r := _study_reference(network, f)) is None else 100 * r.time_share
            for f in forms
        )
        bars.append(Bars(f"batch {batch}", shares, texts, study))
    prefix = "Figure 4.3 · " if network.family else ""
    plot = Plot(
        f"time-{network.model}-{index}",
        f"{prefix}{network_title(network)}, CPU time",
        "Median CPU time of one batch as a share of PyTorch's eager float32; less is better.",
        "CPU time, % of eager float32",
        categories=labels,
        bars=tuple(bars),
    )
    return plot if bars and _measured(plot) else None


def _study_reference(network: Network, form: Form) -> Quantized | None:
    """The study ran PyTorch: its float network stands beside ours on that engine, its int8 beside
    any."""
    known = QUANTIZED.get(network.family, {}).get(form.variant)
    if known is None or form.sparsity or (form.variant == "float" and form.engine != "torch"):
        return None
    return known


def _measured(plot: Plot) -> bool:
    return any(value is not None for series in plot.bars for value in series.values)
