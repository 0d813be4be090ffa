"""Rows of `rows.jsonl`, read once, checked, and looked up by network and form."""

from __future__ import annotations

import dataclasses as dc
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tersor.errors import RunError
from tersor.report.reference import family

Row = Mapping[str, Any]

VARIANTS = ("float", "pruned", "static", "dynamic", "weight_only")
ENGINES = ("onnxruntime", "torch")  # the first is preferred where a table has one place for a form
SCOPES = ("", "layer", "global")
RECOVERIES = ("none", "bn", "finetune")
KINDS = ("accuracy", "timing", "coverage", "training", "run")


@dc.dataclass(frozen=True)
class Network:
    """A network on a data set; rows with another head (`num_classes`, 0: not stated) are another
    network."""

    model: str
    data: str
    num_classes: int = 0
    among_data: bool = False  # the rows hold other data sets too, so that titles must name this one

    @property
    def family(self) -> str:
        """The study's network this is, or ""."""
        return family(self.model)


@dc.dataclass(frozen=True)
class Form:
    """What was measured: a variant of a network, as one engine ran it."""

    variant: str
    engine: str = ""
    scope: str = ""
    sparsity: float = 0.0
    recovery: str = ""
    precision: str = ""  # only where it is not implied by the variant


@dc.dataclass(frozen=True)
class Accuracy:
    """Accuracy (0 to 1) of a form. Over several seeds: the means, and the span of their
    intervals."""

    accuracy: float
    num_samples: int
    num_seeds: int
    size_bytes: int | None
    difference_pt: float | None = None
    low_pt: float | None = None
    high_pt: float | None = None
    level: float | None = None


@dc.dataclass(frozen=True)
class Time:
    """Median CPU time of one batch, and its share of eager float32's (None where that was not
    timed)."""

    median_ms: float
    p05_ms: float | None
    p95_ms: float | None
    repeats: int | None
    threads: int
    ratio: float | None


@dc.dataclass(frozen=True)
class Measurements:
    """The rows by what they say; of two rows of one cell and seed the later one counts."""

    rows: tuple[Row, ...]
    networks: tuple[Network, ...]
    accuracy: Mapping[tuple[Network, Form], Sequence[Row]]
    timing: Mapping[tuple[Network, Form, int, int], Row]
    coverage: Mapping[tuple[Network, Form], Row]
    training: Mapping[Network, Sequence[Row]]
    unknown_kinds: tuple[str, ...]
    all_forms: Mapping[Network, Sequence[Form]]

    def forms(self, network: Network) -> list[Form]:
        """Every form of `network` with an accuracy or a time, float first."""
        return list(self.all_forms.get(network, ()))

    def batches(self, network: Network) -> list[int]:
        """Batch sizes timed for `network`, ascending."""
        return sorted({batch for n, _, batch, _ in self.timing if n == network})

    def threads(self, network: Network) -> int | None:
        """The thread count shown where a table has one place: the largest timed."""
        return max((t for n, _, _, t in self.timing if n == network), default=None)

    def score(self, network: Network, form: Form) -> Accuracy | None:
        """The accuracy of one form, merged over its seeds."""
        rows = self.accuracy.get((network, form))
        return merged(rows) if rows else None

    def best_known(self, network: Network, **wanted: Any) -> tuple[Form, Accuracy] | None:
        """The scored form with these fields, of the preferred engine where several ran it; one judged in another
        arithmetic than its own only where there is no other."""
        for form in sorted(self.forms(network), key=lambda form: bool(form.precision)):
            if all(getattr(form, k) == v for k, v in wanted.items()):
                found = self.score(network, form)
                if found:
                    return form, found
        return None

    def size_bytes(self, network: Network, form: Form) -> int | None:
        """Bytes of the form's file. The file does not depend on the engine that runs it."""
        own = self.score(network, form)
        if own and own.size_bytes is not None:
            return own.size_bytes
        for other in self.forms(network):
            if dc.replace(other, engine="") == dc.replace(form, engine=""):
                score = self.score(network, other)
                if score and score.size_bytes is not None:
                    return score.size_bytes
        return None

    def time(
        self, network: Network, form: Form, batch: int, threads: int | None = None
    ) -> Time | None:
        """The time of one form; `threads` defaults to the largest number timed."""
        at = threads if threads is not None else self.threads(network)
        row = self.timing.get((network, form, batch, at or 0))
        if row is None:
            return None
        median = _number(row, "median_ms")
        if median is None:
            return None
        ratio = _number(row, "ratio")
        if ratio is None:
            eager = self.timing.get((network, Form("float", "torch"), batch, at or 0))
            base = None if eager is None else _number(eager, "median_ms")
            ratio = median / base if base else None
        repeats = _number(row, "repeats")
        return Time(
            median,
            _number(row, "p05_ms"),
            _number(row, "p95_ms"),
            None if repeats is None else int(repeats),
            at or 0,
            ratio,
        )

    def sparsities(self, network: Network, scope: str | None = None) -> list[float]:
        """Fractions removed for which a pruned form was scored."""
        found = {
            form.sparsity
            for n, form in self.accuracy
            if n == network and form.variant == "pruned" and scope in (None, form.scope)
        }
        return sorted(found)

    def is_sweep(self, network: Network) -> bool:
        """Whether the pruned forms are a study of several sparsities, with tables of their own."""
        count = len(self.sparsities(network))
        return count > 1 or (count == 1 and network.family != "")


