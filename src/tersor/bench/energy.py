"""Energy of one input, counted: operations and weight bytes at the prices of one table, not measured."""

from __future__ import annotations

# Picojoules at 45 nm (Horowitz 2014, "Computing's energy problem", figure 1.1.9).
FLOAT32_MAC_PJ = 3.7 + 0.9
INT8_MAC_PJ = 0.2 + 0.1  # the product of 8 bits, its sum in 32
DRAM_BYTE_PJ = 1300.0 / 8  # the least that a 64-bit read is given there


def counted_energy_mj(macs: float, weight_bytes: float, *, integers: bool, batch: int = 1) -> float:
    """Millijoules of one input: `macs` multiplications with their sums, and `weight_bytes` read from memory once a
    run of `batch` inputs. Activations are taken to stay in the caches. Only ratios of it mean anything on another
    chip."""
    each = INT8_MAC_PJ if integers else FLOAT32_MAC_PJ
    return (macs * each + weight_bytes * DRAM_BYTE_PJ / batch) * 1e-9
