"""Tables of codes and of small files."""

from __future__ import annotations

import re

from network_names import is_ours, made_by, piece_name
from tables_common import NAMES, ROOT, change, table, where

MIB = 1 << 20
# What a small file is meant to reach: network, bytes, points lost, without training and in so many seconds.
SMALL_FILES = (
    ("vgg16_bn", MIB, 0.2, None),
    ("vgg16_bn", MIB // 8, 0.2, None),
    ("resnet18", MIB // 2, 0.2, None),
    ("resnet18", 192 << 10, 0.2, None),
    ("resnet18", 5 * MIB // 2, 0.5, 600),
)
# Epochs are those of training for this file; labels: whether any were read.
OUTCOME = [
    *("network", "form", "bytes", "times smaller", "accuracy", "difference"),
    *("epochs", "labels"),
]


def coding(told):
    lines, sparse = [], []
    for row in told["rows"]:
        held, speed = row["bytes"], row.get("weights_a_second", {})
        models = [held[key] for key in ("one_table", "row_tables", "row_by_column") if key in held]
        lines.append(
            [
                row["network"],
                row["form"],
                f"{row['density']:.1%}",
                f"{row['bits_per_weight']:.3f}",
                f"{held['ours']:,}",
                beside(held, held.get("entropy")),
                beside(held, min(models, default=None)),
                *(beside(held, held[key]) for key in ("zstd", "lzma", "huffman")),
                *(
                    f"{speed[key] / 1e6:.0f}" if key in speed else "–"
                    for key in ("all", "all, quick")
                ),
            ]
        )
        thin = row["bytes_where_at_most_a_tenth_is_not_0"]
        if thin:
            rivals = (beside(thin, thin[key]) for key in ("zstd", "lzma", "huffman"))
            name = f"{row['network']}, {row['form']}"
            lines_of = [name, f"{thin['elements']:,}", f"{thin['ours']:,}", *rivals]
            sparse.append(lines_of)
    others = ["zstd -19", "LZMA", "Huffman"]
    header = ["network", "form", "not 0", "bits a weight", "bytes", "ideal", "best table", *others]
    return (
        "## Coding of weights\n\n"
        "Weights of the trained networks, pruned by magnitude and coded by Tersor's grids; bytes with all that "
        "decoding needs. Percent are Tersor's bytes more (+) or less (−) than: an ideal coder under the same model; "
        "the best of ideal coders with one table a tensor, one a row, one a class of row and column; the others on "
        "the same codes (Huffman as in Deep Compression). M weights a second decoded by one thread, as stored and "
        "with static tables "
        f"(`quick`). {where(told)}.\n\n"
        + table([*header, "M/s", "M/s static"], lines)
        + "\nOf these the tensors of which at most a tenth is not 0:\n\n"
        + table(["form", "weights", "bytes", *others], sparse)
    )


def squeezed(told):
    """Every row of a small file, with how it was made and judged."""
    lines = [
        [
            *outcome(row),
            # a resumed training counts the seconds before it was stopped too
            f"{max(row['seconds'], row.get('training_s', 0)):,.0f}",
            f"{row['engine']}, {row['threads']}",
            piece(row),
        ]
        for row in told["rows"]
    ]
    first = told["rows"][0]
    return (
        "## The smallest files\n\n"
        f"{first['data']}, n = {first['num_samples']:,}, seed {first['seed']}; the same topology as the float network, "
        f"difference to it in points with its paired 95 % interval; {first['num_calibration']:,} unlabelled images. "
        "Bytes are those of the file, everything counted (Deep Compression's are counted as its paper does, "
        "without the graph); times smaller is against the float weights. Seconds are those of all the work on one "
        "thread beside other work, training included; engine and threads are those that judged. "
        f"{where(first)}. The curve is in [results.md](results.md#bytes-against-accuracy).\n\n"
        + table(
            [*OUTCOME, "seconds", "engine, threads", "file"],
            lines,
        )
        + "\n"
        + published(told)
    )


def bytes_and_accuracy(told):
    """The section of docs/results.md: the curve, what was meant to be reached, and what others published."""
    lines = [outcome(row) for row in told["rows"]]
    first = told["rows"][0]
    return (
        "## Bytes against accuracy\n\n"
        f"One file each, all that is needed to run it counted; {first['data']}, n = {first['num_samples']:,}, "
        "the file read back and judged; difference to the float network in points "
        "with its paired 95 % interval. Labels: whether any were read. How each was made, and its seconds: "
        "[benchmarks.md](benchmarks.md#the-smallest-files).\n\n"
        "![Accuracy against bytes, and published sizes](squeeze.svg)\n\n"
        + table(OUTCOME, lines)
        + "\nWhat this project set itself, each by the smallest file within the loss allowed (a loss is judged by its "
        "measured value):\n\n"
        + table(["network", "at most", "loss at most", "measured", "verdict"], goals(told["rows"]))
        + "\n"
        + published(told)
    )


def outcome(row):
    """What a row's file is and does, under the heads OUTCOME."""
    return [
        NAMES.get(row["model"], row["model"]),
        words_of(row),
        f"{row['size_bytes']:,}",
        f"{row['float_bytes'] / row['size_bytes']:.1f}",
        f"{row['accuracy']:.2%}",
        change(row),
        f"{row.get('epochs', 0):g}",
        "yes" if row.get("labels") else "no",
    ]


def words_of(row):
    form = row["form"]
    kind, _, rest = form.partition("=")
    if kind in ("gzip", "zstd"):
        return f"8-bit codes, {'gzip -9' if kind == 'gzip' else 'zstd -19'}"
    if kind == "deep":
        pruned, bits = rest.split(",")[:2]
        return f"Deep Compression: {float(pruned):.0%} pruned, {2 ** int(bits)} values, Huffman"
    stem = re.search(r",network=([^,]+)", form)
    if stem is None:
        return f"Tersor, `{form}`"
    return f"Tersor, `{form.replace(stem.group(), '')}` after {made_by(stem.group(1))}"


def piece(row):
    """The committed file of a row, as a link; a dash where none is."""
    name = piece_name(row)
    path = ROOT / "results" / "squeezed" / name
    there = name and path.exists() and path.stat().st_size == row["size_bytes"]
    return f"[{name}](../results/squeezed/{name})" if there else "–"


def goals(rows):
    lines = []
    for model, most, loss, seconds in SMALL_FILES:
        some = measured = [row for row in rows if row["model"] == model and is_ours(row)]
        if seconds is not None:
            some = [row for row in some if not row["epochs"] and row["seconds"] <= seconds]
        some = [row for row in some if row["interval"]["difference_pt"] >= -loss]
        best = min(some, key=lambda row: row["size_bytes"], default=None)
        allowed = f"{most / MIB:g} MiB" if most >= MIB else f"{most >> 10} KiB"
        if seconds is not None:
            allowed += f", without training, in {seconds / 60:g} minutes"
        found = "none within the loss" if measured else "not measured"
        if best is not None:
            size = best["size_bytes"]
            found = f"{size / MIB:.2f} MiB ({size:,} bytes), {change(best)}"
            if seconds is not None:
                found += f", {best['seconds']:.0f} s"
        met = best is not None and best["size_bytes"] <= most
        verdict = "met" if met else "missed" if measured else "–"
        lines.append([NAMES[model], allowed, f"{loss:g} points", found, verdict])
    return lines


def published(told):
    lines = [
        [
            p["model"],
            p["form"],
            f"{p['size_bytes']:,}",
            f"{p['accuracy_percent']:.1f}%",
            p["source"],
        ]
        for p in told["published"]
    ]
    return (
        "Published, not measured here: other trainings, the original CIFAR-10, and mostly other networks. What a paper "
        "counts as its bytes is its own.\n\n"
        + table(["network", "published form", "bytes", "accuracy", "source"], lines)
    )


def beside(held, other):
    return "–" if other is None else f"{held['ours'] / other - 1:+.1%}".replace("-", "−")
