"""The page's style sheet: system fonts, two themes, no colour that carries a meaning alone."""

from __future__ import annotations

from tersor.report.svg import theme

LIGHT = (
    "--ground: #ffffff; --panel: #f6f7f9; --ink: #16191d; --quiet: #5c636e; --rule: #d9dce1; "
    "--shade: #e3e6ea; --accent: #0b5cad; --good: #0a6b4a; --bad: #b3400a; " + theme(dark=False)
)
DARK = (
    "--ground: #14171c; --panel: #1c2027; --ink: #e8eaed; --quiet: #a3aab4; --rule: #3a4049; "
    "--shade: #333a44; --accent: #7cc0ff; --good: #4fd3a6; --bad: #ff9a66; " + theme(dark=True)
)

STYLE = (
    f":root {{ color-scheme: light dark; {LIGHT} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}\n"
    """
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; padding: 0 clamp(1rem, 4vw, 3rem); background: var(--ground); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
header, main, footer { max-width: 80rem; margin-inline: auto; }
main:focus { outline: none; }
header { padding-top: clamp(2rem, 6vw, 4.5rem); }
h1, h2 {
  font-family: "Iowan Old Style", "Palatino Linotype", Palatino, "URW Palladio L", P052,
    "Book Antiqua", Georgia, serif;
  font-weight: 600; line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere;
}
h1 { font-size: clamp(1.7rem, 1.1rem + 2.4vw, 2.9rem); letter-spacing: -0.012em;
  margin: 0 0 1.6rem; }
main > section > h2 { font-size: 1.6rem; margin: 0 0 0.6rem; scroll-margin-top: 1.5rem; }
main > section { margin-block: 3.5rem; }
p { max-width: 68ch; margin: 0 0 1rem; overflow-wrap: anywhere; }
a { color: var(--accent); text-underline-offset: 0.18em; text-decoration-thickness: 1px; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 3px; border-radius: 2px; }
.skip { position: absolute; left: 1rem; top: -4rem; padding: 0.6rem 1rem;
  background: var(--accent);
  color: var(--ground); z-index: 9; }
.skip:focus { top: 0.6rem; }
.eyebrow { margin: 0 0 0.5rem; color: var(--quiet); font-size: 0.875rem; letter-spacing: 0.02em; }
main > .cards { display: grid; gap: 1.25rem; margin-block: 0 1.75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.card { padding: 1.4rem 1.5rem 0.6rem; background: var(--panel);
  border-top: 3px solid var(--accent); }
.card h2 { margin: 0 0 0.8rem; font-size: 1.2rem; }
.card dl { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; margin: 0 0 1rem; }
.card div { display: flex; flex-direction: column-reverse; }
.card dt { color: var(--quiet); font-size: 0.84rem; line-height: 1.3; }
.card dd { margin: 0; font-size: 1.9rem; line-height: 1.15; font-weight: 600;
  letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.conditions, .note, figcaption, footer { color: var(--quiet); font-size: 0.875rem;
  line-height: 1.55; }
.conditions { max-width: 90ch; }
.intro { color: var(--quiet); }
.note { max-width: 90ch; }
.card p { font-size: 0.95rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.35rem 1.4rem; margin: 1.25rem 0 0;
  padding: 0.9rem 0;
  list-style: none; border-block: 1px solid var(--rule); font-size: 0.92rem; }
.figures { display: grid; gap: 1.75rem 2.5rem; margin-block: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.figures.lines { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 36rem; }
.bars figure { max-width: 27rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: 0.5rem; }
figcaption b { display: block; color: var(--ink); font-weight: 600; }
.scroll { overflow-x: auto; margin-block: 1.75rem 0.6rem; max-width: 100%; width: fit-content;
  background-image: linear-gradient(to left, var(--ground) 1.2rem, transparent),
    linear-gradient(to left, var(--shade), transparent);
  background-position: right, right 2px top 0; background-size: 2.6rem 100%, 0.7rem 100%;
  background-repeat: no-repeat; background-attachment: local, scroll; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.4;
  font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; font-weight: 600; font-size: 0.95rem; padding: 0 0 0.55rem; }
caption span { display: inline-block; position: sticky; left: 0;
  max-width: calc(100vw - 2.4rem); }
th, td { padding: 0.42rem 0.65rem; text-align: left; vertical-align: baseline; max-width: 30rem; }
td.right, th.right { text-align: right; white-space: nowrap; }
thead th { font-weight: 500; color: var(--quiet); font-size: 0.82rem; vertical-align: bottom; }
thead th.right { white-space: normal; min-width: 5.2rem; }
thead th.short, td.short, th.short { white-space: nowrap; }
thead tr:first-child th { border-top: 2px solid var(--ink); }
thead tr:last-child th, thead th[rowspan] { border-bottom: 1px solid var(--ink); }
thead th.group { min-width: 8.5rem; color: var(--ink); border-bottom: 1px solid var(--rule); }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--ground); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
tbody tr:last-child > * { border-bottom: 2px solid var(--ink); }
th:first-child, td:first-child { padding-left: 0.15rem; }
td.first, thead th.first, thead th.group { padding-left: 1.4rem; }
.missing { color: var(--quiet); font-style: italic; }
.verdict-met { color: var(--good); font-weight: 600; white-space: nowrap; }
.verdict-missed { color: var(--bad); font-weight: 600; white-space: nowrap; }
.verdict-not-measured { white-space: nowrap; }
details { margin-block: 0.8rem; border-bottom: 1px solid var(--rule); padding-bottom: 0.7rem; }
summary { cursor: pointer; font-weight: 500; font-size: 0.95rem; overflow-wrap: anywhere; }
details caption { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }
footer { padding-block: 1.5rem 3rem; border-top: 1px solid var(--rule); }
@media (max-width: 40rem) {
  tbody th, tbody th.short { max-width: 9.5rem; min-width: 7rem; white-space: normal; overflow-wrap: anywhere;
  box-shadow: 1px 0 0 var(--rule); }
  th, td { padding-inline: 0.6rem; }
  main > section { margin-block: 2.75rem; }
}
@media print {
  :root { color-scheme: light; }
  nav, .skip { display: none; }
  .scroll { overflow: visible; }
  figure, tr { break-inside: avoid; }
}
"""
)
