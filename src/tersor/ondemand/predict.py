"""What a candidate would cost, before it is built: forms for the search, and their correction by what was measured.

Harms are KL divergences and add: channels gone, bits of each layer, activations in 8 bits. Bytes are those of the
coder on samples of the real codes, times the weights left. Time is the measured whole with the layers' share of it
as the table of single layers says. Each kind has a factor, 1 at first, which what is measured sets to measured /
predicted: time one for each share that was timed, and between two of them one between theirs.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import numpy as np

from tersor.bench.drop import Drop, measured_drop
from tersor.bench.energy import counted_energy_mj
from tersor.methods.bit_options import BitOptions
from tersor.methods.prune_auto import Units
from tersor.methods.prune_family import ChannelFamily
from tersor.ondemand.candidate import Measured
from tersor.ondemand.network import LEARNED_BITS
from tersor.ondemand.original import Original, macs_of
from tersor.search.allocate import Option
from tersor.search.tradeoff import Form, Point

# Of the channels' cost. Where labels are learnt from, narrow networks are worth a try, and what the bounds allow to the
# last hundredth.
SHARES = (
    *(n / 100 for n in range(100, 45, -5)),
    *(0.42, 0.35, 0.3, 0.25, 0.2, 0.16, 0.13, 0.1, 0.08),
)
LEARNT_SHARES = (*SHARES[:14], *(round(0.3 * 0.967**n, 4) for n in range(1, 65)))
NOISES = tuple(0.01 * 1.6**n for n in range(16))  # in standard deviations of the logits
# Of the harm that channels alone make, what is left after the fit by least squares, and after a
# training; corrected by the first candidate.
FITTED, TRAINED = 0.4, 0.115
# Points that a network loses which learnt from labels for as long as such searches have: so many at this share of the
# original's multiplications, and with its square (ResNet-18 on CIFAR-10 at 9.4 %, 30 epochs, 0.2 to 0.3; at 2.1 %, 64
# epochs, 5.4). What its channels harm before it learns does not tell.
LEARNT_PT, LEARNT_MACS = 0.6, 0.06
RATED = 0.5  # of the bytes of few bits by layer, where codes are chosen by rate and distortion for as much harm
STATIC, FLOAT = "static", "weight_only"  # modes: integers, or codes that are computed with in float
FLOAT_MAY_WIN = 1.5  # times the integers' latency
FIXED = 0.15  # of a float network's time that channels have no part in
TIMED_CLIP = 0.2, 5.0  # measured over predicted time is believed so far
MARGIN = 0.98  # of a limit is aimed at: the last measurement differs from the prediction


@dc.dataclass
class Factors:
    """Measured over predicted."""

    channels: float
    bits: float = 1.0
    size: float = 1.0


class Predictor:
    """Forms of one network: (share of the channels' cost, mode); `first` is the whole network at 8 bits, measured.

    `family` is None for a network without channels to remove: there is one form then.
    """

    def __init__(
        self,
        original: Original,
        family: ChannelFamily | None,
        bits: Mapping[str, BitOptions],
        first: Measured,
        *,
        trains: bool = False,
        labelled: bool = False,
        by_macs: bool = False,
    ) -> None:
        self.by_macs = by_macs  # how `family` prices its channels; else in time
        self.original, self.family, self.bits, self.first = original, family, bits, first
        self.macs = macs_of(original.graph)
        self.labelled = labelled
        self.factors = Factors(1.0 if labelled else TRAINED if trains else FITTED)
        self.rated = RATED if trains else 1.0
        whole = sum(b.harm_kl[max(b.harm_kl)] for b in bits.values())
        self.activations = max(first.drop.harm_kl - whole, 0.0)
        told = sum(
            option.cost
            for b in bits.values()
            for option in b.options(b.num_weights)
            if option.choice == max(b.harm_kl)
        )
        self.beside = max(first.costs["size_bytes"] - told, 0.0)  # what no layer's codes take
        self._units: dict[float, tuple[Units, float]] = {}
        # (ms of what was run, the same over the prediction), by mode and share
        self._timed: dict[str, dict[float, tuple[float, float]]] = {STATIC: {}, FLOAT: {}}
        self._made: dict[float, float] = {1.0: 0.0}  # harm of the networks that were made, by share
        self._drops = _drops(original)
        # (logarithm of a harm, drop judged there over the drop expected), of all that was measured
        self._judged: list[tuple[float, float]] = []
        self._hear(first)

    def shares(self) -> list[float]:
        """The shares of the channels' cost that can be had, from all down."""
        least = 1.0 if self.family is None else self.family.least_share
        # All of a network without blocks is none that answers before it learns.
        whole = self.original.gone is None or self.family is None
        held = LEARNT_SHARES if self.labelled else SHARES
        return [share for share in held if (share == 1 and whole) or 1 > share > least]

    def units(self, share: float) -> tuple[Units, float]:
        """What goes at that share, and the harm of it without any recovery."""
        if self.family is None or share >= 1:
            return {}, 0.0
        if share not in self._units:
            choose = self.family.busiest if self.labelled else self.family.units
            units = choose(share)
            harm = self.family.harm(units)
            if any(len(held) for held in units.values()):
                harm = max(harm, self.family.unseen)
            self._units[share] = units, harm
        return self._units[share]

    def num_weights(self, share: float) -> int:
        """Weights that are left at that share, of the layers whose bits are chosen."""
        units, left = self.units(share)[0], {}
        if self.family is not None and units:
            left = self.family.sizes(units)
        return sum(left.get(f"{n}.weight", b.num_weights) for n, b in self.bits.items())

    def modes(self) -> list[str]:
        """Integers; and codes computed with in float where these may be as fast, or integers cost much."""
        fast = self.original.engine_ms < FLOAT_MAY_WIN * self.first.costs["latency_ms"]
        return [STATIC, FLOAT] if fast or self.first.drop.estimate_pt > 1 else [STATIC]

    def forms(self) -> list[Form]:
        """One form for each share and mode."""
        return [self.form(share, mode) for mode in self.modes() for share in self.shares()]

    def form(self, share: float, mode: str = STATIC) -> Form:
        """The network with `share` of its channels' cost, and the options of its layers."""
        units, harm = self.units(share)
        factors, left, macs = self.factors, {}, self._macs_left(units)
        if self.family is not None and units:
            left = self.family.sizes(units)
        options = {
            name: [
                dc.replace(option, cost=option.cost * self._size_of(option))
                for option in b.options(
                    left.get(f"{name}.weight", b.num_weights), harm_factor=factors.bits
                )
            ]
            for name, b in self.bits.items()
        }
        integers = mode == STATIC
        costs = {
            "latency_ms": self._time(share, mode),
            "macs": macs * self.macs,
        }
        costs["energy_mj"] = counted_energy_mj(
            costs["macs"],
            self.num_weights(share) * (1 if integers else 4),
            integers=integers,
            batch=self.original.batch,
        )
        activations = self.activations if integers else 0.0
        return Form(
            (share, mode), costs, self.beside, activations + self._channels(share, harm), options
        )

    def _size_of(self, option: Option) -> float:
        """The bytes in a file over those of the option by itself."""
        return self.factors.size * (self.rated if int(option.choice) <= LEARNED_BITS else 1.0)

    def _channels(self, share: float, raw: float) -> float:
        """What the channels' removal is taken to cost: as measured where that network was made, and else at least
        what a wider one was measured to cost."""
        if share in self._made:
            return self._made[share]
        if self.labelled:
            raw = self._expected_loss(share)
        wider = [harm for other, harm in self._made.items() if other > share]
        return max([raw * self.factors.channels, *wider])

    def _expected_loss(self, share: float) -> float:
        """The harm that is as much as a network is taken to lose after it learnt from labels."""
        units = self.units(share)[0]
        if self.family is None or not units:
            return 0.0
        macs = self.macs * self._macs_left(units)
        left = macs / (LEARNT_MACS * self.original.macs)
        harms, drops = self._drops
        return float(np.interp(LEARNT_PT / left**2, drops, harms))

    def limits(self, asked: Mapping[str, float]) -> dict[str, float]:
        """The limits of a budget in the search's axes: points of accuracy become harm."""
        found = {axis: MARGIN * value for axis, value in asked.items() if axis != "drop_pt"}
        if "drop_pt" in asked:
            found["harm"] = self.harm_of(asked["drop_pt"])
        return found

    def harm_of(self, drop_pt: float) -> float:
        """The KL divergence at which the original would be judged to lose `drop_pt`."""
        harms = self._drops[0]
        tried = np.geomspace(1e-6, harms[-1], 200)
        drops = np.maximum.accumulate([self.drop_of(float(harm)) for harm in tried])
        return float(np.interp(MARGIN * drop_pt, [0.0, *drops], [0.0, *tried]))

    def drop_of(self, harm: float) -> float:
        """What a model of that KL divergence would be judged to lose, in points."""
        harms, drops = self._drops
        expected = float(np.interp(harm, harms, drops))
        if not self._judged or harm <= 0:
            return expected
        logs, ratios = zip(*sorted(self._judged), strict=True)
        return expected * float(np.interp(np.log(harm), logs, ratios))

    def harm_like(self, drop: Drop) -> float:
        """The KL divergence at which a network that has not learnt from labels would lose as much as that `drop`.

        The answers of one that has are its own: how far they are from the original's does not tell what it loses.
        """
        harms, drops = self._drops
        return float(np.interp(max(self.original.judged_pt(drop), 0.0), drops, harms))

    def _hear(self, found: Measured) -> None:
        """Learn what a harm that was measured is judged as."""
        if self.labelled:  # what harms these is told by what they lose
            return
        harm = found.drop.harm_kl
        expected = float(np.interp(harm, *self._drops))
        if harm > 0 and expected > 0:
            ratio = self.original.judged_pt(found.drop) / expected
            # A small change may be judged none by chance; one that should cost points and did not learnt from labels.
            least = 0.4 / max(1.0, expected)
            self._judged.append((float(np.log(harm)), float(np.clip(ratio, least, 2.5))))

    def timed(self, share: float) -> bool:
        """Whether the integers' time at that share is measured."""
        return share in self._timed[STATIC] or not self.units(share)[0]

    def hear_time(self, share: float, ms: float, mode: str = STATIC) -> None:
        """Learn how long the network with that share takes, and that those near it differ from their predictions
        alike."""
        factor = float(np.clip(ms / self._predicted_ms(share, mode), *TIMED_CLIP))
        self._timed[mode][share] = ms, factor

    def _time(self, share: float, mode: str) -> float:
        """As measured, or as predicted and corrected by the shares on both sides that were measured."""
        if share in self._timed[mode]:
            return self._timed[mode][share][0]
        known = {1.0: 1.0} | {s: factor for s, (_, factor) in self._timed[mode].items()}
        shares, factors = zip(*sorted(known.items()), strict=True)
        return self._predicted_ms(share, mode) * float(np.interp(share, shares, factors))

    def _predicted_ms(self, share: float, mode: str) -> float:
        """By the table of single layers, or by multiplications; before any correction."""
        units = self.units(share)[0]
        whole = self.first.costs["latency_ms"] if mode == STATIC else self.original.engine_ms
        if self.family is None or not units:
            return whole
        if mode == STATIC and not self.by_macs:
            inside = min(1e-6 * self.family.whole, 0.95 * whole)
            return whole + inside * (self.family.cost(units) / self.family.whole - 1)
        return whole * (FIXED + (1 - FIXED) * self._macs_left(units))

    def _macs_left(self, units: Units) -> float:
        """The share of the multiplications that stays."""
        if self.family is None or not units:
            return 1.0
        return self.family.macs(units) / self.family.macs({})

    def hear_network(self, share: float, harm: float) -> None:
        """Learn the KL divergence of the network that was made with that share."""
        self._made[share] = harm
        raw = self._expected_loss(share) if self.labelled else self.units(share)[1]
        if raw > 0:
            self.factors.channels = float(np.clip(harm / raw, 0.005, 3.0))

    def correct(self, point: Point, found: Measured, network_harm: float, ms: float) -> None:
        """Learn from a candidate: `network_harm` is the KL divergence of its network before it got its bits, `ms` its
        time as a budget takes it."""
        (share, mode), factors = point.form.choice, self.factors
        self.hear_network(share, network_harm)
        bits = point.harm - point.form.harm
        learnt = self.labelled and found.choice.get("epochs")
        harm = self.harm_like(found.drop) if learnt else found.drop.harm_kl
        rest = harm - network_harm - self.activations * (mode == STATIC)
        if bits > 0 and rest > 0.1 * harm:
            factors.bits *= float(np.clip(rest / bits, 0.1, 5.0))
        if share < 1 or mode == FLOAT:
            self.hear_time(share, ms, mode)
        codes = point.costs["size_bytes"] - self.beside
        if codes > 0:
            real = found.costs["size_bytes"] - self.beside
            factors.size *= float(np.clip(real / codes, 0.5, 2.0))
        self._hear(found)

    def choice(self, share: float, mode: str, bits: Mapping[str, int]) -> dict[str, Any]:
        """What a model is made by, as a JSON-ready dict."""
        told = {"channels_share": share, "mode": mode, "bits": dict(bits)}
        gone = self.original.gone
        return told if gone is None else {**told, "without": [each.layer for each in gone.layers]}

    def described(self, point: Point) -> dict[str, Any]:
        """A point of the search as a JSON-ready dict; nothing of it is measured."""
        share, mode = point.form.choice
        bits = {layer: int(option.choice) for layer, option in point.choices.items()}
        return {
            **self.choice(share, mode, bits),
            **{axis: value for axis, value in point.costs.items() if axis != "harm"},
            "harm_kl": point.harm,
            "drop_pt": self.drop_of(point.harm),
        }


def _drops(original: Original) -> tuple[list[float], list[float]]:
    """Harms (nats) and the drops (points) that the original's own logits with noise on them make: both rise.

    What a change of a network does to its answers is taken to be like noise; the correction sets it right.
    """
    rng, logits = np.random.default_rng(0), original.logits
    size = float(logits.std())
    direction = rng.standard_normal(logits.shape).astype(np.float32) * size
    harms, drops = [0.0], [0.0]
    for noise in NOISES:
        found = measured_drop(logits, logits + noise * direction)
        if found.harm_kl > harms[-1] and original.judged_pt(found) > drops[-1]:
            harms.append(found.harm_kl)
            drops.append(original.judged_pt(found))
    return harms, drops
