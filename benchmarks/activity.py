"""Sparsity of activations and gradients of a trained network: how much is zero, what it gains, what more costs.

    python benchmarks/activity.py zeros accuracy finetune --data folder:DIR --weights FILE --out activity.json
    python benchmarks/activity.py times --data folder:DIR --weights FILE --out activity.json    (on a quiet machine)

Parts. `zeros`: shares by layer. `times`: float32 and int8 on ONNX Runtime with real activations, on the dense twin
of the graph, and with activations pruned, interleaved. `accuracy`: on the test part with the inputs of every layer but
the first pruned, without any training, in bfloat16 autocast where the processor has it, paired with the original.
`finetune`: the same after a short distillation without labels. `gradients`: digits_net trained with the largest share
of each gradient (5 seeds). Parts and rows already in --out are kept.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import pathlib
import time

import numpy as np
import torch

import tersor
from tersor.bench.environment import environment
from tersor.bench.stats import paired_interval
from tersor.bench.timing import time_sessions
from tersor.graph.dense import dense_twin
from tersor.graph.export import export_onnx
from tersor.methods.activation_pruning import prune_activations
from tersor.methods.activity import measure_activity, zeros_read
from tersor.methods.device import usable_precision
from tersor.methods.quantize import quantize
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.results import Score

PARTS = ("zeros", "times", "accuracy", "finetune", "gradients")
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)
NUM_CALIBRATION = 128
RECOVER_FROM = 0.002  # of accuracy lost; below it, batch norm is not re-estimated


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--methods", nargs="*", default=["top_k", "threshold"])
    parser.add_argument("--recoveries", nargs="*", default=["none", "bn"])
    parser.add_argument("--num-test", type=int, help="test images of `accuracy` (default: all)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    splits = tersor.load_data(options.data, num_calibration=512)
    module = tersor.load_model(options.model, weights=options.weights)
    out = pathlib.Path(options.out)
    told = json.loads(out.read_text()) if out.exists() else {}
    told |= {"model": options.model, "data": splits.name, "environment": environment()}

    def keep(name, value):
        told[name] = value
        out.write_text(json.dumps(told, indent=1) + "\n")

    if "zeros" in options.parts and "zeros" not in told:
        keep("zeros", zeros(module, splits))
    if "times" in options.parts and "times" not in told:
        keep("times", times(module, splits))
    if "accuracy" in options.parts:
        rows = told.get("accuracy", [])
        part = splits
        if options.num_test:
            some = splits.test.take(np.arange(options.num_test))
            part = dc.replace(splits, test=some)
        for row in accuracies(module, part, options.methods, options.recoveries, rows):
            keep("accuracy", [*told.get("accuracy", []), row])
    if "finetune" in options.parts and "finetune" not in told:
        keep("finetune", finetuned(module, splits, options.steps))
    if "gradients" in options.parts and "gradients" not in told:
        keep("gradients", list(gradients()))


def zeros(module, splits):
    part = splits.train.take(np.arange(128))
    found = measure_activity(module, splits.batches(part, 32), part.labels, num_images=128)
    return {
        "num_images": found.num_images,
        "num_gradient_images": found.num_gradient_images,
        "macs_zero": found.macs_zero,
        "potential_speedup": found.potential_speedup,
        "layers": [layer.to_dict() for layer in found.layers],
    }


class Fed:
    """A session that runs its own images, whatever it is given."""

    def __init__(self, graph, images):
        self.session, self.images = tersor.open_session(graph), images
        self.engine, self.threads = self.session.engine, self.session.threads

    def run(self, batch):
        return self.session.run(self.images)


def times(module, splits):
    real = splits.normalise(splits.train.images[:64])
    positive = np.abs(real) + np.float32(1)
    graph = export_onnx(module, splits.input_shape)
    twin = dense_twin(graph)
    graphs = {"float32, real": (graph, real), "float32, dense": (twin, positive)}
    for name, held, images in (("real", graph, real), ("dense", twin, positive)):
        graphs[f"int8, {name}"] = quantize(held, tersor.Quantize(), [images]).graph, images
    for method in ("top_k", "threshold"):
        images = real if method == "threshold" else None
        pruned = prune_activations(module, 0.9, method=method, images=images)
        graphs[f"float32, 90 % by {method}"] = export_onnx(pruned, splits.input_shape), real
    rows = []
    for batch in (64, 1):
        sessions = {name: Fed(g, images[:batch]) for name, (g, images) in graphs.items()}
        found = time_sessions(sessions, splits.input_shape, batch, repeats=100, seconds=45)
        for name, timing in found.items():
            rows.append({"form": name, **timing.to_dict()})
            print(f"{name:26} {batch:3}  {timing.median_ms:8.2f} ms", flush=True)
    for row in rows:
        held, images = graphs[row["form"]]
        row["zeros_read"] = None if "int8" in row["form"] else zeros_read(held, images[:32])
    return rows


def judged(module, splits, precision="bf16"):
    """Accuracy in training's precision, image by image."""
    precision = usable_precision(precision, torch.device("cpu"))
    module = module.eval().to(memory_format=torch.channels_last)
    started, right = time.perf_counter(), []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for start, inputs in zip(
            range(0, len(splits.test), 250), splits.batches(splits.test, 250), strict=True
        ):
            batch = torch.from_numpy(inputs).to(memory_format=torch.channels_last)
            guess = module(batch).argmax(1).numpy()
            right.append(guess == splits.test.labels[start : start + 250])
    return Score(np.concatenate(right), time.perf_counter() - started), precision


