"""What could be had instead of the answer: measured models and predicted points that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tersor.ondemand.candidate import Measured
from tersor.ondemand.predict import Predictor
from tersor.search.tradeoff import nondominated, pareto, points

FRONT = 16  # predicted points that are told
AXES = ("size_bytes", "latency_ms", "harm")


def told_front(
    made: Sequence[tuple[Measured, float]], predictor: Predictor
) -> tuple[dict[str, Any], ...]:
    """Rows of the front in size, time and points lost, JSON-ready: `made` models, each with the points it was judged
    to lose, and predicted points beyond, thinned to FRONT."""
    real = [
        {
            **each.row()["choice"],
            **each.costs,
            "drop_pt": lost,
            "measured": True,
            "file": each.path.name,
        }
        for each, lost in made
    ]
    found = pareto(points(predictor.forms()), AXES)
    step = max(1, len(found) // FRONT)
    told = [{**predictor.described(p), "measured": False} for p in found[::step]]
    rows = [
        (r["size_bytes"], r["latency_ms"], round(max(r["drop_pt"], 0.0), 3)) for r in [*real, *told]
    ]
    kept = nondominated(rows)
    return tuple([*real, *told][i] for i in sorted(kept, key=lambda i: rows[i]))
