"""Preprocessed data: files that Megatron reads, prompts equal to those of the raw rows, and
blends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from support.prompt_streams import prompts_of
from support.small_config import load, only
from support.tool import TOOLS, run_here
from transformers import PreTrainedTokenizerBase

from r1zero.data.blend import Blend, split_blend
from r1zero.data.indexed import IndexedWriter, index_path, read_indexed, values_path
from r1zero.data.layout import ColumnLayout
from r1zero.data.preprocessed import read_preprocessed, stem
from r1zero.data.prompts import Prompts, load_tokenizer
from r1zero.data.template import Template
from r1zero.errors import BadInput
from r1zero.preflight.checks import check
from r1zero.types import Prompt

TOOL = "preprocess_data.py"
KEYS = {"prompt": "question", "query": "", "response": "ground_truth_answer", "system": ""}
ROWS = [
    {
        "question": f"What is {n}+{n * n}?" + " Tell me." * (n % 5),
        "ground_truth_answer": str(n + n * n),
    }
    for n in range(600)
]
Tokens = PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokens:
    return load_tokenizer(tiny / "model")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def flags(raw: Path, tiny: Path, prefix: Path, *more: str) -> list[str]:
    """The command line as the feature that we succeed has it."""
    return [
        "--input",
        str(raw),
        "--tokenizer-name-or-path",
        str(tiny / "model"),
        "--output-prefix",
        str(prefix),
        "--tokenizer-type",
        "PretrainedFromHF",
        "--log-interval",
        "1000",
        "--prompt-type",
        "qwen_r1",
        "--map-keys",
        json.dumps(KEYS),
        *more,
    ]


@pytest.fixture(
    scope="module", params=["AlpacaStyleInstructionHandler", "R1AlpacaStyleInstructionHandler"]
)
def made(
    request: pytest.FixtureRequest, raw: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    prefix = tmp_path_factory.mktemp("packed") / "data"
    assert run_here(TOOL, *flags(raw, tiny, prefix, "--handler-name", request.param)) == 0
    return prefix


def prompts(
    data_path: Path | str, tokenizer: Tokens, limit: int = 64, seed: int = 7, **keys: bool
) -> Prompts:
    return prompts_of(
        data_path, ColumnLayout(KEYS), Template("qwen_r1"), tokenizer, limit, seed, **keys
    )


def plain(prompt: Prompt) -> tuple:
    return prompt.index, prompt.text, prompt.tokens.dtype, prompt.tokens.tolist(), prompt.answer


# -- files ----------------------------------------------------------------------------------------


def test_megatron_reads_the_files_and_finds_the_tokens_of_the_rows(
    made: Path, tokenizer: Tokens
) -> None:
    fields = {
        name: IndexedDataset(str(stem(made, name)))
        for name in ("input_ids", "attention_mask", "labels")
    }
    render, separate = (
        Template("qwen_r1").render,
        len(fields["labels"][0]) != len(fields["input_ids"][0]),
    )
    for number, row in enumerate(ROWS):
        prompt = tokenizer(render(row["question"]), add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["ground_truth_answer"], add_special_tokens=False)["input_ids"]
        if not separate:
            answer.append(tokenizer.eos_token_id)
        expected = (
            (prompt, answer) if separate else (prompt + answer, [-100] * len(prompt) + answer)
        )
        assert (fields["input_ids"][number].tolist(), fields["labels"][number].tolist()) == expected
        assert fields["attention_mask"][number].tolist() == [1] * len(expected[0])
    for field in fields.values():
        assert len(field) == len(ROWS) and field.index.dtype == np.int32
        assert field.document_indices.tolist() == list(range(len(ROWS) + 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_files_that_megatron_writes_are_read(tmp_path: Path, dtype: type) -> None:
    documents = [[[5, 6], [7]], [], [[9]], [[1, 2, 3]]]
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    found = read_indexed(tmp_path / "x")
    assert [found[d].tolist() for d in range(len(found))] == [[5, 6, 7], [], [9], [1, 2, 3]]


def test_an_empty_set_is_written_as_megatron_writes_it(tmp_path: Path) -> None:
    with IndexedWriter([tmp_path / "ours"]) as writer:
        writer.add(None)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.int32)
    builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert len(read_indexed(tmp_path / "ours")) == 1


def test_a_failure_leaves_the_earlier_files_and_no_others(tmp_path: Path) -> None:
    def write(value: int) -> None:
        with IndexedWriter([tmp_path / "a", tmp_path / "b"]) as writer:
            writer.add([np.array([value]), np.array([value])])
            if value == 2:
                raise KeyboardInterrupt

    write(1)
    with pytest.raises(KeyboardInterrupt):
        write(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin", "b.idx"]
    assert read_indexed(tmp_path / "a")[0].tolist() == [1]


def test_a_killed_run_leaves_nothing_under_the_names_of_the_data(
    tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS * 500)))
    command = [sys.executable, str(TOOLS / TOOL), *flags(path, tiny, tmp_path / "out" / "data")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while (
            not any(file.stat().st_size for file in tmp_path.glob("out/*"))
            and process.poll() is None
        ):
            time.sleep(0.01)
        assert process.poll() is None, "it must be killed while it writes"
        process.send_signal(signal.SIGKILL)
    left = [file.name for file in (tmp_path / "out").iterdir()]
    assert left and all(re.search(r"\.partial-\d+$", name) for name in left)


# -- prompts --------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_raw_rows_token_for_token(
    made: Path, raw: Path, tokenizer: Tokens
) -> None:
    # 22 tokens: the limit drops some rows on either way.
    ours, theirs = (prompts(path, tokenizer, limit=22) for path in (made, raw))
    assert 0 < ours.num_dropped == theirs.num_dropped
    assert list(map(plain, ours.draw(0, 1500))) == list(map(plain, theirs.draw(0, 1500)))


def test_rows_that_are_too_long_are_left_out_and_the_others_keep_their_numbers(
    raw: Path, tiny: Path, tokenizer: Tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(TOOL, *flags(raw, tiny, tmp_path / "data", "--seq-length", "22")) == 0
    kept = [prompt for prompt in prompts(raw, tokenizer).prompts if len(prompt.tokens) < 22]
    assert 0 < len(kept) < 600 and capsys.readouterr().out.startswith(f"{len(kept)} rows")
    assert list(map(plain, prompts(tmp_path / "data", tokenizer).prompts)) == list(map(plain, kept))


def test_any_number_of_workers_writes_the_same_bytes(raw: Path, tiny: Path, tmp_path: Path) -> None:
    assert run_here(TOOL, *flags(raw, tiny, tmp_path / "1", "--workers", "1")) == 0
    command = [
        sys.executable,
        str(TOOLS / TOOL),
        *flags(raw, tiny, tmp_path / "2", "--workers", "2"),
    ]
    subprocess.run(command, check=True)
    for field in ("input_ids", "attention_mask", "labels"):
        for path in (index_path, values_path):
            one, two = (path(stem(tmp_path / workers, field)).read_bytes() for workers in "12")
            assert one == two and len(one) > 600


# -- blends ---------------------------------------------------------------------------------------


def test_a_path_or_weights_and_paths_are_understood(tmp_path: Path) -> None:
    assert split_blend("data/train.parquet") == [(1.0, "data/train.parquet")]
    assert (
        split_blend("3,a,1,b")
        == split_blend(" 0.75  a 0.25 b")
        == split_blend("3, a, 1, b")
        == [(0.75, "a"), (0.25, "b")]
    )
    # longer than any path
    assert len(split_blend(",".join(f"1,{'x' * 90}{n}" for n in range(99)))) == 99
    (tmp_path / "1,x 2").touch()
    assert split_blend(f"{tmp_path}/1,x 2") == [(1.0, f"{tmp_path}/1,x 2")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a,b", "the weight of b is 'a'"),
        ("1,a,b", "weights and paths in turn"),
        ("1,a,0,b", "the weight of b is '0'"),
        ("1,a,nan,b", "the weight of b is 'nan'"),
        ("1 a -2 b", "the weight of b is '-2'"),
        ("", "it is empty"),
        ("1,a,1,", "no path follows the weight 1"),
        ("1e308,a,1e308,b", "add up to infinity"),
    ],
)
def test_a_malformed_blend_is_named(text: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        split_blend(text)


@pytest.mark.parametrize(
    "weights", [[1.0], [0.5, 0.5], [0.7, 0.3], [3, 1, 1, 0.01], list(range(1, 8))]
)
def test_blends_are_those_of_megatron(weights: list[float]) -> None:
    shares, size = [weight / sum(weights) for weight in weights], 3000
    sets, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(sets, numbers, shares, len(shares), size, False)
    blend = Blend(shares)
    assert blend[size - 1] == (sets[-1], numbers[-1])  # any order of asking
    assert [blend[n] for n in range(size)] == list(
        zip(sets.tolist(), numbers.tolist(), strict=True)
    )
    counts = np.cumsum(sets[:, None] == np.arange(len(shares)), axis=0)
    off = np.abs(counts - np.arange(1, size + 1)[:, None] * np.asarray(shares))
    assert off.max() < 2  # prompts, at every position


def test_each_data_set_of_a_blend_gives_its_prompts_in_its_own_order(
    made: Path, raw: Path, tokenizer: Tokens
) -> None:
    drawn = prompts(f"3,{made},1,{raw}", tokenizer).draw(0, 2400)
    first, second = ([p for p in drawn if (p.index < 600) == which] for which in (True, False))
    assert (len(first), len(second)) == (1800, 600)
    alone = prompts(raw, tokenizer).draw(0, 1800)
    assert list(map(plain, first)) == list(map(plain, alone))
    # one epoch, numbered behind the first
    assert sorted(p.index for p in second) == list(range(600, 1200))
    assert [p.index - 600 for p in second] != [p.index for p in alone[:600]]


def test_a_blend_depends_on_seed_and_position_alone(
    made: Path, raw: Path, tokenizer: Tokens
) -> None:
    text = f"0.6 {made} 0.4 {raw}"
    whole = [p.index for p in prompts(text, tokenizer).draw(0, 3000)]
    again = prompts(text, tokenizer)
    for start, count in ((2900, 64), (0, 7), (595, 1200)):
        assert [p.index for p in again.draw(start, count)] == whole[start : start + count]
    assert [p.index for p in prompts(text, tokenizer, seed=8).draw(0, 3000)] != whole


# -- bad input ------------------------------------------------------------------------------------


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def replace_labels(prefix: Path, *documents: list[int]) -> None:
    with IndexedWriter([stem(prefix, "labels")]) as writer:
        for document in documents:
            writer.add([np.asarray(document)])


def set_dtype(prefix: Path, code: int) -> None:
    path = index_path(stem(prefix, "labels"))
    content = bytearray(path.read_bytes())
    content[17] = code
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda p: index_path(stem(p, "input_ids")).unlink(),
            "input_ids_document.idx cannot be read: No such",
        ),
        (
            lambda p: values_path(stem(p, "labels")).unlink(),
            "labels_document.bin cannot be read: No such file",
        ),
        (
            lambda p: index_path(stem(p, "labels")).unlink(),
            "no .*labels_document.idx.* --handler-name R1Alpaca",
        ),
        (
            lambda p: cut(values_path(stem(p, "input_ids")), 3),
            "has 17 bytes, but its index describes 20",
        ),
        (
            lambda p: cut(index_path(stem(p, "input_ids")), 3),
            "has 79 bytes, but its header describes 82",
        ),
        (lambda p: index_path(stem(p, "labels")).write_bytes(b"PK"), "is not the index"),
        (lambda p: set_dtype(p, 7), "the numbers are float32, but token ids are whole"),
        (lambda p: set_dtype(p, 9), "number type 9; known are"),
        (lambda p: set_dtype(p, 8), "contradict each other"),
        (lambda p: replace_labels(p, [3]), "2 documents of input_ids, but 1 of labels"),
        (lambda p: replace_labels(p, [3], [100]), "labels.*, document 1: token id 100 is outside"),
        (lambda p: replace_labels(p, [3], [-5]), r"document 1: token id -5 is outside"),
        (
            lambda p: replace_labels(p, [3], [-100, -100, 8]),
            "document 1: labels must be -100 on the prompt",
        ),
        (
            lambda p: replace_labels(p, [3], [-100, -100]),
            "document 1: labels must be|document 1 has no answer",
        ),
        (lambda p: replace_labels(p, [], [4]), "document 0 has no answer"),
    ],
)
def test_files_that_are_damaged_or_do_not_fit_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    prefix = tmp_path / "data"
    with IndexedWriter([stem(prefix, "input_ids"), stem(prefix, "labels")]) as writer:
        writer.add([np.array([1, 2]), np.array([3])])
        writer.add([np.array([4, 5, 6]), np.array([7])])
    assert [row.prompt.tolist() for row in read_preprocessed(prefix, 100)] == [[1, 2], [4, 5, 6]]
    damage(prefix)
    with pytest.raises(BadInput, match=sentence):
        list(read_preprocessed(prefix, 100))


def test_data_is_looked_at_before_a_run_starts(home: Path) -> None:
    prefix = home / "packed"
    with IndexedWriter([stem(prefix, "input_ids"), stem(prefix, "labels")]) as writer:
        writer.add([np.array([1, 2, 127]), np.array([3])])
    raw = home / "train.parquet"
    assert check(load(home, f"actor_rollout.data_path={prefix}")) == []
    assert check(load(home, f"actor_rollout.data_path='0.5,{prefix},0.5,{raw}'")) == []
    assert "0.5,b.parquet" in only(check(load(home, "actor_rollout.data_path=0.5,b.parquet,1")))
    absent = f"actor_rollout.data_path=1,{home}/packet,1,{raw}"
    assert f"{home}/packet does not exist" in only(check(load(home, absent)))
    with IndexedWriter([stem(prefix, "input_ids"), stem(prefix, "labels")]) as writer:
        writer.add([np.array([1, 2, 128]), np.array([3])])
    assert "vocabulary of 128" in only(check(load(home, f"actor_rollout.data_path={prefix}")))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--map-keys", "{"], "--map-keys: not valid JSON"),
        (["--map-keys", '{"promt": "question"}'], "'promt' is not one of .*did you mean prompt"),
        (["--map-keys", '{"prompt": "question", "response": "solution"}'], "no column 'solution'"),
        (
            [
                "--map-keys",
                '{"prompt": "question", "response": "ground_truth_answer", "history": "h"}',
            ],
            "history='h'",
        ),
        (["--input", "/nowhere.parquet"], "/nowhere.parquet does not exist"),
        (["--output-prefix", "/proc/x/data"], "/proc/x cannot be written"),
        (
            ["--handler-name", "R1AlpacaStyleHandler"],
            "did you mean R1AlpacaStyleInstructionHandler",
        ),
        (["--prompt-type", "qwen_r2"], "qwen_r1"),
        (["--tokenizer-name-or-path", "/nowhere"], "/nowhere has no tokenizer.json"),
        (["--seq-length", "3"], "every row has a field of that many tokens"),
        (["--dataset-additional-keys", "labels", "categories"], "only labels can be added"),
        (["--workers", "0"], "0 is not a whole number above 0"),
    ],
)
def test_bad_flags_are_refused_and_nothing_is_written(
    raw: Path,
    tiny: Path,
    tmp_path: Path,
    wrong: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run_here(TOOL, *flags(raw, tiny, tmp_path / "data", *wrong)) == 2
    assert re.search(sentence, capsys.readouterr().err) and not list(tmp_path.iterdir())
