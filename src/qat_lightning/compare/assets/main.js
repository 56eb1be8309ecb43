// Put the page together once, and draw it again when something is chosen, filtered, sorted or resized.

const MAX_DRAWN = 5;

function buildVerdict() {
  const place = byId("verdict"), winner = data.winner === null ? null : all[data.winner];
  const asked = Object.values(data.limits).some((limit) => limit !== null);
  if (winner) {
    place.classList.add("won");
    const figures = FIGURES.filter((f) => winner[f.key] && f.key !== "agreement").map((f) => el("div", {}, el("dt", {}, f.name.replace(/ \(.*/, "")),
      el("dd", {}, f.text(digits(mean(winner, f.key), f.digits)), " ", deviation(winner, f.key) === null ? null : el("small", {}, `± ${digits(deviation(winner, f.key), f.digits)}`), fewer(winner, f.key), doubted(winner, f.key) ? el("span", { class: "doubt", title: winner.noise }, "?") : null)));
    place.append(el("p", { class: "kicker" }, "Ship this"), el("p", { class: "winner" }, wrapped(winner.label)), el("p", {}, wrapped(data.reason)),
      el("dl", { class: "figures" }, figures), el("ul", { class: "files" }, data.shipped.map((path) => el("li", {}, wrapped(path)))));
  } else {
    place.classList.toggle("none", asked);
    place.append(el("p", { class: "kicker" }, asked ? "Nothing qualifies" : "No decision"), el("p", {}, wrapped(data.reason)));
  }
}

function buildDifferences() {
  const head = el("tr", {}, el("th", { scope: "col" }, el("span", {}, "setting")), all.map((c, i) => el("th", { scope: "col" }, el("span", {}, swatch(i), " ", wrapped(c.label, 18)))));
  const rows = data.differences.filter(({ part }) => !part).map(({ key, values }) => el("tr", {}, el("th", { scope: "row", class: "key" }, wrapped(key)), values.map((value) => el("td", { class: "key" }, wrapped(value, 18)))));
  if (!rows.length) rows.push(el("tr", {}, el("td", { class: "empty", colspan: all.length + 1 }, "Nothing but the seed.")));
  byId("differences").append(el("thead", {}, head), el("tbody", {}, rows));
  const parts = data.differences.filter(({ part }) => part).map(({ key, values }) => [key, values.find((value) => value !== "–")]);
  listSettings("parts", parts, (count) => `${count} settings that only some have, and these alike`);
  listSettings("same", Object.entries(data.same), (count) => `${count} settings that are the same in all`);
}

function listSettings(id, settings, title) {
  byId(id).hidden = !settings.length;
  byId(id).append(el("summary", {}, title(settings.length)), el("dl", {}, settings.map(([key, value]) => [el("dt", {}, key), el("dd", {}, value)])));
}

function buildLeftOut() {
  byId("left-out-card").hidden = !data.leftOut.length;
  const head = ["run", "status", "reason"].map((name) => el("th", { scope: "col" }, el("span", {}, name)));
  const rows = data.leftOut.map((run) => el("tr", {}, el("td", { class: "key" }, run.name), el("td", { class: `status-${run.status}` }, run.status), el("td", { class: "reason" }, run.reason)));
  byId("left-out").append(el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows));
}

function draw() {
  hideTip();
  drawTable();
  drawScatter("latency", "latency", "faster");
  drawScatter("size", "size", "smaller");
  drawCurves();
  drawLayers();
}

function start() {
  const runs = all.reduce((sum, c) => sum + c.runs.length, 0);
  byId("about").append(...wrapped(`${runs} runs in ${all.length} configurations, written ${data.written}`));
  const better = data.metric.larger ? "larger" : "smaller";
  const baselines = [...new Set(all.map((c) => c.baseline).filter(Boolean))];
  const note = `${data.metric.name}: ${better} is better. ± sample standard deviation over n seeds.`
    + (baselines.length ? ` Drop against float, paired by seed: ${baselines.join(", ")}.` : "")
    + (data.noisy ? " ?: measured while other work was running, so latency is ignored; --remeasure on an idle machine times the int8 files and float again." : "");
  byId("table-note").append(...wrapped(note));
  const first = [data.winner, data.runnerUp, ...[...all.keys()].filter((i) => all[i].front), ...all.keys()].filter((i) => i !== null);
  state.picked = new Set([...new Set(first)].slice(0, MAX_DRAWN));
  buildVerdict();
  buildFilters();
  buildColumns();
  buildCues();
  buildCurves();
  buildLayers();
  buildDifferences();
  buildLadders();
  buildLeftOut();
  filter();
  leaveOutWhatDoesNotFit();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
}
start();
