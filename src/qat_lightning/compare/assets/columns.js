// Which columns the table has: figures, settings, and any metric that was logged; and what says that some are out of sight.

function allColumns() {
  const settings = data.settings.map((label, place) => ({ key: `setting${place}`, name: label, setting: true, text: (c) => c.values[place] }));
  const metrics = data.metrics.map((key) => ({ key: `metric:${key}`, name: key, metric: true, down: !/loss|err|latency|_ms|_mb|perplexity/i.test(key), number: (c) => (c.metrics[key] ? c.metrics[key][0] : null), spread: (c) => (c.metrics[key] ? c.metrics[key][1] : null) }));
  const variant = { key: "variant", name: "variant", text: (c) => c.variant };
  const figures = FIGURES.filter(measured).map((f) => ({ key: f.key, name: f.name, number: (c) => mean(c, f.key), figure: f }));
  return [
    { key: "label", name: "configuration", text: (c) => c.label },
    ...(innerWidth > 560 ? [variant, ...figures] : [...figures, variant]), // where there is room for one, it is the score
    { key: "n", name: "n", number: (c) => c.score[2] },
    ...settings,
    ...metrics,
  ];
}

// The settings are in the name: few of them need no column, and where there is no room for them none does.
function usualColumns() {
  const settings = data.settings.length > 2 && innerWidth > 560;
  return new Set(allColumns().filter((c) => !c.metric && (settings || !c.setting)).map((c) => c.key));
}

function leaveOutWhatDoesNotFit() {
  const place = byId("table").closest(".scroll");
  if (place.scrollWidth <= place.clientWidth + 1) return;
  for (const column of allColumns().filter((c) => c.setting)) state.columns.delete(column.key);
  for (const box of byId("columns").querySelectorAll("input[data-column]")) box.checked = state.columns.has(box.dataset.column);
  drawTable();
}

const columns = () => allColumns().filter((c) => c.key === "label" || state.columns.has(c.key));

function buildColumns() {
  state.columns = usualColumns();
  const place = byId("columns");
  const boxes = allColumns().slice(1).map((column) => {
    const box = el("input", { type: "checkbox", "data-column": column.key });
    box.checked = state.columns.has(column.key);
    box.addEventListener("input", () => {
      if (box.checked) state.columns.add(column.key); else state.columns.delete(column.key);
      if (!box.checked && state.sort.key === column.key) state.sort.key = null;
      drawTable();
    });
    return el("label", { class: "tick", "data-name": column.name.toLowerCase() }, box, el("span", {}, wrapped(column.name)));
  });
  const find = el("input", { type: "search", placeholder: "find a column", "aria-label": "Find a column", autocomplete: "off" });
  find.addEventListener("input", () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const box of boxes) box.hidden = !words.every((word) => box.dataset.name.includes(word));
  });
  place.append(el("summary", { id: "columns-count" }), boxes.length > 12 ? find : null, el("div", { class: "boxes" }, boxes));
}

function countColumns(shown) {
  byId("columns-count").textContent = `Columns: ${shown} of ${allColumns().length}`;
}

// Each table that is wider than its place says how much of it is out of sight, and a click brings it in.
function buildCues() {
  for (const place of document.querySelectorAll(".scroll")) {
    const button = el("button", { type: "button", class: "cue", on: { click: () => place.scrollBy({ left: (place.dataset.at === "end" ? -1 : 1) * place.clientWidth * 0.7, behavior: "smooth" }) } });
    place.before(button);
    place.addEventListener("scroll", () => cue(place), { passive: true });
    new ResizeObserver(() => fitEdge(place)).observe(place);
  }
}

const NARROWEST = 150; // of the column with names, on a phone

// Where columns are out of sight, the first one takes the room behind the last that fits whole: none is cut at the edge.
function fitEdge(place) {
  const heads = [...place.querySelectorAll("thead th")];
  if (heads.length < 2) return;
  place.style.removeProperty("--first");
  if (place.scrollWidth > place.clientWidth + 1) {
    const least = innerWidth <= 560 ? Math.min(NARROWEST, heads[0].offsetWidth) : heads[0].offsetWidth;
    let taken = 0;
    for (const head of heads.slice(1)) {
      const width = head.getBoundingClientRect().width;
      if (least + taken + width > place.clientWidth) break;
      taken += width;
    }
    if (taken) place.style.setProperty("--first", `${(place.clientWidth - taken).toFixed(2)}px`);
  }
  place.style.setProperty("--fixed", `${heads[0].offsetWidth}px`);
  cue(place);
}

function cue(place) {
  const button = place.previousElementSibling, box = place.getBoundingClientRect();
  const fixed = place.querySelector("thead th");
  if (!fixed) return;
  const from = Math.max(box.left, fixed.getBoundingClientRect().right), to = box.right;
  const heads = [...place.querySelectorAll("thead th")].slice(1).map((th) => th.getBoundingClientRect());
  const right = heads.filter((r) => r.right > to + 1.5).length, left = heads.filter((r) => r.left < from - 1.5).length;
  place.dataset.at = right ? (left ? "middle" : "start") : left ? "end" : "whole";
  const say = (count, where) => (count ? `${count} ${count === 1 ? "column" : "columns"} ${where}` : null);
  button.hidden = !right && !left;
  button.textContent = [left ? `← ${say(left, "to the left")}` : null, right ? `${say(right, "to the right")} →` : null].filter(Boolean).join("   ");
}
