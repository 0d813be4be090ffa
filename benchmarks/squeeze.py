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
import gzip
import heapq
import json
import pathlib
import re
import time

import numpy as np
import onnx
import torch

import tersor
from tersor.bench.environment import environment
from tersor.graph.fold import fold_copies_
from tersor.methods.squeezing import squeeze
from tersor.pipeline import deployment_graph, prune_model, quantize_graph

# (network, what, bytes, accuracy in percent, source): results/README or the papers; not measured here.
PUBLISHED = [
    ("VGG-16 (60 MB form)", "DeepCABAC / NNR", 960_000, 91.0, "Wiedemann 2020"),
    ("VGG-16 (60 MB form)", "Bayesian Compression", 525_000, 90.8, "Louizos 2017"),
    ("VGG-16 (60 MB form)", "MIRACLE", 417_000, 93.4, "Havasi 2019"),
    ("VGG-16 (60 MB form)", "EPR", 101_000, 90.0, "Oktay 2020"),
    ("VGG-16 (60 MB form)", "LilNetX", 129_000, 92.6, "Girish 2023"),
    ("VGG-16 (60 MB form)", "LilNetX", 76_000, 90.0, "Girish 2023"),
    ("ResNet-20-4", "EPR", 128_000, 91.2, "Oktay 2020"),
    ("ResNet-20-4", "LilNetX", 66_000, 91.5, "Girish 2023"),
    ("ResNet-18", "Tiled Bit Networks", 358_000, 93.1, "Gorbett 2024"),
    ("ResNet-18", "Multi-Prize Ticket", 1_000_000, 94.8, "Diffenderfer 2021"),
]


ROWS = pathlib.Path(__file__).parents[1] / "results" / "squeeze.json"
FIELDS = ("model", "form", "size_bytes", "accuracy_percent", "source")
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


def published():
    return [dict(zip(FIELDS, row, strict=True)) for row in PUBLISHED]


def piece_name(row):
    """The name of a row's file among those committed; empty where no Tersor file was written."""
    if row["form"].partition("=")[0] not in ("size", "drop", "price"):
        return ""
    return f"{row['model']}_{row['size_bytes'] // 1000}kB.tersor"


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
        return deep_compression(form, rest, module, splits, place)
    fields, trained, masks = fields_of(form), 0.0, {}
    if stem := fields.pop("network", None):
        module = torch.load(options.networks / f"{stem}.pt", weights_only=False).eval()
        masks = {n: p != 0 for n, p in module.named_parameters() if p.ndim > 1}
        if all(mask.float().mean() > 0.99 for mask in masks.values()):
            masks = {}  # channels went: what is 0 is so by chance
        trained = epochs_of(stem)
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


def epochs_of(stem):
    """All epochs behind a network of pruning_finetuned.py, in whose names epochs and seed follow each step. One that
    started from a committed file has that file's behind it."""
    own = sum(map(float, re.findall(r"-([0-9.]+)-[0-9]+(?=-[a-z]|$)", stem)))
    start = re.match(r"[a-z0-9_]+_[0-9]+kB(?=-)", stem)
    if start is None:
        return own
    name = f"{start.group()}.tersor"
    (row,) = (r for r in json.loads(ROWS.read_text())["rows"] if piece_name(r) == name)
    return own + row["epochs"]


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


def packed_bytes(graph, kind):
    data = graph.SerializeToString(deterministic=True)
    if kind == "gzip":
        return len(gzip.compress(data, 9))
    import zstandard

    return len(zstandard.ZstdCompressor(level=19).compress(data))


