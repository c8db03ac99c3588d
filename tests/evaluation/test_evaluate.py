"""Evaluation: estimators against enumeration, scores by hand, the same answers on any layout and
after training."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.model_folders import base
from support.models import make_model
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG
from support.tool import TOOLS, functions
from support.worlds import run, samples

from r1zero.data.layout import ColumnLayout
from r1zero.data.preprocess import Recipe, preprocess
from r1zero.data.problems import read_problems, read_tags
from r1zero.data.template import TEMPLATES
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RankGrid
from r1zero.evaluation.evaluate import shares
from r1zero.evaluation.pass_at_k import bootstrap_interval, pass_at_k
from r1zero.evaluation.scores import EvalProtocol, attempts, report, table
from r1zero.report.history import RunHistory
from r1zero.report.page import PACKED_BYTES
from r1zero.types import Batch, Group, Outcome, Prompt, Sample, Score

# -- estimators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(samples: int) -> None:
    for k in range(1, samples + 1):
        for right in range(samples + 1):
            answers = [True] * right + [False] * (samples - right)
            chosen = [any(picked) for picked in itertools.combinations(answers, k)]
            assert pass_at_k(np.array([right]), samples, k) == pytest.approx(
                [np.mean(chosen)], abs=1e-12
            )


def test_pass_at_k_does_not_overflow_and_its_ends_are_exact() -> None:
    assert pass_at_k(np.array([0, 1, 2000]), 2000, 1000).tolist() == [0.0, pytest.approx(0.5), 1.0]


def test_bootstrap_interval_is_that_of_the_normal_law_for_many_problems() -> None:
    values = (np.arange(1000) % 10 < 3).astype(float)
    low, high = bootstrap_interval(values, seed=1)
    error = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == (
        pytest.approx(0.3 - error, abs=2e-3),
        pytest.approx(0.3 + error, abs=2e-3),
    )
    spread = np.sqrt(np.arange(50))
    first, again, other = (bootstrap_interval(spread, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert bootstrap_interval(np.ones(7), seed=1) == (1.0, 1.0)


# -- report ---------------------------------------------------------------------------------------


def group(position: int, outcomes: Sequence[Outcome], format_right: int, length: int) -> Group:
    members = []
    for member, outcome in enumerate(outcomes):
        shape = Outcome.RIGHT if member < format_right else Outcome.WRONG
        scores = {
            "format": Score(float(member < format_right), shape),
            "acc": Score(1.0 if outcome is Outcome.RIGHT else -1.0, outcome),
        }
        tokens, logprobs = np.zeros(length, np.int32), np.zeros(length, np.float32)
        members.append(Sample(tokens, logprobs, member == 0, 0, scores, reward=scores["acc"].value))
    return Group(position, Prompt(position + 1, "", np.zeros(1, np.int32), ""), members)


CONDITIONS = EvalProtocol(
    model="m",
    data="d",
    data_sha256="",
    rows=3,
    problems=2,
    dropped=0,
    template="t",
    template_sha256="",
    samples_per_problem=4,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    max_new_tokens=8,
    seed=5,
    dtype="fp32",
    rules=["format", "acc"],
    extractor="x",
)


def test_scores_are_those_worked_out_by_hand() -> None:
    right, wrong, none, late = Outcome.RIGHT, Outcome.WRONG, Outcome.NO_ANSWER, Outcome.TIMEOUT
    groups = [
        group(0, [right, wrong, none, right], 4, 3),
        group(1, [late, wrong, wrong, none], 1, 5),
    ]
    tags = {"level": ["-", "easy", "hard"], "subject": ["a", "a", "a"]}
    found = report(groups, tags, CONDITIONS)
    scores = found["scores"]
    assert scores["pass@1"] == scores["avg@4"] == pytest.approx((2 / 4 + 0) / 2)
    # 2 of 4 right: one of six pairs has none
    assert scores["pass@2"] == pytest.approx((1 - 1 / 6 + 0) / 2)
    assert scores["pass@4"] == pytest.approx(1 / 2)
    assert scores["no_answer"] == 2 / 8 and scores["reward/format/right"] == 5 / 8
    assert scores["response_length/mean"] == 4.0 and scores["response_truncated"] == 2 / 8
    assert scores["reward/failed"] == 1
    # Two problems, 0.5 and 0: a resample has both, or one twice.
    assert (scores["pass@1/low"], scores["pass@1/high"]) == (0.0, 0.5)
    assert list(found["by"]) == ["level"], "a column of one value is no table"
    assert [(part["level"], part["problems"], part["pass@1"]) for part in found["by"]["level"]] == [
        ("easy", 1, 0.5),
        ("hard", 1, 0.0),
    ]
    text = table(found)
    assert re.search(r"pass@1 \(avg@4\) +25\.0%  \[0\.0%, 50\.0%\]", text)
    assert re.search(r"full format +62\.5%", text) and re.search(r"not scored +1 responses", text)
    assert re.search(r"hard +1 +0\.0%", text) and re.search(r"rules +format, acc\n", text)


def test_a_scorer_of_one_s_own_may_be_the_only_one() -> None:
    members = [
        Sample(
            np.zeros(3, np.int32),
            np.zeros(3, np.float32),
            False,
            0,
            {"mine.score": Score(0.5, Outcome.GRADED)},
            reward=0.5,
        )
        for _ in range(4)
    ]
    groups = [Group(0, Prompt(0, "", np.zeros(1, np.int32), ""), members)]
    found = report(groups, {}, replace(CONDITIONS, rules=["path/to/mine.py:score"]))
    assert (found["scores"]["pass@1"], found["scores"]["reward/mine.score"]) == (0.0, 0.5)
    members[2].reward = math.nan  # as it is until it is scored
    with pytest.raises(AssertionError, match="rewards of the prompt at position 0"):
        report(groups, {}, CONDITIONS)


def test_attempts_are_powers_of_two_and_all() -> None:
    assert [attempts(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_tags_are_columns_that_the_data_has(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa

    rows = [{"question": "Q", "level": 3}, {"question": "R", "level": 1}]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    assert read_tags(path, ("level", "subject")) == {"level": ["3", "1"]}


# -- worlds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problems", "k", "round_samples"),
    [(10, 4, 8), (7, 3, None), (3, 2, 64), (5, 16, 4), (1, 1, None)],
)
def test_all_problems_are_answered_once_and_rounds_do_not_depend_on_the_ranks(
    problems: int, k: int, round_samples: int | None
) -> None:
    batch = Batch(0, 0, [None] * problems, k, problems * k)
    alone = RankGrid.of("rollout", 0, 1)
    for replicas in (1, 2, 5):
        span = RankGrid.of("rollout", 0, replicas)
        found = [shares(batch, round_samples, span, replica) for replica in range(replicas)]
        assert len({len(parts) for parts in found}) == 1, "replicas that share experts run in step"
        rounds = [part for parts in found for part in parts if part]
        assert sorted(position for part in rounds for position in part) == list(range(problems))
        if round_samples is not None:
            of_one = [part for part in shares(batch, round_samples, alone, 0) if part]
            assert sorted(rounds, key=min) == of_one
            assert all(len(part) * k <= max(round_samples, k) for part in rounds)


def evaluate_body(rank: int, size: int, store: object, arguments: list[str]) -> None:
    """Evaluate as tools/evaluate.py does once it has looked at its arguments."""
    from r1zero.evaluation.standalone import prepare, run

    tool = functions("evaluate.py")
    args = tool["parse"](arguments)
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    assert not tool["check"](args, launch)
    world = World(
        launch,
        tool["placement_of"](args, launch),
        DEVICE,
        timedelta(seconds=LONG),
        store,
    )
    run(
        prepare(tool["request"](args), world),
        tool["output_folder"](args),
        args.round_samples or None,
    )


def evaluated(size: int, output: Path, *arguments: str) -> tuple[dict, list[dict]]:
    """Evaluate on `size` ranks; the report and the answers."""
    run_ranks(evaluate_body, size, [*arguments, "--output", str(output)])
    return found(output)


def found(output: Path) -> tuple[dict, list[dict]]:
    return json.loads((output / "eval.json").read_text()), pq.read_table(
        output / "eval.parquet"
    ).to_pylist()


@pytest.fixture(scope="module")
def flags(tiny: Path) -> list[str]:
    return [
        "--model",
        str(tiny / "model"),
        "--data",
        str(tiny / "eval.parquet"),
        "--problems",
        "100",
        "--k",
        "3",
        "--max-new-tokens",
        "32",
        "--temperature",
        "0.9",
        "--round-samples",
        "60",
        "--workers",
        "1",
    ]


@pytest.fixture(scope="module")
def on_one_rank(
    flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, list[dict]]:
    return evaluated(1, tmp_path_factory.mktemp("one"), *flags)


def test_two_ranks_give_the_same_scores_bit_for_bit(
    flags: list[str], on_one_rank: tuple[dict, list[dict]], tmp_path: Path
) -> None:
    # Through torchrun and the command line, each rank a replica.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(TOOLS / "evaluate.py"),
    ]
    done = subprocess.run(
        [*command, *flags, "--output", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert found(tmp_path) == on_one_rank
    content, rows = on_one_rank
    assert (
        0
        < content["scores"]["pass@1"]
        < content["scores"]["pass@2"]
        < content["scores"]["pass@3"]
        < 1
    )
    assert (
        len({(row["prompt"], row["response"]) for row in rows})
        > len({row["prompt"] for row in rows})
        == 100
    )
    for line in ("100 problems x 3", "data_sha256", "template_sha256", "extractor", "seconds"):
        assert line in done.stdout


def test_neither_tensor_parallelism_nor_the_rounds_change_the_answers(
    flags: list[str], on_one_rank: tuple[dict, list[dict]], tmp_path: Path
) -> None:
    content, rows = evaluated(
        4, tmp_path, *flags, "--tensor-model-parallel-size", "2", "--round-samples", "0"
    )
    assert content["scores"] == on_one_rank[0]["scores"]
    assert [row["response"] for row in rows] == [row["response"] for row in on_one_rank[1]]


def test_experts_are_dealt_over_tensor_parallel_ranks_and_over_replicas(
    flags: list[str], tiny: Path, tmp_path: Path
) -> None:
    """Of replicas that share them the second has no problems in the last round."""
    make_model("qwen3_moe_mixed", tmp_path / "model")
    chosen = [
        "--model",
        str(tmp_path / "model"),
        "--temperature",
        "0",
        "--problems",
        "3",
        "--k",
        "1",
        "--round-samples",
        "1",
    ]
    chosen += ["--tokenizer-name-or-path", str(tiny / "model"), "--max-new-tokens", "8"]
    _, rows = evaluated(1, tmp_path / "one", *flags, *chosen)
    _, cut = evaluated(2, tmp_path / "two", *flags, *chosen, "--tensor-model-parallel-size", "2")
    _, shared = evaluated(2, tmp_path / "shared", *flags, *chosen, "--expert-parallel-size", "2")
    for other in (cut, shared):
        assert [row["response"] for row in other] == [row["response"] for row in rows]


def test_preprocessed_problems_get_the_same_answers(
    flags: list[str], on_one_rank: tuple[dict, list[dict]], tiny: Path, tmp_path: Path
) -> None:
    keys = {"prompt": "question", "response": "ground_truth_answer"}
    problems, recipe = (
        read_problems(tiny / "eval.parquet", ColumnLayout(keys)).rows,
        Recipe(str(tiny / "model"), "qwen_r1", str(TEMPLATES), "R1AlpacaStyleInstructionHandler"),
    )
    preprocess(problems, str(tmp_path / "eval"), recipe, workers=1)
    content, rows = evaluated(1, tmp_path, *flags, "--data", str(tmp_path / "eval"))
    assert rows == on_one_rank[1] and content["scores"] == on_one_rank[0]["scores"]


def test_temperature_0_takes_the_most_likely_token(
    flags: list[str], on_one_rank: tuple[dict, list[dict]], tmp_path: Path
) -> None:
    content, rows = evaluated(1, tmp_path, *flags, "--temperature", "0", "--seed", "8")
    by_prompt = {row["prompt"]: row["response"] for row in rows}
    assert all(row["response"] == by_prompt[row["prompt"]] for row in rows)
    assert (
        content["scores"]["pass@1"]
        == content["scores"]["pass@3"]
        != on_one_rank[0]["scores"]["pass@1"]
    )
    assert (content["protocol"]["temperature"], content["protocol"]["top_k"]) == (0.0, 1)


def test_the_protocol_names_what_was_run(
    flags: list[str], on_one_rank: tuple[dict, list[dict]], tiny: Path
) -> None:
    protocol = on_one_rank[0]["protocol"]
    assert (
        protocol["data_sha256"] == hashlib.sha256((tiny / "eval.parquet").read_bytes()).hexdigest()
    )
    assert (
        protocol["problems"],
        protocol["rows"],
        protocol["samples_per_problem"],
        protocol["temperature"],
        protocol["max_new_tokens"],
        protocol["template"],
    ) == (100, 256, 3, 0.9, 32, "qwen_r1")
    assert protocol["ends"] == ["<|endoftext|> (0)", "<|im_end|> (2)"]


def test_answers_end_where_training_ends_them(flags: list[str], tiny: Path, tmp_path: Path) -> None:
    content, rows = evaluated(
        1,
        tmp_path,
        *flags,
        "--model",
        str(base(tiny, tmp_path / "base")),
        "--problems",
        "20",
        "--stop",
        "</think>",
        "263",
    )
    assert content["protocol"]["ends"] == [
        "<|endoftext|> (0)",
        "<|im_end|> (2)",
        "<think> (263)",
        "</think> (264)",
    ]
    assert content["scores"]["response_truncated"] == 0
    assert all(
        "</think>" not in row["response"][:-8] and "<think>" not in row["response"][:-7]
        for row in rows
    )


TWO_RANKS = [
    "resource_pool.colocate=true",
    "resource_pool.actor_rollout=[2]",
    "resource_pool.ref=[]",
    "actor_rollout.micro_batch_size=8",
    "ref.micro_batch_size=8",
]


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, evaluated before, after two and at the end."""
    return run(
        tmp_path_factory.mktemp("trained"),
        2,
        "tiny",
        [
            *TWO_RANKS,
            "training.train_iters=3",
            "training.eval_interval=2",
            "training.eval_temperature=0.7",
            "training.eval_samples_per_prompt=2",
            "training.save_interval=3",
        ],
    )


