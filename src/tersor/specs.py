"""What the user asks for: frozen, comparable, JSON round trip, no tensors.

A spec is a request (`Prune`, `Quantize`, `Finetune`, `Recipe`); a `Plan` is the answer of a method:
one decision per layer, which can be printed, saved and applied again to a fresh instance.
"""

from __future__ import annotations

import dataclasses as dc
import math
import numbers
from typing import Any, ClassVar

from tersor.errors import SpecError
from tersor.registry import did_you_mean

KINDS: dict[str, type[Spec]] = {}
SCALARS: dict[str, tuple[type, str]] = {
    "float": (numbers.Real, "a number"),
    "int": (numbers.Integral, "a whole number"),
    "str": (str, "text"),
}


WEIGHT_CODES = ("uniform", "codebook", "power_of_two", "ternary", "binary")
GRANULARITIES = ("per_tensor", "per_channel", "per_group")


@dc.dataclass(frozen=True)
class Spec:
    """Base of all requests. `kind` is the tag in JSON, on the command line and in report columns."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        KINDS[kind] = cls

    def __post_init__(self) -> None:
        for field in dc.fields(self):
            value = getattr(self, field.name)
            wanted, words = SCALARS.get(str(field.type), (object, ""))
            if words and (isinstance(value, bool) or not isinstance(value, wanted)):
                raise SpecError(f"{self.kind}.{field.name} must be {words}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, `kind` first; `from_dict` is its inverse."""
        values = {f.name: getattr(self, f.name) for f in dc.fields(self)}
        return {"kind": self.kind, **{k: _plain(v) for k, v in values.items()}}


