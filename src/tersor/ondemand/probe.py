"""The time of a network before it is made: it does not depend on what the weights are."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

from tersor.bench.timing import time_apart
from tersor.engines import open_session
from tersor.methods.restore import restructured
from tersor.ondemand.effort import Watch
from tersor.ondemand.network import Network, rounded
from tersor.ondemand.original import EAGER, Original
from tersor.pipeline import deployment_graph
from tersor.specs import Plan

IMAGES = 64  # the ranges they give are good enough to run


def probed(
    original: Original,
    plan: Plan,
    engines: Sequence[str],
    *,
    seconds: float = 2.0,
    watch: Watch = lambda text, share: None,
) -> tuple[float, float]:
    """Milliseconds of one batch, in integers on the fastest of `engines`, of `original` without what `plan` removes,
    nothing fitted or trained; and how many times that is faster than PyTorch's eager float32 in the same run. Raises
    EngineError where one of `engines` cannot run it."""
    module = restructured(original.module, plan)
    graph = deployment_graph(module, original.input_shape)
    few = dc.replace(original, inputs=original.inputs[:IMAGES])
    small, _ = rounded(few, Network(1.0, module, graph, plan, 0.0), {}, watch)
    sessions = {
        engine: open_session(small, engine=engine, threads=original.threads) for engine in engines
    }
    eager = open_session(original.as_given, engine="torch", threads=original.threads)
    times = time_apart(
        {EAGER: eager, **sessions}, original.input_shape, original.batch, seconds=seconds
    )
    fastest = min(times[engine].median_ms for engine in engines)
    return fastest, times[EAGER].median_ms / fastest
