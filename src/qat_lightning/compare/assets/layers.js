// The per-layer table of the chosen configurations side by side: a row for each layer, a mark for each configuration.

let layerKey = null;

function layerRows() {
  return all.flatMap((c) => c.runs.flatMap((run) => run.layers));
}
const layerName = (row) => String(row.layer ?? row.name ?? row.module ?? "");

function buildLayers() {
  const rows = layerRows();
  const numeric = new Set(rows.flatMap((row) => Object.keys(row).filter((key) => typeof row[key] === "number")));
  const keys = [...numeric].filter((key) => rows.some((row) => layerName(row)));
  if (!keys.length) { byId("layers-card").hidden = true; return; }
  keys.sort((a, b) => /sqnr/.test(b) - /sqnr/.test(a));
  layerKey = keys[0];
  const select = el("select", { on: { input: () => { layerKey = select.value; drawLayers(); } } }, keys.map((key) => el("option", { value: key }, worded(key))));
  byId("layer-choices").append(el("label", {}, "Figure", select));
}

const worded = (key) => key.replace(/_/g, " ").replace(/ db$/, " (dB)").replace("sqnr", "SQNR");

function drawLayers() {
  if (layerKey === null) return;
  const place = byId("layers");
  const picked = drawn();
  const shown = picked.map((i) => ({ i, values: layerMeans(all[i]) })).filter(({ values }) => values.size);
  const names = [...new Set(shown.flatMap(({ values }) => [...values.keys()]))];
  legend(byId("layer-legend"), shown.map(({ i }) => i));
  byId("layer-note").textContent = shown.some(({ i }) => all[i].runs.length > 1) ? "Means over seeds." : "";
  if (!names.length) {
    place.replaceChildren(el("p", { class: "muted" }, picked.length ? `None of the chosen configurations has ${worded(layerKey)} of its layers.` : "Tick configurations in the table to draw them here."));
    return;
  }
  const tall = 26, small = place.clientWidth < 560;
  const longest = (list) => Math.max(...list.map((text) => text.length));
  const whole = 16 + 7.2 * longest(names), least = 16 + 7.2 * (2 + longest(names.map((name) => name.split(".").pop())));
  const left = Math.min(whole, Math.max(small ? 120 : 260, least));
  const x = padded(shown.flatMap(({ values }) => [...values.values()]), 0.08);
  const height = names.length * tall + 56;
  const chart = plot(place, { height, x, y: [names.length, 0], xTitle: worded(layerKey), yTitle: "", left, label: `${worded(layerKey)} of ${names.length} layers` });
  for (const node of [...chart.root.querySelectorAll(".grid, text")].filter((n) => n.matches(".grid") || n.getAttribute("text-anchor") === "end" && n.textContent !== worded(layerKey))) node.remove();
  const room = Math.floor((left - 16) / 7.2);
  names.forEach((name, k) => {
    const y = chart.top + k * tall + tall / 2;
    const text = lastParts(name, room);
    const found = shown.filter(({ values }) => values.has(name));
    const about = found.map(({ i, values }) => `${all[i].label} ${short(values.get(name))}`).join(", ");
    const group = svg("g", { class: "layer", tabindex: 0, role: "img", "aria-label": `${name}: ${about}` },
      svg("line", { class: "row", x1: left, x2: chart.width - chart.right, y1: y, y2: y }),
      svg("text", { x: left - 10, y: y + 4, "text-anchor": "end" }, text),
      found.map(({ i, values }) => mark(i, chart.px(values.get(name)), y, 5)),
      svg("rect", { x: 0, y: y - tall / 2, width: chart.width, height: tall, fill: "transparent" }));
    const show = () => {
      const box = group.getBoundingClientRect();
      const rows = found.map(({ i, values }) => el("tr", {}, el("td", {}, swatch(i)), el("td", {}, all[i].label), el("td", {}, short(values.get(name)))));
      showTip(box.x + box.width / 2, box.y + 2, el("b", {}, name), el("table", {}, el("tbody", {}, rows)));
    };
    chart.root.append(fill(group, { on: { pointerenter: show, pointerleave: hideTip, focus: () => requestAnimationFrame(show), blur: hideTip } }));
  });
}

// The last whole parts of a dotted name that there is room for.
function lastParts(name, room) {
  const parts = name.split(".");
  let kept = parts.pop();
  while (parts.length && kept.length + parts.at(-1).length + 3 <= room) kept = `${parts.pop()}.${kept}`;
  return parts.length ? `….${kept}` : kept;
}

function layerMeans(c) {
  const values = new Map();
  for (const run of c.runs) for (const row of run.layers) {
    const value = row[layerKey], name = layerName(row);
    if (typeof value !== "number" || !name) continue;
    if (!values.has(name)) values.set(name, []);
    values.get(name).push(value);
  }
  return new Map([...values].map(([name, found]) => [name, found.reduce((a, b) => a + b, 0) / found.length]));
}
