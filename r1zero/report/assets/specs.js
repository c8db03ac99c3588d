// What is charted: sections of charts, each a title, a kind of number, a note and its lines.
// A line has `key`, a metric, or `of`, a function of a run that returns its values.

const PHASES = ["draw", "rollout", "reward", "reward_model", "ref", "update", "publish"];
const COLORS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8"];
const phaseColor = (name) => `--phase-${name}`;

const keysOf = (run) => Object.keys(run.series);
const ALL_KEYS = [...new Set(RUNS.flatMap(keysOf))].sort();

// Roles of these runs: the usual ones as samples flow through them, then any other.
const waitKeys = ALL_KEYS.filter((key) => key.startsWith("time/wait/"));
const ROLES = [...new Set(["rollout", "ref", "train", ...waitKeys.map((key) => key.slice("time/wait/".length))])];

// Names of the rules: those with metrics of their own, reward/<rule>/<metric>. The reward model is none.
const MODEL = "reward/model/";
const ofRules = ALL_KEYS.filter((key) => !key.startsWith(MODEL));
const RULES = [...new Set(ofRules.map((key) => key.match(/^reward\/(.+)\/[^/]+$/)?.[1]).filter(Boolean))];

// Share of the step that a role's ranks were blocked, on average.
function waitShare(role) {
  return (run) =>
    run.series[`time/wait/${role}`]?.map((seconds, i) => {
      const step = run.series["time/step"]?.[i];
      return seconds === null || !step ? null : seconds / step;
    });
}

// Statistics that the losses of these runs declare (algo/stats.py, algo/losses/): each once, in their order.
const DECLARED = [...new Map(RUNS.flatMap((run) => run.stats).map((stat) => [stat.key, stat])).values()];

// Their charts: neighbours with the same title share one.
function declaredCharts() {
  const charts = new Map();
  DECLARED.forEach((stat, i) => {
    const { key, label, title, ...look } = stat;
    if (!charts.has(title)) charts.set(title, { title, ...look, lines: [] });
    const { lines } = charts.get(title);
    lines.push({ key, label, color: COLORS[i % 8], ...(lines.length ? { dash: [4, 3] } : {}) });
  });
  return [...charts.values()];
}

// Charts of the reward model, for runs that have one.
function modelCharts() {
  const correlation = `${MODEL}correlation/`;
  const compared = ALL_KEYS.filter((key) => key.startsWith(correlation));
  const quarters = ["shortest", "2nd quarter", "3rd quarter", "longest"];
  if (!ALL_KEYS.includes("reward/model")) return [];
  return [
    {
      title: "Reward model",
      kind: "score",
      note:
        "Raw scores of all, right and wrong answers, and their spread in a group. Rising while fewer " +
        "answers are right, it is deceived.",
      lines: [
        { key: "reward/model", label: "mean", color: "--ink", width: 2.5 },
        { key: `${MODEL}of_right`, label: "right", color: "--c3" },
        { key: `${MODEL}of_wrong`, label: "wrong", color: "--c7" },
        { key: `${MODEL}std`, label: "spread", color: "--c5", dash: [4, 3] },
      ],
    },
    {
      title: "Reward model by length",
      kind: "score",
      note: "Mean score of each quarter of a step's responses, by their length. Apart: it goes by length.",
      lines: quarters.map((label, i) => ({
        key: `${MODEL}of_quarter_${i + 1}`,
        label,
        color: COLORS[i],
      })),
    },
    {
      title: "Agreement of the reward model",
      kind: "score",
      note: "Correlation of its scores with those of each rule, and with the length of responses.",
      lines: [
        ...compared.map((key, i) => ({ key, label: key.slice(correlation.length), color: COLORS[i % 8] })),
        { key: `${MODEL}length_correlation`, label: "response length", color: "--ink", dash: [4, 3] },
      ],
    },
  ];
}

