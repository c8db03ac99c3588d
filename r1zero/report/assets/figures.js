// Figures in words and tables: the key figures of each run, and held-out problems.

// Key figures: mean of the last steps, beside that of the first ones.
const WINDOW = 5;
const FIGURES = [
  ["Reward", "reward/mean", "score"],
  ...RULES.map((rule) => [`${rule} right`, `reward/${rule}/right`, "share"]),
  ["Model score", "reward/model", "score"],
  ["Length", "response_length/mean", "tokens"],
  ["Cut off", "response_truncated", "share"],
  ["Equal groups", "reward/equal_groups", "share"],
  ["KL", "kl", "plain"],
  ["Step", "time/step", "seconds"],
  ["Tokens/s", "throughput/tokens_per_second", "rate"],
];
const ends = (run, key) =>
  [run.series[key]?.slice(0, WINDOW), run.series[key]?.slice(-WINDOW)].map((part) => mean(part ?? []));

function figures() {
  const shown = FIGURES.filter(([, key]) => RUNS.some((run) => ends(run, key)[1] !== null));
  if (!SEVERAL) {
    const enough = RUNS[0].steps.length > WINDOW;
    return el(
      "dl",
      { class: "tiles" },
      ...shown.map(([label, key, kind]) => {
        const [first, last] = ends(RUNS[0], key);
        return el(
          "div",
          { class: "tile" },
          el("dt", {}, label),
          el("dd", {}, formatted(last, kind)),
          enough ? el("dd", { class: "was" }, `from ${formatted(first, kind)}`) : null,
        );
      }),
    );
  }
  const toggles = RUNS.map((run, i) =>
    el(
      "label",
      { class: "run-name" },
      el("input", {
        type: "checkbox",
        checked: true,
        onchange: (event) => {
          if (event.target.checked) hiddenRuns.delete(run);
          else hiddenRuns.add(run);
          redrawCharts();
        },
      }),
      el("span", { class: "swatch", style: `--swatch: var(${COLORS[i % 8]})` }),
      run.label,
    ),
  );
  const heads = [["Run"], ["Steps", true], ...shown.map(([label]) => [label, true])];
  const rows = RUNS.map((run, i) => [
    toggles[i],
    grouped(run.steps.length),
    ...shown.map(([, key, kind]) => formatted(ends(run, key)[1], kind)),
  ]);
  return scroller("Key figures of the runs", table("figures", heads, rows));
}

// Held-out problems, a row a data set of an evaluation: a line of evaluation.jsonl, or its entries before
// and after.
function evaluations() {
  return RUNS.flatMap((run) =>
    run.evaluation.flatMap((entry) => {
      const named = Object.entries(entry).filter(([, value]) => value !== null && typeof value === "object");
      const when = entry.step === undefined ? "evaluation" : `step ${entry.step}`;
      const sets = Object.entries(bySet(entry)).map(([name, values]) => [
        name ? `${name}, ${when}` : when,
        values,
      ]);
      const rows = named.length ? named : sets;
      return rows.map(([name, values]) => [SEVERAL ? `${run.label}, ${name}` : name, values]);
    }),
  );
}

// The scores of a line by data set: each has a pass@1, with its name in front, math500/pass@1, if it has one.
function bySet(entry) {
  const names = Object.keys(entry)
    .filter((key) => key.endsWith("/pass@1"))
    .map((key) => key.slice(0, -"/pass@1".length));
  const sets = {};
  for (const [key, value] of Object.entries(entry)) {
    if (key === "step") continue;
    const name = names.find((each) => key.startsWith(`${each}/`)) ?? "";
    sets[name] ??= {};
    sets[name][name ? key.slice(name.length + 1) : key] = value;
  }
  return sets;
}

function evaluationTable() {
  const rows = evaluations();
  const attempts = [...new Set(rows.flatMap(([, values]) => Object.keys(values)))]
    .filter((key) => /^pass@\d+$/.test(key))
    .sort((a, b) => a.slice(5) - b.slice(5));
  const shown = [
    ...attempts.map((key) => [key, key, "share"]),
    ...RULES.map((rule) => [`${rule} right`, `reward/${rule}/right`, "share"]),
    ["Length", "response_length/mean", "tokens"],
    ["Cut off", "response_truncated", "share"],
  ].filter(([, key]) => rows.some(([, values]) => typeof values[key] === "number"));
  if (!shown.length) return null;
  const interval = (values, key) =>
    typeof values[`${key}/low`] !== "number"
      ? null
      : el(
          "span",
          { class: "interval" },
          ["low", "high"].map((end) => (values[`${key}/${end}`] * 100).toFixed(1)).join("\u2013"),
        );
  const heads = [["After"], ...shown.map(([label]) => [label, true])];
  const cells = rows.map(([name, values]) => [
    name,
    ...shown.map(([, key, kind]) => [formatted(values[key], kind), interval(values, key)]),
  ]);
  return el(
    "article",
    { class: "chart held-out" },
    el("header", {}, el("h3", {}, "Held-out problems")),
    scroller("Held-out problems", table("figures", heads, cells)),
    el(
      "p",
      { class: "note" },
      "Problems that training does not see, answered with the weights of that moment." +
        (attempts.length ? " Small: the 95% interval over problems like these." : ""),
    ),
  );
}
