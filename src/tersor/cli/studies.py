"""Commands that run many measurements: the demonstration, the study, and their report."""

from __future__ import annotations

import os
import pathlib
from typing import Annotated, Any

from tyro.conf import Positional, arg

from tersor.cli.arguments import Data
from tersor.cli.output import Output, say, say_interrupted, show_table, watching
from tersor.errors import RunError, SpecError
from tersor.study.settings import StudySettings

DEMO = StudySettings(
    models=("digits_net",),
    sparsities=(0.8,),
    scopes=("global",),
    num_calibration=256,
    train_epochs=20.0,
    train_learning_rate=0.1,
    batch_size=64,
    augment="crop",
    finetune_epochs=(10.0,),
    finetune_learning_rate=(0.03,),
    batches=(1, 64),
    timing_seconds=4.0,
    time_pruned=True,
)


def demo(*, out: str = "runs/demo", output: Output = Output()) -> dict[str, Any]:  # noqa: B008
    """Train, prune and quantize a small network on scikit-learn's digits, and measure every form.

    Args:
        out: directory for rows, files and the report
    """
    return _run(DEMO, "digits", out, {}, output)


def study(
    *,
    data: Data,
    out: str,
    weights: tuple[str, ...] = (),
    settings: StudySettings = StudySettings(),  # noqa: B008
    executor: str = "local",
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Run the study: pruning and quantization of each network, with tables, figures and a page.

    Args:
        out: directory for rows, files and the report; the same call again goes on where it stopped
        weights: trained float weights, NAME=FILE for each network; a network without is trained first
        executor: where the grid of pruned networks is measured: local, or ray, a Ray cluster that runs already
    """
    named = {}
    for item in weights:
        name, equals, file = item.partition("=")
        if not equals:
            raise SpecError(
                f"--weights {item!r}: expected NAME=FILE, for instance resnet18=net.safetensors"
            )
        named[name] = file
    return _run(settings, data, out, named, output, executor)


def _run(
    settings: StudySettings,
    data: str,
    out: str,
    weights: dict[str, str],
    output: Output,
    executor: str = "local",
) -> dict[str, Any]:
    from tersor.data import load_data
    from tersor.report import summary
    from tersor.runs.journal import read_rows
    from tersor.study.run import run_study

    directory = pathlib.Path(out)
    splits = load_data(
        data, seed=settings.seed, num_calibration=max(2048, settings.num_calibration)
    )
    with watching() as watch:
        page = run_study(
            settings,
            splits,
            directory,
            weights=weights,
            watch=watch,
            executor=executor,
            tell=say_interrupted,
        )
    rows = read_rows(directory / "rows.jsonl")
    _show_closing(output, rows, page)
    return {"report": str(page), "rows": len(rows), "summary": summary(rows)}


def report(
    directory: Positional[Annotated[str, arg(metavar="DIR")]],
    /,
    *,
    markdown: str | None = None,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Write the tables, figures and page of a directory that holds rows.jsonl; of an answer of compress its page.

    Args:
        markdown: of a study: also write the Markdown tables to this file, with links to the figures of DIR
    """
    from tersor.report import markdown as to_markdown
    from tersor.report import write_report
    from tersor.runs.journal import read_rows

    source = pathlib.Path(directory) / "rows.jsonl"
    if not source.is_file():
        raise RunError(
            f"no such file: {source}; a study, the demonstration or tersor compress writes it"
        )
    rows = read_rows(source)
    if (source.parent / "result.json").is_file():
        return _answers_page(source.parent, rows, markdown, output)
    page = write_report(rows, pathlib.Path(directory))
    answer: dict[str, Any] = {"report": str(page), "rows": len(rows)}
    if markdown is not None:
        figures = os.path.relpath(page.parent / "figures", pathlib.Path(markdown).parent)
        try:
            pathlib.Path(markdown).write_text(to_markdown(rows, figures=figures), encoding="utf-8")
        except OSError as error:
            raise RunError(f"{markdown} cannot be written: {error.strerror}") from None
        answer["markdown"] = markdown
    _show_closing(output, rows, page)
    return answer


def _answers_page(
    directory: pathlib.Path, rows: list[dict[str, Any]], markdown: str | None, output: Output
) -> dict[str, Any]:
    from tersor.ondemand.page import write_page

    if markdown is not None:
        raise SpecError(f"--markdown does not apply to {directory}: it holds an answer, no study")
    page = write_page(directory, rows)
    say(output, f"report: {page}")
    return {"report": str(page), "rows": len(rows)}


def _show_closing(output: Output, rows: list[dict[str, Any]], page: pathlib.Path) -> None:
    """What ends a run: every form in a line, what was covered, and where the report lies."""
    from tersor.report import summary

    lines = summary(rows)
    for network in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == network]
        batches = sorted({t["batch"] for line in mine for t in line["timings"]})
        columns = ["form", "accuracy %", "difference, pt", "bytes"]
        table = []
        for line in mine:
            times = {t["batch"]: t["median_ms"] for t in line["timings"]}
            accuracy = None if line["accuracy"] is None else 100 * line["accuracy"]
            cells = [line["form"], accuracy, _difference(line["interval"]), line["size_bytes"]]
            table.append([*cells, *(times.get(b) for b in batches)])
        columns += [f"ms at {b}" for b in batches]
        show_table(output, f"{network}: accuracy, bytes and CPU time by batch size", columns, table)
    covered = [_coverage(row) for row in rows if row["kind"] == "coverage"]
    heads = ("network", "form", "layers", "MACs %", "bytes %", "left alone, and why")
    show_table(
        output, "coverage: layers changed, share of MACs and of weight bytes", heads, covered
    )
    say(output, f"report: {page}")


def _difference(interval: dict[str, Any] | None) -> str | None:
    if interval is None:
        return None
    return "{difference_pt:+.2f} ({low_pt:+.2f} to {high_pt:+.2f})".format(**interval)


def _coverage(row: dict[str, Any]) -> list[Any]:
    kept = [layer for layer in row["layers"] if layer["action"] == "keep"]
    changed = f"{len(row['layers']) - len(kept)} of {len(row['layers'])}"
    form = row["variant"]
    if row.get("scope"):
        form += f" {row['sparsity']:.0%}, scope {row['scope']}"
    shares = [
        None if row.get(key) is None else 100 * row[key] for key in ("macs_share", "bytes_share")
    ]
    reasons = sorted({layer["reason"] for layer in kept})
    left = "; ".join(
        f"{', '.join(la['layer'] for la in kept if la['reason'] == why)}: {why}" for why in reasons
    )
    return [row["model"], form, changed, *shares, left or "none"]
