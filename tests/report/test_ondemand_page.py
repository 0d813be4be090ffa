"""Claims about the page of an answer: its numbers are the run's, nothing is missing, nothing a name says is run,
and a real browser draws it at every width without a script, a request or an error."""

import dataclasses as dc
import html
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.report.changed import pictures_in
from tersor.report.ondemand import ondemand_page
from tersor.report.scales import MOST_TICKS, bent, logarithmic

VOID = {"meta", "br", "wbr", "img", "input"}
HOSTILE = "\"><script>alert(1)</script>\n'onload=x\u202e\x1b[31m&amp;" + "x" * 300


class Walk(HTMLParser):
    """Tags with their attributes, and the text of the page; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def words(page):
    """What a reader sees, spaces made even."""
    body = page[page.index("</style>") :].replace("<wbr>", "")
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body))).strip()


def cells(page, key):
    """The cells of the table whose caption has that id, row by row."""
    found = re.search(rf'aria-labelledby="{key}".*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    return [
        [words(f"</style>{cell}") for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", found)
    ]


def test_the_page_is_well_formed_and_asks_nothing_of_anybody(make_told):
    page = ondemand_page(make_told())
    walk = Walk(page)
    ids = [a["id"] for _, a in walk.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in walk.tags:
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)
        assert not [name for name in attributes if name.startswith("on")]
    links = [a["href"] for a in walk.all("a")]
    assert links[0] == "#main" and all(link[1:] in ids for link in links)
    assert not {"script", "link", "iframe", "form", "object"} & {tag for tag, _ in walk.tags}
    assert all(a["src"].startswith("data:image/png;base64,") for a in walk.all("img"))
    assert not re.findall(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page and "img-src data:" in page
    headings = [int(tag[1]) for tag, _ in walk.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))


def test_everything_has_a_name_and_can_be_reached(make_told):
    walk = Walk(ondemand_page(make_told()))
    for tag, attributes in walk.tags:
        if tag == "th":
            assert attributes["scope"] in ("row", "col", "colgroup")
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes["aria-label"]
        if tag == "img":
            assert attributes["alt"]
        if "scroll" in (attributes.get("class") or "").split():
            assert attributes["tabindex"] == "0" and attributes["role"] == "region"
        if tag == "figure":  # by itself, or by the radio buttons inside
            assert attributes["aria-labelledby"]
            assert attributes.get("tabindex") == "0" or attributes["class"] == "front"
    assert len(walk.all("caption")) == len(walk.all("table"))
    assert len(walk.all("legend")) == len(walk.all("fieldset")) == 2
    for name in ("front-size", "front-time"):
        group = [a for a in walk.all("input") if a["name"] == name]
        assert sum("checked" in a for a in group) == 1 and all(a["aria-label"] for a in group)


def test_the_headline_says_how_many_times_and_at_what_cost(make_told):
    told = make_told()
    heading = re.search("<h1>(.*?)</h1>", ondemand_page(told))[1]
    result = told.result
    smaller = result["original"]["size_bytes"] / result["size_bytes"]
    assert words(f"</style>{heading}") == (
        f"ResNet-18 is {smaller:.1f} times smaller and {result['speedup']:.2f} times faster: "
        f"{result['drop']['estimate_pt']:.2f} points of accuracy lost (95 % interval: 0.19 gained to 0.93 lost)"
    )
    seen = words(ondemand_page(told))
    assert "95 % interval: 0.19 gained to 0.93 lost" in seen
    assert "0.37 answers in 100 fewer are right than of the original" in seen
    assert "its interval reaches 0.93 lost, past the bound" in seen


def test_without_labels_the_limit_is_told_and_whose_word_it_is(make_told):
    seen = words(ondemand_page(make_told(labelled=False)))
    assert (
        "0.21 points of accuracy lost as the original would expect (95 % upper limit: 0.43 lost)"
        in seen
    )
    assert "no more than 0.43 lost" in seen and "95 % upper limit: 0.43 lost" in seen
    assert "which is right is not known" in seen and "with labels" not in seen.split("Coverage")[0]


def test_an_answer_that_does_not_fit_says_so_first(make_told):
    page = ondemand_page(make_told(met=False))
    assert words(f"</style>{re.search('<h1>(.*?)</h1>', page)[1]}").startswith(
        "No model within the budget was found. The nearest is 13.2 times smaller"
    )
    verdicts = {row[0]: row[-1] for row in cells(page, "table-budget")}
    assert verdicts["size of the file"].endswith("missed")
    assert verdicts["time of one run"].endswith("met")
    assert "nearest.tersor" in words(page)
    assert "What binds is the size of the file, at layer features.3" in words(page)
    assert "missed" not in words(ondemand_page(make_told())).split("What could be had")[0]


def test_a_relative_bound_on_time_is_judged_in_the_same_run(make_told):
    told = make_told()
    row = next(r for r in cells(ondemand_page(told), "table-budget") if r[0] == "time of one run")
    result = told.result
    assert float(row[2].split()[0]) == pytest.approx(
        result["original"]["latency_ms"] / result["speedup"], rel=0.005
    )
    told.first["budget"]["latency"] = "2ms"
    row = next(r for r in cells(ondemand_page(told), "table-budget") if r[0] == "time of one run")
    assert float(row[2].split()[0]) == pytest.approx(result["latency_ms"], rel=0.005)


def leaves(value):
    """All values of a JSON object that are no containers, but those of the front and of the bits."""
    if isinstance(value, dict):
        for key, held in value.items():
            if key not in ("front", "bits"):
                yield from leaves(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from leaves(held)
    else:
        yield value


def test_every_value_of_the_result_stands_on_the_page_exactly(make_told):
    told = make_told()
    exact = dict(cells(ondemand_page(told), "table-exact"))
    assert exact["latency_ms"] == str(told.result["latency_ms"])
    assert exact["drop.interval.low_pt"] == str(told.result["drop"]["interval"]["low_pt"])
    shown = " ".join(exact.values())
    assert all(str(value) in shown for value in leaves(told.result))


def test_every_model_of_the_front_has_its_numbers(make_told):
    told = make_told()
    rows = cells(ondemand_page(told), "table-front")
    assert [row[0] for row in rows] == [
        "original", "the answer", "candidate_0", "candidate_1", "prediction 1", "prediction 2",
    ]  # fmt: skip
    predicted = [each for each in told.result["front"] if not each["measured"]]
    for row, each in zip(rows[-2:], predicted, strict=True):
        assert row[1] == f"{each['size_bytes']:,.0f}"
        assert float(row[2]) == each["latency_ms"] and row[-1] == "predicted"
        assert float(row[3]) == pytest.approx(each["drop_pt"], abs=0.005)
    assert rows[1][1] == f"{told.result['size_bytes']:,.0f}" and rows[1][-1] == "measured"


def test_the_front_draws_each_model_once_and_the_bounds(make_told):
    page = ondemand_page(make_told())
    walk = Walk(page)
    kinds = [a["class"] for a in walk.all("label")]
    assert sorted(kinds) == sorted(2 * ["original", "answer", "measured", "predicted", "predicted"])
    for figure in re.findall(r'<figure class="front".*?</figure>', page, re.DOTALL):
        assert figure.count('<line class="bound"') == 2
        assert figure.count('class="tip"') == 5
    titles = [a["title"].replace("\xa0", " ") for a in walk.all("label")]
    assert any("predicted, not built" in title and "2.47 points lost" in title for title in titles)
    places = re.findall(r"(?:left|top):(-?[\d.]+)%", page)
    assert places and all(0 <= float(place) <= 100 for place in places)


def test_the_picture_of_the_layers_is_that_of_the_details(make_told):
    told = make_told()
    page = ondemand_page(told)
    rows = cells(page, "layers-caption")
    assert [row[0] for row in rows] == [each["layer"] for each in told.details["layers"]]
    for row, each in zip(rows, told.details["layers"], strict=True):
        assert int(row[1]) == each["bits"]
        kept = "all" if each["outputs"] == each["outputs_before"] else f"{each['outputs']} of"
        assert row[2].startswith(kept)
        assert float(row[3].split()[0]) == pytest.approx(100 * each["density"], abs=0.05)
        if each["time_ms"] is None:
            assert row[5] == row[6] == "not measured"
        else:
            assert float(row[5].split()[0]) == pytest.approx(1000 * each["time_ms"], rel=0.005)
    bars = [float(b) for b in re.findall(r"--share:([\d.]+)%", page)]
    assert max(bars) == 100 and min(bars) >= 0


def test_coverage_names_every_layer_of_every_plan_and_the_reasons(make_told):
    told = make_told()
    page = ondemand_page(told)
    rows = {row[0]: row for row in cells(page, "table-coverage")}
    for plan in (told.plan, *told.plan["earlier"]):
        for each in plan["layers"]:
            assert each["layer"] in rows
            assert each["reason"] in " ".join(rows[each["layer"]])
    assert rows["features.3"][2] == "12 of 3 inputs, 28 of 32 outputs kept"
    assert rows["head"][1].startswith("left as it is")
    asked = {(row[1], row[2]) for row in cells(page, "table-request")}
    assert {("rounding", "gptq"), ("num_calibration", "512"), ("criterion", "fisher")} <= asked


def test_changed_answers_are_counted_and_shown_with_both_answers(make_told):
    told = make_told()
    page = ondemand_page(told)
    seen = words(page)
    assert "12 of 2,000 held-out inputs (0.6 %) get another answer" in seen
    assert "right before and wrong now 9, wrong before and right now 2, wrong both times 1." in seen
    assert seen.count("cat 88 %") == seen.count("dog 54 %") == 3
    assert pictures_in(page) == told.pictures
    assert "label: owl" in seen


def test_examples_that_were_left_out_leave_nothing_behind(make_told):
    told = make_told()
    told.details["changed"].update(shown=False, examples=[])
    page = ondemand_page(dc.replace(told, pictures={}))
    assert "<img" not in page and "--no-examples" in page and "12 of 2,000" in words(page)


def test_energy_is_said_to_be_counted_or_measured(make_told):
    told = make_told()
    seen = words(ondemand_page(told))
    assert "6.54 mJ an input before, 0.345 mJ now: 19.0 times less" in seen
    assert "Not measured: this machine shows no energy counters (RAPL)." in seen
    told.details["energy"].update(original_measured_mj=210.4, compressed_measured_mj=30.06)
    seen = words(ondemand_page(told))
    assert "Measured by the processor's counters" in seen and "7.00 times less" in seen


def test_an_older_run_without_details_says_what_is_missing(make_told):
    page = ondemand_page(dc.replace(make_told(), details={}, rows=(), pictures={}))
    assert Walk(page)
    assert words(page).count("this directory has none") == 4
    told = dc.replace(make_told(), details={"problem": "the graph <b>broke</b>"})
    assert words(ondemand_page(told)).count("the graph <b>broke</b>") == 4


@pytest.mark.parametrize(
    "place", ["layer", "class", "reason", "data", "note", "model", "binding", "cpu"]
)
def test_hostile_names_stay_text(make_told, place):
    told = make_told()
    if place == "layer":
        for rows in (told.details["layers"], told.details["histograms"], told.plan["layers"]):
            rows[0]["layer"] = HOSTILE
        told.result["choice"]["bits"] = {HOSTILE: 8}
    elif place == "class":
        told.details["changed"]["examples"][0].update(before=HOSTILE, after=HOSTILE, label=HOSTILE)
    elif place == "reason":
        told.plan["layers"][0]["reason"] = told.plan["request"]["rounding"] = HOSTILE
    elif place == "data":
        told.result["data"] = told.result["path"] = HOSTILE
    elif place == "note":
        told.result["notes"] = [HOSTILE]
    elif place == "model":
        told.details["conditions"]["model"] = told.result["engine"] = HOSTILE
    elif place == "binding":
        told.result.update(axis="drop_pt", layer=HOSTILE)
    else:
        told.result["environment"].update(cpu=HOSTILE, versions={HOSTILE: HOSTILE})
    page = ondemand_page(told)
    walk = Walk(page)
    assert "script" not in {tag for tag, _ in walk.tags}
    assert any("<script>alert(1)</script>" in text for text in walk.texts)
    assert "\x1b" not in page and "\u202e" not in page
    assert not [a for _, attributes in walk.tags for a in attributes if a.startswith("on")]


def test_the_same_answer_gives_the_same_bytes(make_told):
    again = json.loads(json.dumps(dc.asdict(dc.replace(make_told(), pictures={}))))
    told = dc.replace(make_told(), **{**again, "rows": tuple(again["rows"]), "pictures": {}})
    assert ondemand_page(told) == ondemand_page(dc.replace(make_told(), pictures={}))


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=20))
def test_a_logarithmic_scale_holds_its_values_in_order(values):
    scale = logarithmic(values)
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places) and places[0] > 0 and places[-1] < 100
    assert len(scale.ticks) <= MOST_TICKS
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_a_bent_scale_starts_at_nothing_and_keeps_order(values):
    scale = bent(values)
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places) and scale.at(0.0) == 0 and places[-1] < 100
    marks = [scale.at(tick) for tick in scale.ticks]
    assert all(b - a > 9 for a, b in itertools.pairwise(marks)), "labels would touch"
    assert math.isfinite(scale.high)


FOCUSED = "(e=>e.getAttribute('aria-label')||e.getAttribute('aria-labelledby')||e.textContent)"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_chromium_shows_it_without_scrolling_sideways(make_told, chromium, tmp_path, width, dark):
    told = make_told()
    told.details["layers"][0]["layer"] = "block." + "x" * 80  # names may be long
    told.details["histograms"][0]["layer"] = "block." + "y" * 80
    path = tmp_path / "report.html"
    path.write_text(ondemand_page(told))
    chromium.show(path.as_uri(), width=width, dark=dark)
    assert chromium.value("innerWidth") == width
    # Also with everything unfolded.
    chromium.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.value("document.documentElement.scrollWidth") <= width
    events = chromium.events
    assert not [e for e in events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"].endswith("WillBeSent")]
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert len([url for url in asked if url.startswith("file")]) == 1
    ground = chromium.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == dark
    cut = "[...document.querySelectorAll('h1,h2,h3,p,figcaption,.tip,.legend,.notes')].filter(" \
          "e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.textContent)"  # fmt: skip
    assert chromium.value(cut) == []


def test_tab_reaches_every_figure_and_arrows_every_model(make_told, chromium, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(ondemand_page(make_told()))
    chromium.show(path.as_uri(), width=1280)
    reached = []
    for _ in range(80):
        chromium.press("Tab", 9)
        here = chromium.value(f"{FOCUSED}(document.activeElement)")
        if chromium.value("document.activeElement === document.body") or here in reached[:1]:
            break
        reached.append(here)
    assert reached[0] == "Skip to the results"
    wanted = ["layers-caption", "spread-0", "spread-2", "energy-words", "table-coverage"]
    places = [reached.index(key) for key in wanted]
    assert places == sorted(places)
    groups = [here for here in reached if here.startswith("the answer, measured")]
    assert len(groups) == 2, "one stop a plot, at the answer"
    chromium.value("document.querySelector('input[name=front-size]:checked').focus()")
    for _ in range(4):
        chromium.press("ArrowRight", 39)
    models = "document.querySelectorAll('input[name=front-size]')"
    assert chromium.value(f"[...{models}].filter(e => e.checked).length") == 1
    assert chromium.value("document.activeElement.getAttribute('aria-label')") != groups[0]
    shown = "[...document.querySelectorAll('.area')].map(a => [...a.querySelectorAll('.tip')]" \
            ".filter(t => getComputedStyle(t).visibility === 'visible').length)"  # fmt: skip
    assert chromium.value(shown) == [1, 1]
