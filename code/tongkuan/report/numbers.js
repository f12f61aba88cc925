// The data, and what follows from them at a threshold. Pairs are sorted: those called the same come first.

const TYPES = { f64: Float64Array, f32: Float32Array, i32: Int32Array, u8: Uint8Array };

function bytesOf(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place++) bytes[place] = letters.charCodeAt(place);
  return bytes;
}

function unpacked(text, type) {
  return text === null ? null : new TYPES[type](bytesOf(text).buffer);
}

async function unzipped() {
  const packed = bytesOf(document.getElementById("data").textContent.trim());
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

async function readData() {
  const data = await unzipped();
  for (const [name, type] of [
    ["left", "i32"], ["right", "i32"], ["labels", "u8"], ["axis", "f64"], ["scores", "f64"], ["thresholds", "f64"],
    ["commodity", "f32"], ["adaptive", "f32"], ["probabilities", "f32"], ["lacking", "u8"], ["changed", "u8"],
  ]) {
    data[name] = unpacked(data[name], type);
  }
  for (const group of data.groups) group.codes = unpacked(group.codes, "u8");
  data.pictures = JSON.parse(document.getElementById("pictures").textContent);
  data.count = data.labels.length;
  data.same = data.labels.reduce((sum, label) => sum + label, 0);
  return data;
}

// How many pairs are called the same: the first place whose score is not greater than the threshold.
function numCalled(data, threshold) {
  let low = 0;
  let high = data.count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (data.axis[middle] > threshold) low = middle + 1;
    else high = middle;
  }
  return low;
}

function ratio(part, whole) {
  return whole ? part / whole : 0;
}

function quality(tp, fp, fn, tn) {
  return {
    tp, fp, fn, tn,
    precision: ratio(tp, tp + fp),
    recall: ratio(tp, tp + fn),
    f1: ratio(2 * tp, 2 * tp + fp + fn),
    accuracy: ratio(tp + tn, tp + fp + fn + tn),
  };
}

function qualityOf(data, called) {
  let tp = 0;
  for (let pair = 0; pair < called; pair++) tp += data.labels[pair];
  return quality(tp, called - tp, data.same - tp, data.count - called - (data.same - tp));
}

// A quality for each row of a group.
function qualitiesOf(data, group, called) {
  const { codes, rows } = group;
  const counts = new Uint32Array(4 * rows.length); // tn, fn, fp, tp of each row
  for (let pair = 0; pair < called; pair++) counts[4 * codes[pair] + 2 + data.labels[pair]]++;
  for (let pair = called; pair < data.count; pair++) counts[4 * codes[pair] + data.labels[pair]]++;
  return rows.map((_, row) => {
    const [tn, fn, fp, tp] = counts.subarray(4 * row);
    return quality(tp, fp, fn, tn);
  });
}

// A slider place is a decimal number, so that the threshold on view is the one that counts.
function thresholdAt(slider, place) {
  return Number(`${place * slider.factor}e${slider.exponent}`);
}

function placeOf(slider, threshold) {
  const place = Math.round(threshold / thresholdAt(slider, 1));
  return Math.min(slider.last, Math.max(slider.first, place));
}

// Numbers of pairs in the order of a list, best first; a list is cut, never sorted, so that it follows the slider.
const LISTS = {
  *mistakes(data, called, threshold) {
    const wrong = [LISTS.different(data, called), LISTS.same(data, called)];
    const heads = wrong.map((list) => list.next().value);
    while (heads[0] !== undefined || heads[1] !== undefined) {
      const sure = heads.map((pair) => (pair === undefined ? -1 : Math.abs(data.axis[pair] - threshold)));
      const side = sure[0] >= sure[1] ? 0 : 1;
      yield heads[side];
      heads[side] = wrong[side].next().value;
    }
  },
  *different(data, called) {
    for (let pair = 0; pair < called; pair++) if (!data.labels[pair]) yield pair;
  },
  *same(data, called) {
    for (let pair = data.count - 1; pair >= called; pair--) if (data.labels[pair]) yield pair;
  },
  *nearest(data, called, threshold) {
    let above = called - 1;
    let below = called;
    while (above >= 0 || below < data.count) {
      const isAbove =
        below >= data.count || (above >= 0 && data.axis[above] - threshold <= threshold - data.axis[below]);
      yield isAbove ? above-- : below++;
    }
  },
  *lacking(data) {
    for (let pair = 0; pair < data.count; pair++) if (data.lacking[pair]) yield pair;
  },
  *changed(data) {
    for (let pair = 0; pair < data.count; pair++) if (data.changed[pair]) yield pair;
  },
  *all(data) {
    for (let pair = 0; pair < data.count; pair++) yield pair;
  },
};
