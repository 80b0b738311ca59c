"""The HTML frame of a report: one file without scripts or external resources, for phones too, light and dark."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #5b6675; --rule: #dfe3e9;
  --accent: #1f6feb; --good: #1a7f4b; --bad: #b3402a; --warn: #fff4dc; --warnink: #6b4a00;
  --c0: #1f6feb; --c1: #d9662b; --c2: #1a8f5c; --c3: #9b4fc9; --c4: #b8860b; --c5: #c23b6b; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #12161c; --card: #1a2029; --ink: #e6eaf0; --soft: #9aa5b4; --rule: #2e3743;
    --accent: #6ea8ff; --good: #58c98b; --bad: #ff8f73; --warn: #3a2f14; --warnink: #f3d690;
    --c0: #6ea8ff; --c1: #ff9d66; --c2: #58c98b; --c3: #c792ea; --c4: #e3b341; --c5: #f47fa5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 18px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 6px 0; }
.soft, .note { color: var(--soft); }
.note { font-size: 13px; max-width: min(80ch, 80vw); overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 18px; margin: 14px 0; }
.banner { background: var(--warn); color: var(--warnink); border-radius: 8px; padding: 9px 14px; margin: 14px 0; }
.verdict { font-size: 19px; line-height: 1.4; margin: 0 0 12px; }
.verdict b { font-size: 26px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 12px; align-items: center; }
.bars .bar { height: 14px; background: var(--rule); border-radius: 4px; overflow: hidden; }
.bars .bar i { display: block; height: 100%; background: var(--soft); opacity: .65; }
.bars .ours i { background: var(--accent); opacity: 1; }
.bars .name { overflow-wrap: anywhere; max-width: 34vw; }
.bars .value, td.value, th.value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 10px 18px;
  margin: 16px 0 0; }
.facts dt { color: var(--soft); font-size: 12.5px; } .facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.facts .wide { grid-column: span 2; }
.scroll { overflow-x: auto; }
.film { display: flex; gap: 10px; margin-top: 12px; }
.film figure { margin: 0; text-align: center; font-size: 12px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th.value { white-space: normal; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; border-bottom-width: 2px; }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
tr.group th { padding-top: 16px; } tr.group .note { font-weight: 400; }
td.ours { font-weight: 700; }
td.indent { padding-left: 22px; }
.settings td { padding: 3px 10px; }
.settings td:first-child { white-space: nowrap; color: var(--soft); }
.settings td { overflow-wrap: anywhere; }
.settings, pre, li { font-size: 12.5px; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
ul.card { padding-left: 36px; } li { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 14px; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 12px 6px;
  display: flex; flex-direction: column; justify-content: space-between; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; padding: 0 4px 6px;
  overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12.5px; color: var(--soft); }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 14px; margin-right: 5px; border-top: 3px solid; vertical-align: middle; }
.key.c0 { color: var(--c0); } .key.c1 { color: var(--c1); } .key.c2 { color: var(--c2); }
.key.c3 { color: var(--c3); } .key.c4 { color: var(--c4); } .key.c5 { color: var(--c5); }
.key.l0 { border-top: 2px dashed; } .key.l1 { border-top: 2px dotted; }
@media (max-width: 600px) { main { padding: 20px 10px 40px; } .card { padding: 12px; } th, td { padding: 5px 6px; }
  td.indent { padding-left: 6px; } }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .level { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 7 4; } svg .level.l1 { stroke-dasharray: 2 3; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.c0 { stroke: var(--c0); } polyline.c1 { stroke: var(--c1); } polyline.c2 { stroke: var(--c2); }
polyline.c3 { stroke: var(--c3); } polyline.c4 { stroke: var(--c4); } polyline.c5 { stroke: var(--c5); }
polyline.dashed { stroke-dasharray: 5 3; } .key.dashed { border-top-style: dashed; }
svg polygon { opacity: .16; } polygon.c0 { fill: var(--c0); } polygon.c1 { fill: var(--c1); } polygon.c2 { fill: var(--c2); }
polygon.c3 { fill: var(--c3); } polygon.c4 { fill: var(--c4); } polygon.c5 { fill: var(--c5); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); }
circle.c3 { fill: var(--c3); } circle.c4 { fill: var(--c4); } circle.c5 { fill: var(--c5); }
.picture img { max-width: 100%; max-height: 640px; border-radius: 6px; display: block; background: #fff; }
.picture.neighbors img { min-width: 560px; max-height: none; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")
