// One axis of steps for all runs, and values on it.

const STEPS = [...new Set(RUNS.flatMap((run) => run.steps))].sort((a, b) => a - b);
const SPANS = { off: 0, light: 5, strong: 20 }; // steps over which lines are smoothed

// A run's values on the common axis: undefined where the run has no such step, null where it has no number.
function onAxis(run, values) {
  if (run.steps.length === STEPS.length) return values.slice();
  const at = new Map(run.steps.map((step, i) => [step, values[i]]));
  return STEPS.map((step) => at.get(step));
}

// Exponential mean over about `span` steps, unbiased at the start.
function smoothed(values, span) {
  if (!span) return values;
  const keep = 1 - 2 / (span + 1);
  let sum = 0,
    weight = 0;
  return values.map((value) => {
    if (typeof value !== "number") return value;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}
