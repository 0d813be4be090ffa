"""The commands that take a budget, or tell which methods suit."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from tersor.cli.arguments import Data, Model, Weights
from tersor.cli.output import Output, say, say_interrupted, show_table, watching
from tersor.errors import SpecError
from tersor.specs import Budget

if TYPE_CHECKING:  # slow to import, and only named here
    from tersor.ondemand.answer import Answer

BUDGET = ("size", "latency", "macs", "energy", "drop")


def compress(
    model: Positional[Model],
    /,
    *,
    out: str,
    data: Data | None = None,
    size: str = "",
    latency: str = "",
    macs: str = "",
    energy: str = "",
    drop: float | None = None,
    batch: int = 1,
    threads: int = 0,
    effort: str = "quick",
    minutes: float | None = None,
    labels: bool = True,
    input_shape: tuple[int, int, int] | None = None,
    dry_run: bool = False,
    examples: bool = True,
    recipe: str | None = None,
    weights: Weights = None,
    num_classes: int | None = None,
    save_weights: str | None = None,
    measure: bool = True,
    executor: str = "local",
    seed: int = 0,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """A budget in, the best model found within it out; or the steps of a recipe.

    Args:
        out: directory of the answer (model.tersor, report.html, plan.json, result.json, details.json, rows.jsonl);
            with --recipe a .tersor file
        data: some inputs, labelled or not; without, inputs are made from the network's batch norms
        size: of the file: 500kB, 1.5MB, "10x smaller" than the weights in float32
        latency: of one batch on this machine: 2ms, "6x faster" than PyTorch's eager float32
        macs: multiplications of one input: 50M, "4x fewer"
        energy: of one input, counted: 0.5mJ, "10x less"
        drop: points of accuracy that may be lost
        batch: inputs of one run
        threads: of one run (0: all)
        effort: quick (2 minutes, no training), standard (15 minutes, learns from the original), max
        minutes: another time for that effort
        labels: where there are some judge by those of the validation part, and with effort max learn from the others
        input_shape: channels height width, without --data
        dry_run: print what would be built
        examples: show small pictures of inputs whose answer changed in report.html
        recipe: a JSON file: {"steps": [{"kind": "prune", ...}, {"kind": "finetune", ...}, {"kind": "quantize", ...}]}
        save_weights: with --recipe, also write the network's weights before it is quantized (.safetensors)
        measure: with --recipe, as of prune
        executor: where networks that lost channels are made and trained: local, or ray, several at once on a Ray
            cluster that runs already; times are measured here
    """
    words = {"size": size, "latency": latency, "macs": macs, "energy": energy, "drop": drop}
    if recipe is not None:
        if executor != "local":
            raise SpecError("--executor spreads a search; a recipe trains under torchrun")
        given = (recipe, out, weights, num_classes, save_weights, measure, output)
        return _by_recipe(words, model, data, *given)
    if save_weights is not None:
        raise SpecError("--save-weights goes with --recipe; the answer of a budget is a file")
    from tersor.ondemand.compress import compress as search

    asked = Budget(
        size=size,
        latency=latency,
        macs=macs,
        energy=energy,
        drop=drop,
        batch=batch,
        threads=threads,
    )
    with watching() as watch:
        answer = search(
            model,
            data,
            asked,
            out=out,
            effort=effort,
            minutes=minutes,
            weights=weights,
            num_classes=num_classes,
            input_shape=input_shape,
            use_labels=labels,
            dry_run=dry_run,
            examples=examples,
            executor=executor,
            seed=seed,
            on_progress=watch,
            on_interrupt=say_interrupted,
        )
    _show(output, answer, dry_run)
    return answer.to_dict()


def _by_recipe(words: dict[str, Any], model: str, data: str | None, *given: Any) -> dict[str, Any]:
    from tersor.cli.compression import by_recipe

    if said := [f"--{name}" for name, value in words.items() if value]:
        raise SpecError(
            f"{', '.join(said)} and --recipe: a recipe decides by itself; give one of both"
        )
    if data is None:
        raise SpecError("--recipe needs --data")
    return by_recipe(model, data, *given)


def _show(output: Output, answer: Answer, dry_run: bool) -> None:
    told = answer.to_dict()
    rows = [
        [
            row["size_bytes"] / 1000,
            row["latency_ms"],
            row["drop_pt"],
            row["channels_share"],
            _mean_bits(row["bits"]),
            "measured" if row["measured"] else "predicted",
        ]
        for row in answer.front
    ]
    columns = ("kB", "ms", "points lost", "share of the channels' time", "bits", "how known")
    show_table(output, "what could be had (none is better in all)", columns, rows)
    for note in answer.notes:
        say(output, f"note: {note}")
    drop = answer.drop
    lost = f"{drop['estimate_pt']:.2f} points, predicted" if isinstance(drop, dict) else str(drop)
    word = "planned" if dry_run else "answer"
    say(
        output,
        f"{word}: {answer.size_bytes / 1000:,.1f} kB ({told['smaller']:.1f}x smaller), {answer.latency_ms:.4g} ms on "
        f"{answer.engine} ({answer.speedup:.1f}x faster than PyTorch eager float32), {lost}; {answer.data}",
    )
    if dry_run:
        bits = answer.choice["bits"]
        show_table(
            output, "bits of each layer", ("layer", "bits"), [[k, v] for k, v in bits.items()]
        )
        say(output, f"channels: {answer.choice['channels_share']:.0%} of their time stays")
        return
    assert answer.path is not None, "only a dry run writes no file"
    say(output, f"wrote {answer.path} in {answer.seconds:.0f} s")
    say(output, f"report: {answer.report}")
    say(output, next_steps(answer.path, answer.engine, answer.input_shape))


def _mean_bits(bits: dict[str, int]) -> float:
    return sum(bits.values()) / len(bits) if bits else 8.0


def next_steps(path: pathlib.Path, engine: str, input_shape: tuple[int, int, int]) -> str:
    """How to use the file: five lines that serve it, and the commands that judge and export it."""
    shape = ", ".join(map(str, (1, *input_shape)))
    return f"""
