"""Writes docs/benchmarks.md, and in docs/results.md the section of bytes against accuracy, from the measured rows
under results/: no number there is typed by hand.

    python benchmarks/tables.py

The rest of docs/results.md is `tersor report`'s; `make results` does one after the other.
"""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np

from tersor import paired_interval
from tersor.results import Score

ROOT = pathlib.Path(__file__).parent.parent
FLOATS = "float32"
NAMES = {"resnet18": "ResNet-18", "vgg16_bn": "VGG-16 (vgg16_bn)"}
MIB = 1 << 20
# What a small file is meant to reach: network, bytes, points lost, without training and in so many seconds.
SMALL_FILES = (
    ("vgg16_bn", MIB, 0.2, None),
    ("vgg16_bn", MIB // 8, 0.2, None),
    ("resnet18", MIB // 2, 0.2, None),
    ("resnet18", 192 << 10, 0.2, None),
    ("resnet18", 5 * MIB // 2, 0.5, 600),
)
# Around the section in docs/results.md; what lies between is written again each time.
MARKS = ("<!-- benchmarks/tables.py writes from here -->", "<!-- to here -->")
BEFORE = "\n## Coverage\n"


def main():
    parts = [
        "# Side by side\n",
        "Written by `python benchmarks/tables.py` from the rows under `results/`. "
        "[benchmarks/README.md](../benchmarks/README.md) tells how to measure again.\n",
        peers(rows_of("quantization.json")),
        low_bits(rows_of("low_bits.json")),
        mixed(rows_of("mixed_precision.json")),
        one_shot(rows_of("pruning_one_shot.json")),
        finetuned(rows_of("pruning_finetuned.json")),
        speed(rows_of("pruning_speed.json")),
        low_rank(rows_of("low_rank.json")),
        activity(rows_of("activity.json")),
        coding(rows_of("coding.json")),
        squeezed(rows_of("squeeze.json")),
        on_demand(rows_of("on_demand.json")),
        coverage(rows_of("coverage_torchvision.json")),
    ]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(parts))
    page = ROOT / "docs" / "results.md"
    page.write_text(with_section(page.read_text(), bytes_and_accuracy(rows_of("squeeze.json"))))


def with_section(page, section):
    """The page with the section between MARKS, where it was before, else BEFORE that heading, else at the end."""
    start, end = MARKS
    if start in page:
        before, _, rest = page.partition(start)
        after = rest.partition(end)[2]
    else:
        before, heading, after = page.partition(BEFORE)
        before, after = before.rstrip("\n") + "\n\n", f"\n{heading}{after}" if heading else "\n"
    return f"{before}{start}\n\n{section}\n{end}{after}"


def rows_of(name):
    return json.loads((ROOT / "results" / name).read_text())


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def where(told):
    told = told["environment"]
    cpu = told.get("cpu") or told.get("processor") or ""
    versions = ", ".join(f"{k} {v}" for k, v in sorted(told.get("versions", {}).items()))
    return f"{cpu}; {versions}".strip("; ")


def peers(told):
    parts = ["## Static int8 against other tools\n"]
    first = told["runs"][0]
    parts.append(
        f"{first['threads']} threads, interleaved, median milliseconds; {first['data']}; "
        f"{first['calibration']} unlabelled calibration images for the trained networks, 64 of noise for others. "
        f"{where(first)}. Ratio: Tersor's fastest engine that is right over the fastest other tool.\n"
    )
    for run in told["runs"]:
        parts.append(f"### {run['what']}\n")
        for model in dict.fromkeys(row["model"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["model"] == model]
            batches = sorted(
                {key for row in rows for key in row if key.startswith("batch_")},
                key=lambda key: int(key[6:]),
            )
            header = ["form", *(f"batch {key[6:]}" for key in batches), "accuracy", "quantizing"]
            lines = [
                [
                    row["form"],
                    *(f"{row[key]['median_ms']:.2f}" if key in row else "–" for key in batches),
                    f"{row['accuracy']:.2%}" if row.get("accuracy") else "–",
                    f"{row['quantizing_s']:.1f} s" if row.get("quantizing_s") else "–",
                ]
                for row in rows
            ]
            ratios = [f"{ratio(rows, key):.2f}" for key in batches]
            lines.append(["**ratio**", *(f"**{each}**" for each in ratios), "", ""])
            parts += [f"**{model}**\n", table(header, lines)]
    return "\n".join(parts)


def ratio(rows, batch):
    ours, others = (
        min(
            row[batch]["median_ms"]
            for row in rows
            if batch in row
            and FLOATS not in row["form"]
            and row["form"].startswith("Tersor") == own
        )
        for own in (True, False)
    )
    return ours / others


def change(row):
    row = {**row, **row.get("interval", {})}
    return f"{row['difference_pt']:+.2f} ({row['low_pt']:+.2f} to {row['high_pt']:+.2f})"


def low_bits(told):
    rows = sorted(told["rows"], key=lambda row: -row["mean_bits"])
    lines = [
        [
            row["form"],
            f"{row['accuracy']:.2%}",
            change(row),
            f"{row['mean_bits']:.2f}",
            f"{row['seconds']:g}" + ("" if row.get("quiet") else " (other work beside)"),
        ]
        for row in rows
    ]
    return (
        "## Low bits without labels\n\n"
        f"{rows[0]['model']} on {rows[0]['data']}, n = {rows[0]['num_samples']:,}, difference to the float network in "
        "points with its paired 95 % interval; activations in 8 bits; 512 unlabelled calibration images.\n\n"
        + table(["weights", "accuracy", "difference", "bits a weight", "seconds"], lines)
    )


def mixed(told):
    lines = [
        [
            row["form"],
            f"{row['mean_bits']:.2f}",
            f"{row['code_bytes'] / 1e6:.2f}",
            f"{row['accuracy']:.2%}",
            change(row),
        ]
        for row in sorted(told["rows"], key=lambda row: row["mean_bits"])
    ]
    return (
        "## Bits chosen by sensitivity against the same bits everywhere\n\n"
        f"{told['model']} on {told['data']}, n = {told['rows'][0]['num_samples']:,}; measuring the sensitivity took "
        f"{told['sensitivity_s']:.0f} s.\n\n![Accuracy against bits](mixed_precision.svg)\n\n"
        + table(["form", "bits a weight", "codes, MB", "accuracy", "difference"], lines)
    )


def one_shot(told):
    lines = [
        [
            row["model"],
            row["form"],
            f"{row['sparsity']:.1%}",
            f"{row['accuracy']:.2%}",
            change(row),
            f"{row['seconds']:.0f}",
        ]
        for row in told["rows"]
    ]
    first = told["rows"][0]
    return (
        "## Weights pruned without training or labels\n\n"
        f"{first['data']}, n = {first['num_samples']:,}, {first['num_images']:,} unlabelled images, batch norm "
        "re-estimated. A form is criterion/scope; fit: what stays is fitted to the original's outputs.\n\n"
        + table(["network", "form", "zeros", "accuracy", "difference", "seconds"], lines)
    )


def finetuned(told):
    rows = told["rows"]
    lines = [
        [
            row["model"],
            row["form"] + (f", after {row['start']}" if "start" in row else ""),
            f"{row['zeros']:.1%}",
            f"{row['macs']:.1%}",
            f"{row['params']:.1%}",
            f"{row['epochs']:g}",
            teachers(row),
            f"{row['accuracy']:.2%}",
            change(row),
            f"{row['seconds_to_prune']:.0f}",
        ]
        for row in rows
    ]
    first = rows[0]
    text = (
        "## Pruned and trained\n\n"
        f"{first['data']}, n = {first['num_samples']:,}, seed {first['seed']}; difference to the float network in "
        "points with its paired 95 % interval. Forms of one number of epochs and one source are trained by the "
        "same loop and recipe. A form is structure/criterion/scope/target (fit: what stays is fitted to "
        "the original's outputs before); torch_pruning is the tool of that name; blocks/NAMES are residual branches "
        "that go, widths/criterion/NAME=N the channels that stay; as_it_is trains on. Small networks that answer "
        "together are those of earlier rows, in int8 on an engine. MACs and parameters are what "
        "is left; seconds are those of pruning alone, on one thread beside other work.\n\n"
        + table(
            [
                "network",
                "form",
                "zeros",
                "MACs",
                "parameters",
                "epochs",
                "learns from",
                "accuracy",
                "difference",
                "seconds",
            ],
            lines,
        )
    )
    compared = [[*names, difference(rows, *names)] for names in told.get("compared", [])]
    if compared:
        text += "\nThe same networks against each other, in points, paired:\n\n" + table(
            ["form", "against", "difference"], compared
        )
    return text


def teachers(row):
    """What a row was trained from."""
    if "recipe" not in row:
        return "–"
    if held := row.get("teachers"):
        return f"answers of {len(held)} small networks, labels"
    return "outputs, labels" if row["recipe"]["distill"] else "labels"


def difference(rows, name, other):
    """The paired difference of two forms of one network after the same training, in words."""
    by_form = {(row["form"], row["epochs"]): row for row in rows}
    epochs = {e for form, e in by_form if form == name} & {
        e for form, e in by_form if form == other
    }
    told = []
    for number in sorted(epochs):
        scores = [
            Score(
                np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8), count=count) > 0
            )
            for row in (by_form[name, number], by_form[other, number])
            for count in [row["num_samples"]]
        ]
        interval = paired_interval(*scores).to_dict()
        told.append(
            f"{change({'interval': interval})}, {number:g} epochs, p = {interval['p_value']:.2g}"
        )
    return "; ".join(told)


def speed(told):
    rows = told["rows"]
    lines = [
        [
            row["network"].removeprefix(f"{told['model']}-"),
            row["numbers"],
            row["engine"],
            row["batch"],
            f"{row['median_ms']:.2f}",
            f"{row['times_faster']:.2f}",
        ]
        for row in rows
    ]
    return (
        "## Time of pruned networks\n\n"
        f"{told['model']}, {rows[0]['threads']} threads, all networks interleaved in one process, median milliseconds "
        "of one batch, and how many times faster than the float network on the same engine in the same numbers. "
        f"{where(told)}.\n\n"
        + table(["network", "numbers", "engine", "batch", "ms", "times faster"], lines)
    )


def activity(told):
    zeros = told["zeros"]
    lines = [
        [
            row["method"],
            f"{row['sparsity']:.0%}",
            row["recovery"],
            f"{row['accuracy']:.2%}",
            change(row),
        ]
        for row in told["accuracy"]
    ]
    layers = [
        [
            row["layer"],
            f"{row['input_zeros']:.1%}",
            f"{row['gradient_zeros']:.1%}",
            f"{row['macs_zero']:.1%}",
        ]
        for row in zeros["layers"]
    ]
    return (
        "## Zeros of activations and gradients\n\n"
        f"{told['model']} on {told['data']}: {zeros['macs_zero']:.1%} of the multiplications have a zero among their "
        f"factors ({zeros['num_images']} images), so that an engine that skipped them all would be "
        f"{zeros['potential_speedup']:.2f} times faster; the dense engines here gain nothing from it.\n\n"
        + table(["layer", "zeros read", "zeros in the gradient", "products that are zero"], layers)
        + "\nTimes on the same images, interleaved, and with most activations set to zero (their selection costs more "
        "than zeros save):\n\n"
        + table(
            ["form", "batch", "ms"],
            [[row["form"], row["batch"], f"{row['median_ms']:.2f}"] for row in told["times"]],
        )
        + "\nAccuracy with more activations set to zero:\n\n"
        + table(["method", "share", "recovery", "accuracy", "difference"], lines)
    )


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
            NAMES.get(row["model"], row["model"]),
            words_of(row),
            f"{row['size_bytes']:,}",
            f"{row['float_bytes'] / row['size_bytes']:.1f}",
            f"{row['accuracy']:.2%}",
            change(row),
            *training(row),
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
            [
                "network",
                "form",
                "bytes",
                "times smaller",
                "accuracy",
                "difference",
                "epochs",
                "labels",
                "seconds",
                "engine, threads",
                "file",
            ],
            lines,
        )
        + "\n"
        + published(told)
    )


