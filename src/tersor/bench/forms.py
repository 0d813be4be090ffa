"""Two forms of one function, timed against each other on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tersor.bench.timing import time_sessions
from tersor.engines import open_session

if TYPE_CHECKING:
    import onnx

FASTER = 1.05  # at least, at every batch size: less is not worth another form
BATCHES = (1, 64)
SECONDS = 0.3  # for each pair and batch size


def faster_forms(
    pairs: Mapping[str, tuple[onnx.ModelProto, onnx.ModelProto]],
    *,
    engine: str = "onnxruntime",
    threads: int | None = None,
    batches: Sequence[int] = BATCHES,
    seconds: float = SECONDS,
) -> list[str]:
    """The names of the `pairs` (usual form, other form: graphs of images (N, C, H, W)) whose other form is faster at
    every one of the batch sizes, by FASTER. Raises as `time_sessions` and `open_session` do."""
    found = []
    for name, graphs in pairs.items():
        usual, other = (open_session(g, engine=engine, threads=threads) for g in graphs)
        dims = graphs[0].graph.input[0].type.tensor_type.shape.dim
        channels, height, width = (int(dim.dim_value) for dim in dims[1:])
        ratios = []
        for batch in batches:
            timings = time_sessions(
                {"usual": usual, "other": other}, (channels, height, width), batch, seconds=seconds
            )
            ratios.append(timings["usual"].median_ms / timings["other"].median_ms)
        if min(ratios) >= FASTER:
            found.append(name)
    return found
