// Elements, numbers and texts. All text enters the page as text nodes: no markup of a model is ever parsed.

const DATA = JSON.parse(document.getElementById("report-data").textContent);
const RUNS = DATA.runs;
const SEVERAL = RUNS.length > 1;
const NONE = "\u2013";

// el("p", {class: "note", onclick: f}, "text", child): attributes that are null or false are left out.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// A table. `heads` are [text, is a number]; the first cell of a row is its head; a cell may be several children.
function table(kind, heads, rows) {
  const style = (i) => (heads[i][1] ? "number" : null);
  const head = heads.map(([text], i) => el("th", { scope: "col", class: style(i) }, text));
  const row = ([first, ...cells]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, first),
      ...cells.map((cell, i) => el("td", { class: style(i + 1) }, ...[cell].flat())),
    );
  return el(
    "table",
    { class: kind },
    el("thead", {}, el("tr", {}, ...head)),
    el("tbody", {}, ...rows.map(row)),
  );
}

// What may be wider than the page: it scrolls by itself, with the keyboard, too.
function scroller(label, child) {
  return el("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": label }, child);
}

function announce(text) {
  document.getElementById("announce").textContent = text;
}

// What the reader chose is kept in the browser, where it allows that.
const memory = {
  get(key, otherwise) {
    try {
      return localStorage.getItem("r1zero." + key) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(key, value) {
    try {
      localStorage.setItem("r1zero." + key, value);
    } catch {
      /* private window: not kept */
    }
  },
};

// A radio group drawn as one bar. `choices` are [value, label].
function segmented(fieldset, name, choices, chosen, change) {
  for (const [value, label] of choices) {
    const input = el("input", {
      type: "radio",
      name,
      value,
      checked: value === chosen,
      onchange: () => change(value),
    });
    fieldset.append(el("label", {}, input, el("span", {}, label)));
  }
}

// Numbers. A kind is how a value is written; its unit stands on the axis.
const UNITS = {
  share: "%",
  tokens: "tokens",
  seconds: "s",
  gigabytes: "GB",
  nats: "nats",
  rate: "tokens/s",
  count: "",
  score: "",
  plain: "",
};

function grouped(value, digits = 0) {
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// About three digits that mean something.
function significant(value) {
  if (value >= 1000) return grouped(value);
  if (value >= 100) return value.toFixed(0);
  if (value >= 10) return value.toFixed(1);
  if (value >= 0.1 || value === 0) return value.toFixed(2);
  if (value >= 0.001) return value.toFixed(4);
  return value.toExponential(1);
}

function formatted(value, kind) {
  if (value === null || value === undefined) return NONE;
  return value < 0 ? "\u2212" + unsigned(-value, kind) : unsigned(value, kind);
}

function unsigned(value, kind) {
  switch (kind) {
    case "share":
      return (value * 100).toFixed(1) + "%";
    case "seconds":
      return value < 1 ? Math.round(value * 1000) + " ms" : duration(value);
    case "gigabytes":
      return value.toFixed(2) + " GB";
    case "tokens":
      return grouped(value, value < 1000 && !Number.isInteger(value) ? 1 : 0);
    case "rate":
      return grouped(value);
    case "count":
      return grouped(value);
    case "score":
      return value.toFixed(2);
    default:
      return significant(value);
  }
}

function duration(seconds) {
  if (seconds < 100) return seconds.toFixed(1) + " s";
  if (seconds < 7200) return (seconds / 60).toFixed(1) + " min";
  return (seconds / 3600).toFixed(1) + " h";
}

function mean(values) {
  const known = values.filter((value) => typeof value === "number");
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function plural(count, noun) {
  return `${grouped(count)} ${noun}${count === 1 ? "" : "s"}`;
}

// Texts. What would be invisible or would reorder the page is shown as a sign of its own.
const BIDI = {
  0x061c: "ALM",
  0x200e: "LRM",
  0x200f: "RLM",
  0x202a: "LRE",
  0x202b: "RLE",
  0x202c: "PDF",
  0x202d: "LRO",
  0x202e: "RLO",
  0x2066: "LRI",
  0x2067: "RLI",
  0x2068: "FSI",
  0x2069: "PDI",
};
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

function visible(text) {
  return text.replace(/\r\n/g, "\n").replace(HIDDEN, (sign) => {
    const code = sign.charCodeAt(0);
    if (BIDI[code]) return `\u27e6${BIDI[code]}\u27e7`;
    return code === 0x7f ? "\u2421" : String.fromCharCode(0x2400 + code);
  });
}

function literal(text) {
  return text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
}

// Append a text, with what was searched for marked and the model's special tokens dimmed.
function appendText(node, text, query = "") {
  const pattern = /<\|[^|<>]{1,40}\|>|<\/?s>/.source + (query ? "|" + literal(query) : "");
  const whole = visible(text);
  let end = 0;
  for (const match of whole.matchAll(new RegExp(pattern, "gi"))) {
    node.append(whole.slice(end, match.index));
    const found = query && match[0].toLowerCase() === query.toLowerCase();
    node.append(el(found ? "mark" : "span", found ? {} : { class: "token" }, match[0]));
    end = match.index + match[0].length;
  }
  node.append(whole.slice(end));
  return node;
}

// The packed part of a step: base64 of zlib of JSON.
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}