def bytes_and_accuracy(told):
    """The section of docs/results.md: the curve, what was meant to be reached, and what others published."""
    lines = [
        [
            NAMES.get(row["model"], row["model"]),
            words_of(row),
            f"{row['size_bytes']:,}",
            f"{row['float_bytes'] / row['size_bytes']:.1f}",
            f"{row['accuracy']:.2%}",
            change(row),
            *training(row),
        ]
        for row in told["rows"]
    ]
    first = told["rows"][0]
    header = ["network", "form", "bytes", "times smaller", "accuracy", "difference"]
    return (
        "## Bytes against accuracy\n\n"
        f"One file each, all that is needed to run it counted; {first['data']}, n = {first['num_samples']:,}, "
        "the file read back and judged; difference to the float network in points "
        "with its paired 95 % interval. Labels: whether any were read. How each was made, and its seconds: "
        "[benchmarks.md](benchmarks.md#the-smallest-files).\n\n"
        "![Accuracy against bytes, and published sizes](squeeze.svg)\n\n"
        + table([*header, "epochs", "labels"], lines)
        + "\nWhat this project set itself, each by the smallest file within the loss allowed (a loss is judged by its "
        "measured value):\n\n"
        + table(["network", "at most", "loss at most", "measured", "verdict"], goals(told["rows"]))
        + "\n"
        + published(told)
    )


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


