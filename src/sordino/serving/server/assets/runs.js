// The page that compares runs: accuracy against epsilon, a table, and accuracy by client. Figures are SVG, drawn here.
import { byId, counted, enter, getJson, h, n_a, percent, size, svg } from "./shared.js";

const TERMS = {
  local: "Test pictures of the classes that a client holds.",
  neighbor: "Test pictures of the classes that only other clients hold.",
  overall: "Test pictures of all classes.",
  novel: "Test pictures of classes that nobody trained on.",
  domain: "Test pictures of a domain that was held out.",
};
const SHAPES = {
  circle: (r) => ["circle", { r }],
  square: (r) => ["rect", { x: -0.9 * r, y: -0.9 * r, width: 1.8 * r, height: 1.8 * r }],
  diamond: (r) => ["path", { d: `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0z` }],
  "triangle-up": (r) => ["path", { d: `M0 ${-1.2 * r}L${1.2 * r} ${r}H${-1.2 * r}z` }],
  cross: (r) => ["path", { d: `M${-0.4 * r} ${-1.2 * r}h${0.8 * r}v${0.8 * r}h${0.8 * r}v${0.8 * r}h${-0.8 * r}v${0.8 * r}h${-0.8 * r}v${-0.8 * r}h${-0.8 * r}v${-0.8 * r}h${0.8 * r}z` }],
  "triangle-down": (r) => ["path", { d: `M0 ${1.2 * r}L${1.2 * r} ${-r}H${-1.2 * r}z` }],
  x: (r) => ["path", { transform: "rotate(45)", d: `M${-0.4 * r} ${-1.3 * r}h${0.8 * r}v${0.9 * r}h${0.9 * r}v${0.8 * r}h${-0.9 * r}v${0.9 * r}h${-0.8 * r}v${-0.9 * r}h${-0.9 * r}v${-0.8 * r}h${0.9 * r}z` }],
  star: (r) => ["path", { d: `M${Array.from({ length: 10 }, (_, i) => {
    const [angle, far] = [(i * Math.PI) / 5, i % 2 ? 0.6 * r : 1.4 * r];
    return `${(far * Math.sin(angle)).toFixed(2)} ${(-far * Math.cos(angle)).toFixed(2)}`;
  }).join("L")}z` }],
};

let data, runs;
const hidden = new Set(); // numbers of runs that are not drawn
const sorting = { column: null, down: true };

enter(async () => {
  data = await getJson("v1/runs");
  byId("columns").hidden = false;
  data.runs.forEach((run, number) => Object.assign(run, { number }));
  leftOut();
  const datasets = [...new Set(data.runs.map(({ dataset }) => dataset))];
  if (datasets.length === 0) {
    byId("columns").replaceChildren(
      h("div", { class: "message" }, h("strong", {}, "No finished run"), h("span", {}, "There is none in the operator’s folder, or none can be read.")),
      byId("left-out"),
    );
    return;
  }
  byId("dataset").replaceChildren(...datasets.map((name) => h("option", { value: name }, name)));
  filter();
});

byId("dataset").addEventListener("change", filter);
byId("measure").addEventListener("change", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => runs && draw());
let width = innerWidth;
addEventListener("resize", () => {
  if (runs && innerWidth !== width) draw();
  width = innerWidth;
});

function filter() {
  const all = data.runs.filter(({ dataset }) => dataset === byId("dataset").value);
  const lines = [...new Set(all.map(({ line }) => line))];
  all.forEach((run) => {
    const place = lines.indexOf(run.line);
    run.color = data.palette[place % data.palette.length];
    run.symbol = data.symbols[(place + Math.floor(place / data.palette.length)) % data.symbols.length];
  });
  const before = byId("measure").value;
  const measures = Object.keys(TERMS).filter((name) => all.some((run) => run.accuracy[name]));
  byId("measure").replaceChildren(...measures.map((name) => h("option", { value: name }, name[0].toUpperCase() + name.slice(1))));
  if (measures.includes(before)) byId("measure").value = before;
  const methods = [...new Set(all.map(({ method }) => method))];
  const off = new Set();
  byId("methods").replaceChildren(
    ...methods.map((name) =>
      h("label", {},
        h("input", { type: "checkbox", checked: true, autocomplete: "off", onchange: ({ target }) => {
          if (target.checked) off.delete(name);
          else off.add(name);
          runs = all.filter(({ method }) => !off.has(method));
          draw();
        } }), name)),
  );
  runs = all;
  draw();
}

