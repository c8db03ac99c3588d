// The page: names, key figures, sections of charts, the timeline, the samples, the configuration.

const main = document.getElementById("main");

function section(id, title, ...children) {
  document.getElementById("sections").append(el("a", { href: `#${id}` }, title));
  const node = el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...children);
  main.append(node);
  return node;
}

// Runs are told apart by their folders; equal names get a number.
function nameRuns() {
  const seen = {};
  for (const run of RUNS) {
    seen[run.folder] = (seen[run.folder] ?? 0) + 1;
    run.label = seen[run.folder] > 1 ? `${run.folder} (${seen[run.folder]})` : run.folder;
    const unpacked = new Map();
    run.content = (step) => {  // unpacked when first asked for
      if (!unpacked.has(step)) unpacked.set(step, unpack(run.packed[step]));
      return unpacked.get(step);
    };
  }
}

function status(run) {
  const last = run.steps.at(-1);
  if (last === undefined) return "no step is finished yet";
  const of = run.lastStep ? ` of ${grouped(run.lastStep)}` : "";
  const resumed = run.resumed.length ? ` \u00b7 resumed ${run.resumed.map((step) => `at ${step}`).join(", ")}` : "";
  return `step ${grouped(last)}${of}${resumed}`;
}

function header() {
  const written = new Date(DATA.written * 1000).toLocaleString("sv-SE").slice(0, 16);
  document.getElementById("name").textContent = SEVERAL ? plural(RUNS.length, "run") + " compared" : RUNS[0].name;
  document.getElementById("status").textContent = (SEVERAL ? "" : status(RUNS[0]) + " \u00b7 ") + `written ${written}`;
  segmented(document.getElementById("smoothing"), "smoothing", [["off", "Off"], ["light", "Light"], ["strong", "Strong"]],
    memory.get("smoothing", "off"), (value) => { smoothing = SPANS[value]; memory.set("smoothing", value); redrawCharts(); });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let theme = memory.get("theme", "auto");
  const apply = () => {
    document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
    redrawCharts();
  };
  segmented(document.getElementById("theme"), "theme", [["auto", "Auto"], ["light", "Light"], ["dark", "Dark"]], theme,
    (value) => { theme = value; memory.set("theme", value); apply(); });
  dark.addEventListener("change", apply);
}

// Key figures: mean of the last steps, beside that of the first ones.
const WINDOW = 5;
const FIGURES = [
  ["Reward", "reward/mean", "score"],
  ...RULES.map((rule) => [`${rule} right`, `reward/${rule}/right`, "share"]),
  ["Response length", "response_length/mean", "tokens"],
  ["Cut off", "response_truncated", "share"],
  ["Equal groups", "reward/equal_groups", "share"],
  ["KL", "kl", "plain"],
  ["Step", "time/step", "seconds"],
  ["Tokens per second", "throughput/tokens_per_second", "rate"],
];
const ends = (run, key) => [run.series[key]?.slice(0, WINDOW), run.series[key]?.slice(-WINDOW)].map((part) => mean(part ?? []));

function figures() {
  const shown = FIGURES.filter(([, key]) => RUNS.some((run) => ends(run, key)[1] !== null));
  if (!SEVERAL) {
    const enough = RUNS[0].steps.length > WINDOW;
    return el("dl", { class: "tiles" }, ...shown.map(([label, key, kind]) => {
      const [first, last] = ends(RUNS[0], key);
      return el("div", { class: "tile" }, el("dt", {}, label), el("dd", {}, formatted(last, kind)),
        enough ? el("dd", { class: "was" }, `from ${formatted(first, kind)}`) : null);
    }));
  }
  const toggles = RUNS.map((run, i) => el("label", { class: "run-name" },
    el("input", { type: "checkbox", checked: true, onchange: (event) => {
      if (event.target.checked) hiddenRuns.delete(run); else hiddenRuns.add(run);
      redrawCharts();
    } }), el("span", { class: "swatch", style: `--swatch: var(${COLORS[i % 8]})` }), run.label));
  return el("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "Key figures of the runs" },
    el("table", { class: "figures" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Run"), el("th", { scope: "col", class: "number" }, "Steps"),
        ...shown.map(([label]) => el("th", { scope: "col", class: "number" }, label)))),
      el("tbody", {}, ...RUNS.map((run, i) => el("tr", {}, el("th", { scope: "row" }, toggles[i]),
        el("td", { class: "number" }, grouped(run.steps.length)),
        ...shown.map(([, key, kind]) => el("td", { class: "number" }, formatted(ends(run, key)[1], kind))))))));
}

// Held-out problems: the entries of evaluation.jsonl, flat or under names such as before and after.
function evaluation() {
  const columns = [];
  for (const run of RUNS) {
    for (const entry of run.evaluation) {
      const nested = Object.entries(entry).filter(([, value]) => value !== null && typeof value === "object");
      const prefix = SEVERAL ? `${run.label}, ` : "";
      if (nested.length) for (const [name, values] of nested) columns.push([prefix + name, values]);
      else columns.push([prefix + (entry.step === undefined ? "evaluation" : `step ${entry.step}`), entry]);
    }
  }
  const wanted = [...RULES.map((rule) => [`${rule} right`, `reward/${rule}/right`, "share"]), ["reward", "reward/mean", "score"],
                  ["response length", "response_length/mean", "tokens"], ["cut off", "response_truncated", "share"]]
    .filter(([, key]) => columns.some(([, values]) => typeof values[key] === "number"));
  if (!wanted.length) return null;
  return el("article", { class: "chart" }, el("header", {}, el("h3", {}, "Held-out problems")),
    el("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "Held-out problems" }, el("table", { class: "figures" },
      el("thead", {}, el("tr", {}, el("td", {}), ...columns.map(([name]) => el("th", { scope: "col", class: "number" }, name)))),
      el("tbody", {}, ...wanted.map(([label, key, kind]) => el("tr", {}, el("th", { scope: "row" }, label),
        ...columns.map(([, values]) => el("td", { class: "number" }, formatted(values[key], kind)))))))),
    el("p", { class: "note" }, "Problems that training does not see, answered with the weights of that moment."));
}

