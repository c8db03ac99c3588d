"""Data sets of a blend with columns, templates and reward functions of their own, from the
configuration to what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.small_config import load, only, told
from support.tool import run_here
from support.worlds import metrics, run, samples

from r1zero.config.load import dump, read_config
from r1zero.config.schema import ROOT
from r1zero.data.sources import train_sources
from r1zero.preflight.run import resolve
from r1zero.run_folder.samples import samples_path

# A reward function of one's own that sees a column and the name of the data set.
OWN = """
from r1zero.reward.functions import reward_function

@reward_function(scope="sample", columns=("level",))
def level(case):
    assert case.source in ("hard", "evaluation/hard"), case.source
    return float(case.row["level"])
"""
PLACE = "actor_rollout.data_path"
K = "algorithm.advantage_settings.k=2"
COLUMNS = {"prompt": "problem", "response": "answer"}


# -- configuration --------------------------------------------------------------------------------


def blend(home: Path, **other: object) -> str:
    """The override for a blend of two named sets, the second with these keys changed."""
    data = home / "train.parquet"
    entry = {
        "path": str(home / "other.parquet"),
        "weight": 3,
        "map_keys": COLUMNS,
        "prompt_type": "plain",
        "verifier_function": ["base_acc", "length"],
    }
    return f"{PLACE}={json.dumps({'plain': str(data), 'other': entry | other})}"


@pytest.fixture
def two(home: Path) -> Path:
    """A home with a second data set."""
    renamed = pa.table({"problem": ["2+2?", "3+3?"], "answer": ["4", "6"]})
    pq.write_table(renamed, home / "other.parquet")
    return home


def test_a_named_set_has_what_it_names_and_all_else_from_the_run(two: Path) -> None:
    cfg = load(two, blend(two))
    plain, other = train_sources(cfg)
    assert (plain.name, plain.share, plain.prompt_type) == ("plain", 0.25, "qwen_r1")
    assert plain.scorers == {"acc": 0.5, "format": 0.5}
    assert (other.name, other.share, other.prompt_type) == ("other", 0.75, "plain")
    assert other.scorers == {"base_acc": 0.5, "length": 0.5}
    assert other.layout.columns["prompt"] == "problem" and plain.layout.columns["system"] == ""
    (two / "again.yaml").write_text(dump(cfg))
    assert read_config(str(two / "again.yaml"))[0].actor_rollout == cfg.actor_rollout
    rewards = resolve(cfg, [], 1).reward_config
    assert rewards.functions == ["acc", "format", "base_acc", "length"]
    assert rewards.of_sources == {"other": {"base_acc": 0.5, "length": 0.5}}


def test_a_set_that_names_nothing_is_scored_as_the_run(home: Path) -> None:
    cfg = load(home, f"actor_rollout.data_path={{plain: {home / 'train.parquet'}}}")
    assert resolve(cfg, [], 1).reward_config.of_sources == {}


@pytest.mark.parametrize(
    ("value", "pieces"),
    [
        ("{}", [f"{PLACE}: {{}} must name a data set"]),
        ("[a, b]", [f"{PLACE}: ", "must be a text"]),
        ("{a b: c}", [f"{PLACE}: 'a b' must be a name"]),
    ],
)
def test_what_is_no_blend_is_told(home: Path, value: str, pieces: list[str]) -> None:
    problem = only(told(home, f"{PLACE}={value}"))
    for piece in pieces:
        assert piece in problem


@pytest.mark.parametrize(
    ("key", "value", "pieces"),
    [
        ("wieght", 2, [f"{PLACE}.other.wieght is unknown", "did you mean weight"]),
        ("weight", 0, [f"{PLACE}.other.weight: 0", "must be above 0"]),
        ("path", "gone", [f"{PLACE}.other.path: gone does not exist"]),
        ("prompt_type", "r1", [f"{PLACE}.other.prompt_type: ", "'r1' is not in"]),
        ("map_keys", {"prompt": "q"}, ["no column 'q'", f"{PLACE}.other.map_keys"]),
        ("verifier_function", ["rigth"], [f"{PLACE}.other.verifier_function", "rigth"]),
        ("verifier_function", ["cosine"], [f"{PLACE}.other.verifier_function: cosine", "name acc"]),
        ("verifier_weight", [1], [f"{PLACE}.other.verifier_weight: [1.0] has 1 weights"]),
    ],
)
def test_what_is_wrong_with_a_named_set_is_told_with_its_name(
    two: Path, key: str, value: object, pieces: list[str]
) -> None:
    problem = only(told(two, blend(two, **{key: value})))
    for piece in pieces:
        assert piece in problem


@pytest.mark.parametrize(
    ("overrides", "pieces"),
    [
        (["algorithm.advantage=gdpo"], ["gdpo looks at the scores of each", "leave it out"]),
        (["algorithm.advantage=pass_at_k", K], ["which responses are right", "['format']"]),
    ],
)
def test_an_estimator_that_needs_more_of_all_sets_is_refused(
    two: Path, overrides: list[str], pieces: list[str]
) -> None:
    override = blend(two, verifier_function=["format"])
    problem = only(told(two, override, *overrides))
    assert f"{PLACE}.other.verifier_function" in problem
    for piece in pieces:
        assert piece in problem


def test_only_the_functions_of_a_set_ask_for_its_columns(two: Path) -> None:
    (two / "mine.py").write_text(OWN)
    function = f"{two}/mine.py:level"
    override = blend(two, verifier_function=[function])
    problem = only(told(two, override))
    assert "other.parquet has no column 'level'" in problem and function in problem
    levels = pa.table({"problem": ["2+2?"], "answer": ["4"], "level": [2]})
    pq.write_table(levels, two / "other.parquet")
    problem = only(told(two, override))
    assert problem.startswith(f"{PLACE}.other.verifier_function: mine.level fails"), "its assert"
    assert "AssertionError: other" in problem, "it sees the name of the set"


# -- runs -----------------------------------------------------------------------------------------

OPTIONS = [
    "training.train_iters=2",
    "training.global_batch_size=8",
    "training.save_interval=1",
    "training.eval_interval=2",
    "training.parts=3",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.ppo_mini_batch_size=16",
]


@pytest.fixture(scope="module")
def options(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A blend of the problems of tiny, and of three times as many under other columns with a level,
    whose responses a function of one's own scores, too."""
    folder = tmp_path_factory.mktemp("sets")
    table = pq.read_table(tiny / "train.parquet").slice(100, 200)
    columns = {
        "problem": table["question"],
        "answer": table["ground_truth_answer"],
        "level": pa.array([number % 5 for number in range(200)]),
    }
    pq.write_table(pa.table(columns), folder / "hard.parquet")
    (folder / "mine.py").write_text(OWN)
    hard = {
        "path": str(folder / "hard.parquet"),
        "map_keys": COLUMNS,
        "prompt_type": "plain",
        "verifier_function": ["acc", f"{folder}/mine.py:level"],
        "verifier_weight": [1, 0.25],
    }
    sets = {"easy": "embedded:tiny", "hard": hard | {"weight": 3}}
    held_out = {"easy": "embedded:tiny", "hard": hard}
    blend = f"{folder}/blend.yaml"
    text = (ROOT / "configs" / "tiny.yaml").read_text()
    text = text.replace(
        "data_path: embedded:tiny\n    n_", f"data_path: {json.dumps(sets)}\n    n_"
    )
    text = text.replace("eval_data_path: embedded:tiny", f"evaluation: {json.dumps(held_out)}")
    Path(blend).write_text(text)
    return [blend, *OPTIONS]


