// Charts: one cursor for all of them, values of the cursor's step beside the names.

const charts = [];
const hiddenRuns = new Set();
let smoothing = SPANS[memory.get("smoothing", "off")] ?? 0;

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.hidden = new Set();
    this.unit = spec.unit ?? UNITS[spec.kind];
    this.build();
    charts.push(this);
    new ResizeObserver(() => this.resize()).observe(this.plot);
  }

  build() {
    const { spec } = this;
    this.at = el("span", { class: "at" });
    this.values = spec.lines.map(() => el("span", { class: "value" }));
    this.buttons = spec.lines.map((line, i) => (line.ghost ? null : this.lineButton(line, i)));
    const band = spec.band
      ? el(
          "span",
          { class: "line" },
          el("span", { class: "swatch faint", style: `--swatch: var(${spec.bandColor})` }),
          el("span", { class: "label" }, spec.bandLabel),
          (this.bandValue = el("span", { class: "value" })),
        )
      : null;
    this.plot = el("div", {
      class: "plot",
      tabindex: "0",
      role: "img",
      onkeydown: (event) => this.key(event),
    });
    this.node = el(
      "article",
      { class: "chart" },
      el("header", {}, el("h3", {}, spec.title), this.at),
      el("div", { class: "lines" }, ...[...this.buttons, band].filter(Boolean)),
      this.plot,
      spec.note ? el("p", { class: "note" }, spec.note) : null,
    );
    this.show(null);
  }

  // Name and value of a line; pressing it hides the line.
  lineButton(line, i) {
    const swatch = {
      class: `swatch${line.dash?.length ? " dashed" : ""}`,
      style: `--swatch: var(${line.color})`,
    };
    return el(
      "button",
      {
        type: "button",
        class: "line",
        "aria-pressed": "true",
        title: `Show or hide ${line.label}`,
        onclick: () => this.toggle(i),
      },
      el("span", swatch),
      el("span", { class: "label" }, line.label),
      this.values[i],
    );
  }

  toggle(i) {
    if (!this.hidden.delete(i)) this.hidden.add(i);
    this.buttons[i].setAttribute("aria-pressed", String(!this.hidden.has(i)));
    this.draw();
  }

  isHidden(i) {
    return this.hidden.has(i) || hiddenRuns.has(this.spec.lines[i].run);
  }

  // Rows of uPlot's data with the series that draws each: what lies below comes first.
  layers() {
    const { spec } = this;
    const clean = (value) => (spec.log && typeof value === "number" && value <= 0 ? null : value);
    const raw = spec.lines.map((line) => onAxis(line.run, valuesOf(line.run, line).map(clean)));
    this.raw = raw;
    const rows = [],
      series = [],
      bands = [];
    const add = (row, options) => {
      rows.push(row);
      return series.push(options);
    }; // its number in uPlot
    if (spec.stacked) {
      let total = STEPS.map(() => 0),
        below = null;
      spec.lines.forEach((line, i) => {
        if (line.overlay || this.isHidden(i)) return;
        total = smoothed(raw[i], smoothing).map((value, x) => total[x] + (value ?? 0));
        const row = total.map((value, x) => (raw[i][x] === undefined ? undefined : value));
        const number = add(row, {
          stroke: () => color(line.color),
          width: 1,
          points: { show: STEPS.length === 1 },
          fill: below ? undefined : () => color(line.color),
        });
        if (below) bands.push({ series: [number, below], fill: () => color(line.color) });
        below = number;
      });
    }
    const ends = [];
    spec.lines.forEach((line, i) => {
      if ((spec.stacked && !line.overlay) || this.isHidden(i)) return;
      const stroke = () => color(line.color);
      if (smoothing && !line.ghost)
        add(raw[i], { stroke: () => color(line.color) + "48", width: 1, points: { show: false } });
      const number = add(
        smoothed(raw[i], smoothing),
        line.ghost
          ? { stroke: () => color(line.color) + "30", width: 1, points: { show: false } }
          : { stroke, width: line.width ?? 2, dash: line.dash, points: { size: 5, fill: stroke } },
      );
      if (spec.band?.includes(line.key)) ends.push(number);
    });
    if (ends.length === 2)
      bands.push({ series: ends.reverse(), fill: () => color(this.spec.bandColor) + "26" });
    return { rows, series, bands };
  }

  draw() {
    const zoom = this.u && [this.u.scales.x.min, this.u.scales.x.max];
    this.u?.destroy();
    const { rows, series, bands } = this.layers();
    this.u = new uPlot(this.options(series, bands), [STEPS, ...rows], this.plot);
    if (zoom && zoom[0] !== null && STEPS.length > 1) this.u.setScale("x", { min: zoom[0], max: zoom[1] });
    this.describe();
  }

  options(series, bands) {
    const { spec } = this;
    const axis = {
      stroke: () => color("--muted"),
      font: "11px system-ui, sans-serif",
      labelSize: 16,
      labelFont: "11px system-ui, sans-serif",
      labelGap: 0,
      grid: { stroke: () => color("--grid"), width: 1 },
      ticks: { show: false },
    };
    const only = STEPS.length === 1 ? [STEPS[0] - 1, STEPS[0] + 1] : null;
    const decades = (u, axisNumber, low, high) => {
      const first = Math.floor(Math.log10(low)),
        last = Math.ceil(Math.log10(high));
      return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
    };
    const range = (u, low, high) => {
      if (low === null) return [0, 1];
      const room = (high - low || Math.abs(high) || (spec.kind === "share" ? 0.1 : 1)) * 0.08;
      return [spec.zero && low >= 0 ? 0 : low - room, high + room];
    };
    return {
      width: this.plot.clientWidth || 320,
      height: 190,
      legend: { show: false },
      padding: [8, 12, 0, 0],
      cursor: { sync: { key: "steps" }, points: { size: 7 }, drag: { x: true, y: false } },
      scales: {
        x: { time: false, range: only ? () => only : undefined },
        y: spec.log ? { distr: 3 } : { range },
      },
      axes: [
        { ...axis, size: 24, label: "step", incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] },
        {
          ...axis,
          size: 42,
          label: this.unit || undefined,
          space: 34,
          ...(spec.log ? { splits: decades } : {}),
          values: (u, splits) => this.ticks(splits),
        },
      ],
      series: [{}, ...series],
      bands,
      hooks: { setCursor: [(u) => this.show(u.cursor.idx ?? null)], draw: [(u) => this.markBreaks(u)] },
    };
  }

  // Tick labels: the unit is on the axis, so only the number, with the digits that its neighbours need.
  ticks(splits) {
    const { kind, log } = this.spec,
      scale = kind === "share" ? 100 : 1;
    const gap = splits.length > 1 ? Math.abs(splits[1] - splits[0]) * scale : 1;
    const largest = Math.max(...splits.map(Math.abs)) * scale;
    let digits = 0;
    while (digits < 6 && Math.abs(gap * 10 ** digits - Math.round(gap * 10 ** digits)) > 1e-6) digits++;
    return splits.map((value) => {
      if (value === 0) return "0";
      const sign = value < 0 ? "\u2212" : "",
        size = Math.abs(value) * scale;
      if (log || largest < 0.001) return sign + (+size.toPrecision(2)).toExponential().replace("e+", "e");
      if (largest >= 10000) return sign + `${+(size / 1000).toFixed(1)}k`;
      return sign + size.toFixed(digits);
    });
  }

  // A dotted line where a run went on after a stop, a dashed one where its reference was reset.
  markBreaks(u) {
    const shown = RUNS.filter((run) => !hiddenRuns.has(run));
    const before = shown.flatMap((run) => run.resumed.map((step) => step - 0.5));
    const after = shown.flatMap((run) => run.resets.map((step) => step + 0.5));
    this.markAt(u, new Set(before), [2, 4]);
    this.markAt(u, new Set(after), [8, 4]);
  }

  // Vertical lines at these places between steps.
  markAt(u, places, dash) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = color("--muted");
    ctx.setLineDash(dash);
    for (const place of places) {
      const x = Math.round(u.valToPos(place, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  // Values at the cursor; without one, the last of each line.
  show(index) {
    const { lines, kind } = this.spec;
    this.at.textContent = index === null ? "" : `step ${STEPS[index]}`;
    this.values.forEach((node, i) => {
      const row = this.raw?.[i] ?? [];
      node.textContent = formatted(
        index === null ? row.findLast((value) => typeof value === "number") : row[index],
        kind,
      );
    });
    if (this.spec.band) {
      const ends = lines.map((line, i) => (line.ghost ? this.values[i].textContent : null)).filter(Boolean);
      this.bandValue.textContent = ends.join("\u2013");
    }
    this.index = index;
    return lines.map((line, i) => `${line.label} ${this.values[i].textContent}`).join(", ");
  }

  describe() {
    const ends = this.spec.lines.map((line, i) => {
      const known = this.raw[i].filter((value) => typeof value === "number");
      const [first, last] = [known[0], known.at(-1)].map((value) => formatted(value, this.spec.kind));
      return `${line.label} from ${first} to ${last}`;
    });
    this.plot.setAttribute(
      "aria-label",
      `${this.spec.title} over ${plural(STEPS.length, "step")}: ${ends.join("; ")}. ` +
        "Left and right arrow keys read values.",
    );
    this.show(this.index ?? null);
  }

  // Arrow keys move the cursor of all charts.
  key(event) {
    const last = STEPS.length - 1,
      from = this.index ?? (event.key === "ArrowLeft" ? last + 1 : -1);
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") return this.moveAll(null);
    if (to === undefined) return;
    event.preventDefault();
    this.moveAll(Math.min(last, Math.max(0, to)));
    announce(`step ${STEPS[this.index]}: ${this.show(this.index)}`);
  }

  moveAll(index) {
    for (const chart of charts) {
      if (!chart.u) continue;
      const left = index === null ? -10 : chart.u.valToPos(STEPS[index], "x");
      chart.u.setCursor({ left, top: index === null ? -10 : 1 }, true, false);
      chart.show(index);
    }
  }

  resize() {
    const width = this.plot.clientWidth;
    if (!width) return;
    if (!this.u) this.draw();
    else if (width !== this.u.width) this.u.setSize({ width, height: 190 });
  }
}

function redrawCharts() {
  for (const chart of charts) if (chart.u) chart.draw();
}
