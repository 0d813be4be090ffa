"""Measuring: accuracy per sample, paired intervals, interleaved timing, and the machine."""

from tersor.bench.environment import environment
from tersor.bench.evaluate import evaluate
from tersor.bench.stats import paired_interval
from tersor.bench.timing import time_sessions

__all__ = ["environment", "evaluate", "paired_interval", "time_sessions"]
