// What each method=auto tried to reach its target, what it cost and what it brought: a table for each run.

function buildLadders() {
  byId("ladders-card").hidden = !data.ladders.length;
  byId("ladders").append(...data.ladders.flatMap(ladderOf));
}

function ladderOf(ladder) {
  const unit = ladder.drop_unit ? ` (${ladder.drop_unit})` : "", places = ladder.drop_unit ? 2 : 4;
  const number = (value, count) => (value === null ? "–" : digits(value, count));
  const ends = (row) => (row.drop === null ? "–" : [row.low, row.high].map((end) => (end === null ? "∞" : digits(end, places))).join(" to "));
  const columns = [["rung", (row) => row.rung], ["tried", (row) => row.tried], [`drop${unit}`, (row) => number(row.drop, places)], [`95 % interval${unit}`, ends],
    ["speed-up", (row) => number(row.speedup, 2)], ["size (MB)", (row) => number(row.size_mb, 3)], ["minutes", (row) => number(row.minutes, 1)], ["verdict", (row) => row.verdict]];
  const head = el("tr", {}, columns.map(([name]) => el("th", { scope: "col" }, el("span", {}, name))));
  const text = ["rung", "tried", "verdict"];
  const rows = ladder.rows.map((row) => el("tr", row.chosen ? { class: "chosen" } : {}, columns.map(([name, value]) => el("td", { class: text.includes(name) ? "said" : "num" }, wrapped(String(value(row)))))));
  const title = `${ladder.label}${ladder.seed ? `, seed ${ladder.seed}` : ""}: ${ladder.target}`;
  return [el("h3", {}, wrapped(title)), el("p", { class: "said" }, wrapped(ladder.conclusion)),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, el("table", { class: "ladder" }, el("thead", {}, head), el("tbody", {}, rows))),
    el("p", { class: "note" }, `Drop of ${ladder.metric} against float on the validation data, by a paired bootstrap over its parts. ${ladder.sources}`.trim())];
}
