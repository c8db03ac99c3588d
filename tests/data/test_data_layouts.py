"""Data as people have it: columns of other projects, folders of snapshots, odd file names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.small_config import load, only

from r1zero.data.files import data_files
from r1zero.data.layout import ColumnLayout
from r1zero.data.problems import ProblemSet, read_problems, read_tags
from r1zero.data.row_reader import Problem
from r1zero.data.template import Template
from r1zero.errors import BadInput
from r1zero.preflight.checks import check
from r1zero.preflight.datasets import look_at_data

ROWS = [{"question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(10)]
LINES = "\n".join(map(json.dumps, ROWS))
KEYS = {"prompt": "question", "response": "answer"}
VERL = {"prompt": "prompt", "response": "reward_model.ground_truth"}
MAP_KEYS = "training.map_keys={prompt: question, response: answer}"


def verl_row(n: int, *before: dict) -> dict:
    return {
        "data_source": "math",
        "prompt": [*before, {"role": "user", "content": f"{n}+1?"}],
        "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
        "extra_info": {"index": n},
    }


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, columns: dict[str, str] = KEYS, **rules: bool) -> ProblemSet:
    return read_problems(path, ColumnLayout(columns, **rules))


def answers(found: ProblemSet) -> list[str]:
    return [problem.answer for problem in found.problems]


def refusal(path: Path, columns: dict[str, str] = KEYS, **rules: bool) -> str:
    with pytest.raises(BadInput) as refused:
        read(path, columns, **rules)
    return str(refused.value)


# -- columns --------------------------------------------------------------------------------------


def test_the_columns_of_verl_are_read(tmp_path: Path) -> None:
    found = read(parquet(tmp_path / "train.parquet", [verl_row(n) for n in range(3)]), VERL)
    assert found.problems == [Problem(f"{n}+1?", str(n + 1), "") for n in range(3)]
    assert not found.notes
    lines = "\n".join(json.dumps(verl_row(n)) for n in range(3))
    assert read(put(tmp_path / "train.jsonl", lines), VERL).problems == found.problems


def test_structs_and_messages_written_as_json_text_are_read(tmp_path: Path) -> None:
    row = verl_row(1) | {"reward_model": '{"ground_truth": "2"}'}
    row["prompt"] = json.dumps(row["prompt"])
    assert read(parquet(tmp_path / "a.parquet", [row]), VERL).problems == [Problem("1+1?", "2", "")]


def test_a_column_whose_own_name_has_a_dot_comes_first(tmp_path: Path) -> None:
    row = {
        "prompt": "1+1?",
        "reward_model.ground_truth": "2",
        "reward_model": {"ground_truth": "3"},
    }
    assert answers(read(parquet(tmp_path / "a.parquet", [row]), VERL)) == ["2"]


@pytest.mark.parametrize(
    ("template", "system", "fate"), [("qwen_r1", "Be brief.", "kept"), ("plain", "", "replaced")]
)
def test_the_system_text_of_messages_goes_where_the_template_has_a_place(
    tmp_path: Path, template: str, system: str, fate: str
) -> None:
    rows = [verl_row(n, {"role": "system", "content": "Be brief."}) for n in range(3)]
    layout = ColumnLayout(VERL).fitting(Template(template))
    found = read_problems(parquet(tmp_path / "a.parquet", rows), layout)
    assert [problem.system for problem in found.problems] == [system] * 3
    assert f"the system text in the messages of 3 questions is {fate}" in only(found.notes)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "role 'assistant'",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            "2 of them are of the user",
        ),
        ([{"role": "user", "content": {"image": "x"}}], "not a text"),
        ([{"speaker": "user", "content": "a"}], "role None"),
    ],
)
def test_another_dialogue_is_told_once_for_the_file(
    tmp_path: Path, messages: list[dict], reason: str
) -> None:
    lines = "\n".join(json.dumps({"prompt": messages, "answer": "1"}) for _ in range(5))
    sentence = refusal(put(tmp_path / "a.jsonl", lines), KEYS | {"prompt": "prompt"})
    assert "all 5 rows have one fault" in sentence and reason in sentence


def test_messages_may_have_other_names_and_come_in_parts(tmp_path: Path) -> None:
    chats = [
        [{"from": "human", "value": "1+1?"}],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}],
            }
        ],
    ]
    lines = "\n".join(json.dumps({"question": chat, "answer": "2"}) for chat in chats)
    assert read(put(tmp_path / "a.jsonl", lines)).problems == [Problem("1+1?", "2", "")] * 2


def test_a_struct_is_told_with_the_names_in_it(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [verl_row(n) for n in range(3)])
    sentence = refusal(path, VERL | {"response": "reward_model"})
    assert "reward_model.style, reward_model.ground_truth" in sentence
    sentence = refusal(path, VERL | {"response": "reward_model.ground_truths"})
    assert "no column 'reward_model.ground_truths'" in sentence
    assert "did you mean reward_model.ground_truth?" in sentence


def test_a_list_of_one_answer_is_that_answer(tmp_path: Path) -> None:
    rows = [{"question": "Q", "answer": ["22"]}, {"question": "Q", "answer": ["7", "7"]}]
    assert answers(read(parquet(tmp_path / "a.parquet", rows))) == ["22", "7"]
    assert answers(
        read(put(tmp_path / "a.json", json.dumps([{"question": "Q", "answer": [5]}])))
    ) == ["5"]


def test_a_list_of_several_answers_is_told_with_the_way_out(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet", [{"question": "Q", "answer": [str(n), "x"]} for n in range(4)]
    )
    sentence = refusal(path)
    assert (
        "all 4 rows have one fault" in sentence and "name one of them, such as answer.0" in sentence
    )
    assert answers(read(path, KEYS | {"response": "answer.0"})) == ["0", "1", "2", "3"]


def test_a_fault_of_all_rows_is_one_of_the_file(tmp_path: Path) -> None:
    for number, (value, reason) in enumerate(
        [(None, "missing or null"), (True, "is True, not a text"), ("", "is empty")]
    ):
        lines = "\n".join(json.dumps({"question": "Q", "answer": value}) for _ in range(3))
        sentence = refusal(put(tmp_path / f"{number}.jsonl", lines))
        assert "all 3 rows have one fault, such as line 1" in sentence and reason in sentence
        assert "correct or remove the row" not in sentence


# -- rows -----------------------------------------------------------------------------------------


def test_bad_rows_are_counted_and_left_out_if_that_is_asked_for(tmp_path: Path) -> None:
    rows = [{"question": f"Q{n}", "answer": None if n % 3 == 0 else float(n)} for n in range(9)]
    path = parquet(tmp_path / "a.parquet", rows)
    sentence = refusal(path)
    assert (
        "row 1: column 'answer' is missing or null" in sentence
        and "3 of 9 rows are bad" in sentence
    )
    assert "training.skip_bad_rows=true" in sentence
    found = read(path, skip_bad_rows=True)
    assert "3 of 9 rows are bad and left out" in only(found.notes)
    assert [number for number, row in enumerate(found.rows) if row is None] == [0, 3, 6]
    assert answers(found) == ["1.0", "2.0", "4.0", "5.0", "7.0", "8.0"]


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("a.jsonl", '\n{"question": "cut o'),
        ("a.jsonl", '\n["a", "list"]'),
        ("a.jsonl", '\n{"question": "Q"}'),
        ("a.jsonl", '\n{"question": "\\ud800", "answer": "1"}'),
    ],
)
def test_any_kind_of_bad_row_can_be_skipped(tmp_path: Path, name: str, tail: str) -> None:
    path = put(tmp_path / name, LINES + tail)
    assert "line 11" in refusal(path)
    found = read(path, skip_bad_rows=True)
    assert len(found.problems) == 10 and "1 of 11 rows" in only(found.notes)


def test_a_file_of_bad_rows_only_is_refused_all_the_same(tmp_path: Path) -> None:
    path = put(
        tmp_path / "a.jsonl", '{"question": "Q", "answer": null}\n{"question": "", "answer": "1"}'
    )
    assert "2 of 2 rows are bad" in refusal(path, skip_bad_rows=True)


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"question": f"Q{n}", "answer": ["proof", "notfound", "5"][n % 3]} for n in range(9)]
    found = read(parquet(tmp_path / "a.parquet", rows))
    assert answers(found) == ["5"] * 3 and "6 of 9 rows" in only(found.notes)
    assert "3 x 'proof', 3 x 'notfound'" in only(found.notes)
    assert "no problem is left" in refusal(parquet(tmp_path / "b.parquet", rows[:2]))


def test_a_key_that_the_first_lines_leave_out_is_no_missing_column(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"question": "Q"}\n' + LINES)
    assert "line 1: column 'answer' is missing or null" in refusal(path)
    assert answers(read(path, skip_bad_rows=True)) == [row["answer"] for row in ROWS]


# -- files ----------------------------------------------------------------------------------------


def arrow(path: Path, rows: list[dict], file: bool) -> Path:
    table = pa.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_file if file else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)
    return path


CSV = "question,answer\n" + "\n".join(f"{row['question']},{row['answer']}" for row in ROWS)
COLUMNS = {key: [row[key] for row in ROWS] for key in ("question", "answer")}
PANDAS = {key: {str(n): value for n, value in enumerate(values)} for key, values in COLUMNS.items()}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.JSON", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.json", json.dumps({"train": ROWS})),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({"train": ROWS, "test": ROWS[:2]})),
        ("a.json", json.dumps(COLUMNS)),
        ("a.json", json.dumps(PANDAS)),
        ("a.csv", CSV),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.csv", CSV.replace("\n", "\r\n")),
        ("a.csv", CSV.replace(",", ";")),
        ("a.tsv", CSV.replace(",", "\t")),
    ],
)
def test_a_file_is_read_as_what_it_plainly_is(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    found = read(put(tmp_path / name, content))
    assert found.problems == [Problem(row["question"], row["answer"], "") for row in ROWS]


@pytest.mark.parametrize("file", [True, False])
def test_arrow_files_are_read(tmp_path: Path, file: bool) -> None:
    assert len(read(arrow(tmp_path / "a.arrow", ROWS, file)).problems) == 10


def test_quotes_and_line_breaks_in_csv_belong_to_the_field(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", 'question,answer\n"Two lines,\n""quoted""; what?",007\n')
    assert read(path).problems == [Problem('Two lines,\n"quoted"; what?', "007", "")]
    path = put(tmp_path / "b.csv", CSV + "\na,b,c")
    assert "row 11: it has 3 fields, but the header 2" in refusal(path)
    assert len(read(path, skip_bad_rows=True).problems) == 10


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.json",
            '[{"question": "a" "b"}]',
            "neither a JSON list of objects nor one object a line",
        ),
        (
            "a.json",
            json.dumps({"one": ROWS, "two": ROWS}),
            "holds several lists, one, two; keep one",
        ),
        ("a.json", json.dumps({"test": ROWS}), "holds nothing for training, by the names: test"),
        (
            "a.jsonl",
            '{"question": "\u5c0f\u660e"}'.encode("gb18030"),
            "is not UTF-8 text; convert it",
        ),
        (
            "a.parquet",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a pointer of Git LFS",
        ),
        ("a.jsonl", "\n<!DOCTYPE html>\n<html>", "is a web page"),
        ("a.jsonl.gz", LINES, "cannot be read as a .jsonl file"),
        ("a.jsonl", gzip.compress(LINES.encode()), "is compressed; name it a.jsonl.gz"),
        ("a.csv", b"BZh91AY&SY", "is compressed; name it a.csv.bz2"),
        ("a.jsonl", LINES + "\n" + "\0" * 512, "holds NUL bytes, as a copy that was cut off"),
        ("a.parquet", b"", "cannot be read as a .parquet file: Parquet file size is 0 bytes; copy"),
        ("a.parquet.gz", "x", "only texts are read compressed"),
        ("a.zip", "PK", "of an unknown kind; name a file that ends in .parquet"),
    ],
)
def test_what_has_no_plain_meaning_is_one_sentence_in_the_words_of_the_user(
    tmp_path: Path, name: str, content: str | bytes, sentence: str
) -> None:
    said = refusal(put(tmp_path / name, content))
    assert sentence in said and name in said and "\n" not in said


def test_a_damaged_text_in_parquet_is_no_matter_of_encoding(tmp_path: Path) -> None:
    damaged = pa.array([b"What \xff"]).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": damaged, "answer": ["1"]}), path)
    assert "holds texts that are none: damaged; copy it again" in refusal(path)


# -- folders --------------------------------------------------------------------------------------


def snapshot(folder: Path) -> Path:
    """As hub data sets are laid out."""
    parquet(folder / "train-00000-of-00002.parquet", ROWS[:4])
    parquet(folder / "train-00001-of-00002.parquet", ROWS[4:8])
    parquet(folder / "test-00000-of-00001.parquet", ROWS[8:])
    put(folder / "README.md", "# Data")
    put(folder / ".cache" / "x.parquet", "x")
    return folder


def test_files_of_other_splits_are_left_out_and_named(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "hub")
    found = read(folder)
    assert answers(found) == [row["answer"] for row in ROWS[:8]]
    assert "left out, of another split: test-00000-of-00001.parquet" in only(found.notes)
    found = read(folder, held_out=True)
    assert answers(found) == ["9", "10"]
    assert "left out, of another split: train-00000-of-00002.parquet, train-" in only(found.notes)


def test_some_of_a_numbered_set_of_files_are_not_all_of_it(tmp_path: Path) -> None:
    """As a download that broke off leaves them."""
    for name in ("train-00000-of-00003.parquet", "train-00002-of-00003-1f2e3d4c.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput, match="2 of the 3 files .*: train-00001-of-00003 is not there"):
        data_files(tmp_path)
    (tmp_path / "train-00001-of-00003.parquet").write_bytes(b"")
    (tmp_path / "test-00000-of-00002.parquet").write_bytes(b"")
    assert len(data_files(tmp_path).files) == 3, "what is left out may lack files"
    assert len(data_files(tmp_path / "test-00000-of-00002.parquet").files) == 1


@pytest.mark.parametrize(
    ("names", "held_out", "kept"),
    [
        (("math.jsonl", "math_val.jsonl", "math-dev.jsonl"), False, ["math.jsonl"]),
        (
            ("gsm8k_train.json", "gsm8k.validation.json", "gsm8k_eval_1.json"),
            False,
            ["gsm8k_train.json"],
        ),
        (
            ("a.csv", "contest.csv", "latest.csv", "validity.csv"),
            False,
            ["a.csv", "contest.csv", "latest.csv", "validity.csv"],
        ),
        (("a.csv", "train_1.csv", "TEST.csv"), True, ["TEST.csv", "a.csv"]),
        (("train_test_split.json", "test.json"), False, ["train_test_split.json"]),
    ],
)
def test_words_in_the_names_say_which_split_it_is(
    tmp_path: Path, names: Sequence[str], held_out: bool, kept: list[str]
) -> None:
    for name in names:
        put(tmp_path / name, "x")
    assert [file.name for file in data_files(tmp_path, held_out).files] == kept


def test_a_folder_of_another_split_only_is_refused_and_its_file_read(tmp_path: Path) -> None:
    path = put(tmp_path / "x" / "test.jsonl", LINES)
    assert "holds nothing for training, by the names: test.jsonl" in refusal(path.parent)
    assert len(read(path).problems) == len(read(path.parent, held_out=True).problems) == 10


def test_a_folder_around_one_folder_of_data_stands_for_it(tmp_path: Path) -> None:
    put(tmp_path / "one" / "data" / "train.jsonl", LINES)
    put(tmp_path / "one" / "dataset_infos.json", "{}")
    assert len(read(tmp_path / "one").problems) == 10
    for part in ("train", "test"):  # as `save_to_disk` of Hugging Face datasets writes it
        arrow(
            tmp_path / "saved" / part / "data-00000-of-00001.arrow",
            ROWS[part == "test" :],
            file=False,
        )
        put(tmp_path / "saved" / part / "state.json", "{}")
    put(tmp_path / "saved" / "dataset_dict.json", "{}")
    assert len(read(tmp_path / "saved").problems) == 10
    assert len(read(tmp_path / "saved", held_out=True).problems) == 9
    for part in ("main", "socratic"):
        put(tmp_path / "two" / part / "train.jsonl", LINES)
    assert "its folders main, socratic do: name one of them" in refusal(tmp_path / "two")
    put(tmp_path / "none" / "notes.txt", "x")
    assert "holds no data files" in refusal(tmp_path / "none")


def test_tags_are_those_of_the_rows_that_are_read(tmp_path: Path) -> None:
    parquet(tmp_path / "test.parquet", [{"level": n} for n in range(3)])
    parquet(tmp_path / "train.parquet", [{"level": 9}])
    assert read_tags(tmp_path, ("level", "subject")) == {"level": ["0", "1", "2"]}


# -- held-out data --------------------------------------------------------------------------------


def test_held_out_data_may_have_other_columns(home: Path) -> None:
    put(home / "g.jsonl", LINES)
    put(home / "math500.jsonl", json.dumps({"problem": "1+1?", "answer": "2"}))
    paths = [
        f"actor_rollout.data_path={home}/g.jsonl",
        f"training.eval_data_path={home}/math500.jsonl",
        MAP_KEYS,
    ]
    sentence = only(check(load(home, *paths)))
    assert "no column 'question'" in sentence and "set training.eval_map_keys" in sentence
    assert check(load(home, *paths, "training.eval_map_keys={prompt: problem}")) == []
    assert (
        check(
            load(home, *paths, 'training.eval_map_keys={"prompt": "problem", "response": "answer"}')
        )
        == []
    )
    sentence = only(
        check(load(home, *paths, "training.eval_map_keys={prompt: problem, response: gold}"))
    )
    assert "no column 'gold'" in sentence


def test_a_system_column_that_only_training_has_is_no_fault_of_the_held_out_data(
    home: Path,
) -> None:
    put(home / "g.csv", "question,answer,sys\n1+1?,2,Be brief.\n2+2?,4,Be brief.")
    put(home / "held.jsonl", LINES)
    keys = [
        "training.map_keys={prompt: question, response: answer, system: sys}",
        f"actor_rollout.data_path={home}/g.csv",
        f"training.eval_data_path={home}/held.jsonl",
    ]
    assert check(load(home, *keys)) == []
    assert any("has no column 'sys'" in line for line in look_at_data(load(home, *keys)))
    sentence = only(check(load(home, *keys, "training.eval_map_keys.system=sys")))
    assert "training.eval_data_path" in sentence and "no column 'sys'" in sentence
    swapped = [keys[0], f"actor_rollout.data_path={home}/held.jsonl"]
    assert "no column 'sys'" in only(check(load(home, *swapped)))


def test_system_texts_without_a_place_in_the_template_are_found_before_the_run(
    home: Path,
) -> None:
    put(home / "g.csv", "question,answer,sys\n1+1?,2,Be brief.")
    keys = [
        "training.map_keys={prompt: question, response: answer, system: sys}",
        f"actor_rollout.data_path={home}/g.csv",
        "training.prompt_type=plain",
        "actor_rollout.stop=['<|endoftext|>']",
    ]
    assert "has no {system}" in only(check(load(home, *keys)))


def test_what_is_left_out_of_the_data_of_a_run_is_told(home: Path) -> None:
    folder = snapshot(home / "hub")
    cfg = load(
        home, MAP_KEYS, f"actor_rollout.data_path={folder}", f"training.eval_data_path={folder}"
    )
    assert check(cfg) == []
    train, held_out = look_at_data(cfg)
    assert train.startswith("actor_rollout.data_path: ") and "split: test-00000" in train
    assert held_out.startswith("training.eval_data_path: ") and "split: train-00000" in held_out


def test_skip_bad_rows_is_a_key_of_the_configuration(home: Path) -> None:
    path = put(home / "a.jsonl", LINES + '\n{"question": "Q", "answer": null}')
    keys = [MAP_KEYS, f"actor_rollout.data_path={path}"]
    assert "line 11" in only(check(load(home, *keys)))
    cfg = load(home, *keys, "training.skip_bad_rows=true")
    assert check(cfg) == [] and "1 of 11 rows are bad and left out" in only(look_at_data(cfg))
