// Samples as objects, and how one answer is shown: its parts set apart, its scores and why.

const OUTCOMES = {
  right: { sign: "\u2713", word: "right" },
  wrong: { sign: "\u2717", word: "wrong" },
  copied: { sign: "\u2717", word: "copied" },
  no_answer: { sign: "?", word: "no answer" },
  timeout: { sign: "!", word: "timed out" },
  crash: { sign: "!", word: "crashed" },
  too_long: { sign: "!", word: "too long" },
  graded: { sign: "\u00b7", word: "graded" },
};
const BECAUSE = {
  right: {
    format: "all tags are there, in order",
    step: "enough steps are marked",
    else: "equals the ground truth",
  },
  wrong: {
    format: "tags are missing, repeated or out of order",
    step: "no or few steps are marked",
    else: "differs from the ground truth",
  },
  copied: { else: "has the right value, but is a mere piece of the question" },
  no_answer: { else: "nothing was found that could be compared" },
  timeout: { else: "the rule took longer than its deadline: a failure, not a verdict" },
  crash: { else: "the rule itself failed: not a verdict" },
  too_long: { else: "longer than what the reward model can read: a failure, not a verdict" },
  graded: { else: "a value without a verdict" },
};

function because(rule, outcome) {
  const reasons = BECAUSE[outcome] ?? {};
  const kind = rule.includes("format") ? "format" : rule.includes("step") ? "step" : "else";
  return reasons[kind] ?? reasons.else ?? "";
}

// One packed step of a run as samples; those of held-out problems are drawn after the step, not in it.
// Prompts with the same text are one object, over all steps and runs.
const promptsByText = new Map();

function samplesOf({ run, step, heldOut, set }, content) {
  if (!content.samples) return [];
  const prompts = content.prompts.map((prompt) => {
    if (!promptsByText.has(prompt.prompt)) {
      promptsByText.set(prompt.prompt, {
        text: prompt.prompt,
        truth: String(prompt.ground_truth ?? ""),
        index: prompt.prompt_index,
        question: prompt.prompt,
        samples: [],
      });
    }
    return promptsByText.get(prompt.prompt);
  });
  const columns = content.samples,
    rules = Object.entries(content.scores);
  return columns.response.map((response, i) => {
    const scores = {};
    for (const [rule, score] of rules) {
      // a rule of one data set scores no others
      if (score.outcome[i] !== null) scores[rule] = { value: score.value[i], outcome: score.outcome[i] };
    }
    const sample = {
      run,
      step,
      heldOut,
      set: set || (columns.source?.[i] ?? ""), // name of its data set, if it has one
      prompt: prompts[columns.group[i]],
      member: columns.member[i],
      response,
      scores,
      reward: columns.reward[i],
      advantage: columns.advantage[i],
      length: columns.response_length[i],
      truncated: columns.truncated[i],
      failure: columns.failure?.[i] ?? "", // "rule: what went wrong"
    };
    sample.prompt.samples.push(sample);
    return sample;
  });
}

const when = ({ step, heldOut }) => (heldOut ? `after step ${step}` : `step ${step}`);

// The question of a prompt is what is not the same in all prompts, in whole lines.
function findQuestions() {
  const prompts = [...promptsByText.values()];
  if (prompts.length < 2) return;
  const texts = prompts.map((prompt) => prompt.text);
  const shared = (sign) => {
    let length = Math.min(...texts.map((text) => text.length));
    for (const text of texts) {
      let same = 0;
      while (same < length && sign(text, same) === sign(texts[0], same)) same++;
      length = same;
    }
    return length;
  };
  const head = texts[0].slice(
    0,
    shared((text, i) => text[i]),
  );
  const start = Math.max(head.lastIndexOf("\n"), head.lastIndexOf("|>") + 1) + 1;
  const tail = texts[0].slice(texts[0].length - shared((text, i) => text[text.length - 1 - i]));
  const signs = [tail.indexOf("\n"), tail.indexOf("<|")].filter((at) => at >= 0);
  const end = signs.length ? tail.length - Math.min(...signs) : 0;
  for (const prompt of prompts) {
    prompt.question = prompt.text.slice(start, prompt.text.length - end).trim() || prompt.text;
  }
}

// Cut a response into [kind, text]: think, answer, or plain. An unclosed part goes on to the end.
function parts(sample) {
  let kind = sample.prompt.text.trimEnd().endsWith("<think>") ? "think" : "plain";
  const found = [];
  let text = "";
  const close = (next) => {
    if (text.trim()) found.push([kind, text.trim()]);
    kind = next;
    text = "";
  };
  for (const piece of sample.response.split(/(<\/?(?:think|answer)>)/)) {
    if (piece === "<think>" || piece === "<answer>") close(piece.slice(1, -1));
    else if (piece === "</think>" || piece === "</answer>") {
      if (kind === "plain") kind = piece.slice(2, -1); // closed but never opened
      close("plain");
    } else text += piece;
  }
  close("plain");
  return found;
}

function responseBlocks(sample, query = "") {
  const found = parts(sample);
  return el(
    "div",
    { class: "response", dir: "auto" },
    ...(found.length ? found : [["plain", ""]]).map(([kind, text]) =>
      el(
        "div",
        { class: `part ${/^(<\|[^|<>]*\|>|<\/s>)+$/.test(text) ? "bare" : kind}` },
        kind === "plain" ? null : el("span", { class: "part-name" }, kind),
        appendText(el("span", { class: "text" }), text || "(empty)", query),
      ),
    ),
  );
}

function chip(rule, score) {
  const outcome = OUTCOMES[score.outcome] ?? { sign: "", word: score.outcome };
  return el(
    "span",
    { class: `chip ${score.outcome}` },
    `${rule} `,
    el("b", {}, `${outcome.sign} ${outcome.word}`),
  );
}

const chips = (sample) => Object.entries(sample.scores).map(([rule, score]) => chip(rule, score));

function rewardBadge(sample) {
  return el("span", { class: "reward" }, formatted(sample.reward, "score"));
}

// What went wrong with a rule, in its own words.
function failureOf(sample, rule) {
  const said = sample.failure.startsWith(`${rule}: `) ? sample.failure.slice(rule.length + 2) : "";
  return said ? ` (${visible(said)})` : null;
}

function scoreTable(sample) {
  const heads = [["Rule"], ["Score", true], ["Verdict"], ["Why"]];
  const rows = Object.entries(sample.scores).map(([rule, score]) => [
    rule,
    formatted(score.value, "score"),
    chip("", score),
    el("span", { class: "why" }, because(rule, score.outcome), failureOf(sample, rule)),
  ]);
  return table("scores", heads, rows);
}

function facts(pairs) {
  return el(
    "dl",
    { class: "facts" },
    ...pairs
      .filter(([, value]) => value !== null)
      .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}
