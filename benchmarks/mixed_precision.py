"""Bits chosen by measured sensitivity against the same bits everywhere: size against accuracy.

    python benchmarks/mixed_precision.py --data folder:DIR --weights FILE --out mixed.json --plot mixed.svg

Weights only change: activations have 8 bits in every form, so that all run on the engine's integer kernels. No labels;
the test images judge, and choose nothing. Forms already in --out are kept.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import time

import tersor
from tersor.bench.environment import environment
from tersor.methods import quantize as quantization
from tersor.methods.sensitivity import mixed_bits, sensitivities
from tersor.pipeline import calibration_batches, deployment_graph

UNIFORM_BITS = (2, 3, 4, 5, 6, 8)
MEAN_BITS = (2.5, 3.0, 3.5, 4.0, 5.0)
NUM_CALIBRATION = 512


def forms(roundings):
    for rounding in roundings:
        for bits in UNIFORM_BITS:
            yield (
                f"uniform {bits}, {rounding}",
                tersor.Quantize(bits=bits, edge_bits=0, rounding=rounding),
            )
        for bits in MEAN_BITS:
            yield f"mixed {bits:g}, {rounding}", tersor.Quantize(mean_bits=bits, rounding=rounding)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--roundings", nargs="*", default=["nearest", "gptq"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot")
    options = parser.parse_args()
    out = pathlib.Path(options.out)
    told = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {row["form"] for row in told["rows"]}
    splits = tersor.load_data(options.data, num_calibration=NUM_CALIBRATION)
    module = tersor.load_model(options.model, weights=options.weights)
    graph = deployment_graph(module, splits.input_shape, fold_copies=True)
    original = tersor.evaluate(tersor.open_session(graph), splits)
    told |= {"model": options.model, "data": splits.name, "environment": environment()}
    told |= {"float_accuracy": original.accuracy, "calibration_images": NUM_CALIBRATION}
    images = list(calibration_batches(splits, NUM_CALIBRATION))
    started = time.perf_counter()
    measured = sensitivities(
        graph, None, quantization.MIXED_BITS, images, num_images=quantization.MIXED_IMAGES
    )
    told["sensitivity_s"] = round(time.perf_counter() - started, 1)
    for form, spec in forms(options.roundings):
        if form in done:
            continue
        bits = mixed_bits(measured, mean_bits=spec.mean_bits) if spec.mean_bits else None
        started = time.perf_counter()
        small = quantization.apply(graph, quantization.plan(graph, spec, bits), images)
        row = {"form": form, "seconds": round(time.perf_counter() - started, 1)}
        told["rows"].append(row | measured_row(small, graph, splits, original))
        out.write_text(json.dumps(told, indent=1) + "\n")
        print(told["rows"][-1], flush=True)
    if options.plot:
        draw(told, pathlib.Path(options.plot))


def measured_row(small, graph, splits, original):
    session = tersor.open_session(small.graph)
    score = tersor.evaluate(session, splits)
    interval = tersor.paired_interval(score, original)
    sizes = {i.name.removesuffix(".weight"): tuple(i.dims) for i in graph.graph.initializer}
    counts = {d.layer: product(sizes[d.layer]) for d in small.plan.layers}
    with tempfile.TemporaryDirectory() as place:
        size = tersor.write(small.graph, pathlib.Path(place) / "file.tersor", plan=small.plan)
    code_bits = sum(counts[d.layer] * d.bits for d in small.plan.layers)
    return {
        "mean_bits": code_bits / sum(counts.values()),
        "code_bytes": code_bits // 8,
        "file_bytes": size,
        "accuracy": score.accuracy,
        "num_samples": score.num_samples,
        **interval.to_dict(),
        "engine": session.engine,
        "threads": session.threads,
    }


def product(dims):
    result = 1
    for size in dims:
        result *= size
    return result


def draw(told, path):
    """Accuracy against bits a weight, with its interval; both kinds, both roundings."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for rounding, colour in (("nearest", "#b45309"), ("gptq", "#1d4ed8")):
        for kind, style in (("uniform", "s--"), ("mixed", "o-")):
            rows = [r for r in told["rows"] if r["form"].startswith(kind) and rounding in r["form"]]
            if not rows:
                continue
            rows.sort(key=lambda r: r["mean_bits"])
            bits = [r["mean_bits"] for r in rows]
            change = [r["difference_pt"] for r in rows]
            errors = [
                [r["difference_pt"] - r["low_pt"] for r in rows],
                [r["high_pt"] - r["difference_pt"] for r in rows],
            ]
            axes.errorbar(
                bits,
                change,
                errors,
                fmt=style,
                color=colour,
                capsize=2,
                label=f"{kind}, {rounding}",
            )
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks(
        [-64, -16, -4, -1, -0.5, 0, 0.5], ["-64", "-16", "-4", "-1", "-0.5", "0", "+0.5"]
    )
    axes.minorticks_off()
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("bits a weight, mean over all weights")
    axes.set_ylabel("accuracy against float, points")
    axes.set_title(
        f"{told['model']}, {told['data']}, n = {told['rows'][0]['num_samples']:,}: "
        f"float {told['float_accuracy']:.2%}",
        fontsize=10,
    )
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
