"""The bars: what was promised, what was measured, and the verdict, checked from the rows alone."""

from __future__ import annotations

import dataclasses as dc

from tersor.report import reference
from tersor.report.document import Column, Section, Table
from tersor.report.measurements import Accuracy, Form, Measurements, Network
from tersor.report.pruning import pruned
from tersor.report.words import MISSING, count, form_title, mib, network_title, percent, signed

MET, MISSED = "met", "missed"
EPSILON = 1e-9  # an exact tie meets the bar, whatever the last bit of the subtraction says


@dc.dataclass(frozen=True)
class Bar:
    """One bar. `measured` is None where a row is missing."""

    network: str
    what: str
    allowed: str
    measured: str | None
    met: bool

    @property
    def verdict(self) -> str:
        """met, missed or not measured."""
        return MISSING if self.measured is None else MET if self.met else MISSED


def bars(found: Measurements) -> list[Bar]:
    """Every bar for the study's networks; none where the rows hold no such network."""
    networks = [network for network in found.networks if network.family]
    if not networks:
        return []
    result: list[Bar] = []
    for name, title in reference.TITLES.items():
        own: list[Network | None] = [n for n in networks if n.family == name] or [None]
        for network in own:
            shown = network_title(network) if network else title
            result += _pruning_bars(found, network, shown)
            result += _size_bars(found, network, name, shown)
            result.append(_static_loss(found, network, shown))
            result += _time_bars(found, network, name, shown)
    return result


def bar_sections(found: Measurements) -> list[Section]:
    """The section of bars, or none."""
    checked = bars(found)
    if not checked:
        return []
    verdicts = [bar.verdict for bar in checked]
    parts = [f"{verdicts.count(MET)} of {len(checked)} met"]
    parts += [f"{n} {v}" for v in (MISSED, MISSING) if (n := verdicts.count(v))]
    table = Table(
        "bars",
        "The bars this project set itself",
        (
            Column("network", right=False),
            Column("bar", right=False),
            Column("allowed"),
            Column("measured"),
            Column("verdict", right=False),
        ),
        tuple((b.network, b.what, b.allowed, b.measured or MISSING, b.verdict) for b in checked),
        (
            "A loss is judged by its measured value; the interval beside it says how sure that is. "
            "Times are medians of the int8 form on ONNX Runtime over those of PyTorch's eager "
            "float32.",
        ),
    )
    return [Section("bars-section", "Bars", ", ".join(parts) + ".", (table,))]


def _loss(
    found: Measurements, network: Network, score: Accuracy | None
) -> tuple[str | None, float | None]:
    """The loss against float32 in words, and in points."""
    if score is None:
        return None, None
    if score.difference_pt is not None:
        ends = f"{signed(score.low_pt)} to {signed(score.high_pt)}"
        return f"{signed(score.difference_pt)} pt ({ends})", -score.difference_pt
    baseline = found.best_known(network, variant="float")
    if baseline is None:
        return None, None
    difference = 100 * (score.accuracy - baseline[1].accuracy)
    return f"{signed(difference)} pt (no interval)", -difference


def _pruning_bars(found: Measurements, network: Network | None, title: str) -> list[Bar]:
    result = []
    for sparsity, allowed in reference.FINETUNED_LOSS_PT.items():
        for scope in ("layer", "global"):
            score = pruned(found, network, scope, sparsity, "finetune") if network else None
            words, loss = _loss(found, network, score) if network else (None, None)
            form = Form("pruned", "", scope, sparsity, "finetune")
            result.append(
                Bar(
                    title,
                    f"accuracy, {form_title(form)}",
                    f"at least −{allowed} pt",
                    words,
                    loss is not None and loss <= allowed + EPSILON,
                )
            )
    return result


def _size_bars(found: Measurements, network: Network | None, family: str, title: str) -> list[Bar]:
    result = []
    head = ", 1000-way head" if family == "vgg16" else ""
    for variant, wanted in reference.SIZE_MIB[family].items():
        size_bytes = _size(found, network, variant)
        off = None if size_bytes is None else size_bytes / 2**20 / wanted - 1
        result.append(
            Bar(
                title,
                f"file, {form_title(Form(variant))}{head}",
                f"{wanted:.1f} MiB ± {percent(reference.SIZE_TOLERANCE, 0)} %",
                None if off is None else f"{mib(size_bytes)} MiB ({_off(off)} %)",
                off is not None and abs(off) <= reference.SIZE_TOLERANCE + EPSILON,
            )
        )
    return result


def _off(off: float) -> str:
    """A deviation in per cent; one more digit where two would hide on which side of the bar it is."""
    close = abs(abs(off) - reference.SIZE_TOLERANCE) < 1e-4
    return signed(100 * off, 4 if close else 2)


def _size(found: Measurements, network: Network | None, variant: str) -> int | None:
    known = found.best_known(network, variant=variant, sparsity=0.0) if network else None
    return found.size_bytes(network, known[0]) if network and known else None


def _static_loss(found: Measurements, network: Network | None, title: str) -> Bar:
    known = found.best_known(network, variant="static", sparsity=0.0) if network else None
    words, loss = _loss(found, network, known[1]) if network and known else (None, None)
    return Bar(
        title,
        f"accuracy, {form_title(Form('static'))}",
        f"at least −{reference.STATIC_LOSS_PT} pt",
        words,
        loss is not None and loss <= reference.STATIC_LOSS_PT + EPSILON,
    )


def _time_bars(found: Measurements, network: Network | None, family: str, title: str) -> list[Bar]:
    result = []
    for variant, allowed in reference.TIME_SHARE[family].items():
        form = Form(variant, "onnxruntime")
        for batch in reference.TIME_BATCHES:
            time = found.time(network, form, batch) if network else None
            ratio = time.ratio if time else None
            threads = f" ({count(time.threads, 'thread')})" if time else ""
            result.append(
                Bar(
                    title,
                    f"CPU time, {form_title(Form(variant))}, batch {batch}",
                    f"at most {percent(allowed, 0)} %",
                    None if ratio is None else f"{percent(ratio, 1)} %{threads}",
                    ratio is not None and ratio <= allowed + EPSILON,
                )
            )
    return result