const measure = () => byId("measure").value;
const drawn = () => runs.filter((run) => !hidden.has(run.number) && run.accuracy[measure()]);
const spread = (pair) => (pair ? percent(pair[0]) + (pair[1] === null ? "" : ` ± ${(100 * pair[1]).toFixed(1)}`) : null);

function draw() {
  byId("measure-words").textContent = TERMS[measure()] ?? "";
  const folders = new Set(runs.map(({ folder }) => folder));
  byId("status").textContent = `${counted(runs.length, "line")} of ${counted(folders.size, "folder")}, ${drawn().length} in the figures.`;
  table(folders.size > 1);
  chart();
  clients();
}

// Accuracy against epsilon.

const bounded = ({ privacy }) => privacy.bounded && privacy.epsilon > 0;

function scale(values) {
  const low = Math.max(0, Math.floor(20 * Math.min(...values) - 0.4) / 20);
  const high = Math.min(1, Math.ceil(20 * Math.max(...values) + 0.4) / 20);
  return [low, high];
}

function ticks(low, high, most) {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5].find((each) => (high - low) / each <= most) ?? 0.5;
  return Array.from({ length: Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1 }, (_, i) => (Math.ceil(low / step - 1e-9) + i) * step);
}

function mark(run, x, y, radius, title) {
  const [tag, shape] = (SHAPES[run.symbol] ?? SHAPES.circle)(radius);
  return svg("g", { transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, class: run.privacy.simulated ? "mark hollow" : "mark" },
    svg(tag, { ...shape, fill: run.color }), svg("title", {}, title));
}

const text = (x, y, anchor, words, kind = "") => svg("text", { x, y, "text-anchor": anchor, class: kind }, words);

