// The score against latency and against size, with the front of the two.

function drawScatter(id, key, cheap) {
  const place = byId(id);
  const points = [...all.keys()].filter((i) => all[i][key]);
  byId(`${id}-title`).textContent = `${data.metric.name} against ${key}${key === "latency" && data.noisy ? ", measured while other work was running" : ""}`;
  if (!points.length) {
    place.replaceChildren(el("p", { class: "muted" }, `No run has a ${key}.`));
    return;
  }
  const ends = (f) => (i) => { const v = mean(all[i], f), s = deviation(all[i], f) || 0; return [v - s, v + s]; };
  const xs = padded(points.flatMap(ends(key)), 0.12), ys = padded(points.flatMap(ends("score")), 0.12);
  if (xs[0] < 0) xs[0] = 0;
  const chart = plot(place, {
    height: 340, x: xs, y: ys, xTitle: `${figure[key].name}, ← ${cheap}`, yTitle: `${figure.score.name}, ${data.metric.larger ? "↑" : "↓"} better`,
    label: `${data.metric.name} against ${key}, ${points.length} configurations`,
  });
  const at = (i) => [chart.px(mean(all[i], key)), chart.py(mean(all[i], "score"))];
  drawFront(chart, points.filter((i) => all[i].fronts[key]).map(at));
  const drawn = points.map((i) => [i, pointOf(chart, i, key, ...at(i))]);
  for (const [, node] of drawn) chart.root.append(node);
  nameFront(chart, points.filter((i) => all[i].front || i === data.winner), points.map(at), at);
}

// What is as good at the same cost or less is on or above the steps.
function drawFront(chart, front) {
  if (!front.length) return;
  front.sort((a, b) => a[0] - b[0] || b[1] - a[1]);
  const floor = data.metric.larger ? chart.height - chart.bottom : chart.top, end = chart.width - chart.right;
  let path = `M${front[0][0]},${floor}V${front[0][1]}`;
  for (const [x, y] of front.slice(1)) path += `H${x}V${y}`;
  path += `H${end}`;
  chart.root.append(svg("path", { class: "front-area", d: `${path}V${floor}z` }), svg("path", { class: "front-line", d: path }));
}

function pointOf(chart, i, key, x, y) {
  const c = all[i];
  const text = `${c.label}: ${said(c, "score")}, ${said(c, key)}${c.front ? ", on the front" : ""}`;
  const node = svg("g", { class: "point", "data-i": i, tabindex: 0, role: "button", "aria-label": text, "aria-pressed": state.picked.has(i) });
  const line = (x1, y1, x2, y2) => svg("line", { class: "whisker", x1, y1, x2, y2, css: { stroke: colour(i) } });
  const dx = deviation(c, key), dy = deviation(c, "score");
  if (dx) node.append(line(Math.max(chart.left, chart.px(mean(c, key) - dx)), y, chart.px(mean(c, key) + dx), y));
  if (dy) node.append(line(x, chart.py(mean(c, "score") - dy), x, chart.py(mean(c, "score") + dy)));
  node.append(svg("circle", { class: "halo", cx: x, cy: y, r: 18, css: { fill: colour(i) } }), mark(i, x, y, 6));
  if (c.front) node.append(svg("circle", { class: "ring", cx: x, cy: y, r: 10.5 }));
  node.append(svg("circle", { cx: x, cy: y, r: 20, fill: "transparent" })); // large enough for a finger
  if (!state.visible.has(i)) node.classList.add("faded");
  const show = () => { heat(i); const box = node.lastChild.getBoundingClientRect(); showTip(box.x + box.width / 2, box.y + 6, ...aboutPoint(c)); };
  const hide = () => { heat(null); hideTip(); };
  const press = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(i); } };
  return fill(node, { on: { pointerenter: show, pointerleave: hide, focus: () => requestAnimationFrame(show), blur: hide, click: () => toggle(i), keydown: press } });
}

function aboutPoint(c) {
  const lines = FIGURES.filter((f) => c[f.key]).map((f) => el("tr", {}, el("td", { class: "muted" }, f.name.replace(/ \(.*/, "")), el("td", {}, said(c, f.key))));
  const seeds = c.score[2] === 1 ? "one seed" : `${c.score[2]} seeds`;
  return [el("b", {}, c.label), el("span", { class: "muted" }, `${c.variant}, ${seeds}${c.front ? ", Pareto front" : ""}`), el("table", {}, el("tbody", {}, lines))];
}

// Names go where nothing is: of eight places around a point the first that is free, else none (the tooltip has it).
function nameFront(chart, which, points, at) {
  const taken = points.map(([x, y]) => [x - 11, y - 11, x + 11, y + 11]);
  for (const i of which) {
    const [x, y] = at(i);
    const label = shortened(all[i].label, 28);
    const node = svg("text", { class: "name", "aria-hidden": "true" }, label);
    chart.root.append(node);
    const wide = node.getComputedTextLength(), tall = 14;
    const spots = [[14, 22], [14, -12], [-wide - 14, -12], [-wide - 14, 22], [16, 4], [-wide - 16, 4], [-wide / 2, -16], [-wide / 2, 28]];
    const free = spots.map(([dx, dy]) => [x + dx, y + dy - 11, x + dx + wide, y + dy - 11 + tall]).find((box) =>
      box[0] > chart.left + 2 && box[2] < chart.width - 4 && box[1] > chart.top && box[3] < chart.height - chart.bottom
      && !taken.some((t) => box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1]));
    if (!free) { node.remove(); continue; }
    taken.push(free);
    fill(node, { x: free[0], y: free[1] + 11 });
    if (!state.visible.has(i)) node.classList.add("faded");
  }
}
