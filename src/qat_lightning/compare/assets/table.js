// The table of configurations: sorting, filtering, choosing.

const inputs = {};

function buildFilters() {
  const form = byId("filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  const field = (name, text, input) => {
    inputs[name] = input;
    input.addEventListener("input", filter);
    form.append(el("label", {}, text, input));
  };
  field("text", "Search", el("input", { type: "search", placeholder: "words, in any order", autocomplete: "off" }));
  data.settings.forEach((label, place) => {
    const values = [...new Set(all.map((c) => c.values[place]))];
    if (values.length < 2 || values.length > 12) return;
    const options = values.map((value) => el("option", { value }, value));
    field(`setting${place}`, label, el("select", { "data-setting": place }, el("option", { value: "" }, "all"), options));
  });
  for (const [key, text] of [["drop", "Drop up to"], ["latency", "Latency up to"], ["size", "Size up to"]]) {
    if (!all.some((c) => c[key])) continue;
    const unit = key === "drop" ? (data.metric.share ? " (pp)" : "") : key === "latency" ? " (ms)" : " (MB)";
    const input = el("input", { type: "number", step: "any", inputmode: "decimal", placeholder: "any" });
    if (data.limits[key] !== null && data.winner !== null) input.value = data.limits[key];
    field(key, text + unit, input);
  }
  const front = el("input", { type: "checkbox" });
  inputs.front = front;
  front.addEventListener("input", filter);
  form.append(el("label", { class: "tick" }, front, "front only"));
  const groups = [["", "nothing"], ...data.settings.map((label, place) => [String(place), label]), ["variant", "variant"]];
  const select = el("select", { id: "group-by", on: { input: () => { state.group = select.value; state.folded.clear(); drawTable(); } } }, groups.map(([value, label]) => el("option", { value }, label)));
  form.append(el("label", {}, "Group rows by", select));
}

function filter() {
  const words = inputs.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const keeps = (c) => {
    const text = [c.label, c.variant, ...c.values, ...c.runs.map((run) => run.name)].join(" ").toLowerCase();
    if (!words.every((word) => text.includes(word))) return false;
    if (inputs.front.checked && !c.front) return false;
    for (const [place] of data.settings.entries()) {
      const select = inputs[`setting${place}`];
      if (select && select.selectedIndex > 0 && c.values[place] !== select.value) return false;
    }
    return ["drop", "latency", "size"].every((key) => {
      const limit = inputs[key] ? inputs[key].valueAsNumber : NaN;
      if (Number.isNaN(limit)) return true;
      const value = key === "drop" && c.float ? 0 : mean(c, key);
      return value !== null && value <= limit;
    });
  };
  state.visible = new Set([...all.keys()].filter((i) => keeps(all[i])));
  draw();
}

const kind = (column) => (column.number ? "num" : column.setting ? "setting" : null);

function compareBy(column, down) {
  const sign = down ? -1 : 1;
  const collator = new Intl.Collator("en", { numeric: true });
  return (i, j) => {
    if (!column.number) return sign * collator.compare(column.text(all[i]), column.text(all[j])) || i - j;
    const a = column.number(all[i]), b = column.number(all[j]);
    if (a === null || b === null) return (a === null) - (b === null) || i - j; // what was not measured goes last
    return sign * (a - b) || i - j;
  };
}

function order() {
  const column = columns().find((c) => c.key === state.sort.key);
  const rows = [...all.keys()].filter((i) => state.visible.has(i));
  return column ? rows.sort(compareBy(column, state.sort.down)) : rows;
}

function sortBy(column) {
  const first = column.figure ? column.figure.down : Boolean(column.down);
  const again = state.sort.key === column.key;
  state.sort = { key: column.key, down: again ? !state.sort.down : first };
  draw();
}

