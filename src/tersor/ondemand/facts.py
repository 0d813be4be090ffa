"""What a search rests on, measured before it: the whole network at 8 bits, its channels and its layers."""

from __future__ import annotations

import dataclasses as dc
import pathlib
from collections.abc import Mapping
from typing import Any

from tersor.errors import ModelError
from tersor.methods.bit_options import BitOptions
from tersor.methods.prune_family import ChannelFamily
from tersor.methods.restore import unheld
from tersor.ondemand.candidate import Measured, measured, measured_before
from tersor.ondemand.effort import Effort, Watch
from tersor.ondemand.kept import Kept
from tersor.ondemand.network import Network, rounded
from tersor.ondemand.original import Original, macs_of
from tersor.ondemand.predict import STATIC
from tersor.ondemand.trials import bits_tried, channels_tried

ENGINES_AT_ONE = ("onnxruntime", "openvino")  # at larger batches all that are here are tried


@dc.dataclass(frozen=True, eq=False)
class Facts:
    """What was measured before the search: the whole network at 8 bits, its channels (priced by time or `by_macs`)
    and its layers."""

    first: Measured
    family: ChannelFamily | None
    bits: Mapping[str, BitOptions]
    whole: Network
    notes: tuple[str, ...]
    by_macs: bool = False


def facts(
    original: Original,
    effort: Effort,
    kept: Kept,
    *,
    by_macs: bool = False,
    seed: int = 0,
    watch: Watch,
) -> Facts:
    """Measure what the search rests on. Channels are priced by time, or `by_macs`: small networks spend much of their
    time on what no channel has part in, so that a share of it says little of their multiplications.

    Raises ModelError where no engine here runs the quantized network rightly.
    """
    whole = Network(1.0, original.module, original.graph, original.gone, 0.0)
    first = _first(original, whole, effort, kept, watch)
    family, notes = None, []
    try:
        family = channels_tried(original, kept, seed, watch, by_macs=by_macs)
    except ModelError as error:
        notes.append(f"no channels are removed: {error}")

    bits = bits_tried(original, kept, seed, watch)
    return Facts(first, family, bits, whole, tuple(notes), by_macs)


def _first(
    original: Original, whole: Network, effort: Effort, kept: Kept, watch: Watch
) -> Measured:
    def make(place: pathlib.Path) -> dict[str, Any] | None:
        started = kept.clock.passed
        graph, plan = rounded(original, whole, {}, watch)
        watch("the whole network at 8 bits: file, engines, answers", 0.0)
        found = measured(
            original,
            graph,
            plan,
            place / "candidate_0.tersor",
            {"channels_share": 1.0, "mode": STATIC, "bits": {}},
            macs=macs_of(original.graph),
            state=unheld(original.module, original.graph),
            engines=ENGINES_AT_ONE if original.batch == 1 else None,
            seconds=effort.timing_seconds,
        )
        if found is None:
            raise ModelError(
                "no engine here computes the quantized network rightly; see tersor benchmark --engine auto"
            )
        return dc.replace(found, seconds=kept.clock.passed - started).row()

    row, place = kept.piece("candidate", {"number": 0}, make)
    return measured_before(row, place)
