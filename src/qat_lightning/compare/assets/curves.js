// Curves of the chosen configurations over each other, with the points of the schedule.

let curveKey = null;
const zoom = el("input", { type: "checkbox", on: { input: () => drawCurves() } });

function curveKeys() {
  return [...new Set(all.flatMap((c) => c.runs.flatMap((run) => Object.keys(run.curves))))].sort();
}

function buildCurves() {
  const keys = curveKeys();
  if (!keys.length) { byId("curves-card").hidden = true; return; }
  const last = data.metric.name.split("/").pop();
  curveKey = keys.find((key) => key === `val/${last}`) || keys.find((key) => key.startsWith("val") && key.endsWith(last)) || keys.find((key) => key.startsWith("val")) || keys[0];
  const select = el("select", { on: { input: () => { curveKey = select.value; drawCurves(); } } }, keys.map((key) => el("option", { value: key }, key)));
  select.value = curveKey;
  byId("curve-choices").append(el("label", { class: "tick" }, zoom, "zoom to the second half"), el("label", {}, "Metric", select));
}

// The mean of the seeds where all of them have a value, else the seeds alone.
function meanCurve(lines) {
  const at = new Map();
  for (const [steps, values] of lines) steps.forEach((step, k) => { if (!at.has(step)) at.set(step, []); at.get(step).push(values[k]); });
  const whole = [...at.entries()].filter(([, values]) => values.length === lines.length).sort((a, b) => a[0] - b[0]);
  return [whole.map(([step]) => step), whole.map(([, values]) => values.reduce((a, b) => a + b, 0) / values.length)];
}

function drawCurves() {
  if (curveKey === null) return;
  const place = byId("curves");
  const picked = drawn();
  const shown = picked.map((i) => ({ i, lines: all[i].runs.filter((run) => Object.hasOwn(run.curves, curveKey)).map((run) => run.curves[curveKey]) })).filter(({ lines }) => lines.length);
  legend(byId("curve-legend"), shown.map(({ i }) => i));
  if (!shown.length) {
    byId("curve-note").textContent = "";
    place.replaceChildren(el("p", { class: "muted" }, picked.length ? `None of the chosen configurations logged ${curveKey}.` : "Tick configurations in the table to draw them here."));
    return;
  }
  const events = eventsOf(shown.map(({ i }) => i));
  const lines = shown.flatMap((s) => s.lines);
  const end = Math.max(...lines.flatMap(([s]) => s)), from = zoom.checked ? end / 2 : 0;
  const seen = lines.flatMap(([s, v]) => v.filter((_, k) => s[k] >= from));
  const room = events.length ? 16 * Math.min(3, events.length) : 0;
  const chart = plot(place, {
    height: 360 + room, x: [from, end], y: roomAbove(padded(seen, 0.06), room / 300),
    xTitle: "optimizer step", yTitle: curveKey, label: `${curveKey} over optimizer steps`,
  });
  drawEvents(chart, events.filter(({ step }) => step >= from));
  const inside = clipped(chart);
  const path = ([s, v]) => s.map((step, k) => `${k ? "L" : "M"}${chart.px(step).toFixed(1)},${chart.py(v[k]).toFixed(1)}`).join("");
  const means = [];
  for (const { i, lines: seeds } of shown) {
    const middle = seeds.length > 1 ? meanCurve(seeds) : seeds[0];
    const css = (width, opacity) => ({ stroke: colour(i), fill: "none", "stroke-width": width, opacity, "stroke-dasharray": dash(i), "stroke-linejoin": "round" });
    if (seeds.length > 1) for (const seed of seeds) inside.append(svg("path", { d: path(seed), css: css(1.2, middle[0].length > 1 ? 0.35 : 0.9) }));
    if (middle[0].length > 1) inside.append(svg("path", { d: path(middle), css: css(2.4, 1) }));
    means.push({ i, middle });
  }
  addCross(chart, means);
  byId("curve-note").textContent = shown.some((s) => s.lines.length > 1) ? "Bold: mean over seeds. Thin: each seed." : "";
}

