"""The look of the page, in light and dark: everything that is a colour is one of these variables."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --text: #1d2129; --quiet: #646b78; --rule: #e2e5ea; --panel: #f7f8fa; --alarm: #b3261e;
  --host: #1f5fbf; --device: #b4530a; --predicted: #7a2fb0; --letters: #fff;
  --p0: #3b6fb6; --p1: #c4622d; --p2: #3f8a55; --p3: #8a5aa8; --p4: #b08a1e; --p5: #2f8c96; --p6: #b5486f;
  --p7: #6c7482;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --text: #e4e7ec; --quiet: #98a1b0; --rule: #2c323c; --panel: #1b1f26; --alarm: #ff8a80;
    --host: #7fb2ff; --device: #ffab66; --predicted: #d59bff; --letters: #10131a;
    --p0: #7fa9e6; --p1: #ee9a6c; --p2: #7cc793; --p3: #c39be0; --p4: #dcbc5c; --p5: #6fc6d0; --p6: #ea8cae;
    --p7: #a4adbb;
  }
}
.phase-0 { --phase: var(--p0) } .phase-1 { --phase: var(--p1) } .phase-2 { --phase: var(--p2) }
.phase-3 { --phase: var(--p3) } .phase-4 { --phase: var(--p4) } .phase-5 { --phase: var(--p5) }
.phase-6 { --phase: var(--p6) } .phase-7 { --phase: var(--p7) }
body { background: var(--page); color: var(--text); font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1080px; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
h3 { font-size: .95rem; margin: 1rem 0 .25rem } p { margin: .25rem 0; max-width: 80ch; overflow-wrap: anywhere }
.quiet { color: var(--quiet) } .alarm { color: var(--alarm); font-weight: 600 }
.scroll { max-height: 26rem; overflow: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { border-bottom: 1px solid var(--rule); padding: .2rem .8rem .2rem 0; text-align: right }
th { color: var(--quiet); font-weight: 500 } th:first-child, td:first-child { text-align: left }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; margin: .5rem 0; padding: 0 }
.swatch { background: var(--phase); border-radius: 2px; display: inline-block; height: .7em; margin-right: .4em;
  width: .7em }
.ranks { display: grid; gap: .75rem; grid-template-columns: 1fr }
.many { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)) } .many > [open] { grid-column: 1 / -1 }
details { background: var(--panel); border-radius: 6px; min-width: 0; padding: .5rem .75rem }
summary { cursor: pointer; font-weight: 600 } summary .quiet { font-weight: 400 }
[open] > summary > svg { display: none }
svg { display: block; height: auto; margin-top: .5rem; width: 100% }
svg text { fill: var(--text); font: 11px system-ui, sans-serif } svg .title { fill: var(--quiet) }
svg .tick { fill: var(--quiet); font-size: 10px } svg .grid { stroke: var(--rule) }
.band { fill: var(--phase); opacity: .1 } .bar { fill: var(--phase) } g[class^=phase] text { fill: var(--letters) }
path { fill: none; stroke-linejoin: round; stroke-width: 1.6 } path.thin { opacity: .55; stroke-width: 1 }
path.host { stroke: var(--host) } path.device { stroke: var(--device) }
.predicted line { stroke: var(--predicted); stroke-dasharray: 6 4; stroke-width: 1.5 }
.predicted text { fill: var(--predicted) }
"""
