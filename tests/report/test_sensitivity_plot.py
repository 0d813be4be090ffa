"""Claims about the figure, the page and the sentence: they say what the JSON object says."""

import copy
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tersor.report.sensitivity import conclusion, sensitivity_page, sensitivity_svg, worst_layers
from tersor.report.svg import STAND_INS

BITS = (2, 4, 8)
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '"><script>alert(1)</script>\n*x*\u202e'


def layer(name, rank, harms, **more):
    return {
        "layer": name,
        "num_weights": 1000 * rank,
        "macs": 10,
        "macs_share": 0.2,
        "harm_kl_nats": dict(zip(map(str, BITS), harms, strict=True)),
        "harm_mse": {str(b): 0.5 / b for b in BITS},
        "harm_input_8bit_kl_nats": None,
        "rank": rank,
    } | more


@pytest.fixture
def answer():
    return {
        "model": "small_net",
        "data": "digits",
        "num_images": 64,
        "seconds": 3.4,
        "bits": list(BITS),
        "layers": [
            layer("stem", 2, (0.3, 0.01, 2e-5)),
            layer("body.0", 3, (0.1, 0.02, 1e-5)),
            layer("body.1", 5, (0.0, 0.0, 0.0)),
            layer("_body.2", 4, (0.05, 0.02, 4e-5)),
            layer("head", 1, (0.55, 0.015, 3e-6)),
        ],
    }


def texts(svg):
    return [
        "".join(t.itertext()).strip("\u200b")
        for t in ElementTree.fromstring(svg).iter(SVG + "text")
    ]


def test_conclusion_names_the_worst_layers_with_their_unit(answer):
    assert [la["layer"] for la in worst_layers(answer)] == ["head", "stem", "body.0"]
    assert conclusion(answer) == (
        "At 2 bits head, stem and body.0 hurt most: KL 0.55, 0.3 and 0.1 nats, "
        "95 % of the sum over all 5 layers. At 8 bits the worst is _body.2 with 4e-05 nats."
    )


def test_conclusion_of_few_layers_and_of_no_harm(answer):
    answer |= {"bits": [2], "layers": answer["layers"][:1]}
    assert conclusion(answer) == "At 2 bits stem hurts most: KL 0.3 nats."
    answer["layers"][0]["harm_kl_nats"]["2"] = 0.0
    assert conclusion(answer) == "At 2 bits no layer changes the outputs at all."


def test_figure_names_every_layer_and_every_number_of_bits(answer):
    said = texts(sensitivity_svg(answer))
    assert {"stem", "body.0", "body.1", "_body.2", "head"} <= set(said)
    assert {"2 bits", "4 bits", "8 bits"} <= set(said)
    assert "KL divergence, nats (logarithmic)" in said
    assert "input, 8 bits" not in said
    answer["layers"][0]["harm_input_8bit_kl_nats"] = 1e-4
    assert "input, 8 bits" in texts(sensitivity_svg(answer))


def marks(svg):
    """Places of the drawn marks."""
    tree = ElementTree.fromstring(svg)
    used = [u for u in tree.iter(SVG + "use") if u.get("style") and u.get("clip-path") is None]
    clipped = [u for g in tree.iter(SVG + "g") if g.get("clip-path") for u in g.iter(SVG + "use")]
    return used, clipped


def test_a_mark_lies_where_its_divergence_is_on_the_logarithmic_axis(answer):
    _, clipped = marks(sensitivity_svg(answer))
    places = sorted((float(u.get("y")), float(u.get("x"))) for u in clipped)
    harms = [h for la in answer["layers"] for h in sorted(la["harm_kl_nats"].values()) if h > 0]
    assert len(places) == len(harms)
    (y0, x0), (y1, x1) = places[0], places[2]
    assert y0 == y1
    scale = (x1 - x0) / (math.log10(harms[2]) - math.log10(harms[0]))
    for (_, x), harm in zip(places, harms, strict=True):
        assert x == pytest.approx(x0 + scale * math.log10(harm / harms[0]), abs=0.01)


def test_no_divergence_is_an_open_mark_and_said(answer):
    svg = sensitivity_svg(answer)
    assert "Open marks at the left edge" in svg
    answer["layers"][2] = layer("body.1", 5, (1e-3, 1e-4, 1e-6))
    assert "Open marks" not in sensitivity_svg(answer)


def test_figure_has_words_and_follows_the_page_in_light_and_dark(answer):
    svg = sensitivity_svg(answer)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert "small_net" in root.find(SVG + "title").text
    assert "64 calibration images" in root.find(SVG + "desc").text
    assert "prefers-color-scheme: dark" in svg
    assert not re.findall(r"https?://(?!www\.w3\.org)", svg)
    body = svg[svg.index("</style>") :]
    named = re.sub(r"var\([^)]*\)", "", body)
    assert not STAND_INS.search(named)
    assert sensitivity_svg(answer) == svg


def test_page_holds_figure_tables_and_conclusion(answer):
    page = sensitivity_page(answer)
    assert "Content-Security-Policy" in page
    assert not re.findall(r"https?://|<script|@import", page)
    assert page.count("<svg") == 1
    assert page.count("<table>") == 2
    plain = re.sub(r"<[^>]+>", "", page).replace("\u00a0", " ")
    assert conclusion(answer) in plain
    assert "head hurts most at 2 bits" in plain
    for said in ("0.55", "4e-05", "5,000", "0.25"):
        assert f">{said}</td>" in page
    assert "input, 8 bits" not in page
    answer["layers"][0]["harm_input_8bit_kl_nats"] = 1.25e-4
    page = sensitivity_page(answer)
    assert "input, 8 bits" in page
    assert ">0.000125</td>" in page


def test_a_hostile_name_stays_text(answer):
    hostile = copy.deepcopy(answer)
    hostile["model"] = hostile["data"] = hostile["layers"][0]["layer"] = HOSTILE
    for made in (sensitivity_page(hostile), sensitivity_svg(hostile)):
        assert "<script" not in made
        assert "\u202e" not in made
    ElementTree.fromstring(sensitivity_svg(hostile))


@pytest.mark.parametrize("harms", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1e-30, 1e-40, 0.0)])
def test_figure_of_extreme_harms_is_drawn(answer, harms):
    answer["layers"] = [layer("only", 1, harms)]
    assert "only" in texts(sensitivity_svg(answer))
