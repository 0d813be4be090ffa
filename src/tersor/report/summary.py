"""The one table of a run: every form in a line, as values for a program and as cells for a
person."""

from __future__ import annotations

from typing import Any

from tersor.report.forms import shown_forms
from tersor.report.measurements import Form, Measurements, Network, read
from tersor.report.words import form_title


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict per network and form, float first, for the closing table of a run and for --json.

    Keys: data, model, form (in words), variant, engine, scope, sparsity, recovery, accuracy (0 to 1 or None),
    num_samples, interval ({difference_pt, low_pt, high_pt, level} or None), size_bytes,
    compression_ratio (of the float file's bytes to these), timings: [{batch, threads, median_ms,
    p05_ms, p95_ms, repeats, ratio}]. None means not measured. Raises RunError for rows that cannot
    be read.
    """
    found = read(rows)
    return [line for network in found.networks for line in _lines(found, network)]


def _lines(found: Measurements, network: Network) -> list[dict[str, Any]]:
    baseline = found.best_known(network, variant="float")
    base = found.size_bytes(network, baseline[0]) if baseline else None
    lines = []
    for form in shown_forms(found, network):
        score, size_bytes = found.score(network, form), found.size_bytes(network, form)
        interval = None
        if score and score.difference_pt is not None:
            interval = {
                "difference_pt": score.difference_pt,
                "low_pt": score.low_pt,
                "high_pt": score.high_pt,
                "level": score.level,
            }
        lines.append(
            {
                "data": network.data,
                "model": network.model,
                "form": form_title(form),
                "variant": form.variant,
                "engine": form.engine,
                "scope": form.scope,
                "sparsity": form.sparsity,
                "recovery": form.recovery,
                "accuracy": score.accuracy if score else None,
                "num_samples": score.num_samples if score else None,
                "interval": interval,
                "size_bytes": size_bytes,
                "compression_ratio": base / size_bytes if base and size_bytes else None,
                "timings": _timings(found, network, form),
            }
        )
    return lines


def _timings(found: Measurements, network: Network, form: Form) -> list[dict[str, Any]]:
    result = []
    for n, f, batch, threads in sorted(found.timing, key=lambda key: (key[2], key[3])):
        time = found.time(n, f, batch, threads) if (n, f) == (network, form) else None
        if time:
            result.append(
                {
                    "batch": batch,
                    "threads": threads,
                    "median_ms": time.median_ms,
                    "p05_ms": time.p05_ms,
                    "p95_ms": time.p95_ms,
                    "repeats": time.repeats,
                    "ratio": time.ratio,
                }
            )
    return result
