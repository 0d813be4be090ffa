"""The trials a search rests on: which channels are missed least, and how many bits each layer needs."""

from __future__ import annotations

import pathlib
from typing import Any

from tersor.methods.bit_options import BitOptions, bit_options
from tersor.methods.prune_family import ChannelFamily, Harms
from tersor.ondemand.effort import Watch
from tersor.ondemand.kept import Kept
from tersor.ondemand.latency import LatencyTable, time_cost
from tersor.ondemand.network import example_of
from tersor.ondemand.original import Original

FAMILY_IMAGES = 128  # on which channels are tried


def channels_tried(
    original: Original, kept: Kept, seed: int, watch: Watch, *, by_macs: bool = False
) -> ChannelFamily:
    """The channels ranked and priced, by the time of the layers or `by_macs` by their multiplications; the trials
    of groups and the times are kept, which took the time.

    Raises ModelError where none can be removed.
    """
    table = LatencyTable(original.batch, original.threads)

    def family(harms: Harms | None) -> ChannelFamily:
        return ChannelFamily(
            original.module,
            original.inputs[:FAMILY_IMAGES],
            example_of(original),
            cost_of=None if by_macs else time_cost(original.module, original.input_shape, table),
            harms=harms,
            on_progress=lambda share: watch("which channels are missed least", share),
            seed=seed,
        )

    made: list[ChannelFamily] = []

    def make(_: pathlib.Path) -> dict[str, Any]:
        made.append(family(None))
        return {"harms": made[0].harms, "times": table.times}

    told, _ = kept.piece("channels", {}, make)
    if made:
        return made[0]
    table.remember(told["times"])
    return family({name: (held[0], held[1]) for name, held in told["harms"].items()})


def bits_tried(original: Original, kept: Kept, seed: int, watch: Watch) -> dict[str, BitOptions]:
    """What each layer's bits cost and harm."""

    def tried(_: pathlib.Path) -> list[dict[str, Any]]:
        found = bit_options(
            original.graph,
            original.inputs,
            on_progress=lambda share: watch("how many bits each layer needs", share),
            seed=seed,
        )
        return [each.to_dict() for each in found.values()]

    told, _ = kept.piece("bits", {}, tried)
    return {each["layer"]: BitOptions.from_dict(each) for each in told}
