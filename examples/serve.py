"""Run a .tersor file without torch on a batch (N, C, H, W) float32 of a .npy file.

Usage: serve.py FILE.tersor BATCH.npy
"""

import sys

import numpy as np

import tersor


def main(path: str, batch: str) -> None:
    session = tersor.open_session(tersor.load(path))
    print(*session.run(np.load(batch)).argmax(axis=1))
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
