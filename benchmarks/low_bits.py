"""Low-bit weights without labels on a trained network: test accuracy, paired with float, and seconds.

    python benchmarks/low_bits.py --data folder:DIR --model resnet18 --weights FILE --out low_bits.json

Static quantization with 8-bit activations, so that every form runs on the engine's integer kernels. `seconds` is the
time to quantize, calibration included. Rows are appended to --out as they are measured; forms already there are kept.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import pathlib
import time

import numpy as np

import tersor
from tersor.bench.environment import environment
from tersor.pipeline import QAT_TRAINING, deployment_graph, quantize_graph, quantize_network

FORMS = {
    "8 bits": {},
    "8 bits, entropy": {"observer": "entropy"},
    "4 bits, nearest": {"bits": 4},
    "4 bits, nearest, re-estimated": {"bits": 4, "reestimate": True},
    "4 bits, adaround": {"bits": 4, "rounding": "adaround"},
    "4 bits, gptq": {"bits": 4, "rounding": "gptq"},
    "4 bits, gptq, bias correction": {"bits": 4, "rounding": "gptq", "bias_correction": True},
    "3 bits, nearest": {"bits": 3},
    "3 bits, nearest, re-estimated": {"bits": 3, "reestimate": True},
    "3 bits, nearest, equalized": {"bits": 3, "equalize": True},
    "3 bits, adaround": {"bits": 3, "rounding": "adaround"},
    "3 bits, gptq": {"bits": 3, "rounding": "gptq"},
    "3 bits, gptq, bias correction": {"bits": 3, "rounding": "gptq", "bias_correction": True},
    "mean 4 bits, nearest": {"mean_bits": 4.0},
    "mean 3 bits, nearest": {"mean_bits": 3.0},
    "mean 3 bits, gptq": {"mean_bits": 3.0, "rounding": "gptq"},
    "2 bits, gptq": {"bits": 2, "rounding": "gptq"},
    "2 bits, trained without labels": {"bits": 2, "mode": "qat"},
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--train-epochs", type=float, default=1.0)
    parser.add_argument("--train-learning-rate", type=float, default=0.01)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    splits = tersor.load_data(options.data, num_calibration=512)
    module = tersor.load_model(options.model, weights=options.weights)
    graph = deployment_graph(module, splits.input_shape, fold_copies=True)
    out = pathlib.Path(options.out)
    told = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {row["form"] for row in told["rows"]}
    original = tersor.evaluate(tersor.open_session(graph), splits)
    print(f"float32: {original.accuracy:.2%}", flush=True)
    for form in options.forms:
        if form in done:
            continue
        spec = tersor.Quantize(**FORMS[form])
        started = time.perf_counter()
        if spec.mode == "qat":
            training = dc.replace(
                QAT_TRAINING, epochs=options.train_epochs, learning_rate=options.train_learning_rate
            )
            small = quantize_network(module, splits, spec, training, on_progress=print_progress)
        else:
            small = quantize_graph(graph, splits, spec)
        seconds = time.perf_counter() - started
        session = tersor.open_session(small.graph)
        score = tersor.evaluate(session, splits)
        interval = tersor.paired_interval(score, original)
        bits = {d.layer: d.bits for d in small.plan.layers}
        row = {
            "form": form,
            "model": options.model,
            "data": splits.name,
            "request": spec.to_dict(),
            "seconds": round(seconds, 1),
            "accuracy": score.accuracy,
            "num_samples": score.num_samples,
            "interval": interval.to_dict(),
            "mean_bits": mean_bits(graph, bits),
            "engine": session.engine,
            "threads": session.threads,
        }
        if spec.mode == "qat":
            row["training"] = training.to_dict()
        told["rows"].append(row)
        told["environment"] = environment()
        out.write_text(json.dumps(told, indent=1) + "\n")
        print(
            f"{form:32} {score.accuracy:.2%}  {interval.difference_pt:+.2f} "
            f"({interval.low_pt:+.2f} to {interval.high_pt:+.2f})  {row['mean_bits']:.2f} bits  {seconds:.0f} s",
            flush=True,
        )


def mean_bits(graph, bits):
    sizes = {i.name.removesuffix(".weight"): int(np.prod(i.dims)) for i in graph.graph.initializer}
    return sum(sizes[name] * b for name, b in bits.items()) / sum(sizes[name] for name in bits)


def print_progress(progress):
    if progress.step % 20 == 0:
        print(progress, flush=True)


if __name__ == "__main__":
    main()
