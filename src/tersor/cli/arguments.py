"""What a person types on the command line, with its help."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

Model = Annotated[
    str, arg(metavar="MODEL", help="NAME | torchvision:NAME | FILE.py:FUNCTION | FILE.tersor")
]
Data = Annotated[str, arg(metavar="DATA", help="cifar10 | digits | folder:DIR | FILE.py:FUNCTION")]
Weights = Annotated[
    str | None,
    arg(
        metavar="FILE",
        help="trained weights: safetensors, or .pt holding tensors only (else --trust: may run code)",
    ),
]
