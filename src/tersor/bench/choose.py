"""Choosing an engine by measuring: the fastest of those that compute the right function."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx

from tersor.bench.choice import FLOAT, Candidate, Choice, fastest
from tersor.bench.faults import layers_at_fault
from tersor.bench.timing import time_sessions
from tersor.engines import ENGINES, Session, open_session
from tersor.engines.agreement import agreement
from tersor.engines.isolated import isolated_logits, may_crash
from tersor.engines.load import available_cpus, logits_of
from tersor.engines.saturation import quantized_layers
from tersor.engines.simulation import simulate
from tersor.errors import EngineError, MissingExtraError, SpecError
from tersor.results import Timing

FloatArray = npt.NDArray[np.float32]
# Builds a candidate again, by its name, with these layers left in float.
Requantize = Callable[[str, frozenset[str]], onnx.ModelProto]


def offered_engines() -> list[str]:
    """Engines that run graphs and may be chosen, whether their libraries are installed or not."""
    return [name for name in ENGINES if getattr(ENGINES[name], "may_be_chosen", False)]


def choose_engine(
    candidates: Mapping[str, onnx.ModelProto],
    inputs: FloatArray,
    *,
    float_graph: onnx.ModelProto | None = None,
    batch: int = 1,
    threads: int | None = None,
    engines: Sequence[str] | None = None,
    requantize: Requantize | None = None,
    seconds: float = 10.0,
    inputs_are: str = "calibration inputs",
) -> Choice:
    """Open every candidate on every engine, keep those that compute the right function, time these.

    `candidates` maps names to quantized graphs, or to any others; `inputs` (N, C, H, W) float32
    are unlabelled images as the model sees them, `batch` of them or more, which each engine runs in
    batches of `batch`: kernels differ by batch size. Right means near to the simulation of the
    same graph (engines/agreement.py). An engine that is wrong is tried again with layers left in
    float, as few as bisection finds, where `requantize` is given, and is refused else.

    All that are right are timed interleaved for `seconds` on `threads` threads (default: all of
    this process), with `float_graph` on each engine beside them. `engines` limits the engines to
    these. Raises SpecError for no candidates, UnknownNameError for an engine nobody registered,
    EngineError where a graph cannot be simulated.
    """
    _check(candidates, inputs, batch)
    threads = available_cpus() if threads is None else threads
    names = offered_engines() if engines is None else list(engines)
    graphs = dict(candidates) if float_graph is None else {FLOAT: float_graph, **candidates}
    trials: list[_Trial] = []
    for model, graph in graphs.items():
        trying = _Trying(model, graph, inputs, batch, threads, requantize)
        trials += [trying.on(engine) for engine in names]
    sessions: dict[str, Session] = {}
    for place, trial in enumerate(trials):
        if trial.right:
            try:
                opened = open_session(trial.graph, engine=trial.row.engine, threads=threads)
            except (EngineError, MissingExtraError) as error:  # it ran in its own process alone
                trials[place] = trial.refused(str(error))
            else:
                sessions[_key(trial.row)] = opened
    shape = (inputs.shape[1], inputs.shape[2], inputs.shape[3])
    times = time_sessions(sessions, shape, batch, seconds=seconds) if sessions else {}
    rows = _with_times([t.row for t in trials], times)
    chosen = fastest([row for row in rows if row.model != FLOAT])
    run = None if chosen is None else trials[rows.index(chosen)].graph
    return Choice(chosen, run, tuple(rows), batch, threads, f"{len(inputs)} {inputs_are}")


@dc.dataclass(frozen=True, eq=False)
class _Trial:
    """A row before it is timed, and the graph that was run for it."""

    row: Candidate
    graph: onnx.ModelProto

    @property
    def right(self) -> bool:
        return self.row.agreement is not None and self.row.agreement.right

    def refused(self, reason: str) -> _Trial:
        return dc.replace(self, row=dc.replace(self.row, refused=reason))


class _Trying:
    """One model, with the logits it should have, on one engine after another."""

    def __init__(
        self,
        model: str,
        graph: onnx.ModelProto,
        inputs: FloatArray,
        batch: int,
        threads: int,
        requantize: Requantize | None,
    ) -> None:
        self.model, self.graph = model, graph
        self.inputs, self.batch, self.threads = inputs, batch, threads
        self.requantize = None if model == FLOAT else requantize
        self.repairs: list[frozenset[str]] = []  # found for other engines
        self.reference = logits_of(simulate(graph, threads), inputs)

    def on(self, engine: str) -> _Trial:
        """The trial of the model as it is, or with layers left in float, on `engine`."""
        trial = self._tried(self.graph, engine, self.reference)
        return trial if trial.right or trial.row.agreement is None else self._repaired(trial)

    def _tried(self, graph: onnx.ModelProto, engine: str, reference: FloatArray) -> _Trial:
        row = Candidate(self.model, engine)
        try:
            logits = self._logits(graph, engine)
            row = dc.replace(row, agreement=agreement(reference, logits))
        except (EngineError, MissingExtraError) as error:
            row = dc.replace(row, refused=str(error))
        return _Trial(row, graph)

    def _logits(self, graph: onnx.ModelProto, engine: str) -> FloatArray:
        if may_crash(engine):
            return isolated_logits(
                graph, self.inputs, engine=engine, threads=self.threads, batch=self.batch
            )
        session = open_session(graph, engine=engine, threads=self.threads)
        return logits_of(session, self.inputs, self.batch)

    def _repaired(self, wrong: _Trial) -> _Trial:
        """The trial with layers left in float so that the engine is right, or a refusal."""
        layers, engine = quantized_layers(self.graph), wrong.row.engine
        if self.requantize is None or not layers:
            return wrong.refused("computes another function")
        last: dict[frozenset[str], _Trial] = {}

        def is_right(chosen: frozenset[str]) -> bool:
            trial = self._with_float(chosen, engine)
            last.clear()
            last[chosen] = trial
            return trial.right

        earlier = next((s for s in self.repairs if is_right(s)), None)
        left = layers_at_fault(layers, is_right) if earlier is None else tuple(earlier)
        if left is None:
            return wrong.refused("computes another function, with its layers left in float too")
        found = frozenset(left)
        self.repairs.append(found)
        in_order = tuple(name for name in layers if name in found)
        return dc.replace(last[found], row=dc.replace(last[found].row, left_float=in_order))

    def _with_float(self, layers: frozenset[str], engine: str) -> _Trial:
        """The trial of the model built again with `layers` left in float."""
        assert self.requantize is not None, "only called where layers can be left in float"
        if not layers:
            return self._tried(self.graph, engine, self.reference)
        graph = self.requantize(self.model, layers)
        return self._tried(graph, engine, logits_of(simulate(graph, self.threads), self.inputs))


def _key(row: Candidate) -> str:
    return f"{row.model} on {row.engine}"


def _with_times(rows: list[Candidate], times: Mapping[str, Timing]) -> list[Candidate]:
    timed = [dc.replace(row, timing=times.get(_key(row))) for row in rows]
    best = fastest([row for row in timed if row.model == FLOAT])
    if best is None or best.median_ms is None:
        return timed
    limit = best.median_ms
    return [
        row
        if row.median_ms is None or row.model == FLOAT
        else dc.replace(row, slower_than_float=row.median_ms > limit)
        for row in timed
    ]


def _check(candidates: Mapping[str, onnx.ModelProto], inputs: FloatArray, batch: int) -> None:
    if not candidates:
        raise SpecError("no candidates to choose from; give one graph at least")
    if FLOAT in candidates:
        raise SpecError(f"the name {FLOAT!r} is kept for float_graph; name the candidate otherwise")
    if inputs.ndim != 4 or not len(inputs):
        raise SpecError(f"inputs must be images (N, C, H, W), one at least, got {inputs.shape}")
    if batch < 1:
        raise SpecError(f"batch must be 1 or more, got {batch}")