def made_by(stem):
    """A network that pruning_finetuned.py named, in words."""
    start = re.match(r"[a-z0-9_]+_[0-9]+kB(?=-)", stem)
    words = [f"{start.group()}.tersor"] if start else []
    for step in re.findall(
        r"-((?:as_it_is|blocks|widths|[a-z_]+-[a-z_]+-[a-z]+)[a-z0-9._+=~-]*?-[0-9.]+-[0-9]+)(?=-[a-z]|$)",
        stem,
    ):
        how, epochs, _ = step.rsplit("-", 2)
        kind, *parts = how.removesuffix("-fit").split("-")
        gone = {
            "as_it_is": "trained on",
            "blocks": f"without the blocks {', '.join(parts[:1]).replace('+', ', ')}",
            "widths": f"channels {', '.join(parts[1:]).replace('+', ', ')} stay ({parts[0] if parts else ''})",
            "unstructured": f"{float(parts[-1]):.0%} pruned ({parts[0]})" if parts[2:] else "",
        }.get(kind) or f"{kind}s to {parts[-1]} of the MACs at most ({parts[0]})"
        words.append(gone if epochs == "0" else f"{gone}, {epochs} epochs")
    return ", ".join(words)


def training(row):
    """Epochs of training for this file, and whether labels were read."""
    return f"{row.get('epochs', 0):g}", "yes" if row.get("labels") else "no"