def deep_compression(form, rest, module, splits, place):
    """Global magnitude pruning, k-means of each layer, gaps and places Huffman-coded (Han 2016, sections 2-4)."""
    share, bits, *more = rest.split(",")
    epochs = float(more[0].split("=")[1]) if more else 0.0
    module = copy_folded(module, splits)
    recovery = None
    if epochs:
        recovery = tersor.Finetune(epochs=epochs, learning_rate=0.02, distill=1.0, compile="off")
    pruned = prune_model(
        module,
        splits,
        tersor.Prune(sparsity=float(share), criterion="l1", scope="global"),
        recovery=recovery,
        checkpoint=place.with_suffix(".checkpoint"),
    ).module
    graph = deployment_graph(pruned, splits.input_shape)
    request = tersor.Quantize(
        mode="weight_only", code="codebook", bits=int(bits), granularity="per_tensor", edge_bits=8
    )
    small = quantize_graph(graph, None, request).graph
    _GRAPHS[form] = small
    return {"size_bytes": huffman_file_bytes(small, graph), "file": "counted", "epochs": epochs}


def copy_folded(module, splits):
    import copy

    module = copy.deepcopy(module)
    fold_copies_(module, torch.zeros(2, *splits.input_shape))
    return module


def huffman_file_bytes(small, graph):
    """Bytes of Deep Compression's form: for each weight the gaps between its nonzero codes (up to 15, longer ones
    in several steps) and these codes, each Huffman-coded with its table; all else as it is."""
    held = {i.name: onnx.numpy_helper.to_array(i) for i in small.graph.initializer}
    bits = other = 0
    for name, values in held.items():
        if not name.endswith("_quantized"):
            other += values.nbytes
            continue
        flat = values.ravel()
        levels = held.get(name.removesuffix("_quantized") + "_levels")
        zero = 0 if levels is None else int(np.abs(levels).argmin())
        if levels is not None and levels[zero] != 0:
            zero = -1
        places = np.flatnonzero(flat != zero)
        gaps = np.diff(places, prepend=-1) - 1
        fillers = gaps // 15
        steps = np.concatenate([gaps % 15, np.full(int(fillers.sum()), 15)])
        codes = np.concatenate([flat[places], np.full(int(fillers.sum()), max(zero, 0))])
        bits += huffman_bits(steps) + huffman_bits(codes.astype(np.int64))
    return -(-bits // 8) + other


def huffman_bits(symbols):
    """Bits of symbols under their best prefix code, and of its table: a byte for each symbol and its length."""
    counts = np.unique(symbols, return_counts=True)[1].tolist()
    if len(counts) < 2:
        return len(symbols) + 16
    heap, total = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total + 16 * len(counts)


# (what, colour, line and marker, which rows)
SERIES = (
    (
        "codes alone: no training, no labels",
        "#1d4ed8",
        "o-",
        lambda r: piece_name(r) and not r["epochs"],
    ),
    (
        "pruned, trained, then coded",
        "#0e7490",
        "P-",
        lambda r: piece_name(r) and "network=" in r["form"],
    ),
    (
        "trained with the size in it",
        "#15803d",
        "s-",
        lambda r: piece_name(r) and r["epochs"] and "network=" not in r["form"],
    ),
    ("Deep Compression, no training", "#b45309", "v", lambda r: is_deep(r) and not r["epochs"]),
    ("Deep Compression, trained", "#7c2d12", "^", lambda r: is_deep(r) and r["epochs"]),
    ("8-bit codes in gzip or zstd", "#6b7280", "X", lambda r: r["form"] in ("gzip", "zstd")),
)
# Points: our smallest files that lose no more stand beside the published ones.
SHOWN_LOSSES = (0.2, 0.5)


def is_deep(row):
    return row["form"].startswith("deep")


def pyplot_words():
    """Letters as outlines, so that the figure is the same everywhere, and the same bytes each time."""
    from matplotlib import rc_context

    return rc_context({"svg.hashsalt": "tersor"})


def drawn(told):
    """Points lost against bytes, one panel a network; published sizes of other networks below, hollow."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in told["rows"]))
    points = beside(told)
    height = 1.1 + 0.24 * len(points)
    figure = Figure(figsize=(5.4 * max(len(models), 2), 4.4 + height), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4.4, height))
    for model, axes in zip(models, upper.subplots(1, len(models), squeeze=False)[0], strict=True):
        draw_curve([row for row in told["rows"] if row["model"] == model], axes)
    pairs = [axes.get_legend_handles_labels() for axes in upper.axes]
    found = {
        label: mark for marks, labels in pairs for mark, label in zip(marks, labels, strict=True)
    }
    upper.legend(
        found.values(), found.keys(), fontsize=8, loc="outside upper center", ncols=5, frameon=False
    )
    draw_points(points, lower.subplots())
    return figure


def draw_curve(rows, axes):
    for label, colour, style, belongs in SERIES:
        some = sorted((r for r in rows if belongs(r)), key=lambda r: r["size_bytes"])
        if not some:
            continue
        change = [r["interval"]["difference_pt"] for r in some]
        errors = [
            [c - r["interval"]["low_pt"] for c, r in zip(change, some, strict=True)],
            [r["interval"]["high_pt"] - c for c, r in zip(change, some, strict=True)],
        ]
        sizes = [r["size_bytes"] / 1e6 for r in some]
        axes.errorbar(
            sizes, change, errors, fmt=style, color=colour, capsize=2, markersize=5, label=label
        )
    size_axis(axes, [r["size_bytes"] / 1e6 for r in rows])
    axes.set_yscale("symlog", linthresh=1, linscale=2)
    ticks = [-64, -16, -4, -2, -1, -0.5, 0, 0.5, 1]
    axes.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axes.set_ylim(min(-1, 1.6 * min(r["interval"]["low_pt"] for r in rows)), 1)
    axes.minorticks_off()
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("accuracy against float, points")
    first = rows[0]
    axes.set_title(
        f"{first['model']} on {first['data']}, n = {first['num_samples']:,}\n"
        f"float: {first['float_accuracy']:.2%} in {first['float_bytes'] / 1e6:.1f} MB",
        fontsize=10,
    )


def beside(told):
    """(label, bytes, what stands beside the mark, published?) of published sizes and of our smallest files that
    lose no more than SHOWN_LOSSES, the largest first."""
    points = [
        (
            f"{p['form']}, {p['model']} ({p['source']})",
            p["size_bytes"],
            f"{p['accuracy_percent']:.1f} %",
            True,
        )
        for p in told["published"]
    ]
    for model in dict.fromkeys(row["model"] for row in told["rows"]):
        held = {id(row): row for row in (smallest(told, model, x) for x in SHOWN_LOSSES) if row}
        for row in held.values():
            lost = row["interval"]["difference_pt"]
            text = f"{row['accuracy']:.2%}: {lost:+.2f} points against float"
            points.append((f"Tersor, {model}", row["size_bytes"], text, False))
    return sorted(points, key=lambda point: -point[1])


def smallest(told, model, loss_pt):
    """Of the network's Tersor files that lose at most so many points the smallest row; None if there is none."""
    rows = (r for r in told["rows"] if r["model"] == model and piece_name(r))
    right = [r for r in rows if r["interval"]["difference_pt"] >= -loss_pt]
    return min(right, key=lambda r: r["size_bytes"], default=None)


def draw_points(points, axes):
    sizes = [size / 1e6 for _, size, *_ in points]
    for place, (_, size, text, foreign) in enumerate(points):
        face, edge = ("white", "black") if foreign else ("#1d4ed8", "#1d4ed8")
        axes.plot(size / 1e6, place, "D", markersize=6, markerfacecolor=face, markeredgecolor=edge)
        axes.annotate(
            text,
            (size / 1e6, place),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set_yticks(range(len(points)), [label for label, *_ in points], fontsize=8)
    axes.set_ylim(len(points) - 0.3, -0.7)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
    size_axis(axes, sizes, right=8)
    axes.set_title(
        "Hollow: published, not measured here (other networks and trainings, the original CIFAR-10). "
        "Filled: ours, as above",
        fontsize=10,
        loc="right",
    )


def size_axis(axes, sizes, right=1.6):
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * right)
    wide = max(sizes) / min(sizes) > 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.minorticks_off()
    axes.set_xlabel("file, MB (10^6 bytes)")


if __name__ == "__main__":
    main()