@pytest.fixture(scope="module")
def trained(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, *overrides = options
    return run(tmp_path_factory.mktemp("trained") / "run", 4, config, overrides)


def test_each_set_is_asked_and_scored_in_its_own_way(trained: Path) -> None:
    for step in (1, 2):
        rows = samples(trained, step)
        sources = [row["source"] for row in rows]
        assert (sources.count("hard"), sources.count("easy")) == (24, 8), "three to one"
        for row in rows:
            if row["source"] == "easy":
                assert row["prompt"].startswith("<|im_start|>")
                assert row["score/mine.level"] is None and row["outcome/mine.level"] is None
                reward = 0.5 * row["score/acc"] + 0.5 * row["score/format"]
            else:
                assert row["prompt"].startswith("What is"), "the template is the question alone"
                assert row["score/format"] is None
                level = (row["prompt_index"] - 4053) % 5
                assert row["score/mine.level"] == level, "of its own row"
                reward = row["score/acc"] + 0.25 * level
            assert row["reward"] == pytest.approx(reward, abs=1e-12)
        line = metrics(trained)[step - 1]
        for source in ("easy", "hard"):
            mine = [row for row in rows if row["source"] == source]
            assert line[f"data/{source}/samples"] == len(mine)
            mean = sum(row["reward"] for row in mine) / len(mine)
            assert line[f"data/{source}/reward"] == pytest.approx(mean, abs=1e-12)
            right = sum(row["outcome/acc"] == "right" for row in mine)
            assert line[f"data/{source}/right"] == right / len(mine)
        graded = [row["score/mine.level"] for row in rows if row["source"] == "hard"]
        assert line["reward/mine.level"] == pytest.approx(sum(graded) / len(graded), abs=1e-12)


def test_held_out_sets_have_their_own_scorers(trained: Path) -> None:
    lines = (trained / "evaluation.jsonl").read_text().splitlines()
    before, _ = map(json.loads, lines)
    assert "easy/reward/format/right" in before and "easy/reward/mine.level" not in before
    assert before["hard/reward/mine.level"] == pytest.approx(2.0), "the mean of 0 to 4"
    assert "hard/reward/format/right" not in before
    place = trained / "evaluation" / "hard" / "step_000000.json"
    assert json.loads(place.read_text())["protocol"]["rules"][0] == "acc"


def test_one_rank_draws_and_scores_the_same_and_a_resumed_run_goes_on(
    trained: Path, options: list[str], tmp_path: Path
) -> None:
    config, *overrides = options
    alone = run(tmp_path / "alone", 1, config, overrides)
    assert _told(samples(alone, 1)) == _told(samples(trained, 1))
    second = _told(samples(alone, 2))
    (alone / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1\n")
    (alone / "samples" / "step_000002.parquet").unlink()
    run(alone, 1, config, overrides)
    assert _told(samples(alone, 2)) == second


def _told(rows: list[dict]) -> list[dict]:
    """Rows without what rounding may change between layouts."""
    return [{key: value for key, value in row.items() if key != "advantage"} for row in rows]


def test_samples_of_all_sets_are_scored_again_alike(trained: Path, capsys) -> None:
    args = [str(samples_path(trained, 2))]
    if samples_path(trained, 2).is_dir():
        args = sorted(str(path) for path in samples_path(trained, 2).iterdir())
    config = str(trained / "config.yaml")
    assert run_here("rescore.py", *args, "--config", config) == 0
    said = capsys.readouterr().out
    assert "32 samples scored again by acc, format, " in said
    assert said.count(": no changes") == 4, said
