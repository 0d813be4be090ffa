"""Which option for which layer: arithmetic on costs and harms, without a model."""

from tersor.search.allocate import Allocation, Option, allocate, exact, frontier

__all__ = ["Allocation", "Option", "allocate", "exact", "frontier"]
