"""An engine in a process of its own: one that ends its process must not end this one.

OpenVINO 2026.4 does (SIGFPE, bfloat16, weights in groups): no exception tells of it.
"""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np
import onnx

from tersor.engines.load import ENGINES, FloatArray, logits_of, open_session, serialized
from tersor.errors import EngineError, TersorError

GRAPH, INPUTS, LOGITS, ERROR = "graph.onnx", "inputs.npy", "logits.npy", "error.txt"
CALL = "import sys; from tersor.engines.isolated import serve; serve(*sys.argv[1:])"


def may_crash(engine: str) -> bool:
    """Whether sessions of `engine` say of themselves that they may end their process."""
    return bool(getattr(ENGINES[engine], "may_crash", False))


def isolated_logits(
    graph: onnx.ModelProto, inputs: FloatArray, *, engine: str, threads: int, batch: int
) -> FloatArray:
    """Logits (N, classes) of `inputs` (N, C, H, W) float32, run in batches of `batch` by a child
    process: a second or two more than in this one.

    Raises EngineError where the engine refuses the graph or its process ends.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        (directory / GRAPH).write_bytes(serialized(graph, engine))
        np.save(directory / INPUTS, inputs)
        command = [sys.executable, "-c", CALL, name, engine, str(threads), str(batch)]
        ended = subprocess.run(command, capture_output=True, check=False)
        if (directory / ERROR).exists():
            raise EngineError((directory / ERROR).read_text())
        if ended.returncode:
            raise EngineError(f"{engine}: its process ended ({_reason(ended.returncode)})")
        return np.asarray(np.load(directory / LOGITS), np.float32)


def serve(name: str, engine: str, threads: str, batch: str) -> None:
    """The child's part: read graph and inputs from the directory `name`, write logits or an error
    there."""
    directory = pathlib.Path(name)
    try:
        graph = onnx.load(directory / GRAPH)
        session = open_session(graph, engine=engine, threads=int(threads))
        logits = logits_of(session, np.load(directory / INPUTS), int(batch))
    except TersorError as error:
        (directory / ERROR).write_text(str(error))
        return
    np.save(directory / LOGITS, logits)


def _reason(code: int) -> str:
    """A negative exit code is a signal's number."""
    if code > 0:
        return f"exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    return known.get(-code, f"signal {-code}")
