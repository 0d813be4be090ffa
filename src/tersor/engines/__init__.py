"""Engines: one file each. `open_session` gives a session of a graph, a packed file or a module."""

from tersor.engines.load import ENGINES, Session, open_session
from tersor.registry import load_all

__all__ = ["ENGINES", "Session", "open_session"]

load_all("tersor.engines")
