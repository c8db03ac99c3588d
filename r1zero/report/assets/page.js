// The page: names, key figures, sections of charts, the timeline, the samples, the configuration.

const main = document.getElementById("main");

function section(id, title, ...children) {
  document.getElementById("sections").append(el("a", { href: `#${id}` }, title));
  const node = el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title),
    ...children,
  );
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
    run.content = (step) => {
      // unpacked when first asked for
      if (!unpacked.has(step)) unpacked.set(step, unpack(run.packed[step]));
      return unpacked.get(step);
    };
  }
}

function status(run) {
  const last = run.steps.at(-1);
  if (last === undefined) return "no step is finished yet";
  const of = run.lastStep ? ` of ${grouped(run.lastStep)}` : "";
  const resumed = run.resumed.length
    ? ` \u00b7 resumed ${run.resumed.map((step) => `at ${step}`).join(", ")}`
    : "";
  const resets = run.resets.length ? ` \u00b7 reference reset ${plural(run.resets.length, "time")}` : "";
  return `step ${grouped(last)}${of}${resumed}${resets}`;
}

function header() {
  const written = new Date(DATA.written * 1000).toLocaleString("sv-SE").slice(0, 16);
  document.getElementById("name").textContent = SEVERAL
    ? plural(RUNS.length, "run") + " compared"
    : RUNS[0].name;
  document.getElementById("status").textContent =
    (SEVERAL ? "" : status(RUNS[0]) + " \u00b7 ") + `written ${written}`;
  segmented(
    document.getElementById("smoothing"),
    "smoothing",
    [
      ["off", "Off"],
      ["light", "Light"],
      ["strong", "Strong"],
    ],
    memory.get("smoothing", "off"),
    (value) => {
      smoothing = SPANS[value];
      memory.set("smoothing", value);
      redrawCharts();
    },
  );
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let theme = memory.get("theme", "auto");
  const apply = () => {
    document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
    redrawCharts();
  };
  segmented(
    document.getElementById("theme"),
    "theme",
    [
      ["auto", "Auto"],
      ["light", "Light"],
      ["dark", "Dark"],
    ],
    theme,
    (value) => {
      theme = value;
      memory.set("theme", value);
      apply();
    },
  );
  dark.addEventListener("change", apply);
}

function chartSections() {
  for (const { id, title, charts: specs } of SECTIONS) {
    const cards = specs.flatMap(drawable).map((spec) => new Chart(spec).node);
    const missing = specs.filter((spec) => !drawable(spec).length).map((spec) => spec.title.toLowerCase());
    const node = section(id, title, el("div", { class: "grid" }, ...cards));
    if (missing.length) node.append(el("p", { class: "note" }, `Not recorded: ${missing.join(", ")}.`));
    if (id === "learning") node.append(...[evaluationTable()].filter(Boolean));
    if (id === "speed") node.append(...RUNS.map((run) => new Timeline(run).node));
  }
  const rest = remainingCharts().flatMap(drawable);
  if (!rest.length) return;
  const grid = el("div", { class: "grid" });
  const more = el(
    "details",
    {
      ontoggle: () => {
        if (more.open && !grid.childElementCount) grid.append(...rest.map((spec) => new Chart(spec).node));
      },
    },
    el("summary", {}, plural(rest.length, "more metric")),
    grid,
  );
  document.getElementById("speed").append(more);
}

async function sampleSection() {
  const node = section("samples", "Samples", el("p", { class: "note" }, "Unpacking ..."));
  const steps = RUNS.flatMap((run) => [
    ...Object.keys(run.packed).map((step) => ({ run, step: Number(step), heldOut: false })),
    ...Object.entries(run.heldOut).flatMap(([step, named]) =>
      Object.keys(named).map((set) => ({ run, step: Number(step), heldOut: true, set })),
    ),
  ]);
  if (typeof DecompressionStream === "undefined") {
    return node.lastChild.replaceWith(
      el("p", { class: "empty" }, "This browser cannot unpack the samples; one from 2023 or later can."),
    );
  }
  const contents = await Promise.all(
    steps.map(({ run, step, heldOut, set }) =>
      heldOut ? unpack(run.heldOut[step][set]) : run.content(step),
    ),
  );
  const samples = contents.flatMap((content, i) => samplesOf(steps[i], content));
  const all = contents.reduce((sum, content) => sum + (content.total ?? 0), 0);
  if (!samples.length) {
    return node.lastChild.replaceWith(
      el(
        "p",
        { class: "empty" },
        RUNS.some((run) => run.steps.length)
          ? "This run left no samples: its folder samples/ is missing or empty."
          : "Samples appear after the first step.",
      ),
    );
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
  for (const [name, label] of [
    ["samples", "One by one"],
    ["prompts", "By question, over steps"],
  ]) {
    tabs[name] = el(
      "button",
      {
        type: "button",
        role: "tab",
        id: `tab-${name}`,
        "aria-controls": `view-${name}`,
        onclick: () => open(name),
      },
      label,
    );
    Object.entries({ id: `view-${name}`, role: "tabpanel", "aria-labelledby": `tab-${name}` }).forEach(
      ([key, value]) => views[name].node.setAttribute(key, value),
    );
  }
  const turn = (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs.samples === document.activeElement ? "prompts" : "samples";
    open(other);
    tabs[other].focus();
  };
  node.lastChild.replaceWith(
    el("p", { class: "note" }, selectionRule(samples.length, all)),
    el(
      "div",
      { class: "tabs", role: "tablist", "aria-label": "View of the samples", onkeydown: turn },
      ...Object.values(tabs),
    ),
    browser.node,
    prompts.node,
  );
  open("samples");
}

// Which samples are here: the rule of sample_selection.py in words.
function selectionRule(here, all) {
  const every = Math.max(...RUNS.map((run) => run.packedEvery));
  const steps = every > 1 ? ` of every ${every}th step` : "";
  const cut = ` Responses longer than ${grouped(DATA.limits.textLimit)} characters lose their middle.`;
  if (here === all) return `All ${grouped(all)} samples${steps}.${cut}`;
  return (
    `${grouped(here)} of ${grouped(all)} samples${steps}: at each step whole questions with all their ` +
    `answers, as many as fit ${DATA.limits.stepBytes / 1000} kB packed; first those whose scoring failed, ` +
    "then in a fixed shuffle of the data that is the same at every step." +
    `${cut} All samples are in the run folder under samples/.`
  );
}

function configuration() {
  const known = RUNS.filter((run) => run.config);
  section(
    "configuration",
    "Configuration",
    ...(known.length
      ? known.map((run) =>
          el(
            "details",
            {},
            el("summary", {}, SEVERAL ? `${run.label}/config.yaml` : "config.yaml"),
            el(
              "pre",
              { tabindex: "0", role: "region", "aria-label": `config.yaml of ${run.label}` },
              visible(run.config),
            ),
          ),
        )
      : [el("p", { class: "empty" }, "The run folder has no config.yaml.")]),
  );
}

nameRuns();
header();
if (STEPS.length) {
  main.append(
    figures(),
    el(
      "p",
      { class: "note" },
      `Mean of the last ${WINDOW} steps` +
        (SEVERAL ? "." : `, beside that of the first ${WINDOW}.`) +
        " In all charts: point at a step to read every chart there, drag to zoom, double-click to go " +
        "back, arrow keys when focused.",
    ),
  );
  chartSections();
} else {
  main.append(
    el(
      "p",
      { class: "empty" },
      "No step is finished yet. This page is written again every few steps: reload it then.",
    ),
  );
}
sampleSection().then(() => {
  configuration();
  document.documentElement.dataset.ready = "yes";
});