def read(rows: Iterable[Row]) -> Measurements:
    """Sort rows into measurements. Raises RunError for no rows, and for one that cannot be what it
    says."""
    rows = tuple(rows)
    sorted_rows = _Sorted(among_data=len({_data(row) for row in rows} - {""}) > 1)
    for number, row in enumerate(rows, 1):
        kind = row.get("kind") if isinstance(row, Mapping) else None
        if not isinstance(kind, str):
            raise RunError(
                f"row {number} has no kind; expected one of {', '.join(KINDS)}: {row!r:.200}"
            )
        try:
            sorted_rows.add(kind, row)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RunError(
                f"row {number} ({kind}) cannot be read: {error}; "
                "remove that line of rows.jsonl, or measure it again"
            ) from None
    if not sorted_rows.networks:
        raise RunError(
            "no measurements to report: rows.jsonl holds no row of accuracy, timing, coverage or "
            "training; run tersor demo or tersor study first"
        )
    return Measurements(
        rows,
        tuple(sorted_rows.networks),
        {key: tuple(by_seed.values()) for key, by_seed in sorted_rows.accuracy.items()},
        sorted_rows.timing,
        sorted_rows.coverage,
        {key: tuple(found.values()) for key, found in sorted_rows.training.items()},
        tuple(sorted_rows.unknown),
        {network: sorted_rows.forms(network) for network in sorted_rows.networks},
    )


@dc.dataclass
class _Sorted:
    """Rows on their way into Measurements; dicts keep the order and let a later row replace one."""

    among_data: bool
    networks: dict[Network, None] = dc.field(default_factory=dict)
    accuracy: dict[tuple[Network, Form], dict[Any, Row]] = dc.field(default_factory=dict)
    timing: dict[tuple[Network, Form, int, int], Row] = dc.field(default_factory=dict)
    coverage: dict[tuple[Network, Form], Row] = dc.field(default_factory=dict)
    training: dict[Network, dict[Any, Row]] = dc.field(default_factory=dict)
    unknown: dict[str, None] = dc.field(default_factory=dict)

    def add(self, kind: str, row: Row) -> None:
        """Check one row and put it where it belongs."""
        if kind not in KINDS:
            self.unknown[kind] = None
        if kind not in KINDS or kind == "run":
            return
        network, form = _network(row, self.among_data), _form(row)
        self.networks[network] = None
        if kind == "accuracy":
            check_accuracy(row)
            self.accuracy.setdefault((network, form), {})[row.get("seed")] = row
        elif kind == "timing":
            for key in ("median_ms", "p05_ms", "p95_ms", "ratio", "repeats"):
                _number(row, key)
            self.timing[network, form, _count(row, "batch"), _count(row, "threads")] = row
        elif kind == "coverage":
            _check_coverage(row)
            self.coverage[network, form] = row
        else:
            for key in ("seconds", "images_per_s"):
                _number(row, key)
            by_form = self.training.setdefault(network, {})
            by_form[row.get("variant"), row.get("seed"), form] = row

    def forms(self, network: Network) -> list[Form]:
        """Every form of `network` with an accuracy or a time, in the order of tables."""
        found = {f for n, f in self.accuracy if n == network}
        found |= {f for n, f, _, _ in self.timing if n == network}
        return sorted(found, key=form_order)


