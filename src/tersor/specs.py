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
    """Replace weights, and for `mode` static activations too, by 8-bit integers.

    static: activation ranges by `observer` from calibration inputs, fixed in the graph.
    dynamic: weights of linear layers only; activation ranges are taken at run time.
    weight_only: weights are stored as integers and computed in float.
    """

    mode: str = "static"
    bits: int = 8
    granularity: str = "per_channel"
    observer: str = "histogram"
    num_calibration: int = 512
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("quantize.mode", self.mode, ("static", "dynamic", "weight_only"))
        _one_of("quantize.granularity", self.granularity, ("per_tensor", "per_channel"))
        _require(self.bits == 8, f"quantize.bits must be 8, got {self.bits}")
        _require(
            self.num_calibration >= 1,
            f"quantize.num_calibration must be at least 1 image, got {self.num_calibration}",
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
    """What happens to one layer. `action` is keep, prune, int8, dynamic or weight_only; `reason` says
    why a layer is kept."""

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