def test_evaluation_is_due_at_the_ends_and_between(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 3]
    for line in lines:
        content = json.loads((trained / "evaluation" / f"step_{line['step']:06d}.json").read_text())
        assert content["scores"] == {key: value for key, value in line.items() if key != "step"}
        assert 0 < line["pass@1"] < line["pass@2"] < 1


def test_the_tool_finds_the_scores_of_the_run_s_last_evaluation(
    trained: Path, tiny: Path, tmp_path: Path
) -> None:
    content, rows = evaluated(
        1,
        tmp_path,
        "--model",
        str(trained / "model"),
        "--data",
        str(tiny / "eval.parquet"),
        "--k",
        "2",
        "--temperature",
        "0.7",
        "--max-new-tokens",
        "32",
    )
    last = json.loads((trained / "evaluation" / "step_000003.json").read_text())
    assert content["scores"] == last["scores"] and content["protocol"] == last["protocol"] | {
        "model": str(trained / "model")
    }
    answers = pq.read_table(trained / "evaluation" / "step_000003.parquet").to_pylist()
    assert [row["response"] for row in rows] == [row["response"] for row in answers]


def test_a_megatron_checkpoint_is_evaluated_like_the_model_it_holds(
    trained: Path, tiny: Path, tmp_path: Path
) -> None:
    common = ["--data", str(tiny / "eval.parquet"), "--problems", "40", "--max-new-tokens", "32"]
    checkpoint = [
        "--model",
        str(trained / "checkpoints"),
        "--tokenizer-name-or-path",
        str(tiny / "model"),
    ]
    saved = evaluated(1, tmp_path / "saved", *common, *checkpoint)
    exported = evaluated(1, tmp_path / "exported", *common, "--model", str(trained / "model"))
    assert saved[0]["scores"] == exported[0]["scores"] and saved[1] == exported[1]


