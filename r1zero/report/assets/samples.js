// The sample browser: filters, a list of what they leave, and the chosen sample in full.

const PAGE = matchMedia("(max-width: 760px)").matches ? 12 : 50; // list entries drawn at a time
const ORDERS = {
  newest: ["newest first", (a, b) => b.step - a.step],
  oldest: ["oldest first", (a, b) => a.step - b.step],
  best: ["highest reward", (a, b) => b.reward - a.reward || b.step - a.step],
  worst: ["lowest reward", (a, b) => a.reward - b.reward || b.step - a.step],
  longest: ["longest", (a, b) => b.length - a.length],
  shortest: ["shortest", (a, b) => a.length - b.length],
};

// A control under its label; `name` where the label alone says too little.
function field(label, control, name = label) {
  control.setAttribute("aria-label", name);
  return el("label", { class: "field" }, el("span", {}, label), control);
}

function select(choices, change) {
  return el(
    "select",
    { onchange: change },
    ...choices.map(([value, label]) => el("option", { value }, label)),
  );
}

class SampleBrowser {
  constructor(samples, openPrompt) {
    this.samples = samples;
    this.openPrompt = openPrompt;
    this.rules = [...new Set(samples.flatMap((sample) => Object.keys(sample.scores)))];
    this.node = el(
      "div",
      { class: "browser" },
      this.filters(),
      (this.count = el("p", { class: "count", "aria-live": "polite" })),
      el(
        "div",
        { class: "panes" },
        (this.list = el("div", {
          class: "list",
          role: "group",
          "aria-label": "Samples found",
          onkeydown: (event) => this.key(event),
        })),
        (this.detail = el("div", {
          class: "detail",
          tabindex: "-1",
          "aria-label": "Chosen sample",
          role: "region",
        })),
      ),
    );
    this.apply();
  }

