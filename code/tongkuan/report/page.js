// The page's state is a threshold, a list and a search; whatever changes one of them draws all that depends on it.

const CARDS = 12; // shown at a time
const at = (id) => document.getElementById(id);
const data = await readData();
const state = { threshold: data.start, list: "mistakes", search: "", shown: CARDS };
let texts = null; // of items, for the search; made at the first letter
let matches = null; // Uint8Array by pair while something is searched

const numbers = new Intl.NumberFormat("en"); // toLocaleString would make one at each call
const grouped = (value) => numbers.format(value);

function shortest(value) {
  return String(Number(value.toPrecision(6))).replace("-", "−");
}

function now(called) {
  return { threshold: state.threshold, ...qualityOf(data, called) };
}

function writeFigures(figures) {
  for (const place of document.querySelectorAll("[data-figure]")) {
    const value = figures[place.dataset.figure];
    place.textContent = Number.isInteger(value) && "count" in place.dataset ? grouped(value) : value.toFixed(4);
  }
}

function cells(row, values) {
  values.forEach((value, number) => {
    const cell = row[number];
    if (cell.textContent !== value) cell.textContent = value;
  });
}

function valuesOf(q) {
  const count = q.tp + q.fp + q.fn + q.tn;
  const share = (value) => (count ? value.toFixed(4) : "–");
  return [
    grouped(count), grouped(q.tp + q.fn), grouped(q.fp), grouped(q.fn),
    share(q.f1), share(q.precision), share(q.recall), share(q.accuracy),
  ];
}

// Rows are made once; the slider only changes their texts.
function makeTables() {
  data.groups.forEach((group, number) => {
    const body = at(number === 0 ? "categories" : "presence");
    const counts = new Uint32Array(group.rows.length);
    for (const code of group.codes) counts[code]++;
    if (number > 0) {
      body.append(element("tr", { class: "group" }, element("th", { scope: "rowgroup", colspan: 9 }, group.name)));
    }
    group.places = group.rows.map((name, code) => {
      if (!counts[code]) return null;
      const places = Array.from({ length: 8 }, () => element("td"));
      body.append(element("tr", {}, element("th", { scope: "row" }, name), ...places));
      return places;
    });
  });
}

function writeTables(called) {
  for (const group of data.groups) {
    const found = qualitiesOf(data, group, called);
    group.places.forEach((row, code) => row && cells(row, valuesOf(found[code])));
  }
}

function findMatches() {
  const wanted = plain(state.search).split(/\s+/).filter(Boolean);
  if (!wanted.length) {
    matches = null;
    return;
  }
  texts ??= data.items.map(searchText);
  const holds = wanted.map((word) => texts.map((text) => text.includes(word)));
  matches = new Uint8Array(data.count);
  for (let pair = 0; pair < data.count; pair++) {
    matches[pair] = holds.every((held) => held[data.left[pair]] || held[data.right[pair]]) ? 1 : 0;
  }
}

function writePairs(called) {
  const found = [];
  let count = 0;
  for (const pair of LISTS[state.list](data, called, state.threshold)) {
    if (matches && !matches[pair]) continue;
    if (count++ < state.shown) found.push(pair);
  }
  at("pairs").replaceChildren(...found.map((pair) => card(data, pair, pair < called)));
  const everywhere = matches ? matches.reduce((sum, match) => sum + match, 0) : 0;
  const words = [`${grouped(found.length)} of ${grouped(count)} pairs`];
  if (matches) words.push(`${grouped(everywhere)} of all pairs match the search`);
  at("status").textContent = words.join("; ");
  at("more").hidden = found.length >= count;
  at("everywhere").hidden = !matches || state.list === "all" || everywhere === count;
}

function moveTo(threshold, isFromSlider = false) {
  state.threshold = threshold;
  state.shown = CARDS;
  const place = placeOf(data.slider, threshold);
  if (!isFromSlider) at("slider").value = place;
  at("slider").setAttribute("aria-valuetext", `threshold ${shortest(threshold)}`);
  if (document.activeElement !== at("threshold")) at("threshold").value = Number(threshold.toPrecision(6));
  const called = numCalled(data, threshold);
  const figures = now(called);
  writeFigures(figures);
  writeTables(called);
  writePairs(called);
  moveCharts(figures);
}

function listen() {
  const slider = at("slider");
  slider.min = data.slider.first;
  slider.max = data.slider.last;
  slider.addEventListener("input", () => moveTo(thresholdAt(data.slider, Number(slider.value)), true));
  at("threshold").addEventListener("input", (event) => {
    const value = event.target.valueAsNumber;
    if (Number.isFinite(value)) moveTo(value);
  });
  for (const mark of data.marks) {
    const button = element("button", { type: "button" }, `${mark.name} (${shortest(mark.value)})`);
    button.addEventListener("click", () => moveTo(mark.value));
    at("marks").append(button);
  }
  for (const radio of document.querySelectorAll("input[name=list]")) {
    radio.addEventListener("change", () => show({ list: radio.value, shown: CARDS }));
  }
  at("search").addEventListener("input", (event) => {
    state.search = event.target.value;
    findMatches();
    show({ shown: CARDS });
  });
  at("everywhere").addEventListener("click", () => {
    document.querySelector("input[name=list][value=all]").checked = true;
    show({ list: "all", shown: CARDS });
    at("search").focus(); // the button goes, the focus must not
  });
  at("more").addEventListener("click", () => {
    const first = state.shown;
    show({ shown: state.shown + CARDS });
    at("pairs").children[first]?.setAttribute("tabindex", "-1");
    at("pairs").children[first]?.focus();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

function show(change) {
  Object.assign(state, change);
  writePairs(numCalled(data, state.threshold));
}

function draw() {
  return drawCharts(data.charts, now(numCalled(data, state.threshold)));
}

makeTables();
listen();
moveTo(data.start);
document.documentElement.dataset.figures = "ready";
await draw();
document.documentElement.dataset.charts = "ready";
