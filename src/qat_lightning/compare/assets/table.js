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
      const value = key === "drop" && c.variant === "float" ? 0 : mean(c, key);
      return value !== null && value <= limit;
    });
  };
  state.visible = new Set([...all.keys()].filter((i) => keeps(all[i])));
  draw();
}

function columns() {
  const named = data.settings.map((label, place) => ({ key: `setting${place}`, name: label, setting: true, text: (c) => c.values[place] }));
  return [
    { key: "label", name: "configuration", text: (c) => c.label },
    { key: "variant", name: "variant", text: (c) => c.variant },
    ...FIGURES.filter(measured).map((f) => ({ key: f.key, name: f.name, number: (c) => mean(c, f.key), figure: f })),
    { key: "n", name: "n", number: (c) => c.score[2] },
    ...(named.length > 2 ? named : []), // fewer are told well enough by the name
  ];
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
  const first = column.figure ? column.figure.down : false;
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
  const rows = order().map((i) => row(i, shown));
  if (!rows.length) rows.push(el("tr", {}, el("td", { class: "empty", colspan: shown.length }, "No configuration passes the filters.")));
  const focused = document.activeElement && document.activeElement.closest("#table") ? focusKey(document.activeElement) : null;
  byId("table").replaceChildren(
    el("caption", { class: "hide" }, "Configurations, with the mean and the sample standard deviation over seeds"),
    el("thead", {}, head), el("tbody", {}, rows));
  if (focused) { const again = byId("table").querySelector(focused); if (again) again.focus({ preventScroll: true }); }
  byId("count").textContent = `${state.visible.size} of ${all.length} shown, ${state.picked.size} drawn below`;
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
  const name = el("th", { scope: "row" }, el("label", {}, box, swatch(i), el("span", { class: "name", title: c.label }, c.label), badges));
  const cells = shown.slice(1).map((column) => {
    if (!column.number) return el("td", { class: kind(column) }, column.text(c));
    const spread = column.figure ? deviation(c, column.key) : null;
    const text = column.figure ? digits(column.number(c), column.figure.digits) : column.number(c);
    const aside = column.figure ? el("small", {}, spread === null ? "" : `± ${digits(spread, column.figure.digits)}`) : null;
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
