// The same prompt over steps, side by side: where an answer changes its mind, the "aha" is to be found.

const SHOWN_PROMPTS = 200;

// Columns of a prompt: one for each run and step, in order.
function columnsOf(prompt) {
  const columns = new Map();
  for (const sample of prompt.samples) {
    const { run, step, heldOut } = sample;
    const key = `${RUNS.indexOf(run)} ${when(sample)}`;
    if (!columns.has(key)) columns.set(key, { run, step, heldOut, samples: [] });
    columns.get(key).samples.push(sample);
  }
  const sorted = [...columns.values()].sort(
    (a, b) => RUNS.indexOf(a.run) - RUNS.indexOf(b.run) || a.step - b.step,
  );
  for (const column of sorted) {
    column.mean = mean(column.samples.map((sample) => sample.reward)) ?? 0;
    column.samples.sort((a, b) => b.reward - a.reward || a.member - b.member);
  }
  return sorted;
}

class PromptView {
  constructor(prompts) {
    this.prompts = prompts
      .map((prompt) => {
        const columns = columnsOf(prompt);
        return { prompt, columns, gain: columns.at(-1).mean - columns[0].mean };
      })
      .sort((a, b) => b.columns.length - a.columns.length || b.gain - a.gain);
    this.repeated = this.prompts.filter((entry) => entry.columns.length > 1).length;
    this.choice = el(
      "select",
      { onchange: () => this.show(this.prompts[+this.choice.value]) },
      ...this.prompts.slice(0, SHOWN_PROMPTS).map((entry, i) => this.option(entry, i)),
    );
    this.board = el("div", {
      class: "board",
      tabindex: "0",
      role: "region",
      "aria-label": "Answers by step",
    });
    this.head = el("div", {});
    this.node = el(
      "div",
      { class: "prompts" },
      this.repeated
        ? null
        : el(
            "p",
            { class: "note" },
            "Every question here was drawn only once so far, so each has one column. Columns are added " +
              "when training comes back to a question in a later pass over its data.",
          ),
      el(
        "label",
        { class: "field wide" },
        el("span", {}, this.repeated ? "Question, those asked most often first" : "Question"),
        this.choice,
      ),
      this.head,
      this.board,
    );
    if (this.prompts.length) this.show(this.prompts[0]);
  }

  option({ prompt, columns, gain }, i) {
    const change =
      columns.length > 1
        ? ` (${columns.length} steps, reward ${gain >= 0 ? "+" : "\u2212"}${Math.abs(gain).toFixed(2)})`
        : "";
    return el("option", { value: i }, visible(prompt.question.slice(0, 90)).replace(/\s+/g, " ") + change);
  }

  open(prompt) {
    const at = this.prompts.findIndex((entry) => entry.prompt === prompt);
    if (at >= this.choice.options.length) this.choice.append(this.option(this.prompts[at], at));
    this.choice.value = at;
    this.show(this.prompts[at]);
  }

  show({ prompt, columns }) {
    this.head.replaceChildren(
      appendText(el("p", { class: "text question-text", dir: "auto" }), prompt.question),
      el("p", { class: "note" }, "Ground truth: ", appendText(el("b", {}), prompt.truth)),
    );
    this.board.replaceChildren(...columns.map((column) => this.column(column)));
    this.board.classList.toggle("single", columns.length === 1);
    this.board.scrollLeft = 0;
  }

  column({ run, step, heldOut, samples, mean: reward }) {
    const rules = Object.keys(samples[0].scores);
    const share = (rule) => samples.filter((sample) => sample.scores[rule]?.outcome === "right").length;
    return el(
      "section",
      { class: "column" },
      el("h4", {}, (SEVERAL ? run.label + ", " : "") + when({ step, heldOut })),
      el(
        "p",
        { class: "note" },
        `mean reward ${formatted(reward, "score")}`,
        ...rules.map((rule) => ` \u00b7 ${rule} ${share(rule)} of ${samples.length}`),
      ),
      el(
        "div",
        { class: "answers" },
        ...samples.map((sample) =>
          el(
            "article",
            { class: "answer" },
            el(
              "p",
              { class: "entry-line" },
              rewardBadge(sample),
              ...chips(sample),
              ` ${formatted(sample.length, "tokens")} tokens`,
            ),
            responseBlocks(sample),
          ),
        ),
      ),
    );
  }
}
