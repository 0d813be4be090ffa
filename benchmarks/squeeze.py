"""Bytes of a file against accuracy: rate-distortion codes, with and without training, beside what others do.

    python benchmarks/squeeze.py --data folder:DIR --model resnet18 --weights FILE --out rows.json FORM...
    python benchmarks/squeeze.py --merge rows.json more.json --out results/squeeze.json --plot docs/squeeze.svg
    python benchmarks/tables.py

A FORM is one of
    size=500kB               codes chosen by rate and distortion: no labels, no training
    size=192KiB,epochs=30    the same, and trained on with the size in it, from the float network's outputs
    drop=0.5                 as small as half a point on the validation images allows, without training
    gzip, zstd               the int8 file of others: 8-bit codes of each output channel, gzip -9 or zstd -19
    deep=0.9,5               Deep Compression (Han 2016) by our parts: 90 % pruned, 2^5 k-means values, Huffman;
                             with deep=0.9,5,epochs=2 trained on between pruning and k-means
    size=512KiB,network=X    the network X.pt of --networks, which pruning_finetuned.py pruned and trained with labels;
                             its zeros stay
    published                points that were published, as such
Other fields of tersor.Squeeze may follow a size (start=2,learning_rate=0.03). Rows are appended to --out as they
are measured; those that are there are kept. A killed training goes on from --work, where the files stay too.
Bytes are those of the real file, everything counted; accuracy is the file's, read back, on the engine named.

--merge adds the rows of several such files to those of --out: of rows with the same network, form, seed and part
the last one named stays (--out itself comes first), and the published points are this file's. It prints the name
under which the file of each row is committed: results/squeezed/NETWORK_BYTESkB.tersor, a copy of the one in --work.
--plot draws all rows of --out. Then benchmarks/tables.py writes both pages again.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import pathlib
import time

import torch

import tersor
from network_names import epochs_of, piece_name
from squeeze_figure import drawn, pyplot_words
from squeeze_peers import deep_compression, packed_bytes, published
from tables_common import rows_of
from tersor.bench.environment import environment
from tersor.methods.squeezing import squeeze
from tersor.pipeline import deployment_graph, quantize_graph

KEYS = ("model", "form", "seed", "part")


def main():
    options = parsed()
    out = pathlib.Path(options.out)
    if options.merge:
        told = merged([json.loads(p.read_text()) for p in (out, *options.merge) if p.exists()])
        out.write_text(json.dumps(told, indent=1) + "\n")
        for row in told["rows"]:
            print(f"{row['form']}: {row['size_bytes']:,} bytes, {piece_name(row)}")
    if options.forms:
        measure(options, out, pathlib.Path(options.work))
    if options.plot:
        figure = drawn(json.loads(out.read_text()))
        with pyplot_words():
            figure.savefig(options.plot, metadata={"Date": None})


def merged(tables):
    """All rows of the tables, by network and size; of rows with equal KEYS the last one."""
    rows = {tuple(row[key] for key in KEYS): row for table in tables for row in table["rows"]}
    ordered = sorted(rows.values(), key=lambda row: (row["model"], -row["size_bytes"], row["form"]))
    return {"rows": ordered, "published": published()}


def measure(options, out, work):
    torch.set_num_threads(options.threads)
    work.mkdir(parents=True, exist_ok=True)
    splits = tersor.load_data(options.data, num_calibration=options.images)
    module = tersor.load_model(options.model, weights=options.weights).eval()
    graph = deployment_graph(module, splits.input_shape, fold_copies=True)
    float_bytes = sum(p.numel() * 4 for p in module.parameters())
    original = None
    for form in options.forms:
        told = json.loads(out.read_text()) if out.exists() else {"rows": []}
        key = {"model": options.model, "form": form, "seed": options.seed, "part": options.part}
        if any(all(row.get(k) == v for k, v in key.items()) for row in told["rows"]):
            continue
        if form == "published":
            told["published"] = published()
        else:
            if original is None:
                original = score(graph, splits, options)
                print(f"{options.model} float: {original.accuracy:.2%}", flush=True)
            started = time.perf_counter()
            name = f"{options.model}_{form}_{options.seed}".replace("=", "").replace(",", "_")
            made = make(form, module, graph, splits, options, work / name)
            row = key | made | {"seconds": round(time.perf_counter() - started, 1)}
            found = score(made_graph(row), splits, options)
            row |= {
                "ratio": round(float_bytes / row["size_bytes"], 1),
                "float_bytes": float_bytes,
                "float_accuracy": original.accuracy,
                "accuracy": found.accuracy,
                "num_samples": found.num_samples,
                "interval": tersor.paired_interval(found, original).to_dict(),
                "engine": options.engine,
                "threads": options.threads,
                "data": splits.name,
                "num_calibration": options.images,
                "environment": environment(),
            }
            told = json.loads(out.read_text()) if out.exists() else told
            told["rows"].append(row)
            interval = row["interval"]
            print(
                f"{form}: {row['size_bytes']:,} bytes, {found.accuracy:.2%}, {interval['difference_pt']:+.2f} "
                f"({interval['low_pt']:+.2f} to {interval['high_pt']:+.2f}), {row['seconds']:.0f} s",
                flush=True,
            )
        out.write_text(json.dumps(told, indent=1) + "\n")


def parsed():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights")
    parser.add_argument("--out", required=True)
    parser.add_argument("--merge", nargs="+", type=pathlib.Path, default=[], metavar="FILE")
    parser.add_argument("--work", default="squeeze_work", help="files and checkpoints")
    parser.add_argument(
        "--networks", type=pathlib.Path, help="where pruning_finetuned.py left them"
    )
    parser.add_argument("--images", type=int, default=2048, help="unlabelled calibration images")
    parser.add_argument("--part", default="test", help="of the data that is judged")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="also draw all rows (.svg)")
    parser.add_argument("forms", nargs="*")
    options = parser.parse_args()
    if options.forms and not (options.data and options.weights):
        parser.error("forms are measured on --data with --weights")
    if missing := [path for path in options.merge if not path.exists()]:
        parser.error(f"--merge: no such file: {', '.join(map(str, missing))}")
    return options


_GRAPHS = {}


def made_graph(row):
    return _GRAPHS[row["form"]]


def score(graph, splits, options):
    session = tersor.open_session(graph, engine=options.engine, threads=options.threads)
    return tersor.evaluate(session, splits, options.part)


def make(form, module, graph, splits, options, place):
    """What a form makes: size_bytes and more; its graph goes to _GRAPHS."""
    kind, _, rest = form.partition("=")
    if kind in ("gzip", "zstd"):
        small = quantize_graph(graph, None, tersor.Quantize(mode="weight_only", bits=8)).graph
        _GRAPHS[form] = small
        return {"size_bytes": packed_bytes(small, kind), "file": "ONNX, 8-bit codes"}
    if kind == "deep":
        _GRAPHS[form], told = deep_compression(rest, module, splits, place)
        return told
    fields, trained, masks = fields_of(form), 0.0, {}
    if stem := fields.pop("network", None):
        module = torch.load(options.networks / f"{stem}.pt", weights_only=False).eval()
        masks = {n: p != 0 for n, p in module.named_parameters() if p.ndim > 1}
        if all(mask.float().mean() > 0.99 for mask in masks.values()):
            masks = {}  # channels went: what is 0 is so by chance
        trained = epochs_of(stem, rows_of("squeeze.json")["rows"])
    request = tersor.Squeeze(**{"num_calibration": options.images, "seed": options.seed} | fields)
    provenance = {"model": options.model, "data": splits.name}
    checkpoint = place.with_suffix(".checkpoint")
    found = squeeze(
        module,
        splits,
        request,
        provenance=provenance,
        masks=masks,
        checkpoint=checkpoint,
        told=lambda words, share: print(f"  {share:4.0%} {words}", flush=True),
        on_progress=spoken(),
    )
    file = place.with_name(f"{place.name}.tersor")
    size = tersor.write(found.graph, file, plan=found.plan, provenance=provenance)
    _GRAPHS[form] = tersor.load(file).to_onnx()
    codes = sum(each.size_bytes for each in found.layers.values())
    layers = {line.layer: line.sparsity for line in found.plan.layers}
    for each in (checkpoint, checkpoint.with_suffix(".start")):
        each.unlink(missing_ok=True)
    return {
        "size_bytes": size,
        "code_bytes": codes,
        "price": found.price,
        "epochs": request.epochs + trained,
        "labels": trained > 0 or (request.epochs > 0 and request.distill < 1),
        "training_s": round(found.trained.seconds, 1) if found.trained else 0.0,
        "sparsity": layers,
    }


def fields_of(form):
    """The fields of a Squeeze in "size=500kB,epochs=20"."""
    kinds = {field.name: field.type for field in dc.fields(tersor.Squeeze)} | {"network": "str"}
    read = {"str": str, "float": float, "int": int}
    pairs = (part.split("=", 1) for part in form.split(","))
    return {name: read[kinds[name]](value) for name, value in pairs}


def spoken(every=60.0):
    last = [0.0]

    def say(progress):
        if time.perf_counter() - last[0] > every or progress.step == progress.num_steps:
            last[0] = time.perf_counter()
            print(f"  {progress}", flush=True)

    return say


if __name__ == "__main__":
    main()
