"""`FILE.py:FUNCTION`: a function out of a file of the user's own, run because the user named it."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from tersor.errors import SpecError, UnknownNameError
from tersor.registry import did_you_mean


def is_user_file(name: str) -> bool:
    """True for `PATH.py:FUNCTION`."""
    path, colon, _ = name.rpartition(":")
    return bool(colon) and path.endswith(".py")


def load_function(name: str) -> Callable[..., Any]:
    """Import the file and return the function (or class) it defines.

    Raises SpecError for a missing file or one that fails to run, UnknownNameError for a missing function.
    """
    file, _, function = name.rpartition(":")
    path = pathlib.Path(file)
    if not path.is_file():
        raise SpecError(f"no such file: {path} (from {name!r})")
    module_name = f"tersor_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SpecError(
            f"{path} failed while it was run: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownNameError(
            f"{path} defines no function {function!r}; it defines {', '.join(names) or 'none'}."
            + did_you_mean(function, names)
        )
    return found  # type: ignore[no-any-return]
