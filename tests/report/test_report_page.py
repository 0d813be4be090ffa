"""Claims about the files: well-formed, self-contained, safe, accessible, reproducible."""

import builtins
import itertools
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from tersor.errors import MissingExtraError, RunError
from tersor.report import markdown, text_tables, write_report
from tersor.report.figures import draw, file_name
from tersor.report.svg import SERIES, STAND_INS, theme

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
HOSTILE = '"><script>alert(1)</script>\n|`*_x_*`\u202e\x1b[31m&amp;'


class Walk(HTMLParser):
    """Checks what a browser would forgive."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.links = [], [], [], []
        self.tags, self.headings, self.texts, self.labels = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), (tag, attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for key in ("aria-labelledby", "aria-describedby", "for"):
            self.references += (attributes.get(key) or "").split()
        for key in ("src", "href", "action", "data", "poster", "srcset"):
            if key in attributes:
                self.links.append(attributes[key])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def study_page(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture
def written(study_rows, study_page):
    if not (study_page / "report.html").exists():
        write_report(study_rows, study_page)
    return study_page


def test_page_is_well_formed_and_self_contained(written):
    walk = Walk((written / "report.html").read_text())
    assert len(set(walk.ids)) == len(walk.ids)
    assert set(walk.references) <= set(walk.ids)
    assert walk.links
    assert all(link.startswith("#") and link[1:] in walk.ids for link in walk.links)
    assert walk.headings[0] == 1
    assert walk.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(walk.headings))
    assert not {"script", "iframe", "object", "embed", "link", "form"} & {t for t, _ in walk.tags}


def test_page_asks_nothing_of_the_network(written):
    text = (written / "report.html").read_text()
    assert not re.findall(r"https?://|//[a-z]+\.[a-z]+/|@import", text)
    assert "default-src 'none'" in text
    assert all("#" in found for found in re.findall(r"url\(([^)]*)\)", text))


def test_page_is_accessible(written):
    walk = Walk((written / "report.html").read_text())
    assert ("html", {"lang": "en"}) in walk.tags
    for tag, attributes in walk.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-labelledby"].split()[0].endswith("-title")
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            assert attributes["role"] == "region"
            assert attributes["aria-labelledby"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col", "colgroup")
    tags = [tag for tag, _ in walk.tags]
    assert tags.count("caption") == tags.count("table")
    assert tags.count("title") == 1 + tags.count("svg")
    links = [attributes["href"] for tag, attributes in walk.tags if tag == "a"]
    assert links[0] == "#main"


def test_figures_take_the_colours_of_the_page(written):
    text = (written / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        left = re.sub(r"var\([^)]*\)", "", svg)
        assert "currentColor" in svg
        assert not STAND_INS.findall(left)
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", left), "a colour that no theme can change"
        assert "<style" not in svg


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_graphics_contrast_by_three_to_one_in_both_themes(dark):
    colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", theme(dark=dark)))
    ground = luminance(colors["figure-ground"])
    for name in ["figure-quiet", *(f"series-{i}" for i in range(1, len(SERIES) + 1))]:
        high, low = sorted((ground, luminance(colors[name])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, name  # WCAG 2.2, 1.4.11


def test_figures_are_xml_with_a_title(written):
    files = sorted((written / "figures").glob("*.svg"))
    assert len(files) == 14
    for path in files:
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert root.find("{http://www.w3.org/2000/svg}title").text
        assert "prefers-color-scheme" in path.read_text()
    linked = re.findall(r"\]\(figures/([^)]+)\)", (written / "tables.md").read_text())
    assert sorted(linked) == [path.name for path in files]


def test_same_rows_same_bytes(demo_rows, tmp_path):
    write_report(demo_rows, tmp_path / "a")
    write_report(demo_rows, tmp_path / "b")
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "tables.md").read_text() == markdown(demo_rows)
    assert (tmp_path / "a" / "tables.txt").read_text() == text_tables(demo_rows)


@pytest.mark.parametrize(
    "key", ["model", "data", "variant", "engine", "scope", "cpu", "recipe", "layer"]
)
def test_hostile_text_stays_text(demo_rows, tmp_path, key):
    demo_rows.append({**demo_rows[0], "kind": "training", "recipe": {"note": "x"}})
    for row in demo_rows:
        if key == "recipe" and "recipe" in row:
            row["recipe"] = {HOSTILE: HOSTILE}
        elif key == "layer" and "layers" in row:
            row["layers"][0]["layer"] = row["layers"][1]["reason"] = HOSTILE
        elif key in row:
            row[key] = HOSTILE
        row["sparsity"] = 0.5 if key == "scope" else row.get("sparsity", 0)
    page = write_report(demo_rows, tmp_path).read_text()
    walk = Walk(page)
    assert "script" not in [tag for tag, _ in walk.tags]
    assert any("<script>alert(1)</script>" in text for text in walk.texts)
    for text in (page, (tmp_path / "tables.txt").read_text(), (tmp_path / "tables.md").read_text()):
        assert "\x1b" not in text
        assert "\u202e" not in text
    rest = (tmp_path / "tables.md").read_text()
    assert "<script" not in rest
    tables = [line for line in rest.splitlines() if line.startswith("|")]
    for head, rule in itertools.pairwise(tables):
        if rule.startswith(("|--", "|:--")):
            assert len(re.findall(r"(?<!\\)\|", head)) == rule.count("|")
    assert all(p.parent == tmp_path / "figures" for p in tmp_path.rglob("*.svg"))


def test_a_model_named_like_a_path_writes_inside_the_folder(demo_rows, tmp_path):
    for row in demo_rows:
        row["model"] = "../../../outside/net.py:build"
    write_report(demo_rows, tmp_path / "in" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert len(list((tmp_path / "in" / "out" / "figures").iterdir())) == 3


def test_missing_cells_are_said_in_the_page(demo_rows, tmp_path):
    page = write_report(demo_rows, tmp_path).read_text()
    assert 'class="right missing">not measured<' in page


def test_an_unwritable_folder_is_one_clear_error(demo_rows, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="choose another folder"):
        write_report(demo_rows, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_broken_rows_write_nothing(demo_rows, tmp_path):
    demo_rows[0]["accuracy"] = 2
    with pytest.raises(RunError):
        write_report(demo_rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_only_figures_are_missed(demo_rows, tmp_path, monkeypatch):
    load = builtins.__import__

    def refuse(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert text_tables(demo_rows)
    assert markdown(demo_rows)
    with pytest.raises(MissingExtraError, match=r"pip install 'tersor\[report\]'"):
        write_report(demo_rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_users_matplotlib_settings_change_nothing(demo_rows):
    import matplotlib

    from tersor.report.compose import compose

    plot = compose(demo_rows).sections[0].plots[0]
    before = draw(plot)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "lines.linewidth": 9}):
        assert draw(plot) == before
        assert matplotlib.rcParams["font.size"] == 30
    assert file_name(plot) == "size-digits_net-0.svg"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [390, 1200])
def test_chromium_draws_the_page_within_its_width(written, tmp_path, width, scheme):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed; the page is checked by the parser only")
    shutil.copy(written / "report.html", tmp_path)
    # A frame has the width asked for; a window is never narrower than the browser's least.
    frame = tmp_path / "frame.html"
    measure = (
        "const d=f.contentDocument.documentElement;document.title=d.scrollWidth+' '+d.clientWidth"
    )
    frame.write_text(
        f'<iframe id="f" src="report.html" style="border:0;width:{width}px;height:900px"></iframe>'
        f"<script>onload=()=>{{const f=document.getElementById('f');{measure}}}</script>"
    )
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width + 40},1000",
    ]  # fmt: skip
    dumped = subprocess.run(
        [*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r"<title>(\d+) (\d+)</title>", dumped.stdout)
    assert found, dumped.stderr[-2000:]
    assert int(found[1]) <= int(found[2]), "the page scrolls sideways"
    picture = tmp_path / "page.png"
    page = (tmp_path / "report.html").as_uri()
    subprocess.run([*command, f"--screenshot={picture}", page], capture_output=True, timeout=120)
    from PIL import Image

    with Image.open(picture) as image:
        corner = image.convert("L").getpixel((3, 3))
        assert (corner < 60) == (scheme == 0)
        assert len(image.convert("L").resize((64, 64)).getcolors()) > 20
