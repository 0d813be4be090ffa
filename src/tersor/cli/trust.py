"""`--trust`: weights in pickles that hold more than tensors. Reading one runs whatever it says."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from tersor.errors import SpecError

FLAG = "--trust"
WEIGHTS = ("--weights", "--student-weights")
PICKLES = (".pt", ".pth", ".bin", ".pkl")


@contextlib.contextmanager
def trusting(arguments: Sequence[str]) -> Iterator[list[str]]:
    """`arguments` without --trust; where it was given, pickles after --weights are read, whatever they
    run, and stand in the arguments as safetensors files, which are gone afterwards.

    Raises SpecError where --trust has nothing to trust, ModelError for a file without tensors.
    """
    if FLAG not in arguments:
        yield list(arguments)
        return
    with tempfile.TemporaryDirectory() as place:
        kept = [_split(each) for each in arguments if each != FLAG]
        flat = [part for parts in kept for part in parts]
        files = [
            number
            for number, (flag, value) in enumerate(itertools.pairwise(flat), 1)
            if flag in WEIGHTS and pathlib.Path(value).suffix in PICKLES
        ]
        if not files:
            raise SpecError(
                f"{FLAG} is for weights in a pickle ({', '.join(PICKLES)} after {WEIGHTS[0]}); there "
                "are none: leave it out"
            )
        for number in files:
            flat[number] = _as_safetensors(pathlib.Path(flat[number]), pathlib.Path(place))
        yield flat


def _split(argument: str) -> list[str]:
    flag, equals, value = argument.partition("=")
    return [flag, value] if equals and flag in WEIGHTS else [argument]


def _as_safetensors(file: pathlib.Path, place: pathlib.Path) -> str:
    from safetensors.torch import save_file

    from tersor.models.load import read_weights

    tensors = {name: tensor.clone() for name, tensor in read_weights(file, trust=True).items()}
    made = place / f"{file.stem}.safetensors"
    save_file(tensors, made)
    return str(made)
