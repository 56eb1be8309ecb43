// Small helpers: elements, numbers, scales, marks and the tooltip. Text always goes in as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const all = data.configurations;
const SVG = "http://www.w3.org/2000/svg";
const SHAPES = ["circle", "square", "diamond", "up", "cross", "down"];
const byId = (id) => document.getElementById(id);

// What is chosen, filtered and sorted; draw() in main.js shows it.
const state = { picked: new Set(), visible: new Set(all.keys()), sort: { key: null, down: true }, hot: null, columns: new Set(), group: "", folded: new Set() };

// What is ticked and passes the filters.
const drawn = () => [...state.picked].filter((i) => state.visible.has(i)).sort((a, b) => a - b);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (name === "css") for (const [property, text] of Object.entries(value)) node.style.setProperty(property, text);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of [children].flat(2)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const colour = (i) => `var(--c${i % 8})`;
const dash = (i) => (i < 8 ? "none" : ["6 3", "2 3", "9 3 2 3"][Math.floor(i / 8 - 1) % 3]);

// The mark of a configuration: colour and shape, so that neither is needed alone.
function mark(i, x, y, r) {
  const shape = SHAPES[i % SHAPES.length];
  const css = { fill: colour(i) };
  if (shape === "circle") return svg("circle", { cx: x, cy: y, r, css });
  const k = r * 0.9, d = r * 1.25;
  const path = {
    square: `M${x - k},${y - k}h${2 * k}v${2 * k}h${-2 * k}z`,
    diamond: `M${x},${y - d}L${x + d},${y}L${x},${y + d}L${x - d},${y}z`,
    up: `M${x},${y - d}L${x + d},${y + k}L${x - d},${y + k}z`,
    down: `M${x},${y + d}L${x + d},${y - k}L${x - d},${y - k}z`,
    cross: `M${x - d},${y - d / 3}h${d * 2 / 3}v${-d * 2 / 3}h${d * 2 / 3}v${d * 2 / 3}h${d * 2 / 3}v${d * 2 / 3}h${-d * 2 / 3}v${d * 2 / 3}h${-d * 2 / 3}v${-d * 2 / 3}h${-d * 2 / 3}z`,
  }[shape];
  return svg("path", { d: path, css });
}
const swatch = (i) => svg("svg", { width: 14, height: 14, viewBox: "0 0 14 14", class: "mark", "aria-hidden": "true" }, mark(i, 7, 7, 5));

// Text that is broken between its words, and within one, at its signs, only where it is wider than its place; words of at
// most so many letters never.
const wrapped = (text, whole = 0) => String(text).split(/(\s+)/).map((word) => (/^\s*$/.test(word) ? word : el("span", { class: "word" },
  word.length <= whole ? word : word.split(/(?<=[_=./,:\-])/).flatMap((part, k) => (k ? [el("wbr", {}), part] : [part])))));

// As many whole words as there is room for; of one that has no room alone, as many of its parts.
function shortened(text, room) {
  if (text.length <= room) return text;
  const words = text.split(/(?<=\s)/);
  const parts = words[0].trimEnd().length < room ? words : text.split(/(?<=[\s_=./,:\-])/);
  let kept = "";
  for (const part of parts) { if (kept && (kept + part).trimEnd().length > room - 1) break; kept += part; }
  return kept.length < text.length ? `${kept.replace(/[\s_=./,:\-]+$/, "")} …` : text;
}

const doubted = (c, key) => Boolean(c.noise) && (key === "latency" || key === "speedup") && Boolean(c[key]);

const scale = data.metric.share ? 100 : 1;
const digits = (value, count) => (value === null || value === undefined ? "–" : value.toFixed(count).replace(/^-(0(\.0+)?)$/, "$1"));
const short = (value) => (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-4) ? value.toExponential(1) : String(+value.toPrecision(4)));
const FIGURES = [
  { key: "score", name: data.metric.name + (data.metric.share ? " (%)" : ""), factor: scale, digits: data.metric.share ? 2 : 4, down: data.metric.larger, text: (v) => (data.metric.share ? `${v} %` : v) },
  { key: "drop", name: data.metric.share ? "drop (pp)" : "drop", factor: 1, digits: data.metric.share ? 2 : 4, down: false, text: (v) => (data.metric.share ? `${v} pp` : v) },
  { key: "latency", name: "latency (ms)", factor: 1, digits: 3, down: false, text: (v) => `${v} ms` },
  { key: "size", name: "size (MB)", factor: 1, digits: 3, down: false, text: (v) => `${v} MB` },
  { key: "speedup", name: "speed-up", factor: 1, digits: 2, down: true, text: (v) => `${v} ×` },
  { key: "agreement", name: "agreement (%)", factor: 100, digits: 2, down: true, text: (v) => `${v} %` },
];
const figure = Object.fromEntries(FIGURES.map((f) => [f.key, f]));
const measured = (f) => all.some((c) => c[f.key]);
const mean = (c, key) => (c[key] ? c[key][0] * figure[key].factor : null);
const deviation = (c, key) => (c[key] && c[key][1] !== null ? c[key][1] * figure[key].factor : null);
// The seeds of a figure where they are not all of them: some runs have no baseline, or were not timed.
const fewer = (c, key) => (c[key] && c[key][2] !== c.score[2] ? ` (n=${c[key][2]})` : "");
function said(c, key) {
  const f = figure[key], value = mean(c, key), spread = deviation(c, key);
  if (value === null) return "–";
  return f.text(spread === null ? digits(value, f.digits) : `${digits(value, f.digits)} ± ${digits(spread, f.digits)}`) + fewer(c, key) + (doubted(c, key) ? " ?" : "");
}

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(+(k * step).toPrecision(12));
  return found;
}
function padded(values, share) {
  const low = Math.min(...values), high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * share;
  return [low - room, high + room];
}
const linear = ([a, b], [p, q]) => (value) => p + ((value - a) / (b - a || 1)) * (q - p);

// An SVG as wide as its place, with axes; returns what a chart needs to draw in it.
function plot(place, { height, x, y, xTitle, yTitle, left = 56, bottom = 44, label }) {
  const width = Math.max(260, place.clientWidth), top = 12, right = 14;
  const px = linear(x, [left, width - right]), py = linear(y, [height - bottom, top]);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": label });
  for (const value of ticks(...y, Math.round(height / 60))) {
    root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value) }),
      svg("text", { x: left - 8, y: py(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(...x, Math.max(3, Math.round((width - left) / 90)))) {
    root.append(svg("text", { x: px(value), y: height - bottom + 18, "text-anchor": "middle" }, short(value)));
  }
  root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    svg("text", { x: width - right, y: height - 6, "text-anchor": "end" }, xTitle),
    svg("text", { x: 0, y: top - 1 }, yTitle));
  place.replaceChildren(root);
  return { root, px, py, width, height, left, right, top, bottom };
}

const tip = byId("tip");
function showTip(x, y, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const room = 14;
  const over = y - box.height - room;
  tip.style.left = `${Math.min(Math.max(8, x - box.width / 2), innerWidth - box.width - 8)}px`;
  tip.style.top = `${over > 8 ? over : y + room}px`;
}
const hideTip = () => { tip.hidden = true; };
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", hideTip, { passive: true, capture: true });

function legend(place, which) {
  place.replaceChildren(...which.map((i) => el("span", {}, swatch(i), all[i].label)));
}
