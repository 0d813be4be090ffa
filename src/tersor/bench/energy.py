"""Energy of one input: counted, operations and weight bytes at the prices of one table; and measured, where the
processor's own counters can be read."""

from __future__ import annotations

import dataclasses as dc
import pathlib
import re
import time
from collections.abc import Callable

# Picojoules at 45 nm (Horowitz 2014, "Computing's energy problem", figure 1.1.9).
FLOAT32_MAC_PJ = 3.7 + 0.9
INT8_MAC_PJ = 0.2 + 0.1  # the product of 8 bits, its sum in 32
DRAM_BYTE_PJ = 1300.0 / 8  # the least that a 64-bit read is given there
POWERCAP = pathlib.Path("/sys/class/powercap")
_PACKAGE = re.compile(
    r"[a-z]+-rapl:\d+"
)  # one for each processor package; parts of it have a second number


def counted_parts_mj(
    macs: float, weight_bytes: float, *, integers: bool, batch: int = 1
) -> tuple[float, float]:
    """Millijoules of one input: those of `macs` multiplications with their sums, and those of `weight_bytes` read
    from memory once a run of `batch` inputs. Activations are taken to stay in the caches."""
    each = INT8_MAC_PJ if integers else FLOAT32_MAC_PJ
    return macs * each * 1e-9, weight_bytes * DRAM_BYTE_PJ / batch * 1e-9


def counted_energy_mj(macs: float, weight_bytes: float, *, integers: bool, batch: int = 1) -> float:
    """Millijoules of one input, the sum of `counted_parts_mj`. Only ratios of it mean anything on another chip."""
    return sum(counted_parts_mj(macs, weight_bytes, integers=integers, batch=batch))


@dc.dataclass(frozen=True)
class MeasuredEnergy:
    """What running took by the processor's counters (RAPL): `mj` millijoules of one input, None where it is not known,
    and `reason` why."""

    mj: float | None
    reason: str = ""


def measured_energy(
    run: Callable[[], object],
    batch: int,
    *,
    seconds: float = 1.0,
    root: pathlib.Path = POWERCAP,
) -> MeasuredEnergy:
    """The energy of one of the `batch` inputs that one call of `run` computes, over about `seconds`.

    It is that of the whole processor package, idle cores and other work included; the memory's own is not in it.
    Virtual machines show no counters, and most systems show them to root alone.
    """
    try:
        zones = sorted(zone for zone in root.iterdir() if _PACKAGE.fullmatch(zone.name))
    except OSError:
        zones = []
    if not zones:
        return MeasuredEnergy(None, "this machine shows no energy counters (RAPL)")
    try:
        before = [_microjoules(zone) for zone in zones]
        runs, end = 0, time.monotonic() + seconds
        while runs == 0 or time.monotonic() < end:
            run()
            runs += 1
        after = [_microjoules(zone) for zone in zones]
        spent = sum(_since(zone, a, b) for zone, a, b in zip(zones, before, after, strict=True))
    except PermissionError:
        return MeasuredEnergy(
            None, "the energy counters (RAPL) may not be read by this user; root may"
        )
    except (OSError, ValueError) as error:
        return MeasuredEnergy(None, f"the energy counters (RAPL) cannot be read: {error}")
    if spent <= 0:
        return MeasuredEnergy(None, "the energy counters (RAPL) stand still on this machine")
    return MeasuredEnergy(spent * 1e-3 / (runs * batch))


def _microjoules(zone: pathlib.Path) -> int:
    return int((zone / "energy_uj").read_text())


def _since(zone: pathlib.Path, before: int, after: int) -> int:
    """Microjoules between two readings of a counter that starts again at its end."""
    if after >= before:
        return after - before
    return after - before + int((zone / "max_energy_range_uj").read_text())
