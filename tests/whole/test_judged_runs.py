"""A reward model in a run: its values are transformers', rewards follow from them, whatever the layout."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.multiproc import run_ranks
from support.patience import wait_until
from support.tiny_reward_models import (
    make_process_reward_model,
    make_reward_model,
    step_values_of,
    values_of,
)
from support.warm_rewards import fork_from_here
from support.worlds import SHORT, metrics, resolved_run, run, samples
from transformers import AutoTokenizer

from r1zero import main
from r1zero.distributed.shutdown import PreemptionNotice
from r1zero.trainer import prepare, train

MARK = "<extra_0>"
WEIGHT = 0.5
# fp32 sums in another order, of values up to 10; and what becomes of it in a group's deviation.
TOLERANCE = 1e-5
RULES = ("score/acc", "score/format")
BY_RULES = 0.5  # weight of each rule
FIVE: list[str] = []  # 1 train, 2 rollout, 1 ref, 1 reward
EIGHT = [
    "actor_rollout.num_gpus_for_train=2",
    "actor_rollout.tensor_model_parallel_size=1",
    "actor_rollout.num_gpus_for_infer=2",
    "resource_pool.actor_rollout=[4]",
    "resource_pool.ref=[1]",
    "resource_pool.reward=[3]",
]
SIX_TP = ["resource_pool.reward=[2]", "reward.tensor_model_parallel_size=2"]
SIX_PP = ["resource_pool.reward=[2]", "reward.pipeline_model_parallel_size=2"]
COLOCATED = [
    "resource_pool.colocate=true",
    "resource_pool.actor_rollout=[2]",
    "resource_pool.ref=[]",
    "reward.tensor_model_parallel_size=2",
]


@pytest.fixture(scope="module")
def judge(tiny, tmp_path_factory) -> Path:
    return make_reward_model(tiny, tmp_path_factory.mktemp("judge") / "model")


def job(judge: Path, *keys: str) -> list[str]:
    """Two steps, with a reward model."""
    return [
        *SHORT,
        "resource_pool.reward=[1]",
        f"reward.load={judge}",
        f"reward.weight={WEIGHT}",
        "reward.micro_batch_size=3",
        *keys,
    ]


def rules(row: dict) -> float:
    return BY_RULES * sum(row[name] for name in RULES)


def groups(rows: list[dict]) -> list[list[dict]]:
    """The rows of each prompt."""
    found: dict[int, list[dict]] = {}
    for row in rows:
        found.setdefault(row["position"], []).append(row)
    return list(found.values())


def by_group(values: list[float]) -> list[float]:
    """The values of a group, less their mean, by their deviation."""
    array = np.array(values)
    return ((array - array.mean()) / (array.std(ddof=1) + 1e-6)).tolist()


@pytest.fixture(scope="module")
def world_of_one(judge, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("one"), 1, "tiny", job(judge))


def test_values_are_those_of_transformers_and_rewards_follow_from_them(world_of_one, judge):
    rows = samples(world_of_one, 1)
    expected = values_of(judge, [row["prompt"] + row["response"] for row in rows])
    assert [row["score/model"] for row in rows] == pytest.approx(expected, abs=TOLERANCE)
    assert {row["outcome/model"] for row in rows} == {"graded"}
    for group in groups(rows):
        scaled = by_group([row["score/model"] for row in group])
        for row, value in zip(group, scaled, strict=True):
            assert row["reward"] == pytest.approx(rules(row) + WEIGHT * value, abs=1e-9)
    mean = np.mean([row["score/model"] for row in rows])
    assert metrics(world_of_one)[0]["reward/model"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    ("size", "layout"),
    [(5, FIVE), (8, EIGHT), (6, SIX_TP), (6, SIX_PP), (2, COLOCATED)],
    ids=["5", "8, reward DP3", "6, reward TP2", "6, reward PP2", "2 colocated, reward TP2"],
)
def test_rewards_do_not_depend_on_the_layout(world_of_one, judge, tmp_path, size, layout):
    folder = run(tmp_path, size, "tiny", job(judge, *layout))
    for step in (1, 2):
        for one, other in zip(samples(world_of_one, step), samples(folder, step), strict=True):
            assert one["response"] == other["response"]
            assert other["score/model"] == pytest.approx(one["score/model"], abs=TOLERANCE)
            assert other["reward"] == pytest.approx(one["reward"], abs=10 * TOLERANCE)
    for one, other in zip(metrics(world_of_one), metrics(folder), strict=True):
        for key in ("reward/model", "reward/mean", "loss", "kl", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=2e-4, abs=2e-5), key


def test_a_rendering_of_its_own_and_what_is_too_long_for_it(tiny, tmp_path):
    """By the chat template of its tokenizer; a third of the renderings are longer than it reads."""
    judge = make_reward_model(tiny, tmp_path / "judge", max_position_embeddings=64)
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    (judge / "chat_template.jinja").write_text(template)
    keys = [
        "reward.prompt_type=tokenizer_template",
        "reward.normalize=none",
        "reward.max_failure_rate=1",
        "training.train_iters=1",
    ]
    rows = samples(run(tmp_path / "run", 5, "tiny", job(judge, *keys)), 1)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    questions = pq.read_table(tiny / "train.parquet").to_pylist()
    texts = []
    for row in rows:
        response = row["response"].replace("<|im_end|>", "").replace("<|endoftext|>", "")
        turns = [
            {"role": "user", "content": questions[row["prompt_index"]]["question"]},
            {"role": "assistant", "content": response},
        ]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    values = values_of(judge, texts)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    read = [length <= 64 for length in lengths]
    assert [row["outcome/model"] == "graded" for row in rows] == read
    for row, value, fits in zip(rows, values, read, strict=True):
        if fits:
            assert row["score/model"] == pytest.approx(value, abs=TOLERANCE)
            assert row["reward"] == pytest.approx(rules(row) + WEIGHT * value, abs=TOLERANCE)
        else:
            assert "more than the 64 tokens" in row["failure"]


def test_the_data_say_what_scores_a_problem(tiny, judge, tmp_path):
    """By turns the rules, the model, both: in a column of the data."""
    table = pq.read_table(tiny / "train.parquet").slice(0, 6)
    kinds = pa.array(["rules", "model", None] * 2)
    pq.write_table(table.append_column("kind", kinds), tmp_path / "train.parquet")
    keys = [
        f"actor_rollout.data_path={tmp_path}/train.parquet",
        "training.map_keys.category=kind",
        "training.no_shuffle=true",
        "training.train_iters=1",
        "training.global_batch_size=6",
        "actor_rollout.ppo_mini_batch_size=24",
    ]
    folder = run(tmp_path / "run", 5, "tiny", job(judge, *keys))
    kinds_seen = set()
    for group in groups(samples(folder, 1)):
        kind = ["rules", "model", None][group[0]["position"] % 3]
        kinds_seen.add(kind)
        values = [row["score/model"] for row in group]
        scaled = [0.0] * len(group)
        if kind == "rules":
            assert values == [None] * len(group)
        else:
            scaled = by_group(values)
        for row, value in zip(group, scaled, strict=True):
            of_rules = 0.0 if kind == "model" else rules(row)
            assert row["reward"] == pytest.approx(of_rules + WEIGHT * value, abs=1e-9)
    assert kinds_seen == {"rules", "model", None}
    [line] = metrics(folder)
    assert not line["updates/skipped"]


@pytest.mark.parametrize("category", [0, 1])
def test_advantages_by_function_see_what_scores_a_problem_and_nothing_else(
    tiny, judge, tmp_path, category
):
    """GDPO normalises each function by itself: the model where it scores alone, else the rules."""
    keys = [
        "algorithm.advantage=gdpo",
        f"training.dataset_category={category}",
        "reward.verifier=false",
        "training.train_iters=1",
    ]
    rows = samples(run(tmp_path / "run", 5, "tiny", job(judge, *keys)), 1)
    key = "score/model" if category == 0 else "reward"
    for group in groups(rows):
        scored = sorted(group, key=lambda row: row[key])
        advantages = [row["advantage"] for row in scored]
        if category == 0:
            assert advantages == sorted(advantages), "in the order of the model's values"
        elif len({row["score/acc"] for row in group}) > 1:
            assert len(set(advantages)) > 1, "the rules count"
    assert any(row["advantage"] for row in rows)


def test_groups_that_the_model_scores_alone_are_not_dropped_by_the_rules(tiny, judge, tmp_path):
    keys = [
        "reward.verifier=false",
        "algorithm.equal_groups=replace",
        "algorithm.max_rounds=2",
        "training.train_iters=1",
    ]
    folder = run(tmp_path / "run", 5, "tiny", job(judge, *keys))
    of_rules = [{row["score/acc"] for row in group} for group in groups(samples(folder, 1))]
    assert any(len(values) == 1 for values in of_rules), "the rules are of one mind about some"
    [line] = metrics(folder)
    assert line["groups/kept"] == line["groups/drawn"] == 4


def test_a_process_reward_model_values_the_steps_of_a_response(tiny, tmp_path):
    judge = make_process_reward_model(tiny, tmp_path / "judge", MARK)
    keys = ["reward.normalize=none", "reward.of_steps=mean", "reward.verifier=false"]
    folder = run(tmp_path / "run", 5, "tiny", job(judge, *keys, "training.train_iters=1"))
    rows = samples(folder, 1)
    for row in rows:
        response = row["response"].replace("<|im_end|>", "").replace("<|endoftext|>", "")
        steps = [step.strip() for step in response.split("\n\n") if step.strip()] or [""]
        text = row["prompt"] + "".join(step + MARK for step in steps)
        expected = float(np.mean(step_values_of(judge, text, MARK)))
        assert row["score/model"] == pytest.approx(expected, abs=TOLERANCE)
        assert row["reward"] == pytest.approx(WEIGHT * expected, abs=TOLERANCE), (
            "rules do not count"
        )


class NoticeAfter(PreemptionNotice):
    """A signal that arrives during a step."""

    def __init__(self, runtime, step: int) -> None:
        super().__init__()
        self.runtime = runtime
        self.step = step

    @property
    def asked_by(self) -> str | None:
        return "a test" if self.runtime.progress.step >= self.step else None

    @asked_by.setter
    def asked_by(self, _: object) -> None:
        pass


AHEAD = ["training.train_iters=4", "training.staleness=1", "actor_rollout.ppo_mini_batch_size=8"]


def until(rank: int, size: int, store: object, overrides: list[str], step: int) -> str | None:
    runtime = prepare(*resolved_run(rank, size, store, "tiny", overrides))
    return train(runtime, NoticeAfter(runtime, step))


def test_a_run_goes_on_exactly_with_judged_groups_on_their_way(judge, tiny, tmp_path):
    """What a checkpoint holds of the batch that was drawn ahead is not looked at a second time."""
    keys = job(judge, *AHEAD)
    whole = run(tmp_path / "whole", 5, "tiny", keys)
    folder = tmp_path / "run"
    reasons = run_ranks(until, 5, [*keys, f"output_dir={folder}"], 2)
    assert set(reasons) == {"a test asks to leave"}
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    run(folder, 5, "tiny", keys)
    run(elsewhere, 1, "tiny", keys)
    for step in (3, 4):
        assert samples(folder, step) == samples(whole, step)
        for one, other in zip(samples(whole, step), samples(elsewhere, step), strict=True):
            assert other["response"] == one["response"]
            assert other["reward"] == pytest.approx(one["reward"], abs=10 * TOLERANCE)
    for ours, theirs in zip(metrics(folder), metrics(whole), strict=True):
        for key in ("reward/model", "reward/mean", "loss", "kl", "grad_norm"):
            assert ours[key] == theirs[key], key


def test_a_reward_model_may_come_and_go_between_two_starts(judge, tiny, tmp_path):
    """Groups on their way are looked at by who is there when they are learnt from."""
    folder = tmp_path / "run"
    without = [key for key in job(judge, *AHEAD) if "resource_pool.reward" not in key]
    run_ranks(until, 4, [*without, f"output_dir={folder}"], 2)
    run(folder, 5, "tiny", job(judge, *AHEAD))
    _, second, third, fourth = metrics(folder)
    assert "reward/model" not in second and "reward/model" in third and "reward/model" in fourth
    assert all(row["score/model"] is not None for row in samples(folder, 3))
    gone = tmp_path / "gone"
    run_ranks(until, 5, [*job(judge, *AHEAD), f"output_dir={gone}"], 2)
    run(gone, 4, "tiny", without)
    assert "reward/model" in metrics(gone)[2], "what was drawn ahead keeps its rewards"
    assert "score/model" not in samples(gone, 4)[0]


def as_rank(rank: int, size: int, port: int, words: list[str], folder: Path) -> None:
    """The program as torchrun starts it, with its standard error in a file."""
    os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    fork_from_here()
    sys.argv = ["main.py", "--config", "tiny", *words]
    sys.exit(main.main())


def test_a_killed_rank_of_the_reward_model_ends_the_job_with_its_name(judge, tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = job(judge, "training.train_iters=5000", f"output_dir={tmp_path}/run")
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=as_rank, args=(rank, 5, port, words, tmp_path)) for rank in range(5)
    ]
    for process in ranks:
        process.start()
    try:
        wait_until((tmp_path / "run" / "metrics.jsonl").exists)
        killed = time.monotonic()
        ranks[4].kill()
        wait_until(lambda: all(process.exitcode is not None for process in ranks))
        ended = time.monotonic() - killed
    finally:
        for process in ranks:
            process.kill()
            process.join()
    said = "".join((tmp_path / f"{rank}.err").read_text() for rank in range(4))
    told = [line for line in said.splitlines() if line.startswith("r1zero: ")]
    assert told == ["r1zero: rank 4 (reward) ended without a word (killed, or out of memory?)"]
    assert {process.exitcode for process in ranks[:4]} == {1}
    assert ended < 60, "the job ends within a minute"