function chartSections() {
  for (const { id, title, charts: specs } of SECTIONS) {
    const cards = specs.flatMap(drawable).map((spec) => new Chart(spec).node);
    if (id === "learning") cards.push(...[evaluation()].filter(Boolean));
    const missing = specs.filter((spec) => !drawable(spec).length).map((spec) => spec.title.toLowerCase());
    const node = section(id, title, el("div", { class: "grid" }, ...cards));
    if (missing.length) node.append(el("p", { class: "note" }, `Not recorded: ${missing.join(", ")}.`));
    if (id === "speed") node.append(...RUNS.map((run) => new Timeline(run).node));
  }
  const rest = remainingCharts().flatMap(drawable);
  if (!rest.length) return;
  const grid = el("div", { class: "grid" });
  const more = el("details", { ontoggle: () => {
    if (more.open && !grid.childElementCount) grid.append(...rest.map((spec) => new Chart(spec).node));
  } }, el("summary", {}, plural(rest.length, "more metric")), grid);
  document.getElementById("speed").append(more);
}

async function sampleSection() {
  const node = section("samples", "Samples", el("p", { class: "note" }, "Unpacking ..."));
  const steps = RUNS.flatMap((run) => Object.keys(run.packed).map((step) => [run, Number(step)]));
  if (typeof DecompressionStream === "undefined") {
    return node.lastChild.replaceWith(el("p", { class: "empty" }, "This browser cannot unpack the samples; one from 2023 or later can."));
  }
  const contents = await Promise.all(steps.map(([run, step]) => run.content(step)));
  const samples = contents.flatMap((content, i) => samplesOf(...steps[i], content));
  const all = contents.reduce((sum, content) => sum + (content.total ?? 0), 0);
  if (!samples.length) {
    return node.lastChild.replaceWith(el("p", { class: "empty" },
      RUNS.some((run) => run.steps.length) ? "This run left no samples: its folder samples/ is missing or empty."
        : "Samples appear after the first step."));
  }
  findQuestions();
  const prompts = new PromptView([...promptsByText.values()]);
  const open = (view) => {
    for (const [name, part] of Object.entries(views)) {
      part.node.hidden = name !== view;
      tabs[name].setAttribute("aria-selected", String(name === view));
      tabs[name].tabIndex = name === view ? 0 : -1;
    }
  };
  const browser = new SampleBrowser(samples, (prompt) => {
    open("prompts");
    prompts.open(prompt);
    node.scrollIntoView();
    tabs.prompts.focus();
  });
  const views = { samples: browser, prompts };
  const tabs = {};
  for (const [name, label] of [["samples", "One by one"], ["prompts", "By question, over steps"]]) {
    tabs[name] = el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `view-${name}`,
                                onclick: () => open(name) }, label);
    Object.entries({ id: `view-${name}`, role: "tabpanel", "aria-labelledby": `tab-${name}` })
      .forEach(([key, value]) => views[name].node.setAttribute(key, value));
  }
  const turn = (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs.samples === document.activeElement ? "prompts" : "samples";
    open(other);
    tabs[other].focus();
  };
  node.lastChild.replaceWith(el("p", { class: "note" }, selectionRule(samples.length, all)),
    el("div", { class: "tabs", role: "tablist", "aria-label": "View of the samples", onkeydown: turn }, ...Object.values(tabs)),
    browser.node, prompts.node);
  open("samples");
}

// Which samples are here: the rule of picks.py in words.
function selectionRule(here, all) {
  const every = Math.max(...RUNS.map((run) => run.packedEvery));
  const steps = every > 1 ? ` of every ${every}th step` : "";
  const cut = ` Responses longer than ${grouped(DATA.limits.textLimit)} characters lose their middle.`;
  if (here === all) return `All ${grouped(all)} samples${steps}.${cut}`;
  return `${grouped(here)} of ${grouped(all)} samples${steps}: at each step whole questions with all their answers, as many as fit `
    + `${DATA.limits.stepBytes / 1000} kB packed; first those whose scoring failed, then the same fixed shuffle of the data at every step.`
    + `${cut} All samples are in the run folder under samples/.`;
}

function configuration() {
  const known = RUNS.filter((run) => run.config);
  section("configuration", "Configuration", ...(known.length ? known.map((run) => el("details", {},
    el("summary", {}, SEVERAL ? `${run.label}/config.yaml` : "config.yaml"),
    el("pre", { tabindex: "0", role: "region", "aria-label": `config.yaml of ${run.label}` }, visible(run.config))))
    : [el("p", { class: "empty" }, "The run folder has no config.yaml.")]));
}

nameRuns();
header();
if (STEPS.length) {
  main.append(figures(), el("p", { class: "note" }, `Mean of the last ${WINDOW} steps`
    + (SEVERAL ? "." : `, beside that of the first ${WINDOW}.`)
    + " In all charts: point at a step to read every chart there, drag to zoom, double-click to go back, arrow keys when focused."));
  chartSections();
} else {
  main.append(el("p", { class: "empty" }, "No step is finished yet. This page is written again every few steps: reload it then."));
}
sampleSection().then(() => { configuration(); document.documentElement.dataset.ready = "yes"; });