serve it (no torch needed):

    import numpy as np
    import tersor
    session = tersor.open_session(tersor.load("{path}"), engine="{engine}")
    batch = np.zeros(({shape}), np.float32)  # your inputs (N, C, H, W), normalised as in training
    print(session.run(batch).argmax(axis=1))

judge it on a test set:  tersor evaluate {path} --data DATA --original MODEL --original-weights WEIGHTS
export it:               tersor export {path} --out model.onnx
train on:                tersor.load("{path}", into=MyModel(), inputs=batches)"""


def advise(
    model: Positional[Model],
    /,
    *,
    data: Data | None = None,
    weights: Weights = None,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    batch: int = 1,
    threads: int = 0,
    labels: bool = True,
    seed: int = 0,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Which methods suit a network, in words, from facts measured here: redundancy, sensitivity, hardware, use.

    Args:
        data: some inputs, labelled or not; without, inputs are made from the network's batch norms
        input_shape: channels height width, without --data
        batch: inputs of one run in use: 1 for an answer at once, more for throughput
        threads: of one run (0: all)
        labels: judge by the labels of the validation part, where there are some
    """
    from tersor.ondemand.advise import advise as look

    with watching() as watch:
        found = look(
            model,
            data,
            weights=weights,
            num_classes=num_classes,
            input_shape=input_shape,
            batch=batch,
            threads=threads,
            use_labels=labels,
            seed=seed,
            on_progress=watch,
        )
    show_table(output, "measured", ("fact", "value"), [[k, v] for k, v in found.facts.items()])
    for advice in found.advice:
        say(output, f"{advice.verdict:>4}  {advice.method}: {advice.reason}")
    say(output, f"next: {found.command}")
    return found.to_dict()
