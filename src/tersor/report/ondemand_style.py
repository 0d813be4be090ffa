"""What the page of an answer needs beyond the house's style sheet."""

from __future__ import annotations

ONDEMAND_STYLE = """
:root { --tint: color-mix(in srgb, var(--series-1) 22%, var(--ground)); }
h3 { font-size: 1.02rem; font-weight: 600; margin: 2rem 0 0.7rem; overflow-wrap: anywhere; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.missed .card { border-top-color: var(--bad); }
.missed .card h2 { color: var(--bad); }
.card dl { gap: 1rem 2.6rem; }
.card div { max-width: 21rem; justify-content: flex-end; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.pair > * { min-width: 0; max-width: 100%; }
.pair .note { max-width: 28rem; }
.pair th, .pair td { padding-inline: 0.5rem; }
@media (min-width: 62rem) {
  .cards .card { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0 2.5rem; }
  .card h2, .card dl { grid-column: 1 / -1; }
}
.notes { max-width: 75ch; margin: 0 0 1.2rem; padding: 0.8rem 1rem 0.8rem 2.2rem;
  background: var(--panel); border-left: 3px solid var(--accent); overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 0.35rem 1.5rem; margin: 0.8rem 0 1rem; padding: 0;
  list-style: none; font-size: 0.875rem; color: var(--quiet); }
.legend li { display: flex; align-items: center; gap: 0.5rem; }
.legend i { display: inline-block; width: 1.1rem; height: 0.75rem; }
.legend i.inside { background: var(--tint); border: 1px dashed var(--accent); }
.legend i.before { background: var(--shade); border-bottom: 1px solid var(--quiet); }
.legend i.after { border-top: 2px solid var(--series-1); height: 0; }
.legend i.compute, .track .compute { background: var(--series-1); }
.legend i.memory, .track .memory { background: repeating-linear-gradient(135deg,
  var(--series-2) 0 4px, color-mix(in srgb, var(--series-2) 55%, var(--ground)) 4px 7px); }

.mark { width: 16px; height: 16px; flex: none; stroke-width: 1.5; overflow: visible; }
.mark.answer { fill: var(--series-2); stroke: var(--ground); }
.mark.measured { fill: var(--series-1); stroke: var(--ground); }
.mark.predicted { fill: var(--ground); stroke: var(--series-1); }
.mark.original { fill: var(--ground); stroke: var(--ink); }
.front { max-width: 38rem; }
.front figcaption { margin: 0 0 0.6rem; min-height: 3.4rem; }
.plot { position: relative; border: 0; margin: 0; padding: 2.6rem 0.9rem 7.4rem 3rem; min-width: 0; }
.plot .y-title { position: absolute; left: 0; top: 0; }
.plot .x-title { position: absolute; left: 3rem; right: 0.9rem; bottom: 4.15rem; text-align: center; }
.plot .y-title, .plot .x-title { font-size: 0.8125rem; color: var(--quiet); }
.area { position: relative; height: 19rem; }
.area > svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.area text { font-size: 0.78rem; fill: var(--quiet); font-variant-numeric: tabular-nums; }
.area text.y, .area text.end { text-anchor: end; }
.area text.x { text-anchor: middle; }
.area text.bound { fill: var(--accent); font-weight: 600; paint-order: stroke; stroke: var(--ground);
  stroke-width: 4px; }
.area .grid { stroke: var(--rule); stroke-width: 1; }
.area line.bound { stroke: var(--accent); stroke-width: 1.5; stroke-dasharray: 5 4; }
.area rect.inside { fill: var(--tint); opacity: 0.55; }
.area input { position: absolute; width: 24px; height: 24px; margin: -12px 0 0 -12px; opacity: 0;
  cursor: pointer; z-index: 3; }
.area .at { position: absolute; width: 24px; height: 24px; margin: -12px 0 0 -12px; display: grid;
  place-items: center; border-radius: 50%; pointer-events: none; }
.area .measured .at { z-index: 1; }
.area .answer .at { z-index: 2; }
.area .answer input { z-index: 4; }
.area label:hover .at { background: var(--tint); }
.area input:checked + .at { box-shadow: 0 0 0 2px var(--ink); }
.area input:focus-visible + .at { outline: 3px solid var(--accent); outline-offset: 2px; }
.area .tip { position: absolute; left: -2.6rem; right: 0; top: calc(100% + 3.2rem); visibility: hidden;
  font-size: 0.84rem; line-height: 1.4; padding: 0.45rem 0.7rem; background: var(--panel);
  border-left: 3px solid var(--accent); min-height: 4rem; }
.area input:checked ~ .tip { visibility: visible; }
.area:has(label:hover) .tip { visibility: hidden; }
.area label:hover .tip { visibility: visible; z-index: 5; }

.layers { width: 100%; }
.layers table { width: 100%; }
.layers td { min-width: 6.6rem; padding: 0.42rem 1rem 0.6rem 0; white-space: nowrap;
  background: linear-gradient(var(--series-1), var(--series-1)) no-repeat left bottom 0.22rem /
    calc((100% - 1rem) * var(--share, 0%) / 100%) 4px; }
.layers thead th { min-width: 6.6rem; padding-left: 0; }
.layers tbody th { padding-right: 1.4rem; white-space: nowrap; max-width: 16rem; overflow: hidden;
  text-overflow: ellipsis; }
.layers.tall { max-height: 46rem; overflow-y: auto; }
.layers.tall thead th { position: sticky; top: 0; background: var(--ground); z-index: 1; }

.spreads { display: grid; gap: 1.6rem 2.2rem; margin-block: 1rem 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.spread { display: grid; grid-template-columns: 1fr 1fr; gap: 0.3rem 1.2rem; }
.spread figcaption { grid-column: 1 / -1; margin: 0; color: var(--ink); font-weight: 600;
  overflow-wrap: anywhere; }
.chart { min-width: 0; }
.chart .what { font-size: 0.78rem; color: var(--quiet); }
.chart svg { height: 4.6rem; border-bottom: 1px solid var(--quiet); }
.chart path { vector-effect: non-scaling-stroke; }
.chart path.before { fill: var(--shade); stroke: none; }
.chart path.after { fill: none; stroke: var(--series-1); stroke-width: 1.5px; }
.chart .ends { display: flex; justify-content: space-between; font-size: 0.74rem;
  color: var(--quiet); font-variant-numeric: tabular-nums; }

ul.changed { display: grid; gap: 1rem 1.6rem; margin: 0 0 1.4rem; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); }
.changed li { display: flex; gap: 0.9rem; align-items: center; min-width: 0; }
.changed li > div { min-width: 0; display: grid; font-size: 0.875rem; line-height: 1.45;
  overflow-wrap: anywhere; }
.thumb { width: 72px; height: 72px; flex: none; object-fit: contain; background: var(--panel);
  border: 1px solid var(--rule); image-rendering: pixelated; }
span.thumb { display: none; }
.when { display: inline-block; min-width: 3.2rem; color: var(--quiet); }
.truth { color: var(--quiet); }

.energy { max-width: 48rem; margin-bottom: 1rem; }
.stack { display: grid; gap: 0.55rem; margin-top: 0.6rem; }
.bar { display: grid; grid-template-columns: 4.2rem minmax(0, 1fr) 5rem; gap: 0.7rem; align-items: center;
  font-size: 0.9rem; }
.track { display: flex; height: 1.5rem; background: var(--panel); }
.track span { min-width: 1px; }
.bar .value { font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (max-width: 40rem) {
  .plot { padding-left: 2.2rem; padding-right: 0.4rem; padding-bottom: 8.4rem; }
  .plot .x-title { left: 2.2rem; right: 0.4rem; bottom: 5.1rem; }
  .area { height: 16rem; }
  .area .tip { left: -2.2rem; min-height: 5.2rem; }
  .front figcaption { min-height: 0; }
  tbody th, tbody th.short { min-width: 8.4rem; }
  .layers tbody th { white-space: normal; overflow: visible; }
}
@media print {
  .layers.tall { max-height: none; }
}
"""
