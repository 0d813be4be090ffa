"""Low rank and shared filters without training and without labels: test accuracy, paired with the original.

    python benchmarks/low_rank.py --data folder:DIR --weights resnet18=FILE vgg16_bn=FILE --out low_rank.json

Each form is made from --num-calibration unlabelled images, then batch norm is re-estimated on the same images. Equal
copies are folded first (VGG-16 at 32x32: the same function); shares of the size are shares of the parameters of the
network as it was published, and multiplications those of the folded one. Judged on the test images in ONNX Runtime,
float32. Rows are appended to --out as they are measured; rows already there are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import time

import torch

import tersor
from tersor.bench.environment import environment
from tersor.graph.fold import fold_copies_
from tersor.graph.shared import SharedConv2d
from tersor.methods.factorize import factorize
from tersor.methods.share import share
from tersor.pipeline import calibration_batches
from tersor.specs import Factorize, Share

AWARE = "activation_aware_svd"
FORMS = {
    "resnet18": {
        "svd, half the MACs": Factorize("svd", macs=0.5),
        "tucker2, half the MACs": Factorize("tucker2", macs=0.5),
        "activation-aware svd, half the MACs": Factorize(AWARE, macs=0.5),
        "tucker2, 35 % of the MACs": Factorize("tucker2", macs=0.35),
        "activation-aware svd, 35 % of the MACs": Factorize(AWARE, macs=0.35),
        "svd, a quarter of the weights": Factorize("svd", size=0.25),
        "tucker2, a quarter of the weights": Factorize("tucker2", size=0.25),
        "activation-aware svd, a quarter of the weights": Factorize(AWARE, size=0.25),
        "tucker2, ranks by variational Bayes": Factorize("tucker2", rank="vbmf"),
        "activation-aware svd, 99 % of the energy": Factorize(AWARE, energy=0.99),
        "filters shared by negation": Share("negate"),
        "filters shared by mirror images": Share("mirror"),
    },
    "vgg16_bn": {
        "svd, a tenth of the weights": Factorize("svd", size=0.1),
        "activation-aware svd, a tenth of the weights": Factorize(AWARE, size=0.1),
        "activation-aware svd, a fifth of the weights": Factorize(AWARE, size=0.2),
        "activation-aware svd, half the MACs": Factorize(AWARE, macs=0.5),
        "tucker2, half the MACs": Factorize("tucker2", macs=0.5),
    },
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", nargs="+", required=True, metavar="MODEL=FILE")
    parser.add_argument("--num-calibration", type=int, default=1024)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    splits = tersor.load_data(options.data, num_calibration=options.num_calibration)
    out = pathlib.Path(options.out)
    told = json.loads(out.read_text()) if out.exists() else {"rows": []}
    for name, _, weights in (pair.partition("=") for pair in options.weights):
        done = {(row["model"], row["form"]) for row in told["rows"]}
        missing = {f: s for f, s in FORMS[name].items() if (name, f) not in done}
        if not missing:
            continue
        module = tersor.load_model(name, weights=weights)
        size = parameters(module)
        folded = copy.deepcopy(module)
        fold_copies_(folded, torch.zeros(2, *splits.input_shape))
        graph = tersor.export_onnx(folded, splits.input_shape)
        original = tersor.evaluate(tersor.open_session(graph), splits)
        print(f"{name} float32: {original.accuracy:.2%} (n = {original.num_samples})", flush=True)
        for form, spec in missing.items():
            row = measured(folded, splits, spec, original, (size, macs(folded, splits.input_shape)))
            told["rows"].append({"form": form, "model": name, "data": splits.name, **row})
            told["environment"] = environment()
            out.write_text(json.dumps(told, indent=1) + "\n")
            interval = row["interval"]
            print(
                f"{form:46} {row['accuracy']:.2%}  {interval['difference_pt']:+.2f} "
                f"({interval['low_pt']:+.2f} to {interval['high_pt']:+.2f})  size {row['size_share']:.1%}  "
                f"MACs {row['macs_share']:.1%}  {row['seconds']:.0f} s",
                flush=True,
            )


def measured(module, splits, spec, original, whole):
    """One row: the form of `module` that `spec` asks for, judged on the test images."""
    started = time.perf_counter()

    def inputs():
        return calibration_batches(splits, len(splits.calibration))

    made = share(module, spec) if isinstance(spec, Share) else factorize(module, spec, inputs())
    seconds = time.perf_counter() - started
    small = tersor.reestimate_batch_norm(made.module, inputs())
    session = tersor.open_session(tersor.export_onnx(small, splits.input_shape))
    score = tersor.evaluate(session, splits)
    return {
        "request": spec.to_dict(),
        "seconds": round(seconds, 1),
        "num_calibration": len(splits.calibration),
        "parameters": parameters(small),
        "size_share": parameters(small) / whole[0],
        "macs": macs(small, splits.input_shape),
        "macs_share": macs(small, splits.input_shape) / whole[1],
        "original_accuracy": original.accuracy,
        "accuracy": score.accuracy,
        "num_samples": score.num_samples,
        "interval": tersor.paired_interval(score, original).to_dict(),
        "engine": session.engine,
        "threads": session.threads,
    }


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def macs(module, input_shape):
    """Multiplications of the convolutions and linear layers for one image, by watching them run."""
    total = 0

    def see(layer, _, output):
        nonlocal total
        each = layer.weight[0].numel()  # multiplications of one output
        copied = isinstance(layer, SharedConv2d) and layer.transform == "negate"
        channels = len(layer.weight) if copied else output.shape[1]
        total += each * channels * (output[0].numel() // output.shape[1])

    watched = copy.deepcopy(module).eval()
    for part in watched.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear | SharedConv2d):
            part.register_forward_hook(see)
    with torch.no_grad():
        watched(torch.zeros(1, *input_shape))
    return total


if __name__ == "__main__":
    main()
