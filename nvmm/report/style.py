"""The report's style sheet: light and dark by the reader's setting."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #16181d; --quiet: #63666f; --rule: #e3e3de;
  --grid: #ecece8; --s0: #2a6fdb; --s1: #d9622b; --s2: #14866d; --s3: #8a55c7;
  --good: #127a4b; --bad: #c0352b; --track: #e4e9f2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131418; --card: #1c1e24; --ink: #eceef2; --quiet: #9ba0ab; --rule: #30333b;
    --grid: #292c34; --s0: #6ea4f7; --s1: #f08f5c; --s2: #4cc3a5; --s3: #b78df0;
    --good: #4cc48a; --bad: #f07a70; --track: #2a2f3a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 0 0 14px; letter-spacing: -0.005em; }
h3 { font-size: 14px; margin: 0 0 8px; font-weight: 600; }
p { margin: 0 0 14px; }
section { margin-top: 44px; }
.eyebrow { margin: 0 0 6px; color: var(--s0); font-size: 13px; font-weight: 600; }
.quiet { color: var(--quiet); }
.missing {
  color: var(--quiet); border: 1px dashed var(--rule); border-radius: 10px; padding: 14px 16px;
}
.stats {
  display: grid; gap: 12px; margin-top: 28px;
  grid-template-columns: repeat(auto-fit, minmax(220px, 1fr));
}
.stat, .card, .panel, table, details {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
}
.stat { padding: 14px 16px; }
.stat span { display: block; color: var(--quiet); font-size: 13px; }
.stat b { font-size: 23px; font-weight: 600; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); }
.panel { margin: 0; padding: 16px 18px 10px; position: relative; }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart .grid { stroke: var(--grid); }
.chart .axis { stroke: var(--rule); }
.chart .tick { fill: var(--quiet); font-size: 11px; font-variant-numeric: tabular-nums; }
.chart .label { fill: var(--quiet); font-size: 12px; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .raw { stroke-width: 1; opacity: 0.28; }
.chart .dot { stroke: var(--card); stroke-width: 1.5; }
.chart .hover rect { fill: transparent; }
.chart .hover .dot { opacity: 0; pointer-events: none; }
.chart .hover:hover .dot { opacity: 1; }
.line.s0 { stroke: var(--s0); } .dot.s0 { fill: var(--s0); }
.line.s1 { stroke: var(--s1); } .dot.s1 { fill: var(--s1); }
.line.s2 { stroke: var(--s2); } .dot.s2 { fill: var(--s2); }
.line.s3 { stroke: var(--s3); } .dot.s3 { fill: var(--s3); }
.legend { display: flex; gap: 16px; font-size: 13px; color: var(--quiet); margin-bottom: 4px; }
.key::before {
  content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 7px; vertical-align: middle; background: var(--s0);
}
.key.s1::before { background: var(--s1); }
.key.s2::before { background: var(--s2); }
.key.s3::before { background: var(--s3); }
.switch { position: absolute; top: 18px; right: 82px; margin: 0; accent-color: var(--s0); }
.switch + label { position: absolute; top: 13px; right: 18px; font-size: 13px; cursor: pointer; }
.logarithmic, .switch:checked ~ .linear { display: none; }
.switch:checked ~ .logarithmic { display: block; }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
.card { padding: 16px 18px 12px; border-top: 3px solid var(--good); display: flex;
  flex-direction: column; }
.card.wrong { border-top-color: var(--bad); }
.shown { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-end; margin-bottom: 12px; }
.shown img { display: block; image-rendering: pixelated; background: #000; }
.shown .image { width: 100%; max-height: 120px; object-fit: contain; border-radius: 6px; }
.shown figure { margin: 0; }
.shown .heard, .heard .spectrogram, .heard audio { width: 100%; }
.heard .spectrogram { height: 120px; border-radius: 6px; margin-bottom: 6px; }
.shown figcaption { font-size: 12px; color: var(--quiet); margin-top: 3px; }
.mosaic { display: grid; gap: 3px; width: max-content;
  grid-template-columns: repeat(var(--cols), max-content); }
.cell { position: relative; }
.cell em {
  position: absolute; top: 2px; left: 2px; padding: 0 4px; border-radius: 4px; font: 600 10px/14px
  system-ui, sans-serif; color: #fff; background: rgba(0, 0, 0, 0.6);
}
.shown .tile, .shown .thumbnail { width: 48px; height: 48px; border-radius: 3px; }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 14px; margin: 0 0 8px; }
.card dt { color: var(--quiet); }
.card dd { margin: 0; overflow-wrap: anywhere; }
.verdict { font-size: 13px; font-weight: 600; margin-left: 6px; white-space: nowrap; }
.right .verdict { color: var(--good); }
.wrong .verdict { color: var(--bad); }
.source { font-size: 12px; margin: auto 0 0; overflow-wrap: anywhere; }
table { border-collapse: separate; border-spacing: 0; width: 100%; overflow: hidden;
  margin-bottom: 16px; }
th, td { text-align: left; padding: 8px 16px; border-bottom: 1px solid var(--rule);
  font-weight: normal; vertical-align: top; overflow-wrap: anywhere; }
thead th { color: var(--quiet); font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.accuracy { max-width: 760px; }
.accuracy tbody tr:first-child { font-weight: 600; }
.accuracy tbody tr:first-child th { font-weight: 600; }
.bar { width: 50%; vertical-align: middle; }
.bar i { display: block; height: 10px; border-radius: 5px;
  background: linear-gradient(var(--s0) 0 0) 0 0 / var(--share) 100% no-repeat var(--track); }
.facts th { color: var(--quiet); width: 34%; }
.wide { overflow-x: auto; }
details { padding: 12px 16px; margin-bottom: 12px; }
details > summary { cursor: pointer; }
details[open] > summary { margin-bottom: 12px; }
details table { border: 0; border-radius: 0; }
pre { margin: 0 0 14px; padding: 12px 16px; overflow-x: auto; font-size: 13px; line-height: 1.5;
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
details pre { border: 0; padding: 0; margin: 0; }
@media (max-width: 520px) { .charts { grid-template-columns: 1fr; } main { padding: 24px 14px; } }
"""