const SECTIONS = [
  {
    id: "learning",
    title: "Learning",
    charts: [
      {
        title: "Reward",
        kind: "score",
        note: "Mean over all samples of a step. Rules are shown before their weights.",
        lines: [
          { key: "reward/mean", label: "reward", color: "--ink", width: 2.5 },
          ...RULES.map((rule, i) => ({ key: `reward/${rule}`, label: rule, color: COLORS[i % 8] })),
        ],
      },
      {
        title: "Right answers",
        kind: "share",
        zero: true,
        note: "Share of samples that each rule accepted.",
        lines: RULES.map((rule, i) => ({ key: `reward/${rule}/right`, label: rule, color: COLORS[i % 8] })),
      },
      ...modelCharts(),
      {
        title: "Response length",
        kind: "tokens",
        zero: true,
        note: "Band: from the 10th to the 90th percentile. Thinking that pays shows as growth.",
        band: ["response_length/p10", "response_length/p90"],
        bandLabel: "10 to 90%",
        bandColor: "--c1",
        lines: [
          { key: "response_length/mean", label: "mean", color: "--c1", width: 2.5 },
          { key: "response_length/p10", label: "10%", color: "--c1", ghost: true },
          { key: "response_length/p50", label: "median", color: "--c3" },
          { key: "response_length/p90", label: "90%", color: "--c1", ghost: true },
          { key: "response_length/max", label: "max", color: "--c7", dash: [2, 3] },
        ],
      },
      {
        title: "Lost signal",
        kind: "share",
        zero: true,
        note: "Answers cut off at the limit; groups of equal rewards, which teach nothing; failed scoring.",
        lines: [
          { key: "response_truncated", label: "cut off", color: "--c4" },
          { key: "reward/equal_groups", label: "equal groups", color: "--c7" },
          { key: "reward/failure_rate", label: "scoring failed", color: "--c5" },
        ],
      },
      {
        title: "Groups",
        kind: "count",
        zero: true,
        note: "Drawn in a step, and what they were. Only those that are kept are learnt from.",
        lines: [
          { key: "groups/drawn", label: "drawn", color: "--ink", dash: [4, 3] },
          { key: "groups/kept", label: "kept", color: "--c1", width: 2.5 },
          { key: "groups/all_right", label: "all right", color: "--c3" },
          { key: "groups/all_wrong", label: "all wrong", color: "--c7" },
          { key: "groups/failed", label: "scoring failed", color: "--c5" },
          { key: "groups/surplus", label: "kept in vain", color: "--c4" },
          { key: "groups/short", label: "missing", color: "--c8" },
        ],
      },
      {
        title: "Rounds",
        kind: "count",
        zero: true,
        note: "In which the prompts of a step were drawn, until enough groups were kept.",
        lines: [{ key: "groups/rounds", label: "rounds", color: "--c1" }],
      },
    ],
  },
  {
    id: "stability",
    title: "Stability",
    charts: [
      ...declaredCharts(),
      {
        title: "Gradient norm",
        kind: "plain",
        zero: true,
        note: "Before clipping, mean over the updates of a step.",
        lines: [{ key: "grad_norm", label: "norm", color: "--c5" }],
      },
      {
        title: "Updates",
        kind: "count",
        zero: true,
        note: "Optimizer steps of a step. A minibatch of which no group is kept takes none.",
        lines: [
          { key: "updates", label: "taken", color: "--c1" },
          { key: "updates/skipped", label: "skipped", color: "--c7" },
        ],
      },
      {
        title: "Learning rate",
        kind: "plain",
        zero: true,
        note: "Of the last update of a step.",
        lines: [{ key: "lr", label: "lr", color: "--c8" }],
      },
    ],
  },
  {
    id: "speed",
    title: "Speed",
    charts: [
      {
        title: "Time per phase",
        kind: "seconds",
        zero: true,
        stacked: true,
        note: "Slowest rank of each phase. A stack higher than the step: roles worked at the same time.",
        lines: [
          ...PHASES.map((phase) => ({
            key: `time/${phase}`,
            label: phase,
            color: phaseColor(phase),
          })),
          { key: "time/step", label: "step", color: "--ink", dash: [4, 3], overlay: true },
        ],
      },
      {
        title: "Throughput",
        kind: "rate",
        zero: true,
        note: "Prompt and response tokens of a step, all ranks together.",
        lines: [{ key: "throughput/tokens_per_second", label: "all ranks", color: "--c1" }],
      },
      {
        title: "Waiting",
        kind: "share",
        zero: true,
        note: "Share of the step in which a role's ranks were blocked by others.",
        lines: ROLES.map((role, i) => ({
          of: waitShare(role),
          key: `time/wait/${role}`,
          label: role,
          color: COLORS[i % 8],
        })),
      },
      {
        title: "Memory",
        kind: "gigabytes",
        zero: true,
        note: "Peak of the largest rank of each role.",
        lines: ROLES.map((role, i) => ({
          key: `memory/peak_gigabytes/${role}`,
          label: role,
          color: COLORS[i % 8],
          dash: [[], [6, 3], [2, 3]][i % 3],
        })),
      },
    ],
  },
];

// Metrics that no chart above shows: a chart each, under "More".
function remainingCharts() {
  const shown = new Set(
    SECTIONS.flatMap((section) =>
      section.charts.flatMap((chart) => [...chart.lines.map((line) => line.key), ...(chart.band ?? [])]),
    ),
  );
  return ALL_KEYS.filter((key) => !shown.has(key)).map((key) => ({
    title: key,
    kind: key.startsWith("time/") ? "seconds" : "plain",
    lines: [{ key, label: key, color: "--c1" }],
  }));
}

const valuesOf = (run, line) => (line.of ? line.of(run) : run.series[line.key]);
const recorded = (run, line) => (valuesOf(run, line) ?? []).some((value) => value !== null);

// The chart as it can be drawn: lines that were recorded; of several runs, one chart for each line.
function drawable(spec) {
  if (!SEVERAL) {
    const lines = spec.lines
      .filter((line) => recorded(RUNS[0], line))
      .map((line) => ({ ...line, run: RUNS[0] }));
    return lines.length
      ? [{ ...spec, lines, band: spec.band?.every((key) => recorded(RUNS[0], { key })) ? spec.band : null }]
      : [];
  }
  return spec.lines
    .filter((line) => RUNS.some((run) => recorded(run, line)))
    .map((line) => ({
      ...spec,
      stacked: false,
      band: null,
      title:
        spec.lines.length > 1 && line.label !== spec.title.toLowerCase()
          ? `${spec.title}: ${line.label}`
          : spec.title,
      note: null,
      lines: RUNS.map((run, i) => ({
        ...line,
        run,
        label: run.label,
        color: COLORS[i % 8],
        ghost: false,
        width: 2,
        overlay: false,
        dash: i < 8 ? [] : [4, 3],
      })).filter((own) => recorded(own.run, line)),
    }));
}
