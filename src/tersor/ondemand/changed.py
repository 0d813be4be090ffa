"""The held-out inputs whose answer is another one than the original's, and small pictures of the most telling."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.special import softmax

from tersor.ondemand.original import Original

FloatArray = npt.NDArray[np.float32]
LOST, WON, NEITHER, UNKNOWN = "lost", "won", "neither", "unknown"
SHOWN = {LOST: 6, WON: 3, NEITHER: 3, UNKNOWN: 12}  # of each kind, at most
LARGEST_SIDE = 96  # pixels of a picture


def changed(
    original: Original, logits: FloatArray, *, examples: bool = True
) -> tuple[dict[str, Any], dict[int, bytes]]:
    """What became of the held-out answers: logits (N, classes) now, beside the original's.

    The JSON object counts them: num_samples, num_changed, and of these, with labels, how many were right and are
    wrong (lost), were wrong and are right (won), or are wrong both times (neither), without labels unknown. `examples`
    are the most telling: of each kind those first that the original was surest of, with both answers and confidences
    (softmax), and the label where it is known. The pictures are PNGs by the example's `index`; inputs that were made
    from batch norms have none.
    """
    old, new = original.logits.argmax(1), logits.argmax(1)
    kinds = _kinds(old, new, original.labels)
    told: dict[str, Any] = {
        "num_samples": len(old),
        "num_changed": int((old != new).sum()),
        **{kind: sum(k == kind for k in kinds.values()) for kind in SHOWN},
        "shown": examples,
        "examples": [],
    }
    if not examples:
        return told, {}
    before, after = softmax(original.logits, axis=1), softmax(logits, axis=1)
    names = _names(original, logits.shape[1])
    for kind, most in SHOWN.items():
        own = [index for index, k in kinds.items() if k == kind]
        own.sort(key=lambda i: (-float(before[i, old[i]]), i))
        told["examples"] += [
            {
                "index": i,
                "kind": kind,
                "before": names[old[i]],
                "before_confidence": float(before[i, old[i]]),
                "after": names[new[i]],
                "after_confidence": float(after[i, new[i]]),
                "label": None if original.labels is None else names[int(original.labels[i])],
            }
            for i in own[:most]
        ]
    if original.synthetic:
        return told, {}
    images = original.splits.validation.images
    return told, {each["index"]: picture(images[each["index"]]) for each in told["examples"]}


def _kinds(
    old: npt.NDArray[np.int64], new: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None
) -> dict[int, str]:
    """What happened to each input whose answer changed, by its index."""
    found = {}
    for i in map(int, np.flatnonzero(old != new)):
        if labels is None:
            found[i] = UNKNOWN
        else:
            found[i] = LOST if old[i] == labels[i] else WON if new[i] == labels[i] else NEITHER
    return found


def _names(original: Original, count: int) -> list[str]:
    """The classes' names; by number where they are not known, or not of this network's answers."""
    known = original.splits.classes
    if len(known) == count and any(not name.isdigit() for name in known):
        return list(known)
    return [f"class {number}" for number in range(count)]


def picture(image: npt.NDArray[Any]) -> bytes:
    """A PNG of one input (C, H, W), uint8 or float32; floats are spread over their own range, since nobody says what
    black and white were. Three channels are red, green and blue, of others their mean is shown in grey."""
    pixels = image.astype(np.float64)
    if image.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (pixels - low) * (255 / (high - low) if high > low else 0.0)
    if len(pixels) != 3:
        pixels = pixels.mean(axis=0, keepdims=True)
    whole = pixels.round().astype(np.uint8)
    shown = Image.fromarray(
        whole[0] if len(whole) == 1 else np.ascontiguousarray(np.moveaxis(whole, 0, -1))
    )
    shown.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
