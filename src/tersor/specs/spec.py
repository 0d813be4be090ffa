"""What every request and plan can do: be frozen and compared, become JSON and come back."""

from __future__ import annotations

import dataclasses as dc
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


def require(ok: bool, message: str) -> None:
    """Raise SpecError(message) unless `ok`."""
    if not ok:
        raise SpecError(message)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise SpecError unless the field `name` has a value among `allowed`."""
    require(
        value in allowed,
        f"{name} must be one of {', '.join(allowed)}, got {value!r}."
        + did_you_mean(value, allowed),
    )
