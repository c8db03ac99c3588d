"""The tools around the reward executor: score.py, rescore.py, and the worst of what fuzz_rewards.py
makes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.boxed import boxed
from support.patience import LONG
from support.tool import TOOLS, functions, run_here

from r1zero.reward.config import RewardConfig
from r1zero.reward.executor import RewardExecutor

Rescore = Callable[..., tuple[int, str, str]]
GOOD = r"<think>a</think><answer>\boxed{%s}</answer>"


def run(tool: str, *arguments: str) -> tuple[int, str, str]:
    """Run a tool; exit code, standard output, standard error."""
    command = [sys.executable, str(TOOLS / tool), *arguments]
    done = subprocess.run(command, text=True, capture_output=True, timeout=LONG)
    return done.returncode, done.stdout, done.stderr


# -- score.py ---


def test_score_answers_line_by_line_in_order(tmp_path: Path) -> None:
    rows = [
        {"gold": "1/2", "response": GOOD % "0.5"},
        {"gold": 7, "response": boxed(8), "note": "ignored"},
        {"gold": "7", "response": "seven"},
        {"gold": "7", "response": "\u0000" * 9},
    ]
    rows += [{"gold": str(n), "response": boxed(n + n % 2)} for n in range(600)]
    path = tmp_path / "cases.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, rows[:3])) + "\n\n" + "\n".join(map(json.dumps, rows[3:]))
    )
    code, out, errors = run("score.py", "--input", str(path))
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and errors == "" and len(found) == len(rows)
    assert found[0] == {"outcome": "right", "scores": {"acc": 1.0, "format": 1.0}}
    assert found[1] == {"outcome": "wrong", "scores": {"acc": -1.0, "format": 0.0}}
    assert [each["outcome"] for each in found[2:4]] == ["no_answer"] * 2
    assert [each["outcome"] for each in found[4:]] == ["right", "wrong"] * 300


def test_score_takes_scorers_and_settings_of_a_config(tmp_path: Path, tiny: Path) -> None:
    path, mine = tmp_path / "cases.jsonl", tmp_path / "mine.py"
    mine.write_text("def length(cases): return [len(case.response) for case in cases]\n")
    path.write_text('{"gold": "5", "response": "\\\\boxed{6}", "tokens": 9, "limit": 10}\n')
    code, out, _ = run(
        "score.py", "--input", str(path), "--verifier", f"{mine}:length", "acc", "overlong"
    )
    assert code == 0 and json.loads(out) == {
        "outcome": "graded",
        "scores": {"mine.length": 9, "acc": -1.0, "overlong": -0.5},
    }
    (tmp_path / "three.yaml").write_text(
        (TOOLS.parent / "configs" / "tiny.yaml")
        .read_text()
        .replace("\nreward:\n", "\nreward:\n  accuracy: {wrong: -0.5}\n")
    )
    code, out, _ = run("score.py", "--input", str(path), "--config", str(tmp_path / "three.yaml"))
    assert code == 0 and json.loads(out)["scores"] == {"acc": -0.5, "format": 0.0}


@pytest.mark.parametrize(
    ("text", "arguments", "sentences"),
    [
        (
            '{"gold": "5", "response": "a"}\n{"gold": "5"}\n[1]\n{"gold":\n',
            [],
            [
                "line 2: response is missing; it must be a text",
                "line 3: it must be an object such as",
                "line 4: ",
            ],
        ),
        (
            '{"gold": "5", "response": 5}\n{"gold": true, "response": ""}',
            [],
            [
                "line 1: response is 5; it must be a text",
                "line 2: gold is True; it must be a text or a number",
            ],
        ),
        (
            '{"gold": "5", "response": "a"}',
            ["--verifier", "acc", "length"],
            ["line 1: tokens is missing"],
        ),
        ('{"gold": "5", "response": "a"}', ["--verifier", "fromat"], ["did you mean format?"]),
        (
            '{"gold": "5", "response": "a"}',
            ["--verifier", "nowhere:score"],
            ["No module named 'nowhere'"],
        ),
        (None, [], ["cases.jsonl cannot be read: No such file"]),
    ],
)
def test_score_names_what_is_wrong(
    tmp_path: Path, text: str | None, arguments: list[str], sentences: list[str]
) -> None:
    path = tmp_path / "cases.jsonl"
    if text is not None:
        path.write_text(text)
    code, out, errors = run("score.py", "--input", str(path), *arguments)
    lines = errors.splitlines()
    assert code == 2 and out == "" and len(lines) == len(sentences), errors
    for line, sentence in zip(lines, sentences, strict=True):
        assert line.startswith("score.py: ") and sentence in line


# -- rescore.py ---


@pytest.fixture
def rescore(capsys: pytest.CaptureFixture[str]) -> Rescore:
    """Run rescore.py; exit code, standard output, standard error."""
    return lambda *arguments: (run_here("rescore.py", *arguments), *capsys.readouterr())


@pytest.fixture
def samples(tmp_path: Path, tiny: Path) -> Path:
    """A run folder with one file of samples: two prompts, two responses each, scored as [acc,
    format]."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text((TOOLS.parent / "configs" / "tiny.yaml").read_text())
    answers = [
        ("5", "right", 1.0),
        ("6", "wrong", -1.0),
        ("5.0", "wrong", -1.0),
        ("7", "right", 1.0),
    ]
    rows = [
        {
            "position": n // 2,
            "member": n % 2,
            "prompt": "q",
            "response": GOOD % answer + "<|im_end|>",
            "ground_truth": "5",
            "response_length": 9,
            "truncated": False,
            "reward": 0.5 * acc + 0.5,
            "score/acc": acc,
            "outcome/acc": outcome,
            "score/format": 1.0,
            "outcome/format": "right",
        }
        for n, (answer, outcome, acc) in enumerate(answers)
    ]
    path = folder / "samples" / "step_000001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_rescore_prints_what_changed_with_examples(samples: Path, rescore: Rescore) -> None:
    code, out, errors = rescore(str(samples))
    assert code == 0, errors
    assert "4 samples scored again by acc, format" in out
    assert re.search(r"acc: 2 changes\n +1  wrong -> right\n +1  right -> wrong\n", out), out
    assert "format: no changes" in out, "special tokens must not reach the scorers"
    assert re.search(r"reward: 2 changes\n +1  0 -> 1\n +1  1 -> 0\n", out)
    assert (
        "step_000001.parquet, prompt 1, member 0: wrong -> right; right answer '5', response ends"
        in out
    )


