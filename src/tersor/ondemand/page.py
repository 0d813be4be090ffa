"""The page of an answer, made when it is found and again whenever somebody asks: `write_page`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.artifact.storage import write_whole
from tersor.errors import RunError, TersorError
from tersor.ondemand.candidate import Measured
from tersor.ondemand.details import details
from tersor.ondemand.effort import Effort
from tersor.ondemand.facts import Facts
from tersor.ondemand.original import Original
from tersor.report.ondemand import Told, ondemand_page, pictures_in

RESULT, PLAN, DETAILS, PAGE = "result.json", "plan.json", "details.json", "report.html"


def tell(
    directory: pathlib.Path,
    original: Original,
    known: Facts,
    best: Measured,
    path: pathlib.Path,
    effort: Effort,
    **options: Any,
) -> dict[int, bytes]:
    """Write details.json into `directory` (`details` takes the `options`), and give the pictures of its examples.

    What cannot be told is said there and on the page: it must not cost the answer.
    """
    pictures: dict[int, bytes] = {}
    try:
        told, pictures = details(original, known, best, path, effort, **options)
    except TersorError as error:
        told = {"problem": str(error)}
    data = (json.dumps(told, indent=1, allow_nan=False) + "\n").encode()
    write_whole(directory / DETAILS, [data], len(data))
    return pictures


def write_page(
    directory: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    pictures: Mapping[int, bytes] | None = None,
) -> pathlib.Path:
    """Write report.html from the JSON files that lie in `directory` and the `rows` of its journal; its path.

    `pictures` are PNGs of the examples by their index. Without, those of the page that lies there are kept: they are
    nowhere else. Raises RunError for files that are missing or not those of an answer, or where nothing can be written.
    """
    page = directory / PAGE
    if pictures is None:
        pictures = pictures_in(page.read_text("utf-8")) if page.is_file() else {}
    told = Told(
        _read(directory / RESULT),
        _read(directory / PLAN),
        _read(directory / DETAILS) if (directory / DETAILS).is_file() else {},
        tuple(rows),
        pictures,
    )
    try:
        data = ondemand_page(told).encode()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{directory} does not hold an answer of tersor compress that this version can tell of: "
            f"{type(error).__name__} {error}"
        ) from None
    write_whole(page, [data], len(data))
    return page


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object")
    return found