function drawTable() {
  const shown = columns();
  const head = el("tr", {}, shown.map((column) => {
    const sorted = state.sort.key === column.key ? (state.sort.down ? "descending" : "ascending") : "none";
    const button = el("button", { type: "button", on: { click: () => sortBy(column) } }, column.name);
    return el("th", { scope: "col", "aria-sort": sorted, class: kind(column), "data-key": column.key }, button);
  }));
  const rows = groupsOf(order()).flatMap(({ name, which }) => (name === null ? which.map((i) => row(i, shown)) : groupRows(name, which, shown)));
  if (!rows.length) rows.push(el("tr", {}, el("td", { class: "empty", colspan: shown.length }, "No configuration passes the filters.")));
  const focused = document.activeElement && document.activeElement.closest("#table") ? focusKey(document.activeElement) : null;
  byId("table").replaceChildren(
    el("caption", { class: "hide" }, "Configurations, with the mean and the sample standard deviation over seeds"),
    el("thead", {}, head), el("tbody", {}, rows));
  if (focused) { const again = byId("table").querySelector(focused); if (again) again.focus({ preventScroll: true }); }
  byId("count").textContent = `${state.visible.size} of ${all.length} shown, ${drawn().length} of them drawn below`;
  countColumns(shown.length);
  fitEdge(byId("table").closest(".scroll"));
}

// Rows with the same setting together, in the order of the best of each.
function groupsOf(rows) {
  if (!state.group) return [{ name: null, which: rows }];
  const value = (i) => (state.group === "variant" ? all[i].variant : all[i].values[Number(state.group)]);
  const label = state.group === "variant" ? "variant" : data.settings[Number(state.group)];
  const groups = new Map();
  for (const i of rows) {
    const name = `${label}: ${value(i)}`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(i);
  }
  return [...groups].map(([name, which]) => ({ name, which }));
}

function groupRows(name, which, shown) {
  const folded = state.folded.has(name);
  const fold = () => { if (!state.folded.delete(name)) state.folded.add(name); drawTable(); };
  const button = el("button", { type: "button", class: "fold", "aria-expanded": String(!folded), on: { click: fold } }, `${folded ? "▸" : "▾"} `, wrapped(name), el("small", {}, ` ${which.length}`));
  const cells = shown.slice(1).map((column) => {
    if (!column.number || column.key === "n") return el("td", {});
    const values = which.map((i) => column.number(all[i])).filter((v) => v !== null);
    const middle = values.reduce((a, b) => a + b, 0) / values.length;
    return el("td", { class: "num" }, values.length ? (column.figure ? digits(middle, column.figure.digits) : short(middle)) : "–", el("small", {}, "mean"));
  });
  const head = el("tr", { class: "group", "data-group": name }, el("th", { scope: "rowgroup" }, button), cells);
  return [head, ...(folded ? [] : which.map((i) => row(i, shown)))];
}

function focusKey(node) {
  const head = node.closest("th[data-key]"), line = node.closest("tr[data-i]");
  return head ? `th[data-key="${head.dataset.key}"] button` : line ? `tr[data-i="${line.dataset.i}"] input` : null;
}

function row(i, shown) {
  const c = all[i];
  const box = el("input", { type: "checkbox", "aria-label": `draw ${c.label}`, on: { change: () => toggle(i) } });
  box.checked = state.picked.has(i);
  const badges = [
    i === data.winner ? el("span", { class: "badge solid" }, "winner") : null,
    c.front ? el("span", { class: "badge" }, "front") : null,
  ];
  const name = el("th", { scope: "row" }, el("label", {}, box, swatch(i), el("span", { class: "name" }, wrapped(c.label)), badges));
  const cells = shown.slice(1).map((column) => {
    if (!column.number) return el("td", { class: kind(column) }, column.text(c));
    if (column.metric) return el("td", { class: "num" }, column.number(c) === null ? "–" : short(column.number(c)), el("small", {}, column.spread(c) === null ? "" : `± ${short(column.spread(c))}`));
    const spread = column.figure ? deviation(c, column.key) : null;
    const text = column.figure ? digits(column.number(c), column.figure.digits) : column.number(c);
    const doubt = doubted(c, column.key) ? el("span", { class: "doubt", title: `Measured while other work was running: ${c.noise}` }, "?") : null;
    const aside = column.figure ? el("small", {}, (spread === null ? "" : `± ${digits(spread, column.figure.digits)}`) + fewer(c, column.key), doubt) : null;
    return el("td", { class: "num" }, String(text), aside);
  });
  const handlers = { pointerenter: () => heat(i), pointerleave: () => heat(null) };
  return el("tr", { "data-i": i, class: i === data.winner ? "chosen" : null, on: handlers }, name, cells);
}

function toggle(i) {
  if (!state.picked.delete(i)) state.picked.add(i);
  draw();
}

// The same configuration lights up wherever it is shown.
function heat(i) {
  for (const node of document.querySelectorAll("tr[data-i], .point[data-i]")) node.classList.toggle("hot", Number(node.dataset.i) === i);
}