def test_rescore_leaves_a_reward_alone_that_a_reward_model_is_part_of(
    samples: Path, rescore: Rescore
) -> None:
    table = pq.read_table(samples)
    values = pa.array([0.5] * len(table))
    pq.write_table(table.append_column("score/model", values), samples)
    code, out, errors = rescore(str(samples))
    assert code == 0, errors
    assert "acc: 2 changes" in out and "reward:" not in out and "model" not in out


def test_rescore_by_other_scorers_and_settings(samples: Path, rescore: Rescore) -> None:
    code, out, _ = rescore(str(samples), "--verifier", "acc", "length", "--examples", "0")
    assert code == 0 and "reward" not in out
    assert re.search(r"length: 4 changes\n +4  not scored -> graded\n", out)
    config = samples.parents[1] / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["reward"]["accuracy"] = {"wrong": -0.5}
    config.write_text(yaml.safe_dump(settings))
    code, out, _ = rescore(str(samples), "--verifier", "acc")
    assert code == 0 and re.search(r"acc: 3 changes\n", out) and "1  wrong -1 -> -0.5" in out


def test_rescore_names_what_is_wrong(samples: Path, rescore: Rescore) -> None:
    code, _, errors = rescore(str(samples), "--verifier", "fromat")
    assert code == 2 and "did you mean format?" in errors and "Traceback" not in errors
    pq.write_table(pa.table({"question": ["1+1?"]}), samples)
    code, _, errors = rescore(str(samples))
    assert code == 2 and "has no column position" in errors
    (samples.parents[1] / "config.yaml").unlink()
    code, _, errors = rescore(str(samples))
    assert code == 2 and "config.yaml" in errors and "Traceback" not in errors


# -- fuzz_rewards.py ---


@pytest.mark.slow
def test_hostile_answers_are_never_right_and_never_late() -> None:
    fuzz = functions("fuzz_rewards.py")
    chosen = {kind.__name__: [] for kind in fuzz["KINDS"]}
    number = 0
    while min(map(len, chosen.values())) < 8:  # all kinds, the rare ones, too
        kind, case = fuzz["hostile"](7, number)
        number += 1
        if len(chosen[kind]) < 30:
            chosen[kind].append(case)
    cases = [case for some in chosen.values() for case in some]
    assert len(cases) > 300
    config = RewardConfig(
        names=fuzz["NAMES"],
        weights=[1.0] * 7,
        workers=2,
        deadline_seconds=1,
        worker_memory_megabytes=512,
    )
    with RewardExecutor(config) as executor:
        found = list(executor.stream([case] for case in cases))
        assert executor.pool.slowest_seconds < config.deadline_seconds + fuzz["LATE_SECONDS"]
    assert len(found) == len(cases)
    for [scores] in found:
        assert scores["acc"].value == -1 and scores["base_acc"].value == 0, scores
