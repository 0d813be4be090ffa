"""Numbers and names in words: the one place that decides digits, signs and units."""

from __future__ import annotations

from tersor.report.measurements import Accuracy, Form, Network
from tersor.report.reference import TITLES

MISSING = "not measured"
NONE = "–"  # the cell cannot hold a value

ENGINES = {
    "torch": "PyTorch eager",
    "torch_bf16": "PyTorch eager",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino_bf16": "OpenVINO, bfloat16",
    "simulation": "simulation",
}
VARIANTS = {
    "float": "float32",
    "pruned": "pruned",
    "static": "static int8",
    "dynamic": "dynamic int8",
    "weight_only": "weight-only int8",
}
RECOVERIES = {
    "none": "one-shot",
    "bn": "one-shot + batch-norm re-estimation",
    "finetune": "fine-tuned",
}
SCOPES = {"layer": "by layer", "global": "globally"}
SCOPE_DETAILS = {"layer": "the same share of every layer", "global": "all layers ranked together"}


def clean(text: object) -> str:
    """`text` in one line without control or direction characters, which could forge a terminal's
    output."""
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def percent(share: float | None, digits: int = 2) -> str:
    """A share (0 to 1) in per cent, without the sign."""
    return MISSING if share is None else f"{100 * share:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference with its sign; zero has none."""
    if value is None:
        return MISSING
    text = f"{abs(value):.{digits}f}"
    if not float(text):
        return text
    return ("+" if value > 0 else "−") + text


def span(score: Accuracy | None) -> str:
    """Difference and interval in points: "−0.05 (−0.17 to +0.07)"."""
    if score is None or score.difference_pt is None:
        return MISSING
    return f"{signed(score.difference_pt)} ({signed(score.low_pt)} to {signed(score.high_pt)})"


def mib(size_bytes: float | None) -> str:
    """Bytes in MiB (2^20)."""
    if size_bytes is None:
        return MISSING
    value = size_bytes / 2**20
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def size(size_bytes: float | None) -> str:
    """Bytes with their unit, as fits: "10.79 MiB", or "34,120 bytes" below a MiB."""
    if size_bytes is None:
        return MISSING
    return f"{mib(size_bytes)} MiB" if size_bytes >= 2**20 else f"{size_bytes:,.0f} bytes"


def milliseconds(value: float | None) -> str:
    """Milliseconds to three digits or so."""
    if value is None:
        return MISSING
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def times(ratio: float) -> str:
    """A factor: "3.96", "13.1", "120"."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def count(number: int | None, noun: str = "") -> str:
    """A whole number with separators, and its noun in the plural where that is due."""
    if number is None:
        return MISSING
    return f"{number:,}" + (f" {noun}{'' if number == 1 else 's'}" if noun else "")


def network_title(network: Network) -> str:
    """ "VGG-16 (vgg16_bn)" for the study's networks, the model's own name for others."""
    known = TITLES.get(network.family)
    name = clean(network.model)
    title = name if known is None else known if name == network.family else f"{known} ({name})"
    if network.num_classes:
        title += f", {network.num_classes:,} classes"
    return f"{title} on {clean(network.data)}" if network.among_data else title


def form_title(form: Form, *, with_engine: bool = True) -> str:
    """ "pruned 70 % by layer, fine-tuned · ONNX Runtime"."""
    name = clean(VARIANTS.get(form.variant, form.variant))
    if form.variant == "float" and form.precision:
        name = clean(form.precision)
    if form.sparsity:
        name += f" {percent(form.sparsity, 0)} %" if form.variant == "pruned" else ""
        name += f", {percent(form.sparsity, 0)} % pruned" if form.variant != "pruned" else ""
        name += f" {clean(SCOPES.get(form.scope, form.scope))}" if form.scope else ""
        name += f", {clean(RECOVERIES.get(form.recovery, form.recovery))}" if form.recovery else ""
    if form.precision and form.variant != "float":
        name += f", {clean(form.precision)}"
    return f"{name} · {engine_title(form.engine)}" if with_engine and form.engine else name


def engine_title(engine: str) -> str:
    """The engine by its proper name."""
    return clean(ENGINES.get(engine, engine))
