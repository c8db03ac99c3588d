"""The report of an evaluation: scores with intervals, also by level and subject, and the
protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from r1zero.evaluation.pass_at_k import bootstrap_interval, pass_at_k
from r1zero.observe.metrics import sample_metrics
from r1zero.observe.sample_summary import summarize
from r1zero.observe.samples import sample_rows, write_rows
from r1zero.types import Group, Outcome

RESAMPLES = 10_000
REWARD = Path(__file__).resolve().parents[1] / "reward"


@dataclass(frozen=True, slots=True)
class EvalProtocol:
    """All that a score depends on."""

    model: str
    data: str
    data_sha256: str
    rows: int  # of the data
    problems: int  # answered
    dropped: int  # left out because their prompts are too long
    template: str
    template_sha256: str  # of its text and default system text
    samples_per_problem: int
    temperature: float  # 0: the most likely token
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int
    dtype: str
    # reward functions; acc or base_acc decides what is right, or else the first (a grade: nothing)
    rules: list[str]
    extractor: str
    ends: list[str] = field(default_factory=list)  # tokens that end a response
    intervals: str = f"95%, percentile bootstrap over problems, {RESAMPLES} resamples"


def extractor_version() -> str:
    """Name what finds and compares answers: our sources by their hash, and the libraries."""
    sources = b"".join(path.read_bytes() for path in sorted(REWARD.rglob("*.py")))
    libraries = [
        f"{name} {version(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy")
    ]
    return ", ".join([f"r1zero/reward {hashlib.sha256(sources).hexdigest()[:12]}", *libraries])


def report(
    groups: Sequence[Group], tags: Mapping[str, Sequence[str]], protocol: EvalProtocol
) -> dict[str, Any]:
    """Score the groups; `tags` give a value of each kind, such as level, for each row of the
    data."""
    by: dict[str, list[dict[str, Any]]] = {}
    for kind, values in tags.items():
        if len(set(values)) == 1:
            continue  # nothing to compare
        parts: dict[str, list[Group]] = {}
        for group in groups:
            parts.setdefault(values[group.prompt.index], []).append(group)
        by[kind] = [
            {kind: value, "problems": len(parts[value]), **scores(parts[value], protocol)}
            for value in sorted(parts)
        ]
    return {"scores": scores(groups, protocol), "by": by, "protocol": asdict(protocol)}


def scores(groups: Sequence[Group], protocol: EvalProtocol) -> dict[str, float]:
    """Return pass@1, 2, 4, ... with intervals, avg@n, and the rates and lengths of
    sample_metrics."""
    rule = deciding_rule(list(groups[0].samples[0].scores))
    samples = protocol.samples_per_problem
    outcomes = []
    for group in groups:
        outcomes.append([sample.scores[rule].outcome for sample in group.samples])
    right = np.array([found.count(Outcome.RIGHT) for found in outcomes])
    result: dict[str, float] = {}
    for k in attempts(samples):
        values = pass_at_k(right, samples, k)
        low, high = bootstrap_interval(values, protocol.seed, resamples=RESAMPLES)
        result |= {f"pass@{k}": float(values.mean()), f"pass@{k}/low": low, f"pass@{k}/high": high}
    no_answer = sum(found.count(Outcome.NO_ANSWER) for found in outcomes) / (samples * len(groups))
    rates = {f"avg@{samples}": float(right.mean() / samples), "no_answer": no_answer}
    summary = replace(summarize(groups), sources={})  # they are all of one
    return result | rates | sample_metrics(summary)


def deciding_rule(rules: Sequence[str]) -> str:
    """Return the rule, by its shown name, that says which answers are right."""
    return next((rule for rule in ("acc", "base_acc") if rule in rules), rules[0])


def attempts(samples: int) -> list[int]:
    """Return the k for which pass@k is told: powers of two, and all samples."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def write_report(
    stem: Path,
    content: Mapping[str, Any],
    groups: Sequence[Group],
    tags: Mapping[str, Sequence[str]],
    decode: Callable[[np.ndarray], str],
) -> None:
    """Write `stem`.json, and every answer to `stem`.parquet."""
    rows = sample_rows(groups, decode)
    samples = (group for group in groups for _ in group.samples)
    for row, group in zip(rows, samples, strict=True):
        row |= {kind: values[group.prompt.index] for kind, values in tags.items()}
    write_rows(stem.with_name(stem.name + ".parquet"), rows)
    partial = stem.with_name(stem.name + ".json.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(stem.with_name(stem.name + ".json"))


def table(content: Mapping[str, Any]) -> str:
    """Return the report as text."""
    found = content["scores"]
    protocol = content["protocol"]
    samples = protocol["samples_per_problem"]
    lines = [f"{protocol['problems']} problems x {samples}: {protocol['data']}"]
    lines += [f"  {_name(k, samples):<18}{_interval(found, k)}" for k in attempts(samples)]
    rates = [
        ("full format", "reward/format/right"),
        ("no answer", "no_answer"),
        ("cut off", "response_truncated"),
    ]
    lines += [f"  {label:<18}{found[key]:6.1%}" for label, key in rates if key in found]
    lines.append(f"  {'mean length':<18}{found['response_length/mean']:.1f} tokens")
    if found["reward/failed"]:
        lines.append(
            f"  {'not scored':<18}{found['reward/failed']} responses, counted as not right"
        )
    for kind, parts in content["by"].items():
        lines += [
            "",
            f"  {kind:<24}{'problems':>9}  {_name(1, samples):<24}{f'pass@{samples}':>7}"
            f"{'length':>8}",
        ]
        lines += [
            f"  {part[kind]:<24}{part['problems']:>9}  {_interval(part, 1):<24}"
            f"{part[f'pass@{samples}']:7.1%}{part['response_length/mean']:>8.1f}"
            for part in parts
        ]
    shown = {
        key: ", ".join(value) if isinstance(value, list) else value
        for key, value in protocol.items()
    }
    return "\n".join(
        [*lines, "", "  protocol", *(f"    {key:<20}{value}" for key, value in shown.items())]
    )


def _name(k: int, samples: int) -> str:
    if k == 1:
        return f"pass@1 (avg@{samples})"
    return f"pass@{k}"


def _interval(found: Mapping[str, float], k: int) -> str:
    return (
        f"{found[f'pass@{k}']:6.1%}  [{found[f'pass@{k}/low']:.1%}, {found[f'pass@{k}/high']:.1%}]"
    )
