"""Pruning without any training and without labels: test accuracy, paired with the float network, and seconds.

    python benchmarks/pruning_one_shot.py --data folder:DIR --model resnet18 --weights FILE --out pruning_one_shot.json

A form is CRITERION/SCOPE or CRITERION/SCOPE/fit; with "fit" the weights that stay are fitted to the outputs of
the original (prune.reconstruct). Every form ends with a re-estimation of batch norm. All inputs are unlabelled
training images. `seconds` is wall-clock time of pruning, statistics and re-estimation included. Rows are appended
to --out as they are measured; those that are there are kept.
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
from tersor.graph.fold import fold_copies_
from tersor.methods.prune import Evidence, prune
from tersor.tensors.criteria import CRITERIA

FORMS = ["lamp/global/fit", "l1/global", "l1/layer", "lamp/global", "lamp/auto", "lamp/auto/fit"]


def main():
    options = parsed()
    splits = tersor.load_data(options.data, num_calibration=options.images)
    if options.test_images:
        part = splits.test.take(np.arange(options.test_images))
        splits = dc.replace(splits, test=part)
    module = tersor.load_model(options.model, weights=options.weights)
    all_weights = num_weights(module)
    if options.fold_copies:
        fold_copies_(module, torch.zeros(2, *splits.input_shape))
    evidence = Evidence(list(splits.batches(splits.calibration, 256)))
    out = pathlib.Path(options.out)
    told = json.loads(out.read_text()) if out.exists() else {"rows": []}
    original = score_of(module, splits, options.engine)
    print(f"{options.model} float: {original.accuracy:.2%}", flush=True)
    for sparsity in options.sparsities:
        for form in options.forms:
            key = {
                "model": options.model,
                "form": form,
                "asked": sparsity,
                "num_samples": len(original.per_sample),
            }
            if any(all(row[k] == v for k, v in key.items()) for row in told["rows"]):
                continue
            row = key | measured(module, splits, evidence, form, sparsity, original, options)
            row["sparsity_before_folding"] = 1 - row.pop("num_left") / all_weights
            told["rows"].append(row | {"data": splits.name, "num_images": options.images})
            told["environment"] = environment()
            out.write_text(json.dumps(told, indent=1) + "\n")
            interval = row["interval"]
            print(
                f"{sparsity:.2f} {form:18} {row['accuracy']:.2%}  {interval['difference_pt']:+.2f} "
                f"({interval['low_pt']:+.2f} to {interval['high_pt']:+.2f})  zeros "
                f"{row['sparsity']:.4f}  {row['seconds']:.0f} s",
                flush=True,
            )


def measured(module, splits, evidence, form, sparsity, original, options):
    criterion, scope, *rest = form.split("/")
    spec = tersor.Prune(
        sparsity=sparsity,
        criterion=criterion,
        scope=scope,
        reconstruct=rest == ["fit"],
        exclude=tuple(options.exclude),
    )
    started = time.perf_counter()
    pruned = prune(module, spec, evidence=evidence)
    renewed = tersor.reestimate_batch_norm(pruned.module, evidence.inputs)
    seconds = time.perf_counter() - started
    score = score_of(renewed, splits, options.engine)
    weights = [p for n, p in renewed.named_parameters() if p.ndim > 1]
    left = sum(int((p != 0).sum()) for p in weights)
    return {
        "request": spec.to_dict(),
        "sparsity": 1 - left / sum(p.numel() for p in weights),
        "num_left": left,
        "seconds": round(seconds, 1),
        "accuracy": score.accuracy,
        "interval": tersor.paired_interval(score, original).to_dict(),
        "engine": options.engine,
        "threads": torch.get_num_threads(),
        "layers": {d.layer: round(d.sparsity, 4) for d in pruned.plan.layers},
    }


def score_of(module, splits, engine):
    session = tersor.open_session(module, engine=engine, threads=torch.get_num_threads())
    return tersor.evaluate(session, splits)


def num_weights(module):
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def parsed():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", required=True)
    parser.add_argument(
        "--forms",
        nargs="*",
        default=FORMS,
        help=f"CRITERION/SCOPE[/fit], criteria {', '.join(CRITERIA)}, scopes layer, global, auto",
    )
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.7, 0.9, 0.95, 0.8, 0.5])
    parser.add_argument("--images", type=int, default=1024, help="unlabelled images")
    parser.add_argument("--test-images", type=int, default=0, help="the first so many; 0: all")
    parser.add_argument("--fold-copies", action="store_true", help="fold equal copies first")
    parser.add_argument("--exclude", nargs="*", default=[])
    parser.add_argument("--engine", default="torch_bf16", choices=["torch", "torch_bf16"])
    parser.add_argument("--out", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
