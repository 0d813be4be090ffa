"""Coverage, recipes, and the lists of every measurement behind the tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.report.document import Column, Section, Table
from tersor.report.measurements import Form, Measurements, Network, form_order
from tersor.report.words import (
    MISSING,
    NONE,
    count,
    engine_title,
    form_title,
    milliseconds,
    network_title,
    percent,
    signed,
)


def coverage_sections(found: Measurements) -> list[Section]:
    """What was done to which layer, and why not, for every form that says so."""
    if not found.coverage:
        return []
    order = sorted(
        found.coverage.items(),
        key=lambda item: (found.networks.index(item[0][0]), form_order(item[0][1])),
    )
    rows, layers = [], []
    for number, ((network, form), row) in enumerate(order):
        listed = list(row.get("layers") or ())
        done = [layer for layer in listed if layer.get("action") != "keep"]
        rows.append(
            (
                network_title(network),
                form_title(form, with_engine=False),
                f"{len(done)} of {count(len(listed), 'layer')}",
                percent(row.get("macs_share"), 1),
                percent(row.get("bytes_share"), 1),
                _kept(listed),
            )
        )
        if listed:
            layers.append(_layer_table(network, form, listed, number))
    table = Table(
        "coverage",
        "Coverage: how much of the network each form changes",
        (
            Column("network", right=False),
            Column("form", right=False),
            Column("changed"),
            Column("% of macs", "covered"),
            Column("% of bytes", "covered"),
            Column("left alone, and why", right=False),
        ),
        tuple(rows),
    )
    return [Section("coverage-section", "Coverage", "", (table, *layers))]


def training_sections(found: Measurements) -> list[Section]:
    """How the float networks (and fine-tuned forms, where recorded) were trained."""
    rows = []
    for network in found.networks:
        for row in found.training.get(network, ()):
            variant = str(row.get("variant") or "float")
            form = Form(
                variant,
                "",
                str(row.get("scope") or ""),
                float(row.get("sparsity") or 0),
                str(row.get("recovery") or ""),
            )
            rows.append(
                (
                    network_title(network),
                    form_title(form),
                    _plain(row.get("seed")),
                    _plain(row.get("epochs")),
                    _plain(row.get("precision")),
                    _number(row.get("seconds"), 0),
                    _number(row.get("images_per_s"), 0),
                    _last_loss(row.get("history")),
                    _recipe(row.get("recipe")),
                )
            )
    if not rows:
        return []
    columns = (
        Column("network", right=False),
        Column("form", right=False),
        Column("seed"),
        Column("epochs"),
        Column("precision", right=False),
        Column("seconds"),
        Column("images/s"),
        Column("last loss"),
        Column("recipe", right=False),
    )
    table = Table("training", "Training recipes", columns, tuple(rows))
    return [Section("training-section", "Training", "", (table,))]


def measurement_sections(found: Measurements) -> list[Section]:
    """Every accuracy by seed and every time, as measured."""
    tables = [t for t in (_accuracy_list(found), _timing_list(found)) if t.rows]
    if not tables:
        return []
    return [
        Section(
            "measurements",
            "Every measurement",
            "The rows behind the tables above, one line each.",
            tuple(tables),
        )
    ]


def _accuracy_list(found: Measurements) -> Table:
    rows = []
    for network in found.networks:
        for form in found.forms(network):
            for row in found.accuracy.get((network, form), ()):
                interval = row.get("interval") or {}
                p_value = interval.get("p_value")
                rows.append(
                    (
                        network_title(network),
                        form_title(form),
                        _plain(row.get("seed")),
                        percent(row["accuracy"]),
                        count(row.get("num_samples")),
                        signed(interval["difference_pt"]) if interval else NONE,
                        signed(interval["low_pt"]) if interval else NONE,
                        signed(interval["high_pt"]) if interval else NONE,
                        NONE if p_value is None else f"{p_value:.2g}",
                        count(row.get("size_bytes")),
                    )
                )
    columns = (
        Column("network", right=False),
        Column("form", right=False),
        Column("seed"),
        Column("accuracy %"),
        Column("num_samples"),
        Column("difference", "against float32, pt"),
        Column("low", "against float32, pt"),
        Column("high", "against float32, pt"),
        Column("p (McNemar)", "against float32, pt"),
        Column("size_bytes"),
    )
    return Table("accuracies", "Every accuracy", columns, tuple(rows), folded=True)


def _timing_list(found: Measurements) -> Table:
    rows = []
    keys = sorted(
        found.timing,
        key=lambda key: (found.networks.index(key[0]), form_order(key[1]), key[2], key[3]),
    )
    for network, form, batch, threads in keys:
        time = found.time(network, form, batch, threads)
        if time is None:
            continue
        rows.append(
            (
                network_title(network),
                form_title(form, with_engine=False),
                engine_title(form.engine),
                count(batch),
                count(threads),
                milliseconds(time.median_ms),
                milliseconds(time.p05_ms),
                milliseconds(time.p95_ms),
                count(time.repeats),
                percent(time.ratio, 1),
            )
        )
    columns = (
        Column("network", right=False),
        Column("form", right=False),
        Column("engine", right=False),
        Column("batch"),
        Column("threads"),
        Column("median", "milliseconds"),
        Column("p05", "milliseconds"),
        Column("p95", "milliseconds"),
        Column("repeats"),
        Column("% of eager"),
    )
    return Table("timings", "Every time", columns, tuple(rows), folded=True)


def _kept(layers: Sequence[Mapping[str, Any]]) -> str:
    """The layers left alone, gathered by reason."""
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if layer.get("action") == "keep":
            reasons.setdefault(str(layer.get("reason") or "no reason given"), []).append(
                str(layer.get("layer"))
            )
    parts = []
    for reason, names in reasons.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        parts.append(f"{shown}: {reason}")
    return "; ".join(parts) or "none"


def _layer_table(
    network: Network, form: Form, layers: Sequence[Mapping[str, Any]], number: int
) -> Table:
    rows = tuple(
        (
            str(layer.get("layer")),
            str(layer.get("action")),
            _plain(layer.get("bits")),
            percent(layer.get("sparsity"), 1) if layer.get("sparsity") is not None else NONE,
            str(layer.get("reason") or ""),
        )
        for layer in layers
    )
    columns = (
        Column("layer", right=False),
        Column("action", right=False),
        Column("bits"),
        Column("sparsity %"),
        Column("reason", right=False),
    )
    caption = f"Layers of {network_title(network)}, {form_title(form, with_engine=False)}"
    return Table(f"layers-{number}", caption, columns, rows, folded=True)


def _plain(value: Any) -> str:
    return NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any, digits: int) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def _last_loss(history: Any) -> str:
    if not history or not isinstance(history[-1], Mapping) or "loss" not in history[-1]:
        return NONE
    return f"{history[-1]['loss']:.4f}"


def _recipe(recipe: Any) -> str:
    if not isinstance(recipe, Mapping):
        return NONE if recipe is None else str(recipe)
    parts = [
        f"{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for key, value in recipe.items()
        if key not in ("kind", "epochs", "seed")
    ]
    return ", ".join(parts)
