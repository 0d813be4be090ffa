"""Checks of what a file says, and JSON in its one form: text that anybody may have written.

Nothing here knows paths; the caller puts the file's name before the message.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import math
import re
from typing import Any

import numpy as np

from tersor.errors import ArtifactError
from tersor.registry import did_you_mean

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_DEPTH = 32  # of nested JSON lists and objects
MAX_NAME = 512  # characters
MAX_DIGITS = 20  # in a row, in a number; 64-bit integers take 19
MAX_DECODED_BYTES = (2 << 30) - 1  # protobuf's own limit, so also an ONNX graph's
MAX_SKELETON_BYTES = 4 << 20

# Ends at an unclosed quote too, so that no text makes the search start over at each of its quotes.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|\Z)', re.DOTALL)
# Opening brackets become 1, closing ones -1 (int8).
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))


def digest_of(data: bytes | memoryview) -> str:
    """32 hexadecimal digits: the first 128 bits of the SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()[:32]


def shown(name: object) -> str:
    """`name` in quotes for a message: one line of ASCII, cut when it is long."""
    text = ascii(name[:81] if isinstance(name, str) else name)
    return text if len(text) <= 80 else f"{text[:76]}..."


def canonical_json(value: Any) -> bytes:
    """The one form in which JSON is written: sorted keys, no spaces, ASCII, shortest floats, no
    NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def check_plain(value: object, where: str, depth: int = 0) -> None:
    """Raise ArtifactError unless `value` is JSON that comes back as it went in."""
    if depth > MAX_DEPTH - 2:
        raise ArtifactError(f"{where} is nested more than {MAX_DEPTH - 2} levels deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ArtifactError(f"{where}: a key must be text, got {shown(key)}")
            _check_text(key, where)
            check_plain(item, f"{where}.{shown(key)[1:-1]}" if depth < 4 else where, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_plain(item, where, depth + 1)
    elif isinstance(value, str):
        _check_text(value, where)
    elif type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ArtifactError(f"{where}: an integer needs more than 64 bits")
    elif type(value) is float:
        if not math.isfinite(value):
            raise ArtifactError(f"{where} is {value}; only finite numbers are allowed, or null")
    elif value is not None and type(value) is not bool:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ArtifactError(f"{where} is of type {kind}; convert it to a plain Python value")


def check_name(name: str) -> None:
    """Raise ArtifactError unless `name` may name a tensor."""
    if not 1 <= len(name) <= MAX_NAME:
        raise ArtifactError(
            f"a tensor's name has {len(name)} characters; 1 to {MAX_NAME} are allowed"
        )
    if not name.isprintable():
        raise ArtifactError(
            f"the tensor name {shown(name)} holds characters that cannot be printed"
        )
    if ".." in re.split(r"[/\\]", name):
        raise ArtifactError(f"the tensor name {shown(name)} holds '..' as a step of a path")


def parse_json(data: bytes) -> Any:
    """JSON in canonical form only, which leaves no room for repeated keys, spaces or a second
    spelling."""
    outside = _STRING.sub(b"", data)
    steps = np.frombuffer(outside.translate(_STEPS, _NOT_BRACKETS), np.int8)
    if steps.size and int(np.cumsum(steps, dtype=np.int32).max()) > MAX_DEPTH:
        raise ArtifactError(f"the header is nested more than {MAX_DEPTH} levels deep")
    if _LONG_NUMBER.search(outside):
        raise ArtifactError(f"the header holds a number of more than {MAX_DIGITS} digits")
    del outside, steps  # the parsed header needs the room
    try:
        content = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
        canonical = canonical_json(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header is not valid JSON: {shown(str(error))}") from None
    if canonical != data:
        raise ArtifactError("the header is not in canonical form (sorted keys, no spaces, ASCII)")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key, count in _counted(keys).items() if count > 1)
        raise ArtifactError(f"the header holds the key {shown(repeated)} twice")
    return content


def _counted(keys: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts


def _no_constant(text: str) -> Any:
    raise ArtifactError(f"the header holds {text}; only finite numbers are allowed")


def check_shape(shape: Any, itemsize: int, where: str) -> None:
    """Raise ArtifactError unless `shape` is a list of at most 8 sizes whose elements fit in
    memory."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ArtifactError(
            f"{where}: the shape must be a list of at most {MAX_DIMENSIONS} dimensions"
        )
    for size in shape:
        check_count(size, MAX_DECODED_BYTES, f"{where}: a dimension")
    # Zeros are left out: numpy wants the product of the others in range even with no element.
    if math.prod(max(size, 1) for size in shape) * itemsize > MAX_DECODED_BYTES:
        raise ArtifactError(
            f"{where}: shape {shown(shape)} takes more than {MAX_DECODED_BYTES} bytes"
        )


def check_known(value: Any, known: Any, what: str) -> None:
    """Raise ArtifactError unless `value` is one of the names `known`."""
    if not isinstance(value, str) or value not in known:
        hint = did_you_mean(value[:80], known) if isinstance(value, str) else ""
        raise ArtifactError(
            f"{what} {shown(value)}; this Tersor knows {', '.join(sorted(known))}.{hint} "
            "A file of a newer Tersor may need: pip install -U tersor"
        )


def check_keys(content: Any, kind: type, where: str) -> None:
    """Raise ArtifactError unless `content` is an object with exactly the fields of `kind`."""
    names = {field.name for field in dc.fields(kind)}
    if not isinstance(content, dict):
        raise ArtifactError(f"{where} is not a JSON object")
    if set(content) != names:
        odd = sorted(set(content) ^ names)[0]
        state = "lacks the key" if odd in names else "has the unknown key"
        raise ArtifactError(f"{where} {state} {shown(odd)}")


def check_count(value: Any, most: int, where: str) -> None:
    """Raise ArtifactError unless `value` is a whole number from 0 to `most`."""
    if type(value) is not int or not 0 <= value <= most:
        raise ArtifactError(f"{where} must be an integer from 0 to {most}, got {shown(value)}")


def check_digest(value: Any, where: str) -> None:
    """Raise ArtifactError unless `value` could be a `digest_of`."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{32}", value):
        raise ArtifactError(
            f"{where}: the digest must be 32 hexadecimal digits, got {shown(value)}"
        )


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArtifactError(f"{where} holds text that is not Unicode: {shown(text)}") from None
