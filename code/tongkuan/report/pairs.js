// A pair as a card: two listings, what differs between them, and the verdict. All text is set as text, never as HTML.

const STATES = ["", "names no picture", "no such picture file", "picture cannot be read"];
const MOST_TOKENS = 400; // of a title that are compared

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// Words and numbers whole, other characters one by one, as Chinese is read.
function tokensOf(text) {
  return text.match(/[\p{Script=Latin}\p{Mark}]+|\p{Number}+|[\s\S]/gu) ?? [];
}

function plain(token) {
  return token.normalize("NFKC").toLowerCase();
}

// For each of two token lists, which tokens are not in their longest common subsequence.
function differing(left, right) {
  const a = left.slice(0, MOST_TOKENS).map(plain);
  const b = right.slice(0, MOST_TOKENS).map(plain);
  const width = b.length + 1;
  const best = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      best[i * width + j] =
        a[i] === b[j]
          ? best[(i + 1) * width + j + 1] + 1
          : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    }
  }
  const marks = [left.map(() => true), right.map(() => true)];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) marks[0][i++] = marks[1][j++] = false;
    else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i++;
    else j++;
  }
  return marks;
}

function markedText(tokens, marks) {
  const parts = [];
  for (let start = 0, end = 0; start < tokens.length; start = end) {
    while (end < tokens.length && marks[end] === marks[start]) end++;
    const text = tokens.slice(start, end).join("");
    parts.push(marks[start] && text.trim() ? element("mark", {}, text) : text);
  }
  return parts;
}

function pictureOf(data, number) {
  const [id, title, , , name, state] = data.items[number];
  const image = data.pictures[number];
  if (image) return element("img", { src: `data:image/jpeg;base64,${image}`, alt: `picture of ${title || id}` });
  const why = state ? STATES[state] : "picture not in this page";
  return element("div", { class: "no-picture" }, element("strong", {}, why), element("span", {}, name));
}

function listing(data, number, tokens, marks) {
  const [id, , category] = data.items[number];
  return element(
    "div", { class: "listing" },
    pictureOf(data, number),
    element("p", { class: "title" }, ...(tokens.length ? markedText(tokens, marks) : ["(no title)"])),
    element("p", { class: "quiet" }, id, ...(category ? [" · ", category] : [])),
  );
}

function attributeTable(left, right) {
  const keys = [...new Set([...Object.keys(left), ...Object.keys(right)])];
  if (!keys.length) return element("p", { class: "quiet" }, "Neither listing has attributes.");
  const rows = keys.map((key) => {
    const [a, b] = [left[key], right[key]];
    const kind = a === undefined || b === undefined ? "one-sided" : a === b ? "alike" : "unlike";
    const sign = { "one-sided": b === undefined ? "left only" : "right only", alike: "=", unlike: "≠" }[kind];
    return element(
      "tr", { class: kind },
      element("th", { scope: "row" }, key),
      element("td", {}, a ?? "—"),
      element("td", { class: "sign" }, sign),
      element("td", {}, b ?? "—"),
    );
  });
  const names = ["attribute", "left", "", "right"];
  const head = names.map((name) => (name ? element("th", { scope: "col" }, name) : element("td", {})));
  return element("table", { class: "attributes" },
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
}

function figure(name, value, digits = 4) {
  return element("span", {}, `${name} `, element("b", {}, value.toFixed(digits).replace("-", "−")));
}

function verdictOf(data, pair, isCalled) {
  const isSame = data.labels[pair] === 1;
  const words = isCalled ? "called the same" : "called different";
  if (data.labels[pair] === null) return element("span", { class: "verdict" }, `${words}; no label`);
  const truth = isSame ? "labelled the same" : "labelled different";
  const isRight = isCalled === isSame;
  const text = isRight ? `✓ ${words}, rightly` : `✗ ${words}, ${truth}`;
  return element("span", { class: `verdict ${isRight ? "right" : "wrong"}` }, text);
}

// Never 0 or 1: no score is that sure.
function probabilityOf(data, pair) {
  const value = data.probabilities[pair];
  const digits = value < 0.001 ? "< 0.001" : value > 0.999 ? "> 0.999" : value.toFixed(3);
  const doubt = data.calibrated ? [] : [element("span", { class: "quiet" }, " not calibrated")];
  return element("span", {}, "P(same) ", element("b", {}, digits), ...doubt);
}

function scoreLine(data, pair, isCalled) {
  const decision = [verdictOf(data, pair, isCalled)];
  if (data.probabilities) decision.push(probabilityOf(data, pair));
  const parts = [element("span", { class: "decision" }, ...decision), figure("score", data.scores[pair])];
  if (data.commodity) {
    parts.push(figure("q·q", data.commodity[pair]), figure("p·p", data.adaptive[pair]));
  }
  if (data.thresholds) parts.push(figure("own threshold", data.thresholds[pair]));
  if (data.changed?.[pair]) {
    parts.push(element("span", { class: "quiet" }, "the other result says otherwise"));
  }
  return element("p", { class: "scores" }, ...parts);
}

function card(data, pair, isCalled) {
  const numbers = [data.left[pair], data.right[pair]];
  const [left, right] = numbers.map((number) => data.items[number]);
  const tokens = [tokensOf(left[1]), tokensOf(right[1])];
  const marks = differing(...tokens);
  return element(
    "li", { class: "pair", "data-pair": pair },
    scoreLine(data, pair, isCalled),
    element("div", { class: "sides" }, ...numbers.map((number, side) => listing(data, number, tokens[side], marks[side]))),
    attributeTable(left[3], right[3]),
  );
}

// What a search looks through: ids, titles, categories and attribute values, as the model reads them.
function searchText([id, title, category, attributes]) {
  return plain([id, title, category, ...Object.values(attributes)].join("\n"));
}
