"""Where a command writes: checked before any work, and told with its coverage afterwards."""

from __future__ import annotations

import pathlib
from typing import Any

from tersor.cli.output import Output, say, show_table
from tersor.errors import RunError, SpecError
from tersor.specs import Plan

PICTURES = (".html", ".svg")


def told(output: Output, target: pathlib.Path, size: int, plan: Plan) -> dict[str, Any]:
    """Print the coverage table and the file; return both."""
    layers = coverage(output, plan)
    say(output, f"wrote {target}, {size:,} bytes")
    return {"out": str(target), "size_bytes": size, "layers": layers}


def coverage(output: Output, plan: Plan) -> list[dict[str, Any]]:
    """Print what was done to each layer, or why not; return it. Columns that say nothing are left out."""
    layers = [{k: v for k, v in d.to_dict().items() if k != "kind"} for d in plan.layers]
    shown = [layer | {"kept": _kept(layer)} for layer in layers]
    nothing = {"bits": 32, "sparsity": 0, "kept": "", "reason": ""}
    telling = [name for name in nothing if any(line[name] != nothing[name] for line in shown)]
    columns = ("layer", "action", *telling)
    rows = [[layer[c] for c in columns] for layer in shown]
    show_table(output, f"coverage: {plan.request.kind}", columns, rows)
    return layers


def _kept(layer: dict[str, Any]) -> str:
    """What is left of a layer's channels, or its ranks, in words."""
    if layer["ranks"]:
        return f"rank {', '.join(map(str, layer['ranks']))}"
    parts = ("outputs", "inputs")
    return ", ".join(f"{len(layer[part])} {part}" for part in parts if layer[part])


def writable(path: str, suffix: str) -> pathlib.Path:
    """The target, checked before any work is done: its ending, its directory, and that it can be written."""
    from tersor.runs.processes import processes, scratch

    target = pathlib.Path(path)
    if target.suffix != suffix:
        raise SpecError(f"--out {path}: expected a name that ends in {suffix}")
    if target.is_dir():
        raise RunError(f"{target} is a directory; name a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror or error}") from None
    # Of several processes one writes what is kept.
    return target if processes().leads else scratch() / target.name


def picture(out: str) -> pathlib.Path:
    """The target of a figure (.svg) or of a page (.html), checked as `writable` does."""
    suffix = pathlib.Path(out).suffix
    if suffix not in PICTURES:
        raise SpecError(f"--out {out}: expected a name that ends in {' or '.join(PICTURES)}")
    return writable(out, suffix)
