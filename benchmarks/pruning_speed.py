"""How much faster pruned networks run than the float one, on the same engine, all of them interleaved in one process.

    python benchmarks/pruning_speed.py --data folder:DIR --model resnet18 --weights FILE --networks work/*.pt \\
        --out rows.json

--networks are those that pruning_finetuned.py left. With --quantize each is timed in static int8 too, next to the
float network's int8. Times are medians in milliseconds; a ratio is that of two medians.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import torch

import tersor
from tersor.bench.environment import environment
from tersor.bench.timing import time_sessions
from tersor.engines import open_session
from tersor.pipeline import deployment_graph

FLOAT = "float"


def main():
    options = parsed()
    splits = tersor.load_data(options.data, num_calibration=512)
    networks = {FLOAT: tersor.load_model(options.model, weights=options.weights)}
    for path in map(pathlib.Path, options.networks):
        networks[path.stem] = torch.load(
            path, weights_only=False
        )  # written by pruning_finetuned.py
    forms = {
        (name, "float32"): deployment_graph(network, splits.input_shape)
        for name, network in networks.items()
    }
    if options.quantize:
        calibration = list(splits.batches(splits.calibration, 64))
        for (name, _), graph in list(forms.items()):
            forms[name, "int8"] = tersor.quantize(graph, tersor.Quantize(), calibration).graph
    rows = []
    for engine in options.engines:
        sessions = {
            "|".join(key): open_session(graph, engine=engine, threads=options.threads)
            for key, graph in forms.items()
        }
        for batch in options.batches:
            times = time_sessions(sessions, splits.input_shape, batch, seconds=options.seconds)
            for key, timing in times.items():
                name, numbers = key.split("|")
                row = timing.to_dict() | {"network": name, "numbers": numbers}
                original = times[f"{FLOAT}|{numbers}"].median_ms
                row["times_faster"] = original / timing.median_ms
                rows.append(row)
                print(
                    f"{engine:12} batch {batch:3} {numbers:8} {name:50} {timing.median_ms:8.2f} ms "
                    f"{row['times_faster']:.2f}x",
                    flush=True,
                )
    told = {"model": options.model, "rows": rows, "environment": environment()}
    pathlib.Path(options.out).write_text(json.dumps(told, indent=1) + "\n")


def parsed():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--networks", nargs="+", required=True)
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each engine and batch")
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
