"""The `.tersor` file: one network and its provenance in one file that holds data, never code.

numpy, onnx and constriction only: this room never imports torch. The layout is described in
`docs/format.md`.
"""

from tersor.artifact.artifact import Artifact, pack
from tersor.artifact.encodings import ENCODINGS
from tersor.artifact.format import FORMAT_VERSION, load, save
from tersor.artifact.inspection import inspect, inspect_file

__all__ = [
    "ENCODINGS",
    "FORMAT_VERSION",
    "Artifact",
    "inspect",
    "inspect_file",
    "load",
    "pack",
    "save",
]