def from_dict(data: dict[str, Any]) -> Spec:
    """Rebuild a Spec. Raises SpecError on an unknown kind or field: a typo never becomes a default."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise SpecError(
            f"unknown kind {kind!r}; expected one of {', '.join(sorted(KINDS))}."
            + did_you_mean(str(kind), KINDS)
        )
    cls = KINDS[kind]
    known = [f.name for f in dc.fields(cls)]
    if extra := sorted(set(fields) - set(known)):
        raise SpecError(
            f"{kind}: unknown field {extra[0]!r}; expected one of {', '.join(known)}."
            + did_you_mean(extra[0], known)
        )
    needed = [f.name for f in dc.fields(cls) if f.default is f.default_factory is dc.MISSING]
    if missing := [name for name in needed if name not in fields]:
        raise SpecError(f"{kind}: the field {missing[0]!r} is missing; it has no default")
    return cls(**{k: _rich(v) for k, v in fields.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _rich(value: Any) -> Any:
    if isinstance(value, dict):
        return from_dict(value)
    return tuple(_rich(v) for v in value) if isinstance(value, list) else value


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise SpecError(message)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(
        value in allowed,
        f"{name} must be one of {', '.join(allowed)}, got {value!r}."
        + did_you_mean(value, allowed),
    )


@dc.dataclass(frozen=True)
class Prune(Spec, kind="prune"):
    """Remove a share `sparsity` (0 to 1, exclusive of 1) of the weights with the lowest saliency.

    `scope` "layer" removes that share of every layer, "global" ranks all layers together; no layer falls
    below the density `floor`.
    `exclude` names layers left alone: exact names, or `re:PATTERN` (a full match).
    """

    sparsity: float = 0.5
    criterion: str = "l1"
    structure: str = "unstructured"
    scope: str = "layer"
    floor: float = 0.01
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            isinstance(self.floor, (int, float)) and 0 <= self.floor <= 1,
            f"prune.floor is the least density of a layer, 0 to 1, got {self.floor!r}",
        )
        _require(
            isinstance(self.sparsity, (int, float)) and 0 <= self.sparsity < 1,
            f"prune.sparsity is the share removed: at least 0 and below 1, got {self.sparsity!r}",
        )
        _one_of("prune.structure", self.structure, ("unstructured",))
        _one_of("prune.scope", self.scope, ("layer", "global"))


@dc.dataclass(frozen=True)
class Quantize(Spec, kind="quantize"):
    """Replace weights, and for the modes static and qat activations too, by codes of few bits.

    mode         static: activation ranges by `observer` from calibration inputs, fixed in the graph.
                 dynamic: weights of linear layers only; activation ranges are taken at run time.
                 weight_only: weights are stored as codes and computed in float.
                 qat: static, with weights and steps learned by training first (needs a network).
    bits         of a weight, 1 to 8; `activation_bits` of an activation, 2 to 8.
    mean_bits    above 0: mixed precision; bits of each layer are chosen by measured sensitivity so
                 that a weight takes that many on average, at most.
    edge_bits    bits of the first and of the last layer, where `bits` is fewer; 0: no exception.
    code         uniform (evenly spaced), codebook (k-means), power_of_two, ternary, binary.
    symmetry     of weights, `activation_symmetry` of activations: symmetric or asymmetric.
    granularity  what shares a scale: per_tensor, per_channel, or per_group of `group_size` inputs.
    weight_search  how a weight's scale is found: minmax, mse (least squared error), or auto: minmax
                 at 8 bits, mse at fewer.
    rounding     nearest; gptq and adaround use calibration inputs, no labels.
    equalize     cross-layer equalization before; `bias_correction` after. Both need no labels.
    """

    mode: str = "static"
    bits: int = 8
    activation_bits: int = 8
    mean_bits: float = 0.0
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
    num_calibration: int = 512
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("quantize.mode", self.mode, ("static", "dynamic", "weight_only", "qat"))
        _one_of("quantize.code", self.code, WEIGHT_CODES)
        for name in ("symmetry", "activation_symmetry"):
            _one_of(f"quantize.{name}", getattr(self, name), ("symmetric", "asymmetric"))
        _one_of("quantize.granularity", self.granularity, GRANULARITIES)
        _one_of("quantize.weight_search", self.weight_search, ("auto", "minmax", "mse"))
        _one_of("quantize.rounding", self.rounding, ("nearest", "gptq", "adaround"))
        for name, least in (("bits", 1), ("activation_bits", 2), ("edge_bits", 0)):
            value = getattr(self, name)
            _require(least <= value <= 8, f"quantize.{name} must be {least} to 8, got {value}")
        _require(
            self.mean_bits == 0 or 1 <= self.mean_bits <= 8,
            f"quantize.mean_bits must be 0 (the same bits everywhere) or 1 to 8, got {self.mean_bits}",
        )
        for name in ("group_size", "num_calibration"):
            value = getattr(self, name)
            _require(value >= 1, f"quantize.{name} must be at least 1, got {value}")
        for name in ("equalize", "bias_correction"):
            value = getattr(self, name)
            _require(
                isinstance(value, bool), f"quantize.{name} must be true or false, got {value!r}"
            )
        _refuse_contradictions(self)

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration inputs are read."""
        return (
            self.mode in ("static", "qat")
            or self.rounding != "nearest"
            or self.bias_correction
            or self.mean_bits > 0
        )


def _refuse_contradictions(spec: Quantize) -> None:
    """Combinations that cannot mean anything, or that no engine computes, each with its reason."""
    integers = spec.mode != "weight_only"
    kernels = f"quantize.mode {spec.mode} runs integer kernels, "
    whole = spec.code in ("uniform", "ternary", "binary") or (
        spec.code == "power_of_two" and spec.bits <= 4
    )
    _require(
        whole or not integers,
        f"{kernels}which multiply whole numbers of 8 bits; code {spec.code} at {spec.bits} bits has "
        "other values: use mode weight_only",
    )
    _require(
        spec.granularity != "per_group" or not integers,
        f"{kernels}which take one scale for each output channel: use mode weight_only for per_group",
    )
    _require(
        spec.code != "binary" or spec.bits == 1,
        f"quantize.code binary has 1 bit, got bits={spec.bits}",
    )
    _require(
        spec.code != "ternary" or spec.bits == 2,
        f"quantize.code ternary has the three values of 2 bits, got bits={spec.bits}",
    )
    _require(
        spec.code not in ("uniform", "power_of_two") or spec.bits >= 2,
        f"quantize.code {spec.code} needs 2 bits or more; for 1 bit use code binary or codebook",
    )
    _require(
        spec.symmetry == "symmetric" or spec.code == "uniform",
        f"quantize.symmetry asymmetric is for code uniform; {spec.code} has its own values",
    )
    _require(
        spec.symmetry == "symmetric" or not integers or spec.granularity == "per_tensor",
        f"{kernels}which take one zero point for each weight tensor: use granularity per_tensor or "
        "mode weight_only for asymmetric weights",
    )
    _require(
        spec.rounding != "adaround" or spec.code == "uniform",
        f"quantize.rounding adaround moves weights up or down one even step; code {spec.code} is "
        "not evenly spaced: use nearest or gptq",
    )
    _require(
        spec.mean_bits == 0 or spec.code == "uniform",
        f"quantize.mean_bits chooses between bits of code uniform, got code {spec.code}",
    )
    _require(
        spec.mode in ("static", "qat") or spec.activation_bits == 8,
        f"quantize.activation_bits applies to the modes static and qat, got mode {spec.mode}",
    )
    _require(
        spec.mode in ("static", "qat") or spec.activation_symmetry == "asymmetric",
        f"quantize.activation_symmetry applies to the modes static and qat, got mode {spec.mode}",
    )
    _require(
        spec.mode != "qat"
        or (spec.rounding == "nearest" and spec.code in ("uniform", "ternary", "binary")),
        "quantize.mode qat learns its codes of code uniform, ternary or binary; it takes no other "
        f"rounding, got code {spec.code}, rounding {spec.rounding}",
    )


