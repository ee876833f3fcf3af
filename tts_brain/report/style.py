"""The page's looks and its one script. No font, picture or script comes from elsewhere; the policy forbids it."""

CONTENT_POLICY = (
    "default-src 'none'; img-src data: blob:; media-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; font-src data:"
)

# Arm colours are Okabe and Ito's, darkened or lightened for contrast of at least 3 to 1 on the paper.
CSS = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2126; --muted: #59636e; --rule: #dde2e7; --card: #f5f7f9; --good: #17632f;
  --alarm: #b3261e; --alarm-card: #fdefee; --warn: #7a4d00;
  --arm0: #0072b2; --arm1: #c04a00; --arm2: #00795a; --arm3: #a3507f;
  --phase0: #eceef1; --phase1: #fdf0d0; --phase2: #dcecf9; --phase3: #daf1e0; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181c; --ink: #e7eaed; --muted: #a3adb8; --rule: #333b43; --card: #1d2329; --good: #7fd398;
  --alarm: #ff9088; --alarm-card: #35201f; --warn: #f0bd62;
  --arm0: #64b8f0; --arm1: #f39a4d; --arm2: #45c79c; --arm3: #dd94bf;
  --phase0: #23292f; --phase1: #38301a; --phase2: #1b3145; --phase3: #1b3625; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.muted, figcaption small, .note { color: var(--muted); font-size: .875rem; }
.intro { font-size: 1.05rem; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .9em; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--arm0); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: baseline; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; min-width: 9rem; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
th small { display: block; font-weight: 400; color: var(--muted); }
td.best { font-weight: 700; color: var(--good); }
td .badge { display: block; font-size: .75rem; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: .75rem 0; padding: 0; list-style: none; }
.legend svg { vertical-align: middle; margin-right: .4rem; }
.panels { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.panels.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: .925rem; line-height: 1.35; margin-bottom: .25rem; }
figcaption small { display: block; font-weight: 400; }
.chart { min-height: 190px; } figure > .note { margin: 0; line-height: 1.4; }
.pictures { display: grid; gap: .5rem .75rem; align-items: start; padding-bottom: .5rem; }
.pictures > .rowhead { font-weight: 600; font-size: .925rem; position: sticky; left: 0; grid-column: 1 / -1;
  margin-top: .5rem; }
.pictures img { display: block; width: 100%; aspect-ratio: 3 / 2; image-rendering: pixelated; background: #000; }
.pictures figcaption { font-weight: 400; font-size: .8125rem; margin: .25rem 0 0; color: var(--muted); }
.pictures .none { aspect-ratio: 3 / 2; border: 1px dashed var(--rule); display: grid; place-items: center;
  text-align: center; color: var(--muted); font-size: .8125rem; padding: .5rem; }
.strip { display: flex; height: .75rem; background: var(--card); margin: .5rem 0; border: 1px solid var(--rule); }
.phase0 { background: var(--phase0); } .phase1 { background: var(--phase1); }
.phase2 { background: var(--phase2); } .phase3 { background: var(--phase3); }
.tag { display: inline-block; padding: 0 .5em; border-radius: .25em; font-size: .8125rem; color: var(--ink);
  border: 1px solid var(--rule); }
ol.story { list-style: none; padding: 0; margin: .75rem 0; }
ol.story > li { display: grid; grid-template-columns: 10.5rem minmax(0, 1fr); gap: 0 1.25rem; padding: .6rem .75rem;
  border-left: 3px solid var(--rule); border-bottom: 1px solid var(--rule); }
ol.story p { margin: 0; } ol.story .when { font-variant-numeric: tabular-nums; }
ol.story .when .tag { margin-top: .15rem; }
ol.story > li.accept { border-left-color: var(--good); } ol.story > li.undo { border-left-color: var(--warn); }
ol.story > li.hold { color: var(--muted); font-size: .925rem; padding-block: .35rem; }
ol.story > li.alarm { border-left: 6px solid var(--alarm); background: var(--alarm-card); }
li.alarm .verdict { color: var(--alarm); } li.undo .verdict { color: var(--warn); }
li.accept .verdict { color: var(--good); }
.verdict { font-weight: 650; } .verdict::first-letter { text-transform: uppercase; }
.moves { list-style: none; padding: 0; margin: .1rem 0; display: flex; flex-wrap: wrap; gap: 0 1.25rem; }
.moves li { font-variant-numeric: tabular-nums; }
details { margin: .3rem 0; } summary { cursor: pointer; color: var(--muted); font-size: .875rem; width: fit-content; }
.proposal { margin: .5rem 0 .5rem .25rem; padding-left: .75rem; border-left: 2px solid var(--rule);
  font-size: .925rem; }
.clips { display: grid; gap: .75rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
audio { display: block; width: 100%; margin-top: .25rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; margin: .5rem 0; }
dt { color: var(--muted); } dd { margin: 0; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: .875rem;
  color: var(--muted); }
@media (max-width: 640px) {
  main { padding: 1.5rem 1rem 2rem; }
  ol.story > li { grid-template-columns: minmax(0, 1fr); gap: .15rem; }
  ol.story .when { display: flex; flex-wrap: wrap; gap: .5rem; align-items: baseline; }
  th, td { padding: .4rem .5rem; } dl { grid-template-columns: minmax(0, 1fr); } dd { margin-bottom: .4rem; }
}
@media print { details > * { display: block; } .chart { break-inside: avoid; } }
"""

# Draws each chart from the JSON beside it and again when the reader's colour scheme changes.
SCRIPT = """
(function () {
  const coarse = matchMedia('(pointer: coarse)').matches;
  function paint(value, css) {
    if (typeof value === 'string') {
      const name = /^var\\((--[a-z0-9-]+)\\)$/.exec(value);
      return name ? css.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) { return typeof value[0] === 'number' ? value : value.map(v => paint(v, css)); }
    if (value && typeof value === 'object') {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, css)]));
    }
    return value;
  }
  function draw() {
    const css = getComputedStyle(document.documentElement);
    for (const place of document.querySelectorAll('.chart')) {
      try {
        const spec = paint(JSON.parse(place.nextElementSibling.textContent), css);
        spec.layout.dragmode = coarse ? false : 'zoom';
        Plotly.react(place, spec.data, spec.layout, { displayModeBar: false, responsive: true });
      } catch (error) { place.textContent = 'This chart could not be drawn: ' + error.message; }
    }
  }
  draw();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
})();
"""
