"""How `report.html` looks, and the few lines of script that show figures under the pointer."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f8f6; --panel: #ffffff; --ink: #1b2427; --soft: #5a686d; --rule: #dde3e2; --grid: #e9edec;
  --computing: #1b7f8f; --sending: #e2a52e; --waiting: #c6d0d2; --syncing: #8b6bb1; --excluded: #c6432e;
  --gone: #8a979b; --training: #1b7f8f; --heldout: #b4441f; --baseline: #6b787c; --good: #18794e; --bad: #b3261e;
  --goodwash: #e6f4ec; --badwash: #fbe9e7; --ready: #5b7d24; --hatch: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10171a; --panel: #172023; --ink: #e5ecec; --soft: #97a7ac; --rule: #2a363a; --grid: #222d31;
    --computing: #3aa4b4; --sending: #e5b354; --waiting: #43535a; --syncing: #ab8fd0; --excluded: #e2634c;
    --gone: #75858b; --training: #4cb7c6; --heldout: #f08a5d; --baseline: #8b9a9f; --good: #5cc28d; --bad: #f0857a;
    --goodwash: #14302a; --badwash: #3a1f1d; --ready: #a3c766; --hatch: #10171a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Liberation Sans", Arial, sans-serif; font-variant-numeric: tabular-nums;
}
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0.1rem 0 0.35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; letter-spacing: -0.005em; margin: 0 0 0.2rem; }
h3 { font-size: 0.95rem; margin: 1.2rem 0 0.4rem; }
p { margin: 0.3rem 0; text-wrap: pretty; }
.over { color: var(--computing); font-weight: 600; font-size: 0.85rem; letter-spacing: 0.04em; margin: 0; }
.soft { color: var(--soft); }
.small { font-size: 0.875rem; }
code, pre, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.875em; }
.verdict { display: flex; gap: 0.75rem; align-items: flex-start; border-radius: 10px; padding: 0.8rem 1rem;
  margin: 1.4rem 0 0; }
.verdict strong { display: block; }
.verdict.good { background: var(--goodwash); } .verdict.bad { background: var(--badwash); }
.verdict svg { flex: none; width: 1.5rem; height: 1.5rem; margin-top: 0.05rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.75rem;
  margin: 1rem 0 0; padding: 0; }
.tiles > div { background: var(--panel); border: 1px solid var(--rule); border-radius: 10px; padding: 0.8rem 1rem; }
.tiles dt { color: var(--soft); font-size: 0.85rem; }
.tiles dd { margin: 0; }
.tiles dd.figure { font-size: 1.45rem; line-height: 1.3; font-weight: 600; letter-spacing: -0.025em;
  white-space: nowrap; }
section { background: var(--panel); border: 1px solid var(--rule); border-radius: 10px; padding: 1.2rem 1.3rem 1.3rem;
  margin: 1rem 0 0; }
figure { margin: 0.9rem 0 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; margin: 0.7rem 0 0; padding: 0; list-style: none;
  font-size: 0.85rem; color: var(--soft); }
.legend li { display: flex; align-items: center; gap: 0.4rem; }
.legend svg { flex: none; }
svg text { fill: var(--soft); font: inherit; }
.plot { position: relative; height: 20rem; margin: 1.1rem 0.4rem 2.2rem 3rem; }
.plot > svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot .y, .plot .x, .plot .note { position: absolute; font-size: 0.8rem; line-height: 1; color: var(--soft);
  white-space: nowrap; }
.plot .y { right: calc(100% + 0.5rem); transform: translateY(-50%); }
.plot .x { top: calc(100% + 0.5rem); transform: translateX(-50%); }
.plot .note { right: 0.2rem; transform: translateY(-135%); background: var(--panel); padding: 0.1rem 0.2rem; }
.plot .unit { position: absolute; top: calc(100% + 1.5rem); right: 0; font-size: 0.8rem; color: var(--soft);
  line-height: 1; }
.grid { stroke: var(--grid); } .axis { stroke: var(--rule); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.training { stroke: var(--training); }
.heldout { stroke: var(--heldout); stroke-width: 1.2; }
.dot { fill: var(--panel); stroke: var(--heldout); stroke-width: 2; }
.unigram, .untrained { stroke: var(--baseline); stroke-width: 1.5; }
.unigram { stroke-dasharray: 7 4; } .untrained { stroke-dasharray: 1.5 4; stroke-linecap: round; }
#cursor { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
.lanes { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(0, 1fr) max-content;
  gap: 0.45rem 0.9rem; align-items: center; grid-auto-flow: row dense; }
.lanes > .name { grid-column: 1; } .lanes > .strip, .lanes > .times { grid-column: 2; }
.lanes > .share { grid-column: 3; }
.lanes .name { font-size: 0.9rem; font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  max-width: 11rem; }
.lanes .share { font-size: 0.85rem; color: var(--soft); text-align: right; white-space: nowrap; }
.lanes svg { display: block; width: 100%; height: 1.75rem; overflow: visible; }
svg rect { shape-rendering: crispEdges; }
.goneline { stroke: var(--gone); stroke-width: 3; stroke-dasharray: 3.5 2.5; }
.track { fill: var(--grid); }
.computing { fill: var(--computing); } .waiting { fill: var(--waiting); }
.sending { fill: url(#hatch-sending); } .syncing { fill: url(#hatch-syncing); }
.excluded { fill: url(#hatch-excluded); } .gone { fill: url(#hatch-gone); }
.markline { stroke: var(--ink); stroke-width: 1.5; }
.mark { stroke: var(--panel); stroke-width: 1.5; }
.mark.joined { fill: var(--ready); } .mark.died, .mark.excluded { fill: var(--bad); }
.mark.left, .mark.audit { fill: var(--soft); }
.times { position: relative; height: 1.3rem; }
.times span { position: absolute; transform: translateX(-50%); font-size: 0.8rem; color: var(--soft);
  white-space: nowrap; }
.times span:first-child { transform: none; }
.bars { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(0, 1fr) minmax(0, 1fr);
  gap: 0.35rem 1.2rem; align-items: center; font-size: 0.9rem; }
.bars .name { font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 11rem; }
.bars .head { color: var(--soft); font-size: 0.85rem; }
.bar { display: grid; grid-template-columns: minmax(0, 1fr) 5.4rem; gap: 0.6rem; align-items: center; }
.bar svg { display: block; width: 100%; height: 0.85rem; } .bar.thin svg { height: 0.45rem; }
.bar span { white-space: nowrap; line-height: 1.25; }
.bar.thin { font-size: 0.8rem; }
.sent { fill: var(--computing); } .received { fill: url(#hatch-received); }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; margin-top: 0.7rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 0.82rem; }
th, td { padding: 0.45rem 0.9rem 0.45rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
td .mono { color: var(--soft); }
.wide { overflow-wrap: anywhere; }
.status { display: inline-flex; align-items: center; gap: 0.35rem; white-space: nowrap; }
.status svg { width: 0.95rem; height: 0.95rem; flex: none; }
.status.good { color: var(--good); } .status.bad { color: var(--bad); } .status.plain { color: var(--soft); }
pre { background: var(--page); border: 1px solid var(--rule); border-radius: 8px; padding: 0.75rem 0.9rem;
  margin: 0.6rem 0 0; overflow-x: auto; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--soft); }
details { margin-top: 0.8rem; } summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 0 2rem; }
.settings dl { display: grid; grid-template-columns: 1fr max-content; gap: 0.1rem 1rem; margin: 0;
  font-size: 0.875rem; }
.settings dt { color: var(--soft); } .settings dd { margin: 0; text-align: right; }
footer { color: var(--soft); font-size: 0.85rem; margin-top: 1.5rem; }
#tip { position: fixed; z-index: 2; pointer-events: none; background: var(--ink); color: var(--page); padding: 0.35rem
  0.55rem; border-radius: 6px; font-size: 0.8rem; line-height: 1.35; max-width: 18rem; white-space: pre-line;
  visibility: hidden; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 40rem) {
  main { padding: 1.4rem 0.8rem 3rem; }
  h1 { font-size: 1.7rem; }
  section { padding: 1rem 0.9rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 0.5rem; }
  .tiles > div { padding: 0.6rem 0.75rem; } .tiles dd.figure { font-size: 1.3rem; }
  .plot { height: 15rem; margin-left: 2.3rem; }
  .minor { display: none; }
  .lanes { grid-template-columns: minmax(0, 1fr) max-content; gap: 0.1rem 0.6rem; }
  .lanes .name { max-width: none; } .lanes > .share { grid-column: 2; }
  .lanes > .strip, .lanes > .times { grid-column: 1 / -1; margin-bottom: 0.45rem; }
  .bars { grid-template-columns: 1fr; gap: 0.2rem; } .bars .head { display: none; }
  .bars .name { margin-top: 0.6rem; max-width: none; }
}
@media (max-width: 54rem) {
  .many, .many tbody, .many tr, .many td { display: block; } .many thead { display: none; }
  .many tr { border-bottom: 1px solid var(--rule); padding: 0.6rem 0; } .many tr:last-child { border-bottom: 0; }
  .many td, .many td.number { border: 0; padding: 0.05rem 0; text-align: left; white-space: normal; }
  .many td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); }
}
@media (max-width: 40rem) {
  table, tbody, tr, td { display: block; } thead { display: none; }
  tr { border-bottom: 1px solid var(--rule); padding: 0.6rem 0; } tr:last-child { border-bottom: 0; }
  td, td.number { border: 0; padding: 0.05rem 0; text-align: left; white-space: normal; }
  td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); }
}
@media print { section, .tiles > div { break-inside: avoid; } #tip { display: none; } }
"""

SCRIPT = """
(() => {
  const tip = document.getElementById("tip");
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.style.visibility = "visible";
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y - box.height - 12 < 4 ? y + 16 : y - box.height - 12) + "px";
  };
  const hide = () => { tip.style.visibility = "hidden"; };
  document.addEventListener("pointermove", (event) => {
    const over = event.target.closest && event.target.closest("[data-tip]");
    if (over) show(over.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest || !event.target.closest(".plot")) hide();
  });
  document.addEventListener("pointerleave", hide);
  const plot = document.querySelector(".plot");
  const source = document.getElementById("curve-points");
  if (!plot || !source) return;
  const points = JSON.parse(source.textContent);
  const cursor = document.getElementById("cursor");
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const at = 100 * (event.clientX - box.left) / box.width;
    let near = points[0];
    for (const point of points) if (Math.abs(point[0] - at) < Math.abs(near[0] - at)) near = point;
    if (!near) return;
    cursor.setAttribute("x1", near[0] + "%");
    cursor.setAttribute("x2", near[0] + "%");
    cursor.style.visibility = "visible";
    show(near[1], event.clientX, event.clientY);
  });
  plot.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; hide(); });
})();
"""
