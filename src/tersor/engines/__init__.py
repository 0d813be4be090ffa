"""Engines: one file each. `open_session` gives a session of a graph, a packed file or a module."""

from tersor.engines.load import ENGINES, Session, open_session

__all__ = ["ENGINES", "Session", "open_session"]