function clipped(chart) {
  const { left, top, width, height, right, bottom } = chart;
  const inside = svg("g", { "clip-path": "url(#inside)" });
  chart.root.append(svg("clipPath", { id: "inside" }, svg("rect", { x: left, y: top, width: width - left - right + 2, height: height - top - bottom })), inside);
  return inside;
}

const roomAbove = ([low, high], share) => [low, high + (high - low) * share];

// Points that several runs reach at the same step are one line with all their names.
function eventsOf(picked) {
  const at = new Map();
  for (const i of picked) for (const run of all[i].runs) for (const { name, step } of run.events) {
    if (!at.has(step)) at.set(step, new Set());
    at.get(step).add(name);
  }
  return [...at.entries()].sort((a, b) => a[0] - b[0]).map(([step, names]) => ({ step, name: joined([...names]) }));
}

function joined(names) {
  const frozen = names.filter((name) => name.endsWith(" frozen")).map((name) => name.replace(" frozen", ""));
  return [...names.filter((name) => !name.endsWith(" frozen")), ...(frozen.length ? [`${frozen.join(" and ")} frozen`] : [])].join(", ");
}

function drawEvents(chart, events) {
  const ends = [];
  for (const { step, name } of events) {
    const x = chart.px(step);
    const label = svg("text", { class: "event-name" }, name);
    chart.root.append(svg("line", { class: "event", x1: x, x2: x, y1: chart.top + 6, y2: chart.height - chart.bottom }), label);
    const wide = label.getComputedTextLength();
    const left = x + 5 + wide < chart.width ? x + 5 : x - 5 - wide;
    let line = ends.findIndex((end) => end < left - 6);
    if (line < 0) line = ends.length;
    if (line > 2) { label.replaceWith(svg("title", {}, name)); continue; }
    ends[line] = left + wide;
    fill(label, { x: left, y: chart.top + 16 + 16 * line });
  }
}

// A line that follows the pointer, or the arrow keys, with the values there.
function addCross(chart, means) {
  const steps = [...new Set(means.flatMap(({ middle }) => middle[0]))].filter((step) => chart.px(step) >= chart.left - 1).sort((a, b) => a - b);
  if (!steps.length) return;
  const line = svg("line", { class: "cross", y1: chart.top, y2: chart.height - chart.bottom, visibility: "hidden" });
  chart.root.append(line);
  let here = steps.length - 1;
  const show = () => {
    const step = steps[here], x = chart.px(step);
    fill(line, { x1: x, x2: x, visibility: "visible" });
    const rows = means.map(({ i, middle }) => {
      const k = middle[0].findLastIndex((s) => s <= step);
      return k < 0 ? null : el("tr", {}, el("td", {}, swatch(i)), el("td", {}, all[i].label), el("td", {}, short(middle[1][k])));
    });
    const box = chart.root.getBoundingClientRect();
    showTip(box.x + (x / chart.width) * box.width, box.y + 50, el("b", {}, `step ${step}`), el("table", {}, el("tbody", {}, rows)));
  };
  const hide = () => { line.setAttribute("visibility", "hidden"); hideTip(); };
  const follow = (event) => {
    const box = chart.root.getBoundingClientRect();
    const x = ((event.clientX - box.x) / box.width) * chart.width;
    here = steps.reduce((best, step, k) => (Math.abs(chart.px(step) - x) < Math.abs(chart.px(steps[best]) - x) ? k : best), 0);
    show();
  };
  const press = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    here = Math.min(steps.length - 1, Math.max(0, here + move));
    show();
  };
  fill(chart.root, { tabindex: 0, on: { pointermove: follow, pointerleave: hide, focus: () => requestAnimationFrame(show), blur: hide, keydown: press } });
}
