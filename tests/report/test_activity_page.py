"""Claims about the figure, the page and the sentence: they say what the JSON object says."""

import copy
import html
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tersor.report.activity import activity_page, activity_svg, conclusion

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '"><script>alert(1)</script>\n*x*\u202e'


def layer(name, macs, **shares):
    named = {
        "input_zeros": 0.0,
        "input_density": {"0.01": 0.75, "0.1": 0.5},
        "weight_zeros": 0.125,
        "macs_zero_input": 0.0,
        "macs_zero": 0.0,
        "gradient_zeros": 0.0,
        "gradient_zeros_training": 0.0,
        "gradient_top": 0.5,
    }
    return {"layer": name, "macs": macs, **named, **shares}


def timing(median):
    return {"engine": "onnxruntime", "batch": 64, "threads": 2, "median_ms": median, "repeats": 50}


@pytest.fixture
def answer():
    return {
        "model": "small_net",
        "data": "digits",
        "num_images": 128,
        "num_gradient_images": 64,
        "gradients_from": "own answers",
        "layers": [
            layer("stem", 100),
            layer("_body", 300, input_zeros=0.4, macs_zero=0.42, gradient_zeros=0.75),
        ],
        "unreached": [],
        "macs_zero": 0.315,
        "potential_speedup": 1 / 0.685,
        "obtained": {
            "real": timing(20.0),
            "dense": timing(20.2),
            "zeros_real": 0.3,
            "zeros_dense": 0.0,
            "speedup": 1.01,
        },
        "pruned": [],
        "seconds": 3.0,
    }


@pytest.fixture
def pruned(answer):
    held = {"difference_pt": -1.5, "low_pt": -2.0, "high_pt": -1.0}
    row = {"method": "top_k", "original_accuracy": 0.9, "num_samples": 10_000, "interval": held}
    rows = [{**row, "sparsity": s, "accuracy": a} for s, a in ((0.5, 0.885), (0.7, 0.7))]
    return {**answer, "pruned": rows}


def test_the_sentence_says_what_is_possible_and_what_is_obtained(answer):
    said = conclusion(answer)
    assert said.startswith("32 % of all multiplications have a factor of zero")
    assert "would make the network 1.46 times as fast" in said
    assert "20.0 ms for 64 real images and 20.2 ms with 0 % zeros in place of 30 %" in said
    assert said.endswith("nothing of it is obtained (1.01 times).")
    answer["obtained"]["speedup"] = 1.31
    assert conclusion(answer).endswith(": 1.31 times as fast is obtained.")


def test_the_price_of_pruned_activations_is_told(pruned):
    assert conclusion(pruned).endswith(
        "With 50 and 70 % of each layer's inputs set to zero the accuracy is 88.50 and 70.00 %, of "
        "90.00 % (n = 10,000)."
    )


def test_a_mark_lies_where_its_share_is(answer):
    svg = activity_svg(answer)
    root = ElementTree.fromstring(svg)
    said = ["".join(t.itertext()).strip("\u200b") for t in root.iter(SVG + "text")]
    assert {"stem", "_body", "share, %", "zero gradients", "0", "100"} <= set(said)
    rows = {}
    for mark in root.iter(SVG + "use"):
        rows.setdefault(float(mark.get("y")), set()).add(float(mark.get("x")))
    # The axis below has 6 ticks; the legend lies above.
    _, own = max((y, sorted(xs)) for y, xs in rows.items() if 3 <= len(xs) <= 4)
    shares = [0.4, 0.42, 0.75]
    places = own[-3:]
    scale = (places[2] - places[0]) / (shares[2] - shares[0])
    assert places[1] - places[0] == pytest.approx(scale * 0.02, rel=0.05)
    assert root.get("role") == "img"
    assert activity_svg(answer) == svg


def test_the_page_holds_figure_tables_and_conclusion(answer, pruned):
    for made, tables in ((answer, 1), (pruned, 2)):
        page = activity_page(made)
        assert "Content-Security-Policy" in page
        assert not re.findall(r"https?://|<script|@import", page)
        assert page.count("<svg") == 1
        assert page.count("<table>") == tables
        plain = html.unescape(re.sub(r"<[^>]+>", "", page)).replace("\u00a0", " ")
        assert conclusion(made) in plain
        for cell in ("75.0", "42.0", "12.5"):
            assert f">{cell}</td>" in page
    assert "−1.50, −2.00 to −1.00" in activity_page(pruned)
    answer["unreached"] = ["attention"]
    assert "so not counted: attention" in activity_page(answer)


def test_a_hostile_name_stays_text(answer):
    hostile = copy.deepcopy(answer)
    hostile["model"] = hostile["data"] = hostile["layers"][0]["layer"] = HOSTILE
    hostile["unreached"] = [HOSTILE]
    for made in (activity_page(hostile), activity_svg(hostile)):
        assert "<script" not in made
        assert "\u202e" not in made
    ElementTree.fromstring(activity_svg(hostile))
