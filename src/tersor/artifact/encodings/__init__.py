"""The ways to store a tensor, one a file; importing the package registers them all."""

from tersor.artifact.encoding import ENCODINGS
from tersor.registry import load_all

load_all(__name__)

__all__ = ["ENCODINGS"]
