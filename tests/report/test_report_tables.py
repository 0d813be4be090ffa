"""Claims about the numbers: each comes from a row, missing ones are named, bars are just."""

import copy
import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.errors import RunError
from tersor.report import markdown, summary, text_tables
from tersor.report.bars import bars
from tersor.report.compose import compose
from tersor.report.measurements import read
from tersor.report.words import MISSING, milliseconds, signed

UNSHOWN = {  # a row's values that no table prints: they repeat another value or are of no row's own
    ("flags",), ("history",), ("interval", "num_samples"), ("settings",), ("precision",), ("kind",),
    ("layers",), ("recipe", "kind"), ("threads",), ("time",), ("cpu",), ("data",), ("versions",),
    ("seed",), ("model",), ("engine",),
}  # fmt: skip


def find(rows, **wanted):
    return next(row for row in rows if all(row.get(k) == v for k, v in wanted.items()))


def table(rows, key):
    sections = compose(rows).sections
    return next(t for section in sections for t in section.tables if t.key == key)


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def test_every_number_of_a_row_reaches_the_report(study_rows):
    rows = [r for r in study_rows if r.get("model") == "resnet18"]
    before = markdown(rows)
    tried = 0
    for number, row in enumerate(rows):
        for path, value in leaves(row):
            if path in UNSHOWN or path[:1] in UNSHOWN or (value == 0 and path == ("sparsity",)):
                continue
            changed = copy.deepcopy(rows)
            target = changed[number]
            for key in path[:-1]:
                target = target[key]
            less = value - 0.1 * abs(value) - 0.0731  # more than the digits that tables show
            target[path[-1]] = less if isinstance(value, float) else value + 3
            assert markdown(changed) != before, (row["kind"], path)
            tried += 1
    assert tried > 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data", "Other data"), ("cpu", "Other CPU"), ("seed", 414243), ("threads", 4142),
        ("time", "2031-05-06T00:00:00Z"), ("versions", {"torch": "9.9"}), ("flags", ["amx_int8"]),
    ],
)  # fmt: skip
def test_conditions_come_from_the_rows(study_rows, key, value):
    shown = {"time": "2031-05-06", "versions": "torch 9.9", "flags": "amx_int8"}.get(
        key, str(value)
    )
    assert shown not in " ".join(text_tables(study_rows).split())
    for row in study_rows:
        row[key] = value
    shown = f"{value:,}" if key == "threads" else shown
    assert shown in " ".join(text_tables(study_rows).split())


def test_table_4_1_holds_the_rows_and_the_study(study_rows):
    shown = table(study_rows, "table-4-1-0-global")
    assert [row[0] for row in shown.rows] == ["0 (float32)", "10", "30", "50", "70", "90"]
    row = find(study_rows, model="vgg16_bn", sparsity=0.7, scope="global", recovery="bn")
    line = shown.rows[4]
    assert line[3] == f"{100 * row['accuracy']:.2f}"
    assert line[4].startswith(signed(row["interval"]["difference_pt"]))
    assert line[-1] == "85.51"


def test_a_missing_cell_says_so(study_rows):
    gone = find(study_rows, model="resnet18", sparsity=0.9, scope="layer", recovery="finetune")
    study_rows.remove(gone)
    line = table(study_rows, "table-4-1-1-layer").rows[-1]
    assert line[5:7] == (MISSING, MISSING)
    verdicts = {
        bar.what: bar.verdict for bar in bars(read(study_rows)) if bar.network == "ResNet-18"
    }
    assert verdicts["accuracy, pruned 90 % by layer, fine-tuned"] == MISSING
    assert verdicts["accuracy, pruned 90 % globally, fine-tuned"] == "met"


def test_a_line_of_a_figure_breaks_at_a_missing_point(study_rows):
    study_rows.remove(
        find(study_rows, model="resnet18", sparsity=0.5, scope="layer", recovery="finetune")
    )
    plots = [p for section in compose(study_rows).sections for p in section.plots]
    line = next(p for p in plots if p.key == "pruning-resnet18-layer-1").lines[2]
    assert [x for x, y in line.points if math.isnan(y)] == [50.0]


