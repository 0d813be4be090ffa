"""Names: of the networks that pruning_finetuned.py leaves, read back, and of the files that squeeze.py makes."""

from __future__ import annotations

import re

START = re.compile(r"[a-z0-9_]+_[0-9]+kB(?=-)")  # a committed file that was trained on
# Each step of pruning and training: what was done, epochs, seed.
STEP = re.compile(
    r"-((?:as_it_is|blocks|widths|[a-z_]+-[a-z_]+-[a-z]+)[a-z0-9._+=~-]*?)-([0-9.]+)-[0-9]+(?=-[a-z]|$)"
)


def made_by(stem):
    """A network's name in words."""
    start = START.match(stem)
    words = [f"{start.group()}.tersor"] if start else []
    for how, epochs in STEP.findall(stem):
        kind, *parts = how.removesuffix("-fit").split("-")
        gone = {
            "as_it_is": "trained on",
            "blocks": f"without the blocks {', '.join(parts[:1]).replace('+', ', ')}",
            "widths": f"channels {', '.join(parts[1:]).replace('+', ', ')} stay ({parts[0] if parts else ''})",
            "unstructured": f"{float(parts[-1]):.0%} pruned ({parts[0]})" if parts[2:] else "",
        }.get(kind) or f"{kind}s to {parts[-1]} of the MACs at most ({parts[0]})"
        words.append(gone if epochs == "0" else f"{gone}, {epochs} epochs")
    return ", ".join(words)


def epochs_of(stem, rows):
    """All epochs behind a network; one that started from a committed file has those of its row behind it."""
    own = sum(float(epochs) for _, epochs in STEP.findall(stem))
    start = START.match(stem)
    if start is None:
        return own
    (row,) = (r for r in rows if piece_name(r) == f"{start.group()}.tersor")
    return own + row["epochs"]


def is_ours(row):
    """Whether a Tersor file was written for the row."""
    return row["form"].partition("=")[0] in ("size", "drop", "price")


def piece_name(row):
    """The name of a row's file among those committed; empty where no Tersor file was written."""
    return f"{row['model']}_{row['size_bytes'] // 1000}kB.tersor" if is_ours(row) else ""
