// The timeline of a step: a row for each rank, a bar for each span. What is no bar is waiting.

const NICE = [1, 2, 5];

// Distance of ticks, in milliseconds, for about six of them.
function tickDistance(total) {
  for (let power = 1e-3; ; power *= 10) {
    const found = NICE.find((digit) => total / (digit * power) <= 7);
    if (found) return found * power;
  }
}

class Timeline {
  constructor(run) {
    this.run = run;
    this.steps = Object.keys(run.packed)
      .map(Number)
      .sort((a, b) => a - b);
    this.slider = el("input", {
      type: "range",
      min: 0,
      max: Math.max(0, this.steps.length - 1),
      value: Math.max(0, this.steps.length - 1),
      "aria-label": "Step of the timeline",
      oninput: () => this.draw(),
    });
    this.title = el("output", { class: "at" });
    this.rows = el("div", { class: "ranks" });
    this.readout = el("p", { class: "note readout" });
    const move = (by) => () => {
      this.slider.value = +this.slider.value + by;
      this.draw();
    };
    this.node = el(
      "article",
      { class: "chart timeline" },
      el(
        "header",
        {},
        el("h3", {}, SEVERAL ? `One step by role: ${run.label}` : "One step by role"),
        el(
          "div",
          { class: "stepper" },
          el("button", { type: "button", "aria-label": "Earlier step", onclick: move(-1) }, "\u2039"),
          this.slider,
          el("button", { type: "button", "aria-label": "Later step", onclick: move(1) }, "\u203a"),
          this.title,
        ),
      ),
      el(
        "div",
        { class: "lines" },
        ...[...PHASES, "wait"].map((name) =>
          el(
            "span",
            { class: "line" },
            el("span", { class: `swatch block phase-${name}` }),
            el("span", { class: "label" }, name),
          ),
        ),
      ),
      this.rows,
      this.readout,
    );
    this.draw();
  }

  async draw() {
    const step = this.steps[+this.slider.value];
    const content = step === undefined ? null : await this.run.content(step);
    if (step !== this.steps[+this.slider.value]) return; // the reader has moved on
    if (!content?.spans?.length) {
      this.title.textContent = step === undefined ? "" : `step ${step}`;
      this.rows.replaceChildren(
        el("p", { class: "empty" }, "No spans were recorded: logs/spans.jsonl is missing or empty."),
      );
      this.readout.textContent = "";
      return;
    }
    const total = Math.max(...content.spans.map((span) => span[3]));
    this.title.textContent = `step ${step} \u00b7 ${formatted(total / 1000, "seconds")}`;
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    const ranks = [...new Set(content.spans.map((span) => span[0]))].sort(
      (a, b) => this.order(a) - this.order(b) || a - b,
    );
    this.rows.replaceChildren(
      ...ranks.map((rank) =>
        this.row(
          rank,
          content.spans.filter((span) => span[0] === rank),
          total,
        ),
      ),
      this.axis(total),
    );
    this.readout.textContent =
      "Colour: work. Hatched: blocked by another role. Empty: nothing to do. " +
      "Right: share of the step spent working.";
  }

  order(rank) {
    const role = ROLES.indexOf(this.run.roles[rank]?.[0]);
    return (this.run.roles[rank]?.length ?? 0) > 1 ? 0 : role;
  }

  row(rank, spans, total) {
    const roles = this.run.roles[rank] ?? [];
    const seen = {};
    const bars = spans.map(([, name, start, end]) => {
      const turn = (seen[name] = (seen[name] ?? 0) + 1);
      const width = ((end - start) / total) * 100;
      if (width < 0.05) return null;
      const text =
        `rank ${rank}, ${name}${turn > 1 || this.often(spans, name) ? ` ${turn}` : ""}: ` +
        `${formatted((end - start) / 1000, "seconds")}, from ${formatted(start / 1000, "seconds")}`;
      return el("span", {
        class: `bar phase-${PHASES.includes(name) || name === "wait" ? name : "other"}`,
        title: text,
        style: `left:${((start / total) * 100).toFixed(3)}%;width:${width.toFixed(3)}%`,
        onpointerenter: () => {
          this.readout.textContent = text;
        },
      });
    });
    const busy =
      spans.filter((span) => span[1] !== "wait").reduce((sum, span) => sum + span[3] - span[2], 0) / total;
    const names = roles.length === ROLES.length ? "all roles" : roles.join(" + ");
    return el(
      "div",
      { class: "rank" },
      el("span", { class: "who" }, names ? el("b", {}, names) : null, ` rank ${rank}`),
      el("span", { class: "track" }, ...bars),
      el("span", { class: "busy" }, formatted(busy, "share")),
    );
  }

  often(spans, name) {
    return spans.filter((span) => span[1] === name).length > 1;
  }

  axis(total) {
    const distance = tickDistance(total);
    const ticks = [];
    for (let at = 0; at <= total * 0.97; at += distance) {
      ticks.push(
        el(
          "span",
          { style: `left:${((at / total) * 100).toFixed(3)}%` },
          total >= 2000 ? `${+(at / 1000).toFixed(3)}` : `${+at.toFixed(3)}`,
        ),
      );
    }
    return el(
      "div",
      { class: "rank time" },
      el("span", { class: "who" }, total >= 2000 ? "seconds" : "milliseconds"),
      el("span", { class: "track" }, ...ticks),
      el("span", { class: "busy" }),
    );
  }
}
