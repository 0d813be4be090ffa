"""Convolutions with empty stripes in three forms: masked, with a smaller kernel, as a sum of shifted 1x1 ones.

    python benchmarks/stripes.py --out stripes.json

One layer of ResNet-18 at a time, at the sizes it has for 32x32 images, on ONNX Runtime, interleaved.
"stripes" drops random positions of every filter by itself; "rows" the same row or rows of the kernel in all filters.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib

import torch
from torch import nn

import tersor
from tersor.bench.environment import environment
from tersor.graph.stripes import shrink_kernels_, split_stripes_

LAYERS = {"64 at 32x32": (64, 32), "128 at 16x16": (128, 16), "512 at 4x4": (512, 4)}
DENSITIES = (0.5, 0.25, 0.1)


class Alone(nn.Module):
    """One convolution, and a mean so that an answer a class comes out."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, inputs):
        return self.convolution(inputs).mean((2, 3))


def forms(shape, pattern, density):
    channels = shape[0]
    torch.manual_seed(0)
    masked = Alone(nn.Conv2d(channels, channels, 3, padding=1, bias=False)).eval()
    keep = torch.rand(channels, 1, 3, 3) < density
    if pattern == "rows":
        keep = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
        keep[:, :, 1 : 1 + round(3 * density)] = True
    with torch.no_grad():
        masked.convolution.weight.mul_(keep)
    found = {"masked": tersor.export_onnx(masked, shape)}
    if pattern == "rows":
        found["smaller kernel"] = copy.deepcopy(found["masked"])
        shrink_kernels_(found["smaller kernel"])
    found["shifted"] = copy.deepcopy(found["masked"])
    split_stripes_(found["shifted"], ["convolution"])
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="for each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    rows = []
    patterns = [("stripes", density) for density in DENSITIES] + [("rows", 2 / 3), ("rows", 1 / 3)]
    for layer, (channels, size) in LAYERS.items():
        shape = (channels, size, size)
        for pattern, density in patterns:
            held = forms(shape, pattern, density)
            sessions = {
                ("onnxruntime", name): tersor.open_session(graph, threads=options.threads)
                for name, graph in held.items()
            }
            for batch in (1, 64):
                timings = tersor.benchmark(sessions, shape, batch, seconds=options.seconds)
                for (engine, form), timing in timings.items():
                    ratio = timings[engine, "masked"].median_ms / timing.median_ms
                    rows.append(
                        {
                            "layer": layer,
                            "pattern": pattern,
                            "density": round(density, 3),
                            "form": form,
                            **timing.to_dict(),
                            "faster_than_masked": round(ratio, 3),
                        }
                    )
                    print(
                        f"{layer:14} {pattern:8} {density:.2f} batch {batch:2} {engine:12} "
                        f"{form:15} {timing.median_ms:8.3f} ms  x{ratio:.2f}",
                        flush=True,
                    )
    told = {"rows": rows, "environment": environment()}
    pathlib.Path(options.out).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
