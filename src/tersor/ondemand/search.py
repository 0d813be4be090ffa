"""The search: predict, choose, build, measure, correct, again; then the best of what was measured."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx

from tersor.artifact import load
from tersor.errors import BudgetError, EngineError, ModelError
from tersor.graph.layers import num_weights
from tersor.methods.restore import unheld
from tersor.methods.squeeze_search import Priced
from tersor.ondemand import coding
from tersor.ondemand.build import drop_told, network, networks_elsewhere, told_of
from tersor.ondemand.candidate import Measured, measured, measured_before
from tersor.ondemand.effort import Effort, Watch
from tersor.ondemand.facts import Facts
from tersor.ondemand.front import told_front
from tersor.ondemand.kept import Kept
from tersor.ondemand.network import Network, Wanted, few_bits, request_of, rounded
from tersor.ondemand.original import Original
from tersor.ondemand.predict import STATIC, Predictor
from tersor.ondemand.probe import probed
from tersor.runs.executors import Executor, open_executor
from tersor.search.tradeoff import GOALS, HARM, SIZE, Point, best, nearest
from tersor.specs import Plan

FREE_PT = 0.1  # points that may be lost to make the rest small, where no drop is given
SLOWER = 1.6  # an engine that took so many times the fastest is not tried again
LEARNT = "networks without some channels learnt from the labels of the training part; --no-labels leaves these out"
AHEAD = 4  # networks that are made at once where there are workers
TEACHER_KL = 1e-3  # nats: a teacher so near the original is as good
PROBES = 8  # networks whose time is measured before one of them is made
AFTER_SHARE = 1.3  # of the time of the last candidate must be left for another
# Of the time of a network that learnt from labels; one that learns for less is seldom the better one.
AGAIN_SHARE = 0.25
UNBUILT = (MemoryError, EngineError, ModelError)  # what ends a candidate, not the search
Record = Callable[[dict[str, Any]], None]


@dc.dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    `answer` is the model to take: within the budget where `met`, else the nearest to it, and `axis` is the bound
    that is passed most and `layer` the layer that stands in its way. `measured` are all models that were built.
    `front` holds what could be had instead, measured or predicted.
    """

    answer: Measured
    met: bool
    limits: Mapping[str, float]
    measured: tuple[Measured, ...]
    front: tuple[dict[str, Any], ...]
    axis: str = ""
    layer: str = ""
    notes: tuple[str, ...] = ()


