"""The file a killed training goes on from: written beside its place and renamed, read with nothing trusted."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tersor.artifact.storage import write_whole
from tersor.errors import RunError
from tersor.runs.directory import CHECKPOINT
from tersor.specs import Finetune

ANEW = "remove it to start anew"


def write_checkpoint(path: pathlib.Path, spec: Finetune, parts: Mapping[str, Any]) -> None:
    """Write `parts` (tensors and plain values by name) for a training by `spec`; the old file stays until the
    new one is whole and on the disk. Raises RunError where it cannot be written."""
    held = io.BytesIO()
    torch.save({"spec": repr(spec), **parts}, held)
    write_whole(path, [held.getbuffer()], held.getbuffer().nbytes, again=True)


def state_bytes(module: nn.Module) -> bytes:
    """Parameters and buffers of a network, for `write_state`."""
    held = io.BytesIO()
    torch.save(module.state_dict(), held)
    return held.getvalue()


def write_state(path: pathlib.Path, state: bytes) -> None:
    """Write what `state_bytes` gave. Raises RunError where it cannot be written."""
    write_whole(path, [state], len(state))


def read_state_(path: pathlib.Path, module: nn.Module) -> None:
    """Put what `write_state` wrote into a network of the same shape. Raises RunError."""
    try:
        module.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:
        raise RunError(f"{path} cannot be read ({error}); {ANEW}") from None


def remove_checkpoints(place: pathlib.Path) -> None:
    """Remove the checkpoints of a step that is done from its directory. Raises RunError."""
    for path in place.glob(f"{CHECKPOINT}*"):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"{path} cannot be removed ({error.strerror or error}); run again to go on"
            ) from None


def found_bytes(path: pathlib.Path) -> bytes | None:
    """The bytes of a checkpoint; None where there is none. Raises RunError for one that cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"checkpoint {path} cannot be read ({error.strerror}); {ANEW}") from None


def read_checkpoint(
    path: pathlib.Path,
    spec: Finetune,
    device: torch.device,
    restore: Mapping[str, Callable[[Any], object]],
    content: bytes,
) -> None:
    """Hand each part of the checkpoint `path`, of this `content`, to the function of its name in `restore`, in that
    order.

    Raises RunError for a file that is no checkpoint, one of another recipe, and one whose parts do not fit.
    """
    try:
        held: Any = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:
        raise RunError(f"checkpoint {path} cannot be read ({error}); {ANEW}") from None
    if not isinstance(held, dict) or {"spec", *restore} - set(held):
        raise RunError(f"{path} is not a checkpoint of a training; {ANEW}")
    if held["spec"] != repr(spec):
        raise RunError(
            f"checkpoint {path} belongs to another recipe: {held['spec']}, asked for {spec!r}; {ANEW}"
        )
    try:
        for name, put in restore.items():
            put(held[name])
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"checkpoint {path} belongs to another network ({error}); {ANEW}") from None
