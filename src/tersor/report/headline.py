"""The result in a sentence for each network, and the conditions under which it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tersor.report.document import Highlight
from tersor.report.forms import shown_forms
from tersor.report.measurements import Accuracy, Form, Measurements, Network
from tersor.report.words import (
    SCOPES,
    clean,
    count,
    engine_title,
    form_title,
    network_title,
    percent,
    signed,
    size,
    times,
)

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "avx_vnni")


def highlights(found: Measurements) -> tuple[Highlight, ...]:
    """How much smaller, how much faster, at what cost: one for every network with a compressed
    form."""
    made = (_highlight(found, network) for network in found.networks)
    return tuple(h for h in made if h is not None)


def _highlight(found: Measurements, network: Network) -> Highlight | None:
    baseline = found.best_known(network, variant="float")
    form = _chosen(found, network)
    if form is None:
        return None
    base = found.size_bytes(network, baseline[0]) if baseline else None
    own, score = found.size_bytes(network, form), found.score(network, form)
    facts: list[tuple[str, str]] = []
    parts: list[str] = []
    if base and own:
        facts.append((f"{times(base / own)}×", "smaller file"))
        parts.append(f"is {times(base / own)} times smaller ({size(base)} to {size(own)})")
    speed = _speed(found, network, form)
    if speed:
        facts.append((f"{times(1 / speed[1])}×", f"faster, batch {speed[0]}"))
        parts.append(speed[2])
    if score and score.difference_pt is not None:
        ends = f"{signed(score.low_pt)} to {signed(score.high_pt)}"
        facts.append((f"{signed(score.difference_pt)} pt", f"accuracy ({ends})"))
        parts.append(f"changes accuracy {_cost(score)}")
    elif score:
        facts.append((f"{percent(score.accuracy)} %", "accuracy"))
        parts.append(
            f"is right on {percent(score.accuracy)} % of {count(score.num_samples, 'test image')}"
        )
    if not parts:
        return None
    name = form_title(form, with_engine=False)
    engine = f" on {engine_title(form.engine)}" if form.engine else ""
    sentence = f"{name[:1].upper()}{name[1:]}{engine} {_joined(parts)}."
    pruned = _pruned_sentence(found, network, base)
    return Highlight(
        network_title(network),
        _headline(network, form, facts),
        (sentence, pruned) if pruned else (sentence,),
        tuple(facts),
    )


def _headline(network: Network, form: Form, facts: list[tuple[str, str]]) -> str:
    """The facts in one short sentence."""
    parts = []
    for figure, what in facts:
        if figure.endswith("×"):
            word = what.split()[0].rstrip(",")
            parts.append(f"{figure.removesuffix('×')} times {word}")
        elif figure.endswith(" pt"):
            parts.append(f"{figure.removesuffix(' pt')} points of {what}")
        else:
            parts.append(f"{figure} {what}")
    name = form_title(form, with_engine=False)
    return f"{network_title(network)} as {name}: {', '.join(parts)}"


def _chosen(found: Measurements, network: Network) -> Form | None:
    """Static int8 where it was measured, else the smallest form that is not float32."""
    forms = [f for f in shown_forms(found, network) if f.variant != "float"]
    static = [f for f in forms if f.variant == "static" and not f.sparsity]
    forms = static or forms
    forms.sort(key=lambda form: (found.score(network, form) is None, _bytes(found, network, form)))
    if forms:
        return forms[0]
    pruned = [f for f in found.forms(network) if f.variant == "pruned" and f.recovery == "finetune"]
    return pruned[-1] if pruned else None


def _bytes(found: Measurements, network: Network, form: Form) -> float:
    own = found.size_bytes(network, form)
    return float("inf") if own is None else own


def _speed(found: Measurements, network: Network, form: Form) -> tuple[int, float, str] | None:
    """(batch, share of eager's time, in words) at the smallest batch timed; the engine's own part
    beside."""
    for batch in found.batches(network):
        time = found.time(network, form, batch)
        if time is None or not time.ratio:
            continue
        text = f"takes {percent(time.ratio, 1)} % of the CPU time of PyTorch's eager float32"
        text += f" at batch {batch}"
        same_engine = found.time(network, Form("float", form.engine), batch)
        if form.engine != "torch" and same_engine and same_engine.ratio:
            share = percent(same_engine.ratio, 1)
            text += f" (float32 on {engine_title(form.engine)} takes {share} %)"
        return batch, time.ratio, text
    return None


def _cost(score: Accuracy) -> str:
    level = f"{percent(score.level, 0)} % " if score.level is not None else ""
    return (
        f"by {signed(score.difference_pt)} points to {percent(score.accuracy)} % ({level}interval "
        f"{signed(score.low_pt)} to {signed(score.high_pt)}; n = {count(score.num_samples)})"
    )


def _pruned_sentence(found: Measurements, network: Network, base: int | None) -> str:
    """What fine-tuning saves at the highest sparsity of a study: every scope, for the better one
    would be chosen on the test images."""
    tuned = [
        (form, score)
        for form in found.forms(network)
        if form.variant == "pruned" and form.recovery == "finetune"
        if (score := found.score(network, form)) and score.difference_pt is not None
    ]
    if not tuned or not found.is_sweep(network):
        return ""
    highest = max(form.sparsity for form, _ in tuned)
    parts = []
    for form, score in tuned:
        if form.sparsity == highest:
            own = found.size_bytes(network, form)
            scope = clean(SCOPES.get(form.scope, form.scope))
            smaller = f", in a file {times(base / own)} times smaller" if base and own else ""
            parts.append(f"{scope} {_cost(score)}{smaller}".strip())
    return (
        f"With {percent(highest, 0)} % of the weights pruned and the rest fine-tuned, accuracy "
        f"changes " + "; ".join(parts) + "."
    )


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]


def conditions(found: Measurements) -> str:
    """One paragraph: data, images, seeds, processor, threads, versions, dates; all read from the
    rows."""
    rows = [
        row
        for row in found.rows
        if row.get("kind") in ("accuracy", "timing", "coverage", "training")
    ]
    samples = _distinct(row.get("num_samples") for row in rows if row["kind"] == "accuracy")
    parts = [f"Data: {', '.join(_distinct(row.get('data') for row in rows)) or 'not stated'}"]
    if samples:
        parts[0] += f", {' and '.join(count(int(n)) for n in samples)} test images"
    for title, key in (("seed", "seed"), ("CPU", "cpu")):
        values = _distinct(row.get(key) for row in rows)
        if values:
            parts.append(f"{title}: {', '.join(values)}")
    flags = _flags(rows)
    if flags:
        parts[-1] += f" ({', '.join(flags)})"
    threads = _distinct(row.get("threads") for row in rows if row["kind"] == "timing")
    if threads:
        parts.append(f"threads: {', '.join(threads)}")
    versions = _versions(rows)
    if versions:
        parts.append(f"versions: {', '.join(versions)}")
    dates = sorted({str(row["time"])[:10] for row in rows if row.get("time")})
    if dates:
        last = f" to {dates[-1]}" if len(dates) > 1 else ""
        parts.append(f"measured {clean(dates[0])}{clean(last)}")
    return ". ".join(part[:1].upper() + part[1:] for part in parts) + "."


def _distinct(values: Any) -> list[str]:
    return list(
        dict.fromkeys(clean(value) for value in values if value is not None and value != "")
    )


def _flags(rows: list[Mapping[str, Any]]) -> list[str]:
    """The instruction sets that decide int8 speed; rows list them, or map each to True or False."""
    found: dict[str, None] = {}
    for row in rows:
        flags = row.get("flags") or ()
        names = [k for k, v in flags.items() if v] if isinstance(flags, Mapping) else flags
        names = names.split() if isinstance(names, str) else names
        found.update(dict.fromkeys(clean(name) for name in names))
    shown = [name for name in FEATURES if name in found]
    return shown or list(found)[:12]


def _versions(rows: list[Mapping[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for row in rows:
        versions = row.get("versions")
        if isinstance(versions, Mapping):
            found.update(dict.fromkeys(f"{clean(k)} {clean(v)}" for k, v in versions.items()))
    return list(found)