class Search:
    """Candidates of one original under one budget; `asked` are its limits in the units of the original's costs."""

    def __init__(
        self,
        original: Original,
        known: Facts,
        asked: Mapping[str, float],
        effort: Effort,
        kept: Kept,
        *,
        relative_latency: bool = False,
        seed: int = 0,
        workers: Executor | None = None,
        record: Record = lambda row: None,
        watch: Watch,
        made: Sequence[Measured] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.original, self.known, self.asked, self.effort = original, known, asked, effort
        self.kept, self.clock, self.seed = kept, kept.clock, seed
        self.relative_latency = relative_latency
        self.labelled = effort.learns_labels and original.labels is not None
        self.record, self.watch = record, watch
        self.predictor = Predictor(
            original,
            known.family,
            known.bits,
            known.first,
            trains=effort.trains,
            labelled=self.labelled,
            by_macs=known.by_macs,
        )
        self.made: list[Measured] = list(made)
        self.workers = workers or open_executor("local")
        self._spread_out: set[float] = set()  # shares whose networks the workers made
        self._networks: dict[float, Network] = {1.0: known.whole}
        self._priced: dict[float, Priced] = {}
        self._making = 0.0  # seconds of the last build that its network took, with its training
        self.notes = [*notes, *known.notes]
        self._failed: set[Any] = set()  # forms that could not be built
        self._missed: set[Any] = set()  # forms whose nearest point was built, where nothing fits
        if not made:
            self._keep(known.first)

    def from_(self, original: Original, known: Facts, kept: Kept, note: str) -> Search:
        """The same search from another start; what was made stays."""
        return Search(
            original,
            known,
            self.asked,
            self.effort,
            kept,
            relative_latency=self.relative_latency,
            seed=self.seed,
            workers=self.workers,
            record=self.record,
            watch=self.watch,
            made=self.made,
            notes=[*self.notes, note],
        )

    def reached(self) -> tuple[float, str]:
        """Of what the search would build next the multiplications, and the axis that it passes, "" where none; by the
        measured time, where a network is dear to make."""
        point, axis = self._timed_point()
        return point.costs["macs"], axis

    def point(self) -> tuple[Point, str]:
        """What the search would build next, by prediction; and the axis that it passes, "" where none.

        Before any network has learnt from labels it is only guessed what one will lose: where no point is expected to
        be within the budget, that which loses least and keeps all else is worth the try.
        """
        predictor = self.predictor
        limits = predictor.limits(self.asked)
        forms = [form for form in predictor.forms() if form.choice not in self._failed]
        forms = forms or predictor.forms()
        slack = predictor.harm_of(FREE_PT)
        tries = [limits]
        if self.labelled and not any(each.choice.get("labels") for each in self.made):
            tries.append({axis: limit for axis, limit in limits.items() if axis != HARM})
        for each in tries:
            with contextlib.suppress(BudgetError):
                return best(forms, each, slack=slack), ""
        fresh = [form for form in forms if form.choice not in self._missed]
        return nearest(fresh or forms, tries[-1])

    def _timed_point(self) -> tuple[Point, str]:
        """As `point`; where a network is dear to make, its time is measured before and the choice made again."""
        for _ in range(PROBES):
            share, mode = self.point()[0].form.choice
            if not self.effort.trains or mode != STATIC or self.predictor.timed(share):
                break
            self._probe(share)
        return self.point()

    def _probe(self, share: float) -> None:
        self.watch(f"how long {share:.0%} of the channels' time is", 0.0)
        plan = self._wanted(share).plan
        assert plan is not None, "the whole network was timed first"

        def make(_: pathlib.Path) -> dict[str, float]:
            seconds = self.effort.timing_seconds
            ms, speedup = probed(self.original, plan, self.engines(), seconds=seconds)
            return {"ms": ms, "speedup": speedup}

        try:
            told, _ = self.kept.piece("time", {"share": share}, make)
        except UNBUILT as error:
            self._note_failed(f"{share:.0%} of the channels' time", (share, STATIC), error)
            return
        relative = self.original.costs["latency_ms"] / told["speedup"]
        self.predictor.hear_time(share, relative if self.relative_latency else told["ms"])

    def run(self) -> Found:
        """Build candidates until they repeat, or the rounds or the time are used up; one is always built."""
        tried: set[Any] = {((1.0, STATIC), (8,))}
        last = self.known.first.seconds
        for number in range(1, self.effort.rounds + 1):
            point, axis = self._timed_point()
            if self._spread(point.form.choice[0]):
                point, axis = self.point()
            bits = {layer: int(option.choice) for layer, option in point.choices.items()}
            key = (point.form.choice, tuple(bits.values()))
            if set(bits.values()) == {8}:
                key = (point.form.choice, (8,))
            if axis:
                self._missed.add(point.form.choice)
            if number > 1 and not self._time_for_another(last):
                break
            if key in tried:
                if axis and len(self._missed) < len(self.predictor.forms()):
                    continue
                break
            tried.add(key)
            before, self._making = self.clock.passed, 0.0
            self._build(number, point, bits)
            last = self.clock.passed - before - self._making
        return self.found()

    def _time_for_another(self, last: float) -> bool:
        """Whether there is, after a candidate that took `last` seconds without its training."""
        learnt = [each.seconds for each in self.made if each.choice.get("labels")]
        return self.clock.left >= max(AFTER_SHARE * last, AGAIN_SHARE * max(learnt, default=0.0))

    def found(self) -> Found:
        """The best of what was measured, and the front around it."""
        fitting = [each for each in self.made if self.excess(each)[0] <= 1]
        point, axis = self.point()
        real = [(each, self._value(each, "drop_pt")) for each in self.made]
        front = told_front(real, self.predictor)
        if fitting:
            answer = self._chosen(fitting)
            return Found(answer, True, self.asked, tuple(self.made), front, notes=tuple(self.notes))
        answer = min(self.made, key=lambda each: self.excess(each)[0])
        axis = self.excess(answer)[1]
        layer = point.bound_layer or _dearest(point)
        return Found(
            answer, False, self.asked, tuple(self.made), front, axis, layer, tuple(self.notes)
        )

    def excess(self, each: Measured) -> tuple[float, str]:
        """The largest ratio of what was measured to its limit, and the axis; at most 1 where all is met."""
        ratios = [(self._value(each, axis) / limit, axis) for axis, limit in self.asked.items()]
        return max(ratios, default=(0.0, ""))

    def _value(self, each: Measured, axis: str) -> float:
        if axis == "drop_pt":
            return max(self.original.judged_pt(each.drop), 0.0)
        if axis == "latency_ms" and self.relative_latency:  # both in the same run
            return self.original.costs["latency_ms"] / each.speedup
        return each.costs[axis]

    def _chosen(self, fitting: Sequence[Measured]) -> Measured:
        """As `search.tradeoff.best`, on what was measured."""
        goals = [axis for axis in GOALS if axis not in self.asked]
        if "drop_pt" not in self.asked:
            least = min(self._value(each, "drop_pt") for each in fitting)
            fitting = [each for each in fitting if self._value(each, "drop_pt") <= least + FREE_PT]
        if not goals:
            return min(
                fitting, key=lambda each: (self._value(each, "drop_pt"), each.costs["size_bytes"])
            )
        return min(fitting, key=lambda e: sum(math.log(e.costs[axis]) for axis in goals))

    def _build(self, number: int, point: Point, bits: Mapping[str, int]) -> None:
        share, mode = point.form.choice

        def make(place: pathlib.Path) -> dict[str, Any] | None:
            started = self.clock.passed
            made = self._network(share)
            graph, plan, by_rate = self._coded(made, point, bits)
            self.watch(f"candidate {number}: file, engine, answers", 0.0)
            found = measured(
                self.original,
                graph,
                plan,
                place / f"candidate_{number}.tersor",
                self.predictor.choice(share, mode, bits)
                | {"epochs": made.epochs, "labels": made.drop is not None},
                macs=point.form.costs["macs"],
                state=unheld(made.module, made.graph),
                engines=self.engines() if mode == STATIC else ["onnxruntime"],
                seconds=self.effort.timing_seconds,
                quick_coding=not by_rate,
            )
            if found is None:
                return None
            row = dc.replace(found, seconds=self.clock.passed - started).row()
            return {"row": row, "network": told_of(made)}

        asked = {"number": number, "share": share, "mode": mode, "bits": dict(bits)}
        try:
            told, place = self.kept.piece("candidate", asked, make)
        except UNBUILT as error:
            self._note_failed(f"candidate {number}", point.form.choice, error)
            return
        if told is None:
            return
        found = measured_before(told["row"], place)
        if self.labelled and found.choice["epochs"] and LEARNT not in self.notes:
            self.notes.append(LEARNT)
        ms = self._value(found, "latency_ms")
        self.predictor.correct(point, found, self._harm(told["network"]), ms)
        self._keep(found)

    def _harm(self, told: Mapping[str, Any]) -> float:
        """Of a network: its distance from the original, or where it learnt from labels one that loses as much."""
        drop = drop_told(told)
        return float(told["harm_kl"]) if drop is None else self.predictor.harm_like(drop)

    def _note_failed(self, what: str, choice: Any, error: BaseException) -> None:
        """The search goes on without what cannot be built."""
        self._failed.add(choice)
        self.notes.append(f"{what} failed: {str(error) or 'it needs more memory than there is'}")

    def _coded(
        self, made: Network, point: Point, bits: Mapping[str, int]
    ) -> tuple[onnx.ModelProto, Plan, bool]:
        """The graph of `made` at the bytes of `point`, its plan, and whether its codes were chosen by rate and
        distortion: with few bits, an effort that has the time, and a price that comes to these bytes."""
        share, mode = point.form.choice
        spare = self.clock.left - coding.seconds_to_code(num_weights(made.graph))
        if self.effort.trains and few_bits(bits) and spare > self.known.first.seconds:
            size = point.costs[SIZE] - self.predictor.beside - coding.bytes_of_scales(made)
            spec = request_of(self.original, mode, True)
            near = self._priced.get(share)
            try:
                graph, plan, self._priced[share] = coding.coded(
                    self.original, made, int(size), spec, self.watch, near=near, seed=self.seed
                )
                return graph, plan, True
            except BudgetError as error:
                self.watch(f"bits by layer instead: {error}", 0.0)
        return *rounded(self.original, made, bits, self.watch, mode=mode), False

    def _network(self, share: float) -> Network:
        if share not in self._networks:
            started = self.clock.passed
            wanted = self._wanted(share)
            self._networks[share] = network(self.original, wanted, self.kept, self.watch)
            self._making = self.clock.passed - started
        return self._networks[share]

    def _wanted(self, share: float) -> Wanted:
        family, (units, _) = self.known.family, self.predictor.units(share)
        gone = any(len(held) for held in units.values())
        before = self.original.gone
        plan = family.plan(units) if family is not None and (gone or before) else None
        if plan is not None and before is not None:
            plan = plan.after((before,))
        reserve = 3 * self.known.first.seconds + coding.seconds_to_code(
            self.predictor.num_weights(share)
        )
        seconds = self.effort.trained_share * (self.clock.left - reserve)
        return Wanted(share, plan, seconds, self.seed, self.labelled, self._teacher)

    @functools.cached_property
    def _teacher(self) -> onnx.ModelProto | None:
        """The whole network at 8 bits, all its blocks in it, where it is learnt from and answers as the original."""
        first = self.made[0]
        if not self.effort.trains:
            return None
        return load(first.path).to_onnx() if first.drop.harm_kl <= TEACHER_KL else None

    def _spread(self, share: float) -> bool:
        """Make the network of `share`, and of those near it that may be next, where the workers are; the prediction
        hears what they cost. False where that is here, or there is nothing to make."""
        if self.workers.here or share == 1 or share in self._spread_out:
            return False
        shares = [s for s in self.predictor.shares() if s < 1 and s not in self._spread_out]
        place = shares.index(share)
        near = sorted(shares, key=lambda s: abs(shares.index(s) - place))[:AHEAD]
        self._spread_out.update(near)
        wanted = [self._wanted(s) for s in near]
        found, problems = networks_elsewhere(
            self.original, wanted, self.kept, self.workers, self.watch
        )
        for each, told in sorted(found.items(), reverse=True):
            self.predictor.hear_network(each, self._harm(told))
        self.notes += problems
        return True

    def engines(self) -> list[str]:
        """Those that are worth timing here."""
        times = self.known.first.engines_ms
        limit = SLOWER * min(times.values())
        return [engine for engine, ms in times.items() if ms <= limit]

    def _keep(self, found: Measured) -> None:
        self.made.append(found)
        self.record({"step": f"candidate {len(self.made) - 1}", **found.row()})


def _dearest(point: Point) -> str:
    """The layer that takes the most bytes."""
    return max(point.choices, key=lambda layer: point.choices[layer].cost, default="")