@pytest.mark.parametrize(
    ("what", "wanted", "change", "verdict"),
    [
        ("accuracy, static int8", {"variant": "static"}, {"difference_pt": -0.2}, "met"),
        ("accuracy, static int8", {"variant": "static"}, {"difference_pt": -0.21}, "missed"),
        ("file, static int8", {"variant": "static"}, {"mib": 10.8 * 1.0099}, "met"),
        ("file, static int8", {"variant": "static"}, {"mib": 10.8 * 0.9899}, "missed"),
        (
            "CPU time, static int8, batch 64",
            {"variant": "static", "batch": 64},
            {"ratio": 0.25},
            "met",
        ),
        (
            "CPU time, static int8, batch 1",
            {"variant": "static", "batch": 1},
            {"ratio": 0.26},
            "missed",
        ),
    ],
)
def test_bars_are_judged_at_their_edge(study_rows, what, wanted, change, verdict):
    kind = "timing" if "batch" in wanted else "accuracy"
    row = find(study_rows, kind=kind, model="resnet18", **wanted)
    if "mib" in change:
        row["size_bytes"] = round(change["mib"] * 2**20)
    elif "ratio" in change:
        row["ratio"] = change["ratio"]
    else:
        row["interval"]["difference_pt"] = change["difference_pt"]
    found = [b for b in bars(read(study_rows)) if b.network == "ResNet-18" and b.what == what]
    assert [b.verdict for b in found] == [verdict]


def test_no_bars_without_the_networks_of_the_study(demo_rows):
    assert bars(read(demo_rows)) == []
    assert "study (original" not in markdown(demo_rows)


def test_the_engine_is_not_credited_to_quantization(study_rows):
    rows = table(study_rows, "forms-table-0").rows
    assert ("float32", "ONNX Runtime") in [row[:2] for row in rows]
    assert "float32 on ONNX Runtime takes 48.7 %" in " ".join(text_tables(study_rows).split())


def test_a_ratio_left_out_is_that_of_the_medians(demo_rows):
    static = find(demo_rows, kind="timing", variant="static")
    eager = find(demo_rows, kind="timing", engine="torch")
    del static["ratio"]
    shown = next(line for line in summary(demo_rows) if line["variant"] == "static")
    assert shown["timings"][0]["ratio"] == static["median_ms"] / eager["median_ms"]


def test_of_two_rows_of_one_cell_the_later_counts(demo_rows):
    again = copy.deepcopy(find(demo_rows, variant="static", kind="accuracy"))
    again["accuracy"] = 0.5
    shown = {line["variant"]: line for line in summary([*demo_rows, again])}
    assert shown["static"]["accuracy"] == 0.5


def test_several_seeds_give_means_and_the_widest_span(demo_rows):
    other = copy.deepcopy(find(demo_rows, variant="static", kind="accuracy"))
    other |= {"seed": 1, "accuracy": other["accuracy"] - 0.02}
    other["interval"] |= {"difference_pt": -2.0, "low_pt": -3.0, "high_pt": -1.0}
    line = next(x for x in summary([*demo_rows, other]) if x["variant"] == "static")
    assert line["accuracy"] == pytest.approx(0.9761)
    assert line["interval"]["low_pt"] == -3.0
    assert line["interval"]["high_pt"] == pytest.approx(0.17)


def test_summary_of_the_demonstration_has_every_form(demo_rows):
    lines = summary(demo_rows)
    assert [(x["variant"], x["engine"]) for x in lines] == [
        ("float", "onnxruntime"), ("float", "torch"), ("pruned", "onnxruntime"),
        ("static", "onnxruntime"), ("dynamic", "onnxruntime"),
    ]  # fmt: skip
    assert lines[3]["compression_ratio"] == pytest.approx(94_312 / 28_121)
    assert lines[2]["timings"] == []
    titles = [section.title for section in compose(demo_rows).sections]
    assert titles == ["The forms of digits_net", "Coverage", "Every measurement"]


