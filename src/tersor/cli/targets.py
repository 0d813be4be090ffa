"""Where a command writes: checked before any work, and told with its coverage afterwards."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tersor.cli.output import Output, say, say_interrupted, show_table
from tersor.errors import RunError, SpecError
from tersor.specs import Plan

if TYPE_CHECKING:  # slow to import, and only named here
    from torch import nn

    from tersor.data.arrays import Splits
    from tersor.runs import Run

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


def provenance(model: str, data: str | None, **more: str) -> dict[str, Any]:
    """Where a file comes from: what was named, without directories, the machine and the versions."""
    from tersor.bench.environment import environment

    where = environment()
    return {
        **{key: re.split(r"[/\\]", name)[-1] for key, name in {"model": model, **more}.items()},
        "data": data,
        "machine": {key: where[key] for key in ("cpu", "cores", "platform")},
        "versions": where["versions"],
    }


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


@contextlib.contextmanager
def keeping(
    target: pathlib.Path,
    model: str,
    splits: Splits,
    networks: Mapping[str, nn.Module],
    **asked: Any,
) -> Iterator[Run]:
    """The run in OUT.steps that a killed command goes on from, as long as it is asked the same of the same networks
    and data; gone once the block ends well, and where it ends otherwise and nothing was kept."""
    import importlib.metadata

    from tersor.methods.together import digest
    from tersor.runs import Run

    steps = target.with_name(f"{target.name}.steps")
    done = False
    with Run(steps, tell=say_interrupted) as run:
        run.begin(
            model=model,
            data=splits.name,
            **{name: digest(network) for name, network in networks.items()},
            data_fingerprint=splits.fingerprint(),
            **asked,
            tersor=importlib.metadata.version("tersor"),
        )
        try:
            yield run
            done = True
        finally:
            if done or not run.kept:
                shutil.rmtree(run.directory, ignore_errors=True)


def picture(out: str) -> pathlib.Path:
    """The target of a figure (.svg) or of a page (.html), checked as `writable` does."""
    suffix = pathlib.Path(out).suffix
    if suffix not in PICTURES:
        raise SpecError(f"--out {out}: expected a name that ends in {' or '.join(PICTURES)}")
    return writable(out, suffix)
