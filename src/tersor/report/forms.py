"""Table 4.2 and Figure 4.3: size, accuracy and CPU time of every form, and the lists behind
them."""

from __future__ import annotations

from tersor.report.document import Bars, Column, Plot, Section, Table
from tersor.report.measurements import Accuracy, Form, Measurements, Network, Time
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
    in_mib = _in_mib(found, network, forms)
    rows = tuple(_forms_row(found, network, form, in_mib) for form in forms)
    prefix = "Table 4.2 · " if network.family else ""
    return Table(
        f"forms-table-{index}",
        f"{prefix}{network_title(network)}: size, accuracy and CPU time",
        _forms_columns(found, network, in_mib),
        rows,
        (_forms_note(found, network, forms),),
    )


def _in_mib(found: Measurements, network: Network, forms: list[Form]) -> bool:
    """Whether sizes read better in MiB than in bytes."""
    sizes = (found.size_bytes(network, form) for form in forms)
    return max((size for size in sizes if size is not None), default=0) >= 2**20


def _forms_columns(found: Measurements, network: Network, in_mib: bool) -> tuple[Column, ...]:
    columns = [
        Column("form", right=False),
        Column("engine", right=False),
        Column("MiB" if in_mib else "bytes", "file"),
        Column("times smaller", "file"),
        Column("%", "accuracy"),
        Column("difference, pt", "accuracy"),
    ]
    for batch in found.batches(network):
        group = f"CPU time, batch {batch}"
        columns += [Column("median ms", group), Column("% of eager", group)]
    if network.family:
        columns += [Column(head, STUDY) for head in ("MiB", "accuracy %", "CPU time %")]
    return tuple(columns)


def _forms_row(found: Measurements, network: Network, form: Form, in_mib: bool) -> tuple[str, ...]:
    baseline = found.best_known(network, variant="float")
    base = found.size_bytes(network, baseline[0]) if baseline else None
    size_bytes, score = found.size_bytes(network, form), found.score(network, form)
    is_baseline = baseline is not None and form == baseline[0]
    cells = [
        form_title(form, with_engine=False),
        engine_title(form.engine) or NONE,
        mib(size_bytes) if in_mib else count(size_bytes),
        times(base / size_bytes) if base and size_bytes else MISSING,
        percent(score.accuracy) if score else MISSING,
        NONE if is_baseline and score and score.difference_pt is None else span(score),
    ]
    for batch in found.batches(network):
        time = found.time(network, form, batch)
        cells += [milliseconds(time.median_ms) if time else MISSING, _share(time)]
    if network.family:
        cells += _study_cells(network, form)
    return tuple(cells)


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
    plots = (
        _size_plot(found, network, forms, index),
        _accuracy_plot(found, network, forms, index),
        _time_plot(found, network, forms, index),
    )
    return [
        plot
        for plot in plots
        if any(value is not None for series in plot.bars for value in series.values)
    ]


def _plot_title(network: Network, what: str) -> str:
    return f"{'Figure 4.3 · ' if network.family else ''}{network_title(network)}, {what}"


def _size_plot(found: Measurements, network: Network, forms: list[Form], index: int) -> Plot:
    in_mib = _in_mib(found, network, forms)
    sizes = [found.size_bytes(network, form) for form in forms]
    study = [_study_reference(network, form) if in_mib else None for form in forms]
    unit = "MiB" if in_mib else "bytes"
    bars = Bars(
        "measured",
        tuple(None if s is None else s / 2**20 if in_mib else float(s) for s in sizes),
        tuple(mib(s) if in_mib else count(s) for s in sizes),
        tuple(None if r is None else r.size_mib for r in study),
    )
    return Plot(
        f"size-{network.model}-{index}",
        _plot_title(network, "file size"),
        "Size of the file on disk; less is better.",
        f"file size, {unit}",
        categories=tuple(form_title(form) for form in forms),
        bars=(bars,),
    )


def _accuracy_plot(found: Measurements, network: Network, forms: list[Form], index: int) -> Plot:
    scores = [found.score(network, form) for form in forms]
    study = [_study_reference(network, form) for form in forms]
    bars = Bars(
        "measured",
        tuple(100 * s.accuracy if s else None for s in scores),
        tuple(_accuracy_text(s) for s in scores),
        tuple(None if r is None else 100 * r.accuracy for r in study),
    )
    return Plot(
        f"accuracy-{network.model}-{index}",
        _plot_title(network, "accuracy"),
        "Top-1 accuracy on the test images; in brackets the difference from float32, in points.",
        "accuracy, %",
        categories=tuple(form_title(form) for form in forms),
        bars=(bars,),
        limits=(0, 100),
    )


def _accuracy_text(score: Accuracy | None) -> str:
    if score is None:
        return MISSING
    difference = f" ({signed(score.difference_pt)})" if score.difference_pt is not None else ""
    return percent(score.accuracy) + difference


def _time_plot(found: Measurements, network: Network, forms: list[Form], index: int) -> Plot:
    bars = []
    for batch in found.batches(network):
        measured = [found.time(network, form, batch) for form in forms]
        study = [_study_reference(network, form) for form in forms]
        bars.append(
            Bars(
                f"batch {batch}",
                tuple(100 * t.ratio if t and t.ratio is not None else None for t in measured),
                tuple(f"{_share(t)} %" if t and t.ratio is not None else MISSING for t in measured),
                tuple(None if r is None else 100 * r.time_share for r in study),
            )
        )
    return Plot(
        f"time-{network.model}-{index}",
        _plot_title(network, "CPU time"),
        "Median CPU time of one batch as a share of PyTorch's eager float32; less is better.",
        "CPU time, % of eager float32",
        categories=tuple(form_title(form) for form in forms),
        bars=tuple(bars),
    )


def _study_reference(network: Network, form: Form) -> Quantized | None:
    """The study ran PyTorch: its float network stands beside ours on that engine, its int8 beside
    any."""
    known = QUANTIZED.get(network.family, {}).get(form.variant)
    if known is None or form.sparsity or (form.variant == "float" and form.engine != "torch"):
        return None
    return known
