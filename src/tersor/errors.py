"""Every exception this package raises on purpose.

TersorError                  exit code 1
├── SpecError                2  a recipe, option or name that cannot mean anything     (also ValueError)
│   └── UnknownNameError     2  a name that no registry holds                          (also KeyError)
├── MissingExtraError        2  an optional part of the package is not installed       (also ImportError)
├── DataError                1  a data set that is missing, empty, unreadable or of the wrong shape
├── ModelError               1  a model or weights that we cannot load, trace or compress
├── ArtifactError            1  a file that is not, or is no longer, a valid artifact
├── EngineError              1  an engine that cannot load or run a graph
├── RunError                 1  an output directory or a run that cannot go on
│   └── LostProcessError     1  another process of the run is gone                     (also ConnectionError)
└── BudgetError              3  no plan inside the search space meets the budget

A message names the thing, the value received, what was allowed, and what to do next.
The command line prints the message alone (with `--debug`, the traceback) and exits with the code;
130 means interrupted.
"""


class TersorError(Exception):
    """Root of the tree: `except TersorError` catches all that this package raises on purpose."""

    exit_code = 1


class SpecError(TersorError, ValueError):
    """A request that cannot mean anything: wrong value, unknown field, contradicting options."""

    exit_code = 2


class UnknownNameError(SpecError, KeyError):
    """A name that a registry does not hold."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class MissingExtraError(TersorError, ImportError):
    """A part of the package needs a library that is not installed."""

    exit_code = 2


class DataError(TersorError):
    """A data set that is missing, empty, unreadable or of the wrong shape."""


class ModelError(TersorError):
    """A model or weights that we cannot load, trace or compress."""


class ArtifactError(TersorError):
    """A file that is not, or is no longer, a valid artifact."""


class EngineError(TersorError):
    """An engine that cannot load or run a graph."""


class RunError(TersorError):
    """An output directory or a run that cannot go on."""


class LostProcessError(RunError, ConnectionError):
    """Another process of the run, or the way to it, is gone."""

    __str__ = Exception.__str__


class BudgetError(TersorError):
    """No plan inside the search space meets the budget."""

    exit_code = 3


def missing_extra(module: str, extra: str, purpose: str) -> MissingExtraError:
    """The one message for a library that belongs to an extra of the package."""
    return MissingExtraError(
        f"{purpose} needs the library {module!r}, which is not installed; "
        f"install it with: pip install 'tersor[{extra}]'"
    )