def test_evaluation_leaves_training_as_it_was(trained: Path, tmp_path: Path) -> None:
    without = run(
        tmp_path, 2, "tiny", [*TWO_RANKS, "training.train_iters=1", "training.eval_data_path=null"]
    )
    assert [row["response"] for row in samples(trained, 1)] == [
        row["response"] for row in samples(without, 1)
    ]


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--k", "0"], "--k: 0 must be at least 1"),
        (["--temperature", "-1"], "--temperature: -1.0 must be a number from 0 on"),
        (["--temperature", "nan"], "--temperature: nan must be a number from 0 on"),
        (["--top-p", "0"], "--top-p: 0.0 must be above 0"),
        (["--deadline-seconds", "nan"], "--deadline-seconds: nan must be a number above 0"),
        (["--model", "/nowhere"], "--model: /nowhere is not a folder"),
        (
            ["--tokenizer-name-or-path", "/nowhere"],
            "--tokenizer-name-or-path: /nowhere has no tokenizer.json",
        ),
        (["--data", "/nowhere.parquet"], "--data: /nowhere.parquet does not exist"),
        (
            ["--data", "a/x.parquet", "b/x.jsonl"],
            "two of a/x.parquet, b/x.jsonl would write the same report",
        ),
        (
            ["--map-keys", '{"prompt": "problem", "response": "ground_truth_answer"}'],
            "no column 'problem'",
        ),
        (["--map-keys", "[]"], "--map-keys \\[\\] must be a JSON object"),
        (["--map-keys", "{}", "{}"], "--map-keys holds 2 objects for 1 data sets"),
        (
            ["--data", "a/x.parquet", "b/y.jsonl", "--map-keys", "{}", "{}", "{}"],
            "3 objects for 2 data sets",
        ),
        (["--prompt-type", "qwen_r2"], "--prompt-type: .*qwen_r1"),
        (["--stop", "the end"], "--stop: 'the end' is not one token"),
        (["--stop", "271"], "--stop: 271 is no id of this tokenizer, whose ids go up to 270"),
        (["--verifier", "accuracy"], "--verifier: accuracy .*did you mean acc"),
        (["--tensor-model-parallel-size", "2"], "2 does not divide the 1 ranks"),
        (["--expert-parallel-size", "0"], "--expert-parallel-size: 0 must be at least 1"),
        (["--expert-parallel-size", "2"], "2 deals experts out, but the model has none"),
        (
            ["--tensor-model-parallel-size", "0"],
            "--tensor-model-parallel-size: 0 must be at least 1",
        ),
        (["--output", "/proc/x"], "/proc/x cannot be written"),
    ],
)
def test_bad_flags_are_refused_by_a_sentence(
    flags: list[str], wrong: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert functions("evaluate.py")["main"]([*flags, *wrong]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said) and "Traceback" not in said


def test_answers_longer_than_the_model_s_positions_are_refused(flags: list[str]) -> None:
    with pytest.raises(
        AssertionError, match="BadInput: --max-new-tokens 100000: the longest prompt has"
    ):
        run_ranks(evaluate_body, 1, [*flags, "--max-new-tokens", "100000"])


@pytest.fixture(scope="module")
def on_several_sets(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step, evaluated before and after: on eval_data_path, on the same data by another name,
    and on data of other columns, template and sampling."""
    folder = tmp_path_factory.mktemp("several")
    table = pq.read_table(tiny / "eval.parquet").slice(0, 40)
    renamed = table.select(["question", "ground_truth_answer"]).rename_columns(
        ["problem", "solution"]
    )
    pq.write_table(renamed, folder / "renamed.parquet")
    columns = "{prompt: problem, response: solution}"
    return run(
        folder / "run",
        2,
        "tiny",
        [
            *TWO_RANKS,
            "training.train_iters=1",
            "training.evaluation.again=embedded:tiny",
            f"training.evaluation.greedy={{path: {folder}/renamed.parquet, map_keys: {columns}}}",
            "training.evaluation.greedy.samples_per_prompt=2",
            "training.evaluation.greedy.temperature=0",
            "training.evaluation.greedy.prompt_type=plain",
        ],
    )


def test_each_evaluation_set_has_scores_under_its_name(on_several_sets: Path) -> None:
    lines = (on_several_sets / "evaluation.jsonl").read_text().splitlines()
    before, after = map(json.loads, lines)
    for line in (before, after):
        names = {"again": {}, "greedy": {}}
        for key, value in line.items():
            name, _, rest = key.partition("/")
            if name in names:
                names[name][rest] = value
        alone = {key: value for key, value in line.items() if key.partition("/")[0] not in names}
        assert alone == names["again"] | {"step": line["step"]}, "others beside it change nothing"
        assert names["greedy"]["pass@1"] == names["greedy"]["pass@2"]
        assert "pass@2" not in alone
        place = on_several_sets / "evaluation" / "greedy" / f"step_{line['step']:06d}.json"
        content = json.loads(place.read_text())
        assert content["scores"] == names["greedy"]
        assert content["protocol"]["template"] == "plain"
        assert (content["protocol"]["problems"], content["protocol"]["top_k"]) == (40, 1)
    state = json.loads(lines[0])
    log = (on_several_sets / "logs" / "rank_0000.log").read_text()
    ending = log[log.rindex("held-out problems") - 3000 :]
    assert ending.count("held-out problems:") == 3
    assert f"{state['greedy/reward/acc/right']:.1%}" in ending


def test_the_report_shows_the_answers_of_each_evaluation_set(on_several_sets: Path) -> None:
    history = RunHistory(on_several_sets, PACKED_BYTES)
    history.read()
    shown = history.as_json()["heldOut"]
    assert {step: sorted(named) for step, named in shown.items()} == {
        step: ["", "again", "greedy"] for step in (0, 1)
    }
