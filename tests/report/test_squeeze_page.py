"""Claims about the curve of bytes against accuracy: every row is on both pages, goals are just, published is marked."""

import copy
import json
import pathlib
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import network_names
import squeeze
import squeeze_figure
import squeeze_peers
import tables
import tables_small_files as small

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told():
    return json.loads((ROOT / "results" / "squeeze.json").read_text())


def row(told, model="resnet18", form="size=1", size=1000, lost=0.1, **more):
    """A row of another network, form, size and loss."""
    found = copy.deepcopy(told["rows"][0])
    found |= {"model": model, "form": form, "size_bytes": size, "epochs": 0.0, "seconds": 60.0}
    found["interval"] |= {"difference_pt": -lost, "low_pt": -lost - 0.2, "high_pt": -lost + 0.2}
    return found | more


def test_both_pages_are_what_the_rows_say(told):
    pages = {name: (ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "results.md")}
    again = "run python benchmarks/tables.py"
    assert small.squeezed(told) in pages["benchmarks.md"], again
    assert (
        tables.with_section(pages["results.md"], small.bytes_and_accuracy(told))
        == (pages["results.md"])
    ), again
    for each in told["rows"]:
        for page in pages.values():
            assert f"| {each['size_bytes']:,} |" in page


def test_the_section_is_replaced_and_the_rest_stays():
    page = "# T\n\nfirst\n\n## Coverage\n\nlast\n"
    once = tables.with_section(page, "## A\n")
    assert once.index("first") < once.index("## A") < once.index("## Coverage") < once.index("last")
    assert tables.with_section(once, "## A\n") == once
    assert tables.with_section(once, "## B\n") == once.replace("## A", "## B")
    assert tables.with_section("# T\n", "## A\n").startswith("# T\n\n<!--")


def test_goals_are_judged_by_the_smallest_file_within_the_loss(told):
    mib = 1 << 20
    rows = [
        row(told, "vgg16_bn", "size=1,epochs=9", mib, 0.2),
        row(told, "vgg16_bn", "size=2,epochs=9", 1000, 0.21),
        row(told, "vgg16_bn", "deep=0.9,5", 1000, 0.0),
        row(told, "resnet18", "size=3,epochs=9", 200_000, -0.1, epochs=9.0),
        row(told, "resnet18", "size=4", 2 * mib, 0.5, seconds=600.0),
        row(told, "resnet18", "size=5", mib, 0.5, seconds=601.0),
    ]
    verdicts = [line[-1] for line in small.goals(rows)]
    assert verdicts == ["met", "missed", "met", "missed", "met"]
    assert "2.00 MiB" in small.goals(rows)[-1][3]
    assert "1.00 MiB" in small.goals(rows)[0][3]
    assert [line[3:] for line in small.goals(rows[1:2])] == [
        *[["none within the loss", "missed"]] * 2,
        *[["not measured", "–"]] * 3,
    ]


def test_merging_keeps_each_row_once_and_the_last_of_equals(told):
    one, other = row(told, size=5000), row(told, size=4000, accuracy=0.5)
    seed, largest = row(told, seed=1, size=6000), row(told, "vgg16_bn", "gzip", 9000)
    found = squeeze.merged([{"rows": [largest, one, seed]}, {"rows": [other]}])
    assert found["rows"] == [seed, other, largest]
    assert squeeze.merged([found]) == found
    assert len(found["published"]) == len(squeeze_peers.PUBLISHED)
    assert squeeze.merged([told]) == told, "results/squeeze.json is a merged file"


def test_a_network_s_name_tells_every_step_and_all_its_epochs(told):
    rows = [row(told, "vgg16_bn", "size=1", 541_228, epochs=45.0)]
    blocks = "resnet18-blocks-layer1.0+layer1.1-0-0-widths-fisher-conv1=16+layer2=48-fit-45-0"
    assert network_names.made_by(blocks) == (
        "without the blocks layer1.0, layer1.1, channels conv1=16, layer2=48 stay (fisher), 45 epochs"
    )
    assert network_names.epochs_of(blocks, rows) == 45
    later = "vgg16_bn_541kB-as_it_is-2-0-unstructured-lamp-global-0.5-22.5-1"
    assert network_names.made_by(later) == (
        "vgg16_bn_541kB.tersor, trained on, 2 epochs, 50% pruned (lamp), 22.5 epochs"
    )
    assert network_names.epochs_of(later, rows) == 45 + 2 + 22.5
    for held in told["rows"]:
        if "network=" in held["form"]:
            words, stem = small.words_of(held), held["form"].partition("network=")[2]
            own = re.findall(r"epochs=([0-9.]+)|([0-9.]+) epochs", words)
            start = [r for r in told["rows"] if f"after {network_names.piece_name(r)}," in words]
            behind = [r["epochs"] for r in start if network_names.is_ours(r)]
            assert sum(float(a or b) for a, b in own) + sum(behind) == held["epochs"], stem


def test_published_points_stand_apart_and_are_called_so(told):
    text = small.published(told)
    assert text.startswith("Published, not measured here")
    for point in told["published"]:
        assert point["source"] in text and f"{point['size_bytes']:,}" in text
    assert {r["form"] for r in told["rows"]}.isdisjoint(p["form"] for p in told["published"])


def test_the_figure_shows_every_row_and_every_published_size_legibly(told):
    rows = [
        row(told, "resnet18", "size=1", 500_000, 0.19),
        row(told, "resnet18", "size=2,epochs=9", 130_000, 0.49, epochs=9.0),
        row(told, "resnet18", "zstd", 9_000_000, 0.0),
        row(told, "vgg16_bn", "size=1,epochs=9", 76_000, 0.1, epochs=9.0),
        row(told, "vgg16_bn", "deep=0.9,5", 9_000_000, 40.0),
        row(told, "vgg16_bn", "deep=0.9,5,epochs=2", 8_000_000, 0.2, epochs=2.0),
    ]
    figure = squeeze_figure.drawn({**told, "rows": rows})
    FigureCanvasAgg(figure).draw()
    *curves, points = figure.axes
    drawn = [x for axes in curves for bars in axes.containers for x in bars.lines[0].get_xdata()]
    assert sorted(drawn) == sorted(r["size_bytes"] / 1e6 for r in rows)
    foreign = [m for m in points.lines if m.get_markerfacecolor() == "white"]
    assert sorted(m.get_xdata()[0] for m in foreign) == sorted(
        p["size_bytes"] / 1e6 for p in told["published"]
    )
    assert len(points.lines) == len(foreign) + 3
    assert "published, not measured here" in points.get_title("right")

    around = figure.bbox
    words = [t for axes in figure.axes for t in visible_words(axes)]
    words += [t for part in figure.subfigs for each in part.legends for t in each.get_texts()]
    boxes = [word.get_window_extent() for word in words]
    for word, box in zip(words, boxes, strict=True):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= around.x1 and box.y1 <= around.y1
        assert inside, word.get_text()
    for i, box in enumerate(boxes):
        for j in range(i):
            assert not box.overlaps(boxes[j]), (words[i].get_text(), words[j].get_text())


def visible_words(axes):
    """All that is written; labels of ticks beyond the axes are not drawn."""
    shown = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        places = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        shown += [label for place, label in places if low <= place <= high]
    titles = [axes.title, axes._right_title, axes.xaxis.label, axes.yaxis.label]
    return [text for text in (*shown, *titles, *axes.texts) if text.get_text()]