function chart() {
  const name = measure();
  const points = drawn().filter((run) => !run.zero_shot);
  const levels = new Map(); // of the hand-written prompt, by encoder
  for (const run of drawn()) {
    const level = run.hand_written[name] ?? (run.zero_shot ? run.accuracy[name][0] : undefined);
    if (level !== undefined) levels.set(`${run.encoder} ${level.toFixed(4)}`, level);
  }
  const values = [...points.flatMap(({ accuracy }) => [accuracy[name][0]]), ...levels.values()];
  if (values.length === 0) {
    byId("chart").replaceChildren(h("p", { class: "none" }, "Nothing is chosen."));
    quietKey([]);
    return;
  }
  const within = points.filter(bounded);
  const nothing = points.filter((run) => run.privacy.private && !bounded(run)); // was released
  const open = points.filter((run) => !run.privacy.private && !bounded(run));
  const wide = Math.max(300, byId("chart").clientWidth);
  const [left, right, top, tall] = [44, 12, 14, Math.min(380, Math.max(280, wide * 0.45))];
  const bottom = 46;
  const side = (runs) => (runs.length ? Math.min(150, Math.max(78, wide * 0.18)) : 0);
  const [start, end] = [left + side(nothing), wide - right - side(open)];
  const overSeeds = points.filter(({ over_seeds }) => over_seeds);
  const ends = overSeeds.flatMap(({ accuracy }) => [accuracy[name][0] - (accuracy[name][1] ?? 0), accuracy[name][0] + (accuracy[name][1] ?? 0)]);
  const [low, high] = scale([...values, ...ends]);
  const logs = within.map(({ privacy }) => Math.log10(privacy.epsilon));
  const [from, to] = logs.length ? [Math.min(...logs) - 0.25, Math.max(...logs) + 0.25] : [0, 1];
  const x = (epsilon) => start + 8 + ((Math.log10(epsilon) - from) / (to - from)) * (end - start - 16);
  const y = (value) => tall - bottom - ((value - low) / (high - low)) * (tall - bottom - top);

  const parts = [];
  for (const value of ticks(low, high, 6)) {
    parts.push(svg("line", { x1: left, x2: wide - right, y1: y(value), y2: y(value), class: "grid" }), text(left - 8, y(value) + 4, "end", percent(value, 0), "tick"));
  }
  const known = [...new Set(within.map(({ privacy }) => Number(privacy.epsilon.toPrecision(2))))].sort((a, b) => a - b);
  let last = -Infinity;
  for (const epsilon of known) {
    if (x(epsilon) - last < 34) continue;
    last = x(epsilon);
    parts.push(svg("line", { x1: last, x2: last, y1: tall - bottom, y2: tall - bottom + 5, class: "axis" }), text(last, tall - bottom + 19, "middle", String(epsilon), "tick"));
  }
  if (within.length) parts.push(text((start + end) / 2, tall - 6, "middle", "ε, smaller is more private", "title"));
  const zones = [[nothing, left, start, "nothing released"], [open, end, wide - right, "no bound"]];
  for (const [runs, one, two, words] of zones) {
    if (!runs.length) continue;
    parts.push(svg("rect", { x: one, y: top, width: two - one, height: tall - bottom - top, class: "zone" }), text((one + two) / 2, tall - bottom + 19, "middle", words, "tick"));
  }
  parts.push(svg("line", { x1: left, x2: wide - right, y1: tall - bottom, y2: tall - bottom, class: "axis" }));
  for (const level of levels.values()) {
    // Its name stands at the side where points are farther from it.
    const far = (run) => (run ? Math.abs(run.accuracy[name][0] - level) : 0);
    const ordered = [...within].sort((a, b) => a.privacy.epsilon - b.privacy.epsilon);
    const atEnd = far(ordered.at(-1)) > far(ordered[0]);
    parts.push(svg("line", { x1: left, x2: wide - right, y1: y(level), y2: y(level), class: "level" }),
      text(atEnd ? end - 6 : start + 6, y(level) - 6, atEnd ? "end" : "start", `zero-shot ${percent(level)}`, "label"));
  }
  for (const line of new Set(within.map(({ line, folder }) => `${line}\n${folder}`))) {
    const along = within.filter((run) => `${run.line}\n${run.folder}` === line).sort((a, b) => a.privacy.epsilon - b.privacy.epsilon);
    const path = along.map((run) => `${x(run.privacy.epsilon).toFixed(1)},${y(run.accuracy[name][0]).toFixed(1)}`).join(" ");
    parts.push(svg("polyline", { points: path, class: "line", stroke: along[0].color }));
  }
  const placed = [
    ...within.map((run) => [run, x(run.privacy.epsilon)]),
    ...zones.flatMap(([runs, one, two]) => runs.map((run, place) => [run, one + ((place + 1) * (two - one)) / (runs.length + 1)])),
  ];
  for (const [run, at] of placed) {
    const [mean, deviation] = run.accuracy[name];
    if (run.over_seeds && deviation !== null) parts.push(svg("line", { x1: at, x2: at, y1: y(mean - deviation), y2: y(mean + deviation), class: "line", stroke: run.color }));
    parts.push(mark(run, at, y(mean), 6, `${run.label}: ${spread(run.accuracy[name])}, ${privacyWords(run)}`));
  }
  const words = `Chart of ${name} accuracy against epsilon. ${points.map((run) => `${run.label}: ${percent(run.accuracy[name][0])}, ${privacyWords(run)}`).join("; ")}. ` +
    [...levels.values()].map((level) => `Zero-shot: ${percent(level)}.`).join(" ");
  byId("chart").replaceChildren(svg("svg", { viewBox: `0 0 ${wide} ${tall}`, width: wide, height: tall, role: "img", "aria-label": words }, parts));
  quietKey(points);
  byId("chart-words").textContent =
    "ε is on a logarithmic scale. “No bound” are runs that are not private, at any ε." +
    (overSeeds.length ? " Bars: one sample standard deviation over seeds." : "") +
    (points.some(({ privacy }) => privacy.simulated) ? " Pale marks are simulated noise, which keeps nothing private." : "");
}

