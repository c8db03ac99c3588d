"""The examples of reward functions in runs: settings and columns from configuration and data to the
rewards; what does not fit is told before any rank starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.multiproc import run_ranks
from support.tool import run_here
from support.worlds import make_runtime, samples

from r1zero.config.load import dump
from r1zero.data.indexed import IndexedWriter
from r1zero.data.preprocessed import stem
from r1zero.data.prompts import load_tokenizer
from r1zero.errors import BadInput
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config
from r1zero.trainer import train
from r1zero.types import Batch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LEVEL_BONUS = f"{EXAMPLES}/reward_level_bonus.py:level_bonus"
DISTINCT = f"{EXAMPLES}/reward_distinct_answers.py:distinct_answers"


@pytest.fixture(scope="module")
def data(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The problems of the tiny model with a level, 1 to 5 in turn, as MATH writes it."""
    table = pq.read_table(tiny / "train.parquet").slice(0, 64)
    levels = pa.array([f"Level {1 + number % 5}" for number in range(len(table))])
    path = tmp_path_factory.mktemp("levels") / "train.parquet"
    pq.write_table(table.append_column("level", levels), path)
    return path


def overrides(data: Path, *more: str) -> list[str]:
    return [
        f"actor_rollout.data_path={data}",
        f"algorithm.verifier_function=[acc, '{LEVEL_BONUS}', '{DISTINCT}']",
        "algorithm.verifier_weight=[1.0, 1.0, 0.5]",
        "reward.settings={level_bonus: {bonus: 0.25, from-level: 2}}",
        "training.eval_data_path=null",
        "training.train_iters=1",
        "reward.workers=1",
        *more,
    ]


def run(rank: int, size: int, store: object, folder: Path, changed: list[str]) -> None:
    """Train on split roles; look at where rows are."""
    runtime = make_runtime(store, folder, *changed, rank=rank, size=size)
    seen: list[bool] = []
    share = runtime.move.share_batch

    def look(batch: Batch | None, *args: object) -> Batch:
        shared = share(batch, *args)
        seen.extend(prompt.row is not None for prompt in shared.prompts)
        return shared

    runtime.move.share_batch = look
    train(runtime)
    rollout = runtime.world.rollout
    mine = set(rollout.share(len(seen))) if rollout.is_output_rank else set()
    assert {position for position, has_row in enumerate(seen) if has_row} == mine


@pytest.mark.ranks
def test_settings_and_columns_reach_the_rewards_of_a_run_and_come_back_from_its_folder(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """4 ranks: one trains, two generate, one holds the reference. The rows go to the two alone."""
    changed = overrides(data)
    assert check(load_config("tiny", changed)[0]) == []
    run_ranks(run, 4, tmp_path / "run", changed)
    rows = samples(tmp_path / "run", 1)
    levels = pq.read_table(data)["level"].to_pylist()
    bonuses = set()
    for row in rows:
        level = int(levels[row["prompt_index"]][-1])
        expected = 0.25 * max(0, level - 1) if row["outcome/acc"] == "right" else 0.0
        assert row["score/reward_level_bonus.level_bonus"] == expected
        assert 0 <= row["score/reward_distinct_answers.distinct_answers"] <= 1
        bonuses.add(expected)
    assert len(bonuses) > 2
    file = str(tmp_path / "run" / "samples" / "step_000001.parquet")
    assert run_here("rescore.py", file) == 0
    out = capfd.readouterr().out
    assert "reward_level_bonus.level_bonus: no changes" in out and "reward: no changes" in out


def test_a_dump_holds_all_settings_and_loads_to_the_same(data: Path, tmp_path: Path) -> None:
    cfg, _ = load_config("tiny", overrides(data, "reward.cosine.exceeded=-5"))
    assert cfg.reward.settings["level_bonus"] == {"bonus": 0.25, "from_level": 2}
    assert cfg.reward.settings["cosine"]["exceeded"] == -5.0
    (tmp_path / "dumped.yaml").write_text(dump(cfg))
    assert load_config(str(tmp_path / "dumped.yaml"))[0].reward == cfg.reward


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            ["reward.settings.level_bonus.bonas=1"],
            ["reward.settings.level_bonus.bonas is unknown; did you mean bonus?"],
        ),
        (
            ["reward.settings.level_bonus.bonus=11"],
            ["reward.settings.level_bonus.bonus: 11.0 must be from 0 to 10, such as 0.5"],
        ),
        (
            ["algorithm.verifier_function=[acc, format, cosine]", "reward.settings.acc.rigth=1"],
            ["reward.settings.acc.rigth is unknown; did you mean right?"],
        ),
        (
            [f"algorithm.verifier_function=[format, repetition, '{LEVEL_BONUS}']"],
            ["reward_level_bonus.level_bonus depends on which responses are right: name acc"],
        ),
    ],
)
def test_what_does_not_fit_is_told_before_a_start(
    data: Path, changed: list[str], said: list[str]
) -> None:
    try:
        [problem] = check(load_config("tiny", overrides(data, *changed))[0])
    except BadInput as error:
        problem = str(error)
    assert all(part in problem for part in said), problem


def test_data_without_the_column_is_refused(data: Path, tiny: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"question": "1+1?", "ground_truth_answer": "2", "levle": 1}))
    [problem] = check(load_config("tiny", overrides(plain))[0])
    assert f"actor_rollout.data_path: {plain} has no column 'level', which the reward" in problem
    assert "reward_level_bonus.py:level_bonus sees" in problem and "did you mean levle?" in problem
    tokenizer = load_tokenizer(tiny / "model")
    prefix = tmp_path / "packed"
    with IndexedWriter([stem(prefix, "input_ids"), stem(prefix, "labels")]) as writer:
        writer.add([np.array(tokenizer(text)["input_ids"]) for text in ("What is 1+1?", "2")])
    [problem] = check(load_config("tiny", overrides(prefix))[0])
    assert "is preprocessed and has no column 'level'" in problem
    assert "name the data that it was made of" in problem


def test_score_reads_columns_from_its_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cases.jsonl"
    lines = [{"gold": "5", "response": r"\boxed{5}", "level": 4}, {"gold": "5", "response": "5"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--input", str(path), "--verifier", "acc", LEVEL_BONUS]
    assert run_here("score.py", *arguments) == 2
    assert "line 2: level is missing; a reward function sees this column" in capsys.readouterr().err
    path.write_text(json.dumps(lines[0]))
    assert run_here("score.py", *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"] == {"acc": 1.0, "reward_level_bonus.level_bonus": 1.0}