def form_order(form: Form) -> tuple[Any, ...]:
    """Float first, then pruned by sparsity, then the quantized forms; the preferred engine
    first."""
    return (
        _place(VARIANTS, form.variant),
        form.variant,
        form.sparsity,
        _place(SCOPES, form.scope),
        form.scope,
        _place(RECOVERIES, form.recovery),
        _place(ENGINES, form.engine),
        form.engine,
        form.precision,
    )


def merged(rows: Sequence[Row]) -> Accuracy:
    """One accuracy from the rows of its seeds: means, and the widest span of the intervals
    (cautious)."""
    intervals = [row["interval"] for row in rows if row.get("interval")]
    sizes = [size for row in rows if (size := _number(row, "size_bytes")) is not None]
    return Accuracy(
        accuracy=statistics.fmean(float(row["accuracy"]) for row in rows),
        num_samples=max(int(row.get("num_samples") or 0) for row in rows),
        num_seeds=len(rows),
        size_bytes=round(statistics.fmean(sizes)) if sizes else None,
        difference_pt=statistics.fmean(i["difference_pt"] for i in intervals)
        if intervals
        else None,
        low_pt=min((i["low_pt"] for i in intervals), default=None),
        high_pt=max((i["high_pt"] for i in intervals), default=None),
        level=intervals[0].get("level") if intervals else None,
    )


def check_accuracy(row: Row) -> None:
    """Raise ValueError for an accuracy row whose numbers cannot be."""
    value = _number(row, "accuracy")
    if value is None or not 0 <= value <= 1:
        raise ValueError(f"accuracy must be between 0 and 1, got {row.get('accuracy')!r}")
    for key in ("size_bytes", "num_samples"):
        _number(row, key)
    interval = row.get("interval")
    if interval:
        for key in ("difference_pt", "low_pt", "high_pt"):
            if _number(interval, key) is None:
                raise ValueError(f"interval.{key} is missing")


def _check_coverage(row: Row) -> None:
    layers = row.get("layers") or ()
    if not isinstance(layers, (list, tuple)) or not all(isinstance(x, Mapping) for x in layers):
        raise ValueError(f"layers must be a list of objects, got {layers!r:.100}")
    for part in (row, *layers):
        for key in ("macs_share", "bytes_share", "sparsity"):
            _number(part, key)


def _data(row: Row) -> str:
    return str(row.get("data") or "") if isinstance(row, Mapping) else ""


def _network(row: Row, among_data: bool) -> Network:
    model = row.get("model")
    if not isinstance(model, str) or not model:
        raise ValueError(f"model must be a name, got {model!r}")
    return Network(model, _data(row), int(_number(row, "num_classes") or 0), among_data)


def _form(row: Row) -> Form:
    engine = str(row.get("engine") or "")
    return Form(
        variant=str(row.get("variant") or "float"),
        engine="torch" if engine == "torch-eager" else engine,
        scope=str(row.get("scope") or ""),
        sparsity=round(float(_number(row, "sparsity") or 0), 6),
        recovery=str(row.get("recovery") or ""),
        # int8 and float32 follow from the variant, and rows of times need not repeat them.
        precision="bf16" if row.get("precision") == "bf16" and row["kind"] != "training" else "",
    )


def _number(row: Row, key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}")
    return value


def _count(row: Row, key: str) -> int:
    value = _number(row, key)
    if value is None or value < 1:
        raise ValueError(f"{key} must be 1 or more, got {row.get(key)!r}")
    return int(value)


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)