@dc.dataclass(frozen=True)
class Finetune(Spec, kind="finetune"):
    """One training loop for training, fine-tuning and distillation.

    `learning_rate` is the peak of a one-cycle schedule: it rises over the share `warmup` of the
    steps and falls to zero by a half cosine. `small_epochs` epochs at the start run on images of
    `small_size` pixels (0: none), which costs less. `distill` is the share of the loss that comes from a
    teacher's logits, at `temperature`; at 1 no labels are used.
    `precision` "bf16" is autocast where the processor has it, else float32, and is reported.
    `compile` "auto" times both forms when the run is long enough to repay compiling.
    """

    epochs: float = 10.0
    learning_rate: float = 0.1
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    warmup: float = 0.2
    ema_decay: float = 0.99
    small_size: int = 0
    small_epochs: float = 0.0
    augment: str = "flip_crop"
    distill: float = 0.0
    temperature: float = 2.0
    precision: str = "bf16"
    compile: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "learning_rate", "temperature"):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value > 0,
                f"finetune.{name} must be finite and positive, got {value!r}",
            )
        _require(
            self.batch_size >= 2, f"finetune.batch_size must be 2 or more, got {self.batch_size}"
        )
        for name in ("momentum", "label_smoothing", "warmup", "ema_decay"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"finetune.{name} must be in [0, 1), got {value!r}")
        _require(
            0 <= self.distill <= 1, f"finetune.distill must be in [0, 1], got {self.distill!r}"
        )
        _require(
            0 <= self.small_epochs <= self.epochs,
            f"finetune.small_epochs must be between 0 and epochs ({self.epochs}), got "
            f"{self.small_epochs!r}",
        )
        _require(
            self.small_size >= 0,
            f"finetune.small_size must be 0 (none) or more, got {self.small_size!r}",
        )
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            f"finetune.weight_decay must be finite and 0 or more, got {self.weight_decay!r}",
        )
        _one_of("finetune.augment", self.augment, ("none", "flip_crop", "crop"))
        _one_of("finetune.precision", self.precision, ("bf16", "float32"))
        _one_of("finetune.compile", self.compile, ("auto", "on", "off"))


@dc.dataclass(frozen=True)
class Recipe(Spec, kind="recipe"):
    """Steps in the order they are applied, and the seed that makes them reproducible."""

    steps: tuple[Spec, ...]
    seed: int = 0


@dc.dataclass(frozen=True)
class LayerPlan(Spec, kind="layer_plan"):
    """What happens to one layer. `action` is keep, prune, int8 (integer kernels), dynamic or
    weight_only; `reason`
    says why a layer is kept."""

    layer: str
    action: str
    sparsity: float = 0.0
    bits: int = 32
    reason: str = ""


@dc.dataclass(frozen=True)
class Plan(Spec, kind="plan"):
    """The answer to a request: one decision per layer, in the order of the model."""

    request: Spec
    layers: tuple[LayerPlan, ...] = ()