def row_of(score, original, precision, **keys):
    interval = paired_interval(score, original)
    row = {
        **keys,
        "accuracy": score.accuracy,
        "original_accuracy": original.accuracy,
        "num_samples": score.num_samples,
        "interval": interval.to_dict(),
        "precision": precision,
        "seconds": round(score.seconds, 1),
    }
    print(
        f"{keys}  {score.accuracy:.2%}  {interval.difference_pt:+.2f} "
        f"({interval.low_pt:+.2f} to {interval.high_pt:+.2f})",
        flush=True,
    )
    return row


def accuracies(module, splits, methods, recoveries, done):
    calibration = splits.normalise(splits.calibration.images)
    images = calibration[:NUM_CALIBRATION]
    known = {(row["method"], row["sparsity"], row["recovery"]) for row in done}
    original, precision = judged(module, splits)
    for method in methods:
        for sparsity in SPARSITIES:
            held = {"images": images} if method == "threshold" else {}
            pruned = prune_activations(module, sparsity, method=method, **held)
            lost = 1.0
            for recovery in recoveries:
                if (method, sparsity, recovery) in known or lost < RECOVER_FROM:
                    continue
                if recovery == "bn":
                    pruned = reestimate_batch_norm(pruned, np.split(calibration, 4))
                score, _ = judged(pruned, splits)
                lost = original.accuracy - score.accuracy
                keys = {"method": method, "sparsity": sparsity, "recovery": recovery}
                yield row_of(score, original, precision, **keys)


def finetuned(module, splits, steps):
    """A short distillation without labels at 90 %, by threshold."""
    images = splits.normalise(splits.calibration.images[:NUM_CALIBRATION])
    pruned = prune_activations(module, 0.9, method="threshold", images=images)
    epochs = steps * 128 / len(splits.train)
    spec = tersor.Finetune(
        epochs=epochs,
        learning_rate=0.02,
        batch_size=128,
        distill=1.0,
        weight_decay=0.0,
        compile="off",
    )
    trained = tersor.finetune(pruned, splits, spec, teacher=module)
    original, precision = judged(module, splits)
    score, _ = judged(trained.module, splits)
    keys = {"method": "threshold", "sparsity": 0.9, "recovery": "finetune"}
    row = row_of(score, original, precision, **keys)
    return [{**row, "training": spec.to_dict(), "training_seconds": round(trained.seconds, 1)}]


def gradients(seeds=range(5)):
    """digits_net from random weights with a share of each gradient in every step."""
    digits = tersor.load_data("digits")
    originals = {}
    for share in (0.0, 0.1, 0.01, 0.001):
        scores, seconds = [], 0.0
        for seed in seeds:
            spec = tersor.Finetune(
                epochs=10,
                learning_rate=0.1,
                batch_size=64,
                augment="crop",
                precision="float32",
                compile="off",
                gradient_topk=share,
                seed=seed,
            )
            trained = tersor.finetune(tersor.load_model("digits_net", seed=seed), digits, spec)
            scores.append(judged(trained.module, digits, "float32")[0])
            seconds += trained.seconds
        # The same images for every seed: pairs of image and seed.
        score = Score(np.concatenate([s.per_sample for s in scores]), seconds)
        keys = {"data": digits.name, "seeds": len(scores), "gradient_topk": share}
        yield row_of(score, originals.setdefault("all", score), "float32", **keys)


if __name__ == "__main__":
    main()
