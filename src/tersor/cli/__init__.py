"""The command line: `tersor COMMAND ...`; every command calls the library and returns its JSON object."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from tersor.cli.trust import trusting
from tersor.errors import TersorError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 ok, 1 failed, 2 usage, 3 budget not met, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"tersor {importlib.metadata.version('tersor')}")
        return 0
    try:
        with _leader_alone_prints(), trusting(arguments) as trusted:
            answer = _parsed(trusted)()
            if "--json" in arguments:
                print(json.dumps(answer, allow_nan=False))
    except TersorError as error:
        return _failed(str(error), error.exit_code, arguments)
    except KeyboardInterrupt:
        return _failed("interrupted; finished work is kept", INTERRUPTED, arguments)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; there is nobody to tell
        return 1
    return 0


@contextlib.contextmanager
def _leader_alone_prints() -> Iterator[None]:
    """Under torchrun every process runs the command, and one has the word."""
    if not _rank():
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _rank() -> int:
    """The number of this process among those that torchrun started, else 0."""
    if "MASTER_ADDR" not in os.environ:
        return 0
    from tersor.runs.processes import processes

    return processes().rank


def _parsed(arguments: list[str]) -> Callable[[], dict[str, Any]]:
    """The command with its options, ready to call. Usage errors print themselves and exit with 2."""
    import tyro

    from tersor.cli.commands import COMMANDS

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: Callable[[], dict[str, Any]] = tyro.extras.subcommand_cli_from_dict(
                {name: _deferred(command) for name, command in COMMANDS.items()},
                prog="tersor",
                description="Make a trained PyTorch network smaller and faster, and measure what it cost. "
                "--trust, with any command: read --weights from a pickle that holds more than tensors, "
                "though reading it may run code.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stopped:
        # A value that a spec refuses comes back wrapped in the parser's own words: keep ours alone.
        cause: BaseException | None = stopped
        while cause is not None and not isinstance(cause, TersorError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(said.getvalue())
        raise
    return found


def _deferred(command: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """`command` with its signature, but returning the call still to be made: parsing and running are two things."""

    @functools.wraps(command)
    def later(*values: Any, **options: Any) -> Callable[[], dict[str, Any]]:
        return functools.partial(command, *values, **options)

    later.__annotations__ = {**command.__annotations__, "return": Callable[[], dict[str, Any]]}
    return later


def _failed(message: str, code: int, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        raise
    who = f"tersor, process {_rank()}" if _rank() else "tersor"
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"{who}: {message}"))
    return code
