"""Half of the channels of every classifier of torchvision removed: does the smaller network compute what the masked one
computes?

    python benchmarks/coverage_torchvision.py --out results/coverage_torchvision.json

One process for each network, all treated alike: random weights, the smallest of SIZES that it runs on, the plan made
for one instance and applied to another. The comparison is in float64 on weights of ordinary size (random_twin of
graph.coupling). `frozen_share` is the share of all outputs of convolutions and linear layers that may not go. Rows are
written as they come; networks already there are kept.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

SIZES = (64, 128, 224)
TOLERANCE = 1e-10


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", nargs="*", help="names; all by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one)))
        return
    from torchvision import models

    out = pathlib.Path(options.out)
    told = json.loads(out.read_text()) if out.exists() else {"rows": []}
    done = {row["model"] for row in told["rows"]}
    for name in options.models or models.list_models(module=models):
        if name in done:
            continue
        command = [sys.executable, __file__, "--out", options.out, "--one", name]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (ran.stdout.strip().splitlines() or [""])[-1]
        if ran.returncode:
            row = {"model": name, "passed": False, "error": ran.stderr.strip()[-2000:]}
        else:
            row = json.loads(last)
        told["rows"] = sorted([*told["rows"], row], key=lambda r: r["model"])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(told, indent=1) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k != "frozen"}), flush=True)
    failed = [row["model"] for row in told["rows"] if not row["passed"]]
    print(f"{len(told['rows']) - len(failed)} of {len(told['rows'])} pass; failed: {failed}")


def measured(name):
    import torch
    from torchvision import models

    from tersor.graph.coupling import coupled_groups, masked, random_twin
    from tersor.graph.layers import weight_layers
    from tersor.graph.trace import run
    from tersor.methods.prune_structured import apply, chosen_units, plan
    from tersor.specs import Prune, from_dict

    torch.manual_seed(0)
    module = models.get_model(name).eval()
    example = smallest_example(module, run)
    started = time.perf_counter()
    found = coupled_groups(module, example)
    coupled = time.perf_counter()
    spec = Prune(structure="channel", sparsity=0.5)
    decided = from_dict(json.loads(json.dumps(plan(module, spec, example, found=found).to_dict())))
    planned = time.perf_counter()
    units = chosen_units(module, spec, example, found)
    outputs = sum(layer.weight.shape[0] for _, layer in weight_layers(module))
    before = sum(p.numel() for p in module.parameters())
    twin, example = random_twin(module), example.double()
    del module
    expected = masked(twin, example, found, units)
    smaller = apply(twin, decided)
    del twin
    out = run(smaller, example)
    error = float((out - expected).abs().max() / expected.abs().max())
    after = sum(p.numel() for p in smaller.parameters())
    del smaller
    again = apply(models.get_model(name), decided)
    frozen = collections.Counter()
    for held in found.frozen:
        frozen[held.reason.split(" in '")[0]] += held.count
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model": name,
        "passed": error <= TOLERANCE and sum(p.numel() for p in again.parameters()) == after,
        "size": example.shape[-1],
        "groups": len(found.groups),
        "parameters": before,
        "parameters_removed": round(1 - after / before, 4),
        "macs": found.macs(),
        "macs_removed": round(1 - found.macs(units) / found.macs(), 4),
        "relative_error": float(np.format_float_scientific(error, 2)),
        "dtype": "float64",
        "frozen_share": round(sum(frozen.values()) / outputs, 4),
        "frozen": dict(frozen.most_common()),
        "coupling_seconds": round(coupled - started, 2),
        "plan_seconds": round(planned - coupled, 2),
        "peak_memory_mib": memory // 1024,
    }


def smallest_example(module, run):
    """An image of the smallest size that the network runs on."""
    import torch

    for size in SIZES:
        example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
        try:
            run(module, example)
        except Exception:
            continue
        return example
    raise SystemExit(f"it runs on none of the sizes {SIZES}")


if __name__ == "__main__":
    main()
