"""Layers by name or pattern: how a person says which layers a method leaves alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tersor.errors import SpecError
from tersor.registry import did_you_mean


def excluded_layers(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The `names` that an exact name or a `re:PATTERN` (full match) of `patterns` covers.

    Raises SpecError for a pattern that covers nothing, or that is no regular expression: a typo never
    leaves a layer unprotected in silence.
    """
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise SpecError(
                    f"exclude {pattern!r} is not a regular expression: {error}"
                ) from None
            covered = {name for name in names if expression.fullmatch(name)}
        else:
            covered = {name for name in names if name == pattern}
        if not covered:
            raise SpecError(
                f"exclude {pattern!r} matches no layer; the layers are {', '.join(names)}."
                + did_you_mean(pattern, names)
            )
        found |= covered
    return found