function swatch(run) {
  const [tag, shape] = (SHAPES[run.symbol] ?? SHAPES.circle)(5);
  return svg("svg", { class: "swatch", width: 18, height: 16, viewBox: "-9 -8 18 16", "aria-hidden": "true" }, svg(tag, { ...shape, fill: run.color }));
}

function quietKey(points) {
  const lines = new Map(points.map((run) => [run.line, run]));
  byId("chart-key").replaceChildren(...[...lines].map(([line, run]) => h("li", {}, swatch(run), line)));
}

function privacyWords({ privacy, zero_shot: untrained }) {
  if (!privacy.bounded) return "not private";
  if (privacy.epsilon === null || privacy.epsilon === 0) return untrained ? "nothing is learned" : "private: nothing was released";
  const kind = privacy.simulated ? "simulated, not private" : "private";
  return `${kind}: ε = ${privacy.epsilon_words}` + (privacy.delta_words ? `, δ = ${privacy.delta_words}` : "") +
    (privacy.units.length ? ` for each ${privacy.units.join(" or ")}` : "");
}

// The table.

function columns(withFolder) {
  const measures = Object.keys(TERMS).filter((name) => runs.some((run) => run.accuracy[name]));
  const title = (name) => name[0].toUpperCase() + name.slice(1);
  return [
    { title: "Method", of: (run) => run.label, cell: (run) => h("th", { scope: "row" }, h("label", {}, box(run), swatch(run), run.label)) },
    ...(withFolder ? [{ title: "Folder", of: (run) => run.folder }] : []),
    { title: "ε", of: (run) => (run.privacy.bounded ? run.privacy.epsilon ?? 0 : Infinity), cell: (run) => h("td", {}, epsilonCell(run)) },
    ...measures.map((name) => ({ title: title(name), of: (run) => run.accuracy[name]?.[0] ?? -1, cell: (run) => h("td", {}, spread(run.accuracy[name]) ?? n_a()) })),
    { title: "Zero-shot", of: (run) => run.hand_written[measure()] ?? -1, cell: (run) => h("td", {}, run.hand_written[measure()] === undefined ? n_a() : percent(run.hand_written[measure()])) },
    { title: "Clients", of: (run) => run.clients },
    { title: "Rounds", of: (run) => run.rounds },
    { title: "Seeds", of: (run) => run.seeds.length, cell: (run) => h("td", {}, run.seeds.join(", ")) },
    { title: "Up", of: (run) => run.upload_bytes, cell: (run) => h("td", {}, size(run.upload_bytes)) },
    { title: "Encoder", of: (run) => run.encoder },
  ];
}

function epsilonCell(run) {
  const words = privacyWords(run);
  const short = !run.privacy.bounded ? "not private" : run.privacy.epsilon ? run.privacy.epsilon_words : "0";
  return h("span", { title: words, class: run.privacy.bounded && !run.privacy.simulated ? null : "exposed" },
    short + (run.privacy.simulated && run.privacy.bounded ? ", simulated" : ""));
}

function box(run) {
  const box = h("input", { type: "checkbox", autocomplete: "off", onchange: ({ target }) => {
    if (target.checked) hidden.delete(run.number);
    else hidden.add(run.number);
    draw();
    // The table was made anew.
    document.querySelector(`input[data-run="${run.number}"]`)?.focus();
  }, "data-run": run.number });
  box.checked = !hidden.has(run.number);
  return box;
}

