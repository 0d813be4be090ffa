"""Data sets by name: `cifar10`, `digits`, `folder:DIR` and `FILE.py:FUNCTION`."""

from tersor.data.arrays import ArraySet, Splits, split
from tersor.data.load import load_data

__all__ = ["ArraySet", "Splits", "load_data", "split"]
