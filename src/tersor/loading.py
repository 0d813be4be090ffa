"""`tersor.load`: a file as it is, without torch, or put into a network of the user's class."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from tersor import artifact
from tersor.errors import SpecError

if TYPE_CHECKING:  # a file is loaded and run without torch
    from torch import nn


@overload
def load(path: str | os.PathLike[str]) -> artifact.Artifact: ...


@overload
def load(
    path: str | os.PathLike[str],
    *,
    into: nn.Module,
    inputs: Iterable[npt.NDArray[np.float32]] | None = None,
) -> nn.Module: ...


def load(path: str | os.PathLike[str], *, into: Any = None, inputs: Any = None) -> Any:
    """The artifact in a `.tersor` file; with `into`, a fresh instance of the network's class, a copy
    of it as the file holds it: pruned or factorized as the plan says, with the file's weights, ready
    to train on.

    `inputs` are some unlabelled batches (N, C, H, W) float32: give them to train on, so that batch
    norms which the file has folded get statistics again. Raises ArtifactError for a file that cannot
    be read, ModelError, naming the tensors, for a network that does not fit.
    """
    held = artifact.load(path)
    if into is None:
        if inputs is not None:
            raise SpecError("load: inputs are for a network; give into=MyModel() too")
        return held
    from tersor.methods.restore import restore

    return restore(held, into, inputs=inputs)
