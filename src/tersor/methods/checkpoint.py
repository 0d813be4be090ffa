"""The file a killed training goes on from: written beside its place and renamed, read with nothing trusted."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tersor.artifact.storage import write_whole
from tersor.errors import RunError
from tersor.specs import Finetune

ANEW = "remove it to start anew"


def write_checkpoint(path: pathlib.Path, spec: Finetune, parts: Mapping[str, Any]) -> None:
    """Write `parts` (tensors and plain values by name) for a training by `spec`; the old file stays until the
    new one is whole and on the disk. Raises RunError where it cannot be written."""
    held = io.BytesIO()
    torch.save({"spec": repr(spec), **parts}, held)
    write_whole(path, [held.getbuffer()], held.getbuffer().nbytes, again=True)


def read_checkpoint(
    path: pathlib.Path,
    spec: Finetune,
    device: torch.device,
    restore: Mapping[str, Callable[[Any], object]],
) -> None:
    """Hand each part of a checkpoint to the function of its name in `restore`, in that order.

    Raises RunError for a file that is no checkpoint, one of another recipe, and one whose parts do not fit.
    """
    try:
        content: Any = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise RunError(f"checkpoint {path} cannot be read ({error}); {ANEW}") from None
    if not isinstance(content, dict) or {"spec", *restore} - set(content):
        raise RunError(f"{path} is not a checkpoint of a training; {ANEW}")
    if content["spec"] != repr(spec):
        raise RunError(
            f"checkpoint {path} belongs to another recipe: {content['spec']}, asked for {spec!r}; {ANEW}"
        )
    try:
        for name, put in restore.items():
            put(content[name])
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"checkpoint {path} belongs to another network ({error}); {ANEW}") from None