  filters() {
    const later = () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.apply(), 120);
    };
    const now = () => this.apply();
    const input = (type, extra = {}) => el("input", { type, oninput: later, ...extra });
    this.query = input("search", { placeholder: "in question, response, ground truth" });
    this.from = input("number", { placeholder: "first", inputmode: "numeric" });
    this.to = input("number", { placeholder: "last", inputmode: "numeric" });
    this.low = input("number", { step: "any", placeholder: "min" });
    this.high = input("number", { step: "any", placeholder: "max" });
    this.order = select(
      Object.entries(ORDERS).map(([value, [label]]) => [value, label]),
      now,
    );
    this.outcomes = this.rules.map((rule) => [
      rule,
      select([["", "any"], ...Object.entries(OUTCOMES).map(([value, { word }]) => [value, word])], now),
    ]);
    this.runs = SEVERAL
      ? select([["", "all runs"], ...RUNS.map((run, i) => [String(i), run.label])], now)
      : null;
    this.problems = this.samples.some((sample) => sample.heldOut)
      ? select(
          [
            ["", "all"],
            ["training", "training"],
            ["heldOut", "held out"],
          ],
          now,
        )
      : null;
    this.truncated = input("checkbox");
    return el(
      "form",
      {
        class: "filters",
        role: "search",
        "aria-label": "Filter samples",
        onsubmit: (e) => e.preventDefault(),
        onreset: () => setTimeout(now),
      },
      el("label", { class: "field wide" }, el("span", {}, "Search"), this.query),
      this.runs ? field("Run", this.runs) : null,
      this.problems ? field("Problems", this.problems) : null,
      el("div", { class: "pair" }, field("Step from", this.from), field("to", this.to, "Step to")),
      el("div", { class: "pair" }, field("Reward from", this.low), field("to", this.high, "Reward to")),
      ...this.outcomes.map(([rule, control]) => field(rule, control)),
      field("Order", this.order),
      el("label", { class: "field check" }, this.truncated, el("span", {}, "cut off only")),
      el("button", { type: "reset", class: "plain-button" }, "Clear"),
    );
  }

  apply() {
    const number = (input, otherwise) => (input.value === "" ? otherwise : Number(input.value));
    const query = this.query.value.toLowerCase();
    const [from, to] = [number(this.from, -Infinity), number(this.to, Infinity)];
    const [low, high] = [number(this.low, -Infinity), number(this.high, Infinity)];
    const outcomes = this.outcomes.filter(([, control]) => control.value);
    const run = this.runs?.value ? RUNS[+this.runs.value] : null;
    const problems = this.problems?.value;
    this.found = this.samples
      .filter(
        (sample) =>
          (!run || sample.run === run) &&
          (!problems || sample.heldOut === (problems === "heldOut")) &&
          sample.step >= from &&
          sample.step <= to &&
          sample.reward >= low &&
          sample.reward <= high &&
          (!this.truncated.checked || sample.truncated) &&
          outcomes.every(([rule, control]) => sample.scores[rule]?.outcome === control.value) &&
          (!query ||
            sample.response.toLowerCase().includes(query) ||
            sample.prompt.question.toLowerCase().includes(query) ||
            sample.prompt.truth.toLowerCase().includes(query)),
      )
      .sort(ORDERS[this.order.value][1]);
    this.count.textContent =
      this.found.length === this.samples.length
        ? plural(this.samples.length, "sample")
        : `${grouped(this.found.length)} of ${plural(this.samples.length, "sample")}`;
    this.list.replaceChildren();
    if (!this.found.length) {
      this.list.append(
        el("p", { class: "empty" }, "No sample passes these filters. \u201cClear\u201d brings all back."),
      );
      this.detail.replaceChildren();
      return;
    }
    this.more(0);
    this.choose(0, false);
  }

  // Draw the next page of the list.
  more(start) {
    this.list.querySelector(".more")?.remove();
    const end = Math.min(this.found.length, start + PAGE);
    for (let i = start; i < end; i++) this.list.append(this.entry(this.found[i], i));
    if (end < this.found.length) {
      this.list.append(
        el(
          "button",
          {
            type: "button",
            class: "more plain-button",
            onclick: () => {
              this.more(end);
              this.list.querySelectorAll(".entry")[end].focus();
            },
          },
          `Show ${Math.min(PAGE, this.found.length - end)} more`,
        ),
      );
    }
  }

  entry(sample, i) {
    return el(
      "button",
      { type: "button", class: "entry", "aria-pressed": "false", onclick: () => this.choose(i, true) },
      rewardBadge(sample),
      el(
        "span",
        { class: "entry-text" },
        el("span", { class: "question", dir: "auto" }, visible(sample.prompt.question.slice(0, 160))),
        el(
          "span",
          { class: "entry-line" },
          (SEVERAL ? sample.run.label + " \u00b7 " : "") +
            when(sample) +
            (sample.heldOut ? `, held out${sample.set ? ` (${sample.set})` : ""}` : ""),
          ...chips(sample),
          sample.truncated ? el("span", { class: "chip timeout" }, "cut off") : null,
        ),
      ),
    );
  }

  choose(i, byReader) {
    const sample = this.found[i];
    this.list
      .querySelectorAll(".entry")
      .forEach((entry, at) => entry.setAttribute("aria-pressed", String(at === i)));
    this.detail.replaceChildren(this.full(sample));
    this.node.classList.toggle("reading", byReader);
    if (byReader && this.list.offsetParent === null) {
      // one pane at a time on a small screen
      this.detail.focus();
      this.node.scrollIntoView();
    }
  }

  back() {
    this.node.classList.remove("reading");
    this.list.querySelector('[aria-pressed="true"]')?.focus();
  }

  full(sample) {
    const { prompt } = sample,
      steps = new Set(prompt.samples.map((other) => other.step));
    const query = this.query.value;
    return el(
      "article",
      { class: "sample" },
      el(
        "button",
        { type: "button", class: "back plain-button", onclick: () => this.back() },
        "\u2039 Back to the list",
      ),
      facts([
        [sample.heldOut ? "Held out, after step" : "Step", String(sample.step)],
        ["Reward", formatted(sample.reward, "score")],
        ["Advantage", sample.heldOut ? null : formatted(sample.advantage, "score")],
        ["Length", `${formatted(sample.length, "tokens")} tokens${sample.truncated ? ", cut off" : ""}`],
        ["Data row", prompt.index === undefined ? null : grouped(prompt.index)],
        ["Data set", sample.set || null],
        ["Run", SEVERAL ? sample.run.label : null],
      ]),
      el("h4", {}, "Question"),
      appendText(el("p", { class: "text question-text", dir: "auto" }), prompt.question, query),
      el(
        "details",
        {},
        el("summary", {}, "Whole prompt"),
        appendText(el("p", { class: "text prompt", dir: "auto" }), prompt.text, query),
      ),
      el("h4", {}, "Response"),
      responseBlocks(sample, query),
      el("h4", {}, "Ground truth"),
      appendText(el("p", { class: "text truth", dir: "auto" }), prompt.truth, query),
      el("h4", {}, "Scores"),
      scoreTable(sample),
      el(
        "button",
        { type: "button", class: "plain-button", onclick: () => this.openPrompt(prompt) },
        `All ${prompt.samples.length} answers to this question` +
          (steps.size > 1 ? `, side by side over ${steps.size} steps` : ""),
      ),
    );
  }

  // Up and down move through the list.
  key(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const entries = [...this.list.querySelectorAll(".entry")];
    const to = entries.indexOf(document.activeElement) + by;
    if (!by || !entries[to]) return;
    event.preventDefault();
    entries[to].focus();
    this.choose(to, false);
  }
}
