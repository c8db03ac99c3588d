"""Problems of a file, the stream of prompts, the tokenizer, and the tiny model's data."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prompt_streams import prompts_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r1zero.data.layout import ColumnLayout
from r1zero.data.problems import read_problems
from r1zero.data.prompts import Prompts, load_tokenizer
from r1zero.data.row_reader import Problem
from r1zero.data.template import Template
from r1zero.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"prompt": "question", "query": "", "response": "answer", "system": ""}
Tokens = PreTrainedTokenizerFast
ROWS = [{"question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(10)]


def write(folder: Path, rows: list, suffix: str) -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(
            "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
        )
    return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and a token in front that only add_special_tokens would add."""
    alphabet = {chr(code): code - 31 for code in range(32, 127)} | {"<s>": 0}
    backend = Tokenizer(models.WordLevel(alphabet, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="~")


def read(path: Path, columns: dict[str, str] = KEYS, **rules: bool) -> list[Problem]:
    return read_problems(path, ColumnLayout(columns, **rules)).problems


def stream(
    path: Path, tokenizer: Tokens, limit: int = 100, seed: int = 7, shuffle: bool = True
) -> Prompts:
    return prompts_of(path, ColumnLayout(KEYS), Template("plain"), tokenizer, limit, seed, shuffle)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_the_three_formats_give_the_same_problems(tmp_path: Path, suffix: str) -> None:
    problems = read(write(tmp_path, ROWS, suffix), KEYS)
    assert problems == [Problem(row["question"], row["answer"], "") for row in ROWS]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_query_follows_the_prompt_on_a_new_line_unless_empty(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"p": "A", "q": "B", "r": "1", "s": "S"},
        {"p": "A", "q": "", "r": "1", "s": None},
        {"p": "A", "q": None, "r": "1", "s": ""},
    ]
    keys = {"prompt": "p", "query": "q", "response": "r", "system": "s"}
    problems = read(write(tmp_path, rows, suffix), keys)
    assert problems == [Problem("A\nB", "1", "S"), Problem("A", "1", ""), Problem("A", "1", "")]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_numbers_are_fine_as_answers(tmp_path: Path, suffix: str) -> None:
    for number in (18, 0.5):
        path = write(tmp_path, [{"question": "Q", "answer": number}], suffix)
        assert [problem.answer for problem in read(path)] == [str(number)]


@pytest.mark.parametrize(
    "suffix, place", [(".parquet", "row 3"), (".jsonl", "line 3"), (".json", "row 3")]
)
@pytest.mark.parametrize(
    "column, value, reason",
    [
        ("question", None, "missing or null"),
        ("question", "", "is empty"),
        ("answer", None, "missing or null"),
        ("answer", " ", "is empty"),
    ],
)
def test_bad_row_names_file_and_row(
    tmp_path: Path, suffix: str, place: str, column: str, value: object, reason: str
) -> None:
    rows = [dict(row) for row in ROWS]
    rows[2][column] = value
    with pytest.raises(BadInput, match=f"data{suffix}, {place}: column '{column}' .*{reason}"):
        read(write(tmp_path, rows, suffix), KEYS)


@pytest.mark.parametrize("value", [5, True, ["x"], {"x": 1}])
def test_question_that_is_no_text_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(BadInput, match="row 1: column 'question' is .*, not a text"):
        read(write(tmp_path, [{"question": value, "answer": "1"}], ".parquet"), KEYS)


@pytest.mark.parametrize("value", [True, {"value": "1"}, [["x"], {"y": 1}]])
def test_answer_that_is_neither_text_nor_number_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(BadInput, match="line 1: column 'answer' is .*, not a text"):
        read(write(tmp_path, [{"question": "Q", "answer": value}], ".jsonl"), KEYS)


def test_an_infinite_answer_is_refused(tmp_path: Path) -> None:
    for suffix, place in ((".parquet", "row"), (".jsonl", "line")):
        rows = [{"question": "Q", "answer": 1.5}, {"question": "Q", "answer": float("inf")}]
        with pytest.raises(BadInput, match=f"{place} 2: column 'answer' is inf, which is no"):
            read(write(tmp_path, rows, suffix), KEYS)


