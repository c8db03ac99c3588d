"""Right answers: what of them is compared, which look like none, and who is told before a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.boxed import boxed
from support.program import run_program
from support.prompt_streams import prompts_of
from support.small_config import load, only
from support.tool import TOOLS, functions, run_here

from r1zero.data.layout import ColumnLayout
from r1zero.data.prompts import load_tokenizer
from r1zero.data.sources import EVAL_DATA, TRAIN_DATA
from r1zero.data.survey import DataSet, question_in, survey
from r1zero.data.template import Template
from r1zero.preflight.checks import check
from r1zero.preflight.datasets import look_at_data, look_at_prompts
from r1zero.reward.math.gold import are_hopeless, fault_of, read_gold, survey_golds

ROOT = TOOLS.parent
KEYS = {"prompt": "question", "response": "answer"}
MAP_KEYS = "training.map_keys={prompt: question, response: answer}"
SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = 72 clips.\n#### 72"


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows(answers: list[object]) -> list[dict]:
    return [{"question": f"Question {n}?", "answer": answer} for n, answer in enumerate(answers)]


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (SOLUTION, "72"),
        ("#### 72", "72"),
        ("we add.\n#### 23", "23"),
        ("#### 1,234,567", "1234567"),
        ("#### -1,000.5", "-1000.5"),
        ("#### (1,234)", "(1,234)"),
        ("a #### 1\nb\n#### 2\nThe answer is: 2", "2"),
        ("['22']", "22"),
        ('["22"]', "22"),
        ("['7', '7']", "7"),
        (r"['\\frac{1}{2}']", r"\frac{1}{2}"),
        ("['#### 5']", "5"),
        (r"So $x=\boxed{5}$, as asked.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<think>a</think><answer> 5 </answer>", "5"),
        (r"<answer>\boxed{6}</answer>", "6"),
        # What has no such form stays as it is.
        ("72", "72"),
        (" 72\n", "72"),
        ("1,234", "1,234"),
        ("[-9, 9]", "[-9, 9]"),
        ("[22]", "[22]"),
        (r"\left[ \frac{\pi^2}{8}, 5 \right]", r"\left[ \frac{\pi^2}{8}, 5 \right]"),
        ("['1', '2']", "['1', '2']"),
        ("He has 7 apples", "He has 7 apples"),
        ("####", "####"),
        ("['x' for x in range(9)]", "['x' for x in range(9)]"),
    ],
)
def test_the_answer_in_a_right_answer(text: str, answer: str) -> None:
    assert read_gold(text) == answer == read_gold(answer)


def preprocess(data: Path | str, prefix: Path, tiny: Path, *more: str) -> int:
    """Run tools/preprocess_data.py on a raw file; returns its exit code."""
    flags = ["--input", str(data), "--output-prefix", str(prefix), "--map-keys", json.dumps(KEYS)]
    return run_here(
        "preprocess_data.py", *flags, "--tokenizer-name-or-path", str(tiny / "model"), *more
    )


def test_every_reader_gives_the_same_answer(tmp_path: Path, tiny: Path) -> None:
    data = lines(tmp_path / "gsm8k.jsonl", rows([SOLUTION, "#### 1,234", ["5"], "['22']", 7]))
    tokenizer, template = load_tokenizer(tiny / "model"), Template("qwen_r1")
    raw = prompts_of(data, ColumnLayout(KEYS), template, tokenizer, 500, seed=1)
    expected = ["72", "1234", "5", "22", "7"]
    assert [prompt.answer for prompt in raw.prompts] == expected
    assert preprocess(data, tmp_path / "made", tiny) == 0
    made = prompts_of(tmp_path / "made", ColumnLayout(KEYS), template, tokenizer, 500, seed=1)
    assert [prompt.answer for prompt in made.prompts] == expected


def test_preprocessed_files_of_others_are_read_alike(tmp_path: Path, tiny: Path) -> None:
    from r1zero.data.indexed import IndexedWriter
    from r1zero.data.preprocessed import stem

    tokenizer = load_tokenizer(tiny / "model")
    with IndexedWriter(
        [stem(tmp_path / "made", name) for name in ("input_ids", "labels")]
    ) as writer:
        for answer in ("It is so. #### 72", "proof", "5"):
            writer.add([np.array(tokenizer(text)["input_ids"]) for text in ("1+1?", answer)])
    made = prompts_of(tmp_path / "made", ColumnLayout(), Template("plain"), tokenizer, 500, seed=1)
    assert [(prompt.index, prompt.answer) for prompt in made.prompts] == [(0, "72"), (2, "5")]
    assert "1 of 3 problems have no answer to compare with" in only(made.notes)


def test_score_reads_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        {"gold": gold, "response": boxed(given)}
        for gold, given in (
            ("#### 72", "72"),
            (SOLUTION, "72"),
            (SOLUTION, "24"),
            ("['22']", "22"),
            ("He has 7 apples", "7"),
        )
    ]
    assert run_here("score.py", "--input", str(lines(tmp_path / "cases.jsonl", cases))) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["outcome"] for line in said.out.splitlines()] == [
        "right",
        "right",
        "wrong",
        "right",
        "wrong",
    ]
    assert "1 of 5 golds do not look like answers: 'He has 7 apples' (a sentence)" in said.err


def test_rescore_reads_it_too(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"prompt": "48/2+48?", "response_length": 9, "truncated": False, "reward": -1.0}
    saved = {"score/acc": -1.0, "outcome/acc": "wrong"}
    samples = [
        {"position": n, "member": 0, "response": boxed(given), "ground_truth": gold}
        for n, (gold, given) in enumerate([(SOLUTION, "72"), (SOLUTION, "24"), ("['22']", "22")])
    ]
    path = tmp_path / "step_000001.parquet"
    pq.write_table(pa.Table.from_pylist([told | saved | sample for sample in samples]), path)
    assert run_here("rescore.py", str(path), "--config", "tiny", "--verifier", "acc") == 0
    said = capsys.readouterr().out
    assert "acc: 2 changes" in said and "2  wrong -> right" in said


def test_rows_that_are_left_out_are_empty_documents(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "a.jsonl", rows(["1", None, "proof", "4", "a sentence of 9 words"]))
    assert preprocess(data, tmp_path / "made", tiny) == 2
    assert "line 2: column 'answer' is missing or null" in (said := capsys.readouterr().err)
    assert "--skip-bad-rows" in said
    assert preprocess(data, tmp_path / "made", tiny, "--skip-bad-rows") == 0
    said = capsys.readouterr()
    assert (
        said.out.startswith("3 rows, ") and "0 rows dropped by --seq-length, 2 left out" in said.out
    )
    assert "1 of 5 rows are bad" in said.err and "1 x 'proof'" in said.err
    assert "1 of 3 right answers of" in said.err and "do not look like answers" in said.err
    made, raw = (
        prompts_of(
            path,
            ColumnLayout(KEYS, skip_bad_rows=True),
            Template("qwen_r1"),
            load_tokenizer(tiny / "model"),
            500,
            seed=1,
        )
        for path in (tmp_path / "made", data)
    )
    assert (
        [prompt.index for prompt in made.prompts]
        == [prompt.index for prompt in raw.prompts]
        == [0, 3, 4]
    )
    assert [prompt.text for prompt in made.prompts] == [prompt.text for prompt in raw.prompts]


# -- judging --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("He has 7 apples", "a sentence"),
        ("The answer is 5.", "a sentence"),
        ("['1', '2']", "a list of several"),
        ("", "empty"),
        ("  ", "empty"),
        ("It follows. ####", "nothing behind ####"),
        ("x" * 1001, "longer than 1000"),
        ("{'value': 5}", "no number"),
        ("nan", "a missing value"),
        ("https://example.org/5", "a sentence"),
        ("We add both numbers and find that they are equal", "a sentence"),
        ("\u5c0f\u660e\u4e00\u5171\u67097\u4e2a\u82f9\u679c", "a sentence"),
    ],
)
def test_what_does_not_look_like_an_answer(gold: str, reason: str) -> None:
    assert reason in fault_of(gold)


@pytest.mark.parametrize(
    "gold",
    [
        "72",
        "-3.5",
        "1,234",
        r"\frac{1}{2}",
        "x^2+1",
        "(1, 2)",
        r"(-\infty, 3] \cup (5, 7)",
        "[-9, 9]",
        "5:00 p.m.",
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        "(C)",
        "B",
        "Yes",
        "Monday",
        "no solution",
        r"\text{even}",
        "9 (apples)",
        "2 (cut-outs of Christmas trees)",
        "11:55 p.m. on 24 December 2014",
        r"\int_0^1 x\,dx",
        "3 hours 20 minutes",
        r"$p=5,q=2;p=7,q=2$",
        "52_8",
        "increase by 5%",
        r"f(x)=\sum_{i=0}^n x^i",
        "Westford location",
        "1e-05",
        "\u662f",
        "\u7b54\u6848\u662f5",
    ],
)
def test_what_does(gold: str) -> None:
    assert fault_of(gold) == ""


def test_answers_that_the_reader_knows_hardly_ever_seem_odd() -> None:
    known = [
        json.loads(line)["gold"]
        for line in (ROOT / "tests" / "reward" / "answer_cases.jsonl").read_text().splitlines()
    ]
    verdict = survey_golds([read_gold(gold) for gold in known])
    assert verdict.total > 1000 and verdict.odd < 0.01 * verdict.total, verdict


def test_each_different_answer_is_an_example_once() -> None:
    verdict = survey_golds(["He has 7 apples"] * 5 + ["1"] * 4)
    assert (verdict.total, verdict.odd, len(verdict.examples)) == (9, 5, 1)
    assert (
        not are_hopeless(["He has 7 apples", "5"])
        and are_hopeless(["He has 7 apples"])
        and not are_hopeless([])
    )


# -- before a run ---------------------------------------------------------------------------------


def test_raw_gsm8k_is_fine(home: Path) -> None:
    cfg = load(
        home, MAP_KEYS, f"actor_rollout.data_path={lines(home / 'g.jsonl', rows([SOLUTION] * 4))}"
    )
    assert check(cfg) == look_at_data(cfg) == []


@pytest.mark.parametrize(
    "answer", ["He has {} apples", "['{}', '{}1']", "See {} on the next page of the book"]
)
def test_a_few_odd_answers_are_told_and_all_are_refused(home: Path, answer: str) -> None:
    odd = [answer.format(n, n) for n in range(4)]
    cfg = load(
        home, MAP_KEYS, f"actor_rollout.data_path={lines(home / 'some.jsonl', rows([*odd, '5']))}"
    )
    assert check(cfg) == []
    said = only(look_at_data(cfg))
    assert (
        said.startswith("warning: actor_rollout.data_path: 4 of 5 right answers of")
        and repr(odd[2])[1:-1] in said
    )
    path = lines(home / "all.jsonl", rows(odd))
    sentence = only(check(load(home, MAP_KEYS, f"actor_rollout.data_path={path}")))
    assert "none of the 4 right answers" in sentence and "training.map_keys.response" in sentence
    without = load(
        home,
        MAP_KEYS,
        f"actor_rollout.data_path={path}",
        "algorithm.verifier_function=[format, repetition]",
    )
    assert check(without) == look_at_data(without) == [], "nothing compares them"


def test_check_and_doctor_print_it(tiny: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "some.jsonl", rows(["He has 7 apples", "5"]))
    sentence = "1 of 2 right answers of"
    arguments = [
        f"actor_rollout.data_path={path}",
        MAP_KEYS,
        "training.eval_data_path=null",
        f"output_dir={tmp_path}/run",
    ]
    for command in (["r1zero/main.py", "--check"], ["tools/doctor.py"]):
        done = run_program(ROOT / command[0], *command[1:], *arguments, folder=ROOT)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert sentence in done.stdout and "'He has 7 apples' (a sentence)" in done.stdout


def test_evaluate_takes_columns_for_each_data_set(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = functions("evaluate.py")
    lines(tmp_path / "a.jsonl", [{"problem": "1+1?", "answer": "2"}])
    lines(tmp_path / "b.jsonl", [{"question": "1+1?", "ground_truth_answer": "2"}])
    flags = [
        "--model",
        str(tiny / "model"),
        "--data",
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
    ]
    args = tool["parse"](
        [*flags, "--map-keys", '{"prompt": "problem", "response": "answer"}', "{}"]
    )
    assert not tool["check_files"](args)
    keys = tool["map_keys"](args)
    assert keys[str(tmp_path / "a.jsonl")]["prompt"] == "problem"
    assert keys[str(tmp_path / "b.jsonl")]["prompt"] == "question"
    args = tool["parse"]([*flags, "--map-keys", '{"prompt": "problem", "response": "answer"}'])
    assert "b.jsonl has no column 'problem'" in only(tool["check_files"](args))


# -- training on what is held out -----------------------------------------------------------------


def dataset(path: str, questions: list[str]) -> DataSet:
    return DataSet("training.eval_data_path", path, questions, ["1"] * len(questions))


def test_held_out_questions_that_are_trained_on_are_counted() -> None:
    train = dataset("train.parquet", ["What is 1+1?", "What is\n2+2?", "WHAT IS 3+3?"])
    held_out = dataset(
        "test.parquet", ["What is 2+2?", "what is 3+3?", "What is 5+5?", "What is 5+5?"]
    )
    said = only(survey([train], [held_out], compared=True))
    assert "2 of the 3 different questions of test.parquet" in said and "train.parquet" in said
    assert survey([train], [dataset("test.parquet", ["What is 4+4?"])], compared=True) == []


def test_the_same_file_for_both_is_told(home: Path) -> None:
    path = lines(home / "g.jsonl", rows(["1", "2", "3"]))
    cfg = load(home, MAP_KEYS, f"actor_rollout.data_path={path}", f"training.eval_data_path={path}")
    assert check(cfg) == [] and "3 of the 3 different questions" in only(look_at_data(cfg))


def test_a_file_with_the_name_of_a_test_set_is_told_when_it_is_trained_on(
    home: Path,
) -> None:
    path = lines(home / "math_test.jsonl", rows(["1", "2"]))
    told = look_at_data(load(home, MAP_KEYS, f"actor_rollout.data_path={path}"))
    assert "is trained on, though its name is that of another split" in only(told)
    assert look_at_data(
        load(
            home,
            MAP_KEYS,
            f"actor_rollout.data_path={lines(home / 'a.jsonl', rows(['1']))}",
            f"training.eval_data_path={path}",
            "training.eval_map_keys={}",
        )
    )


@pytest.mark.parametrize("template", ["qwen_r1", "plain", "r1_zero_paper", "two_shot_chat"])
def test_the_question_of_a_rendered_prompt_is_found_again(template: str) -> None:
    made = Template(template)
    assert question_in(made, made.render("What (is)\n1+1?")) == "What (is)\n1+1?"
    if made.takes_system:
        assert question_in(made, made.render("1+1?", "Another system text.")) == "1+1?"
    assert question_in(Template("qwen_r1"), "of no such form") == "of no such form"


def test_preprocessed_data_is_looked_at_as_raw_data_is(
    tmp_path: Path, tiny: Path, home: Path
) -> None:
    data = lines(tmp_path / "a.jsonl", rows(["1", "He has 7 apples"]))
    assert preprocess(data, tmp_path / "made", tiny) == 0
    cfg = load(
        home,
        MAP_KEYS,
        f"actor_rollout.data_path={tmp_path}/made",
        f"training.eval_data_path={data}",
        f"training.tokenizer_name_or_path={tiny}/model",
    )
    told = look_at_data(cfg)
    assert [line.partition(" right")[0] for line in told[:2]] == [
        "warning: actor_rollout.data_path: 1 of 2",
        "warning: training.eval_data_path: 1 of 2",
    ]
    assert "2 of the 2 different questions" in told[2] and len(told) == 3
    read = [
        prompts_of(
            path,
            ColumnLayout(KEYS, held_out=key == EVAL_DATA),
            Template("qwen_r1"),
            load_tokenizer(tiny / "model"),
            500,
            seed=1,
            key=key,
        )
        for key, path in ((TRAIN_DATA, tmp_path / "made"), (EVAL_DATA, data))
    ]
    assert look_at_prompts(read, {"qwen_r1": Template("qwen_r1")}) == told, "a run says the same"


def test_an_instruction_in_all_questions_is_told() -> None:
    wrapped = [
        f"Solve the following problem step by step.\n\n{n}+{n}?\n\n"
        "Remember to put your answer on its own line."
        for n in range(12)
    ]
    said = only(survey([dataset("dapo.parquet", wrapped)], [], compared=True))
    assert "begin with 'Solve the following problem step by step.'" in said
    assert "end with" in said and "answer on its own line." in said
    assert (
        survey(
            [dataset("math.parquet", [f"What is {n}+{n}?" for n in range(12)])], [], compared=True
        )
        == []
    )