def test_forms_without_an_interval_still_have_a_headline_and_a_verdict(study_rows):
    rows = [r for r in study_rows if r.get("model") == "resnet18" and r["kind"] == "accuracy"]
    for row in rows:
        row["interval"] = None
    text = " ".join(text_tables(rows).split())
    assert "is right on 94.31 % of 10,000 test images" in text
    loss = next(b for b in bars(read(rows)) if b.what == "accuracy, static int8" and b.measured)
    assert loss.measured == "−0.06 pt (no interval)"
    assert loss.verdict == "met"


@pytest.mark.parametrize("kind", ["timing", "coverage", "training"])
def test_one_kind_of_rows_alone_is_reported(study_rows, kind):
    rows = [row for row in study_rows if row["kind"] == kind]
    assert "vgg16_bn" in markdown(rows)


def test_a_head_of_another_size_is_another_network(demo_rows):
    others = copy.deepcopy(demo_rows)
    for row in others:
        row["num_classes"] = 1000
    assert "digits_net, 1,000 classes" in text_tables([*demo_rows, *others])


def test_two_data_sets_are_told_apart(demo_rows):
    others = copy.deepcopy(demo_rows)
    for row in others:
        row["data"] = "other digits"
    text = text_tables([*demo_rows, *others])
    assert "digits_net on other digits" in text
    assert "digits_net on scikit-learn digits" in text


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**31), share=st.floats(0.02, 1))
def test_any_part_of_a_study_gives_a_report_without_empty_parts(study_rows, seed, share):
    chance = random.Random(seed)
    rows = [row for row in study_rows if chance.random() < share]
    if not any(row["kind"] != "run" for row in rows):
        return
    for section in compose(rows).sections:
        assert section.tables
        assert all(t.rows for t in section.tables)
        for plot in section.plots:
            values = [v for series in plot.bars for v in series.values if v is not None]
            assert values or plot.lines
    assert text_tables(rows)
    assert markdown(rows)
    assert isinstance(summary(rows), list)


def test_rows_stay_as_they_are(study_rows):
    before = copy.deepcopy(study_rows)
    text_tables(study_rows), markdown(study_rows), summary(study_rows)
    assert study_rows == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracy": 1.5}, "accuracy must be between 0 and 1, got 1.5"),
        ({"accuracy": "high"}, "accuracy must be a finite number, got 'high'"),
        ({"size_bytes": math.nan}, "size_bytes must be a finite number, got nan"),
        ({"model": None}, "model must be a name, got None"),
        ({"interval": {"low_pt": 1}}, "interval.difference_pt is missing"),
        ({"kind": 7}, "has no kind"),
        ({"kind": "coverage", "layers": [1]}, "layers must be a list of objects"),
        ({"kind": "timing", "batch": 0}, "batch must be 1 or more, got 0"),
    ],
)
def test_a_broken_row_is_named(demo_rows, change, said):
    demo_rows[2].update(change)
    with pytest.raises(RunError) as caught:
        markdown(demo_rows)
    assert "row 3" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("rows", [[], [{"kind": "run", "settings": {}}]])
def test_nothing_measured_is_an_error_with_a_remedy(rows):
    with pytest.raises(RunError, match="tersor demo"):
        text_tables(rows)


def test_an_unknown_kind_is_not_silent(demo_rows):
    assert "energy" in compose([*demo_rows, {"kind": "energy"}]).footer


def test_text_is_aligned(study_rows):
    lines = text_tables(study_rows).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Table 4.1"))
    rule = lines[start + 3]
    assert set(rule) == {"─", " "}
    assert all(len(line) <= len(rule) for line in lines[start + 4 : start + 10])
    assert not any(line.endswith(" ") for line in lines)


@given(st.floats(-1e6, 1e6))
def test_signed_keeps_sign_and_value(value):
    text = signed(value)
    back = float(text.replace("−", "-"))
    assert back == pytest.approx(value, abs=0.0051)
    assert not text.startswith(("-", "−0.00", "+0.00")) or float(text[1:]) > 0


@given(st.floats(1e-3, 1e5))
def test_milliseconds_keep_a_relative_precision(value):
    assert float(milliseconds(value)) == pytest.approx(value, rel=0.01, abs=0.0006)