def ours(row):
    return row["form"].partition("=")[0] in ("size", "drop", "price")


def piece(row):
    """The committed file of a row, as a link; a dash where none is."""
    name = f"{row['model']}_{row['size_bytes'] // 1000}kB.tersor"
    path = ROOT / "results" / "squeezed" / name
    there = ours(row) and path.exists() and path.stat().st_size == row["size_bytes"]
    return f"[{name}](../results/squeezed/{name})" if there else "–"


def goals(rows):
    lines = []
    for model, most, loss, seconds in SMALL_FILES:
        some = measured = [row for row in rows if row["model"] == model and ours(row)]
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


def on_demand(told):
    """Budgets asked, and their answers measured again."""
    lines = []
    for row in told["rows"]:
        held = row.get("asked_and_told", {})
        asked = ", ".join(f"{k} {v}" for k, v in row.get("budget", {}).items())
        faster = row["times_faster"]
        lines.append(
            [
                NAMES.get(row["model"], row["model"]),
                row.get("effort", "by hand"),
                asked or row.get("network", ""),
                "no" if row.get("labels") is False else "yes",
                {True: "yes", False: "no"}.get(held.get("met"), "–"),
                f"{row['smaller']:.1f}",
                *(
                    f"{faster[batch][name]:.1f}"
                    for name in ("over_eager", "over_int8")
                    for batch in ("1", "64")
                ),
                change(row),
                f"{row['seconds']:,.0f}" if held else "–",
            ]
        )
    first = told["rows"][0]
    return (
        "## On demand\n\n"
        f"{first['data']}, n = {first['num_samples']:,} test images that no search saw; difference to the "
        f"float network in points with its paired 95 % interval. {first['threads']} threads; times faster, of medians "
        "in one run in turns, each alone for a while as in use, than PyTorch's eager float32 and than the float "
        "network's plain static int8, each on its fastest engine, at batch 1 and 64. Networks by hand were pruned and "
        "trained by `benchmarks/pruning_finetuned.py` (the name tells how, and the epochs). Labels: whether they were "
        "used to make or to judge. Times smaller is against the float weights. "
        f"{where(first)}.\n\n"
        + table(
            [
                "network",
                "effort",
                "asked",
                "labels",
                "met",
                "times smaller",
                "over eager, 1",
                "64",
                "over int8, 1",
                "64",
                "difference",
                "seconds",
            ],
            lines,
        )
    )


def low_rank(told):
    lines = [
        [
            row["model"],
            row["form"],
            f"{1 - row['size_share']:.1%}",
            f"{row['macs_share']:.1%}",
            f"{row['accuracy']:.2%}",
            change(row),
        ]
        for row in told["rows"]
    ]
    first = told["rows"][0]
    return (
        "## Low rank and shared filters without training or labels\n\n"
        f"{first['data']}, n = {first['num_samples']:,}, {first['num_calibration']:,} unlabelled images, batch norm "
        "re-estimated.\n\n"
        + table(["network", "form", "weights gone", "MACs left", "accuracy", "difference"], lines)
    )


def coverage(told):
    rows = told["rows"]
    worst = max(row["relative_error"] for row in rows)
    passed = sum(row["passed"] for row in rows)
    lines = [
        [
            row["model"],
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['parameters_removed']:.1%}",
            f"{row['macs_removed']:.1%}",
            f"{row['relative_error']:.0e}",
            "; ".join(row.get("frozen", {})),
        ]
        for row in rows
    ]
    return (
        "## Half of the channels of torchvision's classifiers\n\n"
        f"Random weights. Pruned equals masked in {rows[0]['dtype']} for {passed} of {len(rows)} networks, to a "
        f"relative error of {worst:.1e} at most; none is known by name.\n\n"
        + table(
            ["network", "parameters", "removed", "MACs removed", "error", "what stays, and why"],
            lines,
        )
    )


if __name__ == "__main__":
    main()
