"""Writes docs/benchmarks.md, and in docs/results.md the section of bytes against accuracy, from the measured rows
under results/: no number there is typed by hand.

    python benchmarks/tables.py

The rest of docs/results.md is `tersor report`'s; `make results` does one after the other.
"""

from __future__ import annotations

import numpy as np

from tables_common import NAMES, ROOT, change, rows_of, table, where
from tables_small_files import bytes_and_accuracy, coding, squeezed
from tersor import paired_interval
from tersor.results import Score

FLOATS = "float32"
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


def on_demand(told):
    """Budgets asked, and their answers measured again."""
    lines = []
    for row in told["rows"]:
        held = row.get("asked_and_told", {})
        asked = ", ".join(f"{k} {v}" for k, v in row.get("budget", {}).items())
        lines.append(
            [
                NAMES.get(row["model"], row["model"]),
                row.get("effort", "by hand"),
                asked or row.get("network", ""),
                "no" if row.get("labels") is False else "yes",
                {True: "yes", False: "no"}.get(held.get("met"), "–"),
                f"{row['smaller']:.1f}",
                *(
                    over_runs(row, batch, name)
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
        "in one run in turns, each alone for a while as in use (with a range: the median, the lowest and the highest "
        "of several runs, each a process of its own), than PyTorch's eager float32 and than the float "
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


def over_runs(row, batch, name):
    """How many times faster, and where several runs were timed the lowest and the highest of them."""
    text = f"{row['times_faster'][batch][name]:.1f}"
    runs = [run[batch][name] for run in row.get("times_faster_runs", [])]
    return f"{text} ({min(runs):.1f}–{max(runs):.1f})" if runs else text


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