def test_nan_of_a_parquet_column_of_numbers_counts_as_null(tmp_path: Path) -> None:
    rows = [{"question": "Q", "answer": 1.5}, {"question": "Q", "answer": float("nan")}]
    with pytest.raises(BadInput, match="row 2: column 'answer' is missing or null"):
        read(write(tmp_path, rows, ".parquet"), KEYS)


def test_key_that_later_lines_lack_is_the_fault_of_their_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="line 2: column 'answer' is missing"):
        read(write(tmp_path, [ROWS[0], {"question": "Q"}], ".jsonl"), KEYS)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_missing_column_names_those_there_are(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(BadInput, match="no column 'problem'; it has question, answer"):
        read(write(tmp_path, ROWS, suffix), KEYS | {"prompt": "problem"})


@pytest.mark.parametrize("part", ["prompt", "response"])
def test_prompt_and_response_columns_must_be_named(tmp_path: Path, part: str) -> None:
    with pytest.raises(BadInput, match=f"map_keys.{part} is empty"):
        read(write(tmp_path, ROWS, ".jsonl"), KEYS | {part: ""})


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    table = pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "empty.parquet")
    cases = {
        "absent.parquet": (None, "does not exist"),
        "empty.parquet": (None, "has no rows"),
        "empty.jsonl": ("", "has no rows"),
        "empty.json": ("[]", "has no rows"),
        "text.parquet": ("no parquet", "cannot be read"),
        "cut.json": ('[{"a"', "not valid JSON"),
        "cut.jsonl": ('{"question": "Q", "answer": "1"}\n{"que', "line 2: not valid JSON"),
        "deep.jsonl": ('{"question": ' + "[" * 100_000, "line 1: .*nested too deep"),
        "digits.jsonl": (
            '{"question": "Q", "answer": ' + "1" * 5000 + "}",
            "line 1: .*thousands of digits",
        ),
        "half.jsonl": (
            '{"question": "\\ud800", "answer": "1"}',
            "line 1: .* half of a surrogate pair",
        ),
        "object.json": ("{}", "must hold a JSON list"),
        "number.jsonl": ("5", "line 1: found int"),
        "data.csv": ("question,answer", "has no rows"),
        "data.xlsx": ("PK", "ends in .parquet, .*.csv"),
    }
    for name, (content, reason) in cases.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(BadInput, match=f"{name}.*{reason}"):
            read(tmp_path / name)


def test_each_epoch_is_another_permutation_and_seeds_differ(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    path = write(tmp_path, ROWS, ".jsonl")
    orders = [
        [p.index for p in stream(path, tokenizer, seed=seed).draw(10 * epoch, 10)]
        for seed in (7, 8)
        for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders} | {tuple(range(10))}) == 5
    fixed = [p.index for p in stream(path, tokenizer, shuffle=False).draw(0, 20)]
    assert fixed == 2 * list(range(10))


def test_order_is_the_same_on_every_machine(tmp_path: Path, tokenizer: Tokens) -> None:
    prompts = stream(write(tmp_path, ROWS, ".jsonl"), tokenizer)
    bits = np.random.Philox(key=[7, 3]).random_raw(10).tolist()
    assert [p.index for p in prompts.draw(30, 10)] == sorted(range(10), key=bits.__getitem__)


def test_draw_depends_on_the_position_alone(tmp_path: Path, tokenizer: Tokens) -> None:
    prompts = stream(write(tmp_path, ROWS, ".jsonl"), tokenizer)
    whole = [p.index for p in prompts.draw(0, 70)]
    again = stream(tmp_path / "data.jsonl", tokenizer)
    # crosses epochs, out of order
    for start, count in ((64, 6), (0, 7), (7, 26), (9, 1), (10, 10)):
        assert [p.index for p in again.draw(start, count)] == whole[start : start + count]


