"""matplotlib's SVG made fit for a page: its colours become the page's, its ids the figure's own."""

from __future__ import annotations

import html
import re

from tersor.report.words import clean

# Colours that matplotlib is given as stand-ins. On the page they are variables, so that both
# themes are legible.
INK, QUIET, RULE, GROUND = "#111213", "#616263", "#d1d2d3", "#fdfefc"
# Okabe and Ito 2008, the colours most people tell apart: blue, vermilion, green, purple, orange,
# sky.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#a8527f", "#b97f00", "#3a8fc4")
DARK_SERIES = ("#5cb3ea", "#ff8a4c", "#2fc99b", "#e69cc3", "#f0b840", "#9ad0f5")

VARIABLES = {
    INK: "currentColor",
    QUIET: "var(--figure-quiet, #616263)",
    RULE: "var(--figure-rule, #d1d2d3)",
    GROUND: "var(--figure-ground, #ffffff)",
    **{color: f"var(--series-{i}, {color})" for i, color in enumerate(SERIES, 1)},
}
STAND_INS = re.compile("|".join(VARIABLES), re.IGNORECASE)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def theme(*, dark: bool) -> str:
    """The figures' variables as CSS declarations."""
    quiet, rule, ground = (
        ("#a3aab4", "#3a4049", "#14171c") if dark else ("#5c636e", "#d9dce1", "#ffffff")
    )
    series = DARK_SERIES if dark else SERIES
    pairs = {"figure-quiet": quiet, "figure-rule": rule, "figure-ground": ground}
    pairs |= {f"series-{i}": color for i, color in enumerate(series, 1)}
    return " ".join(f"--{name}: {value};" for name, value in pairs.items())


STANDALONE = (
    "<style>svg { color: #16191d; "
    + theme(dark=False)
    + " } @media (prefers-color-scheme: dark) { svg { color: #e8eaed; "
    + theme(dark=True)
    + " } }</style>"
)


def finished(svg: str, key: str, title: str, description: str) -> str:
    """One SVG document with title and description, currentColor for its ink, and ids that begin
    with `key`."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # matplotlib's rule for all elements would reach the whole page; the root's attributes are
    # inherited.
    svg = re.sub(r"<style type=.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    # Inside tags only: a label may say what it likes.
    svg = re.sub(r"<[^>]+>", lambda match: _tag(match[0], key), svg)
    end = svg.index(">")
    root = re.sub(r' (?:width|height|xmlns:xlink|version)="[^"]*"', "", svg[:end])
    root += f' role="img" aria-labelledby="{key}-title {key}-desc" stroke-linejoin="round"'
    root += f' stroke-linecap="butt" font-family="{FONT}">'
    words = (
        f'<title id="{key}-title">{html.escape(clean(title))}</title>'
        f'<desc id="{key}-desc">{html.escape(clean(description))}</desc>'
    )
    return root + words + STANDALONE + svg[end + 1 :].strip() + "\n"


def _tag(tag: str, key: str) -> str:
    tag = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", tag)
    tag = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{key}-\1"', tag)
    tag = re.sub(r" font-family: [^;\"]+;", "", tag)
    return STAND_INS.sub(lambda match: VARIABLES[match[0].lower()], tag)


def inline(svg: str) -> str:
    """The same figure for the inside of a page, whose style sheet sets the colours."""
    return svg.replace(STANDALONE, "").replace(' xmlns="http://www.w3.org/2000/svg"', "").strip()
