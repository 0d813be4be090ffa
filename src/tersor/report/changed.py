"""The inputs that get another answer than before, with small pictures."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

from tersor.report.page import text
from tersor.report.told import Json, Told
from tersor.report.words import count, percent

PICTURE = re.compile(
    r'<img class="thumb" data-example="(\d{1,9})" alt="[^"<>]*" src="data:image/png;base64,([A-Za-z0-9+/=]+)">'
)
KINDS = {
    "lost": "Right before, wrong now",
    "won": "Wrong before, right now",
    "neither": "Wrong before and now",
    "unknown": "Another answer than before (which is right is not known: there are no labels)",
}


def changed_html(told: Told) -> str:
    """How many answers changed, and the most telling of them."""
    held = told.details["changed"]
    parts = [f"<p>{text(changed_words(held))}</p>"]
    for kind, title in KINDS.items():
        own = [each for each in held["examples"] if each["kind"] == kind]
        if own:
            items = "\n".join(_example(each, told.pictures) for each in own)
            shown = f", {len(own)} shown" if len(own) < held[kind] else ""
            parts.append(
                f"<h3>{text(title)} ({held[kind]:,}{shown})</h3>\n"
                f'<ul class="changed" role="list" tabindex="0" aria-label="{text(title)}">{items}</ul>'
            )
    if not held["shown"]:
        parts.append('<p class="note">Single inputs are left out (--no-examples).</p>')
    elif held["examples"]:
        parts.append(f'<p class="note">{text(_note(told))}</p>')
    return "\n".join(parts)


def changed_words(held: Json) -> str:
    """The counts in a sentence."""
    whole, number = held["num_samples"], held["num_changed"]
    said = (
        f"{number:,} of {count(whole, 'held-out input')} ({percent(number / max(whole, 1), 1)} %) get another answer "
        "than from the original"
    )
    if not number or held["unknown"]:
        return f"{said}."
    return (
        f"{said}: right before and wrong now {held['lost']:,}, wrong before and right now {held['won']:,}, wrong both "
        f"times {held['neither']:,}."
    )


def _note(told: Told) -> str:
    said = "Of each kind those that the original was surest of come first; per cents are how sure each network was."
    if told.conditions.get("synthetic"):
        return f"{said} There are no pictures: these inputs were made from batch-norm statistics."
    if not told.pictures:
        return f"{said} The pictures were in the page that the run wrote, and nowhere else."
    return f"{said} The pictures are small copies of the inputs, in this page only."


def _example(each: Json, pictures: Mapping[int, bytes]) -> str:
    index = int(each["index"])
    drawn = '<span class="thumb" aria-hidden="true"></span>'
    if index in pictures:
        data = base64.b64encode(pictures[index]).decode("ascii")
        drawn = f'<img class="thumb" data-example="{index}" alt="input {index}" src="data:image/png;base64,{data}">'
    label = (
        "" if each["label"] is None else f'<span class="truth">label: {text(each["label"])}</span>'
    )
    return f"<li>{drawn}<div>{_answer('before', each)}{_answer('now', each)}{label}</div></li>"


def _answer(when: str, each: Json) -> str:
    side = "before" if when == "before" else "after"
    return (
        f'<span class="said"><span class="when">{when}</span> <b>{text(each[side])}</b> '
        f"{percent(each[f'{side}_confidence'], 0)}\u00a0%</span>"
    )


def pictures_in(page: str) -> dict[int, bytes]:
    """The pictures of a page that was written before, by their example's index."""
    found = {}
    for index, data in PICTURE.findall(page):
        try:
            found[int(index)] = base64.b64decode(data, validate=True)
        except ValueError:  # not ours: the page was edited
            continue
    return found
