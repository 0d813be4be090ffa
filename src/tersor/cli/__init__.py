"""The command line: `tersor COMMAND ...`; every command calls the library and returns its JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from tersor.errors import TersorError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 ok, 1 failed, 2 usage, 3 budget not met, 130 interrupted."""
    import tyro

    from tersor.cli.commands import COMMANDS

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        import importlib.metadata

        print(f"tersor {importlib.metadata.version('tersor')}")
        return 0
    try:
        answer = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="tersor",
            description="Make a trained PyTorch network smaller and faster, and measure what it cost.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        )
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


def _failed(message: str, code: int, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        raise
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"tersor: {message}"))
    return code
