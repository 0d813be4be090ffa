"""One candidate: built, written as a file, read again, run on the engines here, and judged."""

from __future__ import annotations

import dataclasses as dc
import importlib.metadata
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from tersor.artifact import load, pack, save
from tersor.bench.choose import choose_engine
from tersor.bench.drop import Drop, measured_drop
from tersor.bench.energy import counted_energy_mj
from tersor.bench.timing import time_apart
from tersor.engines import open_session
from tersor.engines.load import logits_of
from tersor.graph.layers import num_weights
from tersor.methods.restore import plan_of
from tersor.ondemand.original import EAGER, Original
from tersor.specs import Plan

COSTS = ("size_bytes", "latency_ms", "macs", "energy_mj")
COMPARED = 64  # inputs on which engines must agree with the simulation
MODEL = "compressed"


@dc.dataclass(frozen=True, eq=False)
class Measured:
    """A model that was built, and what was measured of its file; all costs are of the file at `path`.

    `costs`: size_bytes, latency_ms (on `engine`), macs, energy_mj. `speedup` is over PyTorch's eager float32 in the
    same run. `choice` is what the search had chosen: share of the channels' cost, and bits by layer.
    """

    path: pathlib.Path
    choice: Mapping[str, Any]
    costs: Mapping[str, float]
    drop: Drop
    engine: str
    speedup: float
    plan: Plan
    engines_ms: Mapping[str, float]
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """A JSON-ready dict, without the plan."""
        return {
            "file": self.path.name,
            "choice": dict(self.choice),
            **self.costs,
            "engine": self.engine,
            "speedup": self.speedup,
            "engines_ms": dict(self.engines_ms),
            "drop": self.drop.to_dict(),
            "seconds": round(self.seconds, 1),
        }


def measured_before(row: Mapping[str, Any], place: pathlib.Path) -> Measured:
    """What `Measured.row` told, of the file in the directory `place`."""
    path = place / row["file"]
    plan = plan_of(load(path))
    assert plan is not None, "every candidate was planned"
    return Measured(
        path,
        row["choice"],
        {axis: row[axis] for axis in COSTS},
        Drop.from_dict(row["drop"]),
        row["engine"],
        row["speedup"],
        plan,
        row["engines_ms"],
        row["seconds"],
    )


def measured(
    original: Original,
    graph: onnx.ModelProto,
    plan: Plan,
    path: pathlib.Path,
    choice: Mapping[str, Any],
    *,
    macs: float,
    state: dict[str, Any] | None = None,
    engines: Sequence[str] | None = None,
    seconds: float = 3.0,
    quick_coding: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> Measured | None:
    """Write `graph` to `path`, and judge what is read back from there; None where no engine is right.

    `state` is what the graph does not hold of the network (methods.restore). `quick_coding`: the file without context
    modelling, a little larger and written many times faster. The drop is judged on the engine that was chosen.
    """
    told = {"tersor": importlib.metadata.version("tersor"), **(provenance or {})}
    held = pack(graph, plan=plan.to_dict(), provenance=told, state=state, quick=quick_coding)
    size = save(held, path)
    graph = load(path).to_onnx()
    compared = original.inputs[: max(COMPARED, original.batch)]
    if len(compared) < original.batch:  # fewer inputs than the batch that is asked for
        compared = np.concatenate([compared] * -(-original.batch // len(compared)))
    chosen = choose_engine(
        {MODEL: graph},
        compared,
        batch=original.batch,
        threads=original.threads,
        engines=engines,
        seconds=seconds,
    )
    if chosen.chosen is None or chosen.engine is None:
        return None
    session = open_session(graph, engine=chosen.engine, threads=original.threads)
    eager = open_session(original.as_given, engine="torch", threads=original.threads)
    times = time_apart(
        {EAGER: eager, MODEL: session}, original.input_shape, original.batch, seconds=seconds
    )
    logits = logits_of(session, original.held)
    weights = float(num_weights(graph))
    integers = any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    costs = {
        "size_bytes": float(size),
        "latency_ms": times[MODEL].median_ms,
        "macs": macs,
        "energy_mj": counted_energy_mj(
            macs, weights * (1 if integers else 4), integers=integers, batch=original.batch
        ),
    }
    found = {c.engine: c.median_ms for c in chosen.candidates if c.median_ms is not None}
    return Measured(
        path,
        choice,
        costs,
        measured_drop(original.logits, logits, original.labels),
        chosen.engine,
        times[EAGER].median_ms / times[MODEL].median_ms,
        plan,
        found,
    )