def test_prompt_carries_row_text_tokens_and_answer(tmp_path: Path, tokenizer: Tokens) -> None:
    for prompt in stream(write(tmp_path, ROWS, ".jsonl"), tokenizer).draw(0, 10):
        assert (
            prompt.text == ROWS[prompt.index]["question"]
            and prompt.answer == ROWS[prompt.index]["answer"]
        )
        assert prompt.tokens.dtype == np.int32
        assert prompt.tokens.tolist() == [ord(letter) - 31 for letter in prompt.text]


def test_long_prompts_are_dropped_and_counted_never_cut(tmp_path: Path, tokenizer: Tokens) -> None:
    rows = [{"question": "x" * length, "answer": "1"} for length in (3, 9, 4, 8, 1)]
    prompts = stream(write(tmp_path, rows, ".jsonl"), tokenizer, limit=4)
    assert prompts.num_dropped == 2 and len(prompts) == 3
    assert sorted((p.index, len(p.tokens)) for p in prompts.draw(0, 3)) == [(0, 3), (2, 4), (4, 1)]
    with pytest.raises(BadInput, match="all 5 prompts are longer than max_prompt_length=0"):
        stream(tmp_path / "data.jsonl", tokenizer, limit=0)


def test_more_rows_than_a_chunk_keep_their_numbers(tmp_path: Path, tokenizer: Tokens) -> None:
    rows = [{"question": str(n), "answer": str(n)} for n in range(2500)]
    prompts = stream(write(tmp_path, rows, ".parquet"), tokenizer)
    assert len(prompts) == 2500
    assert all(p.text == p.answer == str(p.index) for p in prompts.draw(0, 2500))


def test_tokenizer_loads_from_its_folder_or_is_refused(tmp_path: Path, tokenizer: Tokens) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("abc")["input_ids"] == [66, 67, 68]
    with pytest.raises(BadInput, match="absent has no tokenizer.json"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(BadInput, match="tokenizer.json: not valid JSON"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tools" / "tiny_recipe.py"
    spec = importlib.util.spec_from_file_location("tiny_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tiny_splits_share_no_sum(recipe: ModuleType) -> None:
    parts = recipe.split_pairs(np.random.default_rng(0))
    sums = [{frozenset(pair) for pair in part} for part in parts]  # a+b is b+a
    assert sum(map(len, sums)) == len(set.union(*sums)) == 90 * 91 // 2
    assert sum(map(len, parts)) == 90 * 90


def test_tiny_answers_are_right_when_computed(recipe: ModuleType) -> None:
    assert recipe.response((47, 38), np.random.default_rng(0), mixed=False) == (
        "<think>7+8=15, 4+3+1=8</think><answer>\\boxed{85}</answer>"
    )
    assert "0+9=9, 9+9+0=18" in recipe.response((90, 99), np.random.default_rng(0), mixed=False)


def test_tiny_tokenizer_survives_autotokenizer_and_reads_any_text(
    recipe: ModuleType, tmp_path: Path
) -> None:
    render = Template("qwen_r1").render
    made = recipe.make_tokenizer(render)
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}'
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    answer = recipe.response((47, 38), np.random.default_rng(0), mixed=False)
    for text in (render("What is 47+38?"), answer, "Other: caf\u00e9 \u4e2d <b>"):
        assert loaded(text)["input_ids"] == made(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded(render("What is 47+38?"))["input_ids"]) == 17


def test_gsm8k_is_turned_into_our_columns(tmp_path: Path) -> None:
    source = tmp_path / "train.jsonl"
    source.write_text(
        '{"question": "Q1", "answer": "1000+234=<<1000+234=1234>>1234\\n#### 1,234"}\n'
        '{"question": "Q2", "answer": "It is\\n#### -5"}\n'
    )
    command = [
        sys.executable,
        str(ROOT / "tools" / "prepare_gsm8k.py"),
        str(source),
        str(tmp_path / "out" / "t.parquet"),
    ]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert pq.read_table(tmp_path / "out" / "t.parquet").to_pylist() == [
        {"question": "Q1", "ground_truth_answer": "1234"},
        {"question": "Q2", "ground_truth_answer": "-5"},
    ]
    source.write_text('{"question": "Q1", "answer": "no number"}\n')
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "train.jsonl, row 1: the answer does not end in" in done.stderr
