"""Which codes weights and activations get."""

from __future__ import annotations

import dataclasses as dc

from tersor.specs.spec import Spec, one_of, require

WEIGHT_CODES = ("uniform", "codebook", "power_of_two", "ternary", "binary")
GRANULARITIES = ("per_tensor", "per_channel", "per_group")


@dc.dataclass(frozen=True)
class Quantize(Spec, kind="quantize"):
    """Replace weights, and for the modes static and qat activations too, by codes of few bits.

    mode         static: activation ranges by `observer` from calibration inputs, fixed in the graph.
                 dynamic: weights of linear layers only; activation ranges are taken at run time.
                 weight_only: weights are stored as codes and computed in float.
                 qat: static, with weights and steps learned by training first (needs a network).
    bits         of a weight, 1 to 8; `activation_bits` of an activation, 2 to 8.
    mean_bits    above 0: mixed precision; bits of each layer are chosen by measured sensitivity so
                 that a weight takes that many on average, at most. `code_bytes` above 0 is the same
                 limit as the bytes of all codes.
    edge_bits    bits of the first and of the last layer, where `bits` is fewer; 0: no exception.
    code         uniform (evenly spaced), codebook (k-means), power_of_two, ternary, binary.
    symmetry     of weights, `activation_symmetry` of activations: symmetric or asymmetric.
    granularity  what shares a scale: per_tensor, per_channel, or per_group of `group_size` inputs.
    weight_search  how a weight's scale is found: minmax, mse (least squared error), or auto: minmax
                 at 8 bits, mse at fewer.
    rounding     nearest; gptq and adaround use calibration inputs, no labels.
    equalize     cross-layer equalization before; `bias_correction` after. Both need no labels.
    reestimate   batch-norm re-estimation where batch norms are folded: the variance of every output
                 channel is brought back to that of the float layer too. No labels.
    """

    mode: str = "static"
    bits: int = 8
    activation_bits: int = 8
    mean_bits: float = 0.0
    code_bytes: int = 0
    edge_bits: int = 8
    code: str = "uniform"
    symmetry: str = "symmetric"
    activation_symmetry: str = "asymmetric"
    granularity: str = "per_channel"
    group_size: int = 64
    observer: str = "histogram"
    weight_search: str = "auto"
    rounding: str = "nearest"
    equalize: bool = False
    bias_correction: bool = False
    reestimate: bool = False
    num_calibration: int = 512
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("quantize.mode", self.mode, ("static", "dynamic", "weight_only", "qat"))
        one_of("quantize.code", self.code, WEIGHT_CODES)
        for name in ("symmetry", "activation_symmetry"):
            one_of(f"quantize.{name}", getattr(self, name), ("symmetric", "asymmetric"))
        one_of("quantize.granularity", self.granularity, GRANULARITIES)
        one_of("quantize.weight_search", self.weight_search, ("auto", "minmax", "mse"))
        one_of("quantize.rounding", self.rounding, ("nearest", "gptq", "adaround"))
        for name, least in (("bits", 1), ("activation_bits", 2), ("edge_bits", 0)):
            value = getattr(self, name)
            require(least <= value <= 8, f"quantize.{name} must be {least} to 8, got {value}")
        require(
            self.mean_bits == 0 or 1 <= self.mean_bits <= 8,
            f"quantize.mean_bits must be 0 (the same bits everywhere) or 1 to 8, got {self.mean_bits}",
        )
        require(
            self.code_bytes >= 0,
            f"quantize.code_bytes must be 0 (no limit) or more, got {self.code_bytes}",
        )
        for name in ("group_size", "num_calibration"):
            value = getattr(self, name)
            require(value >= 1, f"quantize.{name} must be at least 1, got {value}")
        for name in ("equalize", "bias_correction", "reestimate"):
            value = getattr(self, name)
            require(
                isinstance(value, bool), f"quantize.{name} must be true or false, got {value!r}"
            )
        _refuse_contradictions(self)

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration inputs are read."""
        return (
            self.mode in ("static", "qat")
            or self.rounding != "nearest"
            or self.corrects
            or self.is_mixed
        )

    @property
    def corrects(self) -> bool:
        """Whether the moments of layers' outputs are brought back after rounding."""
        return self.bias_correction or self.reestimate

    @property
    def is_mixed(self) -> bool:
        """Whether the bits of each layer are chosen by measured sensitivity."""
        return self.mean_bits > 0 or self.code_bytes > 0


def _refuse_contradictions(spec: Quantize) -> None:
    """Combinations that cannot mean anything, or that no engine computes, each with its reason."""
    integers = spec.mode != "weight_only"
    kernels = f"quantize.mode {spec.mode} runs integer kernels, "
    whole = spec.code in ("uniform", "ternary", "binary") or (
        spec.code == "power_of_two" and spec.bits <= 4
    )
    require(
        whole or not integers,
        f"{kernels}which multiply whole numbers of 8 bits; code {spec.code} at {spec.bits} bits has "
        "other values: use mode weight_only",
    )
    require(
        spec.granularity != "per_group" or not integers,
        f"{kernels}which take one scale for each output channel: use mode weight_only for per_group",
    )
    require(
        spec.code != "binary" or spec.bits == 1,
        f"quantize.code binary has 1 bit, got bits={spec.bits}",
    )
    require(
        spec.code != "ternary" or spec.bits == 2,
        f"quantize.code ternary has the three values of 2 bits, got bits={spec.bits}",
    )
    require(
        spec.code not in ("uniform", "power_of_two") or spec.bits >= 2,
        f"quantize.code {spec.code} needs 2 bits or more; for 1 bit use code binary or codebook",
    )
    require(
        spec.symmetry == "symmetric" or spec.code == "uniform",
        f"quantize.symmetry asymmetric is for code uniform; {spec.code} has its own values",
    )
    require(
        spec.symmetry == "symmetric" or not integers or spec.granularity == "per_tensor",
        f"{kernels}which take one zero point for each weight tensor: use granularity per_tensor or "
        "mode weight_only for asymmetric weights",
    )
    require(
        spec.rounding != "adaround" or spec.code == "uniform",
        f"quantize.rounding adaround moves weights up or down one even step; code {spec.code} is "
        "not evenly spaced: use nearest or gptq",
    )
    require(
        not spec.is_mixed or spec.code == "uniform",
        f"quantize.mean_bits and code_bytes choose between bits of code uniform, got code {spec.code}",
    )
    require(
        spec.mean_bits == 0 or spec.code_bytes == 0,
        "quantize.mean_bits and quantize.code_bytes are one limit said in two ways; give one, got "
        f"{spec.mean_bits:g} and {spec.code_bytes}",
    )
    require(
        not spec.reestimate or (spec.granularity != "per_tensor" and spec.mode != "qat"),
        "quantize.reestimate changes the scale of each output channel, which per_tensor does not "
        "have and qat has learned, got granularity "
        f"{spec.granularity}, mode {spec.mode}: use bias_correction or granularity per_channel",
    )
    require(
        spec.mode in ("static", "qat") or spec.activation_bits == 8,
        f"quantize.activation_bits applies to the modes static and qat, got mode {spec.mode}",
    )
    require(
        spec.mode in ("static", "qat") or spec.activation_symmetry == "asymmetric",
        f"quantize.activation_symmetry applies to the modes static and qat, got mode {spec.mode}",
    )
    require(
        spec.mode != "qat"
        or (spec.rounding == "nearest" and spec.code in ("uniform", "ternary", "binary")),
        "quantize.mode qat learns its codes of code uniform, ternary or binary; it takes no other "
        f"rounding, got code {spec.code}, rounding {spec.rounding}",
    )