function table(withFolder) {
  const all = columns(withFolder);
  const by = all.find(({ title }) => title === sorting.column);
  const sorted = [...runs];
  if (by) {
    const order = (one, two) => (typeof one === "string" ? one.localeCompare(two, "en", { numeric: true }) : one < two ? -1 : one > two ? 1 : 0);
    sorted.sort((one, two) => (sorting.down ? -1 : 1) * order(by.of(one), by.of(two)));
  }
  byId("head").replaceChildren(
    ...all.map(({ title }) =>
      h("th", { scope: "col", "aria-sort": by?.title === title ? (sorting.down ? "descending" : "ascending") : "none" },
        h("button", { type: "button", class: "sort", onclick: () => sort(title, all) }, title, h("span", { class: "arrow", "aria-hidden": "true" })))),
  );
  byId("rows").replaceChildren(
    ...sorted.map((run) => h("tr", {}, ...all.map(({ of, cell }) => (cell ? cell(run) : h("td", {}, String(of(run))))))),
  );
}

function sort(title, all) {
  const words = typeof all.find((each) => each.title === title).of(runs[0]) === "string";
  if (sorting.column === title) sorting.down = !sorting.down;
  else Object.assign(sorting, { column: title, down: !words && title !== "ε" });
  draw();
  [...document.querySelectorAll("#head button")].find((button) => button.textContent === title)?.focus();
}

// Accuracy by client.

function clients() {
  const name = measure();
  const shown = drawn();
  const wide = Math.max(300, byId("clients").clientWidth);
  const [left, right, row] = [18, 22, 54];
  const tall = shown.length * row + 30;
  const x = (value) => left + value * (wide - left - right);
  const parts = [];
  for (const value of ticks(0, 1, wide > 600 ? 10 : 5)) {
    parts.push(svg("line", { x1: x(value), x2: x(value), y1: 6, y2: tall - 24, class: "grid" }), text(x(value), tall - 8, "middle", percent(value, 0), "tick"));
  }
  shown.forEach((run, place) => {
    const base = place * row + 16;
    parts.push(text(0, base, "start", run.label, "label"));
    const taken = new Map(); // marks of clients with the same accuracy stand above each other
    const known = run.by_client.filter((client) => client[name] !== null);
    const mean = run.accuracy[name][0];
    parts.push(svg("line", { x1: x(0), x2: x(1), y1: base + 16, y2: base + 16, class: "rail" }));
    for (const client of known) {
      const at = Math.round(x(client[name]) / 6);
      const before = taken.get(at) ?? 0;
      taken.set(at, before + 1);
      const off = Math.min(10, 5 * Math.ceil(before / 2)) * (before % 2 ? -1 : 1);
      parts.push(mark(run, x(client[name]), base + 16 + off, 5, `${client.name}: ${percent(client[name])}`));
    }
    parts.push(svg("line", { x1: x(mean), x2: x(mean), y1: base + 6, y2: base + 26, class: "mean" }));
  });
  const words = shown.map((run) => {
    const values = run.by_client.map((client) => client[name]).filter((value) => value !== null);
    return `${run.label}: ${percent(Math.min(...values))} to ${percent(Math.max(...values))} over ${counted(values.length, "client")}`;
  });
  byId("clients").replaceChildren(
    shown.length
      ? svg("svg", { viewBox: `0 0 ${wide} ${tall}`, width: wide, height: tall, role: "img", "aria-label": `Accuracy of each client. ${words.join("; ")}.` }, parts)
      : h("p", { class: "none" }, "Nothing is chosen."),
  );
  const names = [...new Set(shown.flatMap((run) => run.by_client.map((client) => client.name)))];
  byId("clients-more").hidden = shown.length === 0;
  byId("clients-head").replaceChildren(h("th", { scope: "col" }, "Client"), ...shown.map((run) => h("th", { scope: "col" }, run.label)));
  byId("clients-rows").replaceChildren(
    ...names.map((client) => h("tr", {}, h("th", { scope: "row" }, client), ...shown.map((run) => {
      const value = run.by_client.find((each) => each.name === client)?.[name];
      return h("td", {}, value === undefined || value === null ? n_a() : percent(value));
    }))),
  );
}

function leftOut() {
  byId("cut").hidden = !data.cut;
  byId("left-list").replaceChildren(...data.left_out.flatMap(({ folder, why }) => [h("dt", {}, folder), h("dd", {}, why)]));
  byId("left-out").hidden = !data.cut && data.left_out.length === 0;
}
